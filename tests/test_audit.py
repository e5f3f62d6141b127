"""The audit on toys with known answers: each planted fault is named by its check, a sound defense passes them all."""

from __future__ import annotations

import html
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jaxtyping
import numpy as np
import numpy.typing as npt
import pytest
import torch
from engine_toys import OneNoise, Prototypes, grid_images
from torch import Tensor

import robench
from robench import Defense, ThreatModel, UsageError
from robench.audit import CHECKS, Audit, audit, evidence
from robench.audit.checks import black_box
from robench.audit.checks.base import graded_share
from robench.audit.effort import REDUCED, USUAL, read_effort
from robench.audit.evidence import Evidence
from robench.audit.statistics import compare, compare_both_ways
from robench.bundle import check_audit
from robench.check_names import QUESTIONS, Verdict, overall
from robench.cli import main
from robench.data import Dataset, digest_data, load_dataset
from robench.errors import DataError
from robench.report.audit import render_audit, tell_verdict
from robench.rng import seeded
from robench.testing.decoys import PLANTED
from robench.types import Images, Logits

pytestmark = pytest.mark.usefixtures("one_thread")

HERE = Path(__file__)
THREAT = ThreatModel("linf", 0.05)
NEEDS_A_NET = ("input noise", "resize and pad", "logit noise", "hash of the input")
"""These do not hide a linear classifier's gradient, which is the same everywhere."""


@pytest.fixture(scope="module")
def data() -> Dataset:
    return load_dataset("fashion_mnist", "test", 64, 3)


def look(defense: Defense, data: Dataset, *checks: str) -> Audit:
    return audit(defense, THREAT, data, checks=checks)


# planted faults, and a defense without


@pytest.mark.parametrize("name", [name for name in PLANTED if name not in NEEDS_A_NET])
def test_planted_fault_is_named(name: str, data: Dataset) -> None:
    planted = PLANTED[name]
    decoy = planted.make(Prototypes(), data.x, THREAT.eps)
    found = look(decoy, data, *planted.checks)
    assert found.verdict == "masked", [finding.reason for finding in found.findings]
    assert set(found.failed) <= set(planted.checks)


def test_sound_defense_passes_every_check(data: Dataset) -> None:
    found = audit(Prototypes(), THREAT, data)
    assert [finding.check for finding in found.findings] == list(QUESTIONS)
    assert found.verdict == "pass", [(finding.check, finding.reason) for finding in found.findings]
    ran = {finding.check for finding in found.findings if finding.verdict != "not run"}
    assert set(QUESTIONS) - ran == {
        "double_draws",
        "gradient_modes",
        "draws",
        "fixed_draws",
        "retries",
        "gradient_noise",
    }
    assert found.accuracies["pgd"][0] < found.accuracies["clean"][0]


class Softmax(Prototypes):
    """Answers probabilities."""

    def forward(self, x: Images) -> Logits:
        return super().forward(x).softmax(1)


class Crowd(Prototypes):
    """Shifts its logits by the mean of the batch."""

    def forward(self, x: Images) -> Logits:
        logits = super().forward(x)
        return logits + logits.mean(0).roll(1)


class Memory(Prototypes):
    """Answers by the number of images it was asked about, which checks at the start do not see."""

    asked = 0

    def forward(self, x: Images) -> Logits:
        self.asked += len(x)
        logits = super().forward(x)
        return logits.roll(1, dims=1) if self.asked > 120 else logits


class Unordered(Prototypes):
    """Adds noise, and what no seed repeats: as little as a GPU that sums in another order, or more."""

    randomized = True
    unseeded = 1e-5

    def forward(self, x: Images) -> Logits:
        logits = super().forward(x)
        own = torch.rand(logits.shape, generator=_GENERATOR)
        return logits + 0.1 * torch.rand_like(logits) + self.unseeded * float(logits.abs().max()) * own


class Unseeded(Unordered):
    """More than that."""

    unseeded = 1e-2


_GENERATOR = torch.Generator().manual_seed(0)


class Shared(Prototypes):
    """Noise on the logits, of which all draws share the layers before."""

    randomized = True

    def forward(self, x: Images) -> Logits:
        logits = super().forward(x)
        return logits + 0.1 * torch.rand_like(logits)

    def forward_draws(self, x: Images, draws: int) -> Tensor:
        logits = super().forward(x).repeat(draws, 1, 1)
        return logits + 0.1 * torch.rand_like(logits)


