"""Intervals and paired tests: against scipy, against simulation, against enumeration."""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, binomtest, t

from robench.estimate import Answers, tell_guess
from robench.stats import (
    INDEPENDENT,
    answers_differ,
    majorities_differ,
    mean_interval,
    most_by_chance,
    paired_interval,
    shared_noise,
    smallest_shown,
    wilson,
)

Fractions = npt.NDArray[np.float64]


@given(n=st.integers(1, 5000), data=st.data(), level=st.sampled_from([0.8, 0.95, 0.999]))
def test_wilson_is_scipy_s(n: int, data: st.DataObject, level: float) -> None:
    right = data.draw(st.integers(0, n))
    expected = binomtest(right, n).proportion_ci(level, method="wilson")
    assert wilson(right, n, level) == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize(
    ("right", "n", "classes", "guesses"),
    [
        pytest.param(0, 4, 10, True, id="none of four"),
        pytest.param(1, 4, 10, False, id="one of four may be chance"),
        pytest.param(150, 1000, 10, True, id="beyond chance by little"),
        pytest.param(250, 1000, 10, False, id="a weak classifier"),
        pytest.param(16, 32, 2, True, id="half of two classes"),
        pytest.param(700, 1000, 2, False, id="a weak one of two classes"),
        pytest.param(50, 1000, 100, False, id="five times chance"),
    ],
)
def test_an_accuracy_that_guessing_would_reach_is_told(right: int, n: int, classes: int, guesses: bool) -> None:
    votes = np.zeros((n, classes), dtype=np.int64)
    votes[:right, 0], votes[right:, 1] = 1, 1
    assert bool(tell_guess(Answers(votes, np.zeros(n, dtype=np.int64)))) is guesses


def test_wilson_of_nothing_is_everything() -> None:
    assert wilson(0, 0) == (0.0, 1.0)


@given(n=st.integers(1, 300), data=st.data())
def test_mean_interval_of_single_answers_is_wilson(n: int, data: st.DataObject) -> None:
    right = data.draw(st.integers(0, n))
    fractions = np.r_[np.ones(right), np.zeros(n - right)]
    assert mean_interval(fractions, 1) == pytest.approx(wilson(right, n), abs=1e-12)


@given(n=st.integers(1, 1000), rate=st.floats(0.001, 0.5))
def test_what_chance_explains_is_scipy_s_exact_test(n: int, rate: float) -> None:
    most = most_by_chance(n, rate)
    assert binomtest(most, n, rate, alternative="greater").pvalue > 0.001
    assert most == n or binomtest(most + 1, n, rate, alternative="greater").pvalue <= 0.001
    assert smallest_shown(n, most) == 1 or binom.sf(most, n, smallest_shown(n, most)) == pytest.approx(0.9)


@st.composite
def counts(draw: st.DrawFn, least: int = 1) -> tuple[Fractions, int]:
    repeats = draw(st.integers(1, 30))
    right = draw(st.lists(st.integers(0, repeats), min_size=least, max_size=80))
    return np.array(right) / repeats, repeats


@given(drawn=counts())
def test_mean_interval_holds_the_mean_and_stays_in_the_unit_interval(drawn: tuple[Fractions, int]) -> None:
    fractions, repeats = drawn
    low, high = mean_interval(fractions, repeats)
    assert 0 <= low <= fractions.mean() + 1e-12
    assert fractions.mean() - 1e-12 <= high <= 1
    assert low < high


@given(drawn=counts(least=2), times=st.integers(2, 5))
def test_mean_interval_narrows_with_more_of_the_same_examples(drawn: tuple[Fractions, int], times: int) -> None:
    fractions, repeats = drawn
    low, high = mean_interval(fractions, repeats)
    narrow_low, narrow_high = mean_interval(np.tile(fractions, times), repeats)
    assert narrow_high - narrow_low < high - low


@given(drawn=counts(), times=st.integers(2, 5))
def test_mean_interval_never_widens_with_more_repeats(drawn: tuple[Fractions, int], times: int) -> None:
    fractions, repeats = drawn
    if repeats == 1:  # here the quantile changes from the normal one to Student's
        repeats = 2
    low, high = mean_interval(fractions, repeats)
    again_low, again_high = mean_interval(fractions, repeats * times)
    assert low <= again_low + 1e-12
    assert again_high <= high + 1e-12


