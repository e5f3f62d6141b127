"""`robench reproduce`: the tables of a defense's paper, cell by cell, beside what robench measures.

A defense brings the cells (`robench.paper`) as `TABLES` in the module `paper` of its package. Accuracies are measured
on the main path (`evaluate`), at the paper's own attack and then under a protocol; anything else by a function of the
cell. A cell may ask for a training of its own, which is done where the request says so.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from robench.data import load_dataset
from robench.defense import Defense, weights_digest
from robench.errors import DataError, Interrupted, UsageError
from robench.estimate import Estimate
from robench.evaluate import evaluate
from robench.kept import folder_name, measure_once
from robench.lineup import plan_attacks
from robench.paper import Cell, Context, Figure, Outcome
from robench.protocol import get_protocol
from robench.registry import load_defense, resolve
from robench.result import Evaluation
from robench.settings import Settings
from robench.threat import ThreatModel
from robench.train import TrainSettings
from robench.train.named import TrainJob, find_trained, train_named
from robench.train.run import CHECKPOINT
from robench.weights import read_card

DEFAULT_N = 128


@dataclass(frozen=True)
class ReproduceRequest:
    """What to reproduce and at what cost.

    Attributes:
        name: the defense whose paper it is.
        folder: where runs are kept; a second call takes up what is there.
        tables: only tables whose name holds one of these texts; () for all. A text that no name holds is taken for
            several with commas between them.
        rows: likewise, only rows whose heading holds one of these texts.
        columns: likewise, only these columns of them.
        dataset: only what is measured on it; "" for all.
        n: images of each figure; None: 128, or the defense's first look where it is slow.
        protocol: measured besides the paper's attack; "" for none.
        protocol_n: images of the figures under the protocol, which costs far more; None: as many as `n` says.
        seed: seeds everything.
        device: `auto`, `cpu` or `cuda`.
        precision: of the attacks, as in `Settings`; the judge stays float32.
        unit_size: images of one work unit: what an interrupt throws away is one attack on one unit.
        workers: processes that share the units of a run.
        data_dir: folder with datasets; None: `ROBENCH_DATA`.
        train: train the defenses of the cells that have a recipe; what was trained before in `folder` is taken up.
        scale: multiplies the iterations of these trainings.
    """

    name: str
    folder: Path
    tables: tuple[str, ...] = ()
    rows: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    dataset: str = ""
    n: int | None = None
    protocol: str = "standard"
    protocol_n: int | None = None
    seed: int = 0
    device: str = "auto"
    precision: str = Settings.precision
    unit_size: int = Settings.unit_size
    workers: int = Settings.workers
    data_dir: Path | None = None
    train: bool = False
    scale: float = 1.0

    def __post_init__(self) -> None:
        """Checks what does not depend on a cell, before hours go into figures or a table of an earlier call is lost.

        Raises:
            UsageError: a count is below 1, a seed below 0, a scale that is not positive, or there is no such device,
                precision or protocol.
        """
        TrainSettings(scale=self.scale)
        Settings(
            seed=self.seed,
            precision=self.precision,
            device=self.device,
            unit_size=self.unit_size,
            workers=self.workers,
        ).resolve_device()
        if self.protocol:
            get_protocol(self.protocol)
        for name, count in (("n", self.n), ("protocol-n", self.protocol_n)):
            if count is not None and count < 1:
                raise UsageError(f"{name} must be at least 1; got {count}")


@dataclass
class _Runs:
    """The evaluations of one call, each done once, and the defenses they are of."""

    request: ReproduceRequest
    defenses: dict[tuple[str, str, Path | None], Defense] = field(default_factory=dict)

    def clean(self, cell: Cell) -> Figure:
        """Clean accuracy; the attack with bound 0 is a formality."""
        result = self._run(cell, "fgsm", [0.0], self.request.n)
        return _figure(result, result.clean_accuracy)

    def attacked(self, cell: Cell, weights: Path | None) -> Figure:
        """Accuracy under the cell's attack, in a run of its own: the same one whichever cells are asked for beside it.

        Attacks do not depend on those that they share a run with, so that this is also what a joint run would give. A
        minimal-norm attack, whose one search serves all bounds, is run once for all the bounds that its row has in this
        dataset and norm.
        """
        entries, built = plan_attacks(cell.attack, self._defense(cell, weights), cell.norm, cell.dataset)
        key = entries[0].key
        bounds = self._bounds(cell) if built[key].goal == "minimal" else [cell.eps]
        result = self._run(cell, cell.attack, bounds, self.request.n, weights)
        return _figure(result, result.attacks_at(cell.eps)[key])

    def protocol(self, cell: Cell, weights: Path | None) -> Figure:
        """Worst-case accuracy under the protocol."""
        n = self.request.protocol_n or self.request.n
        result = self._run(cell, get_protocol(self.request.protocol).name, [cell.eps], n, weights)
        return _figure(result, result.robust_accuracy)

    def weights(self, cell: Cell) -> Path | None:
        """Weights of the cell's own training, trained now where the request says so; None where there are none."""
        if not cell.recipe:
            return None
        request = self.request
        said = f"{cell.defense} {cell.dataset} {cell.recipe} {cell.split} {request.seed} {request.scale:g}"
        folder = request.folder / "trained" / folder_name(f"{cell.defense}-{cell.dataset}-{cell.recipe}", said)
        found = find_trained(folder, cell.dataset)
        if found is not None or not request.train:
            return found
        device = Settings(device=request.device).resolve_device()
        settings = TrainSettings(seed=request.seed, scale=request.scale, device=device)
        job = TrainJob(cell.defense, cell.dataset, folder, cell.recipe, request.data_dir, cell.split, settings=settings)
        return train_named(job, resume=(folder / CHECKPOINT).exists())[0]

    def digest(self, cell: Cell, weights: Path | None) -> str:
        """Digest of the weights that a cell's function reads; "" where it reads none."""
        return weights_digest(self._defense(cell, weights)) if cell.defense or cell.reads else ""

    def _defense(self, cell: Cell, weights: Path | None) -> Defense:
        name = cell.defense or cell.reads
        key = (name, cell.dataset, weights)
        if key not in self.defenses:
            self.defenses[key] = load_defense(name, cell.dataset, **_options(weights))
        return self.defenses[key]

    def _bounds(self, cell: Cell) -> list[float]:
        """The bounds of all of the paper's cells that differ from this one in nothing else that a run depends on."""

        def run(one: Cell) -> tuple[str, ...]:
            return one.defense, one.dataset, one.attack, one.norm, one.recipe, one.split

        return sorted({other.eps for other in load_tables(self.request.name) if run(other) == run(cell)})

    def _run(
        self, cell: Cell, attacks: str, bounds: Sequence[float], asked: int | None, weights: Path | None = None
    ) -> Evaluation:
        request = self.request
        defense = self._defense(cell, weights)
        first_look = dict(defense.first_look)
        n = asked or first_look.pop("n", DEFAULT_N)
        eps = " ".join(f"{one:g}" for one in bounds)
        said = f"{cell.defense} {cell.dataset} {attacks} {cell.norm} {eps} {n} {request.seed} {first_look}"
        said += f" {weights.parent.name}" if weights else ""
        said += f" {request.precision}" if request.precision != Settings.precision else ""
        said += f" units of {request.unit_size}" if request.unit_size != Settings.unit_size else ""
        folder = request.folder / folder_name(f"{cell.defense}-{cell.dataset}-{attacks}-{eps}", said)
        settings = {"eot": first_look.get("eot"), "judge_repeats": first_look.get("judge_repeats")}
        return evaluate(
            defense,
            attacks,
            [ThreatModel(cell.norm, one) for one in bounds],
            cell.dataset,
            n=n,
            seed=request.seed,
            device=request.device,
            precision=request.precision,
            unit_size=request.unit_size,
            workers=request.workers,
            out=folder,
            resume=folder.exists(),
            progress=True,
            data_dir=request.data_dir,
            defense_spec=cell.defense,
            defense_options=_options(weights),
            **{name: value for name, value in settings.items() if asked is None and value is not None},
        )