class Quieter(Shared):
    """Shows the attacks less noise than it has."""

    def forward_draws(self, x: Images, draws: int) -> Tensor:
        return self(x).repeat(draws, 1, 1)


class Flat(Shared):
    """Forgets the axis of the draws."""

    def forward_draws(self, x: Images, draws: int) -> Tensor:
        return self(x.repeat(draws, 1, 1, 1))


class Optimises(Prototypes):
    """Takes a gradient of its own to answer, and says nothing of it."""

    def forward(self, x: Images) -> Logits:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            (grad,) = torch.autograd.grad(super().forward(leaf).logsumexp(1).sum(), leaf)
        return super().forward(x + 0.01 * grad)


class Declares(Optimises):
    """The same, with a path of its own."""

    def adaptive_forward(self, x: Images, mode: str | None = None) -> Logits:
        self.check_mode(mode)
        return self(x)


@pytest.mark.parametrize(
    ("cls", "check", "verdict", "words"),
    [
        (Softmax, "contract", "suspect", "probabilities"),
        (Crowd, "contract", "fail", "in a batch"),
        (Memory, "contract", "fail", "later"),
        (Unordered, "contract", "pass", "repeat under one seed"),
        (Unseeded, "contract", "fail", "one seed gives two answers"),
        (Shared, "contract", "pass", "repeat under one seed"),
        (Quieter, "contract", "fail", "forward_draws"),
        (Flat, "contract", "fail", "forward_draws"),
        (Prototypes, "contract", "pass", "own answer"),
        (Optimises, "inference_time", "suspect", "says nothing"),
        (Declares, "inference_time", "pass", "offers full"),
        (Prototypes, "inference_time", "pass", "no gradient"),
    ],
)
def test_contract_and_inference_time(cls: type[Defense], check: str, verdict: str, words: str, data: Dataset) -> None:
    before = torch.autograd.grad
    (finding,) = look(cls(), data, check).findings
    assert (finding.verdict, words in finding.reason) == (verdict, True), finding.reason
    assert torch.autograd.grad is before


class NoisyDraw(Prototypes):
    """Each pixel is seen by chance one time in twelve: one draw's gradient says little of the next one's."""

    name = "noisy_draw"
    randomized = True

    def forward(self, x: Images) -> Logits:
        seen = torch.rand(len(x), 1, 4, 4, device=x.device) < 1 / 4
        cells = torch.nn.functional.avg_pool2d(x, 7)
        return self.classify((0.4 + 4 * seen * (cells - 0.4)).flatten(1))


def test_noise_in_the_gradient_is_told(data: Dataset) -> None:
    """The more draws, the more two gradients agree; a deterministic defense has no such check."""
    (finding,) = look(NoisyDraw(), data, "gradient_noise").findings
    assert finding.plot is not None
    (curve,) = finding.plot.curves
    assert list(curve.y) == sorted(curve.y)
    assert curve.y[0] < curve.y[-1]
    (other,) = look(Prototypes(), data, "gradient_noise").findings
    assert (other.verdict, other.reason) == ("not run", "the defense is deterministic")


class Coin(Prototypes):
    """Answers with the logits of the next class by chance, `wrong` of the time."""

    randomized = True
    wrong = 0.1

    def forward(self, x: Images) -> Logits:
        logits = super().forward(x)
        return torch.where(torch.rand(len(x), 1, device=x.device) < self.wrong, logits.roll(1, dims=1), logits)


class Rare(Coin):
    """The same, once in five hundred."""

    wrong = 0.002


def test_losses_are_a_mean_over_draws_of_their_own() -> None:
    """One pass of all draws would be one draw."""
    x, y = grid_images(3)
    defense = OneNoise()
    found = Evidence(defense, THREAT, Dataset("", "", x, y, torch.arange(3), (), digest_data(x, y)), 0, "cpu", USUAL)
    with seeded(0, "audit", "gradient"):
        expected = torch.stack([defense(x)[:, 0] for _ in range(4)]).mean(0)
    losses = found.losses(x, y, lambda logits, _: logits[:, 0], draws=4)
    assert np.allclose(losses, expected, atol=1e-6)