@given(drawn=counts())
def test_mean_interval_is_symmetric_in_right_and_wrong(drawn: tuple[Fractions, int]) -> None:
    fractions, repeats = drawn
    low, high = mean_interval(fractions, repeats)
    assert mean_interval(1 - fractions, repeats) == pytest.approx((1 - high, 1 - low), abs=1e-9)


@pytest.mark.parametrize("repeats", [2, 5, 20, 100])
@pytest.mark.parametrize("n", [16, 64, 256])
def test_one_wrong_answer_promises_no_more_than_none(n: int, repeats: int) -> None:
    """An example of a kind that is always wrong may be missing from the sample in both cases alike."""
    all_right, one_wrong = np.ones(n), np.ones(n)
    one_wrong[0] -= 1 / repeats
    assert mean_interval(one_wrong, repeats)[0] <= mean_interval(all_right, repeats)[0] + 0.002


POPULATIONS = {
    "deterministic": ((0.0, 1.0), (0.5, 0.5)),
    "two kinds": ((0.1, 0.9), (0.5, 0.5)),
    "all kinds": ((0.0, 0.3, 0.7, 1.0), (0.3, 0.2, 0.2, 0.3)),
    "mostly broken": ((0.0, 0.5, 1.0), (0.8, 0.1, 0.1)),
    "all alike": ((0.5,), (1.0,)),
    "nearly always right": ((0.995,), (1.0,)),
    "few always wrong": ((0.0, 0.998), (0.02, 0.98)),
    "very few always wrong": ((0.0, 0.99), (0.01, 0.99)),
    "few always right": ((1.0, 0.02), (0.02, 0.98)),
    "tenth always wrong": ((0.0, 0.9), (0.1, 0.9)),
}


@pytest.mark.parametrize("repeats", [5, 100])
@pytest.mark.parametrize("name", POPULATIONS)
def test_mean_interval_covers_the_population_s_mean(name: str, repeats: int) -> None:
    """64 examples of a mixed population, each judged 5 or 100 times: at least 92 % of 2000 intervals hold the mean."""
    chances, shares = POPULATIONS[name]
    generator = np.random.default_rng(7)
    hits = 0
    for _ in range(2000):
        chance = generator.choice(chances, 64, p=shares)
        low, high = mean_interval(generator.binomial(repeats, chance) / repeats, repeats)
        hits += low <= np.dot(chances, shares) <= high
    assert hits / 2000 >= 0.92


# what an attacker with several tries, or a vote, makes of the answers


def make_answers(right: list[int], repeats: int) -> Answers:
    """Votes of three classes; the label is class 1 and wrong answers are class 0."""
    votes = np.array([[repeats - count, count, 0] for count in right], dtype=np.int64)
    return Answers(votes, np.ones(len(right), dtype=np.int64))


@given(repeats=st.integers(1, 8), data=st.data())
def test_best_of_is_the_fraction_of_all_choices_in_which_every_answer_is_right(
    repeats: int, data: st.DataObject
) -> None:
    right = data.draw(st.lists(st.integers(0, repeats), min_size=1, max_size=4))
    tries = data.draw(st.integers(1, repeats))
    fractions = []
    for count in right:
        draws = [True] * count + [False] * (repeats - count)
        choices = [all(choice) for choice in itertools.combinations(draws, tries)]
        fractions.append(sum(choices) / len(choices))
    assert make_answers(right, repeats).best_of(tries).value == pytest.approx(np.mean(fractions), abs=1e-12)


@given(repeats=st.integers(2, 10), data=st.data())
def test_more_tries_never_help_the_defense(repeats: int, data: st.DataObject) -> None:
    answers = make_answers(data.draw(st.lists(st.integers(0, repeats), min_size=1, max_size=9)), repeats)
    values = [answers.best_of(tries).value for tries in range(1, repeats + 1)]
    assert values[0] == pytest.approx(answers.accuracy().value)
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(values))