def _options(weights: Path | None) -> dict[str, str]:
    return {} if weights is None else {"weights": str(weights.resolve())}


def _clean_of_card(weights: Path) -> Figure:
    """The clean accuracy that training measured at its end, on 2,000 test images with one answer for each."""
    test = read_card(weights)["test"]
    value, low, high = (100 * float(test[f"clean_{name}"]) for name in ("accuracy", "low", "high"))
    return Figure(value, low, high, int(test["images"]))


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

    A cell that cannot be measured (weights or data that are not at hand, training that diverges) is yielded with its
    reason. One that takes a training which is not wanted is yielded without a figure.

    Args:
        request: which cells, and on how many images.
        announce: called before each cell with its number from 1, how many there are, and the cell.

    Raises:
        UsageError: unknown defense, no tables, or none of the names asked for.
    """
    cells, runs = _asked_for(request), _Runs(request)
    for number, cell in enumerate(cells, start=1):
        if announce is not None:
            announce(number, len(cells), cell)
        try:
            yield _measure(cell, runs)
        except (UsageError, DataError) as error:
            yield Outcome(cell, None, problem=str(error))


def _asked_for(request: ReproduceRequest) -> list[Cell]:
    """The cells of a request, in their order.

    Raises:
        UsageError: as `reproduce`.
    """
    cells = _on_dataset(load_tables(request.name), request.dataset)
    cells = _choose(_choose(cells, request.tables, "table"), request.rows, "row")
    return _choose(cells, request.columns, "column")


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
    _asked_for(request)  # before a folder is made for nothing
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


def _on_dataset(cells: list[Cell], dataset: str) -> list[Cell]:
    """The cells that are measured on a dataset; all for "".

    Raises:
        UsageError: there are none.
    """
    names = list(dict.fromkeys(cell.dataset for cell in cells))
    if dataset and dataset not in names:
        raise UsageError(f'nothing is measured on "{dataset}"; there are: {", ".join(names)}')
    return [cell for cell in cells if dataset in ("", cell.dataset)]


def _choose(cells: list[Cell], texts: Sequence[str], what: Literal["table", "row", "column"]) -> list[Cell]:
    """The cells whose table, row or column holds one of the texts; all without a text.

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


