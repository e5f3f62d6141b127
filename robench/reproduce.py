"""`robench reproduce`: the tables of a defense's paper, cell by cell, beside what robench measures.

A defense brings the cells as `TABLES` in the module `paper` of its package. Accuracies are measured on the main path
(`evaluate`), at the paper's own attack and then under a protocol; anything else by a function of the cell.
"""

from __future__ import annotations

import hashlib
import importlib
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from robench.data import load_dataset
from robench.defense import Defense
from robench.errors import Interrupted, UsageError
from robench.estimate import Estimate
from robench.evaluate import evaluate
from robench.lineup import plan_attacks
from robench.protocol import get_protocol
from robench.registry import load_defense, resolve
from robench.result import Evaluation
from robench.settings import Settings
from robench.threat import ThreatModel

DEFAULT_N = 128


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
        return f"{self.value:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}]"


@dataclass(frozen=True)
class Context:
    """What a cell's own measurement may use.

    Attributes:
        n: images, at most.
        seed: seeds the draw of images and all randomness.
        device: `cpu` or `cuda`.
        data_dir: folder with datasets; None: `ROBENCH_DATA`.
        folder: a folder of its own for what the measurement keeps.
    """

    n: int
    seed: int
    device: str
    data_dir: Path | None
    folder: Path


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
        defense: a defense as on the command line.
        attack: an attack as on the command line; "" is clean accuracy.
        norm: of the threat model.
        eps: its bound, images in [0, 1].
        measure: measures a figure that is no accuracy; defense and attack are not used then. None from it says that
            robench does not measure this on purpose, for the reason in `note`.
        note: what differs from the paper.
        published_with: what else has to be known of the paper's figure, such as its net; printed as it is.
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

    def __post_init__(self) -> None:
        """Checks that the cell can be measured in one way, and that its datasets can be compared.

        Raises:
            UsageError: neither a defense nor a function, or both; an attack without a bound; a dataset of the paper
                that is no name.
        """
        if self.published_on != self.dataset and not re.fullmatch("[a-z0-9_]*", self.published_on):
            raise UsageError(
                f"{self.table}, {self.row}, {self.column}: published_on is a dataset's name, such as fashion_mnist; "
                f'got "{self.published_on}". What else there is to say goes into published_with'
            )
        if bool(self.defense) == (self.measure is not None):
            raise UsageError(
                f"{self.table}, {self.row}, {self.column}: give either a defense or a function that measures"
            )
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
        problem: why `ours` is missing, or `worst`.
    """

    cell: Cell
    ours: Figure | None
    worst: Figure | None = None
    problem: str = ""

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
            "ours": vars(self.ours) if self.ours else None,
            "difference": self.difference,
            "worst": vars(self.worst) if self.worst else None,
            "problem": self.problem,
            "note": cell.note,
        }


@dataclass(frozen=True)
class ReproduceRequest:
    """What to reproduce and at what cost.

    Attributes:
        name: the defense whose paper it is.
        folder: where runs are kept; a second call takes up what is there.
        tables: only tables whose name holds one of these texts; () for all. A text that no name holds is taken for
            several with commas between them.
        rows: likewise, only rows whose heading holds one of these texts.
        n: images of each figure; None: 128, or the defense's first look where it is slow.
        protocol: measured besides the paper's attack; "" for none.
        protocol_n: images of the figures under the protocol, which costs far more; None: as many as `n` says.
        seed: seeds everything.
        device: `auto`, `cpu` or `cuda`.
        data_dir: folder with datasets; None: `ROBENCH_DATA`.
    """

    name: str
    folder: Path
    tables: tuple[str, ...] = ()
    rows: tuple[str, ...] = ()
    n: int | None = None
    protocol: str = "standard"
    protocol_n: int | None = None
    seed: int = 0
    device: str = "auto"
    data_dir: Path | None = None

    def __post_init__(self) -> None:
        """Checks the counts and the protocol, before hours go into the figures beside it.

        Raises:
            UsageError: a count is below 1, or there is no such protocol.
        """
        if self.protocol:
            get_protocol(self.protocol)
        for name, count in (("n", self.n), ("protocol-n", self.protocol_n)):
            if count is not None and count < 1:
                raise UsageError(f"{name} must be at least 1; got {count}")


@dataclass
class _Runs:
    """The evaluations of one call, each done once."""

    request: ReproduceRequest
    defenses: dict[tuple[str, str], Defense] = field(default_factory=dict)

    def clean(self, cell: Cell) -> Figure:
        """Clean accuracy; the attack with bound 0 is a formality."""
        result = self._run(cell, "fgsm", 0.0, self.request.n)
        return _figure(result, result.clean_accuracy)

    def attacked(self, cell: Cell, attacks: Sequence[str]) -> Figure:
        """Accuracy under the cell's attack, measured in one run with the others of its threat model."""
        result = self._run(cell, ",".join(attacks), cell.eps, self.request.n)
        entries, _ = plan_attacks(cell.attack, self._defense(cell), cell.norm, cell.dataset)
        return _figure(result, result.per_attack[entries[0].key])

    def protocol(self, cell: Cell) -> Figure:
        """Worst-case accuracy under the protocol."""
        n = self.request.protocol_n or self.request.n
        result = self._run(cell, get_protocol(self.request.protocol).name, cell.eps, n)
        return _figure(result, result.robust_accuracy)

    def _defense(self, cell: Cell) -> Defense:
        key = (cell.defense, cell.dataset)
        if key not in self.defenses:
            self.defenses[key] = load_defense(cell.defense, cell.dataset)
        return self.defenses[key]

    def _run(self, cell: Cell, attacks: str, eps: float, asked: int | None) -> Evaluation:
        request = self.request
        defense = self._defense(cell)
        first_look = dict(defense.first_look)
        n = asked or first_look.pop("n", DEFAULT_N)
        said = f"{cell.defense} {cell.dataset} {attacks} {cell.norm} {eps:g} {n} {request.seed} {first_look}"
        plain = re.sub(r"[^A-Za-z0-9]+", "-", f"{cell.defense}-{cell.dataset}-{attacks}-{eps:g}").strip("-")[:60]
        folder = request.folder / f"{plain}-{hashlib.sha256(said.encode()).hexdigest()[:8]}"
        settings = {"eot": first_look.get("eot"), "judge_repeats": first_look.get("judge_repeats")}
        return evaluate(
            defense,
            attacks,
            ThreatModel(cell.norm, eps),
            cell.dataset,
            n=n,
            seed=request.seed,
            device=request.device,
            out=folder,
            resume=folder.exists(),
            progress=True,
            data_dir=request.data_dir,
            defense_spec=cell.defense,
            **{name: value for name, value in settings.items() if asked is None and value is not None},
        )


