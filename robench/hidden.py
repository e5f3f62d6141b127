"""Parts of a defense that torch does not know of: networks that are no sub-modules.

`freeze` and `.to` pass them by, and so do the state_dict and the weights digest. Only a call tells of them for certain.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain
from types import FunctionType, MethodType
from typing import Any, Final

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from robench.defense import Defense
from robench.errors import PluginError
from robench.rng import seeded
from robench.types import Images

SEARCHED: Final = 20_000
"""Objects that are looked at for where a network sits; it is refused whether that is found or not."""


def refuse_hidden_networks(defense: Defense, x: Images, seed: int) -> None:
    """Lets a defense answer once, plainly and along each gradient mode, and looks at every network that it calls.

    What holds no parameters and buffers but the defense's may be made at will: nn.Softmax, a loss, nn.Sequential
    around layers of the defense. A call that raises says no more here; whoever needs its answer will tell.

    Args:
        defense: on the device of x.
        x: an image or some.
        seed: of the run.

    Raises:
        PluginError: it calls a network with weights that is none of its sub-modules; says which, where it sits if that
            is found, and what to do.
    """
    calls: list[tuple[str, Callable[[Images], object]]] = [("forward", defense)]
    if type(defense).adaptive_forward is not Defense.adaptive_forward:
        modes = defense.gradient_modes
        calls += [(f"adaptive_forward ({mode})", partial(defense.adaptive_forward, mode=mode)) for mode in modes]
    for who, call in calls:
        with torch.no_grad(), seeded(seed, "hidden", device=x.device), _uncompiled():
            called = _list_called(partial(call, x.clone()), defense)
        own = set(defense.modules())
        hidden = next((module for module in called if module not in own), None)  # the outermost: it is called first
        if hidden is not None:
            place = _find_place(defense, hidden)
            raise PluginError(
                f'defense "{defense.name}": {who} calls a network that is none of its sub-modules, '
                f"{type(hidden).__name__}{place and f' ({place})'}. It would stay in training mode, off the device and "
                "out of the weights digest; assign it to an attribute of the defense, several as nn.ModuleList or "
                "nn.ModuleDict"
            )


def _list_called(call: Callable[[], object], defense: Defense) -> list[nn.Module]:
    """The modules that a call has called in this thread and that hold other weights than the defense's, in order."""
    known = set(defense.modules())
    weights = {id(tensor) for tensor in _tensors(defense)}
    called: dict[nn.Module, None] = {}
    thread = threading.get_ident()

    def look(module: nn.Module, _: object) -> None:
        ours = module in known or threading.get_ident() != thread
        if not ours and any(id(tensor) not in weights for tensor in _tensors(module)):
            called[module] = None

    handle = register_module_forward_pre_hook(look)
    try:
        with contextlib.suppress(Exception, SystemExit):
            call()
    finally:
        handle.remove()
    return list(called)


@contextlib.contextmanager
def _uncompiled() -> Iterator[None]:
    """A block in which what torch.compile made runs as it was written: compiled, it calls no modules."""
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with warnings.catch_warnings(), torch.compiler.set_stance("force_eager"):
        warnings.filterwarnings("ignore", "Using `torch.compile")  # of the hook
        yield


def _tensors(module: nn.Module) -> Iterable[Any]:
    return chain(module.parameters(), module.buffers())


def _find_place(defense: Defense, hidden: nn.Module) -> str:
    """Where a network sits, such as `self.nets[0]`; empty if not found. The nearest place is found first."""
    queue: deque[tuple[str, object]] = deque([("self", defense), ("forward", type(defense).forward)])
    seen: set[int] = set()
    while queue and len(seen) < SEARCHED:
        path, holder = queue.popleft()
        if holder is hidden:
            return path
        if id(holder) not in seen:
            seen.add(id(holder))
            queue.extend(_inside(path, holder))
    return ""


def _inside(path: str, holder: Any) -> Iterator[tuple[str, object]]:
    """What an object holds that may be, or hold, a network; each with its path."""
    if isinstance(holder, nn.Module):
        yield from ((f"{path}.{name}", child) for name, child in holder.named_children())
        yield from ((f"{path}.{name}", value) for name, value in vars(holder).items() if name not in _TORCH_S)
    elif isinstance(holder, dict):
        yield from ((f"{path}[{key!r}]", value) for key, value in holder.items())
    elif isinstance(holder, list | tuple):
        yield from ((f"{path}[{number}]", value) for number, value in enumerate(holder))
    elif isinstance(holder, partial):
        yield from ((f"an argument of {path}", value) for value in (*holder.args, *holder.keywords.values()))
        yield path, holder.func
    elif isinstance(holder, MethodType):
        yield from ((f"what {path} is a method of", holder.__self__), (path, holder.__func__))
    elif isinstance(holder, FunctionType):
        cells = zip(holder.__code__.co_freevars, holder.__closure__ or (), strict=True)
        yield from ((f"{name} in the closure of {path}", cell.cell_contents) for name, cell in cells if _is_full(cell))
        names = [name for name in holder.__code__.co_names if name in holder.__globals__]
        yield from ((f"the global {name}", holder.__globals__[name]) for name in names)


def _is_full(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


_TORCH_S: Final = frozenset(vars(nn.Module()))
"""Attributes that every module has."""
