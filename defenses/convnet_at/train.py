"""Adversarial training: the loss is taken at the images that a short PGD finds for the current weights."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Final

from torch import Tensor, nn

from robench.precision import training_precision
from robench.threat import ThreatModel
from robench.train.adversarial import Inner, WatchedRecipe, measure_attacked, perturb
from robench.train.recipe import Stage, autocast
from robench.types import Images, Labels, Logits

from .model import ConvNetAT

TRADES_BETA: Final = 6.0


@dataclass(frozen=True)
class Variant:
    """A recipe: its inner maximisation and its loss.

    Attributes:
        inner: how the images are found.
        trades: the loss of TRADES rather than cross-entropy at the images found.
    """

    inner: Inner
    trades: bool = False


VARIANTS: Final = {
    "madry": Variant(Inner.of_steps(7)),
    "fast": Variant(Inner(1, 1.25)),
    "pgd2": Variant(Inner.of_steps(2)),
    "trades": Variant(Inner(5, 0.3, start="near"), trades=True),
}
"""`madry`: Madry et al. 2018 (arXiv 1706.06083) with 7 steps. `fast`: RS-FGSM of Wong et al. 2020 (arXiv 2001.03994),
one step of 1.25 eps from a random start; it can overfit to itself, and then takes a step more.
`pgd2`: a second step from the start. `trades`: Zhang et al. 2019 (arXiv 1901.08573), eq. 5 with beta 6."""


class AdversarialRecipe(WatchedRecipe):
    """Clean images first, then adversarial ones of a third, two thirds and all of eps.

    At the whole eps from the start, a net may stay on the plateau where all classes are equally likely.
    """

    defense: ConvNetAT

    def __init__(self, defense: ConvNetAT, name: str) -> None:
        """Keeps the net to train."""
        self.defense, self.name, self.variant = defense, name, VARIANTS[name]
        self.inner = self.variant.inner
        self.threat = ThreatModel(defense.train_norm, defense.train_eps)

    def stages(self) -> list[Stage]:
        """Under one epoch of clean images, one of ramp, then about five of adversarial ones at the full bound."""
        parameters = list(self.defense.parameters())
        stage = functools.partial(Stage, parameters=parameters, learning_rate=1e-3, batch_size=128, clip=5.0)
        return [
            stage("clean", 300, self.clean_loss, flat=1.0),
            stage("ramp_1", 200, functools.partial(self.adversarial_loss, share=1 / 3), flat=1.0),
            stage("ramp_2", 200, functools.partial(self.adversarial_loss, share=2 / 3), flat=1.0),
            stage("adversarial", 2400, self.adversarial_loss, flat=0.4, check_every=200),
        ]

    def clean_loss(self, x: Images, y: Labels) -> Tensor:
        """Cross-entropy on the images themselves."""
        return nn.functional.cross_entropy(self._logits(x), y)

    def adversarial_loss(self, x: Images, y: Labels, share: float = 1.0) -> Tensor:
        """The recipe's loss at the images found within `share` of eps."""
        self.overfitted = False  # a loss that is not finite is another trouble than the last check's
        if self.variant.trades:
            return self._trades_loss(x, y, share)
        return self.clean_loss(self.perturb(x, y, share), y)

    def perturb(self, x: Images, y: Labels, share: float = 1.0) -> Images:
        """The images within `share` of eps that raise the cross-entropy; the weights count as constants meanwhile."""
        return perturb(lambda found: self.clean_loss(found, y), x, self._bound(share), self.inner)

    def _trades_loss(self, x: Images, y: Labels, share: float) -> Tensor:
        with training_precision("float32"):  # near the image the gradient is a difference that bfloat16 rounds away
            fixed = self._logits(x).detach().log_softmax(1)
            found = perturb(lambda near: _divergence(fixed, self._logits(near)), x, self._bound(share), self.inner)
        clean = self._logits(x)
        return nn.functional.cross_entropy(clean, y) + TRADES_BETA * _divergence(
            clean.log_softmax(1), self._logits(found)
        )

    def _bound(self, share: float) -> ThreatModel:
        return ThreatModel(self.threat.norm, share * self.threat.eps)

    def _logits(self, x: Images) -> Logits:
        with autocast(x):
            logits = self.defense(x)
        return logits.float()

    def measure(self, x: Images, y: Labels) -> dict[str, float]:
        """Accuracy on clean images, after one step and after twenty: far apart, the net has overfitted to one step."""
        return measure_attacked(self.defense, x, y, self.threat)

    def check(self, stage: Stage, x: Images, y: Labels) -> tuple[dict[str, float], bool]:
        """Looks on a part of the held-out images whether the net has overfitted to its attack, or lost what it had."""
        del stage
        figures = self.measure(x[:256], y[:256])
        return figures, self.watch(figures)

    def add_step(self) -> None:
        """One more inner step, each shorter."""
        self.inner = Inner.of_steps(self.inner.steps + 1, self.inner.start)

    def state(self) -> dict[str, float]:
        """The inner steps, which a roll-back changes, and what the watch goes by."""
        return {"steps": self.inner.steps, "step": self.inner.step, **super().state()}

    def load_state(self, state: dict[str, float]) -> None:
        """Takes up what `state` gave."""
        self.inner = Inner(int(state["steps"]), state["step"], self.inner.start)
        super().load_state(state)

    def facts(self) -> dict[str, object]:
        """The bound, and the inner maximisation that training ended with."""
        return {
            "train_threat": str(self.threat),
            "inner_steps": self.inner.steps,
            "inner_step": round(self.inner.step, 4),
            **super().facts(),
        }


def _divergence(log_clean: Tensor, logits: Logits) -> Tensor:
    """Mean Kullback-Leibler divergence of the logits' distribution from the clean one."""
    return nn.functional.kl_div(logits.log_softmax(1), log_clean, reduction="batchmean", log_target=True)
