"""Square: the schedule, the bumps and the squares of the paper, what a query costs, and the strength of the attack."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchattacks
from torch import Tensor, nn

from robench import load_data, wrap
from robench.attacks import square
from robench.attacks.square import Square
from robench.defense import Defense
from robench.errors import BudgetExhausted, UsageError
from robench.losses import margin
from robench.rng import seeded
from robench.testing import ConvToy, LinearToy, NoisyLinearToy
from robench.testing.attacks import count_errors, linear_case, scale_bound
from robench.threat import ThreatModel
from robench.types import Images, Labels
from robench.victim import Victim

NORMS = ("linf", "l2")


class Listening(Victim):
    """A victim that keeps what it is asked about."""

    def __init__(self, defense: Defense, examples: int, **options: Any) -> None:
        super().__init__(defense, "scores", examples, **options)
        self.asked: list[Images] = []
        self.draws: list[Tensor] = []
        self.held: list[int] = []

    def _draw(self, x: Images, *, in_all: bool = False) -> Tensor:
        self.asked.append(x.clone())
        logits = super()._draw(x, in_all=in_all)
        self.draws.append(logits)
        return logits

    def hold_draws(self) -> None:
        self.held.append(len(self.asked))
        super().hold_draws()


def run(attack: Square, victim: Victim, x: Images, y: Labels, threat: ThreatModel, seed: str = "") -> Images:
    with seeded("square", seed):
        return attack(victim, x, y, threat)


def grey(n: int, side: int = 6) -> Images:
    """Images of one colour far from the ends of the box."""
    return torch.full((n, 3, side, side), 0.5)


@pytest.mark.parametrize("norm", NORMS)
def test_known_distance(norm: str) -> None:
    defense, x, y = linear_case(norm)
    for factor, restarts, expected in ((1.25, 4, len(x)), (0.99, 1, 0)):
        attack = Square(queries=500, restarts=restarts)
        x_adv = run(attack, Victim(defense, "scores", len(x)), x, y, scale_bound(norm, factor))
        assert count_errors(defense, x_adv, y) == expected


# the paper's parts


@pytest.mark.parametrize("queries", [10_000, 5000])
def test_schedule(queries: int) -> None:
    """Section 3.2: the side is the nearest integer to the root of the share of pixels, halved at the counts printed."""
    attack, x = Square(queries=queries), grey(1, 28)
    counts = (0, 9, 10, 50, 200, 1000, 2000, 4000, 6000, 8000, 9999)
    shares = (0.8, 0.8, 0.4, 0.2, 0.1, 0.05, 0.025, 0.0125, 0.00625, 0.003125, 0.003125)
    for count, share in zip(counts, shares, strict=True):
        assert attack._side(count * queries // 10_000, x) == round((share * 28 * 28) ** 0.5)


@pytest.mark.parametrize("side", [1, 2, 3, 4, 5, 8])
def test_bump(side: int) -> None:
    """Equation 2, term by term: two rectangles side by side, of opposite signs, and the transpose."""

    def rectangle(height: int, width: int, row: int, column: int) -> float:
        n = height // 2
        rings = n - max(abs(row - height // 2 - 1), abs(column - width // 2 - 1))
        return sum(1 / (n + 1 - k) ** 2 for k in range(rings + 1))

    half = side // 2
    expected = torch.tensor(
        [
            [rectangle(side, half, row, column) for column in range(1, half + 1)]
            + [-rectangle(side, side - half, row, column) for column in range(1, side - half + 1)]
            for row in range(1, side + 1)
        ]
    )
    bump, turned = square._bumps(grey(1), side)
    torch.testing.assert_close(bump, expected)
    torch.testing.assert_close(turned, expected.T)


def test_linf_starts_with_stripes_and_moves_squares() -> None:
    """The first image has columns of one colour, the second differs from it in one square that is one colour."""
    x, threat = grey(5), ThreatModel("linf", 0.1)
    victim = Listening(ConvToy(), 5)
    run(Square(queries=2, p_init=0.25), victim, x, ConvToy()(x).argmax(1), threat)
    stripes, moved = ((asked - x) / 0.1 for asked in victim.asked)
    assert torch.equal(stripes, stripes[:, :, :1].expand_as(stripes))
    torch.testing.assert_close(stripes.abs(), torch.ones_like(x))
    torch.testing.assert_close(moved.abs(), torch.ones_like(x))
    for image, before in zip(moved, stripes, strict=True):
        rows, columns = (image != before).any(0).nonzero().T
        corner, end = (rows.min(), columns.min()), (rows.max() + 1, columns.max() + 1)
        inside = image[:, corner[0] : end[0], corner[1] : end[1]]
        assert max(inside.shape) <= 3
        assert torch.equal(inside, inside[:, :1, :1].expand_as(inside))


def test_no_query_is_wasted_in_linf() -> None:
    """A square of the sign that is there already takes the other; else half of these single pixels would not change."""
    defense = LinearToy()
    x, y = defense.examples(40)
    victim = Listening(defense, 40)
    run(Square(queries=2, p_init=1 / 16), victim, x, y, ThreatModel("linf", 0.01))
    first, second = victim.asked
    assert (first != second).flatten(1).sum(1).tolist() == [1] * 40


def test_l2_spends_the_whole_bound() -> None:
    """The start and each change have norm eps, but for what the box cuts off: the next change takes that up again."""
    x, threat = grey(4), ThreatModel("l2", 0.4)
    victim = Listening(ConvToy(), 4)
    run(Square(queries=40), victim, x, ConvToy()(x).argmax(1), threat)
    for asked in victim.asked:
        rows = x[: len(asked)]
        torch.testing.assert_close(threat.distance(rows, asked), torch.full((len(asked),), 0.4))


def test_l2_takes_up_what_the_box_cuts_off() -> None:
    """From 90 % of the bound one change of a square comes back to all of it."""
    x, threat = grey(8), ThreatModel("l2", 0.4)
    near = x + 0.9 * threat.eps * threat.steepest(torch.linspace(-1, 1, x.numel()).view_as(x))
    with seeded("a change"):
        moved = square._move_bump(x, near, threat, 3)
    torch.testing.assert_close(threat.distance(x, moved), torch.full((8,), 0.4))


def test_each_image_has_its_own_squares() -> None:
    x = grey(2)
    y = ConvToy()(x).argmax(1)
    for norm in NORMS:
        victim = Listening(ConvToy(), 2)
        run(Square(queries=1), victim, x, y, ThreatModel(norm, 0.05))
        assert not torch.equal(victim.asked[0][0], victim.asked[0][1])


# what a query costs


@pytest.mark.parametrize("norm", NORMS)
def test_an_image_costs_nothing_more_once_it_is_wrong(norm: str) -> None:
    defense, x, y = linear_case(norm)
    y[:4] = (y[:4] + 2) % 4  # wrong as they are
    victim = Victim(defense, "scores", len(x))
    run(Square(queries=9, restarts=2), victim, x, y, scale_bound(norm, 0.5))
    assert victim.ledger.forwards.tolist() == [1] * 4 + [18] * 8


@pytest.mark.parametrize(("eot", "draws"), [(1, 1), (3, 1), (5, 2), (10, 3), (20, 6)])
def test_a_randomized_defense_lets_no_image_leave(eot: int, draws: int) -> None:
    defense = NoisyLinearToy()
    x, y = defense.examples(4)
    victim = Listening(defense, 4, eot=eot)
    run(Square(queries=5), victim, x, y, ThreatModel("linf", 1.0))
    assert victim.ledger.forwards.tolist() == [5 * draws] * 4


def test_several_searches_on_a_randomized_defense_compare_on_draws_of_their_own() -> None:
    defense = NoisyLinearToy()
    x, y = defense.examples(4)
    victim = Listening(defense, 4, eot=10)
    run(Square(queries=5, restarts=2), victim, x, y, ThreatModel("linf", 1.0))
    assert victim.ledger.forwards.tolist() == [2 * (5 * 3 + 10)] * 4


def test_a_randomized_defense_is_asked_about_the_best_image_again_on_other_draws() -> None:
    """At every fiftieth query, of draws held until then; between them luck does not decide what is kept."""
    defense = NoisyLinearToy()
    x, y = defense.examples(4)
    victim, threat = Listening(defense, 4, eot=10), ThreatModel("linf", 0.05)
    run(Square(queries=120), victim, x, y, threat)
    assert victim.held == [0, 50, 100]
    assert [len(answers) for answers in victim.draws] == [3] * 120
    losses = [margin(answers.mean(0), y) for answers in victim.draws]
    for first in (0, 50):
        luck = victim.draws[first] - LinearToy()(victim.asked[first])  # this defense adds its draws to the logits
        best, loss = victim.asked[first], losses[first]
        for query in range(first + 1, first + 50):
            torch.testing.assert_close(victim.draws[query] - LinearToy()(victim.asked[query]), luck)
            better = losses[query] > loss
            best = torch.where(better.view(-1, 1, 1, 1), victim.asked[query], best)
            loss = torch.maximum(loss, losses[query])
        assert torch.equal(victim.asked[first + 50], best)


def test_a_deterministic_defense_is_asked_about_nothing_twice() -> None:
    defense, x, y = linear_case("linf")
    victim = Listening(defense, len(x))
    run(Square(queries=60), victim, x, y, scale_bound("linf", 0.2))
    assert len({asked.numpy().tobytes() for asked in victim.asked}) == 60
    assert victim.held == [0]


@pytest.mark.parametrize("queries", [5, 60])
def test_a_query_budget_that_ends_a_later_search_leaves_what_the_first_found(queries: int) -> None:
    """Of a randomized defense: the later search has seen its images on other draws."""
    defense = NoisyLinearToy()
    x, y = defense.examples(4)
    found = []
    for restarts, budget in ((1, None), (2, 60 * 3 + 10 + queries * 3)):
        victim = Victim(defense, "scores", 4, eot=10, budget=budget)
        victim.watch(x, y, ThreatModel("linf", 0.05))
        found.append(run(Square(queries=60, restarts=restarts), victim, x, y, ThreatModel("linf", 0.05)))
    assert victim.ledger.forwards.tolist() == [60 * 3 + 10 + queries * 3] * 4
    assert torch.equal(*found)


@pytest.mark.parametrize("queries", [20, 120])
def test_a_query_budget_leaves_what_the_search_holds(queries: int) -> None:
    """Of a randomized defense the best image on the draws of now, not the luckiest of all that were tried."""
    defense = NoisyLinearToy()
    x, y = defense.examples(4)
    threat, attack = ThreatModel("linf", 0.05), Square(queries=200)
    victim = Victim(defense, "scores", 4, eot=10, budget=3 * queries)
    victim.watch(x, y, threat)
    with pytest.raises(BudgetExhausted):
        run(attack, victim, x, y, threat)
    listening = Listening(defense, 4, eot=10)
    run(attack, listening, x, y, threat)
    first = queries // 50 * 50
    asked = torch.stack(listening.asked[first:queries])
    margins = torch.stack([margin(answers.mean(0), y) for answers in listening.draws[first:queries]])
    assert victim.ledger.best is not None
    assert torch.equal(victim.ledger.best, asked[margins.argmax(0), torch.arange(4)])


def test_a_randomized_defense_is_attacked_through_its_mean_logits() -> None:
    defense = NoisyLinearToy(sigma=1.0)
    x, y = defense.examples(12)
    x_adv = run(Square(queries=200), Victim(defense, "scores", 12, eot=10), x, y, ThreatModel("linf", 0.06))
    assert bool((defense.probability_right(x, y) > 0.9).all())
    assert bool((defense.probability_right(x_adv, y) < 0.3).all())


@pytest.mark.parametrize("norm", NORMS)
def test_goes_on_from_where_it_ended_within_a_smaller_bound(norm: str) -> None:
    x, y = grey(3), torch.zeros(3, dtype=torch.int64)
    threat = ThreatModel(norm, 0.2)
    smaller = ThreatModel(norm, 0.1)
    start = smaller.project(x, x + 0.1 * smaller.steepest(torch.linspace(-1, 1, x.numel()).view_as(x)))
    victim = Listening(ConvToy(), 3, start=start)
    run(Square(queries=1), victim, x, y, threat)
    torch.testing.assert_close(victim.asked[0] - x, 2 * (start - x))


# options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"queries": 0}, "queries and restarts must be at least 1; got 0, 1"),
        ({"restarts": 0}, "queries and restarts must be at least 1; got 5000, 0"),
        ({"p_init": 0.0}, "p_init must be above 0 and at most 1; got 0.0"),
        ({"p_init": 1.5}, "p_init must be above 0 and at most 1; got 1.5"),
        ({"p_init": float("nan")}, "p_init must be above 0"),
        ({"loss": "dlr"}, 'loss must be one of margin, ce; got "dlr"'),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Square(**options)


# against torchattacks, whose Square is AutoAttack's


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, Tensor, Tensor]:
    """A small net after a few steps on its own test images, and those that it gets right: enough to compare attacks."""
    x, y = load_data("fashion_mnist", n=400)
    with seeded("reference net"), torch.enable_grad():
        net = nn.Sequential(nn.Conv2d(1, 8, 5, stride=3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 64, 10))
        optimizer = torch.optim.Adam(net.parameters(), 5e-3)
        for _ in range(60):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()
    right = net.eval()(x).argmax(1) == y
    return net, x[right][:100], y[right][:100]


@pytest.mark.reference
@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.05), ("l2", 1.0)])
def test_at_least_as_strong_as_the_authors_at_equal_queries(
    trained: tuple[nn.Module, Tensor, Tensor], norm: str, eps: float
) -> None:
    """Robust accuracy of the same images, the mean of two seeds; one has a standard deviation of about 2 points."""
    net, x, y = trained
    left = {"ours": 0.0, "theirs": 0.0}
    for seed in (0, 1):
        victim = Victim(wrap(net, num_classes=10, input_shape=(1, 28, 28)), "scores", len(x))
        ours = run(Square(queries=200), victim, x, y, ThreatModel(norm, eps), str(seed))
        peer = torchattacks.Square(net, norm={"linf": "Linf", "l2": "L2"}[norm], eps=eps, n_queries=199, seed=seed)
        with torch.random.fork_rng():  # the peer seeds torch
            theirs = peer(x, y)
        for name, x_adv in (("ours", ours), ("theirs", theirs)):
            left[name] += float((net(x_adv).argmax(1) == y).float().mean()) / 2
    assert 0.2 < left["theirs"] < 0.9, "the comparison needs a bound at which some images are turned and some are not"
    assert left["ours"] <= left["theirs"] + 0.05
