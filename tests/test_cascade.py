"""A cascade: each attack sees only what those before it left, and the figures stay what the judge found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import engine_toys
import numpy as np
import pandas as pd
import pytest
import torch
from engine_toys import Bad, Linear, Noisy, Nudge, Partial, Still, Upward, some_wrong

from robench.attack import Attack
from robench.errors import DataError
from robench.estimate import Estimate
from robench.evaluate import evaluate
from robench.judge import judge
from robench.result import Evaluation
from robench.testing import LinearToy, NoisyLinearToy
from robench.threat import ThreatModel
from robench.unit_table import CLEAN, WORST

HALF, SOME, MOST = Partial(0.5).spec(), Partial(0.3).spec(), Partial(0.8).spec()
LIST: list[Attack | str] = [Partial(0.5), Partial(0.3), "pgd(steps=1, random_start=False)", Partial(0.8)]
KEYS = [HALF, SOME, "pgd(steps=1, random_start=False)", MOST]
LINF = ThreatModel("linf", 0.03)
UP = Nudge().spec()
TOYS = engine_toys.__file__


def value(estimate: Estimate | None) -> float:
    assert estimate is not None
    return estimate.value


def rows_of(result: Evaluation, attack: str) -> pd.DataFrame:
    return result.table[result.table["attack"] == attack].reset_index(drop=True)


def run(attacks: Any = LIST, n: int = 30, unit_size: int = 8, **settings: Any) -> Evaluation:
    return evaluate(Linear(), attacks, LINF, some_wrong(n), unit_size=unit_size, **{"cascade": True, **settings})


@pytest.fixture(scope="module")
def result() -> Evaluation:
    return run()


# a deterministic defense


def test_an_image_is_attacked_until_one_attack_has_found_an_error(result: Evaluation) -> None:
    """`spared` from the first error on; the row shows that error, and costs nothing."""
    clean = rows_of(result, CLEAN)["accuracy"].to_numpy() == 1
    finder = np.full(30, "", dtype=object)
    first = {key: result.images(key) for key in KEYS}
    for key in KEYS:
        rows = rows_of(result, key)
        known = finder != ""
        expected = np.where(~clean, "skipped", np.where(known, "spared", "ok"))
        assert rows["status"].tolist() == expected.tolist()
        queries = rows["forwards"] + rows["backwards"]
        assert (queries[expected != "ok"] == 0).all()
        assert (rows["accuracy"].to_numpy()[known] == 0).all()
        for row in np.flatnonzero(known):
            assert np.array_equal(first[key][row], first[finder[row]][row])
        found = (rows["accuracy"].to_numpy() == 0) & clean & ~known
        finder[found] = key
    assert len({*finder} - {""}) == 2, "the toys should leave something to each other"
    assert (finder[clean] == "").any()


def test_figure_of_an_attack_is_what_is_left_after_it(result: Evaluation) -> None:
    figures = [value(estimate) for estimate in result.per_attack.values()]
    assert figures == sorted(figures, reverse=True)
    assert figures[-1] == value(result.robust_accuracy)
    free = run(cascade=False)
    right = np.stack([rows_of(free, key)["accuracy"] for key in KEYS])
    assert figures == np.minimum.accumulate(right, axis=0).mean(1).tolist()


def test_without_a_cascade_each_figure_is_the_attack_s_own(result: Evaluation) -> None:
    free = run(cascade=False)
    assert not free.spec.cascade
    assert run(cascade=None).spec == free.spec, "a free list is no cascade"
    assert "spared" not in set(free.table["status"])
    for attack, key in zip(LIST, KEYS, strict=True):
        assert free.per_attack[key] == run([attack], cascade=False).per_attack[key]
    assert value(free.per_attack[SOME]) > value(free.per_attack[HALF]) == value(result.per_attack[SOME])
    assert value(result.robust_accuracy) <= min(value(estimate) for estimate in free.per_attack.values())
    assert sum(result.queries().values()) < sum(free.queries().values())


def test_images_of_the_worst_case_are_what_was_judged(result: Evaluation) -> None:
    _, y = some_wrong(30)
    images = torch.from_numpy(result.images(WORST))
    right = judge(Linear(), images, 1).gather(1, y[:, None])[:, 0]
    assert right.tolist() == rows_of(result, WORST)["accuracy"].tolist()
    chosen = rows_of(result, WORST)["chosen"]
    finders = {key: rows_of(result, key) for key in KEYS}
    for row in np.flatnonzero(right.numpy() == 0):
        assert finders[chosen[row]]["status"][row] != "spared", "the attack that found it, not one that inherited it"


def test_worst_attack_of_a_cascade_is_the_one_that_found_most(result: Evaluation) -> None:
    gained = rows_of(result, WORST)[rows_of(result, WORST)["accuracy"] < rows_of(result, CLEAN)["accuracy"]]
    counts = gained["chosen"].value_counts()
    assert counts[result.worst_attack()] == counts.max()
    assert value(result.per_attack[result.worst_attack()]) > value(result.robust_accuracy), (
        "not the one with least left"
    )
    assert run([Still()]).worst_attack() == ""


def test_an_attack_is_not_called_when_nothing_is_left() -> None:
    """One that fails when it is called does not."""
    toy = LinearToy()
    found = evaluate(toy, ["fgsm", Bad()], ThreatModel("linf", 0.05), toy.examples(12), cascade=True)
    assert found.complete
    assert value(found.robust_accuracy) == 0
    assert set(rows_of(found, "bad")["status"]) == {"spared"}
    assert not evaluate(toy, ["fgsm", Bad()], ThreatModel("linf", 0.05), toy.examples(12)).complete


def test_units_and_a_stored_copy_do_not_matter(result: Evaluation, tmp_path: Path) -> None:
    attacks: list[Attack | str] = [Partial(0.5), "fgsm", Upward()]
    whole, cut = run(attacks, unit_size=30), run(attacks, unit_size=7)
    for key in (HALF, "fgsm", "upward", WORST):
        assert np.array_equal(whole.images(key), cut.images(key))
        assert rows_of(whole, key)["status"].tolist() == rows_of(cut, key)["status"].tolist()
    again = Evaluation.load(result.save(tmp_path / "run"))
    assert again.spec.cascade
    assert again.to_json() == result.to_json()
    assert again.table.equals(result.table)


def test_a_minimal_norm_attack_in_a_cascade_sees_what_is_left() -> None:
    threat, data = ThreatModel("linf", 0.25), some_wrong(30)
    both = evaluate(Linear(), [Nudge(), Upward()], threat, data, cascade=True)
    alone = evaluate(Linear(), [Upward()], threat, data)
    spared = rows_of(both, "upward")["status"] == "spared"
    assert spared.any()
    attacked = rows_of(both, "upward")["status"] == "ok"
    assert rows_of(both, "upward")["forwards"].tolist() == np.where(attacked, 40, 0).tolist()
    assert np.array_equal(both.images("upward")[attacked], alone.images("upward")[attacked])
    assert np.array_equal(both.images("upward")[spared], both.images(UP)[spared])
    assert both.median_distances() == {}, "distances of a cascade are those of other attacks too"
    assert set(alone.median_distances()) == {"upward"}


# a randomized defense


def test_a_randomized_image_is_spared_only_where_no_answer_was_right() -> None:
    x, y = some_wrong(60)
    defense = Noisy(gain=0.9, sigma=1.0)
    threat = ThreatModel("linf", 0.25)
    found = evaluate(defense, [Nudge(), "pgd(steps=3)", "fgsm"], threat, (x, y), cascade=True, eot=2, judge_repeats=20)
    clean = rows_of(found, CLEAN)["accuracy"].to_numpy()
    lowest = np.ones(60)
    for key in (UP, "pgd(steps=3)", "fgsm"):
        rows = rows_of(found, key)
        expected = np.where(clean == 0, "skipped", np.where(lowest == 0, "spared", "ok"))
        assert rows["status"].tolist() == expected.tolist()
        assert ((rows["backwards"] > 0) == (rows["status"] == "ok")).all() or key == UP
        lowest = np.minimum(lowest, np.where(expected == "ok", rows["accuracy"], 1))
    assert set(rows_of(found, "fgsm")["status"]) == {"ok", "skipped", "spared"}
    assert {sum(votes) for votes in found.table["votes"]} == {20}


@pytest.mark.parametrize(("cascade", "repeats"), [(False, 1), (True, 1), (True, 19)])
def test_few_answers_settle_nothing_of_a_randomized_defense(cascade: bool, repeats: int) -> None:
    """One wrong answer in seven is luck: an image that was not attacked for it would count as right later on."""
    defense = NoisyLinearToy(sigma=2.0)
    x, y = defense.examples(128)
    assert 0.8 < float(defense.probability_right(x, y).mean()) < 0.9
    attacks: list[Attack | str] = [Still(), "fgsm"]
    found = evaluate(defense, attacks, ThreatModel("linf", 0.3), (x, y), cascade=cascade, judge_repeats=repeats)
    assert set(found.table["status"]) == {"ok"}
    assert value(found.per_attack["fgsm"]) == 0.0
    assert (rows_of(found, "fgsm")["backwards"] == 10).all()


def test_worst_of_a_randomized_cascade_is_reported_on_fresh_draws() -> None:
    """A defense that guesses: two attacks that change nothing do not look like a gain."""
    x, y = some_wrong(80)
    none = ThreatModel("linf", 0.0)
    found = evaluate(Noisy(gain=0.0), [Still(), Nudge()], none, (x, y), cascade=True, judge_repeats=6)
    picked = np.minimum(rows_of(found, "still")["accuracy"], rows_of(found, UP)["accuracy"])
    assert picked.mean() < 0.27
    assert abs(value(found.robust_accuracy) - 1 / 3) < 0.08  # 480 draws: four standard errors are 0.09


# failures


@pytest.mark.parametrize("cascade", [True, False])
def test_a_failing_attack_leaves_the_others_and_makes_the_worst_case_incomplete(cascade: bool, tmp_path: Path) -> None:
    attacks: list[Attack | str] = [Partial(0.5), Bad(), "fgsm"]
    found = run(attacks, cascade=cascade, out=tmp_path / "run")
    sound = run([Partial(0.5), "fgsm"], cascade=cascade)
    assert not found.complete
    assert found.per_attack["bad"] is None
    for key in (HALF, "fgsm"):
        assert found.per_attack[key] == sound.per_attack[key]
        assert rows_of(found, key)["status"].tolist() == rows_of(sound, key)["status"].tolist()
    assert set(rows_of(found, "bad")["status"]) == {"failed"}
    assert value(sound.robust_accuracy) > 0
    assert found.robust_accuracy is found.majority is None
    assert found.best_of == {}
    row = found.row()
    assert (row["robust_acc"], row["bad"], row["fgsm"]) == ("", "", sound.row()["fgsm"])
    assert len(found.failures) == 4, "one for each unit"
    assert all("RuntimeError: planted" in text for text in found.failures.values())
    with pytest.raises(DataError, match='no distances of "bad"'):
        found.distances("bad")


def test_failures_are_known_without_a_folder() -> None:
    (trace,) = run([Bad(), "fgsm"]).failures.values()
    assert "RuntimeError: planted" in trace


def test_command_line_ends_with_status_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ["run", "--defense", f"{TOYS}:Prototypes", "--attack", f"fgsm,{TOYS}:Bad,pgd(steps=2)", "--n", "12"]
    words += ["--cascade", "--device", "cpu", "--out", str(tmp_path / "run"), "--json"]
    monkeypatch.setattr("sys.argv", ["robench", *words])
    from robench.cli import main

    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 1
    shown = capsys.readouterr()
    content = json.loads(shown.out)
    assert (content["complete"], content["cascade"]) == (False, True)
    assert content["per_attack"]["bad"] is None
    assert content["per_attack"]["pgd(steps=2)"]["value"] <= content["per_attack"]["fgsm"]["value"]
    assert f"the worst case is incomplete. See {tmp_path}/run/failures" in shown.err
    assert "Traceback" not in shown.err
