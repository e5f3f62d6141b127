"""Defenses that are masked on purpose, for the audit's own tests: each must be called `masked`, by the check it names.

Each is put on a classifier that is really trained (any `Defense`), keeps most of its clean accuracy, and adds no
robustness: what an attack cannot find through it, another finds.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional

from robench.defense import Defense
from robench.registry import load_defense
from robench.types import Images, Logits


class Decoy(Defense):
    """A classifier behind something that hides its gradient."""

    def __init__(self, base: Defense) -> None:
        """Puts the decoy on a trained classifier."""
        super().__init__()
        self.base = base
        self.name = f"decoy_{type(self).__name__.lower()}"
        self.num_classes, self.input_shape, self.batch_rows = base.num_classes, base.input_shape, base.batch_rows
        self.freeze()

    def forward(self, x: Images) -> Logits:
        """The base's logits behind the decoy."""
        return self.base(self.change(x))

    def change(self, x: Images) -> Images:
        """What becomes of the images before the base sees them; default: nothing."""
        return x


class Saturated(Decoy):
    """Logits a thousand times as large: the softmax is 0 or 1 and cross-entropy has no gradient."""

    def forward(self, x: Images) -> Logits:
        """The large logits."""
        return 1000 * self.base(x)


class Rounded(Decoy):
    """Pixels rounded to 16 levels, whose derivative is zero."""

    def change(self, x: Images) -> Images:
        """Rounds."""
        return (15 * x).round() / 15


class Thermometer(Decoy):
    """Pixels as a thermometer code of 15 levels (Buckman et al. 2018), read back: no gradient passes a comparison."""

    def change(self, x: Images) -> Images:
        """Codes and reads back."""
        levels = torch.linspace(0, 1, 16, device=x.device)[1:] - 1 / 30
        return (x[..., None] >= levels).to(x.dtype).mean(-1)


class Stairs(Decoy):
    """Pixels cut to their 8-bit value: a step so fine that it changes no answer, with zero gradient."""

    def change(self, x: Images) -> Images:
        """Cuts."""
        return (255 * x).floor() / 255


class JpegLike(Decoy):
    """Blocks of 4 x 4 in a cosine basis, coefficients rounded to multiples of 0.15, outside the graph."""

    def change(self, x: Images) -> Images:
        """Transforms, rounds and transforms back."""
        grid = torch.arange(4, device=x.device, dtype=x.dtype)
        basis = torch.cos(math.pi / 4 * (grid + 0.5) * grid[:, None]) * math.sqrt(0.5)
        basis[0] = 0.5
        with torch.no_grad():
            blocks = x.unfold(2, 4, 4).unfold(3, 4, 4)  # b c h/4 w/4 4 4
            coefficients = ((basis @ blocks @ basis.T) / 0.15).round() * 0.15
            back = basis.T @ coefficients @ basis
            return back.permute(0, 1, 2, 4, 3, 5).reshape(x.shape).clamp(0, 1)


class InputNoise(Decoy):
    """Gaussian noise on the images that the base was never trained with.

    Large enough that answers change from draw to draw; noise of 0.1 or less changes few, hides nothing and is no decoy.
    """

    randomized = True

    def __init__(self, base: Defense, sigma: float = 0.25) -> None:
        """Puts the noise before the base."""
        super().__init__(base)
        self.sigma = sigma

    def change(self, x: Images) -> Images:
        """Adds the noise."""
        return x + self.sigma * torch.randn_like(x)

    @contextlib.contextmanager
    def without_randomness(self) -> Iterator[None]:
        """No noise."""
        sigma, self.sigma = self.sigma, 0.0
        try:
            yield
        finally:
            self.sigma = sigma


class ResizePad(Decoy):
    """Each image shrunk to a random size and put at a random place (Xie et al. 2018)."""

    randomized = True

    def change(self, x: Images) -> Images:
        """Shrinks and moves each image by itself."""
        count = len(x)
        scale = 1 + 0.3 * torch.rand(count, device=x.device)
        shift = (torch.rand(count, 2, device=x.device) * 2 - 1) * (scale - 1)[:, None]
        theta = torch.zeros(count, 2, 3, device=x.device, dtype=x.dtype)
        theta[:, 0, 0] = theta[:, 1, 1] = scale
        theta[:, :, 2] = shift
        grid = functional.affine_grid(theta, list(x.shape), align_corners=False)
        return functional.grid_sample(x, grid, align_corners=False)


class LogitNoise(Decoy):
    """Noise on the logits, as large as their own spread."""

    randomized = True

    def __init__(self, base: Defense, sigma: float = 2.0) -> None:
        """Puts the noise behind the base."""
        super().__init__(base)
        self.sigma = sigma

    def forward(self, x: Images) -> Logits:
        """Noisy logits."""
        logits = self.base(x)
        return logits + self.sigma * torch.randn_like(logits)


