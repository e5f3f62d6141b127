"""What benchmarks/reliability.py puts into its studies: an attack that leaves a trace, and a randomized defense."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from robench import Defense
from robench.attacks.pgd import PGD
from robench.registry import load_defense
from robench.types import Images, Labels, Logits
from robench.victim import Victim


@dataclass(frozen=True)
class Marked(PGD):
    """PGD that adds a line to the file ROBENCH_TRACE each time that it is begun."""

    name = "marked"
    steps: int = 10

    def __call__(self, victim: Victim, x: Images, y: Labels, threat: object) -> Images:
        """Attacks."""
        if os.environ.get("ROBENCH_TRACE"):
            with open(os.environ["ROBENCH_TRACE"], "a") as file:  # noqa: PTH123 - one write of one line is atomic
                file.write("begun\n")
        return super().__call__(victim, x, y, threat)  # type: ignore[arg-type]


class Noisy(Defense):
    """The narrow ConvNet with noise on its input."""

    name = "noisy_convnet"
    randomized = True
    num_classes, input_shape = 10, (1, 28, 28)

    def __init__(self) -> None:
        """Loads the net."""
        super().__init__()
        self.net = load_defense("convnet(width=16)", "fashion_mnist")
        self.freeze()

    def forward(self, x: Images) -> Logits:
        """Classifies a noisy image."""
        return self.net(x + 0.05 * torch.randn_like(x))
