"""PGD and FGSM against foolbox and torchattacks: the plain algorithms, bit for bit.

Sixteen images: torchattacks takes the mean of the loss, and a division by a power of two changes no bit of a direction.
"""

from __future__ import annotations

from typing import Any

import foolbox
import pytest
import torch
import torchattacks
from torch import Tensor, nn

from robench import ThreatModel, Victim, load_data, wrap
from robench.attack import Attack
from robench.attacks.fgsm import FGSM
from robench.attacks.pgd import PGD
from robench.rng import seeded

pytestmark = pytest.mark.reference

LINF = [(0.1, 0.01, 10), (8 / 255, 2 / 255, 7), (0.3, 0.05, 20), (0.02, 0.03, 3)]
L2 = [(1.5, 0.3, 10), (0.5, 0.1, 7), (3.0, 0.5, 20)]


@pytest.fixture(scope="module")
def net() -> nn.Module:
    with seeded("reference net"):
        return nn.Sequential(
            nn.Conv2d(1, 8, 5, stride=2, bias=False),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, stride=2, bias=False),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(16 * 25, 10, bias=False),
        ).eval()


@pytest.fixture(scope="module")
def images(net: nn.Module) -> tuple[Tensor, Tensor]:
    """Images with the untrained net's own answers as labels, so that every one is right before the attack."""
    x, _ = load_data("fashion_mnist", n=16)
    with torch.no_grad():
        return x, net(x).argmax(1)


def run_ours(attack: Attack, net: nn.Module, images: tuple[Tensor, Tensor], threat: ThreatModel) -> Tensor:
    victim = Victim(wrap(net, num_classes=10, input_shape=(1, 28, 28)), attack.access, len(images[0]))
    return attack(victim, *images, threat)


def run_foolbox(attack: Any, net: nn.Module, images: tuple[Tensor, Tensor], eps: float) -> Tensor:
    model = foolbox.PyTorchModel(net, bounds=(0, 1), device="cpu")
    raw, _, _ = attack(model, *images, epsilons=eps)
    return raw


def plain_pgd(steps: int, step_size: float) -> PGD:
    return PGD(steps=steps, step_size=step_size, random_start=False, keep="last", stop_early=False)


def assert_attacked(x_adv: Tensor, images: tuple[Tensor, Tensor], threat: ThreatModel) -> None:
    """Guards the comparison: two attacks that do nothing would be equal too."""
    reached = threat.distance(images[0], x_adv)
    assert bool((reached > 0.5 * threat.eps).all())
    assert bool(threat.contains(images[0], x_adv).all())


@pytest.mark.parametrize(("eps", "step_size", "steps"), LINF)
def test_pgd_linf_is_bit_equal_to_both(
    net: nn.Module, images: tuple[Tensor, Tensor], eps: float, step_size: float, steps: int
) -> None:
    threat = ThreatModel("linf", eps)
    ours = run_ours(plain_pgd(steps, step_size), net, images, threat)
    peer = foolbox.attacks.LinfPGD(abs_stepsize=step_size, steps=steps, random_start=False)
    assert torch.equal(ours, run_foolbox(peer, net, images, eps))
    peer = torchattacks.PGD(net, eps=eps, alpha=step_size, steps=steps, random_start=False)
    assert torch.equal(ours, peer(*images))
    assert_attacked(ours, images, threat)


@pytest.mark.parametrize("eps", [0.02, 8 / 255, 0.1, 0.3])
def test_fgsm_is_bit_equal_to_both(net: nn.Module, images: tuple[Tensor, Tensor], eps: float) -> None:
    threat = ThreatModel("linf", eps)
    ours = run_ours(FGSM(), net, images, threat)
    assert torch.equal(ours, run_foolbox(foolbox.attacks.LinfFastGradientAttack(), net, images, eps))
    assert torch.equal(ours, torchattacks.FGSM(net, eps=eps)(*images))
    assert_attacked(ours, images, threat)


@pytest.mark.parametrize(("eps", "step_size", "steps"), L2)
def test_pgd_l2_is_near_both(
    net: nn.Module, images: tuple[Tensor, Tensor], eps: float, step_size: float, steps: int
) -> None:
    """Near, not equal: the three divide the gradient by its norm in three ways, which differ in the last bit.

    foolbox multiplies by 1 / norm, torchattacks adds 1e-10 to the norm, robench first divides by the largest value, so
    that a gradient of a saturated softmax does not underflow when it is squared.
    """
    threat = ThreatModel("l2", eps)
    ours = run_ours(plain_pgd(steps, step_size), net, images, threat)
    peer = foolbox.attacks.L2PGD(abs_stepsize=step_size, steps=steps, random_start=False)
    torch.testing.assert_close(ours, run_foolbox(peer, net, images, eps), rtol=0, atol=1e-6)
    peer = torchattacks.PGDL2(net, eps=eps, alpha=step_size, steps=steps, random_start=False)
    torch.testing.assert_close(ours, peer(*images), rtol=0, atol=1e-6)
    assert_attacked(ours, images, threat)


@pytest.mark.parametrize("eps", [0.5, 1.5])
def test_fgsm_l2_is_near_foolbox(net: nn.Module, images: tuple[Tensor, Tensor], eps: float) -> None:
    """Near, not equal, for the reason given for PGD in l2."""
    threat = ThreatModel("l2", eps)
    ours = run_ours(FGSM(), net, images, threat)
    peer = run_foolbox(foolbox.attacks.L2FastGradientAttack(), net, images, eps)
    torch.testing.assert_close(ours, peer, rtol=0, atol=1e-6)
    assert_attacked(ours, images, threat)


def test_best_iterate_loses_no_error_of_the_last(net: nn.Module, images: tuple[Tensor, Tensor]) -> None:
    """Our departure from the peers, on steps so long that the last iterate oscillates."""
    threat = ThreatModel("linf", 0.03)
    last = run_ours(plain_pgd(8, 0.05), net, images, threat)
    best = run_ours(PGD(steps=8, step_size=0.05, random_start=False), net, images, threat)
    with torch.no_grad():
        wrong_last, wrong_best = (net(x).argmax(1) != images[1] for x in (last, best))
    assert bool((wrong_best | ~wrong_last).all())
    assert 0 < int(wrong_last.sum()) <= int(wrong_best.sum()) < len(best)