def test_answers_that_a_retry_changes_are_told(data: Dataset) -> None:
    """Of images that are right nine times of ten, five tries leave 0.9 ** 5 = 59 %."""
    (finding,) = look(Coin(), data, "retries").findings
    clean = look(Prototypes(), data, "null_control").accuracies["clean"][0] / 100
    assert finding.verdict == "fail"
    assert finding.statistic == pytest.approx(clean * (0.9 - 0.9**5), abs=0.06)
    (rare,) = look(Rare(), data, "retries").findings
    assert rare.verdict == "pass"
    (other,) = look(Prototypes(), data, "retries").findings
    assert other.verdict == "not run"


class Lured(Prototypes):
    """Right at the image and far from it, wrong at a distance of 0.01 to 0.04: what one step alone teaches."""

    def __init__(self, known: Images) -> None:
        super().__init__()
        self.known = known

    def forward(self, x: Images) -> Logits:
        logits = super().forward(x)
        distance = torch.cdist(x.flatten(1), self.known.flatten(1), p=torch.inf).amin(1)
        inside = (distance > 0.01) & (distance < 0.04)
        return torch.where(inside[:, None], logits.roll(1, dims=1), logits)


def test_a_step_over_wrong_images_is_told(data: Dataset) -> None:
    (finding,) = look(Lured(data.x), data, "distortion").findings
    assert (finding.verdict, finding.statistic) == ("fail", 1.0)
    assert finding.plot is not None
    (curve,) = finding.plot.curves
    assert min(curve.y) < 10 < curve.y[-1] <= curve.y[0]
    (sound,) = look(Prototypes(), data, "distortion").findings
    assert (sound.verdict, sound.statistic) == ("pass", 0.0)


class Scaled(Prototypes):
    """Its gradient has a factor of its own at each image, up to `factor`."""

    factor = 10.0
    same = True

    def adaptive_forward(self, x: Images, mode: str | None = None) -> Logits:
        self.check_mode(mode)
        logits = self(x)
        scale = self.factor ** (1 if self.same else x.detach().mean((1, 2, 3)).mul(1e3).sin())
        return logits.detach() + (logits - logits.detach()) * torch.as_tensor(scale).reshape(-1, 1)


class Erratic(Scaled):
    """Another factor at each image."""

    same = False


def test_a_gradient_may_have_a_factor_but_not_another_one_everywhere(data: Dataset) -> None:
    """A constant factor misleads no attack, and is told; a factor of a tenth here and ten there is none."""
    (scaled,) = look(Scaled(), data, "finite_differences").findings
    assert (scaled.verdict, "0.10 times" in scaled.reason) == ("suspect", True), scaled.reason
    (erratic,) = look(Erratic(), data, "finite_differences").findings
    assert erratic.verdict == "fail", erratic.reason
    (sound,) = look(Prototypes(), data, "finite_differences").findings
    assert sound.statistic == pytest.approx(0, abs=0.05)


class Rounded(Prototypes):
    """Rounds the pixels to black and white, and offers the identity in the place of that step."""

    steps = 1

    def forward(self, x: Images) -> Logits:
        return super().forward((self.steps * x).round() / self.steps)

    def adaptive_forward(self, x: Images, mode: str | None = None) -> Logits:
        self.check_mode(mode)
        return super().forward(x)


class Misled(Rounded):
    """Offers the opposite direction, and has finer steps, which an attack passes."""

    steps = 4

    def adaptive_forward(self, x: Images, mode: str | None = None) -> Logits:
        return -super().adaptive_forward(x, mode)


def test_a_stand_in_for_a_step_is_no_masking_but_one_that_misleads_is(data: Dataset) -> None:
    """It is no derivative of what is judged, on purpose; what it is worth, attacks without gradients tell."""
    checks = ("finite_differences", "square", "noise")
    found = look(Rounded(), data, *checks)
    (finding, *_) = found.findings
    assert (finding.verdict, "stands in" in finding.reason) == ("suspect", True), finding.reason
    assert found.verdict == "suspect"
    misled = look(Misled(), data, *checks)
    assert misled.verdict == "masked"
    assert "square" in misled.failed


class Shaken(Prototypes):
    """Noise on the images that is larger than what tells the constructed point from the others."""

    randomized = True

    def forward(self, x: Images) -> Logits:
        return super().forward(x + 0.1 * torch.randn_like(x))


