"""Passes through a defense in batches that memory allows; where it runs out, in smaller ones."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import Any, Final, TypeVar

import torch
from torch import Tensor

from robench.defense import Defense
from robench.draws import shares_draws
from robench.errors import PluginError

T = TypeVar("T")

BATCH_ROWS: Final = 512
"""Rows of one pass where the defense names no limit of its own."""
GPU_BATCH_ROWS: Final = 2048
"""The same on a GPU, which smaller passes leave idle."""


class RowsByDevice:
    """`batch_rows` of a defense whose one pass is large: what the cache of a CPU holds, and far more on a GPU.

    Where memory runs out the engine sets fewer for the one instance, until it sets the usual number again.
    """

    def __init__(self, cpu: int, gpu: int) -> None:
        """Keeps the two numbers of images."""
        self.cpu, self.gpu = cpu, gpu

    def __get__(self, defense: Defense | None, owner: type) -> int:
        """The images of one pass on the device on which the defense is; asked of the class, those on a CPU."""
        if defense is None:
            return self.cpu
        rows: int | None = vars(defense).get("_batch_rows")
        return self._usual(defense) if rows is None else rows

    def __set__(self, defense: Defense, rows: int | None) -> None:
        """Sets other images for this instance; the usual number, or None, sets none."""
        vars(defense)["_batch_rows"] = None if rows == self._usual(defense) else rows

    def _usual(self, defense: Defense) -> int:
        return self.cpu if next(defense.parameters()).device.type == "cpu" else self.gpu


def pass_in_batches(
    defense: Defense,
    call: Callable[..., T],
    *tensors: Tensor,
    together: int | None = None,
    on_rows: Callable[[int], None] | None = None,
) -> list[T]:
    """Calls `call` on slices of tensors of equal length, of at most `batch_rows` rows each; returns its results.

    Where a slice does not fit into memory, `defense.batch_rows` is halved until it does, and stays there; see
    `own_batches`.

    Args:
        defense: the defense that `call` asks.
        call: what to call.
        *tensors: images first.
        together: rows that may share a draw; those of a defense that draws once for a pass are cut at its multiples.
            None: all.
        on_rows: called with the number of rows after each slice (progress).

    Raises:
        RuntimeError: out of memory with a single row, or what `call` raises.
    """
    done: list[T] = []
    start, rows = 0, len(tensors[0])
    together = rows if together is None else together
    apart = rows > together and shares_draws(defense, tensors[0])
    while start < rows:
        size = min(defense.batch_rows or usual_rows(tensors[0].device), rows)
        size = min(size, together - start % together) if apart else size
        try:
            done.append(call(*(tensor[start : start + size] for tensor in tensors)))
        except (RuntimeError, MemoryError) as error:
            if size == 1 or not is_out_of_memory(error):
                raise
        else:
            if on_rows is not None:
                on_rows(min(size, rows - start))
            start += size
            continue
        defense.batch_rows = size // 2  # outside the handler, whose traceback keeps the pass's tensors alive
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
    return done


def usual_rows(device: torch.device | str) -> int:
    """Rows of one pass on a device where the defense names no limit."""
    return GPU_BATCH_ROWS if torch.device(device).type == "cuda" else BATCH_ROWS


def pass_once(defense: Defense, call: Callable[[Tensor], Any], x: Tensor, *, forward: str = "forward") -> Any:
    """What `call`, a forward of the defense, returns for x, which it must leave as it is.

    Args:
        defense: whose forward it is.
        call: the forward.
        x: images; give a copy where the caller still needs them, for a change by way of `x.data` or numpy goes unseen.
        forward: what the forward is called in the message.

    Raises:
        PluginError: the forward changed x.
    """
    before = _version(x)
    try:
        answer = call(x)
        changed = _version(x) != before
    except RuntimeError as error:
        if "leaf Variable that requires grad" not in str(error):
            raise
        changed = True
    if changed:
        raise PluginError(
            f'defense "{defense.name}": {forward} changes its input in place; work on a copy (x = x.clone())'
        )
    return answer


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version  # torch counts the changes in place, those through views too


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or here."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and ("can't allocate memory" in str(error) or "out of memory" in str(error))


@contextlib.contextmanager
def own_batches(defense: Defense, device: torch.device | str = "cpu") -> Iterator[list[str]]:
    """Gives a defense its own batch size back at the end of the block; the list then says if memory had run out.

    A unit of work runs inside, so that what it computes does not depend on the units before it.

    Args:
        defense: on the device.
        device: where it runs.
    """
    before, notes = defense.batch_rows, list[str]()
    try:
        yield notes
    finally:
        if defense.batch_rows != before:
            usual = before or usual_rows(device)
            notes.append(f"out of memory: batches of {defense.batch_rows} images instead of {usual}")
            defense.batch_rows = before
