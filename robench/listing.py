"""What `robench list` shows. Imports no plugin unless it is asked for attacks of one norm."""

from __future__ import annotations

from robench.check_names import QUESTIONS
from robench.data_names import list_datasets
from robench.errors import UsageError
from robench.protocol import PROTOCOLS
from robench.registry import names, resolve

KINDS = ("defenses", "attacks", "datasets", "protocols", "checks")


def list_all(kind: str, norm: str | None = None) -> dict[str, list[str]]:
    """Lines to show, by heading.

    Raises:
        UsageError: there is no such kind.
    """
    if kind not in (*KINDS, "all"):
        raise UsageError(f'robench list takes {", ".join(KINDS)} or nothing; got "{kind}"')
    wanted = KINDS if kind == "all" else (kind,)
    makers = {
        "defenses": lambda: names("defense"),
        "attacks": lambda: [name for name in names("attack") if norm is None or norm in _norms(name)],
        "datasets": lambda: [f"{info.name} ({info.source})" for info in list_datasets()],
        "protocols": lambda: [
            f"{name} in {norm}: {', '.join(attacks)}"
            for name, protocol in PROTOCOLS.items()
            for norm, attacks in protocol.attacks.items()
        ],
        "checks": lambda: [f"{name}: {question}" for name, question in QUESTIONS.items()],
    }
    return {heading: makers[heading]() for heading in wanted}


def _norms(name: str) -> tuple[str, ...]:
    found: tuple[str, ...] = getattr(resolve("attack", name), "norms", ())
    return found
