"""The three learning stages of the Short Run classifier (thesis, Algorithm 1)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from robench.train.recipe import Recipe, Stage, adam, ranger
from robench.types import Images, Labels

from .model import ShortRun, auto_sigma


class ShortRunRecipe(Recipe):
    """Generative, discriminative, then back-propagation through the chain.

    The thesis gives the optimizer (Ranger), the learning rates (5e-4, then 1e-4) and the schedule (flat, then cosine
    after 75 % of the classification stages), but neither batch size nor iterations. These were chosen so that two CPU
    cores finish within about an hour and a half; the rates are higher because the training is that short. Stage 3 also
    learns sigma, the weight of the data term. It starts under Ranger, whose rectified step is a slow warm-up, and goes
    on under Adam with an early cosine: when the weights shipped here were trained, the loss fell too slowly by then
    (1.07 to 1.02 in 228 iterations), and the rest of the stage was planned anew.
    """

    name = "thesis"

    def __init__(self, defense: ShortRun) -> None:
        """Keeps the model to train."""
        self.defense = defense
        self.sigma_start = math.nan

    def prepare(self, x: Images) -> None:
        """Sets sigma from the data (`auto_sigma`) for the preset `repaired`; `paper_literal` keeps 6.4."""
        if self.defense.preset == "repaired":
            with torch.no_grad():
                self.defense.log_sigma.fill_(math.log(auto_sigma(x, self.defense.step_size)))
        self.sigma_start = self.defense.log_sigma.exp().item()

    def stages(self) -> list[Stage]:
        """The thesis's three stages, the third in two parts."""
        model = self.defense
        generator, classifier = list(model.generator.parameters()), list(model.classifier.parameters())
        everything = [*generator, *classifier, *([model.log_sigma] if model.preset == "repaired" else [])]
        return [
            Stage("generative", 800, self.reconstruction_loss, generator, 1e-3, flat=1.0, optimizer=ranger),
            Stage("discriminative", 400, self.label_loss, classifier, 2e-3, optimizer=ranger),
            Stage("bptt", 228, self.unrolled_loss, everything, 7e-4, flat=1.0, optimizer=ranger, clip=5.0),
            Stage("bptt_anneal", 950, self.unrolled_loss, everything, 6e-4, flat=0.45, optimizer=adam, clip=5.0),
        ]

    def reconstruction_loss(self, x: Images, y: Labels) -> Tensor:
        """Stage 1: -log p(x, z_k) in the generator's weights, z_k held fixed: |x - g(z_k)|^2 / (2 sigma^2)."""
        del y
        model = self.defense
        misfit = (model.generate(model.infer(x)) - (2 * x - 1)).square().flatten(1).sum(1)
        return misfit.mean() / (2 * (2 * model.log_sigma.detach()).exp())

    def label_loss(self, x: Images, y: Labels) -> Tensor:
        """Stage 2: cross-entropy of the classifier on z_k; the chain is not differentiated."""
        return nn.functional.cross_entropy(self.defense.classifier(self.defense.infer(x)), y)

    def unrolled_loss(self, x: Images, y: Labels) -> Tensor:
        """Stage 3: the same loss with all Langevin steps differentiated."""
        return nn.functional.cross_entropy(self.defense.classifier(self.defense.infer_differentiably(x)), y)

    def measure(self, x: Images, y: Labels) -> dict[str, float]:
        """Accuracy by number of chains, R2 of the reconstruction, and how far two chains of an image agree (ICC)."""
        chains = 10
        with torch.no_grad():
            codes = torch.stack([self.defense.infer(x) for _ in range(chains)])  # chains b 200
            logits = self.defense.classifier(codes)
            misfit = (self.defense.generate(codes[0]) - (2 * x - 1)).square().sum()
            spread = (2 * x - 1 - (2 * x - 1).mean(0)).square().sum()
        return {
            "accuracy_1_chain": round((logits.argmax(-1) == y).float().mean().item(), 4),
            "accuracy_10_chains": round((logits.mean(0).argmax(-1) == y).float().mean().item(), 4),
            "accuracy_10_chains_mean_z": round(
                (self.defense.classifier(codes.mean(0)).argmax(-1) == y).float().mean().item(), 4
            ),
            "reconstruction_r2": round(1 - (misfit / spread).item(), 4),
            "chain_icc": round(chain_icc(codes), 4),
            "sigma": round(self.defense.log_sigma.exp().item(), 4),
        }

    def facts(self) -> dict[str, object]:
        """What was fitted or chosen."""
        return {"preset": self.defense.preset, "sigma_start": round(self.sigma_start, 4)}


def chain_icc(codes: Tensor) -> float:
    """Intraclass correlation of the code across chains, averaged over dimensions: 0 says z knows nothing of x.

    Args:
        codes: `chains b 200`.
    """
    chains = len(codes)
    within = codes.var(0).mean(0)  # 200
    between = codes.mean(0).var(0) - within / chains
    return (between / (between + within)).mean().item()
