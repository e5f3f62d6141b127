"""What `robench list` shows. Imports no plugin unless it is asked for recipes, weights or attacks of one norm."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from robench.check_names import QUESTIONS
from robench.data_names import list_datasets
from robench.errors import UsageError
from robench.protocol import DEFAULT_EPS, PROTOCOLS
from robench.registry import names, resolve
from robench.shell import quote_word

if TYPE_CHECKING:
    from robench.defense import Defense

KINDS = ("defenses", "attacks", "datasets", "protocols", "checks")
OPENED = ("recipes", "weights")
"""Kinds that import the defenses, and so are shown by their name alone."""


def list_all(kind: str, norm: str | None = None) -> dict[str, list[Any]]:
    """What there is, by heading: names of defenses and attacks, and of all else an object of fields.

    Raises:
        UsageError: there is no such kind, or no such norm.
    """
    if norm is not None:
        from robench.threat import ThreatModel

        ThreatModel(norm, 0.0)  # an unknown norm is refused
    if kind not in (*KINDS, *OPENED, "all"):
        raise UsageError(f'robench list takes {", ".join((*KINDS, *OPENED))} or nothing; got "{kind}"')
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
        "recipes": lambda: [entry for cls in _defenses() for entry in _recipes(cls)],
        "weights": lambda: [entry for cls in _defenses() for entry in _weights(cls)],
    }
    return {heading: makers[heading]() for heading in wanted}


def tell_entry(heading: str, entry: Any) -> str:
    """A line for a reader of what `list_all` has under a heading."""
    if heading == "datasets":
        bounds = ", ".join(f"{norm} {eps}" for norm, eps in entry["eps"].items())
        return f"{entry['name']} ({entry['source']}{bounds and f'; eps: {bounds}'})"
    if heading == "protocols":
        return f"{entry['name']} in {entry['norm']}: {', '.join(entry['attacks'])}"
    if heading == "recipes":
        return f"{entry['defense']} {entry['recipe']}{' (default)' if entry['default'] else ''}: {entry['told']}"
    if heading == "weights":
        clean, images = entry["clean_accuracy"], entry["test_images"]
        told = "clean accuracy unknown"
        if None not in (clean, images):
            told = f"clean {100 * clean:.4g} % of {images:,} test images"
        spec, size = quote_word(entry["spec"]), entry["bytes"] / 1e6
        recipe = f"recipe {entry['recipe']}{' as it then was' if entry['recipe_since'] else ''}"
        return f"{spec} {entry['dataset']}: {told}, {recipe}, {size:.1f} MB"
    return f"{entry['name']}: {entry['question']}" if heading == "checks" else str(entry)


def _defenses() -> list[type[Defense]]:
    return [resolve("defense", name) for name in names("defense")]


def _recipes(cls: type[Defense]) -> list[dict[str, Any]]:
    """What a defense can be trained by; nothing of one that does not say."""
    told: dict[str, str] = dict(getattr(cls, "recipes", {}))
    return [
        {"defense": cls.name, "recipe": recipe, "told": line, "default": number == 0}
        for number, (recipe, line) in enumerate(told.items())
    ]


def _weights(cls: type[Defense]) -> list[dict[str, Any]]:
    """The weights that lie beside a defense's code, with what their card says."""
    from robench.weights import read_card, shipped_weights, spec_of_weights, weights_folder

    found = []
    for stem in shipped_weights(cls):
        path = weights_folder(cls) / f"{stem}.safetensors"
        card = read_card(path)
        test = card.get("test") or {}
        found.append(
            {
                "defense": cls.name,
                "spec": spec_of_weights(cls, card.get("options", {})),
                "dataset": stem.partition("-")[0],
                "recipe": card.get("recipe", "unknown"),
                "recipe_since": card.get("recipe_since", ""),
                "clean_accuracy": test.get("clean_accuracy"),
                "test_images": test.get("images"),
                "bytes": path.stat().st_size,
            }
        )
    return found


def _customary(dataset: str) -> dict[str, str]:
    """The bounds that `robench run` takes where none is given, by norm."""
    return {norm: eps for (name, norm), eps in DEFAULT_EPS.items() if name == dataset}


def _norms(name: str) -> tuple[str, ...]:
    found: tuple[str, ...] = getattr(resolve("attack", name), "norms", ())
    return found
