"""Evidence bundles: what is published with a row can be read, judged again, and not be changed unnoticed."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from board_toys import EPS, TOY, N, forge, write_audit
from engine_toys import Prototypes
from hypothesis import given, settings
from hypothesis import strategies as st

from robench import Defense, ThreatModel, pixels
from robench.bundle import AUDIT, EXAMPLES, IMAGES, MANIFEST, read_bundle, size
from robench.data import load_dataset
from robench.errors import DataError, RobenchError, UsageError
from robench.evaluate import evaluate
from robench.leaderboard import read_rows, rows_csv
from robench.publish import EVIDENCE, all_rows, publish, verify_boards
from robench.result import Evaluation
from robench.types import Images
from robench.unit_table import CLEAN, WORST
from robench.verify import verify, verify_evidence

HERE = Path(__file__)


def run(folder: Path, defense: str = TOY, attack: str = "fgsm,pgd(steps=3)", **settings: Any) -> Evaluation:
    from robench.registry import load_defense

    threat = ThreatModel(settings.pop("norm", "linf"), settings.pop("eps", EPS))
    return evaluate(
        load_defense(defense), attack, threat, "fashion_mnist", n=N, out=folder, defense_spec=defense, **settings
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    run(folder / "run")
    write_audit(folder / "audit")
    return folder


@pytest.fixture
def boards(finished: Path, tmp_path: Path) -> Path:
    publish([finished / "run", finished / "audit"], tmp_path / "boards")
    return tmp_path / "boards"


def bundle_of(boards: Path) -> Path:
    (found,) = (boards / EVIDENCE).iterdir()
    return found


def outcomes(boards: Path) -> list[tuple[str, str]]:
    found = verify_boards(boards, all_rows(boards), device="cpu", data_dir=None, trust=True)
    return [(verdict, why) for _, _, verdict, why in found]


# publishing


def test_a_published_row_holds(boards: Path) -> None:
    (path,) = boards.glob("*.csv")
    (row,) = read_rows(path)
    assert (row["rank"], row["audit_verdict"], row["audit_failed_checks"]) == ("1", "pass", "")
    assert row["evidence"] == bundle_of(boards).name
    assert {one.name for one in bundle_of(boards).iterdir()} == {MANIFEST, EXAMPLES, IMAGES, AUDIT}
    assert outcomes(boards) == [("holds", "")]
    report = verify(bundle_of(boards), device="cpu", trust=True)
    assert report.holds
    assert len(report.lines) == 13  # ten of the bundle, three of its row
    assert not report.notes


def test_a_changed_rank_does_not_hold(boards: Path) -> None:
    (path,) = boards.glob("*.csv")
    head, row = path.read_text().splitlines()
    path.write_text(f"{head}\n2{row.removeprefix('1')}\n")
    assert outcomes(boards) == [("does not hold", "its rank is 2; by its figures 1")]


def test_publishing_twice_changes_no_byte(finished: Path, boards: Path) -> None:
    before = {path: path.read_bytes() for path in boards.rglob("*") if path.is_file()}
    publish([finished / "audit", finished / "run"], boards)
    assert {path: path.read_bytes() for path in boards.rglob("*") if path.is_file()} == before


def test_a_row_that_is_replaced_takes_its_evidence_with_it(boards: Path, tmp_path: Path) -> None:
    run(tmp_path / "other", seed=3)
    before = bundle_of(boards)
    publish([tmp_path / "other"], boards, replace=True)  # another seed, and no audit
    assert bundle_of(boards) != before
    assert outcomes(boards) == [("holds", "")]


def test_the_row_is_the_run_s(finished: Path, boards: Path) -> None:
    row = Evaluation.load(finished / "run").row()
    (published,) = (row for _, row in all_rows(boards))
    differing = {key for key in row if row[key] != published[key]}
    assert differing == {"rank", "audit_verdict", "evidence"}


def test_each_bound_has_its_bundle(tmp_path: Path) -> None:
    from robench.registry import load_defense

    threats = [ThreatModel("linf", eps) for eps in (0.01, EPS)]
    attacks = "fgsm,noise(tries=2),pgd(steps=3)"
    evaluate(load_defense(TOY), attacks, threats, "fashion_mnist", n=N, out=tmp_path / "run", defense_spec=TOY)
    written = publish([tmp_path / "run"], tmp_path / "boards")
    assert [path.name for path in written] == ["fashion_mnist-linf-0.01.csv", "fashion_mnist-linf-0.03.csv"]
    assert outcomes(tmp_path / "boards") == [("holds", ""), ("holds", "")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights_digest": "0"}, "fits no run that was named"),
        ({"eps": 0.5}, "fits no run that was named"),
        ({"findings": [], "verdict": "suspect", "failed": []}, "lacks the check null_control"),
        ({"verdict": "masked"}, "its verdict is not that of its findings"),
        ({"failed": ["square"]}, "its verdict is not that of its findings"),
        ({"verdict": None}, "verdict is of the wrong kind"),
        ({"findings": [{"check": "pgd"}]}, "cannot be read"),
        ({"findings": 3}, "cannot be read|wrong kind"),
        ({"failed": "all"}, "failed is of the wrong kind"),
        ({"paper": "\ud800"}, "audit.json cannot be read .*surrogates not allowed"),  # no page could be written
    ],
)
def test_an_audit_that_does_not_fit_is_refused(
    change: dict[str, Any], message: str, finished: Path, tmp_path: Path
) -> None:
    content = json.loads((finished / "audit" / "audit.json").read_text())
    (tmp_path / "audit.json").write_text(json.dumps({**content, **change}))
    with pytest.raises((UsageError, DataError), match=message):
        publish([finished / "run", tmp_path], tmp_path / "boards")


def test_what_is_neither_run_nor_audit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not a run folder, nor one of an audit"):
        publish([tmp_path], tmp_path / "boards")
    (tmp_path / "audit-partial.json").write_text("{}")
    with pytest.raises(UsageError, match=r"audit-partial.json is of some checks, and a row needs all$"):
        publish([tmp_path], tmp_path / "boards")
    (tmp_path / "audit.json").write_text("{")
    with pytest.raises(DataError, match="Run the audit again"):
        publish([tmp_path], tmp_path / "boards")


def test_a_run_whose_attack_failed_is_published_without_images(tmp_path: Path) -> None:
    bad = f"{HERE.with_name('engine_toys.py')}:Bad"
    run(tmp_path / "some", attack=f"fgsm,{bad}")
    publish([tmp_path / "some"], tmp_path / "some boards")
    ((_, row),) = all_rows(tmp_path / "some boards")
    assert (row["rank"], row["robust_acc"]) == ("", "")
    assert outcomes(tmp_path / "some boards") == [("holds", "")]  # what the other attack left
    run(tmp_path / "run", attack=bad)
    publish([tmp_path / "run"], tmp_path / "boards")
    ((verdict, why),) = outcomes(tmp_path / "boards")
    assert verdict == "does not hold"
    assert "an attack failed" in why


# what was changed is found


@pytest.mark.parametrize("name", [MANIFEST, EXAMPLES, IMAGES, AUDIT])
@pytest.mark.parametrize("seed", range(5))
def test_one_bit_in_any_file_is_found(name: str, seed: int, boards: Path) -> None:
    path = bundle_of(boards) / name
    content = bytearray(path.read_bytes())
    place = random.Random(seed).randrange(8 * len(content))
    content[place // 8] ^= 1 << place % 8
    path.write_bytes(content)
    ((verdict, why),) = outcomes(boards)
    assert verdict == "does not hold"
    assert name in why


@pytest.mark.parametrize("name", [MANIFEST, EXAMPLES, IMAGES, AUDIT])
def test_a_missing_file_is_named(name: str, boards: Path) -> None:
    (bundle_of(boards) / name).unlink()
    ((verdict, why),) = outcomes(boards)
    assert verdict == "cannot be checked"
    assert name in why


def test_every_cell_of_the_row_is_checked(boards: Path) -> None:
    ((path, row),) = all_rows(boards)
    for key in row.keys() - {"rank", "evidence"}:
        changed = {**row, key: f"{row[key]}1"}
        if not changed[key].replace(".", "").isdigit() and key.endswith(("_low", "_high", "_acc")):
            continue
        report = verify_evidence(boards / EVIDENCE / row["evidence"], row=changed, device="cpu", trust=True)
        assert not report.holds, key
        assert any(key in failure for failure in report.failures), report.failures
    invented = verify_evidence(
        boards / EVIDENCE / row["evidence"], row={**row, "autoattack": "0.9120"}, device="cpu", trust=True
    )
    assert invented.failures == ["row is that of the evidence (autoattack '0.9120', not '')"]
    path.write_text(rows_csv([{**row, "evidence": "0" * 16}]))
    assert outcomes(boards)[0][0] == "cannot be checked"


def change_a_figure(path: Path, row: dict[str, str]) -> None:
    path.write_text(rows_csv([{**row, "robust_acc": "0.9999"}]))


def change_the_rank(path: Path, row: dict[str, str]) -> None:
    path.write_text(rows_csv([{**row, "rank": "3"}]))


def move_to_another_board(path: Path, row: dict[str, str]) -> None:
    path.rename(path.with_name("fashion_mnist-linf-0.01.csv"))


def add_it_again(path: Path, row: dict[str, str]) -> None:
    path.write_text(rows_csv([row, {**row, "defense": "twin"}]))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (change_a_figure, "row is that of the evidence (robust_acc '0.9999', not "),
        (change_the_rank, "the row's rank and evidence are its own (its rank is 3; by its figures 1)"),
        (move_to_another_board, "the row is on the board of its threat model (fashion_mnist-linf-0.03.csv)"),
        (add_it_again, "the row's rank and evidence are its own (2 rows have this evidence)"),
    ],
)
def test_to_verify_a_bundle_is_to_verify_its_row(change: Any, told: str, boards: Path) -> None:
    ((path, row),) = all_rows(boards)
    change(path, row)
    (failure,) = verify(bundle_of(boards), device="cpu", trust=True).failures
    assert failure.startswith(told)
    assert outcomes(boards)[0][0] == "does not hold"  # as `leaderboard verify` says


def test_a_bundle_without_its_row_is_judged_and_the_report_says_so(boards: Path, tmp_path: Path) -> None:
    ((path, row),) = all_rows(boards)
    path.write_text(rows_csv([{**row, "evidence": "0" * 16}]))
    for folder in (bundle_of(boards), shutil.copytree(bundle_of(boards), tmp_path / bundle_of(boards).name)):
        report = verify(folder, device="cpu", trust=True)
        assert (report.holds, len(report.lines)) == (True, 10)
        note = f"the row: no leaderboard beside {folder} has one with this evidence"
        assert report.to_json()["notes"] == [note]
        assert f"\nnot checked: {note}\n" in str(report)


def claim_more(manifest: Any, examples: Any, images: Any) -> None:
    """Every answer counts as right, under each attack and at worst."""
    for row, attack in enumerate(examples["attack"]):
        if attack != CLEAN:
            examples["votes"][row] = [int(k == examples["label"][row]) for k in range(10)]


def claim_more_at_worst(manifest: Any, examples: Any, images: Any) -> None:
    """Every worst case counts as right, though the attack's own rows say otherwise."""
    for row, attack in enumerate(examples["attack"]):
        if attack == WORST:
            examples["votes"][row] = [int(k == examples["label"][row]) for k in range(10)]


