"""Tensors and arrays that a module keeps outside its state_dict: in plain attributes, lists and dicts of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Final, TypeGuard

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

if TYPE_CHECKING:
    from robench.defense import Defense

Values = torch.Tensor | npt.NDArray[Any]


def plain_tensors(module: nn.Module) -> Iterator[tuple[str, Values]]:
    """Those of a module and its sub-modules, by path such as `net.bank[0]`, in the order of their paths.

    Buffers that are not saved are among them, and what a network holds that sits in such an attribute. Left out is
    what a pass made that found none there (see `note_passing`) and what torch's own hooks compute at each pass: the
    weight of torch.nn.utils.weight_norm, spectral_norm and prune.
    """
    passing: frozenset[str] = getattr(module, "passing", frozenset())
    found = {path: value for path, value in _walk(module, "", set()) if path not in passing}
    yield from sorted(found.items(), key=lambda item: item[0])


def note_passing(defense: Defense, before: Iterable[str]) -> None:
    """Notes on a defense the plain tensors that were not there before a pass: it left them behind, they are no weights.

    Args:
        defense: after the pass.
        before: the names of all its tensors before the pass.
    """
    new = {path for path, _ in plain_tensors(defense)} - set(before)
    if new:
        defense.passing |= new


def _walk(module: nn.Module, path: str, seen: set[int]) -> Iterator[tuple[str, Values]]:
    """All plain tensors below a module that is not in `seen`; adds what it meets."""
    saved = module.state_dict(keep_vars=True)
    seen |= {id(part) for part in module.modules()} | {id(value) for value in saved.values()}
    seen |= {id(parameter) for parameter in module.parameters()}
    for name, buffer in module.named_buffers():
        if id(buffer) not in seen:
            seen.add(id(buffer))
            yield path + name, buffer
    for prefix, part in module.named_modules():
        derived = {getattr(hook, "name", "") for hook in part._forward_pre_hooks.values()}
        derived |= {getattr(hook, "_tensor_name", "") for hook in part._forward_pre_hooks.values()}
        for name, value in vars(part).items():
            if name not in _TORCH_S and name not in derived:
                yield from _inside(value, f"{path}{prefix and prefix + '.'}{name}", seen)


def _inside(value: object, path: str, seen: set[int]) -> Iterator[tuple[str, Values]]:
    """The tensors and arrays in a value of an attribute, which may be a list or dict of them or a hidden network."""
    if id(value) in seen:
        return
    if _is_readable(value):
        yield path, value.detach() if isinstance(value, torch.Tensor) else value
    elif isinstance(value, nn.Module):
        yield from ((f"{path}.{name}", one) for name, one in value.state_dict().items() if torch.is_tensor(one))
        yield from _walk(value, f"{path}.", seen)
    elif isinstance(value, dict | list | tuple):
        seen.add(id(value))
        entries = value.items() if isinstance(value, dict) else enumerate(value)
        for number, (key, one) in enumerate(entries):
            yield from _inside(one, f"{path}[{repr(key) if isinstance(key, str | int) else number}]", seen)


def _is_readable(value: object) -> TypeGuard[Values]:
    if isinstance(value, torch.Tensor):
        return value.layout == torch.strided and not (value.is_meta or value.is_quantized or value.is_nested)
    return isinstance(value, np.ndarray) and not value.dtype.hasobject


_TORCH_S: Final = frozenset(vars(nn.Module()))
"""Attributes that every module has."""