def _measure(cell: Cell, runs: _Runs) -> Outcome:
    weights = runs.weights(cell)
    if cell.recipe and weights is None:
        return Outcome(cell, None)
    outcome = _measure_with(weights, cell, runs)
    if weights is None:
        return outcome
    scale = runs.request.scale
    return replace(outcome, trained=cell.recipe + ("" if scale == 1 else f", scale {scale:g}"))


def _measure_with(weights: Path | None, cell: Cell, runs: _Runs) -> Outcome:
    """Measures a cell on weights of its own training, or on those shipped."""
    request = runs.request
    if cell.measure is not None:
        device = Settings(device=request.device).resolve_device()
        n = request.n or DEFAULT_N
        context = Context(n, request.seed, device, request.data_dir, request.folder, weights)
        return Outcome(cell, measure_once(cell, context, runs.digest(cell, weights)))
    if weights is not None and not cell.attack:
        return Outcome(cell, _clean_of_card(weights))
    load_dataset(cell.dataset, "test", 1, 0, request.data_dir)
    if not cell.attack:
        return Outcome(cell, runs.clean(cell))
    ours = runs.attacked(cell, weights)
    if not request.protocol:
        return Outcome(cell, ours)
    try:
        return Outcome(cell, ours, runs.protocol(cell, weights))
    except UsageError as error:
        return Outcome(cell, ours, problem=f"under {request.protocol}: {error}")
