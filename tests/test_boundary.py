"""The boundary attack, and what all that see labels only share: the oracle, the start, the bisection, the end."""

from __future__ import annotations

import math
import subprocess
import sys

import foolbox
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from robench import Attack, ThreatModel, UsageError, Victim
from robench.attacks.boundary import LOOK_EVERY, RETREAT, Boundary, Walk, adapt, draw_nearer, turn
from robench.attacks.hopskipjump import HopSkipJump
from robench.bridges.foolbox import adopt
from robench.bridges.foreign import show
from robench.decisions import Oracle, bisect, draw_noise, start_search
from robench.defense import Defense
from robench.rng import seeded
from robench.testing.attacks import SpyVictim, attack_once, count_errors, linear_case
from robench.testing.toys import REACH, NoisyLinearToy
from robench.types import Images, Labels, Logits

QUERIES = 1000


def ratios(found: Tensor, x: Tensor) -> Tensor:
    """Distance found over the known one."""
    return ThreatModel("l2", 1).distance(x, found) / REACH["l2"]


def test_comes_near_the_known_distance() -> None:
    defense, x, y = linear_case("l2")
    found = attack_once(Boundary(queries=QUERIES), defense, x, y, ThreatModel("l2", 4 * REACH["l2"]))
    assert count_errors(defense, found, y) == len(x)
    reached = ratios(found, x)
    assert float(reached.min()) >= 1
    assert float(reached.max()) <= 1.1
    assert float(reached.median()) <= 1.005


def test_what_is_too_far_stays_the_original() -> None:
    defense, x, y = linear_case("l2")
    found = attack_once(Boundary(queries=300), defense, x, y, ThreatModel("l2", 0.99 * REACH["l2"]))
    assert torch.equal(found, x)


@pytest.mark.parametrize("queries", [10, 15, 100, 301])
def test_queries_are_the_most_that_is_asked(queries: int) -> None:
    defense, x, y = linear_case("l2")
    victim = SpyVictim(defense, "decisions", len(x))
    with seeded("queries"):
        Boundary(queries=queries)(victim, x, y, ThreatModel("l2", 1))
    spent = int(victim.ledger.forwards.max())
    assert spent <= queries
    assert queries < 100 or spent > 0.97 * queries, "and not much less"
    assert victim.used == {"decisions"}


def test_noisy_defense_is_attacked_to_the_end() -> None:
    defense = NoisyLinearToy(sigma=0.5)
    x, y = defense.examples(8, "l2")
    threat = ThreatModel("l2", 4 * REACH["l2"])
    victim = Victim(defense, "decisions", 8, eot=5)
    with seeded("noisy"):
        found = Boundary(queries=QUERIES)(victim, x, y, threat)
    assert bool(threat.contains(x, found).all())
    assert 0.97 * QUERIES * 5 < int(victim.ledger.forwards.max()) <= QUERIES * 5
    before, after = (defense.probability_right(images, y).mean() for images in (x, found))
    assert float(after) < 0.5 < 0.95 < float(before)


def test_noisy_defense_is_wrong_more_often_than_not_near_the_known_distance() -> None:
    """Foolbox's walk ended at 2.1 times the distance, where the answer was right with a probability of 0.59."""
    defense = NoisyLinearToy(sigma=0.5)
    x, y = defense.examples(24, "l2")
    victim = Victim(defense, "decisions", 24, eot=5)
    with seeded("walk on"):
        found = Boundary(queries=QUERIES)(victim, x, y, ThreatModel("l2", 4 * REACH["l2"]))
    assert float(defense.probability_right(found, y).mean()) < 0.45
    assert float(ratios(found, x).median()) < 2


def test_walk_comes_back_to_where_a_noisy_defense_is_wrong() -> None:
    """Half-way to the boundary every candidate is right, so that a walk which trusts its incumbent stays for ever."""
    defense = NoisyLinearToy(sigma=0.5)
    x, y = defense.examples(8, "l2")
    other = defense.examples(8, "l2")[0][torch.arange(8) - 1]  # of another class
    lucky = x + 0.5 * REACH["l2"] * functional.normalize((other - x).flatten(1)).view_as(x)
    oracle = Oracle(Victim(defense, "decisions", 8, eot=5), y, 300)
    walk = Walk.begin(x, lucky, 1e-4, 1e-4)
    with seeded("back"):
        for step in range(150):
            walk.step(oracle, looks=step % LOOK_EVERY == 0)
    before, after = (defense.probability_right(images, y) for images in (lucky, walk.x_adv))
    assert float(before.min()) > 0.95
    assert float(after.max()) < 0.9
    assert float(after.mean()) < 0.75


