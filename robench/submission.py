"""What a row has to have before it is taken into the published leaderboards; see docs/submitting.md."""

from __future__ import annotations

import dataclasses
import random
import secrets
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path, PureWindowsPath
from typing import Final

import numpy as np
import numpy.typing as npt

from robench.audit import audit
from robench.audit.effort import may_have_effort, read_effort
from robench.bundle import Bundle, bundle_folder, read_bundle, size
from robench.check_names import FEWEST_AUDITED, QUESTIONS, find_idle
from robench.data import digest_data, load_dataset
from robench.errors import DataError, UsageError
from robench.evaluate import evaluate
from robench.leaderboard import Row, board_name, identity, is_complete, rank_rows, read_rows, rows_csv
from robench.plan import RunSpec
from robench.protocol import PROTOCOLS
from robench.publish import EVIDENCE, audit_fits, find_misplaced
from robench.registry import builtin_names, load_defense, parse_spec
from robench.settings import RANDOMIZED_EOT
from robench.shares import in_percent
from robench.stats import most_by_chance, paired_interval, smallest_shown
from robench.text import find_forbidden
from robench.threat import ThreatModel
from robench.unit_table import WORST
from robench.verify import Report, verify_evidence

LARGEST: Final = 2_000_000
"""Bytes of a bundle."""
FEWEST: Final = 64
"""Images; the interval of fewer is wider than most differences between defenses."""
SLACK: Final = 0.02
"""How far a row may lie above a new attack beyond what chance explains: attacks draw their starts.

Of a deterministic defense: the share of its images that the new attack may break where the row's did not.
"""


MOST_SHARED: Final = 0.25
"""`Report.shared` of a row whose intervals, which take the images' answers as independent, can be believed."""
SHARED_ADVICE: Final = (
    "where the images of a pass share a draw, an accuracy is less certain than its interval says: draw for each image, "
    "or set draws_per_pass = True and run again"
)


@dataclass(frozen=True)
class Redo:
    """What of a row's own work to do again: no look at its files shows that this was done, or done well.

    Attributes:
        attack: how many images to attack again; 0 for none, else at least 2. At most those of the row.
        audit: whether to audit again, on as many images as the row's audit had.
        seed: draws the images, and seeds attacks and audit; None draws one, so that no submitter can know it.
    """

    attack: int = 0
    audit: bool = False
    seed: int | None = None

    def __post_init__(self) -> None:
        """Checks the count.

        Raises:
            UsageError: it is negative, or a single image, which can show nothing.
        """
        if self.attack < 0 or self.attack == 1:
            raise UsageError(f"attack must be 0, or at least 2 images; got {self.attack}")

    def draw_seed(self) -> int:
        """The seed, or one that nobody knows."""
        return secrets.randbelow(2**31) if self.seed is None else self.seed


def check_submission(
    leaderboards: Path,
    evidence: str,
    *,
    device: str = "auto",
    data_dir: Path | None = None,
    trust: bool = False,
    redo: Redo | None = None,
) -> Report:
    """Checks a row and its evidence: form, then the images, judged again; then, if asked, attack and audit once more.

    Args:
        leaderboards: the folder with the CSV files.
        evidence: the digest in the row, which names the bundle.
        device: `auto`, `cpu` or `cuda`.
        data_dir: folder with datasets; None: `ROBENCH_DATA`.
        trust: run the code of a defense that is not one of robench's.
        redo: run the row's protocol on some of its images, which alone shows whether it had been run on them, or its
            audit. Costs as much as that many images of a run, and as the audit.

    Raises:
        UsageError: there is no such bundle, or something that the check needs is missing.
        DataError: a leaderboard cannot be read.
    """
    report, found = check_form(leaderboards, evidence)
    if found is None:
        return report
    bundle, row = found
    folder = bundle.folder
    judged = verify_evidence(folder, row=row, device=device, data_dir=data_dir, trust=trust)
    report.lines += judged.lines
    report.failures += judged.failures
    report.notes += judged.notes
    held = judged.shared <= MOST_SHARED
    told = f"the judge's noise is {judged.shared:.2g} of that of single answers, at most {MOST_SHARED:g}"
    report.check("answers are drawn for each image", held, told if held else f"{told}; {SHARED_ADVICE}")
    if redo is not None and redo.attack and report.holds:
        _attack_again(report, bundle, redo, device, data_dir)
    if redo is not None and redo.audit and report.holds:
        _audit_again(report, bundle, redo, device, data_dir)
    return report


