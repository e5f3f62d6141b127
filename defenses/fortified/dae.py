"""Denoising autoencoders with one hidden layer and tied weights: the part that fortifies a hidden layer."""

from __future__ import annotations

import math
from typing import Final, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from robench.errors import UsageError

Activation = Literal["leaky_relu", "relu"]

LEAK: Final = 0.2
"""Slope below 0: the default of the released code's library."""
KERNEL: Final = 5


def activate(x: Tensor, activation: Activation) -> Tensor:
    """Leaky ReLU (slope 0.2) or ReLU."""
    return functional.leaky_relu(x, LEAK) if activation == "leaky_relu" else functional.relu(x)


class _TiedDAE(nn.Module):
    """What both kinds share: one weight tensor, two biases, the noise, and the same activation on both halves."""

    def __init__(self, weight: Tensor, visible: int, noise: float, activation: Activation) -> None:
        super().__init__()
        hidden = len(weight)
        bound = 1 / math.sqrt(weight[0].numel() + hidden * weight[0, 0].numel())
        self.weight = nn.Parameter(weight.uniform_(-bound, bound))
        self.bias_hidden = nn.Parameter(torch.zeros(hidden))
        self.bias_visible = nn.Parameter(torch.zeros(visible))
        self.noise, self.activation = noise, activation

    def forward(self, h: Tensor, noise_scale: float = 1.0) -> Tensor:
        """The reconstruction of h from h + noise, of the shape of h.

        Args:
            h: the hidden layer.
            noise_scale: multiplies the noise; 0 draws none.
        """
        std = self.noise * noise_scale
        noisy = h + std * torch.randn_like(h) if std > 0 else h
        return activate(self.decode(activate(self.encode(noisy), self.activation)), self.activation)

    def encode(self, h: Tensor) -> Tensor:
        """The hidden code before its activation."""
        raise NotImplementedError

    def decode(self, code: Tensor) -> Tensor:
        """The reconstruction before its activation."""
        raise NotImplementedError


class DenseDAE(_TiedDAE):
    """h -> s(W^T s(W (h + n) + b) + c), n ~ N(0, noise^2 I) (thesis, section 2.2); s is `activation`.

    Acts on the last axis. `hidden * features + hidden + features` parameters; weights start uniform in
    +-1 / sqrt(features + hidden), biases at 0, as in the released code.
    """

    def __init__(
        self, features: int, hidden: int = 256, noise: float = 0.1, activation: Activation = "leaky_relu"
    ) -> None:
        """Builds an untrained autoencoder.

        Args:
            features: length of the layer.
            hidden: length of the code.
            noise: standard deviation of n.
            activation: `leaky_relu` or `relu`.

        Raises:
            UsageError: an option is out of range.
        """
        check_dae(hidden, noise, activation)
        super().__init__(torch.empty(hidden, features), features, noise, activation)

    def encode(self, h: Float[Tensor, "*rest d"]) -> Float[Tensor, "*rest z"]:
        """W h + b."""
        return functional.linear(h, self.weight, self.bias_hidden)

    def decode(self, code: Float[Tensor, "*rest z"]) -> Float[Tensor, "*rest d"]:
        """W^T code + c."""
        return functional.linear(code, self.weight.T, self.bias_visible)


class PooledDAE(DenseDAE):
    """A `DenseDAE` on the c values of a layer of c x 1 x 1, where 24 of the 25 weights of a kernel would be idle."""

    def forward(self, h: Float[Tensor, "b c 1 1"], noise_scale: float = 1.0) -> Float[Tensor, "b c 1 1"]:
        """The reconstruction of h from h + noise; see `DenseDAE`."""
        return super().forward(h.flatten(1), noise_scale)[:, :, None, None]


class ConvDAE(_TiedDAE):
    """As `DenseDAE` with W a 5x5 convolution of stride 1 that keeps the size, W^T its transpose (thesis, section 2.2).

    `25 * hidden * channels + hidden + channels` parameters. The released class has no activation and crashes; this one
    has the dense one's.
    """

    def __init__(self, channels: int, hidden: int, noise: float = 0.1, activation: Activation = "leaky_relu") -> None:
        """Builds an untrained autoencoder.

        Args:
            channels: channels of the layer.
            hidden: channels of the code.
            noise: standard deviation of the noise.
            activation: `leaky_relu` or `relu`.

        Raises:
            UsageError: an option is out of range.
        """
        check_dae(hidden, noise, activation)
        super().__init__(torch.empty(hidden, channels, KERNEL, KERNEL), channels, noise, activation)

    def encode(self, h: Float[Tensor, "b c h w"]) -> Float[Tensor, "b z h w"]:
        """The convolution."""
        return functional.conv2d(h, self.weight, self.bias_hidden, padding=KERNEL // 2)

    def decode(self, code: Float[Tensor, "b z h w"]) -> Float[Tensor, "b c h w"]:
        """The transposed convolution with the same weights."""
        return functional.conv_transpose2d(code, self.weight, self.bias_visible, padding=KERNEL // 2)


def check_dae(hidden: int, noise: float, activation: str) -> None:
    """Checks the options of an autoencoder.

    Raises:
        UsageError: an option is out of range.
    """
    if hidden < 1:
        raise UsageError(f"fortified: hidden must be at least 1; got {hidden}")
    if not 0 <= noise < math.inf:  # also where it is NaN
        raise UsageError(f"fortified: noise must be finite and at least 0; got {noise}")
    if activation not in get_args(Activation):
        raise UsageError(f'fortified: activation must be one of {", ".join(get_args(Activation))}; got "{activation}"')
