"""What a row has to have before it is taken into the published leaderboards; see docs/submitting.md."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from robench.bundle import Bundle, bundle_folder, read_bundle, size
from robench.check_names import QUESTIONS
from robench.errors import DataError, UsageError
from robench.leaderboard import Row, board_name, is_complete, rank_rows, read_rows, rows_csv
from robench.protocol import PROTOCOLS
from robench.publish import EVIDENCE, audit_fits
from robench.verify import Report, verify_evidence

LARGEST: Final = 2_000_000
"""Bytes of a bundle."""
FEWEST: Final = 64
"""Images; the interval of fewer is wider than most differences between defenses."""


def check_submission(
    leaderboards: Path, evidence: str, *, device: str = "auto", data_dir: Path | None = None, trust: bool = False
) -> Report:
    """Checks a row and its evidence: form first, then the images, judged again.

    Args:
        leaderboards: the folder with the CSV files.
        evidence: the digest in the row, which names the bundle.
        device: `auto`, `cpu` or `cuda`.
        data_dir: folder with datasets; None: `ROBENCH_DATA`.
        trust: run the code of a defense that is not one of robench's.

    Raises:
        UsageError: there is no such bundle, or something that the check needs is missing.
        DataError: the leaderboard cannot be read.
    """
    folder = bundle_folder(leaderboards / EVIDENCE, evidence)
    report = Report(folder)
    try:
        bundle = read_bundle(folder)
    except DataError as error:
        report.check("the evidence can be read", held=False, detail=str(error))
        return report
    row = _check_form(report, bundle, leaderboards)
    if report.failures or row is None:
        return report
    judged = verify_evidence(folder, row=row, device=device, data_dir=data_dir, trust=trust)
    report.lines += judged.lines
    report.failures += judged.failures
    return report


def _check_form(report: Report, bundle: Bundle, leaderboards: Path) -> Row | None:
    name = board_name(bundle.spec.dataset, bundle.spec.norm, bundle.eps)
    path = leaderboards / name
    rows = read_rows(path) if path.exists() else []
    mine = [row for row in rows if row["evidence"] == bundle.digest]
    report.check(f"{name} has one row with this evidence", len(mine) == 1, f"{len(mine)} rows")
    if len(mine) != 1:
        return None
    row = mine[0]
    canonical = rows_csv(rank_rows(rows)).encode() == path.read_bytes()
    report.check(f"{name} is as 'robench leaderboard add' writes it", canonical, "order, ranks and quoting")
    known = ", ".join(PROTOCOLS)
    report.check(
        "the protocol is a published one", row["protocol"] in PROTOCOLS, f'"{row["protocol"]}"; known: {known}'
    )
    report.check("no number is missing", is_complete(row), "clean and robust accuracy, and that under each attack")
    made = {finding["check"] for finding in bundle.audit["findings"]} if bundle.audit else set()
    report.check("the audit made every check", made >= QUESTIONS.keys(), f"{len(made)} of {len(QUESTIONS)}")
    fitting = bundle.audit is not None and audit_fits(bundle.audit, bundle.spec, bundle.eps)
    report.check("the audit is of these weights and this bound", fitting, f"eps {bundle.eps:g}")
    report.check("there are enough images", bundle.spec.n >= FEWEST, f"{bundle.spec.n}, at least {FEWEST}")
    report.check("the evidence is small", size(bundle.folder) <= LARGEST, f"{size(bundle.folder)} of {LARGEST} bytes")
    return row


def digest_of(text: str) -> str:
    """The digest in `text`: itself, or the name of a bundle's folder.

    Raises:
        UsageError: it is neither.
    """
    name = Path(text).name
    if len(name) != 16:
        raise UsageError(f'"{text}" is no digest of evidence and no folder of that name')
    return name
