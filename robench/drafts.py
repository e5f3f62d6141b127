"""Drafts: what a unit at work has found so far, in files, so that an interrupted one goes on after its last search."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Final

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from robench.errors import StorageError
from robench.files import Place, list_names, make_folder, remove_folder, write_atomic

LOG = logging.getLogger(__name__)

KEEP_AFTER_S: Final = 10.0
"""Seconds of work from which on what came of it is worth a file."""

Purpose = tuple[str | int, ...]
"""What work is for; of each unit one at most."""


@dataclass
class Drafts:
    """The drafts of one unit: each the tensors that one search, or one question to the judge, has ended with.

    A draft is found again by what it was asked for and by the tensors that it depends on, so that one that belongs to
    another course of events is not taken up. Only whole and undamaged files are.

    Attributes:
        folder: of this unit's drafts alone; made when the first is kept.
        owner: names the run and the unit.
    """

    folder: Place
    owner: bytes

    @cached_property
    def names(self) -> list[str]:
        """The files that were there at the start."""
        return sorted(list_names(self.folder))

    def name(self, purpose: Purpose, inputs: tuple[Tensor, ...]) -> str:
        """What a draft is called that was asked for a purpose, and depends on tensors."""
        digest = hashlib.sha256(self.owner + json.dumps(purpose).encode())
        for tensor in inputs:
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def recall(self, name: str) -> dict[str, Tensor] | None:
        """The tensors of a draft, on the CPU; None where there is none, or a damaged one."""
        for file in self.names:
            match = re.fullmatch(rf"{name}-([0-9a-f]{{64}})\.safetensors", file)
            content = (self.folder / file).read_bytes() if match else b""
            if match and hashlib.sha256(content).hexdigest() == match[1]:
                try:
                    return load(content)
                except SafetensorError:  # not written here
                    LOG.debug("%s is no draft", self.folder / file)
        return None

    def keep(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Keeps the tensors of a draft; where they cannot be written it only says so, since a draft may be missing."""
        content = save({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()})
        try:
            make_folder(self.folder)
            write_atomic(self.folder / f"{name}-{hashlib.sha256(content).hexdigest()}.safetensors", content)
        except StorageError as error:
            LOG.warning("an interrupted unit would have to begin anew: %s", error)

    def clear(self) -> None:
        """Deletes the drafts: the unit is stored."""
        remove_folder(self.folder)
