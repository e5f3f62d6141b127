"""What the tests of the bridges share: a small net, images that it gets right, and ways to run an attack."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from robench import ThreatModel, Victim, load_data, wrap
from robench.defense import Defense
from robench.registry import load_attack
from robench.rng import seeded
from robench.testing.attacks import SpyVictim
from robench.types import Images, Labels


def make_net() -> nn.Module:
    with seeded("bridge net"):
        return nn.Sequential(
            nn.Conv2d(1, 8, 5, stride=2), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2), nn.Flatten(), nn.Linear(400, 10)
        ).eval()


def make_defense() -> Defense:
    return wrap(make_net(), num_classes=10, input_shape=(1, 28, 28))


def make_images() -> tuple[Tensor, Tensor]:
    """Images with the untrained net's own answers as labels, so that every one is right before the attack."""
    x, _ = load_data("fashion_mnist", n=8)
    with torch.no_grad():
        return x, make_net()(x).argmax(1)


def spy_on(name: str, defense: Defense, x: Images, y: Labels, threat: ThreatModel) -> tuple[SpyVictim, Images]:
    """Runs an attack once and says what it asked."""
    attack = load_attack(name)
    victim = SpyVictim(defense, attack.access, len(x))
    with seeded("spy"):
        found = attack(victim, x, y, threat)
    victim.closing.remove()
    assert victim.computed["forwards"] == int(victim.ledger.forwards.sum()), "queries went past the victim"
    return victim, found


def run_bridge(spec: str, defense: Defense, images: tuple[Tensor, Tensor], threat: ThreatModel) -> Tensor:
    attack = load_attack(spec)
    with seeded("compare"):
        return attack(Victim(defense, attack.access, len(images[0])), *images, threat)
