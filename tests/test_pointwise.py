"""The pointwise attack: known distances, nothing left to set back, what it may ask, and the peer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import foolbox
import pytest
import torch
from torch import Tensor, nn

from robench import ThreatModel, Victim, load_attack, load_data, wrap
from robench.attacks.pointwise import Pointwise
from robench.decisions import HeldOracle
from robench.defense import Defense
from robench.errors import UsageError
from robench.rng import foreign_generators, seeded
from robench.testing import AttackContract
from robench.testing.toys import ConvToy, LinearToy, NoisyLinearToy
from robench.types import Images, Labels, Logits

PIXELS = 16
WIDE = {"linf": 1.0, "l2": 9.0, "l0": 36.0}
"""Bounds that hold all images of the toys."""
ONE_WAY = {"linf": 2.0, "l2": 2**0.5}
"""On the linear toy half of the values that tell two classes apart start on the wrong side, and are set back."""


def attack_toy(
    attack: Pointwise, defense: Defense, x: Images, y: Labels, *, norm: str = "l0", eps: float = PIXELS, seed: int = 0
) -> tuple[Images, Victim]:
    victim = Victim(defense, attack.access, len(x), eot=10)
    with seeded("pointwise", seed):
        return attack(victim, x, y, ThreatModel(norm, eps)), victim


def is_wrong(defense: Defense, x: Images, y: Labels) -> Tensor:
    return defense(x).argmax(1) != y


def conv_images(n: int = 16) -> tuple[ConvToy, Images, Labels]:
    defense = ConvToy()
    with seeded("pointwise", "images"):
        x = torch.rand(n, *defense.input_shape)
    return defense, x, defense(x).argmax(1)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("reach", [1.0, 2.0, 3.0])
def test_reaches_the_known_distance(channels: int, reach: float) -> None:
    defense = LinearToy(channels)
    x, y = defense.examples(12, "l0", reach)
    x_adv, _ = attack_toy(Pointwise(), defense, x, y)
    assert bool(is_wrong(defense, x_adv, y).all())
    pixels = ThreatModel("l0", PIXELS).distance(x, x_adv)
    assert bool((pixels <= 1.25 * defense.distance(x, y, "l0")).all()), pixels.tolist()


@pytest.mark.parametrize("norm", list(ONE_WAY))
@pytest.mark.parametrize("channels", [1, 3])
def test_reaches_what_the_start_allows(norm: str, channels: int) -> None:
    """In linf and l2 values go one way or back: `ONE_WAY` times the known distance, or up to 1.25 times that."""
    defense = LinearToy(channels)
    x, y = defense.examples(12, norm)
    x_adv, _ = attack_toy(Pointwise(), defense, x, y, norm=norm, eps=WIDE[norm])
    assert bool(is_wrong(defense, x_adv, y).all())
    times = ThreatModel(norm, WIDE[norm]).distance(x, x_adv) / defense.distance(x, y, norm) / ONE_WAY[norm]
    assert bool(((times > 1 - 1e-3) & (times < 1.25)).all()), times.tolist()


def test_returns_the_originals_where_the_error_is_too_far() -> None:
    defense = LinearToy()
    near, far = (defense.examples(6, "l0", reach) for reach in (1.0, 3.0))
    x, y = torch.cat([near[0], far[0]]), torch.cat([near[1], far[1]])
    x_adv, _ = attack_toy(Pointwise(), defense, x, y, eps=2)
    assert bool(is_wrong(defense, x_adv[:6], y[:6]).all())
    assert torch.equal(x_adv[6:], x[6:])


@pytest.mark.parametrize("seed", [0, 1])
def test_no_pixel_can_be_set_back(seed: int) -> None:
    """On an untrained net with its own answers as labels; few tries, so that many pixels are there to be set back."""
    with seeded("pointwise", "net"):
        net = nn.Sequential(nn.Conv2d(1, 8, 5, stride=3), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10))
    defense = wrap(net, num_classes=10, input_shape=(1, 28, 28))
    x, _ = load_data("fashion_mnist", n=16)
    y = defense(x).argmax(1)
    x_adv, _ = attack_toy(Pointwise(tries=5), defense, x, y, eps=784, seed=seed)
    changed = (x_adv != x).any(1)  # b h w
    assert torch.equal(is_wrong(defense, x_adv, y), changed.flatten(1).any(1))
    assert int(changed.sum()) > 2 * len(x)
    for image, row, column in changed.nonzero().tolist():
        candidate = x_adv[image : image + 1].clone()
        candidate[:, :, row, column] = x[image, :, row, column]
        assert not bool(is_wrong(defense, candidate, y[image : image + 1]).any())


@pytest.mark.parametrize(
    "rule",
    [
        AttackContract.test_known_distance,
        AttackContract.test_minimal_norm_finds_the_nearest_error,
        AttackContract.test_success_does_not_fall_with_the_bound,
        AttackContract.test_draws_as_declared,
    ],
)
def test_l0_needs_no_allowance(rule: Callable[[AttackContract], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """In the norm that the attack is made for the contract holds at its own bounds; elsewhere at wider ones."""
    monkeypatch.setattr(Pointwise, "norms", ("l0",))
    contract = AttackContract()
    contract.attack = Pointwise()
    rule(contract)


def test_wrong_images_cost_one_query_and_stay() -> None:
    defense, x, y = conv_images()
    y[::2] = (y[::2] + 1) % defense.num_classes
    x_adv, victim = attack_toy(Pointwise(), defense, x, y, eps=36)
    assert torch.equal(x_adv[::2], x[::2])
    assert set(victim.ledger.forwards[::2].tolist()) == {1}
    assert bool((victim.ledger.forwards[1::2] > 1).all())


def test_images_at_one_pixel_leave() -> None:
    defense = LinearToy()
    x, y = defense.examples(12, "l0", 1.0)
    attack = Pointwise(tries=200, restarts=3)
    x_adv, victim = attack_toy(attack, defense, x, y)
    assert bool((ThreatModel("l0", PIXELS).distance(x, x_adv) == 1).all())
    assert bool((victim.ledger.forwards < attack.tries).all())


class Blind(ConvToy):
    """Answers class 0, whatever the image."""

    def forward(self, x: Images) -> Logits:
        return torch.eye(5)[0].expand(len(x), -1)


@pytest.mark.parametrize("norm", list(WIDE))
@pytest.mark.parametrize("restarts", [1, 2])
def test_a_blind_defense_gets_its_images_back(restarts: int, norm: str) -> None:
    x, y = conv_images()[1], torch.zeros(16, dtype=torch.int64)
    attack = Pointwise(tries=7, restarts=restarts)
    x_adv, victim = attack_toy(attack, Blind(), x, y, norm=norm, eps=WIDE[norm])
    assert torch.equal(x_adv, x)
    searched = 7 if norm == "l0" else 1 + 7  # in linf and l2 each search asks about the original once more
    assert set(victim.ledger.forwards.tolist()) == {1 + restarts * searched}


@pytest.mark.parametrize("norm", list(WIDE))
@pytest.mark.parametrize(("max_queries", "restarts"), [(3, 1), (7, 3), (20, 1), (41, 2)])
def test_max_queries_is_kept(max_queries: int, restarts: int, norm: str) -> None:
    defense, x, y = conv_images()
    attack = Pointwise(max_queries=max_queries, restarts=restarts)
    x_adv, victim = attack_toy(attack, defense, x, y, norm=norm, eps=WIDE[norm])
    assert int(victim.ledger.forwards.max()) <= max_queries
    assert bool((is_wrong(defense, x_adv, y) | (x_adv == x).flatten(1).all(1)).all())


def test_more_tries_and_restarts_help() -> None:
    """Under one seed the first of three restarts is the run without restarts, so that no image can come out worse."""
    defense, x, y = conv_images(64)
    counts = []
    for attack in (Pointwise(tries=12), Pointwise(), Pointwise(tries=12, restarts=3)):
        x_adv, _ = attack_toy(attack, defense, x, y, eps=36)
        pixels = ThreatModel("l0", 36).distance(x, x_adv)
        counts.append(torch.where(pixels > 0, pixels, 36.0))
    few, many, again = counts
    assert float(many.mean()) < 0.8 * float(few.mean())
    assert bool((again <= few).all())
    assert bool((again < few).any())


def test_a_pixel_is_all_its_channels() -> None:
    """A pixel is set back in all channels: the others of a changed pixel cost nothing and may stay."""
    defense = LinearToy(channels=3)
    x, y = defense.examples(12, "l0", 2.0)
    x_adv, _ = attack_toy(Pointwise(), defense, x, y)
    changed = x_adv != x
    assert torch.equal(changed.any(1), changed.all(1))


@pytest.mark.parametrize(
    ("norm", "clean", "left", "passes"), [("l0", 0.9, 0.15, 800), ("linf", 0.85, 0.5, 300), ("l2", 0.85, 0.5, 300)]
)
def test_errors_of_a_randomized_defense_are_wrong_in_most_draws(
    norm: str, clean: float, left: float, passes: int
) -> None:
    """Votes of fresh draws would leave 0.39, 0.48 and 0.53 here, for 600 passes in each norm."""
    defense = NoisyLinearToy(sigma=2.0)
    x, y = defense.examples(24, norm)
    x_adv, victim = attack_toy(Pointwise(), defense, x, y, norm=norm, eps=min(WIDE[norm], PIXELS))
    assert float(defense.probability_right(x, y).min()) > clean
    assert float(defense.probability_right(x_adv, y).mean()) < left
    assert float(victim.ledger.forwards.float().mean()) < passes


class Counting(Victim):
    """Counts the queries of the image that is asked about most, whatever their draws."""

    asked: Tensor

    def _draw(self, x: Tensor, *, in_all: bool = False) -> Tensor:
        self.asked[self._rows] += len(x) // len(self._rows)
        return super()._draw(x, in_all=in_all)


@pytest.mark.parametrize("norm", list(WIDE))
@pytest.mark.parametrize("eot", [1, 10])
@pytest.mark.parametrize(("max_queries", "restarts"), [(3, 1), (5, 2), (9, 1), (20, 1), (40, 1), (41, 2)])
def test_max_queries_is_kept_on_a_randomized_defense(max_queries: int, restarts: int, eot: int, norm: str) -> None:
    defense = NoisyLinearToy(sigma=6.0)
    x, y = defense.examples(48, norm, 1.0 if norm == "l0" else None)
    attack, eps = Pointwise(max_queries=max_queries, restarts=restarts), min(WIDE[norm], PIXELS)
    for seed in range(3):
        victim = Counting(defense, attack.access, len(x), eot=eot)
        victim.asked = torch.zeros(len(x), dtype=torch.int64)
        with seeded("pointwise", seed):
            x_adv = attack(victim, x, y, ThreatModel(norm, eps))
        assert int(victim.asked.max()) <= max_queries
        assert bool(ThreatModel(norm, eps).contains(x, x_adv).all())


@pytest.mark.parametrize("eot", [1, 3, 10])
def test_a_query_has_few_draws_but_in_l0_unless_it_is_a_vote(eot: int) -> None:
    attack = Pointwise(max_queries=100)
    assert attack.passes_with_eot("l0", eot) == 100 * eot
    assert attack.passes_with_eot("l2", eot) == 9 * eot + 91 * min(eot, 2)


@pytest.mark.parametrize("norm", list(WIDE))
def test_an_original_that_is_wrong_in_all_draws_is_asked_about_no_more(
    norm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a search in which that happened to all images nothing but the first questions is asked."""
    begin = HeldOracle.begin.__func__  # type: ignore[attr-defined]

    def all_wrong(cls: type[HeldOracle], *arguments: Any) -> HeldOracle:
        oracle: HeldOracle = begin(cls, *arguments)
        return dataclasses.replace(oracle, original_right=torch.zeros_like(oracle.original_right))

    monkeypatch.setattr(HeldOracle, "begin", classmethod(all_wrong))
    defense = NoisyLinearToy()
    x, y = defense.examples(12, norm)
    _, victim = attack_toy(Pointwise(), defense, x, y, norm=norm, eps=min(WIDE[norm], PIXELS))
    label, originals, start, bisections, finish = 10, 10 if norm == "l0" else 2, 20, 10 * 2, 6 * 10
    first = label + originals + (0 if norm == "l0" else start + bisections + finish)
    assert victim.ledger.forwards.tolist() == [first] * 12


