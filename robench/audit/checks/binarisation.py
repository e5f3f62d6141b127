"""Does the attack find an adversarial example that exists by construction?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor, nn

from robench.audit.checks.base import Check, Outcome, graded_share, not_run
from robench.audit.evidence import Evidence
from robench.batches import pass_in_batches
from robench.defense import Defense
from robench.errors import PluginError
from robench.registry import load_attack
from robench.rng import seeded
from robench.threat import ThreatModel
from robench.types import Images, Logits
from robench.victim import Victim

INNER: Final = 400
RADIUS: Final = 0.95
CLOSENESS: Final = 0.9
"""Where between the farthest inner point (0) and the boundary point (1) the decision lies."""
CONFIRMING: Final = 10
"""Draws of a randomized defense that must all see the boundary point."""
SUSPECT, FAIL = 0.9, 0.5


class Readout(Defense):
    """A linear readout of a defense's features with two classes: inner points, and the one point on the boundary."""

    name = "readout"
    num_classes = 2

    def __init__(self, features: Features, weight: Tensor, bias: Tensor) -> None:
        """Keeps the features' defense and the readout."""
        super().__init__()
        self.features, self.input_shape = features, features.defense.input_shape
        self.randomized, self.batch_rows = features.defense.randomized, features.defense.batch_rows
        self.draws_per_pass, self.gradient_modes = features.defense.shares_draws, features.defense.gradient_modes
        self.weight, self.bias = weight, bias

    def forward(self, x: Images) -> Logits:
        """The two logits."""
        return self._read(self.features(x, adaptive=False))

    def adaptive_forward(self, x: Images, mode: str | None = None) -> Logits:
        """The same along the defense's own path."""
        return self._read(self.features(x, adaptive=True, mode=mode))

    def _read(self, features: Tensor) -> Logits:
        score = features @ self.weight + self.bias
        return torch.stack([-score, score], 1)


@dataclass
class Features:
    """The input of a defense's last linear layer, or its logits where that is not one row for each image."""

    defense: Defense

    def __call__(self, x: Images, *, adaptive: bool, mode: str | None = None) -> Tensor:
        """Features of each image: `b d`."""
        seen: list[Tensor] = []
        layers = [layer for layer in self.defense.modules() if isinstance(layer, nn.Linear)]
        hook = layers[-1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])) if layers else None
        try:
            logits = self.defense.adaptive_forward(x, mode) if adaptive else self.defense(x)
        finally:
            if hook is not None:
                hook.remove()
        last = seen[-1] if seen else logits
        return last if last.ndim == 2 and len(last) == len(x) else logits


def judge(evidence: Evidence) -> Outcome:
    """The share of images at which PGD finds the boundary point's side of a readout that inner points do not reach.

    For each image a readout of the defense's features separates many points within 0.95 eps from one point at eps; PGD
    within eps must find that side. Images at which the readout does not separate are left out.
    """
    if not evidence.effort.constructed:
        return not_run("it takes hundreds of passes for each image, too many for this defense")
    count = min(evidence.effort.constructed, evidence.n)
    try:
        found = [_try(evidence, number) for number in range(count)]
    except (PluginError, RuntimeError) as error:
        return not_run(f"the readout could not be attacked: {str(error).splitlines()[0]}")
    tested = [one for one in found if one is not None]
    if len(tested) < count / 2:
        return not_run(f"the features separate the boundary point at {len(tested)} of {count} images only")
    hits, lucky = np.array(tested).T
    share, verdict = graded_share(hits, SUSPECT, FAIL, high_is_bad=False)
    reason = (
        f"PGD finds {hits.sum()} of {len(tested)} adversarial examples that exist by construction, "
        f"random search {lucky.sum()}"
    )
    return Outcome(verdict, share, FAIL, reason)


def _try(evidence: Evidence, number: int) -> tuple[bool, bool] | None:
    """Whether PGD and random search find the other side at one image; None where the readout does not separate."""
    x = evidence.x[number : number + 1]
    with seeded(evidence.seed, "audit", "binarise", number, device=evidence.device):
        readout = _fit(Features(evidence.defense), x, evidence)
        if readout is None:
            return None
        lucky = _random_search(readout, x, evidence)
        return _attack(readout, x, evidence), lucky


def _fit(features: Features, x: Images, evidence: Evidence) -> Readout | None:
    threat = evidence.threat
    inner = ThreatModel(threat.norm, RADIUS * threat.eps).random_start(x.repeat(INNER, 1, 1, 1))
    inner[0] = x[0]
    signs = torch.randn_like(x)
    outer = threat.project(x, x + threat.eps * threat.steepest(signs))
    with torch.no_grad():
        parts = pass_in_batches(features.defense, lambda rows: features(rows, adaptive=False), inner, together=1)
        points = torch.cat(parts).double()
        boundary = features(outer, adaptive=False).double()[0]
    centre = points.mean(0)
    spread = points - centre
    covariance = spread.T @ spread / INNER
    ridge = 1e-3 * covariance.diagonal().mean().clamp_min(1e-12)
    eye = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    weight = torch.linalg.solve(covariance + ridge * eye, boundary - centre)
    farthest, at = float((points @ weight).max()), float(boundary @ weight)
    if not at > farthest:
        return None
    scale = 4 / max(at - farthest, 1e-12)
    bias = -(farthest + CLOSENESS * (at - farthest)) * scale
    readout = Readout(features, (scale * weight).float(), torch.tensor(bias, dtype=torch.float32, device=x.device))
    with torch.no_grad():  # noise in the features may hide the point again: then nothing exists by construction
        draws = CONFIRMING if features.defense.randomized else 1
        return readout if bool((_answers(readout, outer.repeat(draws, 1, 1, 1)) == 1).all()) else None


def _answers(readout: Readout, x: Images) -> Tensor:
    """The side of each image, on a draw of its own."""
    return torch.cat(pass_in_batches(readout, lambda rows: readout(rows).argmax(1), x, together=1))


def _random_search(readout: Readout, x: Images, evidence: Evidence) -> bool:
    tries = evidence.threat.random_start(x.repeat(2 * evidence.effort.steps, 1, 1, 1))
    with torch.no_grad():
        return bool((_answers(readout, tries) == 1).any())


def _attack(readout: Readout, x: Images, evidence: Evidence) -> bool:
    y = torch.zeros(1, dtype=torch.int64, device=x.device)
    attack = load_attack(f"pgd(steps={2 * evidence.effort.steps}, loss='margin')")
    victim = Victim(readout, "gradient", 1, eot=evidence.effort.eot)
    x_adv = attack(victim, x, y, evidence.threat)
    with torch.no_grad():
        return bool((readout(x_adv).argmax(1) == 1).all())


CHECK = Check(
    "binarisation",
    "Zimmermann et al. 2022 (arXiv 2206.13991)",
    judge,
)
