"""From finished runs and audits to rows with their evidence, and from published rows back to what can be checked."""

from __future__ import annotations

import contextlib
import csv
import math
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from robench.bundle import AUDIT, bundle_folder, check_audit, read_bundle, write_bundle
from robench.check_names import QUESTIONS
from robench.defense import Defense, bears_digest
from robench.errors import RobenchError, UsageError
from robench.files import explain_folder, write_atomic
from robench.leaderboard import (
    Row,
    add_row,
    board_name,
    describe,
    find_replaced,
    identity,
    make_row,
    name_clash,
    rank_rows,
    read_rows,
    row_name,
    rows_csv,
)
from robench.plan import RunSpec
from robench.registry import load_defense
from robench.result import Evaluation
from robench.settings import Settings
from robench.store import RESULT_FILE, SPEC_FILE
from robench.study import STUDY_CSV

EVIDENCE: Final = "evidence"
"""The folder of all bundles, beside the CSV files."""


def publish(
    folders: Sequence[Path],
    leaderboards: Path,
    data_dir: Path | None = None,
    *,
    replace: bool = False,
    device: str = "cpu",
    tell: Callable[[str], None] | None = None,
    tell_row: Callable[[Path, Row], None] | None = None,
) -> list[Path]:
    """Adds the rows of runs, with their evidence, to the leaderboards; returns the CSV files that were written.

    Nothing is written where a row may not take the place of another; docs/leaderboards.md has the rule.

    Args:
        folders: run folders, which stand for the audits in them too, folders of audits, and folders of studies, which
            stand for all finished runs and audits in them. An audit goes with the runs of the same weights, data and
            bound; one that is named goes before one inside a run.
        leaderboards: the folder of the CSV files.
        data_dir: folder with datasets; None: `ROBENCH_DATA`.
        replace: let a row take the place of one that is better evidenced.
        device: `auto`, `cpu` or `cuda`: where a defense answers on its images as they were and as they are stored.
        tell: hears one line for each row that was replaced by another run's, and for each that nobody can check.
        tell_row: hears of each row that is on a leaderboard now: the CSV file and the row.

    Raises:
        UsageError: a folder is neither, a run has no named data, an audit is of some checks only or fits no run, two of
            the runs would be one row, or a row would take the place of one that is better evidenced.
        DataError: a run, an audit or a leaderboard is damaged.
    """
    device = Settings(device=device).resolve_device()
    every = [inner for folder in folders for inner in _inside(folder)]
    runs = [Evaluation.load(folder) for folder in every if (folder / SPEC_FILE).exists()]
    audits = {folder: read_audit(folder) for folder in every if not (folder / SPEC_FILE).exists()}
    pairs = [
        (result, eps, _audit_for(result, eps, audits, named=folders)) for result in runs for eps in result.spec.eps
    ]
    for folder in set(audits).intersection(folders).difference(found for _, _, found in pairs if found is not None):
        raise UsageError(f"the audit in {folder} fits no run that was named: it is of other weights, data or bounds")
    _check_places(
        [(result, eps, audits[found] if found else None) for result, eps, found in pairs], leaderboards, replace=replace
    )
    defenses = {result.folder: _defense_of(result.spec) for result in runs}
    for result in runs:
        if tell is not None and not result.spec.defense:
            tell(
                f"{result.folder} names no defense, so that nobody can check its row; put the defense in a file and "
                "use --defense file.py:NAME"
            )
    written: dict[Path, None] = {}
    for result, eps, found in pairs:
        audit = audits[found] if found is not None else None
        bundle = write_bundle(result, eps, leaderboards / EVIDENCE, audit, defenses[result.folder], data_dir, device)
        path, row = leaderboards / board_name(result.spec.dataset, result.spec.norm, eps), bundle.row()
        for old in add_row(row, path, replace=replace):
            if tell is not None and old["evidence"] != bundle.digest:
                tell(f"{path.name}: {row_name(row)}: replaces {describe(old)} by {describe(row)} of {result.folder}")
            _remove(leaderboards, old["evidence"], keep=bundle.digest)
        if tell_row is not None:
            tell_row(path, row)
        written[path] = None
    return list(written)


