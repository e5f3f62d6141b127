"""`robench verify`: judges saved adversarial images again under fresh randomness and checks the claim."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from robench.bundle import MANIFEST, read_bundle
from robench.data import Dataset
from robench.data_part import load_of_digest
from robench.defense import Defense, bears_digest, has_tensors, weights_digest
from robench.draws import IMAGES, note_draws
from robench.errors import DataError, PluginError, UsageError
from robench.estimate import Answers, Estimate
from robench.judge import check_bounds, judge_in_units
from robench.leaderboard import Row, board_name, find_changed, read_rows
from robench.lineup import find_departure, plan_attacks
from robench.plain import plain_tensors
from robench.plan import RunSpec
from robench.protocol import PROTOCOLS, find_protocol
from robench.publish import EVIDENCE, all_rows, find_misplaced
from robench.registry import is_shipped, load_defense
from robench.result import Evaluation
from robench.rng import seeded
from robench.settings import Settings
from robench.shares import in_percent
from robench.source import digest_source, find_edits
from robench.stats import INDEPENDENT, SharedNoise, answers_differ, majorities_differ, shared_noise
from robench.store import RESULT_FILE, ROW_FILE
from robench.threat import ThreatModel
from robench.unit_table import CLEAN, WORST
from robench.verify_data import check_count, draw_places, find_gap, is_shipped_split, tell_other_images


@dataclass
class Report:
    """What a verification found.

    Attributes:
        folder: the run.
        lines: one line per claim, in words.
        failures: the claims that do not hold; empty if all do.
        shared: the noise of an accuracy where images of a pass share draws, as a multiple of that of single independent
            ones; 0 of a deterministic defense.
        notes: what was not checked.
        seed: of the fresh answers, where one was given; None: those that everybody gets.
        images: on how many images, drawn by the seed, the answers are compared; None: on all.
    """

    folder: Path
    lines: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    shared: float = 0.0
    notes: list[str] = field(default_factory=list)
    seed: int | None = None
    images: int | None = None

    @property
    def holds(self) -> bool:
        """True if every claim held."""
        return not self.failures

    def check(self, claim: str, held: bool, detail: str) -> None:
        """Notes one claim."""
        self.lines.append(f"{'holds' if held else 'DOES NOT HOLD'}: {claim} ({detail})")
        if not held:
            self.failures.append(f"{claim} ({detail})")

    def to_json(self) -> dict[str, Any]:
        """As JSON types."""
        told = {"claims": self.lines, "failures": self.failures, "notes": self.notes}
        seed = {} if self.seed is None else {"seed": self.seed}
        return {"run": str(self.folder), "holds": self.holds, **seed, **told}

    def __str__(self) -> str:
        verdict = "holds" if self.holds else f"does not hold: {len(self.failures)} of {len(self.lines)} claims fail"
        notes = [f"not checked: {note}" for note in self.notes]
        seed = "" if self.seed is None else f", on answers of seed {self.seed}"
        return "\n".join([*self.lines, *notes, f"{self.folder}: {verdict}{seed}"])


def verify(
    path: Path,
    *,
    device: str = "auto",
    data_dir: Path | None = None,
    trust: bool = False,
    seed: int | None = None,
    images: int | None = None,
) -> Report:
    """Verifies a run folder, or an evidence bundle with its row; see `verify_run` and `verify_evidence`.

    The row is looked for on the leaderboards in whose folder `evidence` the bundle lies, wherever it stands there.

    Raises:
        UsageError: something that the check needs is missing; the message says what.
        DataError: the run folder or a leaderboard is damaged.
    """
    if not (path / MANIFEST).exists():
        return verify_run(path, device=device, data_dir=data_dir, seed=seed, images=images)
    place = path.resolve()
    leaderboards = place.parent.parent
    rows = all_rows(leaderboards) if place.parent.name == EVIDENCE else ()
    board, row = next(((file, row) for file, row in rows if row["evidence"] == place.name), (None, None))
    name = board.name if board else None
    report = verify_evidence(
        path, row=row, board=name, device=device, data_dir=data_dir, trust=trust, seed=seed, images=images
    )
    if board is None:
        report.notes.append(f"the row: no leaderboard beside {path} has one with this evidence")
    else:
        fault = find_misplaced(leaderboards).get((board, place.name))
        report.check("the row's rank and evidence are its own", not fault, fault or board.name)
    return report


def verify_run(
    folder: Path,
    *,
    device: str = "auto",
    data_dir: Path | None = None,
    seed: int | None = None,
    images: int | None = None,
) -> Report:
    """Re-judges a run: the figures it tells, digests, settings, its table, box and eps, clean and worst case anew.

    A deterministic defense must give the same answers; those of a randomized one must agree within the noise of two
    runs of the judge (`robench.stats.answers_differ`). That an attack was run, and at full strength, no judging of its
    images shows.

    Args:
        folder: the run.
        device: `auto`, `cpu` or `cuda`.
        data_dir: folder with datasets; None: `ROBENCH_DATA`.
        seed: draws the fresh answers; None draws those that everybody gets.
        images: compares the answers on so many images, drawn by the seed; bounds and table are checked of all.

    Raises:
        UsageError: the defense or the data cannot be had by name, or the images here are others and nothing else
            fails; fewer images than one are asked for.
        DataError: the run folder is damaged or incomplete.
    """
    result = Evaluation.load(folder)
    report = Report(folder, seed=seed, images=check_count(images))
    data = _load_data(result.spec, folder, data_dir)
    missing = _verify(report, result, data, device)
    _check_told(report, result)
    return _settle(report, missing)


def _check_told(report: Report, result: Evaluation) -> None:
    """Compares the figures told in result.json and row.csv, where they are there, with those of the run's table."""
    told_by = report.folder / RESULT_FILE, report.folder / ROW_FILE
    if not any(path.exists() for path in told_by):
        return
    made = json.loads(json.dumps(result.to_json()))
    made.pop("failures", None)  # words, no figures; they may have been told in others
    wrong: list[str] = []
    try:
        if told_by[0].exists():
            told = json.loads(told_by[0].read_text())
            wrong += [key for key in made if key in told and told[key] != made[key]]
        if told_by[1].exists() and [_filled(row) for row in read_rows(told_by[1])] != [_filled(made["row"])]:
            wrong.append(ROW_FILE)
    except (ValueError, TypeError, OSError, DataError) as error:
        wrong.append(str(error))
    claim = f"{RESULT_FILE} and {ROW_FILE} tell what the run's table holds"
    report.check(claim, not wrong, f"not so: {', '.join(wrong)}" if wrong else "every figure")