def credit_another(manifest: Any, examples: Any, images: Any) -> None:
    """Every attack leaves every image right, and each worst case, which stays as it is, is said to be of another."""
    others = {"fgsm": "pgd(steps=3)", "pgd(steps=3)": "fgsm"}
    for row, attack in enumerate(examples["attack"]):
        if attack in others:
            examples["votes"][row] = [int(k == examples["label"][row]) for k in range(10)]
        elif attack == WORST:
            examples["chosen"][row] = others[examples["chosen"][row]]


def credit_nobody(manifest: Any, examples: Any, images: Any) -> None:
    """The worst cases are of themselves, and of no attack."""
    examples["chosen"] = [WORST * bool(chosen) for chosen in examples["chosen"]]


def many_votes(manifest: Any, examples: Any, images: Any) -> None:
    """A deterministic defense that is told to be randomized, with votes that no judge gave: noise hides the claim."""
    manifest["spec"]["randomized"], manifest["spec"]["judge_repeats"] = True, 100
    examples["votes"] = [[95 * int(k == label) + 5 * int(k == 0) for k in range(10)] for label in examples["label"]]


def huge_votes(manifest: Any, examples: Any, images: Any) -> None:
    """Votes of which some are negative and some enormous, with the right sum."""
    examples["votes"][-1] = [10**7, 1 - 10**7, *[0] * 8]