def _check_places(
    runs: Sequence[tuple[Evaluation, float, Mapping[str, Any] | None]], leaderboards: Path, *, replace: bool
) -> None:
    """Refuses runs whose rows would take a place that is not theirs.

    Raises:
        UsageError: two of the runs would be one row, or a row is less well evidenced than one that it would replace.
        DataError: a leaderboard is damaged.
    """
    taken: dict[tuple[Path, tuple[str, ...]], tuple[Row, object]] = {}
    for result, eps, audit in runs:
        path, row = leaderboards / board_name(result.spec.dataset, result.spec.norm, eps), make_row(result, eps, audit)
        first, folder = taken.setdefault((path, identity(row)), (row, result.folder))
        if first != row:
            raise UsageError(
                f"{folder} ({describe(first)}) and {result.folder} ({describe(row)}) would be one row of {path.name}: "
                f"{row_name(row)}. Name one of them"
            )
        whose = f"{path.name}: {result.folder}"
        for old in find_replaced(row, read_rows(path) if path.exists() else [], replace=replace, whose=whose):
            reason = "" if replace else _find_other(leaderboards, old, result.spec)
            if reason:
                raise UsageError(f"{name_clash(row, old, whose, reason)}. Leave it out, or pass --replace")


def _find_other(leaderboards: Path, old: Row, spec: RunSpec) -> str:
    """What an old row's evidence tells beyond the row: it is of other code, or was given more queries."""
    try:
        before = read_bundle(bundle_folder(leaderboards / EVIDENCE, old["evidence"])).spec
    except RobenchError:
        return ""
    if before.defense != spec.defense:
        return f'it is of "{spec.defense}", the old one of "{before.defense}"'
    limit, limit_before = (math.inf if one.query_budget is None else one.query_budget for one in (spec, before))
    return f"it has a query budget of {limit}, the old one {limit_before}" if limit < limit_before else ""


def _audit_for(
    result: Evaluation, eps: float, audits: Mapping[Path, Mapping[str, Any]], named: Sequence[Path]
) -> Path | None:
    """The folder of the audit that goes with a run at a bound.

    Raises:
        UsageError: several do.
    """
    fitting = [folder for folder, audit in audits.items() if audit_fits(audit, result.spec, eps)]
    fitting = [folder for folder in fitting if folder in named] or fitting
    if len(fitting) > 1:
        raise UsageError(f"two audits fit {result.folder}: {fitting[0]} and {fitting[1]}. Name one")
    return fitting[0] if fitting else None


def _inside(folder: Path) -> list[Path]:
    """A run and the audits in it; the finished runs and the audits of a study; of any other folder itself."""
    if not (folder / STUDY_CSV).is_file():
        return [folder, *sorted(inner.parent for inner in folder.glob(f"audit-*/{AUDIT}"))]
    with (folder / STUDY_CSV).open(encoding="utf-8", newline="") as file:
        named = dict.fromkeys(row["run"] for row in csv.DictReader(file) if row.get("status") == "finished")
    runs = [folder / name for name in named if (folder / name / RESULT_FILE).is_file()]
    return runs + sorted(inner.parent for inner in folder.glob(f"*/{AUDIT}"))


def read_audit(folder: Path) -> dict[str, Any]:
    """The findings of a finished audit.

    Raises:
        UsageError: there is no whole audit in the folder.
        DataError: it cannot be read.
    """
    path = folder / AUDIT
    if not path.is_file():
        partial = folder / "audit-partial.json"
        hint = f"; {partial.name} is of some checks, and a row needs all" if partial.is_file() else ""
        hint = hint or explain_folder(folder, SPEC_FILE)
        raise UsageError(
            f"{folder} is not a run folder, nor one of an audit: it has no {SPEC_FILE} and no {AUDIT}{hint}"
        )
    audit = check_audit(path.read_bytes(), path)
    made = [finding["check"] for finding in audit["findings"]]
    missing = [name for name in QUESTIONS if name not in made]
    if missing:
        raise UsageError(f"the audit in {folder} lacks the check {missing[0]}; a row needs all of them")
    return audit


def audit_fits(audit: Mapping[str, Any], spec: RunSpec, eps: float) -> bool:
    """Whether an audit is of the weights, data and bound of a run."""
    told = audit["weights_digest"], audit["dataset"], audit["norm"], audit["eps"]
    same_options = audit.get("spec") in (None, "", spec.defense)  # the same weights may be used in several ways
    return same_options and told == (spec.weights_digest, spec.dataset, spec.norm, eps)


def find_audit(result: Evaluation, eps: float) -> Mapping[str, Any] | None:
    """The whole audit inside a run's folder that fits the run at a bound, as `robench run --audit` leaves it."""
    for path in sorted(result.folder.glob(f"audit-*/{AUDIT}")) if result.folder is not None else ():
        with contextlib.suppress(RobenchError):
            audit = read_audit(path.parent)
            if audit_fits(audit, result.spec, eps):
                return audit
    return None


def _defense_of(spec: RunSpec) -> Defense | None:
    """The defense of a run, to see which rounding it bears; None where it cannot be loaded by name.

    Raises:
        UsageError: what is loaded has other weights than the run had.
    """
    if not spec.defense:
        return None
    defense = load_defense(spec.defense, spec.dataset, **spec.defense_options)
    if not bears_digest(defense, spec.weights_digest):
        raise UsageError(f'the weights of "{spec.defense}" are no longer those of the run. Run it again')
    return defense


