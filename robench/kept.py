"""Figures that a cell's own function measures, kept beside the runs, so that none is measured twice."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch

import robench
from robench.files import make_folder, write_atomic
from robench.paper import Cell, Context, Figure

LOG = logging.getLogger("robench")
FIGURE_FILE: Final = "figure.json"


def folder_name(readable: str, said: str) -> str:
    """A name for a folder that begins readably and is another one for everything else that is said."""
    plain = re.sub(r"[^A-Za-z0-9]+", "-", readable).strip("-")[:60]
    return f"{plain}-{hashlib.sha256(said.encode()).hexdigest()[:8]}"


def measure_once(cell: Cell, context: Context, weights: str) -> Figure | None:
    """What a cell's function measures, from the file that an earlier call left or now; None: it is left out.

    A figure counts for the cell, the defense, n, the seed, the device and the weights that it was measured for. A file
    that is damaged, or of other versions of robench or torch, is measured again.

    Args:
        cell: one with `measure`.
        context: for the function, but for its folder: the one in which the figure's own folder is made.
        weights: digest of the weights that the function reads; "" where it reads none.

    Raises:
        UsageError: the function cannot measure it, or the folder cannot be written.
        DataError: a damaged file of weights or data.
    """
    told = {
        "table": cell.table,
        "row": cell.row,
        "column": cell.column,
        "dataset": cell.dataset,
        "defense": cell.defense or cell.reads,
        "n": context.n,
        "seed": context.seed,
        "device": context.device,
        "weights_digest": weights,
    }
    folder = context.folder / folder_name(f"{cell.table}-{cell.row}-{cell.column}", json.dumps(told, sort_keys=True))
    about = {**told, "robench": robench.__version__, "torch": torch.__version__.split("+")[0]}
    kept = _read(folder / FIGURE_FILE, about)
    return kept if kept is not None else _measure(cell, replace(context, folder=folder), about)


def _measure(cell: Cell, context: Context, about: dict[str, Any]) -> Figure | None:
    """Measures the cell in a folder of its own, and keeps the figure there; nothing is left of what is left out."""
    if cell.measure is None:
        raise ValueError("the cell has no function that measures it")
    make_folder(context.folder)
    try:
        figure = cell.measure(context)
        if figure is not None:
            content = json.dumps({**about, "figure": vars(figure)}, indent=2)
            write_atomic(context.folder / FIGURE_FILE, f"{content}\n".encode())
        return figure
    finally:
        if not any(context.folder.iterdir()):
            context.folder.rmdir()


def _read(path: Path, about: dict[str, Any]) -> Figure | None:
    """The figure in a file; None where there is no file, or one that is damaged or of other versions."""
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_bytes())
        figure = Figure(**content.pop("figure"))
        if not all(type(value) in (int, float) for value in vars(figure).values()):
            raise TypeError("a figure is of numbers")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        LOG.warning("%s is damaged (%s); the figure is measured again", path, error)
        return None
    return figure if content == about else None