def test_ends_when_all_images_have_converged() -> None:
    defense, x, y = linear_case("l2", 4)
    victim = Victim(defense, "decisions", 4)
    with seeded("converge"):
        found = Boundary(queries=20_000)(victim, x, y, ThreatModel("l2", 1))
    assert int(victim.ledger.forwards.max()) < 5000
    assert float(ratios(found, x).max()) < 1.005


def test_is_listed_without_the_package() -> None:
    """Foolbox takes a second to import; `robench list attacks --norm l2` imports the attack's file."""
    code = "import sys, robench.attacks.boundary; sys.exit('foolbox' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    "options", [{"queries": 9}, {"spherical_step": 0.0}, {"source_step": 1.0}, {"source_step": float("nan")}]
)
def test_options_out_of_range(options: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=next(iter(options))):
        Boundary(**options)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.reference
def test_nearer_than_foolbox_in_as_many_queries() -> None:
    """The step sizes adapt in time: foolbox's, with its defaults, are looked at every tenth step."""
    defense, x, y = linear_case("l2")
    victim = SpyVictim(defense, "decisions", len(x))
    with seeded("peer"):
        theirs = foolbox.attacks.BoundaryAttack(steps=900).run(adopt(show(victim, "decisions", x)), x, y)
    victim.closing.remove()
    assert int(victim.ledger.forwards.max()) >= QUERIES
    ours = attack_once(Boundary(queries=QUERIES), defense, x, y, ThreatModel("l2", 4))
    assert float(ratios(ours, x).median()) < 0.7 * float(ratios(theirs, x).median())


# one step of the walk


class Threshold(Defense):
    """Class 1 where the first of two pixels is at least `least`, class 0 elsewhere."""

    name = "threshold"
    num_classes = 2
    input_shape = (1, 1, 2)

    def __init__(self, least: float, *, randomized: bool) -> None:
        super().__init__()
        self.least = least
        self.randomized = randomized

    def forward(self, x: Images) -> Logits:
        over = x[:, 0, 0, 0] - self.least
        return torch.stack([-over, over], dim=1)


def take_step(least: float, *, looks: bool, randomized: bool) -> tuple[Walk, Oracle]:
    """A step of 0.75 around and 0.25 inward from (0.9, 0.5), which lies 0.4 from the original (0.5, 0.5).

    At equal distance the candidate is (0.82, 0.5 +- 0.24), drawn nearer (0.74, 0.5 +- 0.18).
    """
    victim = Victim(Threshold(least, randomized=randomized).freeze(), "decisions", 1)
    oracle = Oracle(victim, torch.tensor([0]), 10)
    walk = Walk.begin(torch.full((1, 1, 1, 2), 0.5), torch.tensor([0.9, 0.5]).view(1, 1, 1, 2), 0.75, 0.25)
    with seeded("step"):
        walk.step(oracle, looks=looks)
    return walk, oracle


@pytest.mark.parametrize("randomized", [False, True])
@pytest.mark.parametrize(
    ("least", "looks", "place", "sphere_wrong", "nearer_wrong"),
    [
        (0.7, False, (0.74, 0.18), None, True),
        (0.7, True, (0.74, 0.18), True, True),
        (0.8, False, (0.9, 0.0), None, False),
        (0.8, True, (0.82, 0.24), True, False),
        (0.85, True, (0.9, 0.0), False, False),
    ],
)
def test_one_step(
    least: float,
    looks: bool,
    place: tuple[float, float],
    sphere_wrong: bool | None,
    nearer_wrong: bool,
    randomized: bool,
) -> None:
    walk, oracle = take_step(least, looks=looks, randomized=randomized)
    assert walk.x_adv[0, 0, 0, 0].item() == pytest.approx(place[0])
    assert (walk.x_adv[0, 0, 0, 1] - 0.5).abs().item() == pytest.approx(place[1], abs=1e-6)
    around = 0.0 if sphere_wrong is None else 0.3 * (sphere_wrong - 0.3)
    assert walk.around.item() == pytest.approx(0.75 * math.exp(around))
    assert walk.inward.item() == pytest.approx(min(0.25 * math.exp(around + 0.3 * (nearer_wrong - 0.2)), 0.5))
    assert walk.outward.item() == pytest.approx(RETREAT)
    assert oracle.left == 10 - (1 + looks + (looks and randomized)), "the incumbent is asked where the defense draws"