def famous_name(manifest: Any, examples: Any, images: Any) -> None:
    """The name of another defense."""
    manifest["spec"]["defense_name"] = "convnet_at"


def famous_protocol(manifest: Any, examples: Any, images: Any) -> None:
    """The name of a protocol whose attacks were not run."""
    manifest["spec"]["protocol"] = "standard-1"


def other_places(manifest: Any, examples: Any, images: Any) -> None:
    """Other positions in the split, so that rows are paired with those of other images."""
    examples["index"] = [index + 17 for index in examples["index"]]
    images["index"] = [index + 17 for index in images["index"]]


def drop_attack(manifest: Any, examples: Any, images: Any) -> None:
    """No row of the attack that was run."""
    kept = [row for row, attack in enumerate(examples["attack"]) if attack in (CLEAN, WORST)]
    for name, column in examples.items():
        examples[name] = [column[row] for row in kept]


def other_encodings(manifest: Any, examples: Any, images: Any) -> None:
    """Images that are said to be stored in another way than they are."""
    manifest["encodings"] = {"float64": 9}


def move_image(manifest: Any, examples: Any, images: Any) -> None:
    """A pixel out of the bound."""
    encoding, blob = images["encoding"][0], bytearray(images["pixels"][0])
    assert encoding == "steps"
    blob[0] ^= 128
    images["pixels"][0] = bytes(blob)


