"""Weights on disk: safetensors with a JSON card of the same stem beside them. Never an unrestricted pickle."""

from __future__ import annotations

import inspect
import json
import warnings
from collections.abc import Set
from itertools import takewhile
from pathlib import Path
from typing import Any, Final, TypeVar

import torch
from torch import nn

from robench.data_names import KNOWN, list_plugins
from robench.defense import Defense, state_digest
from robench.errors import DataError, PluginError, UsageError
from robench.files import write_atomic
from robench.shell import quote_word

D = TypeVar("D", bound=Defense)
WRAPPERS: Final = ("module.", "_orig_mod.")
"""What nn.DataParallel and torch.compile put before every name."""
DEFAULT_DATASET: Final = "fashion_mnist"
"""Whose weights are read where no dataset is named."""


def weights_folder(cls: type[Defense]) -> Path:
    """The folder `weights/` beside the module that defines the defense."""
    return Path(inspect.getfile(cls)).parent / "weights"


def shipped_weights(cls: type[Defense]) -> list[str]:
    """The stems of the weights shipped with a defense: `fashion_mnist`, `fashion_mnist-paper_literal`, ..."""
    return sorted(path.stem for path in weights_folder(cls).glob("*.safetensors"))


def has_weights(name: str, dataset: str) -> bool:
    """Whether a built-in defense ships weights for a dataset."""
    from robench.registry import resolve

    return dataset in shipped_weights(resolve("defense", name))


def build_and_load(cls: type[D], dataset: str | None, weights: str | Path | None, options: dict[str, Any]) -> D:
    """Builds a defense from its card and options and reads its weights; see `Defense.load`."""
    path = _locate(cls, dataset, weights, options)
    if path is None:
        return build(cls, options)
    card = read_card(path)
    if card:
        _check_training(cls, options, card.get("options", {}), path)
    defense = build(cls, {**card.get("options", {}), **options})
    load_weights(defense, path)
    if card.get("weights_digest", state_digest(defense)) != state_digest(defense):
        raise DataError(
            f"weights file {path} is damaged, or not that of its card: its weights do not have the digest that "
            f"{path.with_suffix('.json').name} names. Get both again"
        )
    return defense


def _check_training(cls: type[Defense], asked: dict[str, Any], trained: dict[str, Any], path: Path) -> None:
    """Refuses options that claim another training than the card's; `auto` claims nothing.

    Raises:
        UsageError: one does.
    """
    parameters = inspect.signature(cls).parameters
    for name in cls.training_options:
        if name not in asked or name not in parameters:
            continue
        found = trained.get(name, parameters[name].default)
        if found is None:  # the constructor fills it in
            found = getattr(build(cls, trained), name, None)
        if asked[name] not in (found, "auto"):
            how = f"with {name}={found}" if found is not None else f"with {name} left at its default"
            raise UsageError(
                f'defense "{cls.name}": the weights {path.name} were trained {how}, not with {name}={asked[name]}. '
                f"Leave {name} out, or train others and pass --weights FILE"
            )


def _locate(
    cls: type[Defense], dataset: str | None, weights: str | Path | None, options: dict[str, Any]
) -> Path | None:
    if weights is not None:
        return Path(weights)
    if not cls.needs_weights:
        return None
    dataset = dataset or DEFAULT_DATASET
    stem = weights_stem(cls, dataset, {**_usual_options(cls, dataset), **options})
    path = weights_folder(cls) / f"{stem}.safetensors"
    if not path.exists():
        shipped = ", ".join(shipped_weights(cls)) or "none"
        advice = "Pass --weights FILE"
        if dataset in KNOWN or dataset in list_plugins():  # training takes no other
            train = f"robench train --defense {quote_word(_spec(cls, options))} --dataset {dataset}"
            advice = f"Pass --weights FILE, or train them: {train}"
        raise UsageError(f'no weights "{stem}" of defense "{cls.name}" (shipped: {shipped}). {advice}')
    return path