def withdraw(leaderboards: Path, digests: Iterable[str]) -> list[Path]:
    """Takes rows and their evidence off the leaderboards; returns the CSV files, which go too with their last row.

    Raises:
        UsageError: no row or several have one of the digests; then nothing is taken away.
        DataError: a leaderboard is damaged.
    """
    gone = dict.fromkeys(digests)
    rows = list(all_rows(leaderboards))
    counts = Counter(row["evidence"] for _, row in rows)
    for digest in gone:
        if counts[digest] != 1:
            raise UsageError(f"{counts[digest] or 'no'} rows in {leaderboards} have the evidence {digest}")
    touched = dict.fromkeys(path for path, row in rows if row["evidence"] in gone)
    for path in touched:
        left = [row for place, row in rows if place == path and row["evidence"] not in gone]
        if left:
            write_atomic(path, rows_csv(rank_rows(left)).encode())
        else:
            path.unlink()
    for digest in gone:
        _remove(leaderboards, digest)
    return list(touched)


def _remove(leaderboards: Path, digest: str, keep: str = "") -> None:
    """Removes the bundle of a row that was taken away, where no other row points to it."""
    try:
        folder = bundle_folder(leaderboards / EVIDENCE, digest)
    except UsageError:
        return
    if digest != keep and all(row["evidence"] != digest for _, row in all_rows(leaderboards)):
        shutil.rmtree(folder)


def boards(leaderboards: Path) -> list[Path]:
    """The CSV files of a folder of leaderboards, by name."""
    return sorted(leaderboards.glob("*.csv"))


def all_rows(leaderboards: Path) -> Iterator[tuple[Path, Row]]:
    """Each row with the file that it is in.

    Raises:
        DataError: a leaderboard is damaged.
    """
    for path in boards(leaderboards):
        for row in read_rows(path):
            yield path, row


def verify_boards(
    leaderboards: Path,
    rows: Iterable[tuple[Path, Row]],
    *,
    device: str,
    data_dir: Path | None,
    trust: bool,
    images: int | None = None,
) -> Iterator[tuple[Path, Row, str, str]]:
    """Verifies rows one after another: the file, the row, `holds`, `does not hold` or `cannot be checked`, and why.

    With `images` the answers on so many of a row are compared, and a row that holds says so.
    """
    from robench.verify import verify_evidence
    from robench.verify_data import check_count

    check_count(images)
    faults = find_misplaced(leaderboards)
    for path, row in rows:
        if fault := faults.get((path, row["evidence"])):
            yield path, row, "does not hold", fault
            continue
        try:
            folder = bundle_folder(leaderboards / EVIDENCE, row["evidence"])
            report = verify_evidence(
                folder, row=row, board=path.name, device=device, data_dir=data_dir, trust=trust, images=images
            )
        except RobenchError as error:
            yield path, row, "cannot be checked", str(error)
            continue
        part = f"{images} of {row['n']} images judged" if images is not None and images < int(row["n"]) else ""
        yield path, row, "holds" if report.holds else "does not hold", "; ".join(report.failures) or part


def find_misplaced(leaderboards: Path) -> dict[tuple[Path, str], str]:
    """Why a row cannot stand where it does, by its file and evidence; only those of which that is so.

    Another has the same evidence, or its rank is not that of its figures.

    Raises:
        DataError: a leaderboard is damaged.
    """
    counts = Counter(row["evidence"] for _, row in all_rows(leaderboards))
    found = {}
    for path in boards(leaderboards):
        rows = read_rows(path)
        ranks = {ranked["evidence"]: ranked["rank"] for ranked in rank_rows(rows)}
        for row in rows:
            digest, rank = row["evidence"], ranks[row["evidence"]]
            if counts[digest] > 1:
                found[path, digest] = f"{counts[digest]} rows have this evidence"
            elif row["rank"] != rank:
                found[path, digest] = f"its rank is {row['rank'] or 'none'}; by its figures {rank or 'none'}"
    return found


def pick_rows(leaderboards: Path, sample: int | None = None, seed: int = 0) -> list[tuple[Path, Row]]:
    """All rows, or some drawn at random.

    Raises:
        UsageError: there is no row, or fewer than one is asked for.
        DataError: a leaderboard is damaged.
    """
    if sample is not None and sample < 1:
        raise UsageError(f"sample must be at least 1 row; got {sample}")
    rows = list(all_rows(leaderboards))
    if not rows:
        raise UsageError(f"there is no leaderboard row in {leaderboards}")
    if sample is None or sample >= len(rows):
        return rows
    return [rows[place] for place in sorted(random.Random(seed).sample(range(len(rows)), sample))]
