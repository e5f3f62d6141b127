"""The Short Run classifier: a short Langevin chain inverts a generator, a small network classifies the latent code."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal, get_args

import torch
from torch import Tensor, nn

from robench.batches import RowsByDevice
from robench.defense import Defense
from robench.errors import UsageError
from robench.types import Images, Labels, Logits

from .chain import Chain, Sweeps, can_sweep
from .figures import diagnose, draw_pictures
from .learn import run_to_learn

if TYPE_CHECKING:
    from robench.train.recipe import Recipe

LATENT: Final = 200
SIDE: Final = 28
"""Height and width of what the generator makes."""
CHAIN_ROWS: Final = 128
"""Chains that one pass through the generator carries at most on a CPU; larger batches only fall out of the cache."""
GPU_CHAIN_ROWS: Final = 8192
VOTE_SMOOTHING: Final = 0.01
"""Votes that each class has before any chain votes (a in `log_shares`); more would understate a unanimous vote."""

Preset = Literal["repaired", "paper_literal"]
Aggregate = Literal["mean_logits", "mean_z", "vote"]


def make_generator(channels: int, preset: str) -> nn.Sequential:
    """The generator of table A.1 (Mish, no normalisation): latent `b 200 1 1` to images `b channels 28 28`.

    As printed, the second layer gives 6x6 where the table says 7x7; `output_padding=1` restores the table. The preset
    `repaired` ends in tanh, whose range is that of the data, [-1, 1]; `paper_literal` ends as printed in Mish and
    sigmoid, whose range is [0.423, 1).
    """
    head: list[nn.Module] = [nn.Tanh()] if preset == "repaired" else [nn.Mish(), nn.Sigmoid()]
    return nn.Sequential(
        nn.ConvTranspose2d(LATENT, 128, 3),  # -> b 128 3 3
        nn.Mish(),
        nn.ConvTranspose2d(128, 128, 4, stride=2, padding=1, output_padding=1),  # -> b 128 7 7
        nn.Mish(),
        nn.ConvTranspose2d(128, 64, 4, stride=2, padding=1),  # -> b 64 14 14
        nn.Mish(),
        nn.ConvTranspose2d(64, channels, 4, stride=2, padding=1),  # -> b channels 28 28
        *head,
    )


def make_classifier(num_classes: int, preset: str) -> nn.Sequential:
    """The small classifier of table A.2: 200-140-80-classes; `paper_literal` has a Mish on the logits as printed."""
    last: list[nn.Module] = [] if preset == "repaired" else [nn.Mish()]
    return nn.Sequential(
        nn.Linear(LATENT, 140), nn.Mish(), nn.Linear(140, 80), nn.Mish(), nn.Linear(80, num_classes), *last
    )


class ShortRun(Defense):
    """Classifies the latent code that a short Langevin chain infers for the image; randomized and generative.

    E. M. Fischer, MSc thesis, UCLA 2020. The model is x = g(z) + e with z ~ N(0, I), e ~ N(0, sigma^2 I). For an image
    x, `steps` Langevin steps from z_0 ~ N(0, I) (eq. 3.9) infer z, and a small network classifies it:

        z <- z - s (z + J_g(z)^T (g(z) - x) / sigma^2) + sqrt(2 s) N(0, I)

    A forward pass runs `n_chains` independent chains for each image and aggregates them. There is no guarantee.
    Cost of a forward: n_chains * steps passes forward and backward through the generator (9.2 M multiply-adds each). A
    gradient along `attack_chains` chains takes twice the passes of their inference and keeps 3.2 MiB for each, or with
    `recompute` three times the passes and next to no memory (see `Chain`).

    Departures of the preset `repaired` from the thesis: `output_padding`, a tanh head for data in [-1, 1], no Mish on
    the logits, and sigma from the data (with the printed sigma = 6.4 the code carries no information about the image);
    see the card. The preset `paper_literal` is the thesis as printed but for `output_padding`, kept for documentation.

    Gradient modes: `full` differentiates the whole unrolled chain, second derivatives of the generator included;
    `last_step` differentiates the last Langevin step alone and takes the state before it as a constant.
    """

    name = "shortrun"
    randomized = True
    generative = True
    needs_weights = True
    training_options = ("sigma",)
    recipes: ClassVar[Mapping[str, str]] = {
        "thesis": "its three stages; options labelled, unlabelled and batch (images), depth (steps), reconstruction",
    }
    gradient_modes = ("full", "last_step")
    latent = LATENT
    batch_rows = RowsByDevice(cpu=64, gpu=2048)  # a gradient keeps 3.2 MiB for each row and chain: 6.5 GiB at 2048
    first_look = {"n": 32, "eot": 4, "judge_repeats": 5}  # noqa: RUF012 - a constant; the base declares the type

    def __init__(  # noqa: PLR0913 - the hyperparameters of the thesis
        self,
        channels: int = 1,
        preset: Preset = "repaired",
        sigma: float | Literal["auto"] | None = None,
        n_chains: int = 10,
        aggregate: Aggregate = "mean_logits",
        attack_chains: int = 1,
        steps: int = 20,
        step_size: float = 0.015,
        recompute: bool = False,
        side: int = SIDE,
    ) -> None:
        """Builds an untrained model.

        Args:
            channels: image channels (1 or 3).
            preset: `repaired` or `paper_literal`.
            sigma: standard deviation of the observation noise that the model starts from; weights bring
                their own, so that a number is taken before training alone.
                `auto`: training fits it to its images (`auto_sigma`), and until then it is 1.216, which is the fit to
                Fashion-MNIST. None takes `auto` for `repaired` and 6.4 for `paper_literal`.
            n_chains: chains per image in `forward`.
            aggregate: what becomes of them: `mean_logits`, `mean_z` (classify the mean code) or `vote`, whose logits
                are the logarithms of the shares of the vote (`log_shares`).
            attack_chains: chains per image in one `adaptive_forward`; the EOT samples of an attack multiply it.
            steps: Langevin steps.
            step_size: s above.
            recompute: repeat each step on the way back of a gradient rather than keep its activations; see `Chain`.
            side: height and width of the images; larger ones than 28 are shrunk inside, as the thesis shrinks SVHN's.

        Raises:
            UsageError: an option is out of range.
        """
        super().__init__()
        if side < SIDE:
            raise UsageError(f"shortrun: side must be at least {SIDE}; got {side}")
        _check_options(
            preset, aggregate, min(n_chains, attack_chains, steps, channels), sigma=sigma, step_size=step_size
        )
        self.preset, self.aggregate = preset, aggregate
        self.temperature = 1.0
        self.sweep_dtype: torch.dtype | None = None
        self.n_chains, self.attack_chains = n_chains, attack_chains
        self.steps, self.step_size, self.recompute = steps, step_size, recompute
        self.forward_cost = n_chains / attack_chains
        self.num_classes = 10
        self.input_shape = (channels, side, side)
        self.generator = make_generator(channels, preset)
        self.generator.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks it
        self.classifier = make_classifier(self.num_classes, preset)
        self.fits_sigma = sigma == "auto" or (sigma is None and preset == "repaired")
        start = 1.216 if self.fits_sigma else sigma if isinstance(sigma, float | int) else 6.4
        self.log_sigma = nn.Parameter(torch.tensor(math.log(start)))

    @classmethod
    def options_for(cls, input_shape: tuple[int, int, int], num_classes: int) -> dict[str, Any]:
        """The constructor's options for a dataset of square images of 10 classes, 28x28 or larger."""
        channels, height, width = input_shape
        if height != width or height < SIDE or num_classes != 10:
            raise UsageError(
                f"shortrun takes square images of side {SIDE} or more and 10 classes; "
                f"the dataset has {input_shape}, {num_classes}"
            )
        return {"channels": channels} if height == SIDE else {"channels": channels, "side": height}

    @classmethod
    def weights_variant(cls, options: Mapping[str, Any]) -> str:
        """The preset, unless it is the usual one: the shapes agree, but the weights make no sense in the other."""
        preset = options.get("preset", "repaired")
        return "" if preset == "repaired" else str(preset)

    def recipe(self, name: str | None = None) -> Recipe:
        """The thesis's three stages, `thesis`; its options as in `thesis(labelled=10000)`, see `ShortRunRecipe`.

        Raises:
            UsageError: another name, or an option that it does not have or that is out of range.
        """
        from .train import make_recipe

        return make_recipe(self, name)

    def pictures(self, x: Images) -> Mapping[str, Images]:
        """Originals, reconstructions by gradient descent and by the chain, and samples; see `draw_pictures`."""
        return draw_pictures(self, x)

    def diagnostics(self, x: Images, y: Labels) -> Mapping[str, float]:
        """R2 and MSE of the reconstructions, chain ICC, accuracy by chains and aggregate; see `diagnose`."""
        return diagnose(self, x, y)

    def forward(self, x: Images) -> Logits:
        """Runs `n_chains` chains for each image and aggregates them; no gradient reaches x."""
        return self._aggregate(self.infer(x.repeat(self.n_chains, 1, 1, 1)), self.n_chains, self.aggregate)

    def adaptive_forward(self, x: Images, mode: str | None = None) -> Logits:
        """The same chains, `attack_chains` of them, differentiable in x; `vote` is replaced by `mean_logits`."""
        mode = self.check_mode(mode)
        codes = self.infer_differentiably(
            x.repeat(self.attack_chains, 1, 1, 1), depth=1 if mode == "last_step" else None
        )
        return self._aggregate(codes, self.attack_chains, "mean_z" if self.aggregate == "mean_z" else "mean_logits")

    @contextlib.contextmanager
    def without_randomness(self) -> Iterator[None]:
        """Chains that start at the prior's mean, z_0 = 0, and take no noise: gradient descent on the energy."""
        self.temperature = 0.0
        try:
            yield
        finally:
            self.temperature = 1.0

    def infer(self, x: Images) -> Tensor:
        """Draws a code for each image: one chain of `steps` steps, no gradient kept. Returns `b 200`."""
        most = CHAIN_ROWS if x.device.type == "cpu" else GPU_CHAIN_ROWS
        return torch.cat([self._infer_rows(rows) for rows in x.split(most)])

    def _infer_rows(self, x: Images) -> Tensor:
        z = self.start(x)
        if can_sweep(self.generator):
            return self._chain().run(z, self.target(x))
        for _ in range(self.steps):
            z = self.step(z.detach(), x).detach()
        return z

    def infer_differentiably(self, x: Images, *, depth: int | None = None) -> Tensor:
        """Draws a code for each image, differentiable in x.

        Args:
            x: images in [0, 1].
            depth: how many of the last steps are differentiated, the code before them taken as a constant; None: all.

        With frozen weights, as under attack, the chain is differentiated by hand (`Chain`). With weights to be learned
        autograd keeps the chain's graph, and the code is differentiable in all of them as well.
        """
        depth = self.steps if depth is None else min(depth, self.steps)
        z = self.start(x)
        learned = any(parameter.requires_grad for parameter in (*self.generator.parameters(), self.log_sigma))
        if can_sweep(self.generator):
            chain, target = self._chain(), self.target(x)
            if learned:
                return run_to_learn(chain, z, target, self.generator, self.log_sigma, depth=depth)
            return chain.run_differentiably(z, target, depth=depth, recompute=self.recompute)
        for index in range(self.steps):
            keep = index >= self.steps - depth
            z = self.step(z, x, keep_graph=keep)
            z = z if keep else z.detach()
        return z

    def _chain(self) -> Chain:
        precision = (-2 * self.log_sigma.detach()).exp()
        device = self.log_sigma.device.type
        fast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        sweeps = Sweeps(self.generator, self.sweep_dtype or fast)
        return Chain(sweeps, precision, self.step_size, self.steps, self.temperature)

    def start(self, x: Images) -> Tensor:
        """The start of the chain, z_0 ~ N(0, I)."""
        return self.temperature * torch.randn(len(x), LATENT, device=x.device, dtype=x.dtype)

    def step(self, z: Tensor, x: Images, *, keep_graph: bool = False) -> Tensor:
        """One Langevin step (eq. 3.9) on the codes `b 200`."""
        precision = (-2 * self.log_sigma).exp()
        with torch.enable_grad():
            z = z if z.requires_grad else z.requires_grad_()
            misfit = (self.generate(z) - self.target(x)).square().sum() / 2
            (pull,) = torch.autograd.grad(misfit, z, create_graph=keep_graph)
        noise = self.temperature * math.sqrt(2 * self.step_size) * torch.randn_like(z)
        return z - self.step_size * (z + precision * pull) + noise

    def target(self, x: Images) -> Tensor:
        """What the generator is to make of the images: in [-1, 1], and larger ones shrunk to 28x28 (bilinearly)."""
        if x.shape[-1] != SIDE:
            x = nn.functional.interpolate(x, size=SIDE, mode="bilinear", antialias=True, align_corners=False)
        return 2 * x - 1

    def generate(self, z: Tensor) -> Images:
        """The generator's image for each code, in the model's scale [-1, 1]."""
        return self.generator(z[:, :, None, None])

    def _aggregate(self, codes: Tensor, chains: int, aggregate: str) -> Logits:
        with torch.autocast(codes.device.type, enabled=False):  # the chains alone are worth the speed
            if aggregate == "mean_z":
                return self.classifier(codes.unflatten(0, (chains, -1)).mean(0))
            logits = self.classifier(codes).unflatten(0, (chains, -1))  # chains b k
        if aggregate == "vote":
            return log_shares(logits.argmax(-1), self.num_classes).to(codes.dtype)
        return logits.mean(0)