def check_form(leaderboards: Path, evidence: str) -> tuple[Report, tuple[Bundle, Row] | None]:
    """Looks at a row and its files alone: nobody's code is run, nothing is judged. Takes a second.

    Returns:
        The report, and the bundle with its row, or None where something does not hold.

    Raises:
        UsageError: there is no such bundle, or its defense has a name that cannot be read.
        DataError: a leaderboard cannot be read.
    """
    folder = bundle_folder(leaderboards / EVIDENCE, evidence)
    report = Report(folder)
    try:
        bundle = read_bundle(folder)
        _check_draw(report, bundle)
    except DataError as error:
        report.check("the evidence can be read", held=False, detail=str(error))
        return report, None
    _check_name(report, bundle.spec)
    _check_texts(report, bundle)
    _check_audit(report, bundle)
    row = _check_form(report, bundle, leaderboards)
    return report, (bundle, row) if row is not None and report.holds else None


def _audit_again(report: Report, bundle: Bundle, redo: Redo, device: str, data_dir: Path | None) -> None:
    """Audits the row's defense on images drawn here: no check may fail that passes in the row."""
    spec, claimed = bundle.spec, bundle.audit
    if claimed is None:
        return
    seed = redo.draw_seed()
    defense = load_defense(spec.defense, spec.dataset, **spec.defense_options)
    found = audit(
        defense,
        ThreatModel(spec.norm, bundle.eps),
        spec.dataset,
        n=claimed["n"],
        seed=seed,
        eot=spec.eot if spec.randomized else None,
        device=device,
        data_dir=data_dir,
        progress=True,
    )
    effort = read_effort(found.facts)
    report.check("audited again with an effort it may have", may_have_effort(spec.defense, effort), str(effort))
    hidden = sorted(set(found.failed) - set(claimed["failed"]))
    said = f"{claimed['verdict']}, now {found.verdict}, seed {seed}"
    report.check("audited again, no other check fails", not hidden, f"{said}; {', '.join(hidden)}" if hidden else said)


def _attack_again(report: Report, bundle: Bundle, redo: Redo, device: str, data_dir: Path | None) -> None:
    """Runs the row's protocol on images drawn here: the row may not claim more than chance and `SLACK` above it."""
    spec = bundle.spec
    seed = redo.draw_seed()
    data = load_dataset(spec.dataset, "test", spec.n, spec.seed, data_dir)
    rows = sorted(random.Random(seed).sample(range(spec.n), min(redo.attack, spec.n)))
    x, y = data.x[rows], data.y[rows]
    drawn = dataclasses.replace(data, x=x, y=y, index=data.index[rows], digest=digest_data(x, y))
    defense = load_defense(spec.defense, spec.dataset, **spec.defense_options)
    found = evaluate(
        defense,
        spec.protocol,
        ThreatModel(spec.norm, bundle.eps),
        drawn,
        seed=seed,
        eot=spec.eot,
        judge_repeats=spec.judge_repeats,
        device=device,
        progress=True,
    ).answers(WORST)
    claimed, claim = bundle.figures.answers(WORST), "attacked again, the row claims no more"
    if found is None or claimed is None:
        report.check(claim, held=False, detail="an attack failed")
        return
    before, now = claimed.right[rows] / claimed.repeats, found.right / found.repeats
    held, power = _compare(before, now, randomized=spec.randomized)
    shares = f"{in_percent(before.mean()):.1f} %, now {in_percent(now.mean()):.1f} %"
    report.check(claim, held, f"on {len(rows)} images {shares}, seed {seed}; {power}")


def _compare(before: npt.NDArray[np.float64], now: npt.NDArray[np.float64], *, randomized: bool) -> tuple[bool, str]:
    """Whether chance and `SLACK` explain how far the row lies above a new attack, and what would have shown.

    Args:
        before: the row's share of right answers on each image.
        now: that under the new attack.
        randomized: whether answers are drawn; else the images that the new attack alone breaks are counted.
    """
    if randomized:
        gap, low, _ = paired_interval(now, before, level=0.998)
        return low <= SLACK, f"more than {100 * (SLACK + gap - low):.0f} points too much would show"
    broken, most = int((now < before).sum()), most_by_chance(len(now), SLACK)
    shown = f"{100 * smallest_shown(len(now), most):.0f} points too much show in nine of ten checks"
    return broken <= most, f"{broken} more are broken, of which chance explains {most}; {shown}"


