"""Training of a fortified net: clean images, then adversarial ones, with the losses of reconstruction."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from robench.defense import in_eval_mode
from robench.threat import ThreatModel
from robench.train.adversarial import Inner, WatchedRecipe, measure_attacked, perturb
from robench.train.recipe import Stage, autocast
from robench.types import Images, Labels

from .fortify import Trace, reconstruction_losses, upcast
from .own import FortifiedDefense

MOST_SHIFT: Final = 3
CHECK_EVERY: Final = 400


class FortifiedRecipe(WatchedRecipe):
    """Cross-entropy of images and of adversarial ones, and both losses of reconstruction (arXiv 1804.02485, eq. 6).

    Adam at 1e-3 and batches of 128, as in the released code. `pgd`: `train_steps` steps from a random start, through
    the net with its noise (the paper's PGD has 40 steps); one step more each time it has overfitted. `fgsm`: one step
    against the net's own answer. Both start on clean images and then half the bound, since at a large one a fresh
    net stays where all classes get the same answer.
    """

    defense: FortifiedDefense

    def __init__(self, defense: FortifiedDefense) -> None:
        """Keeps the net to train."""
        self.defense, self.name = defense, str(defense.train_attack)
        self.more_steps = 0

    def stages(self) -> list[Stage]:
        """Clean images, half the bound, the bound: two to three epochs of 60,000 images together."""

        def stage(name: str, iterations: int, flat: float, loss: Callable[[Images, Labels], Tensor]) -> Stage:
            parameters = list(self.defense.parameters())
            check = CHECK_EVERY if name == "adversarial" else 0
            return Stage(
                name, iterations, loss, parameters, 1e-3, flat=flat, batch_size=128, clip=5.0, check_every=check
            )

        return [
            stage("clean", 150, 1.0, self.clean_loss),
            stage("half", 150, 1.0, self.half_loss),
            stage("adversarial", 1000 if self.name == "pgd" else 600, 0.4, self.adversarial_loss),
        ]

    def clean_loss(self, x: Images, y: Labels) -> Tensor:
        """Cross-entropy and reconstruction of the images themselves."""
        x = self.vary(x)
        with autocast(x):
            clean = self.defense.net.trace(x)
        rec, _ = reconstruction_losses(clean, None, stop_gradient=self.defense.stop_gradient)
        return functional.cross_entropy(upcast(clean.output), y) + self.defense.lambda_rec * rec

    def half_loss(self, x: Images, y: Labels) -> Tensor:
        """The whole loss at half the bound."""
        return self._whole_loss(x, y, self.defense.train_eps / 2)

    def adversarial_loss(self, x: Images, y: Labels) -> Tensor:
        """The whole loss at the bound."""
        return self._whole_loss(x, y, self.defense.train_eps)

    def _whole_loss(self, x: Images, y: Labels, eps: float) -> Tensor:
        self.overfitted = False  # a loss that is not finite is another trouble than the last check's
        x = self.vary(x)
        x_adv = self.perturb(x, y, eps)
        with autocast(x):
            clean, adversarial = self.defense.net.trace(x), self.defense.net.trace(x_adv)
        return total_loss(self.defense, clean, adversarial, y)

    def perturb(self, x: Images, y: Labels, eps: float) -> Images:
        """The images that the training attack finds; the weights count as constants meanwhile.

        In eval mode, so that the running statistics of a network of one's own are those of the images it learns from.
        """
        with in_eval_mode(self.defense):
            return self._attack(x, y, ThreatModel("linf", eps))

    def _attack(self, x: Images, y: Labels, threat: ThreatModel) -> Images:
        if self.name == "pgd":
            return perturb(lambda found: self._cross_entropy(found, y), x, threat, self.inner)
        with torch.no_grad(), autocast(x):
            y = self.defense.adaptive_forward(x).argmax(1)  # the label would leak into the image
        leaf = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(self._cross_entropy(leaf, y), leaf)
        return threat.project(x, x + threat.eps * threat.steepest(grad))

    @property
    def inner(self) -> Inner:
        """The training attack of `pgd` at this moment."""
        return Inner.of_steps(self.defense.train_steps + self.more_steps)

    def _cross_entropy(self, x: Images, y: Labels) -> Tensor:
        with autocast(x):
            logits = self.defense.adaptive_forward(x)
        return functional.cross_entropy(upcast(logits), y)

    def vary(self, x: Images) -> Images:
        """Shifts each image by up to 3 pixels, its edge repeated, and mirrors half of them, if `augment` is set."""
        if not self.defense.augment:
            return x
        shifts = torch.randint(-MOST_SHIFT, MOST_SHIFT + 1, (2, len(x)), device=x.device)
        mirrored = torch.rand(len(x), device=x.device) < 0.5
        side = torch.arange(x.shape[-1], device=x.device)
        rows, columns = ((side + shift[:, None]).clamp(0, len(side) - 1) for shift in shifts)  # b side
        columns = torch.where(mirrored[:, None], columns.flip(1), columns)
        image = torch.arange(len(x), device=x.device)[:, None, None, None]
        channel = torch.arange(x.shape[1], device=x.device)[:, None, None]
        return x[image, channel, rows[:, None, :, None], columns[:, None, None, :]]

    def check(self, stage: Stage, x: Images, y: Labels) -> tuple[dict[str, float], bool]:
        """Accuracy after one step and after twenty: whether the net has overfitted to its attack, or lost what it had.

        Training with `fgsm` goes on however little twenty steps leave: whether it breaks is what it is there to show.
        What it must not lose is its accuracy on clean images.
        """
        del stage
        figures = self.measure(x, y)
        return figures, self.watch(figures, attacked=self.name != "fgsm")

    def add_step(self) -> None:
        """One more step."""
        self.more_steps += 1

    def state(self) -> dict[str, float]:
        """The steps that roll-backs have added, and what the watch goes by."""
        return {"more_steps": self.more_steps, **super().state()}

    def load_state(self, state: dict[str, float]) -> None:
        """Takes up what `state` gave."""
        self.more_steps = int(state["more_steps"])
        super().load_state(state)

    def measure(self, x: Images, y: Labels) -> dict[str, float]:
        """Accuracy on clean images, after one step and after twenty of the white-box attack at `train_eps`."""
        return measure_attacked(self.defense, x, y, ThreatModel("linf", self.defense.train_eps))

    def facts(self) -> dict[str, object]:
        """The training attack as it ended."""
        eps, inner = self.defense.train_eps, self.inner
        if self.name == "fgsm":
            attack = f"one step of linf {eps:g} from the image, against the net's own answer"
            return {"training_attack": attack, **super().facts()}
        steps = f"{inner.steps} steps of {inner.step:.3g} eps from a random start"
        return {"training_attack": f"{steps}, linf {eps:g}", **super().facts()}


def total_loss(defense: FortifiedDefense, clean: Trace, adversarial: Trace, y: Labels) -> Tensor:
    """Equation 6: both cross-entropies and both losses of reconstruction, with the defense's weights."""
    rec, adv = reconstruction_losses(clean, adversarial, stop_gradient=defense.stop_gradient)
    labels = functional.cross_entropy(upcast(clean.output), y) + functional.cross_entropy(upcast(adversarial.output), y)
    return labels + defense.lambda_rec * rec + defense.lambda_adv * adv