def _filled(row: Row) -> Row:
    return {key: cell for key, cell in row.items() if cell}


def verify_evidence(  # noqa: PLR0913 - the options of the command line
    folder: Path,
    *,
    row: Row | None = None,
    board: str | None = None,
    device: str = "auto",
    data_dir: Path | None = None,
    trust: bool = False,
    seed: int | None = None,
    images: int | None = None,
) -> Report:
    """Re-judges the bundle of a leaderboard row: its files, its row, and then as `verify_run` does.

    Args:
        folder: the bundle.
        row: the row as published; None checks the bundle alone.
        board: the name of the file that the row stands in; None does not ask.
        device: `auto`, `cpu` or `cuda`.
        data_dir: folder with datasets; None: `ROBENCH_DATA`.
        trust: run the defense's code also where it comes from a file or a package that is not robench's.
        seed: as in `verify_run`.
        images: likewise.

    Raises:
        UsageError: something that the check needs is missing, as where the images here are others; the message says
            what. Or fewer images than one are asked for.
    """
    report = Report(folder, seed=seed, images=check_count(images))
    try:
        bundle = read_bundle(folder)
        published = bundle.row()
    except DataError as error:
        report.check("files are those that were published", held=False, detail=str(error))
        return report
    report.check("files are those that were published", held=True, detail=f"digest {bundle.digest}")
    if row is not None:
        changed = [
            f"{key} {row.get(key, '')!r}, not {published.get(key, '')!r}" for key in find_changed(row, published)
        ]
        report.check("row is that of the evidence", not changed, ", ".join(changed) or f"{len(published)} cells")
    if board is not None:
        own = board_name(bundle.spec.dataset, bundle.spec.norm, bundle.eps)
        report.check("the row is on the board of its threat model", board == own, own)
    name = bundle.spec.defense
    if not trust and name and not is_shipped(name):
        raise UsageError(
            f'{folder} cannot be checked: defense "{name}" is not one of robench\'s. --trust runs its code'
        )
    data = _load_data(bundle.spec, folder, data_dir)
    if data.digest == bundle.spec.data_digest:  # else _verify says so: stored images are differences from the originals
        try:
            result = bundle.result(data.x)
        except (ValueError, KeyError, TypeError, DataError) as error:
            report.check("images can be read", held=False, detail=str(error))
            return report
        told = ", ".join(f"{count} as {name}" for name, count in bundle.encodings.items())
        report.check("images are stored as the manifest says", bundle.is_told_right, told or "none")
    else:
        result = bundle.figures
    return _settle(report, _verify(report, result, data, device))


