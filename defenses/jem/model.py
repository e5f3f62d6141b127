"""JEM: the logits of a classifier read as an energy, and refinement of the input by the model's own SGLD."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal, get_args

import torch
from torch import Tensor, nn

from robench.batches import RowsByDevice
from robench.defense import Defense
from robench.errors import UsageError
from robench.types import Images, Labels, Logits, PerExample

from .sgld import RANK, Gaussians, Sampler, climb, draw_gaussians, sample

if TYPE_CHECKING:
    from robench.train.recipe import Recipe

Augment = Literal["none", "shift", "mirror"]

WIDTH: Final = 24
SIDES: Final = (28, 32)
INPUT_NOISE: Final = 0.03
SAMPLE_STEPS: Final = 100


def make_net(channels: int, num_classes: int, width: int, side: int) -> nn.Sequential:
    """Four convolutions and a linear layer, no normalisation: images in [-1, 1] to logits.

    711,946 parameters and 17.8 M multiply-adds at 1x28x28 and width 32; a quarter of both at 16.
    """
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1),  # b c 28 28 -> b 24 28 28
        nn.SiLU(),
        nn.Conv2d(width, 2 * width, 4, stride=2, padding=1),  # -> b 48 14 14
        nn.SiLU(),
        nn.Conv2d(2 * width, 4 * width, 4, stride=2, padding=1),  # -> b 96 7 7
        nn.SiLU(),
        nn.Conv2d(4 * width, 8 * width, 4, stride=2, padding=1),  # -> b 192 3 3
        nn.SiLU(),
        nn.Flatten(),
        nn.Linear(8 * width * (side // 8) ** 2, num_classes),
    )


class JEM(Defense):
    """A joint energy-based model: p(x, y) proportional to exp f(x)[y]; it may refine its input before it answers.

    Grathwohl et al., ICLR 2020 (arXiv 1912.03263): log p(y|x) is the usual softmax and log p(x) is LSE_y f(x)[y] up to
    a constant. With `refine_steps` = n (JEM-n, section 5.4) each of `n_chains` copies of the image takes n SGLD steps
    towards higher log p(x), x <- x + step * d LSE f(x) / dx + noise * N(0, I) in the scale [-1, 1], and the logits of
    the copies are averaged. JEM-0 without input noise is deterministic, anything else randomized. No guarantee. Cost of
    a forward: n_chains * (2 n + 1) passes of the net (10 M multiply-adds each at 1x28x28).

    Gradient modes of a refining model: `full` differentiates every step, second derivatives included; `bpda` takes the
    refinement for the identity on the way back, as the released attack script does; `detached` leaves it out and gives
    the logits of the image as it came. `full` is exact and comes first, yet PGD along `detached` breaks ten steps far
    more often (docs/reproduced/jem-curves.md). JEM-0 has `full` alone.

    Departures: four convolutions instead of a WRN-28-10, so that two CPU cores can train it; SiLU instead of LeakyReLU
    0.2, since the refinement moves along a gradient of the net, which jumps between the linear pieces of a LeakyReLU
    net: its derivative would miss the jumps, and an attack by `full` would meet a gradient that is masked.

    Detection scores, higher is more suspicious: `log_px` is -LSE f(x), `max_py` is -max p(y|x), and `grad_norm` is
    |d log p(x) / dx| (section 5.3). All are those of JEM-0, and so deterministic.
    """

    name = "jem"
    generative = True
    recipes: ClassVar[Mapping[str, str]] = {
        "informative": "chains start at the Gaussians of the classes, as in JEM++",
        "uniform": "chains start at uniform noise, as in the paper",
        "classifier": "the net without its density, for comparison",
    }
    needs_weights = True
    training_options = ("augment",)
    batch_rows = RowsByDevice(cpu=256, gpu=2048)
    detection_scores = ("log_px", "max_py", "grad_norm")
    start_mean: Tensor
    start_factors: Tensor
    start_spread: Tensor

    def __init__(  # noqa: PLR0913 - the hyperparameters of the released attack script
        self,
        channels: int = 1,
        side: int = 28,
        width: int = WIDTH,
        refine_steps: int = 0,
        refine_step_size: float = 1.0,
        refine_noise: float = 0.01,
        input_noise: float | None = None,
        n_chains: int = 5,
        attack_chains: int = 1,
        augment: Augment | None = None,
    ) -> None:
        """Builds an untrained model of ten classes.

        Args:
            channels: image channels.
            side: height and width of the images, 28 or 32.
            width: channels of the first convolution; the others scale with it.
            refine_steps: SGLD steps before an answer.
            refine_step_size: factor of the gradient in such a step.
            refine_noise: standard deviation of the noise in such a step, in the scale [-1, 1].
            input_noise: standard deviation of noise added to the image first, in the scale [-1, 1]. None: 0.03 as
                released where the input is refined, else 0.
            n_chains: copies of an image whose logits `forward` averages; 1 where nothing is random.
            attack_chains: copies in one `adaptive_forward`; the EOT samples of an attack multiply them.
            augment: what training does to its images: `shift` moves them by up to 4 pixels, `mirror` (for photographs,
                never for digits) also flips half of them. None: `shift` in colour, else `none`.

        Raises:
            UsageError: an option is out of range.
        """
        super().__init__()
        if augment is not None and augment not in get_args(Augment):
            raise UsageError(f'jem: augment must be one of {", ".join(get_args(Augment))}; got "{augment}"')
        self.augment: Augment = augment or ("shift" if channels == 3 else "none")
        if input_noise is None:
            input_noise = INPUT_NOISE if refine_steps else 0.0
        _check_counts(side, refine_steps, channels=channels, width=width, chains=min(n_chains, attack_chains))
        if not (refine_step_size > 0 and refine_noise >= 0 and input_noise >= 0):  # also where one is NaN
            raise UsageError(
                "jem: refine_step_size must be positive, refine_noise and input_noise at least 0; "
                f"got {refine_step_size}, {refine_noise} and {input_noise}"
            )
        self.num_classes = 10
        self.input_shape = (channels, side, side)
        self.sampler = Sampler(refine_steps, refine_step_size, refine_noise)
        self.input_noise = input_noise
        self.randomized = input_noise > 0 or (refine_steps > 0 and refine_noise > 0)
        if refine_steps:
            self.first_look = {"n": 64, "eot": 4, "judge_repeats": 5}
        self.n_chains, self.attack_chains = (n_chains, attack_chains) if self.randomized else (1, 1)
        self.gradient_modes = ("full", "bpda", "detached") if refine_steps else ("full",)
        self.forward_cost = self.n_chains / self.attack_chains
        self.temperature = 1.0
        self.net = make_net(channels, self.num_classes, width, side)
        self.net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks it
        for name, rows in {"start_mean": (), "start_factors": (RANK,), "start_spread": ()}.items():
            self.register_buffer(name, torch.zeros(self.num_classes, *rows, *self.input_shape))

    @classmethod
    def options_for(cls, input_shape: tuple[int, int, int], num_classes: int) -> dict[str, Any]:
        """The constructor's options for a dataset of square images of 10 classes."""
        channels, height, width = input_shape
        if height != width or height not in SIDES or num_classes != 10:
            raise UsageError(
                f"jem takes 28x28 or 32x32 images of 10 classes; the dataset has {input_shape}, {num_classes}"
            )
        return {"channels": channels, "side": height}

    @classmethod
    def weights_variant(cls, options: Mapping[str, Any]) -> str:
        """The width, unless it is the usual one."""
        width = options.get("width", WIDTH)
        return "" if width == WIDTH else f"width{width}"

    def recipe(self, name: str | None = None) -> Recipe:
        """One of `recipes`; `informative` unless another is named."""
        from robench.train.recipe import check_recipe

        from .train import JEMRecipe

        return JEMRecipe(self, check_recipe("jem", self.recipes, name or "informative"))

    def forward(self, x: Images) -> Logits:
        """Refines `n_chains` copies of each image and averages their logits; the refinement keeps no graph."""
        chains = self._perturb(x, self.n_chains)
        if self._sampler().steps:
            chains = sample(self.log_density, chains, self._sampler())
        return self.classify(chains).unflatten(0, (self.n_chains, -1)).mean(0)

    def adaptive_forward(self, x: Images, mode: str | None = None) -> Logits:
        """The same with `attack_chains` copies, differentiable in x; see the class for the modes."""
        mode = self.check_mode(mode)
        chains, sampler = self._perturb(x, self.attack_chains), self._sampler()
        for _ in range(0 if mode == "detached" else sampler.steps):
            moved = climb(self.log_density, chains, sampler, keep_graph=mode == "full")
            chains = moved if mode == "full" else chains + (moved - chains).detach()
        return self.classify(chains).unflatten(0, (self.attack_chains, -1)).mean(0)

    @contextlib.contextmanager
    def without_randomness(self) -> Iterator[None]:
        """The image and the refinement without noise: plain ascent of log p(x)."""
        self.temperature = 0.0
        try:
            yield
        finally:
            self.temperature = 1.0

    def classify(self, x: Images) -> Logits:
        """The net's logits f(x) for images in [-1, 1]."""
        return self.net(x.contiguous(memory_format=torch.channels_last))

    def log_density(self, x: Images) -> PerExample:
        """The log density up to a constant of images in [-1, 1]: LSE_y f(x)[y], which is -E(x) (JEM, eq. 7)."""
        return self.classify(x).to(x.dtype).logsumexp(1)  # under autocast the logits come in bfloat16

    def detection_score(self, x: Images, kind: str | None = None) -> PerExample:
        """How little an image looks like the training data, by one of `detection_scores` (None: the first).

        Args:
            x: images in [0, 1].
            kind: the score.

        Raises:
            UsageError: there is no such score.
        """
        kind = kind or self.detection_scores[0]
        if kind not in self.detection_scores:
            raise UsageError(f'jem has the detection scores {", ".join(self.detection_scores)}; got "{kind}"')
        x = 2 * x - 1
        if kind == "log_px":
            return -self.log_density(x)
        if kind == "max_py":
            return -self.classify(x).softmax(1).amax(1)
        return self.slope(x).flatten(1).norm(dim=1)

    def slope(self, x: Images) -> Images:
        """The gradient d log p(x) / dx of images in [-1, 1]."""
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            return torch.autograd.grad(self.log_density(leaf).sum(), leaf)[0]

    @property
    def gaussians(self) -> Gaussians:
        """Where chains start: the Gaussians of the classes, fitted in training."""
        return Gaussians(self.start_mean, self.start_factors, self.start_spread)

    def dream(self, y: Labels, steps: int = SAMPLE_STEPS) -> Images:
        """Samples in [0, 1]: chains from the Gaussians of the classes y; the chain itself knows no class."""
        sampler = Sampler(steps, clamp=True)
        return (sample(self.log_density, draw_gaussians(self.gaussians, y), sampler) + 1) / 2

    def pictures(self, x: Images) -> Mapping[str, Images]:
        """The images, the same after ten steps of refinement (JEM-10), starts of chains, and samples; all in [0, 1]."""
        y = torch.arange(len(x), device=x.device) % self.num_classes
        starts = draw_gaussians(self.gaussians, y)
        refined = sample(self.log_density, 2 * x - 1, Sampler(10)).clamp(-1, 1)
        return {"original": x, "refined": (refined + 1) / 2, "start": (starts + 1) / 2, "sample": self.dream(y)}

    def diagnostics(self, x: Images, y: Labels) -> Mapping[str, float]:
        """Mean log p(x), up to a constant, of images, of samples and of the chains' starts."""
        with torch.no_grad():
            labels = y % self.num_classes
            densities = {
                "log_px_images": self.log_density(2 * x - 1).mean(),
                "log_px_samples": self.log_density(2 * self.dream(labels) - 1).mean(),
                "log_px_starts": self.log_density(draw_gaussians(self.gaussians, labels)).mean(),
            }
        return {name: round(value.item(), 4) for name, value in densities.items()}

    def _sampler(self) -> Sampler:
        plain = self.sampler
        return Sampler(plain.steps, plain.step_size, plain.noise * self.temperature)

    def _perturb(self, x: Images, chains: int) -> Tensor:
        rows = (2 * x - 1).repeat(chains, 1, 1, 1)
        noise = self.input_noise * self.temperature
        return rows + noise * torch.randn_like(rows) if noise else rows


def _check_counts(side: int, steps: int, *, channels: int, width: int, chains: int) -> None:
    if side not in SIDES:
        raise UsageError(f"jem: side must be 28 or 32; got {side}")
    if min(channels, width, chains) < 1 or steps < 0:
        raise UsageError(
            "jem: channels, width, n_chains and attack_chains must be at least 1 and refine_steps at least 0; "
            f"got channels {channels}, width {width}, {chains} chains, refine_steps {steps}"
        )