def test_a_query_has_few_draws_but_in_l0() -> None:
    attack = Pointwise()
    assert [attack.draws_of(eot, "l0") for eot in (1, 3, 10)] == [1, 3, 10]
    assert [attack.draws_of(eot, norm) for norm in ("linf", "l2") for eot in (1, 3, 10, 20)] == 2 * [1, 2, 2, 4]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("tries=0", "tries and restarts must be at least 1; got 0 and 1"),
        ("restarts=0", "tries and restarts must be at least 1; got 60 and 0"),
        ("max_queries=2", "max_queries must be at least 3"),
        ("restarts=4, max_queries=8", "max_queries must be at least 9"),
    ],
)
def test_wrong_options(options: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_attack(f"pointwise({options})")


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_more_queries_and_restarts_come_nearer(norm: str) -> None:
    """Under one seed the first of three restarts is the run without restarts, so that no image can come out worse."""
    defense, x, y = conv_images(64)
    found = []
    for attack in (Pointwise(max_queries=20), Pointwise(), Pointwise(restarts=3)):
        x_adv, _ = attack_toy(attack, defense, x, y, norm=norm, eps=WIDE[norm])
        distance = ThreatModel(norm, WIDE[norm]).distance(x, x_adv)
        found.append(torch.where(distance > 0, distance, WIDE[norm]))
    few, many, again = found
    assert float(many.mean()) < 0.8 * float(few.mean())
    assert bool((again <= many).all())
    assert bool((again < many).any())


def test_other_norms_are_refused() -> None:
    with pytest.raises(UsageError, match="supports linf, l2, l0; the threat model is l1"):
        load_attack("pointwise").check_threat(ThreatModel("l1", 1.0))


def test_expected_passes() -> None:
    plain = Pointwise()
    assert 60 < plain.passes() < 200
    assert plain.passes_in("l0") == plain.passes()
    assert plain.passes_in("l2") == plain.passes_in("linf") > 5 * plain.passes()
    assert dataclasses.replace(plain, max_queries=500).passes_in("l2") == 500
    assert dataclasses.replace(plain, restarts=3).passes() > 2 * plain.passes()
    assert dataclasses.replace(plain, max_queries=30).passes() == 30


def train_small_net() -> nn.Module:
    """One epoch on the last 8192 of 8224 Fashion-MNIST images; about 70 % are right."""
    x, y = load_data("fashion_mnist", n=8224)
    with seeded("pointwise", "net"):
        net = nn.Sequential(nn.Conv2d(1, 16, 5, stride=3), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 10))
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for images, labels in zip(x[32:].split(64), y[32:].split(64), strict=True):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(images), labels).backward()
        optimizer.step()
    return net.eval()