def _figure(result: Evaluation, estimate: Estimate | None) -> Figure:
    if estimate is None:
        raise UsageError(f"an attack failed; see {result.folder}")
    return Figure(100 * estimate.value, 100 * estimate.low, 100 * estimate.high, result.spec.n)


def load_tables(name: str) -> list[Cell]:
    """The cells of a defense's paper.

    Raises:
        UsageError: there is no such defense, or it brings no tables.
    """
    module = f"{resolve('defense', name).__module__.rpartition('.')[0]}.paper"
    try:
        tables: list[Cell] = importlib.import_module(module).TABLES
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        raise UsageError(f'defense "{name}" brings no tables of a paper') from None
    return tables


def reproduce(request: ReproduceRequest, announce: Callable[[int, int, Cell], None] | None = None) -> Iterator[Outcome]:
    """Measures the cells of a paper's tables, in their order; yields each as it is done.

    A cell that cannot be measured (weights or data that are not at hand) is yielded with its reason.

    Args:
        request: which cells, and on how many images.
        announce: called before each cell with its number from 1, how many there are, and the cell.

    Raises:
        UsageError: unknown defense, no tables, or none of the names asked for.
    """
    cells = _choose(load_tables(request.name), request.tables, "table")
    cells = _choose(cells, request.rows, "row")
    runs = _Runs(request)
    for number, cell in enumerate(cells, start=1):
        if announce is not None:
            announce(number, len(cells), cell)
        try:
            yield _measure(cell, cells, runs)
        except UsageError as error:
            yield Outcome(cell, None, problem=str(error))


