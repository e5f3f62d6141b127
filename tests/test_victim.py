"""The victim: what it counts, what it refuses, how it averages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from engine_toys import (
    Broken,
    Calm,
    Linear,
    NoGradient,
    Noisy,
    NoisyHead,
    NoisyHeadBelow,
    NoisyInput,
    TwoPaths,
    grid_images,
)
from torch import Tensor
from torch.nn import functional

from robench.attack import Access
from robench.defense import Defense
from robench.errors import BudgetExhausted, PluginError, UsageError
from robench.ledger import Watched
from robench.losses import margin, targeted_dlr, targeted_margin
from robench.rng import seeded
from robench.testing import LinearToy
from robench.testing.attacks import conv_case
from robench.testing.toys import CLASSES, NoisyLinearToy
from robench.threat import ThreatModel
from robench.victim import Victim

LOOSE = ThreatModel("linf", 1.0)


def passes(victim: Victim) -> list[tuple[int, int]]:
    return list(zip(victim.ledger.forwards.tolist(), victim.ledger.backwards.tolist(), strict=True))


def best(victim: Victim) -> Tensor:
    assert victim.ledger.best is not None
    return victim.ledger.best


# counts


@pytest.mark.parametrize(("defense", "draws"), [(Linear(), 1), (Noisy(), 4)], ids=["deterministic", "randomized"])
def test_each_query_counts_its_draws(defense: Defense, draws: int) -> None:
    x, y = grid_images(3)
    heard: list[int] = []
    victim = Victim(defense, "gradient", 3, eot=4, on_passes=heard.append)
    victim.logits(x)
    assert passes(victim) == [(draws, 0)] * 3
    victim.labels(x)
    victim.loss_grad(x, y)
    assert passes(victim) == [(3 * draws, draws)] * 3
    assert heard == [3 * draws, 3 * draws, 6 * draws]


@pytest.mark.parametrize(
    ("query", "told"),
    [
        ("labels", [5, 5, 2]),
        ("loss_grad", [10, 10, 4]),
        ("gradient", [10, 10, 4]),
        ("differentiable", [5, 5, 2, 12]),
    ],
)
@pytest.mark.parametrize("draws_at_once", [False, True], ids=["each draw", "draws at once"])
def test_passes_are_told_batch_by_batch(query: str, told: list[int], draws_at_once: bool) -> None:
    defense = NoisyHead() if draws_at_once else Noisy()
    defense.batch_rows = 5
    if draws_at_once:  # of three rows, which are fewer than a batch, all four draws
        told = [sum(told)] if query != "differentiable" else [12, 12]
    x, y = grid_images(3)
    heard: list[int] = []
    victim = Victim(defense, "gradient", 3, eot=4, on_passes=heard.append)
    answer = QUERIES[query](victim, x.requires_grad_(query == "differentiable"), y)
    if isinstance(answer, Tensor) and answer.requires_grad:
        answer.sum().backward()
    assert heard == told
    assert sum(heard) == sum(map(sum, passes(victim)))


def test_a_subset_counts_for_its_own_examples() -> None:
    x, y = grid_images(4)
    victim = Victim(Linear(), "gradient", 4)
    victim.subset(torch.tensor([3, 1])).logits(x[[3, 1]])
    victim.subset(torch.tensor([False, True, True, False])).loss_grad(x[1:3], y[1:3])
    victim.subset(torch.tensor([2, 3])).subset(torch.tensor([1])).logits(x[3:])
    assert passes(victim) == [(0, 0), (2, 1), (1, 1), (2, 0)]


def test_candidates_of_each_example_all_count() -> None:
    x, y = grid_images(3)
    victim = Victim(Noisy(), "gradient", 3, eot=2)
    assert victim.logits(x.repeat(5, 1, 1, 1)).shape == (15, 3)
    assert victim.subset(torch.tensor([1])).loss_grad(x[:2], y[:2])[1].shape == (2, 2, 3, 3)
    assert passes(victim) == [(10, 0), (14, 4), (10, 0)]


@pytest.mark.parametrize("rows", [0, 2, 4, 5])
def test_a_row_too_few_or_too_many_is_refused_and_not_counted(rows: int) -> None:
    x, _ = grid_images(5)
    victim = Victim(Linear(), "scores", 3)
    with pytest.raises(PluginError, match=f"one row for each of the victim's 3 examples, or a multiple.*got {rows}"):
        victim.logits(x[:rows])
    assert passes(victim) == [(0, 0)] * 3


def test_no_query_goes_uncounted() -> None:
    x, _ = grid_images(4)
    victim = Victim(Linear(), "scores", 4)
    with pytest.raises(PluginError, match="at most once"):
        victim.subset(torch.tensor([0, 0]))
    with pytest.raises(PluginError, match="the victim's 0 examples"):
        victim.subset(torch.zeros(4, dtype=torch.bool)).logits(x)


# access


QUERIES: dict[str, Callable[[Victim, Tensor, Tensor], object]] = {
    "labels": lambda victim, x, _: victim.labels(x),
    "logits": lambda victim, x, _: victim.logits(x),
    "labels_per_draw": lambda victim, x, _: victim.labels_per_draw(x),
    "loss": lambda victim, x, y: victim.loss(x, y),
    "loss_grad": lambda victim, x, y: victim.loss_grad(x, y),
    "gradient": lambda victim, x, y: victim.gradient(x, y),
    "differentiable": lambda victim, x, _: victim.differentiable(x),
}
ALLOWED: dict[Access, set[str]] = {
    "none": set(),
    "decisions": {"labels", "labels_per_draw"},
    "scores": {"labels", "labels_per_draw", "logits", "loss"},
    "gradient": {"labels", "labels_per_draw", "logits", "loss", "loss_grad", "gradient", "differentiable"},
}


@pytest.mark.parametrize("query", QUERIES)
@pytest.mark.parametrize("access", ALLOWED)
def test_a_query_above_the_declared_access_is_refused(access: Access, query: str) -> None:
    x, y = grid_images(2)
    victim = Victim(Linear(), access, 2)
    if query in ALLOWED[access]:
        QUERIES[query](victim, x, y)
        assert victim.ledger.forwards.tolist() == [1, 1]
    else:
        with pytest.raises(PluginError, match=f'declares access "{access}" called victim'):
            QUERIES[query](victim, x, y)
        assert passes(victim) == [(0, 0)] * 2


# values


@pytest.mark.parametrize("loss", ["ce", "margin", "dlr"])
def test_gradient_is_autograd_s_of_the_plain_model(loss: str) -> None:
    x, y = grid_images(5)
    defense = Linear()
    leaf = x.clone().requires_grad_()
    logits = defense(leaf)
    if loss == "ce":
        values = functional.cross_entropy(logits, y, reduction="none")
    else:
        values = margin(logits, y)
        ordered = logits.sort(dim=1, descending=True).values
        values = values / (ordered[:, 0] - ordered[:, 2]) if loss == "dlr" else values
    (grad,) = torch.autograd.grad(values.sum(), leaf)
    found = Victim(defense, "gradient", 5).gradient(x, y, loss)
    torch.testing.assert_close(found.grad, grad)
    torch.testing.assert_close(found.loss, values.detach())
    torch.testing.assert_close(found.logits, logits.detach())
    assert not found.logits.requires_grad


def test_a_loss_may_be_a_function() -> None:
    x, y = grid_images(3)
    named = Victim(Linear(), "gradient", 3).gradient(x, y, "margin")
    given = Victim(Linear(), "gradient", 3).gradient(x, y, margin)
    assert torch.equal(named.grad, given.grad)


def test_eot_is_the_mean_over_separate_draws_of_the_same_noise() -> None:
    x, y = grid_images(4)
    draws = 6
    with seeded(5, "noise"):
        found = Victim(NoisyInput(), "gradient", 4, eot=draws).gradient(x, y)
    with seeded(5, "noise"):
        noise = 0.3 * torch.randn(draws * 4, *x.shape[1:])  # as the folded batch draws it, draw-major
    plain = Linear()
    losses, grads, logits = [], [], []
    for part in noise.split(4):
        leaf = x.clone().requires_grad_()
        answer = plain((leaf + part).sin())
        values = functional.cross_entropy(answer, y, reduction="none")
        grads.append(torch.autograd.grad(values.sum(), leaf)[0])
        losses.append(values.detach())
        logits.append(answer.detach())
    torch.testing.assert_close(found.loss, torch.stack(losses).mean(0))
    torch.testing.assert_close(found.noise, torch.stack(losses).std(0) / draws**0.5)
    torch.testing.assert_close(found.grad, torch.stack(grads).mean(0))
    torch.testing.assert_close(found.logits, torch.stack(logits).mean(0))
    assert not torch.allclose(grads[0], grads[1])  # the draws do differ


def test_logits_are_the_mean_and_labels_the_vote_of_the_draws() -> None:
    x, _ = grid_images(4)
    defense = Noisy()

    def draws() -> Tensor:
        with seeded(2, "noise"):
            return defense(x.repeat(9, 1, 1, 1)).unflatten(0, (9, 4))

    with seeded(2, "noise"):
        torch.testing.assert_close(Victim(defense, "scores", 4, eot=9).logits(x), draws().mean(0))
    with seeded(2, "noise"):
        labels = Victim(defense, "decisions", 4, eot=9).labels(x)
    assert labels.tolist() == draws().argmax(2).mode(0).values.tolist()


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize(("defense", "draws"), [(Linear(), 1), (NoisyInput(), 7)], ids=["deterministic", "randomized"])
def test_loss_by_forwards_alone_is_that_of_a_gradient_query(defense: Defense, draws: int, targeted: bool) -> None:
    x, y = grid_images(4)
    target = (y + 1) % 3 if targeted else None
    victim = Victim(defense, "gradient", 4, eot=7)
    with seeded(5, "noise"):
        full = victim.gradient(x, y, "ce", target)
    with seeded(5, "noise"):
        loss, logits, noise = victim.loss(x, y, "ce", target)
    torch.testing.assert_close(loss, full.loss)
    torch.testing.assert_close(logits, full.logits)
    torch.testing.assert_close(noise, full.noise)
    assert bool((noise > 0).all()) == (draws > 1)
    assert passes(victim) == [(2 * draws, draws)] * 4
    if not targeted and draws > 1:
        assert bool((functional.cross_entropy(logits, y, reduction="none") < loss).all()), (
            "the loss of the mean is less"
        )


@pytest.mark.parametrize("query", QUERIES)
def test_held_draws_are_the_same_until_the_next(query: str) -> None:
    """And those of a subset; whatever the attack itself draws in between."""
    x, y = grid_images(3)
    victim, part = Victim(NoisyInput(), "gradient", 3, eot=4), torch.tensor([0, 1, 2])
    with seeded("held"):
        free = [QUERIES[query](victim, x, y) for _ in range(2)]
        victim.hold_draws()
        first = QUERIES[query](victim, x, y)
        torch.rand(5)
        second, third = QUERIES[query](victim, x, y), QUERIES[query](victim.subset(part), x, y)
        victim.hold_draws()
        other = QUERIES[query](victim, x, y)
    torch.testing.assert_close(second, first)
    torch.testing.assert_close(third, first)
    if query != "labels":
        for different in (free[0], free[1], other):
            with pytest.raises(AssertionError):
                torch.testing.assert_close(different, first)


def test_a_narrower_subset_meets_other_draws_which_are_held_too() -> None:
    x, _ = grid_images(3)
    victim, rows = Victim(NoisyInput(), "scores", 3, eot=4), torch.tensor([1, 2])
    with seeded("held"):
        victim.hold_draws()
        whole = victim.logits(x)[rows]
        parts = [victim.subset(rows).logits(x[rows]) for _ in range(2)]
    torch.testing.assert_close(parts[0], parts[1])
    assert not torch.allclose(parts[0], whole)


@pytest.mark.parametrize("randomness", ["fixed", "off"])
def test_draws_that_are_fixed_or_off_cannot_be_held(randomness: Any) -> None:
    x, _ = grid_images(3)
    victim = Victim(Calm(), "scores", 3, eot=4, randomness=randomness)
    with seeded("held"):
        before = victim.logits(x)
        victim.hold_draws()
        torch.testing.assert_close(victim.logits(x), before)


def test_fewer_draws_than_a_query_has_cost_less() -> None:
    x, _ = grid_images(3)
    victim = Victim(NoisyInput(), "scores", 3, eot=10)
    few = victim.with_draws(2)
    assert few.labels_per_draw(x).shape == (2, 3)
    few.logits(x)
    assert passes(victim) == [(4, 0)] * 3
    assert victim.labels_per_draw(x).shape == (10, 3)
    assert victim.with_draws(20).eot == 10
    for count in (0, -5):
        with pytest.raises(PluginError, match=f"takes at least one draw; got {count}"):
            victim.with_draws(count)


def test_holding_other_draws_forgets_how_good_the_best_images_were_and_not_which() -> None:
    x, y = grid_images(3)
    victim = Victim(NoisyInput(), "scores", 3, eot=10)
    victim.watch(x, y, ThreatModel("linf", 0.1))
    first, second = (x + 0.05).clamp(0, 1), (x - 0.05).clamp(0, 1)
    victim.logits(first)
    part = victim.subset(torch.tensor([0, 2]))
    part.hold_draws()
    torch.testing.assert_close(best(victim), first)
    part.with_draws(2).logits(second[[0, 2]])
    torch.testing.assert_close(best(victim)[[0, 2]], second[[0, 2]])
    torch.testing.assert_close(best(victim)[1], first[1])


def test_an_error_is_remembered_where_all_draws_of_answers_are_wrong() -> None:
    """A vote would remember the first image, which is nearer. Other draws make nobody forget the nearest error."""
    defense = NoisyLinearToy(sigma=2.0)
    x, y = defense.examples(64, "l2")
    step = torch.autograd.functional.jacobian(lambda x: margin(LinearToy.forward(defense, x), y).sum(), x)
    step = step / step.flatten(1).norm(dim=1).view(-1, 1, 1, 1) * defense.distance(x, y, "l2").view(-1, 1, 1, 1)
    near, far = (x + 1.2 * step).clamp(0, 1), (x + 4 * step).clamp(0, 1)
    victim = Victim(defense, "decisions", 64, eot=10)
    victim.watch(x, y, ThreatModel("l2", 9.0), "minimal")
    with seeded("all"):
        victim.hold_draws()
        in_all = [(victim.labels_per_draw(images) != y).all(0) for images in (near, far)]
        victim.hold_draws()
        victim.labels_per_draw(x)
    taken = torch.where(in_all[0].view(-1, 1, 1, 1), near, far)
    wrong = in_all[0] | in_all[1]
    assert int((in_all[1] & ~in_all[0]).sum()) > 16
    torch.testing.assert_close(best(victim)[wrong], taken[wrong])


@pytest.mark.parametrize("query", ["labels", "labels_per_draw"])
def test_the_original_is_no_find_of_a_search_for_the_nearest_error(query: str) -> None:
    """It would be the nearest, where a randomized defense has it wrong by luck, and nothing would take its place."""
    x, y = grid_images(40)
    victim = Victim(Noisy(gain=0.1), "decisions", 40, eot=1)
    victim.watch(x, y, ThreatModel("linf", 1.0), "minimal")
    moved = (x + 0.01).clamp(0, 1)
    with seeded("original"):
        wrong = torch.stack([QUERIES[query](victim, x, y).view(-1) != y for _ in range(5)])  # type: ignore[attr-defined]
        found = torch.stack([QUERIES[query](victim, moved, y).view(-1) != y for _ in range(5)])  # type: ignore[attr-defined]
    assert int(wrong.any(0).sum()) > 10
    taken = found.any(0)
    assert int((taken & wrong.any(0)).sum()) > 10
    torch.testing.assert_close(best(victim)[taken], moved[taken])


def test_the_weakest_draw_is_looked_for_under_each_image_s_own_label() -> None:
    x, _ = grid_images(3)
    watched = Watched.begin(x, torch.tensor([0, 1, 0]), ThreatModel("linf", 1.0), "minimal")
    rows = torch.tensor([1, 2])  # labels 1 and 0, two candidates each
    logits = torch.tensor([[[2.0, 0], [2, 0], [3, 0], [3, 0]], [[0, 1], [0, 1], [1, 0], [1, 0]]])  # draws b k
    expected = torch.stack([logits[1, 0], logits[0, 1], logits[1, 2], logits[0, 3]])
    torch.testing.assert_close(watched.weakest(rows, logits), expected)


def test_gradient_mode_is_the_one_asked_for() -> None:
    x, y = grid_images(3)
    flat = Victim(TwoPaths(), "gradient", 3, mode="flat").loss_grad(x, y)[1]
    full = Victim(TwoPaths(), "gradient", 3, mode="full").loss_grad(x, y)[1]
    default = Victim(TwoPaths(), "gradient", 3).loss_grad(x, y)[1]
    assert not bool(flat.any())
    assert bool(full.any())
    assert torch.equal(default, flat)  # the defense names it first
    with pytest.raises(UsageError, match='offers the gradient modes flat, full; got "bpda"'):
        Victim(TwoPaths(), "gradient", 3, mode="bpda")


@pytest.mark.parametrize("rows", [1, 2, 5, 100])
def test_small_batches_give_what_one_batch_gives(rows: int) -> None:
    x, y = grid_images(7)
    whole, cut = Linear(), Linear()
    cut.batch_rows = rows
    largest: list[int] = []
    cut.register_forward_pre_hook(lambda _, args: largest.append(len(args[0])))
    expected = Victim(whole, "gradient", 7).gradient(x.repeat(2, 1, 1, 1), y.repeat(2))
    found = Victim(cut, "gradient", 7).gradient(x.repeat(2, 1, 1, 1), y.repeat(2))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert max(largest) <= rows


def test_queries_leave_no_trace_on_the_weights() -> None:
    x, y = grid_images(3)
    defense = Linear()
    defense.weight.requires_grad_(True)
    with torch.no_grad():  # also where an attack forbids gradients of its own
        grad = Victim(defense, "gradient", 3).loss_grad(x, y)[1]
    assert bool(grad.any())
    assert defense.weight.grad is None


def test_a_defense_without_gradient_is_told_what_to_do() -> None:
    x, y = grid_images(2)
    with pytest.raises(PluginError, match=r'"no_gradient": adaptive_forward gives no gradient.*BPDA'):
        Victim(NoGradient(), "gradient", 2).loss_grad(x, y)


@pytest.mark.parametrize("query", ["labels", "logits", "gradient", "differentiable"])
def test_logits_of_the_wrong_shape_are_refused(query: str) -> None:
    x, y = grid_images(2)
    with pytest.raises(PluginError, match=r'"broken": logits must be \(2, 3\); got \(2, 2\)'):
        QUERIES[query](Victim(Broken("shape"), "gradient", 2), x, y)


# budget


def test_budget_is_the_most_passes_of_one_example() -> None:
    x, y = grid_images(2)
    victim = Victim(Noisy(), "gradient", 2, eot=2, budget=9)
    victim.loss_grad(x, y)  # 2 forwards, 2 backwards
    victim.loss_grad(x, y)
    with pytest.raises(BudgetExhausted, match="query budget of 9 passes per image"):
        victim.logits(x)
    assert passes(victim) == [(4, 4)] * 2


def test_an_example_that_has_budget_left_goes_on() -> None:
    x, _ = grid_images(2)
    victim = Victim(Linear(), "scores", 2, budget=3)
    victim.subset(torch.tensor([0])).logits(x[[0, 0, 0]])
    victim.subset(torch.tensor([1])).logits(x[1:])
    with pytest.raises(BudgetExhausted):
        victim.logits(x)
    assert victim.ledger.forwards.tolist() == [3, 1]


def test_best_images_are_those_with_the_largest_margin_within_the_bound() -> None:
    x, y = grid_images(3)
    defense, threat = Linear(), ThreatModel("linf", 0.2)
    victim = Victim(defense, "scores", 3)
    victim.watch(x, y, threat)
    with seeded(0, "queries"):
        queries = [(x + scale * (torch.rand_like(x) - 0.5)).clamp(0, 1) for scale in (0.0, 0.3, 0.4, 4.0, 4.0)]
    victim.logits(queries[0])
    victim.logits(torch.cat(queries[1:4]))  # candidate-major
    for example in (2, 0, 1):
        victim.subset(torch.tensor([example])).logits(queries[4][[example]])
    everything = torch.stack(queries)  # queries b c h w
    margins = torch.stack([margin(defense(images), y) for images in queries])
    within = torch.stack([threat.contains(x, images) for images in queries])
    assert within.sum(0).tolist() == [3, 3, 3]  # the last two queries stray
    assert bool((margins.argmax(0) >= 3).any())  # and would be chosen
    chosen = margins.where(within, -torch.inf).argmax(0)
    assert torch.equal(best(victim), everything[chosen, torch.arange(3)])


def test_best_images_of_a_minimal_norm_attack_are_the_nearest_errors() -> None:
    """Along a line to an error of each image: the nearest one queried, wherever the margin is larger."""
    defense, norm = LinearToy(), "l2"
    x, y = defense.examples(6, norm, reach=0.1)
    towards = defense.weight[(y + 1) % CLASSES] - defense.weight[y]
    line = (towards / towards.norm(dim=1, keepdim=True)).view_as(x)
    victim = Victim(defense, "scores", 6)
    victim.watch(x, y, ThreatModel(norm, 0.5), "minimal")
    for step in (0.02, 0.05):  # no error yet: the larger margin
        victim.logits(x + step * line)
    assert torch.equal(best(victim), x + 0.05 * line)
    victim.logits(torch.cat([x + step * line for step in (0.45, 0.3, 0.4, 0.01, 0.6)]))  # candidate-major
    assert bool((defense(x + 0.3 * line).argmax(1) != y).all())
    assert torch.equal(best(victim), x + 0.3 * line)


@pytest.mark.parametrize("defense", [Noisy(gain=0.5), NoisyHead()], ids=["apart", "sharing layers"])
def test_labels_once_are_of_one_draw_and_no_candidates(defense: Defense) -> None:
    """One pass for each row, whatever the EOT; what chance had wrong there must not end as the nearest error."""
    x, y = grid_images(40)
    victim = Victim(defense, "decisions", 40, eot=5)
    victim.watch(x, y, ThreatModel("linf", 1.0), "minimal")
    asked = torch.cat([x, (x + 0.1).clamp(0, 1)])
    with seeded("once"):
        answers = [victim.labels_once(asked) for _ in range(20)]
    assert victim.ledger.forwards.tolist() == [2 * 20] * 40
    assert any(not torch.equal(answers[0], other) for other in answers), "each call has a draw of its own"
    assert torch.equal(best(victim), x)
    victim.labels(asked)
    assert not torch.equal(best(victim), x)


def test_labels_once_of_a_deterministic_defense_are_its_labels() -> None:
    x, y = grid_images(6)
    victim = Victim(Linear(), "decisions", 6, eot=5)
    victim.watch(x, y, ThreatModel("linf", 1.0))
    assert torch.equal(victim.labels_once((x + 0.1).clamp(0, 1)), victim.labels((x + 0.1).clamp(0, 1)))
    assert passes(victim) == [(2, 0)] * 6
    assert torch.equal(best(victim), (x + 0.1).clamp(0, 1))
    with pytest.raises(PluginError, match=r"called victim\.labels_once"):
        Victim(Linear(), "none", 6).labels_once(x)


# targets


def test_a_targeted_query_is_autograd_s_of_the_targeted_loss() -> None:
    defense, x, y = conv_case(6)
    target = (defense(x).argmax(1) + 2) % 5
    leaf = x.clone().requires_grad_()
    values = targeted_dlr(defense(leaf), y, target)
    (grad,) = torch.autograd.grad(values.sum(), leaf)
    found = Victim(defense, "gradient", 6).gradient(x, y, "dlr", target)
    torch.testing.assert_close(found.grad, grad)
    torch.testing.assert_close(found.loss, values.detach())
    with pytest.raises(UsageError, match="takes a loss by name"):
        Victim(defense, "gradient", 6).gradient(x, y, margin, target)


def test_targets_follow_their_images_through_eot_and_small_batches() -> None:
    x, y = grid_images(5)
    target = (y + 1 + torch.arange(5) % 2) % 3
    defense = Noisy(sigma=0.0)
    defense.batch_rows = 2
    found = Victim(defense, "gradient", 5, eot=3).gradient(x, y, "margin", target)
    torch.testing.assert_close(found.loss, targeted_margin(Linear()(x), y, target))


# what else it knows


def test_start_follows_the_subset() -> None:
    x, _ = grid_images(4)
    victim = Victim(Linear(), "scores", 4, start=x + 0.01, dataset="toys")
    for index in (torch.tensor([3, 1]), torch.tensor([False, True, False, True])):
        part = victim.subset(index)
        assert part.start is not None
        assert torch.equal(part.start, x[index] + 0.01)
        assert part.dataset == "toys"
    once = victim.subset(torch.tensor([3, 1])).subset(torch.tensor([1])).start
    assert once is not None
    assert torch.equal(once, x[1:2] + 0.01)
    assert Victim(Linear(), "scores", 4).subset(torch.tensor([0])).start is None
    assert Victim(Linear(), "scores", 4).dataset == ""


# foreign code


@pytest.mark.parametrize(("defense", "draws"), [(Linear(), 1), (NoisyInput(), 6)], ids=["deterministic", "randomized"])
def test_differentiable_logits_are_the_mean_with_its_gradient(defense: Defense, draws: int) -> None:
    x, y = grid_images(4)
    victim = Victim(defense, "gradient", 4, eot=6)
    leaf = x.clone().requires_grad_()
    with seeded(5, "noise"):
        logits = victim.differentiable(leaf)
    assert passes(victim) == [(draws, 0)] * 4
    (grad,) = torch.autograd.grad(functional.cross_entropy(logits, y, reduction="sum"), leaf)
    assert passes(victim) == [(draws, draws)] * 4, "the backward pass counts when it is taken"
    again = x.clone().requires_grad_()
    with seeded(5, "noise"):
        mean = defense(again.repeat(draws, 1, 1, 1)).unflatten(0, (draws, 4)).mean(0)
    torch.testing.assert_close(logits, mean)
    expected = torch.autograd.grad(functional.cross_entropy(mean, y, reduction="sum"), again)[0]
    torch.testing.assert_close(grad, expected)


def test_differentiable_without_a_graph_costs_forwards_alone() -> None:
    x, _ = grid_images(2)
    victim = Victim(Noisy(), "gradient", 2, eot=3)
    assert not victim.differentiable(x).requires_grad
    with torch.no_grad():
        assert not victim.differentiable(x.clone().requires_grad_()).requires_grad
    assert passes(victim) == [(6, 0)] * 2


def test_differentiable_takes_the_gradient_mode_and_keeps_the_budget() -> None:
    x, _ = grid_images(2)
    leaf = x.clone().requires_grad_()
    flat = Victim(TwoPaths(), "gradient", 2, mode="flat").differentiable(leaf)
    assert not bool(torch.autograd.grad(flat.sum(), leaf)[0].any())
    victim = Victim(Linear(), "gradient", 2, budget=2)
    logits = victim.differentiable(leaf)
    torch.autograd.grad(logits.sum(), leaf)
    with pytest.raises(BudgetExhausted):
        victim.differentiable(leaf)
    short = Victim(Linear(), "gradient", 2, budget=1)
    logits = short.differentiable(leaf)
    with pytest.raises(BudgetExhausted):
        torch.autograd.grad(logits.sum(), leaf)


# draws that share layers


def ask(victim: Victim, query: str, x: Tensor, y: Tensor) -> list[Tensor]:
    """All that a query answers; of `differentiable` the logits and the gradient of their cross-entropy."""
    with seeded("draws that share layers"):
        if query == "differentiable":
            leaf = x.clone().requires_grad_()
            logits = victim.differentiable(leaf)
            return [logits, *torch.autograd.grad(functional.cross_entropy(logits, y, reduction="sum"), leaf)]
        found = QUERIES[query](victim, x, y)
    return [found] if isinstance(found, Tensor) else list(found)  # type: ignore[call-overload]


@pytest.mark.parametrize("randomness", ["fresh", "fixed"])
@pytest.mark.parametrize("query", QUERIES)
def test_draws_that_share_layers_answer_as_draws_of_copies(query: str, randomness: Any) -> None:
    """The same numbers and the same count of queries, by a tenth of the first layer's rows."""
    x, y = grid_images(4)
    shared, apart = NoisyHead(), NoisyHeadBelow()
    answers, counts = [], []
    for defense in (shared, apart):
        victim = Victim(defense, "gradient", 4, eot=10, randomness=randomness)
        answers.append(ask(victim, query, x.repeat(2, 1, 1, 1), y.repeat(2)))
        counts.append(passes(victim))
    torch.testing.assert_close(answers[0], answers[1])
    assert counts[0] == counts[1]
    assert (shared.first, apart.first) == (8, 80)
    assert (shared.seen, apart.seen) == ([8], [])


