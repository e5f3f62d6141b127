"""`robench compare`: two runs image by image, on the images that both have, and what does not compare."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import engine_toys
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
from board_toys import make_boards
from engine_toys import Bad, Linear, Noisy, Prototypes, grid_images
from rich.console import Console
from scipy.stats import binomtest, t, ttest_rel

from robench import paired
from robench.bundle import AUDIT, read_bundle
from robench.cli import main
from robench.errors import DataError, UsageError
from robench.estimate import Answers, Estimate
from robench.evaluate import evaluate
from robench.paired import Comparison, Difference, compare_answers, compare_places, compare_runs, shared_answers
from robench.publish import publish
from robench.report.paired import comparison_table
from robench.result import Evaluation
from robench.stats import PairedTest, paired_test
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
    """Eight images of 20 differ, seven one way: twice P(at least 7 of 8) is 18 / 256; Clopper and Pearson by scipy."""
    more = [1] * 7 + [0] + [1] * 12
    less = [0] * 7 + [1] + [1] * 12
    gap = compare_answers(*map(as_answers, (less, more) if turned else (more, less)))
    assert gap.mean == pytest.approx(-0.3 if turned else 0.3)
    assert gap.p == pytest.approx(18 / 256)
    ends = binomtest(1 if turned else 7, 8).proportion_ci(0.95, method="exact")
    padded = np.array([1.0] * 7 + [-1.0] + [0.0] * 12 + [1.0, -1.0])
    half = t.ppf(0.975, 19) * padded.std(ddof=1) / np.sqrt(22)
    assert gap.low == pytest.approx(min((2 * ends.low - 1) * 8 / 20, gap.mean - half))
    assert gap.high == pytest.approx(max((2 * ends.high - 1) * 8 / 20, gap.mean + half))


@pytest.mark.parametrize("turned", [False, True])
def test_shares_of_a_randomized_defense_are_compared_by_students_paired_test(turned: bool) -> None:
    generator = np.random.Generator(np.random.PCG64(1))
    both = [generator.integers(0, most, 30) for most in (11, 9)]
    first, second = reversed(both) if turned else both
    gap, test = compare_answers(as_answers(first, 10), as_answers(second, 10)), ttest_rel(first / 10, second / 10)
    interval = test.confidence_interval()
    assert (gap.p, gap.mean) == pytest.approx((test.pvalue, (first - second).mean() / 10))
    assert (gap.low, gap.high) == pytest.approx((interval.low, interval.high))


def test_the_interval_holds_0_just_where_the_test_sees_nothing() -> None:
    for n in (2, 8, 20, 200):
        for ahead in range(min(n, 24) + 1):
            for behind in range(min(n - ahead, 24) + 1):
                gaps = np.array([1.0] * ahead + [-1.0] * behind + [0.0] * (n - ahead - behind))
                found = paired_test(gaps.clip(0), (-gaps).clip(0))
                assert (found.low <= 0 <= found.high) == (found.p > 0.05), (n, ahead, behind)
                assert -1 <= found.low <= found.mean <= found.high <= 1
    generator = np.random.Generator(np.random.PCG64(2))
    for n in (2, 3, 10, 50):
        for _ in range(200):
            found = paired_test(generator.random(n), generator.random(n))
            assert (found.low <= 0 <= found.high) == (found.p > 0.05)
            assert -1 <= found.low <= found.high <= 1


def test_few_examples_without_scatter_show_nothing() -> None:
    assert paired_test(np.array([1.0]), np.array([0.0])) == PairedTest(1.0, -1.0, 1.0, 1.0)
    assert paired_test(np.array([0.75]), np.array([0.5])) == PairedTest(0.25, -1.0, 1.0, 1.0)
    alike = paired_test(np.full(3, 0.6), np.full(3, 0.5))
    assert alike.p > 0.5
    assert alike.low < 0 < alike.high
    assert paired_test(np.full(1000, 0.6), np.full(1000, 0.5)).p < 0.01
    same = paired_test(np.ones(1000), np.ones(1000))
    assert (same.mean, same.p) == (0, 1)
    assert same.high == pytest.approx(0.00368, abs=1e-5), "of so many in a thousand none is seen once in 40 times"


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
    answers = shared_answers(first, turned, WORST, (0.05, 0.05))
    assert answers is not None
    assert (answers[0].votes == answers[1].votes).all()
    assert (answers[0].labels == answers[1].labels).all()


def test_what_the_runs_are_unlike_in_is_told() -> None:
    one = evaluate(Noisy(), "pgd(steps=2)", BOUNDS, grid_images(12), eot=2, judge_repeats=5)
    other = evaluate(Noisy(), "pgd(steps=2)", BOUNDS, grid_images(12), eot=4, judge_repeats=6, query_budget=9)
    assert compare_runs(one, other).notes == ("query budget: none and 9", "eot: 2 and 4", "judge repeats: 5 and 6")
    assert compare_runs(one, one).notes == ()
    settled = evaluate(Linear(), "pgd(steps=2)", BOUNDS, grid_images(12))
    assert compare_runs(one, settled).notes == (), "a deterministic defense has one draw"


@pytest.mark.parametrize("name", ["protocol", "precision", "robench_version", "torch_version", "device"])
def test_each_setting_that_may_matter_is_told(name: str) -> None:
    run_, changes = run(n=5), dict[str, Any]({name: "another"})
    other = run_.under(dataclasses.replace(run_.spec, **changes))
    (note,) = compare_runs(run_, other).notes
    assert note == f"{name.replace('_', ' ')}: {getattr(run_.spec, name) or 'none'} and another"
    changed = run_.under(dataclasses.replace(run_.spec, weights_digest=64 * "a"))
    assert compare_runs(run_, changed).notes == (f"weights: {run_.spec.weights_digest[:16]} and {16 * 'a'}",)


def test_in_cascades_only_like_figures_are_compared_attack_by_attack() -> None:
    """After those before it an attack has other images left, and a randomized defense's answers are counted anew."""
    ahead, behind = "noise(tries=1)", "fgsm"

    def attacks(first: Evaluation, second: Evaluation) -> list[str]:
        found = compare_runs(first, second)
        told = [one.what for one in found.differences if one.what not in (CLEAN, WORST)]
        hidden = [note for note in found.notes if "not compared one by one" in note]
        assert len(hidden) == (len(set(told)) < 2)
        return sorted(set(told))

    cascade = run(f"{ahead},{behind}", cascade=True)
    assert attacks(cascade, cascade) == [behind, ahead]
    assert attacks(cascade, run(f"{behind},{ahead}", cascade=True)) == []
    assert attacks(cascade, run(f"{ahead},{behind}")) == []
    assert attacks(cascade, run(f"{ahead},pgd(steps=2),{behind}", cascade=True)) == [ahead]
    randomized = cascade.under(dataclasses.replace(cascade.spec, randomized=True))
    assert attacks(cascade, randomized) == []
    free = run(f"{ahead},{behind}")
    assert attacks(free, run(f"{behind},{ahead}")) == [behind, ahead]


