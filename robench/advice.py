"""What to do about images that do not fit and attacks that failed, for the messages that say so."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from pathlib import Path

from robench.protocol import get_protocol
from robench.registry import is_of_a_plugin
from robench.types import Images


def explain_pixels(x: Images) -> str:
    """What is wrong with pixels outside [0, 1], and what probably mends it; empty if nothing is wrong."""
    least, most = (value.item() for value in x.aminmax())  # NaN if any pixel is, and without a mask of all pixels
    if least >= 0 and most <= 1:
        return ""
    if not (math.isfinite(least) and math.isfinite(most)):
        bad = int((~x.isfinite()).flatten(1).any(1).sum())
        return f"images must be finite; {bad} of {len(x)} hold NaN or inf. Leave them out, or mend what made them"
    advice = "Divide by 255?" if least >= 0 else "Undo the normalisation, and do it inside the defense?"
    return f"images must lie in [0, 1]; got values from {least:g} to {most:g}. {advice}"


def explain_shape(came: tuple[int, ...], wanted: tuple[int, ...], name: str) -> str:
    """What is wrong with the shape of images for a defense of that name, and what probably mends it."""
    advice = "Choose another --dataset or weights"
    if came == (*wanted[1:], wanted[0]):
        advice = "Put the channels first: x.permute(0, 3, 1, 2), or of an array x.transpose(0, 3, 1, 2)"
    return f'defense "{name}" takes images of shape {wanted}; the data has {came}. {advice}'


def advise_without_gradient(reasons: Iterable[str], norm: str) -> str:
    """What to do where attacks failed since no gradient passes the defense; empty if that is not why they failed."""
    told = " ".join(reasons)
    detach = "call numpy() on Tensor that requires grad" in told
    if not detach and "gives no gradient" not in told:
        return ""
    begin = "call x.detach().numpy() in its forward, which lets no gradient pass. " if detach else ""
    way = "--protocol blackbox" if norm in get_protocol("blackbox").attacks else "--attack noise"
    return (
        f"{begin}{way} asks for no gradient. For other attacks and protocols, give adaptive_forward a differentiable "
        "stand-in: robench.bpda, see docs/attacks.md"
    )


def tell_reason(trace: str) -> str:
    """The exception in a traceback: its type, where a plugin raised it, and the first line of its message."""
    *_, last = trace.strip().split("Traceback (most recent call last):")
    lines = [line for line in last.splitlines() if line.strip()]
    told = next((line for line in lines if not line.startswith(" ")), lines[-1] if lines else "").strip()
    if told.startswith("robench.errors."):
        return told.removeprefix("robench.errors.")
    frames = re.findall(r'^  File "(.+)", line (\d+)', last, re.MULTILINE)
    place = [(file, line) for file, line in frames if is_of_a_plugin(file)][-1:]
    kind, colon, text = told.partition(":")
    where = "".join(f" at {Path(file).name}:{line}" for file, line in place)
    return f"{kind}{where}{colon}{text}"