def swap_label(manifest: Any, examples: Any, images: Any) -> None:
    """Another label for the first image, everywhere."""
    for row, index in enumerate(examples["index"]):
        if index == images["index"][0]:
            examples["label"][row] = (examples["label"][row] + 1) % 10


def widen(manifest: Any, examples: Any, images: Any) -> None:
    """A smaller bound than that of the images."""
    manifest["eps"] = EPS / 2
    manifest["spec"]["eps"] = [EPS / 2]
    examples["eps"] = [EPS / 2 if eps else 0.0 for eps in examples["eps"]]


def other_weights(manifest: Any, examples: Any, images: Any) -> None:
    """The weights of another defense."""
    manifest["spec"]["weights_digest"] = "0" * 64


def drop_column(manifest: Any, examples: Any, images: Any) -> None:
    """Answers that are no lists of votes."""
    examples["votes"] = [[] for _ in examples["votes"]]


def short_image(manifest: Any, examples: Any, images: Any) -> None:
    """An image that is cut off."""
    images["pixels"][0] = images["pixels"][0][:-1]


@pytest.mark.parametrize(
    ("change", "claim"),
    [
        (claim_more, "robust accuracy"),
        (claim_more_at_worst, "the worst case at eps"),
        (credit_another, "has other answers than"),
        (credit_nobody, "is of no attack of the run"),
        (many_votes, "the defense is what the run calls it"),
        (huge_votes, "no counts over 10 classes"),
        (famous_name, "the defense is what the run calls it"),
        (famous_protocol, "the run is that of standard-1"),
        (other_places, "the images or labels"),
        (drop_attack, "images can be read"),
        (other_encodings, "images are stored as the manifest says"),
        (move_image, "within the bounds"),
        (swap_label, "labels"),
        (widen, "within the bounds"),
        (other_weights, "weights"),
        (short_image, "images can be read"),
        (drop_column, "files are those that were published"),
    ],
)
def test_a_forger_who_mends_the_digests_is_found_by_judging(change: Any, claim: str, boards: Path) -> None:
    report = verify_evidence(forge(bundle_of(boards), change), device="cpu", trust=True)
    assert not report.holds
    assert any(claim in failure for failure in report.failures), report.failures