def test_bounds_that_are_written_otherwise_are_the_same() -> None:
    first, second = run(threat=ThreatModel("linf", 8 / 255)), run(threat=ThreatModel("linf", 0.0313725490196))
    assert [one.eps for one in compare_runs(first, second).worst] == [8 / 255]


def test_a_table_that_lacks_answers_is_refused() -> None:
    first = run()
    attack, eps = (first.units[name].to_pylist() for name in ("attack", "eps"))
    (last,) = [[row for row, one in enumerate(zip(attack, eps, strict=True)) if one == (WORST, 0.05)][-1:]]
    kept = first.units.take([row for row in range(first.units.num_rows) if row not in last])
    with pytest.raises(DataError, match=r'^the evidence of prototypes: .*the answers under "worst" to each'):
        compare_runs(first, Evaluation(first.spec, [kept], folder=None, created=""))


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
    with pytest.raises(UsageError, match="both runs have the same; these have others"):
        compare_runs(first, other)


def test_images_drawn_by_other_seeds_are_told() -> None:
    with pytest.raises(UsageError, match="seed 0 drew 3 and seed 1 4 others"):
        compare_runs(run(n=3), run(n=4, seed=1))
    few = compare_runs(run(n=256), run(n=256, seed=1))
    assert 0 < few.images < 20
    assert few.notes == (
        f"only {few.images} images of 256 and 256 are in both, drawn by seeds 0 and 1; run both with one --seed",
    )


def test_positions_of_another_split_are_no_shared_images() -> None:
    first = run()
    labels = pa.array(
        [(label + 1) % 10 for label in first.units["label"].to_pylist()], first.units.schema.field("label").type
    )
    units = first.units.set_column(first.units.schema.get_field_index("label"), "label", labels)
    with pytest.raises(UsageError, match="bear other labels: the runs are of different splits"):
        compare_runs(first, Evaluation(first.spec, [units], folder=None, created=""))


