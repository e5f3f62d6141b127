"""What an attack may see of a defense: logits, labels or gradients, counted, gated and averaged over randomness."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Self

import torch
from jaxtyping import Int
from torch import Tensor

from robench.answers import AnyLogits, check_logits, mend_gradients
from robench.attack import ACCESS_LEVELS, Access, Goal, Randomness
from robench.batches import pass_in_batches, pass_once
from robench.defense import Defense
from robench.draws import has_shared_layers
from robench.errors import BudgetExhausted, PluginError
from robench.ledger import Ledger, Watched
from robench.losses import Loss, TargetedLoss, aim, margin
from robench.queries import Gradient, Value, standard_error
from robench.rng import seeded
from robench.threat import ThreatModel
from robench.types import Images, Labels, Logits, PerExample


class Victim:
    """All that an attack gets of a defense.

    Every query is on images `b c h w` of which row i belongs to example i of the batch given to the attack. To query
    some of the examples take a `subset`. To try several candidates for each, pass `m * b` rows, candidate-major.

    Randomness: a gradient query averages the loss over `eot` draws of a randomized defense (Athalye et al. 2018,
    expectation over transformation), folded into the batch as far as memory allows; `logits` averages the logits over
    as many draws. Of a defense that draws once for a pass each draw is a pass of its own, so that they are `eot` draws;
    the images of the batch share each. A defense with `forward_draws` is asked for all of an image's draws at once. On
    a deterministic defense there is one draw. An attack may have the draws `fixed`, so that each query of the same
    batch meets the same ones, or `off` (see `Attack.randomness`).

    Precision: with `bfloat16` the passes of `gradient` run under autocast, and those of a randomized defense for logits
    and labels too, whose draws differ by more than the rounding. Where such a pass, or one through an
    `adaptive_forward` of the defense's own, which may be a stand-in, finds a deterministic defense in error, its logits
    come from another pass of `forward` in float32, so that no error is taken for granted.

    Budget: a query that would take one example over it is refused, which ends the attack on all of them; the engine
    then takes the best images of each that were asked about (see `robench.ledger.Watched`).

    Logits that are not finite are refused, as the judge does: an attack compares them, and NaN would look robust.

    Attributes:
        randomized: whether the defense is.
        num_classes: its classes.
        dataset: the dataset's name, empty where it has none.
        eot: draws in one query.
        start: images within a smaller bound at which the same attack ended; where to go on from. None: not known.
        ledger: the queries so far.
    """

    def __init__(  # noqa: PLR0913 - all that the answer to a query depends on
        self,
        defense: Defense,
        access: Access,
        examples: int,
        *,
        eot: int = 1,
        mode: str | None = None,
        budget: int | None = None,
        randomness: Randomness = "fresh",
        precision: str = "float32",
        dataset: str = "",
        start: Images | None = None,
        on_passes: Callable[[int], None] | None = None,
    ) -> None:
        """Prepares an empty ledger.

        Args:
            defense: what is attacked.
            access: what the attack declared; a query above it raises.
            examples: images in the attack's batch.
            eot: draws averaged in one query of a randomized defense.
            mode: gradient mode; None takes the defense's first.
            budget: the most forwards plus backwards of one example; None: no limit.
            randomness: what becomes of the defense's own randomness in queries; see `Attack`.
            precision: of gradient queries: `float32` or `bfloat16`.
            dataset: the dataset's name, for an attack that looks for weights of its own; empty where it has none.
            start: images at which the same attack ended within a smaller bound.
            on_passes: called with the number of passes after each batch of them (progress).
        """
        self._defense = defense
        self._access = access
        self._mode = defense.check_mode(mode)
        self.randomized = defense.randomized
        self.num_classes = defense.num_classes
        self.dataset = dataset
        self.eot = eot if defense.randomized and randomness != "off" else 1
        self.start = start
        self._at_once = self.eot > 1 and has_shared_layers(defense)
        self._randomness = randomness
        self._held: int | None = None
        self._precision = precision
        self._rows = torch.arange(examples)
        zeros = torch.zeros(examples, dtype=torch.int64)
        self.ledger = Ledger(zeros, zeros.clone(), budget, on_passes=on_passes)

    def subset(self, index: Tensor) -> Self:
        """The victim for some of the examples: row i of a query then belongs to example `index[i]` (or mask).

        Raises:
            PluginError: an example is named twice, so that its queries could not be counted.
        """
        part = copy.copy(self)
        part._rows = self._rows[index.cpu()]
        part.start = None if self.start is None else self.start[index]
        if len(part._rows.unique()) < len(part._rows):
            raise PluginError("victim.subset takes each example at most once; pass candidates as m * b rows instead")
        return part

    def watch(self, x: Images, y: Labels, threat: ThreatModel, goal: Goal = "budget") -> None:
        """Starts to remember each example's best images within the bound, for an attack that its budget may cut off.

        Args:
            x: the images under attack.
            y: their labels.
            threat: the bound.
            goal: of the attack; what is best depends on it, see `robench.ledger.Watched`.
        """
        self.ledger.watched = Watched.begin(x, y, threat, goal)

    def labels(self, x: Images) -> Labels:
        """The class that the defense answers; of a randomized one, the most frequent of `eot` answers.

        Raises:
            PluginError: the attack declared no access to decisions, or the logits are not finite.
            BudgetExhausted: the query budget would be exceeded.
        """
        self._open("decisions", "labels")
        votes = torch.nn.functional.one_hot(self._draw(x).argmax(2), self.num_classes).sum(0)  # eot b k -> b k
        return votes.argmax(1)

    def labels_per_draw(self, x: Images) -> Int[Tensor, "eot b"]:
        """The class in each of `eot` draws; an error, to `watch` as well, is wrong in all. Raises as `labels`."""
        self._open("decisions", "labels_per_draw")
        return self._draw(x, in_all=True).argmax(2)

    def labels_once(self, x: Images) -> Labels:
        """The class that the defense answers in a single draw, for an attack that asks about many images instead.

        One draw may be wrong by luck, so these images are not among those that `watch` remembers. Raises as `labels`.
        """
        self._open("decisions", "labels_once")
        part = self.with_draws(1)
        return (part.unwatched() if self.randomized else part)._draw(x)[0].argmax(1)

    def logits(self, x: Images) -> Logits:
        """The defense's logits; of a randomized one, their mean over `eot` draws.

        Raises:
            PluginError: the attack declared no access to scores, or the logits are not finite.
            BudgetExhausted: the query budget would be exceeded.
        """
        self._open("scores", "logits")
        return self._draw(x).mean(0)

    def with_draws(self, count: int) -> Self:
        """The victim that takes `count` draws for a query, 1 to `eot` (or more: all); PluginError where none."""
        if count < 1:
            raise PluginError(f"victim.with_draws takes at least one draw; got {count}")
        part = copy.copy(self)
        part.eot = min(count, self.eot)
        return part

    def unwatched(self) -> Self:
        """The victim for images that are none of the attack's finds: `watch` does not remember them."""
        part = copy.copy(self)
        part.ledger = replace(self.ledger, watched=None)
        return part

    def hold_draws(self) -> None:
        """From here on queries of a batch all meet the same draws, not those before: common random numbers.

        The next call takes other draws. A subset of all examples meets the same; a narrower one, or another number of
        candidates or draws, meets others, held as well. Nothing changes where the attack's randomness is not `fresh`.
        Ask about the best images next: answers on other draws do not compare, so that of the best images so far (see
        `watch`; not of nearest errors) it is forgotten how good they were, and what is asked next takes their place.
        """
        if self.randomized and self._randomness == "fresh":
            self._held = int(torch.randint(2**62, ()))
            self.ledger.forget(self._rows)

    def loss(self, x: Images, y: Labels, loss: str | Loss = "ce", target: Labels | None = None) -> Value:
        """Loss and logits, each the mean over `eot` draws: comparable with those of `gradient`, by forwards alone.

        The loss of `logits`, which are a mean, would be another one: smaller on a randomized defense if it is convex.

        Args:
            x: images in [0, 1].
            y: their labels.
            loss: as for `gradient`.
            target: as for `gradient`.

        Raises:
            PluginError: the attack declared no access to scores, or the logits are not finite.
            BudgetExhausted: the query budget would be exceeded.
        """
        self._open("scores", "loss")
        goal = y if target is None else target
        draws = self._draw(x)
        losses = aim(loss, target)(draws.flatten(0, 1), self._fold(y), self._fold(goal))
        losses = losses.unflatten(0, (self.eot, -1))
        return Value(losses.mean(0), draws.mean(0), standard_error(losses))

    def loss_grad(self, x: Images, y: Labels, loss: str | Loss = "ce") -> tuple[PerExample, Images]:
        """Loss of each example and its gradient with respect to x; see `gradient`."""
        result = self.gradient(x, y, loss)
        return result.loss, result.grad

    def gradient(self, x: Images, y: Labels, loss: str | Loss = "ce", target: Labels | None = None) -> Gradient:
        """Loss, gradient and logits, each the mean over `eot` draws, from the same passes (but see the class).

        Entries of the gradient that are not finite become 0, so that the others still lead.

        Args:
            x: images in [0, 1].
            y: their labels.
            loss: a name in robench.losses or a function of logits and labels, one value per row.
            target: classes to reach; takes the targeted form of a loss given by name.

        Raises:
            PluginError: the attack declared no access to gradients, the defense gives none, or one without a finite
                entry, or its logits are not finite.
            BudgetExhausted: the query budget would be exceeded.
        """
        self._open("gradient", "loss_grad")
        self.ledger.charge(self._rows, len(x), forwards=self.eot, backwards=self.eot)
        aimed = aim(loss, target)
        goal = y if target is None else target
        with self._controlled(x):
            losses, grads, logits = self._over_draws(
                lambda x, y, goal: self._differentiate(x, y, goal, aimed), *map(self._spread, (x, y, goal)), passes=2
            )
        mean = Gradient(
            losses.mean(0), mend_gradients(self._defense, grads).mean(0), logits.mean(0), standard_error(losses)
        )
        result = self._confirm(mean, x, y, goal, aimed)
        self._remember(x, result.logits)
        return result

    def _over_draws(self, call: Callable[..., tuple[Tensor, ...]], *spread: Tensor, passes: int = 1) -> list[Tensor]:
        """What `call` returns for the draws of each row, with these as the first axis: eot b ...

        Args:
            call: returns tensors of one row for each given row, or where the draws share layers, of eot x those rows.
            *spread: what `_spread` made of images and so on.
            passes: what `call` makes of one draw: a forward, or a backward too.
        """
        draws, together = (self.eot, None) if self._at_once else (1, len(spread[0]) // self.eot)

        def tell(rows: int) -> None:
            self.ledger.tell(rows * draws * passes)

        parts = pass_in_batches(self._defense, call, *spread, together=together, on_rows=tell)
        if self._at_once:
            return [torch.cat(part, 1) for part in zip(*parts, strict=True)]
        return [torch.cat(part).unflatten(0, (self.eot, -1)) for part in zip(*parts, strict=True)]

    def _differentiate(self, x: Images, y: Labels, target: Labels, loss: TargetedLoss) -> tuple[Tensor, ...]:
        """Losses, gradients and logits of one pass, for `_over_draws`; the gradient of draws at once is their mean."""
        leaf = x.detach().requires_grad_()
        with torch.enable_grad():
            with self._fast(x):
                logits = self._adapt(leaf)
            logits = logits.float()
            if self._at_once:
                values = loss(logits.flatten(0, 1), self._fold(y), self._fold(target)).unflatten(0, (self.eot, -1))
            else:
                values = loss(logits, y, target)
            if not values.requires_grad:
                raise PluginError(
                    f'defense "{self._defense.name}": adaptive_forward gives no gradient with respect to x. '
                    "Implement adaptive_forward with a differentiable stand-in (BPDA)"
                )
            (grad,) = torch.autograd.grad(values.sum(), leaf)
        return values.detach(), grad[None] / self.eot if self._at_once else grad, logits.detach()

    def _adapt(self, x: Images) -> AnyLogits:
        """One pass of `adaptive_forward`, checked, for `_over_draws`."""
        if self._at_once:
            return self._answer(x)
        logits = pass_once(
            self._defense, lambda x: self._defense.adaptive_forward(x, self._mode), x, forward="adaptive_forward"
        )
        return check_logits(self._defense, logits, "adaptive_forward", len(x))

    def _confirm(self, found: Gradient, x: Images, y: Labels, target: Labels, loss: TargetedLoss) -> Gradient:
        """Puts logits and losses of `forward` where a faster pass, or perhaps a stand-in, met an error.

        Only of a deterministic defense. An error that the budget cannot confirm stands.
        """
        is_forward = type(self._defense).adaptive_forward is Defense.adaptive_forward
        if self.randomized or (self._precision == "float32" and is_forward):
            return found
        wrong = margin(found.logits, y) > 0
        for number, rows in enumerate(wrong.split(len(self._rows))):  # one candidate of each example
            if not bool(rows.any()):
                continue
            place = rows.nonzero()[:, 0] + number * len(rows)
            try:
                logits = self.subset(rows)._draw(x[place])[0].float()
            except BudgetExhausted:
                return found
            found.logits[place], found.loss[place] = logits, loss(logits, y[place], target[place])
        return found

    def differentiable(self, x: Images) -> Logits:
        """Mean logits over `eot` draws with their graph to x, for foreign code that takes the gradient itself.

        Differs from `gradient` in that a loss taken on the result sees the mean of the logits, not of the losses. The
        backward pass is counted when the gradient comes back. Without a graph to keep this is `logits`.

        Raises:
            PluginError: the attack declared no access to gradients, or the logits are not finite.
            BudgetExhausted: the query budget would be exceeded.
        """
        self._open("gradient", "differentiable")
        if not (torch.is_grad_enabled() and x.requires_grad):
            return self._draw(x).mean(0)

        def come_back(grad: Tensor) -> Tensor:
            self.ledger.tell(len(x) * self.eot)
            return mend_gradients(self._defense, grad.unflatten(0, (-1, len(x)))).flatten(0, 1)

        self.ledger.charge(self._rows, len(x), forwards=self.eot, backwards=0)
        with self._controlled(x):
            seen = self._spread(x)
            seen.register_hook(come_back)
            (draws,) = self._over_draws(lambda rows: (self._adapt(rows),), seen)
        logits = draws.mean(0)
        logits.register_hook(lambda grad: self.ledger.charge(self._rows, len(grad), forwards=0, backwards=self.eot))
        self._remember(x.detach(), logits.detach())
        return logits

    @contextlib.contextmanager
    def _controlled(self, x: Images) -> Iterator[None]:
        """Holds the defense's randomness fixed or off, where the attack asked for that."""
        if not self.randomized or (self._randomness == "fresh" and self._held is None):
            yield
        elif self._randomness == "off":
            with self._defense.without_randomness():
                yield
        else:  # the seed of the attack's own stream names the draws, and the stream does not move
            with seeded("fixed", torch.initial_seed() if self._held is None else self._held, device=x.device):
                yield

    def _fast(self, x: Images) -> contextlib.AbstractContextManager[object]:
        if self._precision == "float32":
            return contextlib.nullcontext()
        return torch.autocast(x.device.type, dtype=torch.bfloat16)

    def _draw(self, x: Images, *, in_all: bool = False) -> Tensor:
        """Logits of `eot` draws, eot b k; what is remembered as wrong is so in their mean, or `in_all`."""
        self.ledger.charge(self._rows, len(x), forwards=self.eot, backwards=0)
        fast = self._fast(x) if self.randomized else contextlib.nullcontext()
        with torch.no_grad(), self._controlled(x), fast:
            (draws,) = self._over_draws(lambda rows: (self._answer(rows),), self._spread(x))
        watched = self.ledger.watched if in_all else None
        self._remember(x, draws.mean(0) if watched is None else watched.weakest(self._rows, draws))
        return draws

    def _answer(self, x: Images) -> AnyLogits:
        """One pass of `forward`, or of `forward_draws`, checked, for `_over_draws`."""
        if self._at_once:
            logits = pass_once(
                self._defense, lambda x: self._defense.forward_draws(x, self.eot), x, forward="forward_draws"
            )
            return check_logits(self._defense, logits, "forward_draws", self.eot, len(x))
        return check_logits(self._defense, pass_once(self._defense, self._defense, x), "forward", len(x))

    def _spread(self, rows: Tensor) -> Tensor:
        """What passes over all draws are given: a copy of the rows for each, or where the draws share layers, one."""
        return rows.clone() if self._at_once else self._fold(rows)

    def _fold(self, rows: Tensor) -> Tensor:
        """The EOT draws of images or labels as one batch, draw-major."""
        return rows.repeat(self.eot, *[1] * (rows.ndim - 1))

    def _open(self, needed: Access, query: str) -> None:
        if ACCESS_LEVELS.index(needed) > ACCESS_LEVELS.index(self._access):
            raise PluginError(
                f'an attack that declares access "{self._access}" called victim.{query}, which needs "{needed}"'
            )

    def _remember(self, x: Images, logits: Logits) -> None:
        if self.ledger.watched is None:
            return
        size = len(self._rows)
        for images, answers in zip(x.split(size), logits.split(size), strict=True):  # one candidate of each example
            self.ledger.watched.see(self._rows, images, answers)