def test_noise_that_hides_the_constructed_point_is_no_masking(data: Dataset) -> None:
    (finding,) = look(Shaken(), data, "binarisation").findings
    assert (finding.verdict, "separate the boundary point" in finding.reason) == ("not run", True), finding.reason
    (sound,) = look(Prototypes(), data, "binarisation").findings
    assert sound.verdict == "pass"


class Drawn(Evidence):
    """Counted answers of a randomized defense: under each gradient attack by one chance, under square `gap` below."""

    gap = 0.0
    draw = 0

    def applies(self, name: str) -> str:
        return ""

    def right(self, name: str) -> npt.NDArray[np.float64]:
        numbers = np.random.Generator(np.random.PCG64([self.draw, *name.encode()]))
        chance = np.linspace(0.1, 0.9, 128) - (self.gap if name == "square" else 0)
        return numbers.binomial(20, chance) / 20


@pytest.mark.parametrize(("gap", "verdict"), [(0.0, "pass"), (2 * black_box.TOLERANCE, "fail")])
def test_a_gap_to_black_box_attacks_is_told_through_noise(gap: float, verdict: Verdict, data: Dataset) -> None:
    """Twice the tolerance fails, no gap passes, in most of 40 audits with 20 answers on each of 128 images."""
    drawn = Drawn(Coin(), THREAT, data, 0, "cpu", USUAL)
    drawn.gap = gap
    verdicts, statistics = [], np.zeros(40)
    for drawn.draw in range(len(statistics)):
        outcome = CHECKS["square"].judge(drawn)
        verdicts.append(outcome.verdict)
        statistics[drawn.draw] = outcome.statistic
    assert verdicts.count(verdict) >= 30, verdicts
    assert statistics.mean() == pytest.approx(gap, abs=0.015)  # the strongest of three is low by chance, a little


# statistics


def test_compare_is_mcnemars_exact_test_on_answers() -> None:
    """Eight images of 20 differ, seven one way: P(at least 7 of 8) = 9 / 256."""
    larger, smaller = np.ones(20), np.ones(20)
    smaller[:7], larger[7] = 0, 0
    gap = compare(larger, smaller)
    assert gap.mean == pytest.approx(6 / 20)
    assert gap.p == pytest.approx(9 / 256)
    assert gap.low < gap.mean < gap.high
    assert gap.verdict(0.3) == "suspect"
    assert compare(smaller, larger).verdict(0.3) == "pass"


@pytest.mark.parametrize(("differ", "seen"), [(5, False), (6, True)])
def test_the_interval_holds_0_where_mcnemars_test_sees_nothing(differ: int, seen: bool) -> None:
    """Of two sides 2 / 2^5 is above 0.05, 2 / 2^6 below, where Student's interval leaves 0 out for both."""
    larger, smaller = np.ones(20), np.ones(20)
    smaller[:differ] = 0
    assert (compare(larger, smaller).low > 0) == seen
    assert (compare(smaller, larger).high < 0) == seen


def test_compare_of_shares_is_students_paired_test() -> None:
    from scipy.stats import ttest_rel

    rng = np.random.Generator(np.random.PCG64(1))
    first, second = rng.random(30), rng.random(30)
    gap, test = compare(first, second), ttest_rel(first, second)
    assert gap.p == pytest.approx(ttest_rel(first, second, alternative="greater").pvalue)
    interval = test.confidence_interval()
    assert (gap.low, gap.high) == pytest.approx((interval.low, interval.high))  # no wider than the test that judges
    for both in (compare_both_ways(first, second), compare_both_ways(second, first)):
        assert (both.p, both.mean) == pytest.approx((test.pvalue, abs(gap.mean)))


def test_equal_answers_are_no_gap_and_few_images_say_so() -> None:
    gap = compare(np.ones(20), np.ones(20))
    assert (gap.mean, gap.p, gap.verdict(0.05)) == (0.0, 1.0, "pass")
    assert gap.low < 0 < gap.high
    assert "20 images cannot tell a gap under 40 points, 160 would tell 5" in gap.power(0.05)
    assert compare(np.ones(160), np.ones(160)).power(0.05) == ""


def test_few_images_of_shares_say_what_students_test_cannot_tell() -> None:
    """16 gaps of 0.5 either way: standard error 0.5 * sqrt(16 / 15) / 4 = 0.129, times 2.947 (t at 0.995, 15) 38.0."""
    larger, smaller = np.tile([1.0, 0.5], 8), np.tile([0.5, 1.0], 8)
    assert "16 images cannot tell a gap under 38 points, 232 would tell 10" in compare(larger, smaller).power(0.1)
    assert compare(larger, smaller).power(0.4) == ""
    assert compare(larger[:1], smaller[:1]).power(0.1) == ""


