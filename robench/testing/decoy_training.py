"""Controls of the audit that have to be trained: three decoys, and TRADES as an honest one.

Their weights for Fashion-MNIST come from
`robench train --defense robench.testing.decoy_training:Distilled --dataset fashion_mnist` and the like.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn

from robench.defenses.convnet import ConvNet
from robench.defenses.convnet_at import ConvNetAT
from robench.defenses.convnet_at.train import AdversarialRecipe
from robench.train.adversarial import Inner
from robench.train.recipe import Recipe, Stage, autocast
from robench.types import Images, Labels, Logits

WIDTH: Final = 16
TEMPERATURE: Final = 50.0
SHARE: Final = 0.1
ONE_STEP_EPS: Final = 0.3
"""Within 0.1, a net of this width does not overfit to one step."""


class Distilled(ConvNet):
    """Defensive distillation (Papernot et al. 2016, arXiv 1511.04508): a student of soft labels at temperature 50.

    At temperature 1 its logits are 50 times as large as an ordinary net's, and cross-entropy has no gradient (Carlini
    and Wagner 2016, arXiv 1607.04311).
    """

    name = "decoy_distilled"

    def __init__(self, channels: int = 1, width: int | None = WIDTH, side: int = 28) -> None:
        """Builds an untrained student."""
        super().__init__(channels, width, side)

    def recipe(self, name: str | None = None) -> Recipe:
        """Teacher, then student."""
        del name
        return DistillationRecipe(self)

    @classmethod
    def weights_variant(cls, options: Mapping[str, Any]) -> str:
        """The decoy, since all share a folder."""
        del options
        return "distilled"


class DistillationRecipe(Recipe):
    """Trains a teacher at the temperature on the labels, then the student at the temperature on its answers."""

    name = "distillation"

    def __init__(self, defense: Distilled) -> None:
        """Keeps the student; the teacher has the same net."""
        self.defense = defense
        self.teacher = copy.deepcopy(defense)

    def stages(self) -> list[Stage]:
        """About three epochs each."""
        teacher, student = list(self.teacher.parameters()), list(self.defense.parameters())
        return [
            Stage("teacher", 1200, self.teacher_loss, teacher, 1e-3, flat=0.5, batch_size=128, clip=5.0),
            Stage("student", 1200, self.student_loss, student, 1e-3, flat=0.5, batch_size=128, clip=5.0),
        ]

    def teacher_loss(self, x: Images, y: Labels) -> Tensor:
        """Cross-entropy at the temperature; the factor keeps the gradient's size."""
        self.teacher.requires_grad_(True).to(x.device)
        return nn.functional.cross_entropy(_logits(self.teacher, x) / TEMPERATURE, y)

    def student_loss(self, x: Images, y: Labels) -> Tensor:
        """Cross-entropy to the teacher's soft labels, both at the temperature."""
        del y
        self.teacher.to(x.device)
        with torch.no_grad():
            soft = (_logits(self.teacher, x) / TEMPERATURE).softmax(1)
        return nn.functional.cross_entropy(_logits(self.defense, x) / TEMPERATURE, soft)

    def state(self) -> dict[str, Tensor]:
        """The teacher."""
        return self.teacher.state_dict()

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Takes the teacher up."""
        self.teacher.load_state_dict(state)

    def measure(self, x: Images, y: Labels) -> dict[str, float]:
        """Accuracies of both."""
        with torch.no_grad():
            nets = {"teacher": self.teacher.to(x.device), "student": self.defense}
            return {name: round((net(x).argmax(1) == y).float().mean().item(), 4) for name, net in nets.items()}


class Winners(ConvNet):
    """k-winners-take-all (Xiao et al. 2020, arXiv 1905.10510): an image's largest tenth of each layer's values is kept.

    The classifier jumps wherever a winner changes, so its gradient says little of what lies a step away.
    """

    name = "decoy_winners"

    def __init__(self, channels: int = 1, width: int | None = WIDTH, side: int = 28) -> None:
        """Builds an untrained net with the selection behind every activation."""
        super().__init__(channels, width, side)
        for layer in self.net:
            if isinstance(layer, nn.Mish):
                layer.register_forward_hook(lambda _layer, _inputs, out: _keep_largest(out))

    @classmethod
    def weights_variant(cls, options: Mapping[str, Any]) -> str:
        """The decoy, since all share a folder."""
        del options
        return "winners"


class OneStep(ConvNetAT):
    """Adversarial training on one step without a random start, which overfits to that step (Wong et al. 2020)."""

    name = "decoy_onestep"

    def __init__(
        self,
        channels: int = 1,
        width: int | None = WIDTH,
        side: int = 28,
        train_eps: float = ONE_STEP_EPS,
        train_norm: str = "linf",
    ) -> None:
        """Builds an untrained net."""
        super().__init__(channels, width, side, train_eps, train_norm)

    def recipe(self, name: str | None = None) -> Recipe:
        """One step, and nobody watches."""
        del name
        return OneStepRecipe(self, "fast")

    @classmethod
    def weights_variant(cls, options: Mapping[str, Any]) -> str:
        """The decoy, since all share a folder."""
        del options
        return "onestep"


class OneStepRecipe(AdversarialRecipe):
    """The recipe `fast` without its random start and without its watch for overfitting."""

    def __init__(self, defense: OneStep, name: str) -> None:
        """Keeps the net."""
        super().__init__(defense, name)
        self.inner = Inner(1, 1.0, start="near")

    def check(self, stage: Stage, x: Images, y: Labels) -> tuple[dict[str, float], bool]:
        """Measures, and finds everything fine."""
        return super().check(stage, x, y)[0], True


class Trades(ConvNetAT):
    """No decoy: adversarially trained under the loss of TRADES (Zhang et al. 2019, arXiv 1901.08573)."""

    name = "control_trades"

    def __init__(
        self,
        channels: int = 1,
        width: int | None = WIDTH,
        side: int = 28,
        train_eps: float = 0.1,
        train_norm: str = "linf",
    ) -> None:
        """Builds an untrained net."""
        super().__init__(channels, width, side, train_eps, train_norm)

    @classmethod
    def weights_variant(cls, options: Mapping[str, Any]) -> str:
        """The control, since all share a folder."""
        del options
        return "trades"

    def recipe(self, name: str | None = None) -> Recipe:
        """That of TRADES."""
        del name
        return AdversarialRecipe(self, "trades")


def _logits(net: ConvNet, x: Images) -> Logits:
    with autocast(x):
        logits = net(x)
    return logits.float()


def _keep_largest(values: Tensor) -> Tensor:
    flat = values.flatten(1)
    least = flat.topk(max(int(SHARE * flat.shape[1]), 1), dim=1).values[:, -1:]
    return torch.where(flat >= least, flat, 0.0).view_as(values)