def _check_name(report: Report, spec: RunSpec) -> None:
    """Refuses a defense whose name in the row hides what it is, and paths that lead out of the repository.

    Nobody else has what lies there.

    Raises:
        UsageError: the defense's name cannot be read.
    """
    name, options = parse_spec(spec.defense) if spec.defense else ("", {})
    borrowed = spec.defense_name in builtin_names("defense") and name != spec.defense_name
    report.check("the defense has a name of its own", not borrowed, f"{spec.defense_name} is {name}")
    hidden = sorted(set(spec.defense_options) - {"weights"})
    detail = f"not so: {', '.join(hidden)}; write NAME(option=value)" if hidden else "none is hidden"
    report.check("the defense's options stand in its name", not hidden, detail)
    paths = (name, str({**options, **spec.defense_options}.get("weights", "")), spec.dataset)
    outside = [path for path in paths if _leads_outside(path)]
    advice = (
        "weights are shipped as weights/<dataset>.safetensors beside the defense's module, or named from the "
        "repository's root in the defense's name: file.py:Class(weights='nets/w.safetensors')"
    )
    detail = f"not so: {', '.join(outside)}; {advice}" if outside else "no path leads elsewhere"
    report.check("defense, weights and data lie in the repository, if in files", not outside, detail)


def _check_texts(report: Report, bundle: Bundle) -> None:
    """Refuses names and texts of the audit with characters that a page cannot show, or that turn what it shows."""
    odd = [ascii(text) for text in find_forbidden([bundle.spec.to_json(), bundle.audit])]
    report.check("no text holds a control character", not odd, f"not so: {odd[0]}" if odd else "names and audit")


def _leads_outside(text: str) -> bool:
    path = PureWindowsPath(text)  # knows both slashes
    return bool(path.root) or ".." in path.parts or text.startswith("~")


def _check_draw(report: Report, bundle: Bundle) -> None:
    """Refuses images that could have been shopped for, among the draws of many seeds."""
    spec = bundle.spec
    is_whole = bundle.figures.indices.tolist() == list(range(spec.n))  # no draw of less can be counted on to be that
    report.check(
        "the images are the draw of seed 0, or the whole split", spec.seed == 0 or is_whole, f"seed {spec.seed}"
    )


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
    fault = find_misplaced(leaderboards).get((path, bundle.digest))
    report.check("the row's rank and evidence are its own", not fault, fault or name)
    alike = sum(identity(one) == identity(row) for one in rows)
    report.check("no other row is of this defense, protocol and weights", alike == 1, f"{alike - 1} others")
    known = ", ".join(PROTOCOLS)
    report.check(
        "the protocol is a published one", row["protocol"] in PROTOCOLS, f'"{row["protocol"]}"; known: {known}'
    )
    report.check("no number is missing", is_complete(row), "clean and robust accuracy, and that under each attack")
    report.check("there are enough images", bundle.spec.n >= FEWEST, f"{bundle.spec.n}, at least {FEWEST}")
    report.check("the day of the run is past", _is_past(bundle.created), bundle.created)
    report.check("the evidence is small", size(bundle.folder) <= LARGEST, f"{size(bundle.folder)} of {LARGEST} bytes")
    return row


def _check_audit(report: Report, bundle: Bundle) -> None:
    """Looks at what the audit says of itself; only making it again shows whether its findings are true."""
    spec, audit = bundle.spec, bundle.audit
    report.check("there is an audit", audit is not None, "robench audit makes it")
    if audit is None:
        return
    verdicts = Counter(finding["check"] for finding in audit["findings"])
    report.check("the audit made every check once", verdicts == Counter(list(QUESTIONS)), f"{len(verdicts)} checks")
    idle = find_idle(audit["findings"], randomized=spec.randomized)
    report.check("the audit ran every check that it can", not idle, f"not run: {', '.join(idle)}" if idle else "all")
    report.check("the audit is of these weights and this bound", audit_fits(audit, spec, bundle.eps), f"{bundle.eps:g}")
    effort = read_effort(audit)
    fitting = may_have_effort(spec.defense, effort)
    untold = "not told; robench ships the defense" if fitting else "not told: audit again"
    report.check("the audit is of an effort it may have", fitting, str(effort or untold))
    draws = audit.get("eot")
    enough = not spec.randomized or (isinstance(draws, int) and draws >= RANDOMIZED_EOT)
    report.check("the audit had enough draws", enough, f"{draws}, at least {RANDOMIZED_EOT if spec.randomized else 1}")
    report.check("the audit is of seed 0", audit.get("seed") == 0, f"seed {audit.get('seed')}")
    report.check(
        "the audit had enough images", audit["n"] >= FEWEST_AUDITED, f"{audit['n']}, at least {FEWEST_AUDITED}"
    )


def _is_past(day: str) -> bool:
    """Whether a day, as YYYY-MM-DD in any time zone, has begun."""
    try:
        told = date.fromisoformat(day)
    except ValueError:
        return False
    return day == told.isoformat() and told <= datetime.now(UTC).date() + timedelta(days=1)


def digest_of(text: str) -> str:
    """The digest in `text`: itself, or the name of a bundle's folder.

    Raises:
        UsageError: it is neither.
    """
    name = Path(text).name
    if len(name) != 16:
        raise UsageError(f'"{text}" is no digest of evidence and no folder of that name')
    return name