def test_majority_counts_a_tie_as_wrong() -> None:
    votes = np.array([[3, 2, 0], [2, 2, 1], [1, 3, 1], [2, 1, 2], [0, 5, 0]], dtype=np.int64)
    majority = Answers(votes, np.ones(5, dtype=np.int64)).majority()
    assert majority.value == 2 / 5
    assert (majority.low, majority.high) == wilson(2, 5)


def test_majority_ignores_how_the_wrong_answers_spread() -> None:
    votes = np.array([[3, 4, 3], [4, 4, 2], [6, 4, 0]], dtype=np.int64)
    assert Answers(votes, np.ones(3, dtype=np.int64)).majority().value == pytest.approx(1 / 3)


# paired tests


@pytest.mark.parametrize(("first", "second", "mean"), [([], [], 0.0), ([0.2], [0.5], 0.3), ([1.0], [0.0], -1.0)])
def test_a_paired_interval_of_fewer_than_two_examples_says_nothing(
    first: list[float], second: list[float], mean: float
) -> None:
    found = paired_interval(np.array(first), np.array(second))
    assert found == pytest.approx((mean, -1.0, 1.0))


def test_a_paired_interval_is_student_s() -> None:
    gaps = np.array([0.1, 0.3, 0.2, 0.6])
    low, high = t.interval(0.9, 3, gaps.mean(), gaps.std(ddof=1) / 2)
    assert paired_interval(np.zeros(4), gaps, 0.9) == pytest.approx((0.3, low, high))


def test_answers_differ_seldom_cries_wolf() -> None:
    """Two judges of one randomized defense at the 0.1 % level: at most 0.24 % false alarms in 5000 pairs."""
    generator = np.random.default_rng(3)
    alarms = 0
    for _ in range(5000):
        chance = generator.choice([0.0, 0.05, 0.5, 0.95, 1.0], 64, p=[0.3, 0.2, 0.2, 0.2, 0.1])
        alarms += answers_differ(generator.binomial(20, chance), generator.binomial(20, chance), 20, 20)
    assert alarms <= 12


def test_answers_differ_finds_a_gap_of_ten_points() -> None:
    generator = np.random.default_rng(4)
    found = 0
    for _ in range(300):
        chance = generator.uniform(0.1, 0.8, 64)
        found += answers_differ(generator.binomial(20, chance), generator.binomial(20, chance + 0.1), 20, 20)
    assert found >= 290


@pytest.mark.parametrize("n", [64, 1000])
def test_answers_of_others_differ_though_their_mean_does_not(n: int) -> None:
    """The same answers, handed to other examples: no accuracy changes, and none of them is that of its image."""
    generator = np.random.default_rng(6)
    chance = generator.choice([0.05, 0.95], n)
    first, second = generator.binomial(20, chance), generator.binomial(20, chance)
    assert not answers_differ(first, second, 20, 20)
    assert answers_differ(generator.permutation(first), second, 20, 20)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([20, 0], [20, 0], False),
        ([20, 0], [0, 20], True),
        ([20], [0], True),
        ([1], [0], False),
        ([2, 0], [0, 2], False),
    ],
)
def test_answers_differ_of_few_examples(first: list[int], second: list[int], expected: bool) -> None:
    assert answers_differ(np.array(first), np.array(second), 20, 20) is expected
    assert answers_differ(np.array(second), np.array(first), 20, 20) is expected


def test_a_small_move_of_every_chance_is_allowed() -> None:
    """As rounding to steps of 1/255 moves them: half a percent up or down, no mean moved."""
    generator = np.random.default_rng(7)
    chance = generator.uniform(0.3, 0.7, 1000)
    moved = chance + generator.choice([-0.005, 0.005], 1000)
    assert not answers_differ(generator.binomial(100, chance), generator.binomial(100, moved), 100, 100)


def draw_passes(
    generator: np.random.Generator, chances: npt.NDArray[np.float64], repeats: int
) -> npt.NDArray[np.bool_]:
    """Answers of passes that each draw one of several classifiers: `repeats b` from chances `classifiers b`."""
    chosen = chances[generator.integers(len(chances), size=repeats)]
    found: npt.NDArray[np.bool_] = generator.random(chosen.shape) < chosen
    return found