def _usual_options(cls: type[Defense], dataset: str) -> dict[str, Any]:
    """The options that a training on a dataset would take; none where robench does not know its images' shape."""
    known = KNOWN.get(dataset)
    try:
        return cls.options_for(known.image_shape, known.num_classes) if known else {}
    except UsageError:
        return {}  # it cannot take such images, so there are no weights either


def _spec(cls: type[Defense], options: dict[str, Any]) -> str:
    """The defense as `load_defense` takes it."""
    written = ", ".join(f"{name}={value!r}" for name, value in options.items())
    return f"{cls.name}({written})" if written else cls.name


def spec_of_weights(cls: type[Defense], options: dict[str, Any]) -> str:
    """The defense as `load_defense` takes it, with those options of a card by which its weights are not the usual."""
    return _spec(cls, {name: value for name, value in options.items() if cls.weights_variant({name: value})})


def weights_stem(cls: type[Defense], dataset: str, options: dict[str, Any]) -> str:
    """The name of a weights file without its ending: the dataset, and the variant that the options ask for."""
    variant = cls.weights_variant(options)
    return f"{dataset}-{variant}" if variant else dataset


def build(cls: type[D], options: dict[str, Any]) -> D:
    """A defense of a class, untrained.

    Raises:
        UsageError: it has no such option, or one is of the wrong kind or out of range.
        PluginError: its constructor failed otherwise.
    """
    from robench.factory import bind_options
    from robench.registry import plugin_errors

    bind_options(f'defense "{cls.name}"', cls, options)
    try:
        with plugin_errors(f'defense "{cls.name or cls.__name__}": its constructor'):
            return cls(**options)
    except PluginError as error:
        if not (options and isinstance(error.__cause__, TypeError | ValueError)):
            raise
        reason = error.__cause__
        raise UsageError(f'defense "{cls.name}": an option is of the wrong kind: {reason}') from reason


