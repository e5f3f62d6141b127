"""What the module `paper` of a defense's package brings: the published figures, and how each is measured again."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robench.errors import UsageError
from robench.shares import in_percent


@dataclass(frozen=True)
class Figure:
    """What was measured, with its 95 % interval, in the unit of the cell (percent for accuracies).

    Attributes:
        value: the figure.
        low: lower end of the interval.
        high: upper end.
        n: images behind it.
    """

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        largest = max(abs(self.low), abs(self.value), abs(self.high))
        digits = 1 if largest >= 10 else 2 if largest >= 1 else 3
        value, low, high = (in_percent(one / 100) if digits == 1 else one for one in (self.value, self.low, self.high))
        return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


@dataclass(frozen=True)
class Context:
    """What a cell's own measurement may use.

    Attributes:
        n: images, at most.
        seed: seeds the draw of images and all randomness.
        device: `cpu` or `cuda`.
        data_dir: folder with datasets; None: `ROBENCH_DATA`.
        folder: a folder of its own for what the measurement keeps; robench keeps the figure there (`figure.json`).
        weights: of the cell's own training; None: it has none.
    """

    n: int
    seed: int
    device: str
    data_dir: Path | None
    folder: Path
    weights: Path | None = None

    def check_images(self) -> None:
        """Checks that there are images enough for an interval.

        Raises:
            UsageError: there is one.
        """
        if self.n < 2:
            raise UsageError(f"takes at least 2 images; got {self.n}")


@dataclass(frozen=True)
class Cell:
    """One figure of a paper and how it is measured again.

    Attributes:
        table: as the paper calls it: `table 2.5`.
        row: the row's heading.
        column: the column's heading.
        published: the paper's figure, accuracies in percent; None where it shows a curve or nothing.
        published_on: the dataset of the paper by robench's name, `fashion_mnist`, or as robench would name it; "" where
            the paper has no such figure.
        dataset: the data that is used here.
        defense: a defense as on the command line; with its shipped weights, unless there is a `recipe`.
        attack: an attack as on the command line; "" is clean accuracy.
        norm: of the threat model.
        eps: its bound, images in [0, 1].
        measure: measures a figure that is no accuracy; the attack is not used then. None from it says that robench does
            not measure this on purpose, for the reason in `note`.
        note: what differs from the paper.
        published_with: what else has to be known of the paper's figure, such as its net; printed as it is.
        recipe: the figure is of the defense trained with this recipe, as on the command line; "": the shipped weights.
        split: what the recipe trains on.
        reads: the defense, as on the command line, whose shipped weights for `dataset` the function `measure` reads: a
            figure is kept for the weights that it is of.
    """

    table: str
    row: str
    column: str
    published: float | None
    published_on: str
    dataset: str
    defense: str = ""
    attack: str = ""
    norm: str = "linf"
    eps: float = 0.0
    measure: Callable[[Context], Figure | None] | None = None
    note: str = ""
    published_with: str = ""
    recipe: str = ""
    split: str = "train"
    reads: str = ""

    def __post_init__(self) -> None:
        """Checks that the cell can be measured in one way, and that its datasets can be compared.

        Raises:
            UsageError: neither a defense nor a function, or both (a function measures a defense that a recipe trains);
                a recipe without a defense; an attack without a bound; a dataset of the paper that is no name; weights
                to read beside a defense.
        """
        if self.published_on != self.dataset and not re.fullmatch("[a-z0-9_]*", self.published_on):
            raise UsageError(
                f"{self.table}, {self.row}, {self.column}: published_on is a dataset's name, such as fashion_mnist; "
                f'got "{self.published_on}". What else there is to say goes into published_with'
            )
        if bool(self.defense) != (self.measure is None or bool(self.recipe)):
            raise UsageError(
                f"{self.table}, {self.row}, {self.column}: give either a defense or a function that measures; a recipe "
                "trains a defense"
            )
        if self.reads and self.defense:
            raise UsageError(f"{self.table}, {self.row}, {self.column}: reads is of a function without a defense")
        if self.attack and not self.eps > 0:
            raise UsageError(f"{self.table}, {self.row}, {self.column}: an attack needs an eps above 0")


def leave_out(context: Context) -> None:
    """The `measure` of a figure that is not measured; the cell's note says why."""
    del context


@dataclass(frozen=True)
class Outcome:
    """A cell with what was measured.

    Attributes:
        cell: what was asked.
        ours: the paper's own measurement, made here; None where it could not be.
        worst: worst-case accuracy under the request's protocol in the cell's threat model; None where there is none.
        problem: why `ours` is missing, or `worst`, where that is not on purpose.
        trained: the recipe, and its scale where that is not 1, that a training of the cell's own was done with.
    """

    cell: Cell
    ours: Figure | None
    worst: Figure | None = None
    problem: str = ""
    trained: str = ""

    @property
    def difference(self) -> float | None:
        """Ours minus the paper's."""
        if self.ours is None or self.cell.published is None:
            return None
        return self.ours.value - self.cell.published

    def to_json(self) -> dict[str, Any]:
        """As JSON types."""
        cell = self.cell
        return {
            "table": cell.table,
            "row": cell.row,
            "column": cell.column,
            "published": cell.published,
            "published_on": cell.published_on,
            "published_with": cell.published_with,
            "measured_on": cell.dataset,
            "recipe": self.trained or cell.recipe,
            "ours": vars(self.ours) if self.ours else None,
            "difference": self.difference,
            "worst": vars(self.worst) if self.worst else None,
            "problem": self.problem,
            "note": cell.note,
        }
