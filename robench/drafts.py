"""Drafts: what a unit at work has found so far, in files, so that an interrupted one goes on after its last search."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Final

from safetensors.torch import load, save
from torch import Tensor

from robench.files import Place, list_names, make_folder, remove_folder, write_atomic
from robench.source import digest_own_code

LOG = logging.getLogger(__name__)

KEEP_AFTER_S: Final = 10.0
"""Seconds of work from which on what came of it is worth a file."""

Purpose = tuple[str | int, ...]
"""What work is for; of each unit one at most."""


@dataclass
class Drafts:
    """The drafts of one unit: each the tensors that one search, or one question to the judge, has ended with.

    A draft is found again by what it was asked for, by the tensors that it depends on and by robench's own code, so
    that one of another course of events is not taken up. Only whole and undamaged files are. Whatever goes wrong with
    a file costs time alone: what came of the work is had without.

    Attributes:
        folder: of this unit's drafts alone; made when the first is kept.
        owner: names the run and the unit.
    """

    folder: Place
    owner: bytes

    @cached_property
    def names(self) -> list[str]:
        """The files that were there at the start."""
        with self._told("cannot be listed"):
            return sorted(list_names(self.folder))
        return []

    def _name(self, purpose: Purpose, inputs: tuple[Tensor, ...]) -> str:
        """What a draft is called that was asked for a purpose, and depends on tensors."""
        digest = hashlib.sha256(self.owner + json.dumps([digest_own_code(), *purpose]).encode())
        for tensor in inputs:
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def recall(self, purpose: Purpose, inputs: tuple[Tensor, ...]) -> dict[str, Tensor] | None:
        """The tensors that were kept for a purpose, on the CPU; None where there are none, or damaged ones."""
        name = self._name(purpose, inputs) if self.names else ""  # most units are short and keep nothing
        for file in self.names:
            match = re.fullmatch(rf"{name}-([0-9a-f]{{64}})\.safetensors", file)
            with self._told("cannot be read"):
                content = (self.folder / file).read_bytes() if match else b""
                if match and hashlib.sha256(content).hexdigest() == match[1]:
                    return load(content)
        return None

    def keep(self, purpose: Purpose, inputs: tuple[Tensor, ...], tensors: dict[str, Tensor]) -> None:
        """Keeps tensors for a purpose."""
        with self._told("cannot be kept, so that an interrupted unit would have to begin anew"):
            name = self._name(purpose, inputs)
            content = save({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()})
            make_folder(self.folder)
            write_atomic(self.folder / f"{name}-{hashlib.sha256(content).hexdigest()}.safetensors", content)

    def clear(self) -> None:
        """Deletes the drafts: the unit is stored."""
        remove_folder(self.folder)

    @contextlib.contextmanager
    def _told(self, problem: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # noqa: BLE001 - of a file system, a store behind a URL, or out of memory
            LOG.warning("drafts in %s %s: %s", self.folder, problem, f"{type(error).__name__}: {error}")