def _settle(report: Report, missing: str) -> Report:
    """The report, unless nothing in it fails and something is missing that the rest needs.

    Raises:
        UsageError: that is so.
    """
    if missing and not report.failures:
        raise UsageError(f"{report.folder} cannot be checked: {missing}")
    if missing:
        report.notes.append(f"images and answers: {missing}")
    return report


def _load_data(spec: RunSpec, folder: Path, data_dir: Path | None) -> Dataset:
    if not spec.defense or not spec.dataset:
        raise UsageError(f"{folder} cannot be checked: it names no defense or no dataset to load")
    try:
        return load_of_digest(spec.data_digest, spec.dataset, spec.n, spec.seed, data_dir)
    except UsageError as error:
        raise UsageError(f"{folder} cannot be checked: {error}") from None


def _load_defense(spec: RunSpec, folder: Path) -> Defense:
    try:
        return load_defense(spec.defense, spec.dataset, **spec.defense_options)
    except (UsageError, PluginError) as error:
        raise UsageError(f"{folder} cannot be checked: {error}") from None


def _check_defense(report: Report, result: Evaluation, defense: Defense) -> None:
    """What shows without images, and without asking the defense: its weights, its name and kind, the protocol."""
    spec = result.spec
    _check_weights(report, spec, defense)
    told = "randomized" if spec.randomized else "deterministic"
    alike = (spec.defense_name, spec.randomized) == (defense.name, defense.randomized)
    report.check("the defense is what the run calls it", alike, f"{spec.defense_name}, {told}")
    if spec.protocol:
        departure = _departure(spec, defense)
        report.check(f"the run is that of {spec.protocol}", not departure, departure or "attacks and settings")
    changed = ", ".join(find_edits(result.source, digest_source(defense, spec.defense)))
    if changed:
        report.notes.append(f"the code of the defense: {changed} changed since the run; the answers below tell")


def _check_data(report: Report, result: Evaluation, data: Dataset, defense: Defense) -> str:
    """Compares images, labels and table with the data; returns what is missing to do so, empty where nothing is."""
    spec, clean = result.spec, result.answers(CLEAN)
    same = data.digest == spec.data_digest
    if not same and not is_shipped_split(spec.dataset):
        return tell_other_images(result, data)
    detail = f"digest {data.digest[:16]}"
    report.check("images are those of the run", same, detail if same else f"robench ships this split; its {detail}")
    if not same:
        return ""  # labels and table are of images that nobody has
    if clean is not None:
        wrong = int((clean.labels != data.y.numpy()).sum()) if len(clean.labels) == len(data.y) else len(data.y)
        report.check("labels are those of the data", wrong == 0, f"{wrong} of {len(data.y)} differ")
    problem = find_gap(result, data, defense)
    report.check("every image has its answers, clean and under each attack", not problem, problem or f"{spec.n} images")
    return ""


def _check_weights(report: Report, spec: RunSpec, defense: Defense) -> None:
    """Compares the digests of the weights, and notes what it cannot tell."""
    digest, same = weights_digest(defense), bears_digest(defense, spec.weights_digest)
    if same and not has_tensors(defense):
        report.notes.append("the weights: the defense has none that robench can see, so there is nothing to compare")
        return
    report.check("weights are those of the run", same, f"digest {(spec.weights_digest if same else digest)[:16]}")
    if same and digest != spec.weights_digest:
        paths = ", ".join(path for path, _ in plain_tensors(defense))
        report.notes.append(f"tensors outside the state_dict ({paths}): the digest of an earlier run lacks them")


