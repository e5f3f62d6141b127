"""What `robench list` shows. Imports no plugin unless it is asked for attacks of one norm."""

from __future__ import annotations

from robench.check_names import QUESTIONS
from robench.data_names import list_datasets
from robench.errors import UsageError
from robench.protocol import DEFAULT_EPS, PROTOCOLS
from robench.registry import names, resolve

KINDS = ("defenses", "attacks", "datasets", "protocols", "checks")


def list_all(kind: str, norm: str | None = None) -> dict[str, list[str]]:
    """Lines to show, by heading.

    Raises:
        UsageError: there is no such kind, or no such norm.
    """
    if norm is not None:
        from robench.threat import ThreatModel

        ThreatModel(norm, 0.0)  # an unknown norm is refused
    if kind not in (*KINDS, "all"):
        raise UsageError(f'robench list takes {", ".join(KINDS)} or nothing; got "{kind}"')
    wanted = KINDS if kind == "all" else (kind,)
    makers = {
        "defenses": lambda: names("defense"),
        "attacks": lambda: [name for name in names("attack") if norm is None or norm in _norms(name)],
        "datasets": lambda: [f"{info.name} ({info.source}{_customary(info.name)})" for info in list_datasets()],
        "protocols": lambda: [
            f"{name} in {norm}: {', '.join(attacks)}"
            for name, protocol in PROTOCOLS.items()
            for norm, attacks in protocol.attacks.items()
        ],
        "checks": lambda: [f"{name}: {question}" for name, question in QUESTIONS.items()],
    }
    return {heading: makers[heading]() for heading in wanted}


def _customary(dataset: str) -> str:
    """The bounds that `robench run` takes where none is given: `; eps: linf 0.1, l2 1.5`."""
    bounds = [f"{norm} {eps}" for (name, norm), eps in DEFAULT_EPS.items() if name == dataset]
    return f"; eps: {', '.join(bounds)}" if bounds else ""


def _norms(name: str) -> tuple[str, ...]:
    found: tuple[str, ...] = getattr(resolve("attack", name), "norms", ())
    return found