def read_card(path: Path) -> dict[str, Any]:
    """Reads the model card beside a weights file; an empty one if there is none.

    Raises:
        DataError: the card, or the options in it, are not a JSON object.
    """
    card = path.with_suffix(".json")
    if not card.exists():
        return {}
    try:
        content = json.loads(card.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise DataError(f"model card {card} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise DataError(f"model card {card} must be a JSON object; got {type(content).__name__}")
    options = content.get("options", {})
    if not isinstance(options, dict):
        raise DataError(f"model card {card}: options must be a JSON object; got {type(options).__name__}")
    return content


def find_card(cls: type[Defense], digest: str) -> dict[str, Any]:
    """The card of a defense's shipped weights of a digest, whole or its beginning; an empty one if there is none."""
    cards = (read_card(path) for path in sorted(weights_folder(cls).glob("*.safetensors")))
    return next((card for card in cards if digest and str(card.get("weights_digest", "")).startswith(digest)), {})


def load_weights(module: nn.Module, path: str | Path) -> None:
    """Reads weights into a module: safetensors, or a torch file under `weights_only=True`.

    Names that nn.DataParallel or torch.compile has put a prefix before (`module.`, `_orig_mod.`) are read without it.

    Raises:
        UsageError: the file does not exist or may not be read.
        DataError: it is cut off, a pickle of other things, or its names or shapes differ from the module's.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"weights file {path} does not exist")
    state = _unwrap(_read_state(path), module.state_dict().keys())
    wanted = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    came = {name: tuple(value.shape) for name, value in state.items()}
    differing = sorted(name for name in wanted.keys() | came.keys() if wanted.get(name) != came.get(name))
    if differing:
        first = differing[0]
        raise DataError(
            f"weights file {path} does not fit: {len(differing)} of {len(wanted)} tensors differ, first "
            f'"{first}": expected {wanted.get(first, "none")}, got {came.get(first, "none")}. '
            f"{_advise_on_names(came.keys(), wanted.keys()) or 'Check the dataset, the preset and the options'}"
        )
    module.load_state_dict(
        {name: value.float() if value.is_floating_point() else value for name, value in state.items()}
    )


def _unwrap(state: dict[str, torch.Tensor], wanted: Set[str]) -> dict[str, torch.Tensor]:
    """Takes the prefixes of wrappers off the names, where every name has them and the module wants none of these."""
    for prefix in WRAPPERS * 2:  # one may be around the other
        if state and not state.keys() & wanted and all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def _advise_on_names(came: Set[str], wanted: Set[str]) -> str:
    """What to do where the names of the file and of the defense differ by what they begin with; else empty."""
    old, new = _find_beginning(came), _find_beginning(wanted)
    whole = {new + name.removeprefix(old) for name in came} == wanted
    while old and new and old.split(".")[-2] == new.split(".")[-2]:  # both end with a dot
        old, new = (each.rpartition(f"{each.split('.')[-2]}.")[0] for each in (old, new))
    if not whole:  # the defense may have more than the file
        first = min(came, default="")
        longer = sorted(name.removesuffix(first) for name in wanted if first and name.endswith(f".{first}"))
        old, new = "", next((each for each in longer if {each + name for name in came} <= wanted), "")
    if old == new:
        return ""
    bare = f'name.removeprefix("{old}")' if old else "name"
    renamed = f'"{new}" + {bare}' if new else bare
    return (
        f'Its names begin with "{old}" where those of the defense begin with "{new}": '
        f"save {{{renamed}: value for name, value in state.items()}}"
    )


def _find_beginning(names: Set[str]) -> str:
    """The parts that all names begin with, such as `model.`, but for the last part of each; empty if none."""
    parts = [name.split(".")[:-1] for name in names]
    shared = takewhile(lambda column: len(set(column)) == 1, zip(*parts, strict=False))
    return "".join(f"{column[0]}." for column in shared)


def _read_state(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings(action="ignore"):  # torch's advice on files that are refused anyway
            state = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError as error:
        raise UsageError(f"weights file {path} may not be read: {error.strerror}") from None
    except Exception as error:  # noqa: BLE001 - torch raises many kinds for a damaged file
        reason = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
        raise DataError(
            f"weights file {path} is damaged or not a plain tensor file ({reason}). robench reads safetensors, "
            "or torch files that load under weights_only=True; it never runs a pickle"
        ) from None
    lack = _find_lack(state)
    if lack:
        raise DataError(f"weights file {path} must hold a dict of tensors (a state_dict); {lack}")
    return state


def _find_lack(state: object) -> str:
    """What keeps an object from being a state_dict; "" if nothing does."""
    if not isinstance(state, dict):
        return f"got {type(state).__name__}"
    wrong = [key for key, value in state.items() if not (isinstance(key, str) and isinstance(value, torch.Tensor))]
    if not wrong:
        return ""
    inside = [key for key in wrong if isinstance(state[key], dict) and state[key] and not _find_lack(state[key])]
    advice = f". Save checkpoint[{inside[0]!r}] alone" if inside else ""
    if isinstance(state[wrong[0]], torch.Tensor):
        return f"its key {wrong[0]!r} is no name"
    return f"its key {wrong[0]!r} holds no tensor, but {type(state[wrong[0]]).__name__}{advice}"


def save_weights(module: nn.Module, path: str | Path, card: dict[str, Any], *, half: bool = False) -> None:
    """Writes weights (contiguous) and card, each in one atomic step.

    Args:
        module: the defense.
        path: the safetensors file; the card goes beside it.
        card: a JSON object.
        half: store float16 rather than float32; for weights that `round_to_half` has rounded nothing is lost.
    """
    from safetensors.torch import save

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {name: value.detach().cpu().contiguous() for name, value in module.state_dict().items()}
    if half:
        state = {name: value.half() if value.is_floating_point() else value for name, value in state.items()}
    write_atomic(path, save(state))
    write_atomic(path.with_suffix(".json"), (json.dumps(card, indent=2, ensure_ascii=False) + "\n").encode())


def round_to_half(module: nn.Module) -> bool:
    """Rounds weights and buffers to float16's values, in float32; False, and nothing changed, where one is too large.

    Values below float16's smallest (6e-8) become 0.
    """
    values = [value for value in module.state_dict().values() if value.is_floating_point()]
    if not all(bool(value.half().isfinite().all()) for value in values):
        return False
    with torch.no_grad():
        for value in values:
            value.copy_(value.half().to(value.dtype))
    return True
