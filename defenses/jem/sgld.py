"""Sampling for JEM: the SGLD step, the Gaussians that chains start from, and the replay buffer that they return to.

All images here are in the model's scale, [-1, 1].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, NamedTuple

import torch
from torch import Tensor

from robench.types import Images, Labels, PerExample

RANK: Final = 8
"""Directions of each class's Gaussian besides the spread of the single pixels; more would make the weights too big."""

LogDensity = Callable[[Images], PerExample]


@dataclass(frozen=True)
class Sampler:
    """The constants of an SGLD chain.

    Attributes:
        steps: steps of one chain.
        step_size: factor of the gradient of log p; the released code's 1, not the slides' alpha / 2.
        noise: standard deviation of the noise added after each step.
        clamp: whether samples are kept in [-1, 1], as JEM++ does and JEM does not.
    """

    steps: int
    step_size: float = 1.0
    noise: float = 0.01
    clamp: bool = False


def climb(log_density: LogDensity, x: Images, sampler: Sampler, *, keep_graph: bool = False) -> Images:
    """One SGLD step, x + step_size * d log p / dx + noise * N(0, I) (JEM, eq. 2, with the released code's constants).

    The gradient is that of the sum over the batch of each image's own log p, so that no image moves another. Works
    under `torch.no_grad`; the weights of `log_density` gain no gradients.

    Args:
        log_density: log p up to a constant, one value per image.
        x: where the chains stand.
        sampler: the constants; its `steps` plays no part.
        keep_graph: keep what a derivative through the step needs; otherwise the result is cut off from x.
    """
    with torch.enable_grad():
        leaf = x if keep_graph and x.requires_grad else x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(log_density(leaf).sum(), leaf, create_graph=keep_graph)
        moved = leaf + sampler.step_size * slope
    if sampler.noise:
        moved = moved + sampler.noise * torch.randn_like(x)
    if sampler.clamp:
        moved = moved.clamp(-1, 1)
    return moved if keep_graph else moved.detach()


def sample(log_density: LogDensity, x: Images, sampler: Sampler) -> Images:
    """The end of a chain of `sampler.steps` steps from x, cut off from any graph."""
    x = x.detach()
    for _ in range(sampler.steps):
        x = climb(log_density, x, sampler)
    return x


class Gaussians(NamedTuple):
    """A Gaussian for each class: mean + factors^T a + spread * b, with a and b standard normal.

    Attributes:
        mean: `classes c h w`.
        factors: `classes rank c h w`: the principal directions, each as long as its standard deviation.
        spread: `classes c h w`: per pixel the standard deviation that the directions leave over.
    """

    mean: Tensor
    factors: Tensor
    spread: Tensor


def fit_gaussians(x: Images, y: Labels, num_classes: int, rank: int = RANK) -> Gaussians:
    """Fits a Gaussian to the images of each class: exact in mean and pixel variance, of low rank in the covariance.

    JEM++ (Yang and Ji 2021, arXiv 2109.09032, section 3.4) starts chains from such Gaussians with the whole covariance;
    here `rank` directions stand for it, so that they fit into a weights file. A class of fewer than two images gets the
    Gaussian of all images.

    Args:
        x: images in [-1, 1].
        y: their labels.
        num_classes: classes to fit.
        rank: directions of each class; those that the images do not span are zero.
    """
    fitted = []
    for label in range(num_classes):
        rows = x[y == label]
        fitted.append(_fit_gaussian(rows if len(rows) > 1 else x, rank))
    return Gaussians(*(torch.stack(part) for part in zip(*fitted, strict=True)))


def _fit_gaussian(x: Images, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    mean, flat = x.mean(0), x.flatten(1).double()
    centred = flat - flat.mean(0)
    freedom = max(len(x) - 1, 1)
    vectors = torch.linalg.eigh(centred @ centred.T)[1]  # b b: fewer images than pixels
    kept = min(rank, len(x) - 1)
    factors = torch.zeros(rank, flat.shape[1], dtype=torch.float64, device=x.device)
    if kept > 0:  # a row of V^T X / sqrt(b - 1) is an eigenvector of the covariance, as long as its deviation
        factors[:kept] = (vectors.T @ centred).flip(0)[:kept] / freedom**0.5
    left = (centred.square().sum(0) / freedom - factors.square().sum(0)).clamp_min(0).sqrt()
    return mean, factors.to(x.dtype).unflatten(1, x.shape[1:]), left.to(x.dtype).unflatten(0, x.shape[1:])


def draw_gaussians(gaussians: Gaussians, y: Labels) -> Images:
    """One image of each label's Gaussian, clamped to [-1, 1]."""
    mean, factors, spread = (part[y] for part in gaussians)
    weights = torch.randn(len(y), factors.shape[1], device=mean.device, dtype=mean.dtype)
    directions = torch.einsum("br,brchw->bchw", weights, factors)
    return (mean + directions + spread * torch.randn_like(mean)).clamp(-1, 1)


class ReplayBuffer:
    """Where persistent chains wait between updates (JEM, section 3.2): at each draw a share of them starts anew.

    Held in half precision, which is finer than the noise of a step and halves a checkpoint.
    """

    def __init__(self, images: Images) -> None:
        """Takes the first states of all chains."""
        self.images = images.half()

    def draw(self, count: int, fresh: Images, restart: float) -> tuple[Tensor, Images]:
        """Draws chains to go on with, each at most once.

        Args:
            count: how many; no more than the buffer holds.
            fresh: starts for the chains that begin anew, `count` of them.
            restart: probability that a chain does.

        Returns:
            Their places in the buffer and their states.
        """
        places = torch.randperm(len(self.images), device=self.images.device)[:count]
        anew = torch.rand(count, device=places.device) < restart
        return places, torch.where(anew[:, None, None, None], fresh, self.images[places].to(fresh.dtype))

    def put(self, places: Tensor, images: Images) -> None:
        """Puts the chains back where they were drawn from."""
        self.images[places] = images.to(self.images.dtype)
