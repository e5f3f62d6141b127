"""Fortified Networks as a defense: the released code's convolutional net with autoencoders on chosen layers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, Final

from jaxtyping import Float
from torch import Tensor, nn

from robench.errors import UsageError
from robench.types import Images

from .dae import LEAK, Activation, check_dae
from .fortify import fortify
from .own import FortifiedDefense, TrainAttack, Training

LAYERS: Final = ("conv1", "conv2", "code")
SMALLEST_SIDE: Final = 12
TRAIN_EPS: Final = 0.1
"""The bound of training where neither a card nor `robench train` names one."""


def make_cnn(channels: int, num_classes: int = 10, side: int = 28, activation: Activation = "leaky_relu") -> nn.Module:
    """The net `cnn` of the released code: three convolutions and a linear layer; 710,218 parameters at 1x28x28.

    The third convolution takes in all that the second leaves (5x5 of 28x28 images, 6x6 of 32x32), so that the layer
    `code` has 128 values for every image size.
    """

    def act() -> nn.Module:
        return nn.LeakyReLU(LEAK) if activation == "leaky_relu" else nn.ReLU()

    left = ((side - 2) // 2 + 1 - 6) // 2 + 1
    blocks = OrderedDict[str, nn.Module](
        conv1=nn.Sequential(nn.Conv2d(channels, 64, 8, stride=2, padding=3), act()),  # b c 28 28 -> b 64 14 14
        conv2=nn.Sequential(nn.Conv2d(64, 128, 6, stride=2), act()),  # -> b 128 5 5
        code=nn.Sequential(nn.Conv2d(128, 128, left), act(), nn.Flatten()),  # -> b 128
        head=nn.Linear(128, num_classes),
    )
    return nn.Sequential(blocks)


class Fortified(FortifiedDefense):
    """A net whose hidden layers are denoised by small autoencoders; randomized (noise is on at test, too).

    A. Lamb et al. 2018, "Fortified Networks" (arXiv 1804.02485; thesis, chapter 2). After layer k the hidden h_k is
    replaced by D_k(E_k(h_k + n_k)), n_k ~ N(0, noise^2 I), of a one-layer autoencoder with tied weights. It is trained
    with the net, on images and on those of the training attack x~ (equation 6):

        L = CE(x) + CE(x~) + lambda_rec sum_k |D(E(h_k + n)) - h_k|^2 + lambda_adv sum_k |D(E(h~_k + n)) - h_k|^2

    Threat model: linf, the bound `train_eps`. No guarantee. All of it is differentiable, so `adaptive_forward` is
    `forward`. Cost of a forward: 8.7 M multiply-adds at 1x28x28; the autoencoder adds 0.07 M.

    Departures: squared errors are means over features, and the weights 2 are those of the released code for the mean
    (the paper gives none); the net is trained with PGD by default: with one-step images, as in the paper
    (`train_attack="fgsm"`), it may overfit to one step; ours did not
    (docs/decisions/0007-fortified-at-equal-training.md); no label smoothing. One layer is fortified by default, the
    last hidden one, as in all nets of the released code; `layers=()` is the same net without any, for comparison.
    """

    name = "fortified"
    needs_weights = True
    how_to_choose = "--defense 'fortified(train_attack={})'"
    training_options = tuple(option.name for option in fields(Training))

    def __init__(  # noqa: PLR0913 - the hyperparameters of the paper
        self,
        channels: int = 1,
        side: int = 28,
        layers: Sequence[str] = ("code",),
        hidden: int = 256,
        noise: float = 0.1,
        activation: Activation = "leaky_relu",
        lambda_rec: float = 2.0,
        lambda_adv: float = 2.0,
        stop_gradient: bool = False,
        train_attack: TrainAttack = "pgd",
        train_eps: float | None = None,
        augment: bool = False,
        num_classes: int = 10,
        train_steps: int = 2,
    ) -> None:
        """Builds an untrained net.

        Args:
            channels: image channels.
            side: height and width of the images.
            layers: which of `conv1`, `conv2` (5x5 convolutional autoencoders) and `code` (dense) are fortified.
            hidden: length of the code of the dense autoencoder; a convolutional one has the channels of its layer.
            noise: standard deviation of the noise before each autoencoder.
            activation: of the net and of the autoencoders, `leaky_relu` (slope 0.2) or `relu`.
            lambda_rec: weight of the reconstruction of clean images in training.
            lambda_adv: weight of the reconstruction from adversarial images in training.
            stop_gradient: train the autoencoders alone by both losses, as the released code's `blocking_option`. With
                the other defaults the layer then grows faster than its autoencoder follows: on clean Fashion-MNIST the
                loss of 2.3 rises to 41 and 48 (two seeds) within 20 steps, and is 1.2 and 1.5 after 60, else 0.8.
            train_attack: `pgd` or `fgsm`; names the recipe, too.
            train_eps: linf bound of the training attack. None: 0.1, as for Fashion-MNIST; `robench train` takes the
                bound that is customary for the dataset.
            augment: train on randomly shifted and mirrored images (photographs; never digits).
            num_classes: classes.
            train_steps: gradient steps of the training attack `pgd`; seven cost two and a half times as much as two and
                are worth 30 points at 0.3 on MNIST.

        Raises:
            UsageError: an option is out of range.
        """
        super().__init__()
        check_dae(hidden, noise, activation)
        _check_options(layers, side)
        layers = _in_order(layers)
        train_eps = TRAIN_EPS if train_eps is None else train_eps
        self.train_by(Training(train_eps, train_attack, lambda_rec, lambda_adv, stop_gradient, augment, train_steps))
        self.num_classes = num_classes
        self.input_shape = (channels, side, side)
        self.randomized = bool(layers) and noise > 0
        self.detection_scores = ("reconstruction",) if layers else ()
        self.net = fortify(
            make_cnn(channels, num_classes, side, activation),
            layers,
            input_shape=self.input_shape,
            hidden=hidden,
            noise=noise,
            activation=activation,
        )

    def forward_draws(self, x: Images, draws: int) -> Float[Tensor, "draws b k"]:
        """The layers before the first autoencoder, which are nearly all of the cost, run once for all draws."""
        return self.net.forward_draws(x, draws)

    @classmethod
    def options_for(cls, input_shape: tuple[int, int, int], num_classes: int) -> dict[str, Any]:
        """The constructor's options for a dataset of square images."""
        channels, height, width = input_shape
        if height != width or height < SMALLEST_SIDE:
            raise UsageError(
                f"fortified takes square images of side {SMALLEST_SIDE} or more; the dataset has {input_shape}"
            )
        return {"channels": channels, "side": height, "num_classes": num_classes}

    @classmethod
    def weights_variant(cls, options: Mapping[str, Any]) -> str:
        """What tells the weights from the usual ones, such as `plain`, `dae`, `rec`, `fgsm`, `plain-fgsm`.

        `plain`: no autoencoder; `dae`: one, but neither loss; `rec`: L_rec alone. The bound of training is no part of
        it (each dataset has its own), nor is what can be changed at test: the noise.
        """
        parts = [*_layers_variant(options), *_losses_variant(options)]
        if options.get("hidden", 256) != 256:
            parts.append(f"hidden{options['hidden']}")
        if options.get("stop_gradient", False):
            parts.append("stop")
        if options.get("activation", "leaky_relu") != "leaky_relu":
            parts.append(str(options["activation"]))
        if options.get("train_attack", "pgd") != "pgd":
            parts.append(str(options["train_attack"]))
        return "-".join(parts)