def test_an_incumbent_that_is_right_moves_outward_ever_faster() -> None:
    walk, oracle = take_step(0.95, looks=True, randomized=True)
    assert walk.x_adv.flatten().tolist() == pytest.approx([0.5 + 0.4 * 1.02, 0.5])
    walk.step(oracle, looks=True)
    assert walk.x_adv.flatten().tolist() == pytest.approx([0.5 + 0.4 * 1.02 * 1.04, 0.5])
    assert walk.outward.item() == pytest.approx(0.08)
    walk.step(oracle, looks=False)
    assert walk.outward.item() == pytest.approx(0.08), "nothing was asked"
    walk.step(oracle, looks=True)
    assert walk.x_adv[0, 0, 0, 0].item() == pytest.approx(0.5 + 0.4 * 1.02 * 1.04 * 1.08)
    assert float(walk.x_adv[0, 0, 0, 0]) >= 0.95
    walk.step(Oracle(oracle.victim, oracle.y, 3), looks=True)
    assert walk.outward.item() == pytest.approx(RETREAT), "wrong again"
    walk, _ = take_step(0.95, looks=True, randomized=False)
    assert walk.x_adv.flatten().tolist() == pytest.approx([0.9, 0.5]), "what a defense without draws said holds"


def test_turn_keeps_the_distance_and_has_a_direction_for_each_image() -> None:
    x = torch.full((2, 3, 8, 8), 0.5)
    delta = torch.linspace(-0.1, 0.1, 192).view(1, 3, 8, 8).expand(2, -1, -1, -1)
    around = torch.tensor([0.1, 2.0])
    with seeded("turn"):
        sphere = turn(x, x + delta, around)
        equal = turn(x, x + delta, torch.full((2,), 0.3))
    distance = delta.flatten(1).norm(dim=1)
    torch.testing.assert_close((sphere - x).flatten(1).norm(dim=1), distance)
    cosine = functional.cosine_similarity((sphere - x).flatten(1), delta.flatten(1))
    torch.testing.assert_close(cosine, 1 / (1 + around**2).sqrt())
    aside = (equal - x - delta / math.sqrt(1.09)).flatten(1)
    assert abs(float(functional.cosine_similarity(aside[:1], aside[1:]))) < 0.3, "equal images, other directions"
    nearer = draw_nearer(x, x + delta, sphere, torch.tensor([0.25, 0.5]))
    torch.testing.assert_close((nearer - x).flatten(1).norm(dim=1), torch.tensor([0.75, 0.5]) * distance)


def test_candidates_stay_in_the_box_and_no_farther() -> None:
    x, x_adv = torch.full((4, 1, 8, 8), 0.02), torch.full((4, 1, 8, 8), 0.98)
    with seeded("box"):
        sphere = turn(x, x_adv, torch.ones(4))
    nearer = draw_nearer(x, x_adv, sphere, torch.full((4,), 0.01))
    for images in (sphere, nearer):
        assert bool(((images >= 0) & (images <= 1)).all())
        assert float((images - x).flatten(1).norm(dim=1).max()) <= 8 * 0.96
    assert torch.equal(draw_nearer(x, x, x, torch.full((4,), 0.01)), x), "no distance, no step"


def test_step_sizes_hold_at_the_share_aimed_at_and_have_ends() -> None:
    size = torch.tensor([0.1, 0.1, 0.99, 1e-5])
    for answer in (True, False, False, False, False):
        size = adapt(size, torch.tensor([answer, True, True, False]), 0.2, 1.0)
    assert size.tolist() == pytest.approx([0.1, 0.1 * math.exp(5 * 0.3 * 0.8), 1.0, 1e-5])


# the start, which hopskipjump shares


