"""Plain training of the ConvNet on clean images."""

from __future__ import annotations

import functools

from torch import Tensor, nn

from robench.errors import UsageError
from robench.train.recipe import Recipe, Stage, autocast, clean_accuracy, ranger
from robench.types import Images, Labels

from .model import ConvNet


class ConvNetRecipe(Recipe):
    """Cross-entropy on clean images with the thesis's optimizer and kind of schedule (Ranger, flat then cosine).

    For a training of minutes the rate is 1e-3 instead of 5e-4, and flat for half of it instead of three quarters.
    """

    def __init__(self, defense: ConvNet, name: str = "clean", *, labelled: int = 0) -> None:
        """Keeps the net to train.

        Args:
            defense: the net.
            name: the recipe as it was asked for, options included.
            labelled: train on that many images, drawn by class; those of Short Run's `thesis(labelled=...)` under the
                same seed. 0: all.

        Raises:
            UsageError: `labelled` is negative.
        """
        if labelled < 0:
            raise UsageError(f"convnet: labelled must be at least 0; got {labelled}")
        self.defense, self.name, self.labelled = defense, name, labelled

    def stages(self) -> list[Stage]:
        """One stage of about six epochs over 60,000 images."""
        parameters = list(self.defense.parameters())
        stage = functools.partial(Stage, flat=0.5, batch_size=128, optimizer=ranger, clip=5.0)
        return [stage("clean", 2800, self.loss, parameters, 1e-3, images=self.labelled)]

    def loss(self, x: Images, y: Labels) -> Tensor:
        """Cross-entropy."""
        with autocast(x):
            logits = self.defense(x)
        return nn.functional.cross_entropy(logits.float(), y)

    def measure(self, x: Images, y: Labels) -> dict[str, float]:
        """Accuracy."""
        return clean_accuracy(self.defense, x, y)

    def look(self, stage: Stage, x: Images, y: Labels) -> dict[str, float]:
        """The same."""
        del stage
        return self.measure(x, y)