def voted(chances: Fractions, repeats: int, random: np.random.Generator) -> npt.NDArray[np.int64]:
    """Votes over four classes of which class 0 is right with a chance of its own, else mostly class 1."""
    others = np.outer(1 - chances, [0.7, 0.2, 0.1])
    return random.multinomial(repeats, np.column_stack([chances, others]))


def test_majorities_differ_seldom_cries_wolf() -> None:
    random = np.random.default_rng(0)
    labels = np.zeros(60, np.int64)
    cries = 0
    for _ in range(200):
        chances = random.beta(2, 2, 60)
        cries += majorities_differ(
            voted(chances, 20, random), voted(chances, 20, random), labels, level=0.05, splits=500
        )
    assert cries <= 20, "of 200 at one in twenty: 10 are expected, 21 in one of a thousand"


def test_majorities_differ_finds_wrong_answers_that_were_spread() -> None:
    """The right answers are the same; so `answers_differ` sees nothing."""
    random = np.random.default_rng(0)
    honest = voted(np.full(64, 0.4), 20, random)
    fresh = voted(np.full(64, 0.4), 20, random)
    spread = honest.copy()
    wrong = 20 - honest[:, 0]
    for place in range(3):
        spread[:, 1 + place] = wrong // 3 + (wrong % 3 > place)
    labels = np.zeros(64, np.int64)
    assert not majorities_differ(honest, fresh, labels)
    assert majorities_differ(spread, fresh, labels)
    assert not answers_differ(spread[:, 0], fresh[:, 0], 20, 20)


def test_independent_answers_share_no_noise() -> None:
    generator = np.random.default_rng(8)
    found = [
        shared_noise([draw_passes(generator, generator.uniform(0, 1, (1, 64)), 20) for _ in range(2)])
        for _ in range(2000)
    ]
    assert sum(one != INDEPENDENT for one in found) <= 8
    for few in ([np.ones((20, 5), dtype=np.bool_)], [np.ones((1, 5), dtype=np.bool_)], []):
        assert shared_noise(few) == INDEPENDENT


@pytest.mark.parametrize("repeats", [20, 100])
@pytest.mark.parametrize("kind", ["good and bad", "good at others"])
def test_the_noise_of_passes_that_draw_once_is_found_and_allowed(repeats: int, kind: str) -> None:
    """Nets that are drawn for a whole pass: the same defense is not accused, as it would be image by image."""
    generator = np.random.default_rng(9)
    accused = accused_before = found = 0
    for _ in range(400):
        if kind == "good and bad":
            chances = np.stack([generator.uniform(0.6, 1.0, 64), generator.uniform(0.1, 0.5, 64)])
        else:  # each about as often right, on other images
            chances = (generator.uniform(0, 1, (4, 64)) < 0.7).astype(float)
        first, second = (draw_passes(generator, chances, repeats) for _ in range(2))
        noise = shared_noise([second])
        found += noise != INDEPENDENT
        counts = first.sum(0), second.sum(0)
        accused += answers_differ(*counts, repeats, repeats, noise=noise)
        accused_before += answers_differ(*counts, repeats, repeats)
    assert found > 300
    assert accused <= 4
    assert accused_before > 4 * accused


def test_shared_noise_does_not_cover_a_claim_that_is_far_off() -> None:
    generator = np.random.default_rng(10)
    chances = np.stack([generator.uniform(0.6, 1.0, 256), generator.uniform(0.4, 0.8, 256)])
    passes = [draw_passes(generator, chances[:, start : start + 64], 100) for start in range(0, 256, 64)]
    right = np.concatenate([one.sum(0) for one in passes])
    noise = shared_noise(passes)
    assert noise.total > 1
    assert not answers_differ(right, right, 100, 100, noise=noise)
    assert answers_differ(np.minimum(right + 15, 100), right, 100, 100, noise=noise)
    assert answers_differ(generator.permutation(right), right, 100, 100, noise=noise)