# words


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(
    ("differ", "told"), [(8, "keeps 40.0 points ["), (1, "cannot be told apart on the same 20 images (p = 1); ")]
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
    assert printed.rstrip().endswith("under unlike attacks")
    assert "note: only the second was attacked by pgd(steps=5)" in printed
    assert call(monkeypatch, evidence, tmp_path / "strong", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    places = compare_places(evidence, tmp_path / "strong")
    assert told == json.loads(json.dumps(places.to_json()))
    assert [one["what"] for one in told["differences"]] == ["clean", "worst"]
    assert told["differences"][1]["distinct"] is True
    assert call(monkeypatch, evidence, tmp_path / "nothing") == 2
    assert "nothing is neither a run folder nor the evidence of a row" in capsys.readouterr().err


def test_the_table_tells_the_bound_where_there_are_several() -> None:
    found = compare_runs(run(n=10), run(n=10))
    cells = list(comparison_table(found).columns[0].cells)
    assert cells == [
        "clean",
        *(f"{what} at {eps}" for eps in ("0.02", "0.05") for what in ("under fgsm", "robust")),
    ]
    single = compare_runs(run(threat=BOUNDS[0], n=10, cascade=True), run(threat=BOUNDS[0], n=10, cascade=True))
    assert list(comparison_table(single).columns[0].cells) == ["clean", "after fgsm", "robust"]


def test_a_row_of_the_table_has_each_figure_in_its_column() -> None:
    found = compare_runs(run("noise(tries=1)", threat=BOUNDS[1]), run("fgsm", threat=BOUNDS[1]))
    (worst,) = found.worst
    row = [list(column.cells)[-1] for column in comparison_table(found).columns]
    gap = worst.gap
    assert worst.first.value > worst.second.value
    assert row == [
        "robust",
        str(worst.first).replace(" %", ""),
        str(worst.second).replace(" %", ""),
        f"{100 * gap.mean:+.1f} [{100 * gap.low:.1f}, {100 * gap.high:.1f}]",
        f"{gap.p:.2g}",
    ]
    assert gap.p > 0.001
    sure = dataclasses.replace(found, differences=(dataclasses.replace(worst, gap=PairedTest(0.2, 0.1, 0.3, 1e-9)),))
    assert list(comparison_table(sure).columns[4].cells) == ["<0.001"]


def test_the_table_of_a_thousand_images_fits_a_terminal_of_80_columns() -> None:
    found, accuracy = compare_runs(run(), run()), Estimate(0.585, 0.554, 0.615)
    wide = PairedTest(-0.194, -0.222, -0.166, 1e-9)
    told = tuple(dataclasses.replace(one, first=accuracy, second=accuracy, gap=wide) for one in found.differences)
    first, second = (dataclasses.replace(found.first, defense=which) for which in ("convnet_at", "fortified"))
    named = Comparison(first, second, 1000, told[:1], ())
    assert Console(width=200).measure(comparison_table(named)).maximum <= 80


def test_an_audit_that_does_not_pass_is_told(tmp_path: Path) -> None:
    boards = make_boards(tmp_path)
    (evidence,) = (boards / "evidence").iterdir()
    verdict = json.loads((evidence / AUDIT).read_text())["verdict"]
    found = compare_places(tmp_path / "run", evidence).notes
    assert found == (() if verdict == "pass" else (f"the audit calls the second {verdict}",))
    bundle = read_bundle(evidence)
    for kind in ("masked", "suspect", "pass"):
        told = dataclasses.replace(bundle, audit={**bundle.audit, "verdict": kind} if bundle.audit else None)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(paired, "read_bundle", lambda _, told=told: told)
            assert compare_places(evidence, tmp_path / "run").notes == (
                () if kind == "pass" else (f"the audit calls the first {kind}",)
            )


@pytest.mark.slow
def test_a_run_that_is_not_finished_ends_the_command_with_status_2(tmp_path: Path) -> None:
    """Arrow's threads that held Python objects at exit aborted every other such process, with status 134."""
    run("fgsm", n=60, unit_size=10, out=tmp_path / "run", defense_spec=TOY)
    sorted((tmp_path / "run" / "units").iterdir())[-1].unlink()
    words = [sys.executable, "-m", "robench", "compare", str(tmp_path / "run"), str(tmp_path / "run")]
    for _ in range(5):
        ended = subprocess.run(words, capture_output=True, text=True, check=False)
        assert (ended.returncode, "is missing. Finish it with" in ended.stderr) == (2, True), ended.stderr