def _verify(report: Report, result: Evaluation, data: Dataset, device: str) -> str:
    """Judges a run again; returns what is missing to do so, empty where nothing is."""
    spec = result.spec
    device = Settings(device=device).resolve_device()
    defense = _load_defense(spec, report.folder)
    _check_defense(report, result, defense)
    missing = _check_data(report, result, data, defense)
    if missing or report.failures:
        return missing
    note_draws(defense.to(device), data.x[:IMAGES].to(device))
    places = draw_places(len(data.y), report.images, report.seed or 0)
    y, left_out, of = data.y[places], len(data.y) - len(places), ""
    if left_out:
        of = f", of {len(places)} images that the seed draws"
        report.notes.append(f"the answers on the other {left_out} of {len(data.y)} images")

    def fresh(x: torch.Tensor) -> tuple[Answers, SharedNoise]:
        """Fresh answers, and what the images of a pass share."""
        passes: list[torch.Tensor] = []
        repeats, size = spec.judge_repeats, spec.unit_size
        votes = judge_in_units(defense, x.to(device), repeats, size, on_answers=passes.append)
        units = zip(range(0, len(passes), repeats), y.split(size), strict=True)
        right = [(torch.stack(passes[start : start + repeats]) == labels).numpy() for start, labels in units]
        return Answers(votes.numpy(), y.numpy()), shared_noise(right)

    stream = ("verify",) if report.seed is None else ("verify", report.seed)
    with seeded(spec.seed, *stream, device=device):
        claims = [("clean accuracy", result.answers(CLEAN), data.x)]
        for eps in spec.eps:
            claim, stored = f"robust accuracy at eps {eps:g}", result.answers(WORST, eps)
            if stored is not None and result.failed_at(eps):
                claim = f"what the attacks that did not fail left at eps {eps:g}, no robust accuracy"
            claims.append((claim, stored, data.x))
            if stored is None:
                continue
            x_adv = torch.from_numpy(result.images(WORST, eps))
            bounds = check_bounds(data.x, x_adv, ThreatModel(spec.norm, eps))
            rule = bounds.broken_rule()
            report.check(f"images at eps {eps:g} are within the bounds", rule is None, rule or f"{len(x_adv)} images")
            claims[-1] = (claim, stored, x_adv)
            if rule is not None:
                claims.pop()  # no answer on such images is a claim about this threat model, and NaN has none
        for claim, stored, x in claims:
            if stored is None:
                report.check(claim, held=False, detail="an attack failed, so there is no claim")
                continue
            known = Answers(stored.votes[places], stored.labels[places])
            _compare(report, f"{claim}{of}", known, *fresh(x[places]), randomized=defense.randomized)
    return ""


def _departure(spec: RunSpec, defense: Defense) -> str:
    """In what a run differs from the protocol whose name it bears; empty if in nothing that could weaken it."""
    protocol = find_protocol(spec.protocol)
    if protocol is None or protocol.name != spec.protocol:
        return f"there is no such protocol; there are: {', '.join(PROTOCOLS)}"
    entries, _ = plan_attacks(protocol.name, defense, spec.norm, spec.dataset)
    if list(spec.attacks) != entries:
        return f"the attacks are {', '.join(entry.key for entry in spec.attacks)}"
    return find_departure(replace(spec, randomized=defense.randomized), protocol)


def _compare(
    report: Report, claim: str, stored: Answers, fresh: Answers, noise: SharedNoise, *, randomized: bool
) -> None:
    old, new = stored.accuracy(), fresh.accuracy()
    if not randomized:
        changed = int((stored.right != fresh.right).sum())
        report.check(claim, changed == 0, f"stored {_text(old)}, now {_text(new)}, {changed} answers differ")
        return
    differ = answers_differ(stored.right, fresh.right, stored.repeats, fresh.repeats, noise=noise)
    shared = "" if noise == INDEPENDENT else f"; the images of a pass share draws: {noise.total:.1f} times the noise"
    report.check(claim, not differ, f"stored {_text(old)}, now {_text(new)}{shared}")
    report.shared = max(report.shared, noise.total / fresh.repeats)
    differ = majorities_differ(stored.votes, fresh.votes, stored.labels, noise=noise)
    majorities = f"stored {_text(stored.majority())}, now {_text(fresh.majority())}"
    report.check(f"majority vote, {claim}", not differ, f"{majorities}{shared}")


def _text(estimate: Estimate) -> str:
    return f"{in_percent(estimate.value):.2f} % [{in_percent(estimate.low):.1f}, {in_percent(estimate.high):.1f}]"
