"""What `fortify` made, as a defense: the noise can be switched off, reconstruction scores an image, training goes on.

`Fortified` is one such defense, with a net of its own; `OwnFortified` is what `robench.wrap` makes of any other.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, ClassVar, Final, Literal, get_args

import torch

from robench.defense import Defense
from robench.errors import UsageError
from robench.types import Images, Labels, Logits, PerExample

if TYPE_CHECKING:
    from robench.train.recipe import Recipe

    from .fortify import FortifiedModule

TrainAttack = Literal["pgd", "fgsm"]

TINY: Final = 1e-30
"""In place of a variance of 0: of one image, say."""


@dataclass(frozen=True)
class Training:
    """How a network of one's own is trained; the options of `Fortified` of the same names.

    Attributes:
        train_eps: linf bound of the training attack.
        train_attack: `pgd` or `fgsm`; names the recipe, too.
        lambda_rec: weight of the reconstruction of clean images.
        lambda_adv: weight of the reconstruction from adversarial images.
        stop_gradient: train the autoencoders alone by both; see `reconstruction_losses`.
        augment: train on randomly shifted and mirrored images (photographs; never digits).
        train_steps: gradient steps of `pgd`.
    """

    train_eps: float = 8 / 255
    train_attack: TrainAttack = "pgd"
    lambda_rec: float = 2.0
    lambda_adv: float = 2.0
    stop_gradient: bool = False
    augment: bool = False
    train_steps: int = 2

    def __post_init__(self) -> None:
        """Checks the options.

        Raises:
            UsageError: one is out of range.
        """
        if self.train_attack not in get_args(TrainAttack):
            raise UsageError(
                f'fortified: train_attack must be one of {", ".join(get_args(TrainAttack))}; got "{self.train_attack}"'
            )
        if not (self.lambda_rec >= 0 and self.lambda_adv >= 0 and 0 < self.train_eps <= 1):
            raise UsageError(
                "fortified: lambda_rec and lambda_adv must be at least 0, train_eps above 0 and at most 1; "
                f"got {self.lambda_rec}, {self.lambda_adv} and {self.train_eps}"
            )
        if self.train_steps < 1:
            raise UsageError(f"fortified: train_steps must be at least 1; got {self.train_steps}")


class FortifiedDefense(Defense):
    """A defense around a `FortifiedModule`, with all that follows from its autoencoders.

    Attributes:
        net: the fortified module.
        train_attack: as in `Training`, and so are the six after it.
        how_to_choose: how a user names another training attack, {}; part of an error.
    """

    net: FortifiedModule
    train_attack: TrainAttack
    train_eps: float
    lambda_rec: float
    lambda_adv: float
    stop_gradient: bool
    augment: bool
    train_steps: int
    recipes: ClassVar[Mapping[str, str]] = {
        "pgd": "adversarial images by PGD of train_steps steps",
        "fgsm": "by FGSM, as in the paper; --defense 'fortified(train_attack=fgsm)' brings it",
    }
    how_to_choose = 'fortify(..., training=Training(train_attack="{}"))'

    def train_by(self, training: Training) -> None:
        """Takes the options of training, each under its own name."""
        for option in fields(training):
            setattr(self, option.name, getattr(training, option.name))

    def forward(self, x: Images) -> Logits:
        """Classifies images in [0, 1] with fresh noise."""
        return self.net(x)

    def without_randomness(self) -> AbstractContextManager[None]:
        """The noise before the autoencoders at its mean, 0."""
        return self.net.without_noise()

    def detection_score(self, x: Images, kind: str | None = None) -> PerExample:
        """The squared error of reconstruction, summed over features and layers; higher is more suspicious.

        Raises:
            UsageError: there is no such score, or no autoencoder.
        """
        self.check_score(kind)
        return self.net.trace(x).error()

    def diagnostics(self, x: Images, y: Labels) -> dict[str, float]:
        """Of each fortified layer the share of its variance, over all its calls, that the autoencoder restores: R2."""
        del y
        left, whole = dict.fromkeys(self.net.layers, 0.0), dict.fromkeys(self.net.layers, 0.0)
        with torch.no_grad():
            trace = self.net.trace(x)
            for layer, h, d in zip(trace.layers, trace.hidden, trace.decoded, strict=True):
                left[layer] += float((d - h).square().sum())
                whole[layer] += float((h - h.mean(0)).square().sum())
        return {f"reconstruction_r2_{layer}": 1 - left[layer] / max(whole[layer], TINY) for layer in left}

    def recipe(self, name: str | None = None) -> Recipe:
        """The recipe of `train_attack`: `pgd` or `fgsm`.

        Raises:
            UsageError: another name.
        """
        from robench.train.recipe import check_recipe

        from .train import FortifiedRecipe

        if name is not None and check_recipe("fortified", self.recipes, name) != self.train_attack:
            raise UsageError(
                f'fortified: the recipe follows the option train_attack, here "{self.train_attack}"; got "{name}". '
                f"Choose it by {self.how_to_choose.format(name)}"
            )
        return FortifiedRecipe(self)


class OwnFortified(FortifiedDefense):
    """Any module that `fortify` fortified, as a defense; made by `robench.wrap`.

    Randomized if an autoencoder draws noise, which `without_randomness` switches off; what else the module itself may
    draw goes on. No guarantee; its gradient is autograd's through module and autoencoders.
    """

    def __init__(self, net: FortifiedModule, name: str, *, num_classes: int, input_shape: tuple[int, int, int]) -> None:
        """Keeps the module; see `robench.wrap`."""
        super().__init__()
        self.name, self.num_classes, self.input_shape = name, num_classes, input_shape
        self.net = net
        self.randomized = net.is_noisy()
        self.detection_scores = ("reconstruction",) if net.layers else ()
        self.train_by(net.trained_by)
