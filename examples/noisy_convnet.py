"""A defense of your own in one file: the undefended ConvNet behind Gaussian input noise.

robench run --defense examples/noisy_convnet.py:NoisyConvNet --attack pgd
"""

from __future__ import annotations

import torch

from robench import Defense, load_defense
from robench.types import Images, Logits


class NoisyConvNet(Defense):
    """Adds Gaussian noise to the input and classifies with the shipped ConvNet.

    Randomized, so robench averages gradients over draws (EOT) and judges each image on many of them. No guarantee, and
    no reason to expect robustness beyond small bounds: the noise is cheap to average out.
    """

    name = "noisy_convnet"
    randomized = True
    num_classes = 10
    input_shape = (1, 28, 28)

    def __init__(self, sigma: float = 0.1) -> None:
        """Loads the ConvNet; `sigma` is the standard deviation of the noise, in the unit of images in [0, 1]."""
        super().__init__()
        self.sigma = sigma
        self.net = load_defense("convnet", "fashion_mnist")

    def forward(self, x: Images) -> Logits:
        """Classifies a noisy copy of the images; differentiable, so attackers need no stand-in."""
        return self.net((x + self.sigma * torch.randn_like(x)).clamp(0, 1))
