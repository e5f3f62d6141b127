"""What shows that the code knows the image: reconstructions, samples, R2, the chains' agreement, accuracies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor, nn

from robench.types import Images, Labels, PerExample

from .chain import Sweeps

if TYPE_CHECKING:
    from .model import ShortRun

DESCENT_STEPS: Final = 200
CHAINS: Final = 10


def chain_icc(codes: Tensor) -> float:
    """Intraclass correlation of the code across chains, averaged over dimensions: 0 says z knows nothing of x.

    Args:
        codes: `chains b 200`.
    """
    chains = len(codes)
    within = codes.var(0).mean(0)  # 200
    between = codes.mean(0).var(0) - within / chains
    return (between / (between + within)).mean().item()


@torch.no_grad()
def reconstruct(model: ShortRun, x: Images, steps: int = DESCENT_STEPS) -> Tensor:
    """Codes `b 200` that reconstruct the images: gradient descent on |x - g(z)|^2 from z_0 ~ N(0, I) (thesis, 4.2).

    Neither prior nor noise. The thesis gives neither the steps nor their size; the size is half that of the chain's
    data term, at which the descent is stable wherever the chain is.
    """
    sweeps, target = Sweeps(model.generator), model.target(x)
    size = model.step_size / (2 * (2 * model.log_sigma).exp())
    z = torch.randn(len(x), model.latent, device=x.device, dtype=x.dtype)
    for _ in range(steps):
        z = z - size * sweeps.pull(z, target, record=False)[0]
    return z


@torch.no_grad()
def draw_pictures(model: ShortRun, x: Images) -> dict[str, Images]:
    """Rows of images in [0, 1]: the originals, two kinds of reconstruction, and samples g(z) with z ~ N(0, I).

    `reconstruction` is that of the thesis (`reconstruct`), `chain` what the generator makes of the code that is
    classified: with prior and noise.
    """
    codes = {
        "reconstruction": reconstruct(model, x),
        "chain": model.infer(x),
        "sample": torch.randn(len(x), model.latent, device=x.device, dtype=x.dtype),
    }
    made = {name: (model.generate(z) + 1) / 2 for name, z in codes.items()}
    if x.shape[-1] != made["chain"].shape[-1]:
        made = {name: nn.functional.interpolate(images, size=x.shape[-1]) for name, images in made.items()}
    return {"original": x, **made}


def misfit(model: ShortRun, x: Images, codes: Tensor) -> PerExample:
    """|x - g(z)|^2 of each image, summed over pixels, in the model's scale [-1, 1]."""
    return (model.generate(codes) - model.target(x)).square().flatten(1).sum(1)


def r_squared(model: ShortRun, x: Images, left: PerExample) -> float:
    """The share of the images' variance that a reconstruction explains; it takes two images.

    Args:
        model: the model, whose scale counts.
        x: images in [0, 1].
        left: what `misfit` gives for them.
    """
    target = model.target(x)
    return 1 - (left.sum() / (target - target.mean(0)).square().sum()).item()


@torch.no_grad()
def measure_chains(model: ShortRun, x: Images, y: Labels, chains: int = CHAINS) -> dict[str, float]:
    """Accuracy by number of chains and aggregate, R2 of the chain's reconstruction, and the chains' agreement (ICC).

    One image has neither R2 nor ICC, which compare images.
    """
    codes = torch.stack([model.infer(x) for _ in range(chains)])  # chains b 200
    logits = model.classifier(codes)
    votes = nn.functional.one_hot(logits.argmax(-1), model.num_classes).sum(0)
    answers = {
        f"accuracy_{chains}_chains": logits.mean(0),
        f"accuracy_{chains}_chains_mean_z": model.classifier(codes.mean(0)),
        f"accuracy_{chains}_chains_vote": votes,
    }
    compared = {}
    if len(x) > 1:
        explained = r_squared(model, x, misfit(model, x, codes[0]))
        compared = {"reconstruction_r2": round(explained, 4), "chain_icc": round(chain_icc(codes), 4)}
    return {
        "accuracy_1_chain": round((logits.argmax(-1) == y).float().mean().item(), 4),
        **{name: round((answer.argmax(-1) == y).float().mean().item(), 4) for name, answer in answers.items()},
        **compared,
        "sigma": round(model.log_sigma.exp().item(), 4),
    }


@torch.no_grad()
def diagnose(model: ShortRun, x: Images, y: Labels) -> Mapping[str, float]:
    """The figures of `measure_chains`, and R2 and MSE of the thesis's reconstruction (scale [-1, 1])."""
    left = misfit(model, x, reconstruct(model, x))
    summed = left.mean().item()
    return {
        **measure_chains(model, x, y),
        **({"descent_r2": round(r_squared(model, x, left), 4)} if len(x) > 1 else {}),
        "descent_mse_summed": round(summed, 3),
        "descent_mse_per_pixel": round(summed / model.target(x[:1]).numel(), 5),
    }