def _check_options(layers: Sequence[str], side: int) -> None:
    if isinstance(layers, str) or not set(layers) <= set(LAYERS):
        raise UsageError(f'fortified: layers must be a list out of {", ".join(LAYERS)}, such as ["code"]; got {layers}')
    if side < SMALLEST_SIDE:
        raise UsageError(f"fortified: side must be at least {SMALLEST_SIDE}; got {side}")


def _in_order(layers: Sequence[str]) -> list[str]:
    """Layers as they run, so that one set of them has one name and one order of weights; unknown ones last."""
    return sorted(layers, key=lambda layer: LAYERS.index(layer) if layer in LAYERS else len(LAYERS))


def _layers_variant(options: Mapping[str, Any]) -> list[str]:
    layers = options.get("layers", ("code",))
    if not layers:
        return ["plain"]
    return [] if tuple(layers) == ("code",) else ["_".join(_in_order(layers))]


def _losses_variant(options: Mapping[str, Any]) -> list[str]:
    weights = options.get("lambda_rec", 2.0), options.get("lambda_adv", 2.0)
    if not options.get("layers", ("code",)) or weights == (2, 2):
        return []
    known = {(0, 0): "dae", (2, 0): "rec", (0, 2): "adv"}
    return [known.get(weights, f"rec{weights[0]:g}_adv{weights[1]:g}")]