def test_code_of_others_is_not_run_unasked(boards: Path) -> None:
    with pytest.raises(UsageError, match="--trust"):
        verify_evidence(bundle_of(boards), device="cpu")


def test_a_manifest_that_does_not_fit_is_refused(boards: Path) -> None:
    def drop(key: str) -> Any:
        return lambda manifest, examples, images: manifest.pop(key)

    for key in ("spec", "eps", "encodings"):
        copy = shutil.copytree(bundle_of(boards), boards / "copy")
        with pytest.raises(DataError, match=MANIFEST):
            read_bundle(forge(copy, drop(key)))
    with pytest.raises(RobenchError, match="is missing"):
        read_bundle(boards / "nowhere")


# encodings


def test_images_take_a_byte_a_pixel_where_no_answer_changes(boards: Path) -> None:
    bundle = read_bundle(bundle_of(boards))
    assert sum(bundle.encodings.values()) == N
    assert bundle.encodings["steps"] > N / 2
    assert size(bundle.folder) < 40_000


@pytest.mark.parametrize(("norm", "eps"), [("l2", 0.5), ("l1", 5.0), ("l0", 9.0)])
def test_other_norms(norm: str, eps: float, tmp_path: Path) -> None:
    run(tmp_path / "run", attack="noise(tries=5)", norm=norm, eps=eps)
    publish([tmp_path / "run"], tmp_path / "boards")
    assert outcomes(tmp_path / "boards") == [("holds", "")]


def test_a_randomized_defense(tmp_path: Path) -> None:
    run(tmp_path / "run", f"{HERE}:Jitter", "noise(tries=3)", judge_repeats=5)
    publish([tmp_path / "run"], tmp_path / "boards")
    assert outcomes(tmp_path / "boards") == [("holds", "")]


@given(seed=st.integers(0, 10_000), norm=st.sampled_from(["linf", "l2"]), eps=st.floats(0.01, 1.0))
@settings(max_examples=40)
def test_rounded_images_stay_within_the_bound(seed: int, norm: str, eps: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 256, (3, 1, 6, 6), generator=generator) / 255
    threat = ThreatModel(norm, eps if norm == "linf" else 4 * eps)
    moved = x + 2 * (torch.rand(x.shape, generator=generator) - 0.5) * (1 if norm == "linf" else 3)
    x_adv = threat.project(x, moved)
    half = pixels._round("float16", x, x_adv, threat)
    assert bool(threat.contains(x, half).all())
    assert float((half - x_adv).abs().max()) < 1e-3
    steps = pixels._round("uint8", x, x_adv, threat)
    if norm == "linf":
        assert bool(threat.contains(x, steps).all())
        assert float((steps - x_adv).abs().max()) <= 1 / 255 + 1e-6