class _Flip(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        del ctx
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        del ctx
        return -grad


class FlippedGradient(Decoy):
    """The gradient's sign is flipped on the way back."""

    def change(self, x: Images) -> Images:
        """Nothing forward."""
        flipped: Tensor = _Flip.apply(x)  # type: ignore[no-untyped-call]
        return flipped


class Snapped(Decoy):
    """Logits snapped to 10 for the answer and 0 for all else: the answers are the base's, the gradient is zero."""

    def forward(self, x: Images) -> Logits:
        """Snapped logits, in the graph of the base's with a factor of 0."""
        logits = self.base(x)
        return 10 * functional.one_hot(logits.argmax(1), self.num_classes).to(logits.dtype) + 0 * logits


class Purified(Decoy):
    """A few steps of smoothing under a total-variation energy, outside the graph."""

    def change(self, x: Images) -> Images:
        """Descends the energy."""
        point = x.detach()
        for _ in range(5):
            with torch.enable_grad():
                leaf = point.detach().requires_grad_()
                flat = (leaf.diff(dim=2).square() + 1e-4).sqrt().sum() + (leaf.diff(dim=3).square() + 1e-4).sqrt().sum()
                (grad,) = torch.autograd.grad(flat + 4 * (leaf - x.detach()).square().sum(), leaf)
            point = (point - 0.01 * grad).clamp(0, 1).detach()
        return point


class Hashed(Decoy):
    """Noise on the images drawn from a hash of their own bytes: deterministic, and different at every point."""

    def __init__(self, base: Defense, sigma: float = 0.25) -> None:
        """Puts the noise before the base."""
        super().__init__(base)
        self.sigma = sigma

    def change(self, x: Images) -> Images:
        """Adds the noise of each image."""
        rows = []
        for image in x.detach().cpu():
            digest = hashlib.sha256(image.numpy().tobytes()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
            rows.append(torch.randn(image.shape, generator=generator, dtype=image.dtype))
        return x + self.sigma * torch.stack(rows).to(x.device)


class OutOfBall(Decoy):
    """Knows the images of the test; asked far from all of them, it answers as at the nearest one."""

    def __init__(self, base: Defense, known: Images, eps: float) -> None:
        """Remembers the images and the bound that it expects."""
        super().__init__(base)
        self.register_buffer("known", known)
        self.eps = eps

    def change(self, x: Images) -> Images:
        """Replaces what is out of every ball by the centre of the nearest."""
        known = self.get_buffer("known")
        distance = torch.cdist(x.detach().flatten(1), known.flatten(1), p=math.inf)
        nearest, index = distance.min(1)
        return torch.where((nearest > 1.02 * self.eps).view(-1, 1, 1, 1), known[index], x)


@dataclass(frozen=True)
class Planted:
    """A decoy and what must find it.

    Attributes:
        make: builds it from a trained classifier, the images of the audit and its eps; a net of its own needs none.
        checks: the checks of which at least one must not pass.
        eps: the linf bound of the claim.
    """

    make: Callable[[Defense, Images, float], Defense]
    checks: tuple[str, ...]
    eps: float = 0.1


def _trained(cls: str) -> Callable[[Defense, Images, float], Defense]:
    return lambda base, x, eps: load_defense(f"robench.testing.decoy_training:{cls}")


GRADIENT: Final = ("zero_gradients", "loss_surface", "finite_differences")
DRAWS: Final = ("draws", "fixed_draws", "retries", "gradient_noise")
PLANTED: Final[dict[str, Planted]] = {
    "saturated logits": Planted(lambda base, x, eps: Saturated(base), ("zero_gradients", "loss_choice")),
    "rounding": Planted(lambda base, x, eps: Rounded(base), GRADIENT),
    "thermometer code": Planted(lambda base, x, eps: Thermometer(base), GRADIENT),
    "zero-gradient step": Planted(lambda base, x, eps: Stairs(base), GRADIENT),
    "JPEG-like": Planted(lambda base, x, eps: JpegLike(base), GRADIENT),
    "input noise": Planted(lambda base, x, eps: InputNoise(base), DRAWS),
    "resize and pad": Planted(lambda base, x, eps: ResizePad(base), DRAWS),
    "logit noise": Planted(lambda base, x, eps: LogitNoise(base), DRAWS),
    "flipped gradient": Planted(lambda base, x, eps: FlippedGradient(base), ("finite_differences", "loss_surface")),
    "logit snap": Planted(lambda base, x, eps: Snapped(base), GRADIENT),
    "detached purification": Planted(lambda base, x, eps: Purified(base), GRADIENT),
    "hash of the input": Planted(lambda base, x, eps: Hashed(base), ("stability", "finite_differences", "noise")),
    "out-of-ball answers": Planted(OutOfBall, ("unbounded",)),
}
"""Put on a trained classifier."""
TRAINED: Final[dict[str, Planted]] = {
    "distillation": Planted(_trained("Distilled"), ("zero_gradients", "loss_choice")),
    "one-step training": Planted(_trained("OneStep"), ("distortion", "monotone", "single_step"), eps=0.3),
    "k-winners-take-all": Planted(_trained("Winners"), ("finite_differences", "loss_surface", "square", "stability")),
}
"""Nets of their own for Fashion-MNIST, trained to be masked; see `decoy_training`."""