def test_a_large_gap_on_few_images_is_not_called_a_failure() -> None:
    larger, smaller = np.ones(8), np.ones(8)
    smaller[:4] = 0
    assert compare(larger, smaller).verdict(0.1) == "pass"  # 4 of 4: 1 in 16 by chance
    smaller[:8] = 0
    assert compare(larger, smaller).verdict(0.1) == "fail"


@pytest.mark.parametrize(
    ("hits", "n", "thresholds", "high_is_bad", "verdict"),
    [
        (1, 10, (0.02, 0.1), True, "suspect"),  # Wilson from 1.8 %
        (13, 128, (0.02, 0.1), True, "fail"),  # from 6.0 %
        (3, 128, (0.02, 0.1), True, "suspect"),
        (2, 4, (0.75, 0.5), False, "suspect"),  # to 85 %
        (16, 32, (0.75, 0.5), False, "fail"),  # to 66 %
        (30, 32, (0.75, 0.5), False, "pass"),
    ],
)
def test_a_share_fails_beyond_noise_only(
    hits: int, n: int, thresholds: tuple[float, float], high_is_bad: bool, verdict: str
) -> None:
    share, found = graded_share(np.arange(n) < hits, *thresholds, high_is_bad=high_is_bad)
    assert (share, found) == (hits / n, verdict)


class Dead(Prototypes):
    """Has no gradient where the image's first pixel is lit, and answers as ever."""

    def adaptive_forward(self, x: Images, mode: str | None = None) -> Logits:
        self.check_mode(mode)
        logits = super().forward(x)
        return torch.where(x.detach()[:, 0, 0, :1] > 0.5, logits.detach() + 0 * logits, logits)


@pytest.mark.parametrize(("n", "dead", "verdict"), [(10, 1, "suspect"), (60, 6, "fail")])
def test_one_dead_gradient_of_ten_is_not_yet_a_failure(n: int, dead: int, verdict: str, data: Dataset) -> None:
    x = data.x[:n].clone()
    x[:, :, 0, 0] = (torch.arange(n) < dead)[:, None].float()
    (finding,) = audit(Dead(), THREAT, (x, data.y[:n]), checks=["zero_gradients"]).findings
    assert (finding.verdict, finding.statistic) == (verdict, dead / n)


def test_overall_verdict() -> None:
    assert overall({"pass", "suspect", "fail"}) == "masked"
    assert overall({"pass", "suspect", "not run"}) == "suspect"
    assert overall({"pass", "not run"}) == "pass"
    assert overall({"not run"}) == "suspect"


# runs