def log_shares(answers: Tensor, num_classes: int) -> Logits:
    """The logarithm of each class's share of the votes, log((votes + a) / (chains + classes a)), a = `VOTE_SMOOTHING`.

    Its softmax is the shares, so that it can be read as confidence; a keeps classes without a vote finite. The order of
    the classes is that of their votes, and so are ties.

    Args:
        answers: the class that each chain votes for, `chains b`.
        num_classes: of the dataset.
    """
    votes = nn.functional.one_hot(answers, num_classes).sum(0).double()  # b k
    return ((votes + VOTE_SMOOTHING) / (len(answers) + num_classes * VOTE_SMOOTHING)).log()


def _check_options(preset: str, aggregate: str, smallest: int, *, sigma: float | str | None, step_size: float) -> None:
    if preset not in get_args(Preset):
        raise UsageError(f'shortrun: preset must be one of {", ".join(get_args(Preset))}; got "{preset}"')
    if aggregate not in get_args(Aggregate):
        raise UsageError(f'shortrun: aggregate must be one of {", ".join(get_args(Aggregate))}; got "{aggregate}"')
    if smallest < 1:
        raise UsageError(f"shortrun: channels, n_chains, attack_chains and steps must be at least 1; got {smallest}")
    if isinstance(sigma, str) and sigma != "auto":
        raise UsageError(f'shortrun: sigma must be a number or "auto"; got "{sigma}"')
    if not (step_size > 0 and (sigma is None or isinstance(sigma, str) or sigma > 0)):  # also where one is NaN
        raise UsageError(f"shortrun: sigma and step_size must be positive; got {sigma} and {step_size}")


def auto_sigma(parts: Iterable[Tensor], step_size: float = 0.015, stability: float = 0.8) -> float:
    """The sigma at which the stiffest direction of the data moves by `stability` a step: sqrt(s lambda_1 / stability).

    lambda_1 is the largest eigenvalue of the pixel covariance. A linear chain is stable below 2; directions of variance
    under sigma^2 carry no information into the code.

    Args:
        parts: the images in the model's scale [-1, 1], some at a time; each part is held in float64.
        step_size: s.
        stability: see above.
    """
    count, total, squares = 0, torch.zeros(()).double(), torch.zeros(()).double()
    for part in parts:
        flat = part.flatten(1).double()
        count, total, squares = count + len(flat), total + flat.sum(0), squares + flat.T @ flat
    covariance = (squares - torch.outer(total, total) / count) / (count - 1)
    return math.sqrt(step_size * torch.linalg.eigvalsh(covariance)[-1].item() / stability)
