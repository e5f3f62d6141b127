"""A leaderboard as it is shown: rows with their evidence, which neighbours can be told apart, what others published.

Everything comes from the CSV files and from the bundles that their rows point to.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from robench.bundle import Bundle, bundle_folder, read_bundle
from robench.errors import DataError, RobenchError, UsageError
from robench.leaderboard import Row, find_changed, is_complete, is_masked, read_rows
from robench.paired import LEVEL, compare_answers, shared_answers
from robench.plan import RunSpec
from robench.protocol import find_protocol
from robench.publish import EVIDENCE, boards
from robench.registry import is_shipped
from robench.settings import Settings
from robench.shell import join_words
from robench.threat import exact_eps
from robench.unit_table import WORST

REFERENCE: Final = "reference"
"""The folder of figures that others published, one CSV file for each leaderboard, of the same name."""
REFERENCE_COLUMNS: Final = ("defense", "clean_acc", "robust_acc", "attack", "source", "date", "note")
NAME: Final = r"(.+)-(linf|l2|l1|l0)-(\d[\d._e-]*)"


@dataclass(frozen=True)
class Reference:
    """A figure that others published; see `REFERENCE_COLUMNS`. Accuracies are shares, empty where not given."""

    defense: str
    clean_acc: str
    robust_acc: str
    attack: str
    source: str
    date: str
    note: str


@dataclass(frozen=True)
class Neighbours:
    """Whether a row can be told from the next one of its protocol.

    Attributes:
        distinct: the paired test on the images of both tells them apart.
        images: how many that are.
        name: the next row's rank and defense: `3. jem`.
    """

    distinct: bool
    images: int
    name: str


@dataclass(frozen=True)
class Entry:
    """A row and what is known of it.

    Attributes:
        row: as in the CSV.
        bundle: its evidence; None where it is missing or damaged.
        problem: what is wrong with the evidence; "" if nothing is.
        below: how it compares with the next row; None where there is none or no images are shared.
        place: the folder of the leaderboards, as commands name it.
    """

    row: Row
    bundle: Bundle | None
    problem: str
    below: Neighbours | None = None
    place: str = "leaderboards"

    @property
    def masked(self) -> bool:
        """True if the audit says that the figure cannot be believed."""
        return is_masked(self.row)

    @property
    def cascade(self) -> bool:
        """True if each attack saw only what those before it left; without evidence as the protocol has it."""
        if self.bundle is not None:
            return self.bundle.spec.cascade
        protocol = find_protocol(self.row["protocol"])
        return protocol is not None and protocol.cascade

    @property
    def found_most(self) -> str:
        """The attack that found most errors, for readers: `apgd (in turn)` in a cascade.

        There it says nothing of how the attacks compare: an early one has more images to find errors on.
        """
        attack = self.row["worst_attack"]
        return f"{attack} (in turn)" if attack and self.cascade else attack

    @property
    def reproduce(self) -> str:
        """The command that makes the run again, and its audit if a run makes that one; "" without evidence."""
        if self.bundle is None or not self.bundle.spec.defense:
            return ""
        spec, audit = self.bundle.spec, self.bundle.audit
        return repeat_command(spec, audit=audit is not None and is_audit_of_run(audit, spec))

    @property
    def audit_again(self) -> str:
        """The command that makes the audit again where `reproduce` does not; "" without one."""
        if self.bundle is None or self.bundle.audit is None or not self.bundle.spec.defense:
            return ""
        spec, audit = self.bundle.spec, self.bundle.audit
        return "" if is_audit_of_run(audit, spec) else repeat_audit_command(audit, spec)

    @property
    def verify(self) -> str:
        """The command that judges the images again; "" without evidence."""
        if self.bundle is None:
            return ""
        name = self.bundle.spec.defense
        foreign = bool(name) and not is_shipped(name)
        words = ["robench", "verify", f"{self.place}/{EVIDENCE}/{self.bundle.digest}"]
        return join_words([*words, *(["--trust"] if foreign else [])])


@dataclass(frozen=True)
class Board:
    """A leaderboard.

    Attributes:
        name: the file's, without its ending.
        dataset: the data's name, as far as the file's name tells it.
        norm: `linf`, `l2`, `l1` or `l0`.
        eps: the bound, as text.
        entries: the rows, in order.
        references: figures that others published for this threat model.
    """

    name: str
    dataset: str
    norm: str
    eps: str
    entries: tuple[Entry, ...]
    references: tuple[Reference, ...] = field(default=())


def load_boards(leaderboards: Path, names: Sequence[str] = ()) -> list[Board]:
    """Reads the leaderboards of a folder, all or those named.

    Raises:
        UsageError: there is none, or none of a name.
        DataError: a file is damaged.
    """
    found = {path.stem: path for path in boards(leaderboards)}
    missing = [name for name in names if name not in found]
    if missing or not found:
        there = ", ".join(found) or "none"
        if not leaderboards.is_dir():
            raise UsageError(
                f"there is no folder {leaderboards}. 'robench leaderboard add RUN' makes one; or correct --leaderboards"
            )
        raise UsageError(f"no leaderboard {missing[0] if missing else ''} in {leaderboards}; there are: {there}")
    return [_load(found[name], leaderboards) for name in names or found]


def _load(path: Path, leaderboards: Path) -> Board:
    rows = read_rows(path)
    entries = [_entry(row, leaderboards / EVIDENCE) for row in rows]
    following: list[Entry | None] = [*entries[1:], None] if entries else []
    place, here = leaderboards.resolve(), Path.cwd()
    told = (place.relative_to(here) if place.is_relative_to(here) else leaderboards).as_posix()
    compared = [
        replace(entry, below=_compare(entry, after), place=told)
        for entry, after in zip(entries, following, strict=True)
    ]
    named = re.fullmatch(NAME, path.stem)
    if named is None:
        raise DataError(f"{path}: a leaderboard is named <dataset>-<norm>-<eps>.csv")
    dataset, norm, eps = named.groups()
    references = read_references(leaderboards / REFERENCE / path.name)
    return Board(path.stem, dataset, norm, eps.replace("_", "/"), tuple(compared), tuple(references))


def _entry(row: Row, evidence: Path) -> Entry:
    try:
        folder = bundle_folder(evidence, row["evidence"])
    except UsageError:
        return Entry(row, None, "There is no evidence for this row.")
    try:
        bundle = read_bundle(folder)
        differing = find_changed(row, bundle.row())
    except RobenchError as error:
        return Entry(row, None, f"The evidence is damaged: {error}")
    problem = f"The row does not agree with its evidence in: {', '.join(differing)}" if differing else ""
    return Entry(row, bundle, problem)


def _compare(first: Entry, second: Entry | None) -> Neighbours | None:
    """The paired test of the images that two rows of one protocol share; see `robench.paired`. None where none are."""
    if second is None or first.bundle is None or second.bundle is None:
        return None
    if not (is_complete(first.row) and is_complete(second.row)) or first.row["protocol"] != second.row["protocol"]:
        return None
    shared = shared_answers(first.bundle.figures, second.bundle.figures, WORST)
    if shared is None:
        return None
    gap, images = compare_answers(*shared), len(shared[0].labels)
    return Neighbours(gap.p <= LEVEL, images, f"{second.row['rank']}. {second.row['defense']}")


def read_references(path: Path) -> list[Reference]:
    """The figures that others published for a leaderboard; none where there is no file.

    Raises:
        DataError: the file does not have the columns of `REFERENCE_COLUMNS`, or an accuracy is no share.
    """
    if not path.exists():
        return []
    try:
        reader = csv.DictReader(io.StringIO(path.read_text(encoding="utf-8-sig"), newline=""), strict=True)
        if tuple(reader.fieldnames or ()) != REFERENCE_COLUMNS:
            raise DataError(f"{path} must have the columns {', '.join(REFERENCE_COLUMNS)}")
        found = [Reference(**row) for row in reader]
        values = [float(value) for one in found for value in (one.clean_acc, one.robust_acc) if value]
    except (OSError, ValueError, TypeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    if not all(0 <= value <= 1 for value in values) or not all(one.source for one in found):
        raise DataError(f"{path}: each row needs a source, and accuracies are shares between 0 and 1")
    return found


# the command that makes a run again


def eps_text(spec: RunSpec) -> str:
    """A run's bounds as --eps takes them, each read back as the same number: `8/255`, `0.05,0.1`."""
    return ",".join(exact_eps(eps, spec.norm) for eps in spec.eps)