@given(seed=st.integers(0, 10_000), norm=st.sampled_from(["linf", "l2"]), on_grid=st.booleans())
@settings(max_examples=40)
def test_images_come_back_as_they_were_rounded(seed: int, norm: str, on_grid: bool) -> None:
    """Bit for bit; as differences only where the originals are whole steps of 1/255, which wrap around at 0 and 255."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 256, (4, 3, 5, 5), generator=generator) / 255
    x[0], x[1] = 0, 1
    if not on_grid:
        x[2, 0, 0, 0] = 0.123
    threat = ThreatModel(norm, 1.0 if norm == "linf" else 8.0)
    x_adv = threat.project(x, torch.rand(x.shape, generator=generator))
    kinds = [pixels.STEPS if on_grid else "uint8", "float16", "float32"]
    for kind in kinds:
        blobs = [pixels._bytes(kind, x[row], x_adv[row], threat) for row in range(len(x))]
        table = pa.table({"encoding": [kind] * len(x), "pixels": blobs})
        expected = (
            x_adv if kind == "float32" else pixels._round("uint8" if kind == pixels.STEPS else kind, x, x_adv, threat)
        )
        assert torch.equal(pixels.decode(table, x, (3, 5, 5)), expected)


class Jitter(Prototypes):
    """Noise on the logits."""

    name = "jitter"
    randomized = True

    def forward(self, x: Images) -> torch.Tensor:
        logits = super().forward(x)
        return logits + 0.2 * torch.randn_like(logits)


class Brittle(Prototypes):
    """Its answer turns on the last bits of a pixel: no rounding is harmless."""

    def forward(self, x: Images) -> torch.Tensor:
        odd = ((x.flatten(1)[:, :50] * 2**20).long() % 2).sum(1) % 2
        return super().forward(x).roll(1, 1) * odd[:, None] + super().forward(x) * (1 - odd[:, None])


class Recovering(Prototypes):
    """Often wrong, at random, but on images in whole steps of 1/255: rounding gives back what the attack took."""

    name = "recovering"
    randomized = True

    def forward(self, x: Images) -> torch.Tensor:
        logits = super().forward(x)
        off = (255 * x - (255 * x).round()).abs().flatten(1).amax(1) > 0.02
        wrong = off & (torch.rand(len(x), device=x.device) < 0.008)
        return torch.where(wrong[:, None], logits.roll(1, 1), logits)


def test_rounding_that_helps_a_randomized_defense_is_seen() -> None:
    """By under a point, as much as two runs of the judge may differ by on so few images; on the same draws it shows."""
    defense: Defense = Recovering()
    result = evaluate(defense, "noise(tries=2)", ThreatModel("linf", 0.02), "fashion_mnist", n=N, judge_repeats=20)
    x = load_dataset("fashion_mnist", "test", N, 0).x
    _, encodings = pixels.encode(result, 0.02, x, defense)
    assert set(encodings) <= {"float16", "float32"}


class Placed(Prototypes):
    """Notes where it is asked."""

    name = "placed"

    def __init__(self) -> None:
        super().__init__()
        self.asked_on: set[str] = set()

    def forward(self, x: Images) -> torch.Tensor:
        self.asked_on.add(x.device.type)
        return super().forward(x)


@pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"))],
)
def test_what_is_rounded_is_judged_on_the_device_that_is_asked_for(device: str) -> None:
    result = evaluate(Placed(), "pgd(steps=1)", ThreatModel("linf", EPS), "fashion_mnist", n=8, device="cpu")
    defense = Placed()
    _, encodings = pixels.encode(result, EPS, load_dataset("fashion_mnist", "test", 8, 0).x, defense, device)
    assert defense.asked_on == {device}
    assert sum(encodings.values()) == 8


def test_an_unknown_device_is_refused_before_anything_is_written(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="device must be auto, cpu or cuda"):
        publish([finished / "run"], tmp_path / "boards", device="tpu")
    assert not (tmp_path / "boards").exists()


def test_an_image_whose_answer_would_change_is_kept_as_it_is() -> None:
    defense: Defense = Brittle()
    result = evaluate(defense, "pgd(steps=3)", ThreatModel("linf", EPS), "fashion_mnist", n=N)
    x = load_dataset("fashion_mnist", "test", N, 0).x
    table, encodings = pixels.encode(result, EPS, x, defense)
    assert encodings["float32"] > 0
    assert "uint8" not in encodings  # Fashion-MNIST is in steps of 1/255: differences are shorter
    again = pixels.decode(table, x, (1, 28, 28))
    with torch.no_grad():
        votes = torch.nn.functional.one_hot(defense(again).argmax(1), 10).numpy()
    stored = result.answers(WORST)
    assert stored is not None
    assert np.array_equal(votes, stored.votes)