def test_draws_that_share_layers_are_asked_in_batches() -> None:
    x, y = grid_images(5)
    defense = NoisyHead()
    defense.batch_rows = 2
    found = Victim(defense, "gradient", 5, eot=3).gradient(x, y)
    assert defense.seen == [2, 2, 1]
    assert found.grad.shape == x.shape
    with seeded("one of them"):
        one = Victim(defense, "gradient", 1, eot=20_000).gradient(x[4:], y[4:])
    with seeded("the same apart"):
        apart = Victim(NoisyHeadBelow(), "gradient", 1, eot=20_000).gradient(x[4:], y[4:])
    torch.testing.assert_close(one.loss, apart.loss, rtol=0, atol=6 * float(one.noise + apart.noise))


def changed_by_object(defense: NoisyHead) -> None:
    defense.forward = lambda x: 2 * NoisyHead.forward(defense, x)  # type: ignore[method-assign]


def changed_by_hook(defense: NoisyHead) -> None:
    defense.register_forward_hook(lambda _module, _inputs, logits: 2 * logits)


@pytest.mark.parametrize("change", [changed_by_object, changed_by_hook])
def test_a_forward_that_was_changed_is_asked_itself(change: Callable[[NoisyHead], None]) -> None:
    x, _ = grid_images(4)
    plain, changed = NoisyHead(), NoisyHead()
    change(changed)
    first, second = (ask(Victim(defense, "scores", 4, eot=5), "logits", x, x)[0] for defense in (plain, changed))
    torch.testing.assert_close(second, 2 * first)
    assert (plain.seen, changed.seen) == ([4], [])


class Misshapen(NoisyHead):
    """Forgets the axis of the draws."""

    def forward_draws(self, x: Tensor, draws: int) -> Tensor:
        return self(x.repeat(draws, 1, 1, 1))


def test_draws_of_another_shape_are_refused() -> None:
    x, _ = grid_images(2)
    with pytest.raises(PluginError, match=r"logits must be \(5, 2, 3\); got \(10, 3\) from forward_draws"):
        Victim(Misshapen(), "scores", 2, eot=5).logits(x)


def test_forward_draws_is_forward_of_copies_by_default() -> None:
    x, _ = grid_images(2)
    with seeded("default"):
        came = Noisy().forward_draws(x, 3)
    with seeded("default"):
        torch.testing.assert_close(came, Noisy()(x.repeat(3, 1, 1, 1)).unflatten(0, (3, 2)))