@pytest.mark.reference
@pytest.mark.parametrize(
    ("norm", "eps", "images", "distance", "queries"),
    [("l0", 784, 32, 1.0, 0.1), ("l2", 28.0, 12, 0.8, 1.0), ("linf", 1.0, 12, 0.5, 1.0)],
)
def test_as_near_as_foolbox_with_fewer_queries(
    norm: str, eps: float, images: int, distance: float, queries: float
) -> None:
    """At most these shares of foolbox's median distance and queries, on a small net with its own answers as labels.

    Foolbox's search for a smaller l2 distance, which follows its setting back, is on but in l0.
    """
    net = train_small_net()
    defense = wrap(net, num_classes=10, input_shape=(1, 28, 28))
    x = load_data("fashion_mnist", n=8224)[0][:images]
    y = defense(x).argmax(1)
    x_adv, victim = attack_toy(Pointwise(), defense, x, y, norm=norm, eps=eps)
    assert bool(is_wrong(defense, x_adv, y).all())
    theirs, asked = ask_foolbox(net, x, y, l2_binary_search=norm != "l0")
    ours, peers = (float(ThreatModel(norm, eps).distance(x, found).median()) for found in (x_adv, theirs))
    assert ours <= distance * peers
    assert float(victim.ledger.forwards.sum()) <= queries * asked


def ask_foolbox(net: nn.Module, x: Images, y: Labels, *, l2_binary_search: bool) -> tuple[Images, int]:
    """What foolbox's attack finds, and in how many queries."""
    asked: list[int] = []
    hook = net.register_forward_hook(lambda module, inputs, output: asked.append(len(output)))
    peer = foolbox.attacks.PointwiseAttack(l2_binary_search=l2_binary_search)
    model = foolbox.PyTorchModel(net, bounds=(0, 1), device="cpu")
    with seeded("pointwise", "foolbox"), foreign_generators():
        found = peer.run(model, x, foolbox.criteria.Misclassification(y))
    hook.remove()
    return found, sum(asked)
