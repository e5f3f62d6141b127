"""`robench compare`: two runs image by image, on the images that both have, and what does not compare."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import engine_toys
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
from engine_toys import Bad, Linear, Noisy, Prototypes, grid_images
from scipy.stats import ttest_rel

from robench.cli import main
from robench.errors import UsageError
from robench.estimate import Answers
from robench.evaluate import evaluate
from robench.paired import Comparison, Difference, compare_answers, compare_places, compare_runs, shared_answers
from robench.publish import publish
from robench.report.paired import comparison_table
from robench.result import Evaluation
from robench.threat import ThreatModel
from robench.unit_table import CLEAN, WORST

TOY = f"{engine_toys.__file__}:Prototypes"
BOUNDS = [ThreatModel("linf", eps) for eps in (0.02, 0.05)]


def run(attack: Any = "fgsm", threat: Any = BOUNDS, n: int = 40, **settings: Any) -> Evaluation:
    return evaluate(Prototypes(), attack, threat, "fashion_mnist", n=n, **settings)


def as_answers(right: npt.ArrayLike, repeats: int = 1) -> Answers:
    """Answers of two classes of which so many are right, of each image."""
    counts = np.array(right)
    return Answers(np.stack([repeats - counts, counts], 1), np.ones(len(counts), dtype=np.int64))


def call(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["robench", "compare", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0)


def find(comparison: Comparison, what: str, eps: float) -> Difference:
    (one,) = (one for one in comparison.differences if (one.what, one.eps) == (what, eps))
    return one


# the test


@pytest.mark.parametrize("turned", [False, True])
def test_answers_are_compared_by_mcnemars_exact_test_of_two_sides(turned: bool) -> None:
    """Eight images of 20 differ, seven one way: twice P(at least 7 of 8) is 18 / 256."""
    more = [1] * 7 + [0] + [1] * 12
    less = [0] * 7 + [1] + [1] * 12
    gap = compare_answers(*map(as_answers, (less, more) if turned else (more, less)))
    assert gap.mean == pytest.approx(-0.3 if turned else 0.3)
    assert gap.p == pytest.approx(18 / 256)
    assert gap.low < gap.mean < gap.high


@pytest.mark.parametrize("turned", [False, True])
def test_shares_of_a_randomized_defense_are_compared_by_students_paired_test(turned: bool) -> None:
    generator = np.random.Generator(np.random.PCG64(1))
    both = [generator.integers(0, most, 30) for most in (11, 9)]
    first, second = reversed(both) if turned else both
    gap, test = compare_answers(as_answers(first, 10), as_answers(second, 10)), ttest_rel(first / 10, second / 10)
    interval = test.confidence_interval()
    assert (gap.p, gap.mean) == pytest.approx((test.pvalue, (first - second).mean() / 10))
    assert (gap.low, gap.high) == pytest.approx((interval.low, interval.high))


# runs


def test_each_accuracy_of_both_runs_is_compared_at_each_bound_of_both() -> None:
    first = run("noise(tries=2),noise(tries=1)")
    second = run("fgsm,noise(tries=1),noise(tries=2)", [*BOUNDS, ThreatModel("linf", 0.1)])
    found = compare_runs(first, second)
    told = [(one.what, one.eps) for one in found.differences]
    of_bound = ["noise(tries=2)", "noise(tries=1)", WORST]
    assert told == [(CLEAN, 0.0), *((what, threat.eps) for threat in BOUNDS for what in of_bound)]
    for one in found.differences:
        mine, others = (result.answers(one.what, one.eps) for result in (first, second))
        assert mine is not None
        assert others is not None
        assert (one.first, one.second) == (mine.accuracy(), others.accuracy())
        assert one.gap.mean == pytest.approx(one.first.value - one.second.value)
    assert find(found, WORST, 0.05).gap.mean > 0, "FGSM finds more"
    assert "only the second was attacked by fgsm" in found.notes
    back = compare_runs(second, first)
    assert find(back, WORST, 0.05).gap.mean == -find(found, WORST, 0.05).gap.mean


def test_runs_of_other_sizes_are_compared_on_the_images_of_both() -> None:
    first, second = run(n=40), run(n=25)
    found = compare_runs(first, second)
    assert found.images == 25
    assert set(second.indices) <= set(first.indices)
    assert all(one.gap.mean == 0 and one.gap.p == 1 for one in found.differences)
    assert find(found, WORST, 0.05).first.value == second.robust_accuracy.value  # type: ignore[union-attr]


def test_the_same_images_in_another_order_meet_their_own() -> None:
    """Units turned about: positions, not rows, say which images belong together."""
    first = run()
    turned = Evaluation(
        first.spec, [first.units.take(pa.array(range(first.units.num_rows))[::-1])], folder=None, created=""
    )
    answers = shared_answers(first, turned, WORST, 0.05)
    assert answers is not None
    assert (answers[0].votes == answers[1].votes).all()
    assert (answers[0].labels == answers[1].labels).all()


def test_what_the_runs_are_unlike_in_is_told() -> None:
    one = evaluate(Noisy(), "pgd(steps=2)", BOUNDS, grid_images(12), eot=2, judge_repeats=5)
    other = evaluate(Noisy(), "pgd(steps=2)", BOUNDS, grid_images(12), eot=4, judge_repeats=5, query_budget=9)
    assert compare_runs(one, other).notes == ("query budget: none and 9", "eot: 2 and 4")
    assert compare_runs(one, one).notes == ()
    settled = evaluate(Linear(), "pgd(steps=2)", BOUNDS, grid_images(12))
    assert compare_runs(one, settled).notes == (), "a deterministic defense has one draw"


def test_a_failed_attack_leaves_no_robust_accuracy_but_the_others() -> None:
    broken = run([Bad(), "fgsm"])
    found = compare_runs(run("fgsm"), broken)
    assert [(one.what, one.eps) for one in found.differences] == [(CLEAN, 0.0), ("fgsm", 0.02), ("fgsm", 0.05)]
    assert any("no robust accuracy of the second at linf eps=0.05: bad" in note for note in found.notes)


def test_what_does_not_compare_is_refused() -> None:
    first = run()
    other_norm = run(threat=ThreatModel("l2", 0.5))
    other_bound = run(threat=ThreatModel("linf", 0.03))
    other_images = evaluate(Linear(), "fgsm", BOUNDS, grid_images(12))
    with pytest.raises(UsageError, match="need one norm; these have linf and l2"):
        compare_runs(first, other_norm)
    with pytest.raises(UsageError, match=r"no bound in common: 0\.02, 0\.05 and 0\.03"):
        compare_runs(first, other_bound)
    with pytest.raises(UsageError, match="need one dataset; these have fashion_mnist and images of the caller"):
        compare_runs(first, other_images)


def test_images_of_the_caller_are_shared_only_if_they_are_the_same() -> None:
    first, same, other = (evaluate(Linear(), "fgsm", BOUNDS, grid_images(12, salt)) for salt in (0, 0, 1))
    assert compare_runs(first, same).images == 12
    with pytest.raises(UsageError, match="no images in common"):
        compare_runs(first, other)


def test_positions_of_another_split_are_no_shared_images() -> None:
    first = run()
    labels = pa.array(
        [(label + 1) % 10 for label in first.units["label"].to_pylist()], first.units.schema.field("label").type
    )
    units = first.units.set_column(first.units.schema.get_field_index("label"), "label", labels)
    with pytest.raises(UsageError, match="no images in common"):
        compare_runs(first, Evaluation(first.spec, [units], folder=None, created=""))


# words


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(
    ("differ", "told"), [(8, "keeps 40.0 points ["), (1, "cannot be told apart on the same 20 images")]
)
def test_the_verdict_names_who_keeps_more(differ: int, told: str, turned: bool) -> None:
    spec = run(n=5).spec
    specs = [dataclasses.replace(spec, defense=name) for name in ("robust", "weak")]
    shares = [as_answers([1] * 20), as_answers([0] * differ + [1] * (20 - differ))]
    if turned:
        specs, shares = specs[::-1], shares[::-1]
    gap = compare_answers(*shares)
    one = Difference(WORST, 0.05, shares[0].accuracy(), shares[1].accuracy(), gap)
    sentence = Comparison(specs[0], specs[1], 20, (one,), ()).verdict(one)
    assert told in sentence
    assert sentence.startswith("linf eps=0.05: ")
    if differ == 8:
        assert "robust keeps" in sentence
        assert "more than weak" in sentence
        low, high = (float(end) for end in sentence.split("[")[1].split("]")[0].split(", "))
        assert 0 < low < 40 < high
    else:
        assert f"between {100 * gap.low:+.1f} and {100 * gap.high:+.1f} points" in sentence


def test_two_runs_of_one_defense_are_told_apart_by_their_place() -> None:
    first = run(n=5)
    assert compare_runs(first, first).names == ("prototypes (first)", "prototypes (second)")


def test_the_command_compares_a_run_with_the_evidence_of_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, attack in (("weak", "noise(tries=1)"), ("strong", "pgd(steps=5)")):
        run(attack, ThreatModel("linf", 0.08), n=60, out=tmp_path / name, defense_spec=TOY)
    publish([tmp_path / "weak"], tmp_path / "boards")
    (evidence,) = (tmp_path / "boards" / "evidence").iterdir()
    capsys.readouterr()
    assert call(monkeypatch, evidence, tmp_path / "strong") == 0
    printed = capsys.readouterr().out
    assert "the same 60 images" in printed
    assert "(first) keeps" in printed
    assert call(monkeypatch, evidence, tmp_path / "strong", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    places = compare_places(evidence, tmp_path / "strong")
    assert told == json.loads(json.dumps(places.to_json()))
    assert [one["what"] for one in told["differences"]] == ["clean", "worst"]
    assert told["differences"][1]["distinct"] is True
    assert call(monkeypatch, evidence, tmp_path / "nothing") == 2
    assert "nothing is not a run folder" in capsys.readouterr().err


def test_the_table_tells_the_bound_where_there_are_several() -> None:
    found = compare_runs(run(n=10), run(n=10))
    cells = list(comparison_table(found).columns[0].cells)
    assert cells == [
        "clean accuracy",
        *(f"{what} at {eps}" for eps in ("0.02", "0.05") for what in ("under fgsm", "robust accuracy")),
    ]
    single = compare_runs(run(threat=BOUNDS[0], n=10, cascade=True), run(threat=BOUNDS[0], n=10, cascade=True))
    assert list(comparison_table(single).columns[0].cells) == ["clean accuracy", "after fgsm", "robust accuracy"]
