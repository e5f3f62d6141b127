"""The black-box attack of table 2.6: a substitute net learns the defense's decisions, FGSM on it is handed over."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from robench.batches import pass_in_batches
from robench.defense import Defense, wrap
from robench.errors import UsageError
from robench.registry import load_attack
from robench.threat import ThreatModel
from robench.types import Images, Labels
from robench.victim import Victim

Oracle = Callable[[Images], Labels]
"""What the attacker may ask: the label that the defense gives to each image, and nothing else."""

WIDTHS: Final = (512, 512)


@dataclass(frozen=True)
class Protocol:
    """The constants of the released code; Papernot et al. 2017 (arXiv 1602.02697), algorithm 1.

    As released (jbinas/fortified-networks, run_blackbox.py), but for what follows: images of the augmentation are
    clipped to [0, 1], since a defense takes no others; the substitute starts from torch's weights; FGSM on it climbs
    away from the true label, where the released code takes the substitute's own answer.

    Attributes:
        seeds: images that the attacker starts from.
        rounds: how often the substitute is trained; between two rounds the set doubles.
        epochs: passes over the set in a round.
        step: length of a step of the augmentation, lambda.
        turn: rounds with a step of -lambda, away from the label; those after them step towards it.
        batch_size: images in a batch.
        rate: Adam's learning rate.
    """

    seeds: int = 150
    rounds: int = 6
    epochs: int = 10
    step: float = 0.1
    turn: int = 3
    batch_size: int = 128
    rate: float = 1e-3


def make_substitute(input_shape: tuple[int, int, int], num_classes: int) -> nn.Sequential:
    """The substitute `fcn_sub` of the released code: two hidden layers of 512 ReLU units."""
    sizes = [math.prod(input_shape), *WIDTHS]
    hidden = [layer for pair in pairwise(sizes) for layer in (nn.Linear(*pair), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(sizes[-1], num_classes))


def augment(substitute: nn.Module, x: Images, y: Labels, step: float) -> Images:
    """Jacobian-based augmentation: x + step * sign of the gradient of the substitute's probability of class y.

    Papernot et al. 2017, algorithm 1, line 6; clipped to [0, 1].
    """
    leaf = x.clone().requires_grad_()
    outputs = substitute(leaf).softmax(1).gather(1, y[:, None]).sum()
    (grad,) = torch.autograd.grad(outputs, leaf)
    return (x + step * grad.sign()).clamp(0, 1)


def train_substitute(
    oracle: Oracle, seeds: Images, num_classes: int, protocol: Protocol | None = None
) -> tuple[nn.Sequential, Float[Tensor, "asked c h w"], Int[Tensor, " asked"]]:
    """Trains a substitute on the oracle's labels alone; returns it with the images asked about and their labels.

    Each image is asked about once: `len(seeds) * 2^(rounds - 1)` queries.

    Args:
        oracle: gives labels.
        seeds: the attacker's images in [0, 1]; their true labels are not needed.
        num_classes: classes.
        protocol: constants; None: the released code's.
    """
    protocol = protocol or Protocol()
    c, h, w = seeds.shape[1:]
    substitute = make_substitute((c, h, w), num_classes).to(seeds.device)
    x, y = seeds, oracle(seeds)
    for index in range(protocol.rounds):
        _fit(substitute, x, y, protocol)
        if index < protocol.rounds - 1:
            grown = augment(substitute, x, y, protocol.step if index >= protocol.turn else -protocol.step)
            x, y = torch.cat([x, grown]), torch.cat([y, oracle(grown)])
    return substitute, x, y


def _fit(substitute: nn.Module, x: Images, y: Labels, protocol: Protocol) -> None:
    optimizer = torch.optim.Adam(substitute.parameters(), lr=protocol.rate)  # a new one each round, as released
    for _ in range(protocol.epochs):
        for rows in torch.randperm(len(x), device=x.device).split(protocol.batch_size):
            optimizer.zero_grad(set_to_none=True)
            functional.cross_entropy(substitute(x[rows]), y[rows]).backward()
            optimizer.step()


def hand_over(
    defense: Defense,
    seeds: Float[Tensor, "s c h w"],
    x: Images,
    y: Labels,
    eps: float,
    protocol: Protocol | None = None,
) -> Images:
    """Images within linf `eps` of x that FGSM finds on a substitute of the defense, which gives labels alone.

    Args:
        defense: the oracle; a randomized one answers each image once.
        seeds: the attacker's own images, none of them in x.
        x: images to attack.
        y: their labels, which FGSM climbs away from.
        eps: the bound.
        protocol: constants; None: the released code's.

    Raises:
        UsageError: no seeds.
    """
    if not len(seeds):
        raise UsageError("the black-box protocol starts from images of the attacker's own; got none")

    with torch.enable_grad():
        substitute, _, _ = train_substitute(partial(answers, defense), seeds, defense.num_classes, protocol)
    stand_in = wrap(substitute, num_classes=defense.num_classes, input_shape=defense.input_shape, name="substitute")
    fgsm = load_attack("fgsm")
    return fgsm(Victim(stand_in, fgsm.access, len(x)), x, y, ThreatModel("linf", eps))


@torch.no_grad()
def answers(defense: Defense, x: Images) -> Labels:
    """One answer of a defense for each image."""
    return torch.cat(pass_in_batches(defense, lambda rows: defense(rows).argmax(1), x))