class Island(Defense):
    """Class 1 within 0.3 of a chequered image, class 0 everywhere else: no noise is ever wrong for class 0."""

    name = "island"
    num_classes = 2
    input_shape = (1, 8, 8)

    def forward(self, x: Images) -> Logits:
        inside = 0.3 - (x - chequered()).flatten(1).norm(dim=1)
        return torch.stack([-inside, inside], dim=1)


def chequered() -> Tensor:
    """Centre of the island."""
    return 0.5 + 0.2 * (-1.0) ** (torch.arange(8)[:, None] + torch.arange(8))


def island_case() -> tuple[Defense, Images, Labels]:
    """Two images without a start, one with, and one that is wrong as it is."""
    x = torch.full((4, 1, 8, 8), 0.9)
    x[1:3] = chequered()
    return Island().freeze(), x, torch.tensor([0, 1, 0, 0])


@pytest.mark.parametrize("attack", [Boundary(queries=150), HopSkipJump(queries=600)], ids=lambda attack: attack.name)
def test_an_image_without_a_start_stops_no_other(attack: Attack) -> None:
    defense, x, y = island_case()
    victim = Victim(defense, "decisions", 4)
    with seeded("island"):
        found = attack(victim, x, y, ThreatModel("l2", 0.5))
    assert torch.equal(found[[0, 2, 3]], x[[0, 2, 3]])
    assert defense(found).argmax(1).tolist() == [0, 0, 1, 0]
    torch.testing.assert_close(ThreatModel("l2", 1).distance(x, found)[1].item(), 0.3, rtol=0.02, atol=0)
    assert victim.ledger.forwards.tolist()[0] == victim.ledger.forwards.tolist()[3] == 51, "all tries, no walk"
    assert victim.ledger.forwards.tolist()[2] == 1, "wrong as it is"


def test_no_image_with_a_start() -> None:
    defense, x, y = island_case()
    rows = torch.tensor([0, 2, 3])
    for attack in (Boundary(), HopSkipJump()):
        victim = Victim(defense, "decisions", 3)
        assert torch.equal(attack(victim, x[rows], y[rows], ThreatModel("l2", 5)), x[rows])


def test_start_is_wrong_and_at_the_boundary() -> None:
    defense, x, y = linear_case("l2")
    with seeded("start"):
        started = start_search(Victim(defense, "decisions", len(x)), x, y, 500)
    assert started.rows.tolist() == list(range(len(x)))
    assert bool((defense(started.x_adv).argmax(1) != y).all())
    nearer = x + 0.99 * (started.x_adv - x)
    assert bool((defense(nearer).argmax(1) == y).all())


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_bisection_ends_at_the_boundary(norm: str) -> None:
    defense, x, y = linear_case(norm, 4)
    other = defense(x).scatter(1, y[:, None], -torch.inf).argmax(1)
    normal = (defense.weight[other] - defense.weight[y]).view_as(x)
    step = normal.sign() if norm == "linf" else normal / normal.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    oracle = Oracle(Victim(defense, "decisions", 4), y, 100)
    found = bisect(oracle, x, x + 3 * REACH[norm] * step, norm, 12)
    assert oracle.left == 88
    reached = ThreatModel(norm, 1).distance(x, found) / REACH[norm]
    assert bool(((reached >= 1) & (reached < 1.002)).all())
    cut_off = Oracle(Victim(defense, "decisions", 4), y, 3)
    bisect(cut_off, x, x + 3 * REACH[norm] * step, norm, 12)
    assert cut_off.left == 0


def test_noise_goes_from_fine_to_coarse() -> None:
    x = torch.zeros(2, 3, 28, 28)
    with seeded("noise"):
        values = [len(draw_noise(x, number)[0, 0].unique()) for number in range(6)]
        assert draw_noise(x, 2).shape == x.shape
    assert values == [784, 196, 49, 16, 4, 784]


def test_what_is_returned_is_wrong_for_the_judge_too() -> None:
    """A batch of another size rounds otherwise; images found at the boundary must not turn right by that."""
    defense, x, y = linear_case("linf")
    found = attack_once(HopSkipJump(), defense, x, y, ThreatModel("linf", 1))
    nearer = x + (found - x) / 1.0005
    assert count_errors(defense, nearer, y) == len(x)
