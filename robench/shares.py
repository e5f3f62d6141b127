"""How a share is written and shown: rounded to four decimals first, so that every display shows what the CSV holds."""

from __future__ import annotations


def write_share(share: float) -> str:
    """A share as the CSV holds it."""
    return f"{share:.4f}"


def in_percent(share: float) -> float:
    """A share in percent, of what the CSV holds: 0.01154 is 1.15, which one decimal shows as it shows 0.0115."""
    return 100 * float(write_share(share))