def reproduce_all(
    request: ReproduceRequest, keep: Callable[[Sequence[Outcome]], object] | None = None
) -> list[Outcome]:
    """As `reproduce`, for the command line: says on standard error which cell is next.

    Args:
        request: which cells, and on how many images.
        keep: called after each cell with all that are done, so that hours of work leave their tables when they are cut
            off.

    Raises:
        UsageError: as `reproduce`, or the folder cannot be made.
        Interrupted: the message says how to go on.
    """
    try:
        request.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot make the folder {request.folder}: {error.strerror}. Choose another --out") from None
    try:
        outcomes: list[Outcome] = []
        for outcome in reproduce(request, _announce):
            outcomes.append(outcome)
            if keep is not None:
                keep(outcomes)
        return outcomes
    except KeyboardInterrupt:
        raise Interrupted("interrupted; the same command goes on where this one stopped") from None


def _announce(number: int, cells: int, cell: Cell) -> None:
    sys.stderr.write(f"cell {number} of {cells}: {cell.table}, {cell.row}, {cell.column}\n")
    sys.stderr.flush()


def _choose(cells: list[Cell], texts: Sequence[str], what: Literal["table", "row"]) -> list[Cell]:
    """The cells whose table or row holds one of the texts; all without a text.

    A text that stands somewhere as whole words is not looked for in parts of words: JEM-1 is not JEM-10. A text that is
    nowhere is taken for several with commas between them: names have commas too.

    Raises:
        UsageError: one of the texts is nowhere.
    """
    names = list(dict.fromkeys(getattr(cell, what) for cell in cells))
    chosen = set() if texts else set(names)
    for text in texts:
        several = [] if _holders(names, text) else [part.strip() for part in text.split(",") if part.strip()]
        for part in several or [text]:
            found = _holders(names, part)
            if not found:
                raise UsageError(f'no {what} has "{part}" in its name; there are: {", ".join(names)}')
            chosen |= found
    return [cell for cell in cells if getattr(cell, what) in chosen]


def _holders(names: Sequence[str], text: str) -> set[str]:
    """The names that hold a text as whole words; those that hold it at all where there are none."""
    whole = {name for name in names if re.search(rf"(?<!\w){re.escape(text)}(?!\w)", name)}
    return whole or {name for name in names if text in name}


def _measure(cell: Cell, cells: Sequence[Cell], runs: _Runs) -> Outcome:
    request = runs.request
    if cell.measure is not None:
        device = Settings(device=request.device).resolve_device()
        return Outcome(
            cell, cell.measure(Context(request.n or DEFAULT_N, request.seed, device, request.data_dir, request.folder))
        )
    load_dataset(cell.dataset, "test", 1, 0, request.data_dir)
    if not cell.attack:
        return Outcome(cell, runs.clean(cell))
    alike = (cell.defense, cell.dataset, cell.norm, cell.eps)
    attacks = [
        other.attack
        for other in cells
        if (other.defense, other.dataset, other.norm, other.eps) == alike and other.attack
    ]
    ours = runs.attacked(cell, list(dict.fromkeys(attacks)))
    if not request.protocol:
        return Outcome(cell, ours)
    try:
        return Outcome(cell, ours, runs.protocol(cell))
    except UsageError as error:
        return Outcome(cell, ours, problem=f"under {request.protocol}: {error}")