def test_runs_are_shared_and_taken_up_again(data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    inner = evidence.evaluate

    def count(defense: Defense, attack: str, *args: Any, **settings: Any) -> Any:
        done.append(f"{attack} {'again' if settings.get('resume') else 'new'}")
        return inner(defense, attack, *args, **settings)

    monkeypatch.setattr(evidence, "evaluate", count)
    wanted = ("single_step", "double_restarts", "loss_choice")
    first = audit(Prototypes(), THREAT, data, checks=wanted, out=tmp_path)
    assert sorted(done) == [
        "fgsm new",
        "fgsm new",  # of bound 0
        "pgd(steps=20) new",
        "pgd(steps=20, loss='margin') new",
        "pgd(steps=20, restarts=2) new",
    ]
    done.clear()
    again = audit(Prototypes(), THREAT, data, checks=wanted, out=tmp_path)
    assert all(one.endswith("again") for one in done)
    assert [one.statistic for one in again.findings] == [one.statistic for one in first.findings]


def test_the_seed_decides(data: Dataset) -> None:
    def statistic(seed: int) -> float | None:
        return audit(Prototypes(), THREAT, data, seed=seed, checks=["stability"]).findings[0].statistic

    assert statistic(1) == statistic(1)
    assert statistic(1) != statistic(2)


class Costly(Prototypes):
    """Names a cheaper first look of its own, though a pass of it costs nothing."""

    first_look = {"n": 32}  # noqa: RUF012 - a constant; the base declares the type


def test_the_effort_that_a_defense_asks_for_is_told(data: Dataset) -> None:
    checks = ("stability", "binarisation", "distortion")
    reduced, usual = look(Costly(), data, *checks), look(Prototypes(), data, *checks)
    assert read_effort(reduced.to_json()) == REDUCED
    assert read_effort(usual.to_json()) == USUAL
    words = "made with reduced effort, as the defense asks for: 8 steps of PGD (usual: 20), 30 queries of square (usual"
    assert words in render_audit(reduced)
    assert "made with the usual effort" in render_audit(usual)
    assert [one.verdict for one in reduced.findings if one.check == "binarisation"] == ["not run"]
    assert [len(one.plot.curves[0].x) for one in reduced.findings if one.plot] == [5]


def test_an_audit_from_before_efforts_were_told_is_read(data: Dataset) -> None:
    content = json.loads(json.dumps(look(Prototypes(), data, "stability").to_json()))
    assert check_audit(json.dumps(content).encode(), HERE) == content
    for wrong in ({"steps": 20}, 20, {**content["effort"], "steps": "<b>"}, {**content["effort"], "luck": 1}):
        with pytest.raises(DataError, match="Run the audit again"):
            check_audit(json.dumps({**content, "effort": wrong}).encode(), HERE)
    del content["effort"]
    assert read_effort(check_audit(json.dumps(content).encode(), HERE)) is None


def test_public_name_is_the_function(data: Dataset) -> None:
    found = robench.audit(Prototypes(), THREAT, (data.x, data.y), n=10, checks=["zero_gradients"])
    assert (found.n, found.verdict) == (10, "pass")
    assert set(CHECKS) == set(QUESTIONS)


@pytest.mark.parametrize(
    ("threat", "checks", "message"),
    [
        (ThreatModel("l1", 3), None, "the audit takes linf, l2 "),
        (ThreatModel("linf", 0), None, "an eps above 0"),
        (THREAT, ["sqare"], 'there is no check "sqare"'),
    ],
)
def test_wrong_input(threat: ThreatModel, checks: list[str] | None, message: str, data: Dataset) -> None:
    with pytest.raises(UsageError, match=message):
        audit(Prototypes(), threat, data, checks=checks)


@pytest.mark.parametrize("setting", [{"n": 0}, {"n": -3}, {"eot": 0}])
def test_no_images_and_no_draws_are_refused(setting: dict[str, Any], data: Dataset) -> None:
    with pytest.raises(UsageError, match="must be at least 1"):
        audit(Prototypes(), THREAT, data, **setting)


@pytest.fixture
def untyped() -> Iterator[None]:
    """The program as users have it: without type checks."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"defense": "convnet"}, "load it with robench.load_defense"),
        ({"defense": torch.nn.Flatten()}, "the module Flatten; robench.wrap"),
        ({"threat": "linf"}, "threat must be a ThreatModel"),
        ({"threat": [THREAT, ThreatModel("linf", 0.1)]}, "an audit is of one bound; got 2"),
        ({"data": torch.rand(4, 1, 28, 28)}, "a pair of images and labels; got Tensor"),
        ({"n": "8"}, "n must be a whole number; got '8'"),
        ({"seed": 0.5}, "seed must be a whole number"),
        ({"checks": "null control"}, 'there is no check "null control"'),
    ],
)
@pytest.mark.usefixtures("untyped")
def test_what_evaluate_explains_is_explained(given: dict[str, Any], message: str, data: Dataset) -> None:
    with pytest.raises(UsageError, match=message):
        audit(**{"defense": Prototypes(), "threat": THREAT, "data": data, **given})


def test_what_evaluate_takes_is_taken(data: Dataset) -> None:
    pair = data.x.numpy(), data.y.tolist()
    found = audit(Prototypes(), [THREAT], pair, n=8, checks="contract, noise")
    assert [finding.check for finding in found.findings] == ["contract", "noise"]
    assert (found.n, found.threat) == (8, str(THREAT))


def test_a_first_look_cuts_a_pair_but_asks_for_no_more(data: Dataset) -> None:
    defense = Prototypes()
    for look, expected in ((5, 5), (80, 64)):
        defense.first_look = {"n": look}
        assert audit(defense, THREAT, (data.x, data.y), checks="contract").n == expected


def test_l2(data: Dataset) -> None:
    found = audit(Prototypes(), ThreatModel("l2", 0.5), data, checks=["zero_gradients", "unbounded", "loss_surface"])
    assert found.verdict == "pass", [finding.reason for finding in found.findings]
    assert found.accuracies["pgd, unbounded"][0] == 0


# command and report


def call(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["robench", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0)


def test_command_writes_json_and_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    toy = f"{HERE.with_name('engine_toys.py')}:Prototypes"
    words = ("audit", "--defense", toy, "--n", 20, "--checks", "pgd,stability", "--out", tmp_path)
    assert call(monkeypatch, *words) == 2
    assert "there is no check" in capsys.readouterr().err
    words = ("audit", "--defense", toy, "--n", 20, "--checks", "double_steps,loss_surface", "--out", tmp_path)
    assert call(monkeypatch, *words, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["verdict"] == "pass"
    assert [finding["check"] for finding in found["findings"]] == ["double_steps", "loss_surface"]
    stored = json.loads((tmp_path / "audit-partial.json").read_text())
    assert stored["findings"] == found["findings"]
    page = (tmp_path / "audit-partial.html").read_text()
    assert page.count("data:image/svg+xml") == 2
    assert "data:image/png" in page
    assert "http" not in page.replace("http://www.w3.org", "")  # nothing is fetched
    assert call(monkeypatch, *words) == 0
    out = capsys.readouterr().out
    assert "verdict: pass" in out
    assert "audit-partial.html" in out


def test_an_audit_from_python_writes_its_report_and_prints_as_one_line(data: Dataset, tmp_path: Path) -> None:
    found = audit(Prototypes(), THREAT, (data.x[:20], data.y[:20]), checks="double_steps", out=tmp_path)
    assert json.loads((tmp_path / "audit-partial.json").read_text())["verdict"] == found.verdict
    assert (tmp_path / "audit-partial.html").is_file()
    assert re.fullmatch(
        r"audit of prototypes on images of the caller, 20 images, linf eps=0.05; verdict pass; "
        r"clean [\d.]+ % \[[\d., ]+\]; fgsm [\d.]+ % .*; pgd [\d.]+ % \[[\d., ]+\]",
        str(found),
    )


def test_page_escapes_what_comes_from_outside(data: Dataset) -> None:
    hostile = Prototypes()
    hostile.name = "<script>alert(1)</script>"
    page = render_audit(look(hostile, data, "zero_gradients"))
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


def test_masked_is_explained_by_what_failed(data: Dataset) -> None:
    """A defense with a memory is no matter of gradients."""
    found = look(Memory(), data, "contract", "zero_gradients")
    assert found.failed == ["contract"]
    assert tell_verdict(found).startswith("masked. The defense breaks the contract")
    found = look(PLANTED["rounding"].make(Prototypes(), data.x, THREAT.eps), data, "zero_gradients")
    assert tell_verdict(found).startswith("masked. The usual attacks report too much")


def test_an_audit_of_shifted_labels_has_a_note(data: Dataset) -> None:
    found = audit(Prototypes(), THREAT, (data.x[:32], (data.y[:32] + 1) % 10), checks="zero_gradients")
    (note,) = found.to_json()["notes"]
    assert "about that of guessing" in note
    assert note in tell_verdict(found)
    assert html.escape(note) in render_audit(found)
    assert "notes" not in look(Prototypes(), data, "zero_gradients").to_json()


def test_interrupt_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*args: Any, **settings: Any) -> Tensor:
        raise KeyboardInterrupt

    monkeypatch.setattr(evidence, "evaluate", stop)
    toy = f"{HERE.with_name('engine_toys.py')}:Prototypes"
    assert call(monkeypatch, "audit", "--defense", toy, "--n", 10, "--out", tmp_path) == 130
    assert f"the same command with --out {tmp_path} goes on" in capsys.readouterr().err


def test_attack_that_fails_leaves_its_checks_not_run(data: Dataset) -> None:
    """Without any gradient the gradient attacks fail; what rests on them says so, and what finds it fails."""
    decoy = PLANTED["thermometer code"].make(Prototypes(), data.x, THREAT.eps)
    found = look(decoy, data, "single_step", "zero_gradients", "unbounded", "square")
    verdicts = {finding.check: finding.verdict for finding in found.findings}
    assert verdicts.pop("zero_gradients") == "fail"
    assert verdicts == dict.fromkeys(("single_step", "unbounded", "square"), "not run")
    assert "no attack with gradients could be run to compare with; the score attack" in found.findings[-1].reason