def attack_specs(spec: RunSpec) -> list[str]:
    """A run's attacks as --attack takes them."""
    return [entry.spec + (f"@{entry.mode}" if entry.mode else "") for entry in spec.attacks]


def repeat_command(spec: RunSpec, *, audit: bool = False) -> str:
    """The command that makes a run again, and audits it if asked for."""
    protocol = find_protocol(spec.protocol) if spec.protocol else None
    words = ["robench", "run", *_subject_words(spec), "--eps", eps_text(spec)]
    words += ["--protocol", spec.protocol] if spec.protocol else ["--attack", ",".join(attack_specs(spec))]
    words += ["--n", str(spec.n), "--seed", str(spec.seed)]
    words += ["--eot", str(spec.eot), "--judge-repeats", str(spec.judge_repeats)] if spec.randomized else []
    words += ["--unit-size", str(spec.unit_size)] if spec.unit_size != Settings.unit_size else []
    words += ["--query-budget", str(spec.query_budget)] if spec.query_budget is not None else []
    if spec.cascade != (protocol is not None and protocol.cascade):
        words.append("--cascade" if spec.cascade else "--no-cascade")
    words += ["--precision", spec.precision] if spec.precision != Settings.precision else []
    words += ["--audit"] if audit else []
    return join_words(words)


def is_audit_of_run(audit: Mapping[str, Any], spec: RunSpec) -> bool:
    """Whether `robench run --audit` makes this audit: with the run's seed and draws, on as many images as it takes.

    That a defense names a first look on fewer images is not told by its evidence. Its usual audit is not taken for one
    of a run then, which costs a second command; one on the usual number of images for others is.
    """
    from robench.audit import DEFAULT_N

    same_draws = not spec.randomized or audit.get("eot") == spec.eot
    return audit["n"] == min(DEFAULT_N, spec.n) and audit.get("seed") == spec.seed and same_draws


def repeat_audit_command(audit: Mapping[str, Any], spec: RunSpec) -> str:
    """The command that makes an audit of a run's defense again."""
    words = ["robench", "audit", *_subject_words(spec), "--eps", exact_eps(audit["eps"], spec.norm)]
    words += ["--n", str(audit["n"]), "--seed", str(audit.get("seed", 0))]
    words += ["--eot", str(audit["eot"])] if spec.randomized and "eot" in audit else []
    return join_words(words)


def _subject_words(spec: RunSpec) -> list[str]:
    """What is attacked, on which data and in which norm, as the command line takes it."""
    weights = ["--weights", str(spec.defense_options["weights"])] if "weights" in spec.defense_options else []
    return ["--defense", spec.defense, "--dataset", spec.dataset, "--norm", spec.norm, *weights]
