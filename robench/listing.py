"""What `robench list` shows. Imports no plugin unless it is asked for attacks of one norm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from robench.check_names import QUESTIONS
from robench.data_names import list_datasets
from robench.errors import UsageError
from robench.protocol import DEFAULT_EPS, PROTOCOLS
from robench.registry import names, resolve

KINDS = ("defenses", "attacks", "datasets", "protocols", "checks")


def list_all(kind: str, norm: str | None = None) -> dict[str, list[Any]]:
    """What there is, by heading: names, and of datasets, protocols and checks an object of fields.

    Raises:
        UsageError: there is no such kind, or no such norm.
    """
    if norm is not None:
        from robench.threat import ThreatModel

        ThreatModel(norm, 0.0)  # an unknown norm is refused
    if kind not in (*KINDS, "all"):
        raise UsageError(f'robench list takes {", ".join(KINDS)} or nothing; got "{kind}"')
    wanted = KINDS if kind == "all" else (kind,)
    makers: dict[str, Callable[[], list[Any]]] = {
        "defenses": lambda: names("defense"),
        "attacks": lambda: [name for name in names("attack") if norm is None or norm in _norms(name)],
        "datasets": lambda: [{**vars(info), "eps": _customary(info.name)} for info in list_datasets()],
        "protocols": lambda: [
            {"name": name, "norm": norm, "attacks": list(attacks)}
            for name, protocol in PROTOCOLS.items()
            for norm, attacks in protocol.attacks.items()
        ],
        "checks": lambda: [{"name": name, "question": question} for name, question in QUESTIONS.items()],
    }
    return {heading: makers[heading]() for heading in wanted}


def tell_entry(heading: str, entry: Any) -> str:
    """A line for a reader of what `list_all` has under a heading."""
    if heading == "datasets":
        bounds = ", ".join(f"{norm} {eps}" for norm, eps in entry["eps"].items())
        return f"{entry['name']} ({entry['source']}{bounds and f'; eps: {bounds}'})"
    if heading == "protocols":
        return f"{entry['name']} in {entry['norm']}: {', '.join(entry['attacks'])}"
    return f"{entry['name']}: {entry['question']}" if heading == "checks" else str(entry)


def _customary(dataset: str) -> dict[str, str]:
    """The bounds that `robench run` takes where none is given, by norm."""
    return {norm: eps for (name, norm), eps in DEFAULT_EPS.items() if name == dataset}


def _norms(name: str) -> tuple[str, ...]:
    found: tuple[str, ...] = getattr(resolve("attack", name), "norms", ())
    return found
