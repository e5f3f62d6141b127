"""The defense: a classifier under attack, its traits, and `wrap` for a plain torch module."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from robench.errors import PluginError, UsageError
from robench.plain import Values, plain_tensors
from robench.types import Images, Labels, Logits, PerExample

if TYPE_CHECKING:
    from robench.origin import Origin
    from robench.train.recipe import Recipe

LOG = logging.getLogger("robench")


@contextmanager
def in_eval_mode(module: nn.Module) -> Iterator[None]:
    """A context in which a module and all its parts are in eval mode; each part's own mode is back afterwards."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode


class Defense(nn.Module):
    """An image classifier as robench sees it: images in [0, 1] to logits, and a way to differentiate it.

    Subclasses implement `forward` and set the traits. Randomness comes from torch's global generator, which the engine
    seeds (and numpy's and Python's with it); a defense never seeds anything. A defense that wants another pixel range
    maps it inside.

    A randomized defense should draw for each row of a batch. The engine folds EOT draws and images into passes of many
    rows. One that draws once for a pass (one of several nets) is asked each EOT draw in a pass of its own, and by the
    judge each image: that takes `eot` passes of an attack for one, and as many of the judge as there are images.

    Attributes:
        name: the name in tables and CSV files.
        randomized: True if two calls on the same images can differ.
        draws_per_pass: True if all images of a pass share a draw, be it beside draws of their own; None: robench asks.
        generative: True if it models the images too, so that it can draw or score them.
        num_classes: number of logits.
        input_shape: (channels, height, width).
        gradient_modes: the differentiable paths that `adaptive_forward` offers, the one expected to be strongest first.
            A single attack takes that one; which is strongest a protocol finds out, which takes all.
        needs_weights: True if the class is useless untrained, so `load` insists on a weights file.
        training_options: options of the constructor that say how the weights were trained and change no answer of
            theirs; `load` refuses values that are not those of the weights' card.
        recipes: the names that `recipe` takes, each with a line that says what it does, the default first; what
            `robench list recipes` shows.
        batch_rows: the largest batch that the engine passes at once (None: no limit); bounds memory.
        forward_cost: how long one `forward` takes against one pass of `adaptive_forward`; guides the time left only.
        first_look: settings of a first look that a CPU affords, where the general ones cost too much.
            An audit is then made with less effort, says so, and carries a row of robench's own defenses only.
        detection_scores: the kinds of `detection_score` that it offers, best first; () if it detects nothing.
        origin: how `load_defense` made it; None if another did.
        told: what warnings were given of it, each of which is given once; see `tell_once`.
        shares_draws: whether the images of a pass share a draw, as `robench.draws` noted; None: not asked yet.
        passing: paths of plain tensors that passes leave behind, so that they are no weights; see `robench.plain`.
    """

    name: str = ""
    randomized: bool = False
    draws_per_pass: bool | None = None
    generative: ClassVar[bool] = False
    num_classes: int
    input_shape: tuple[int, int, int]
    gradient_modes: tuple[str, ...] = ("full",)
    needs_weights: ClassVar[bool] = False
    training_options: ClassVar[tuple[str, ...]] = ()
    recipes: ClassVar[Mapping[str, str]] = {}
    batch_rows: int | None = None
    forward_cost: float = 1.0
    first_look: Mapping[str, int] = {}
    detection_scores: tuple[str, ...] = ()
    origin: Origin | None = None
    told: frozenset[str] = frozenset()
    shares_draws: bool | None = None
    passing: frozenset[str] = frozenset()

    def forward(self, x: Images) -> Logits:
        """Classifies images in [0, 1]: what a user of the classifier calls and what the judge measures."""
        raise NotImplementedError(f"{type(self).__name__} does not implement forward")

    def adaptive_forward(self, x: Images, mode: str | None = None) -> Logits:
        """The logits that an attacker who knows the defense differentiates; the default is `forward`.

        Args:
            x: images in [0, 1].
            mode: one of `gradient_modes`; None takes the first.

        Raises:
            UsageError: the defense has no such mode.
        """
        self.check_mode(mode)
        return self(x)

    def forward_draws(self, x: Images, draws: int) -> Float[Tensor, "draws b k"]:
        """The logits of several draws for each image, where the layers before the first draw can run once for all.

        An attack on a randomized defense asks for `eot` draws of each image. It calls this instead of `forward` on
        copies of the images if a class overrides it, none below that changes `forward`, and `adaptive_forward` is the
        default.
        What it returns must be what `forward` returns for the copies under the same seed, which the audit's check
        `contract` compares. Default: just that.

        Args:
            x: images in [0, 1].
            draws: how many for each image.
        """
        logits: Tensor = self(x.repeat(draws, *[1] * (x.ndim - 1)))
        return logits.unflatten(0, (draws, -1))

    def check_mode(self, mode: str | None) -> str:
        """Returns the gradient mode meant by `mode`.

        Raises:
            UsageError: the defense has no such mode.
        """
        if mode is None:
            return self.gradient_modes[0]
        if mode not in self.gradient_modes:
            offered = ", ".join(self.gradient_modes)
            raise UsageError(f'defense "{self.name}" offers the gradient modes {offered}; got "{mode}"')
        return mode

    def without_randomness(self) -> AbstractContextManager[None]:
        """A context in which the defense answers without its randomness, for attacks with `randomness="off"`.

        Default: not offered. A defense that offers it says what takes the place of its draws (their mean, zero).

        Raises:
            UsageError: the defense does not offer this.
        """
        raise UsageError(
            f'defense "{self.name}" does not offer to switch its randomness off; use randomness="fixed" or "fresh"'
        )

    def detection_score(self, x: Images, kind: str | None = None) -> PerExample:
        """How suspicious each image looks, higher for more; no part of the classifier's answer.

        Args:
            x: images in [0, 1].
            kind: one of `detection_scores`; None takes the first.

        Raises:
            UsageError: the defense has no such score, or none at all.
        """
        self.check_score(kind)
        raise NotImplementedError(f"{type(self).__name__} does not implement detection_score")

    def check_score(self, kind: str | None) -> str:
        """Returns the detection score meant by `kind`.

        Raises:
            UsageError: the defense has no such score, or none at all.
        """
        if not self.detection_scores:
            raise UsageError(f'defense "{self.name}" has no detection score')
        if kind is None:
            return self.detection_scores[0]
        if kind not in self.detection_scores:
            offered = ", ".join(self.detection_scores)
            raise UsageError(f'defense "{self.name}" offers the detection scores {offered}; got "{kind}"')
        return kind

    def pictures(self, x: Images) -> Mapping[str, Images]:
        """Rows of images in [0, 1] that show how the defense sees x: reconstructions, samples. Default: none.

        Each row is of x's shape; under the name `original` comes x itself.
        """
        return {}

    def diagnostics(self, x: Images, y: Labels) -> Mapping[str, float]:
        """Figures on labelled images that only this defense has, by name (R2 of its reconstructions). Default: none."""
        return {}

    @classmethod
    def load(cls, dataset: str | None = None, weights: str | Path | None = None, **options: Any) -> Self:
        """Builds the defense and reads its weights: those shipped for `dataset`, or the file `weights`.

        A weights file is safetensors with a JSON card of the same stem beside it (see robench.weights); the card holds
        the constructor's options, and `options` override them.

        Raises:
            UsageError: no weights for this dataset, an option the constructor does not take, or a missing file.
            DataError: the file is damaged, not safetensors, or of other shapes.
        """
        from robench.weights import build_and_load

        return build_and_load(cls, dataset, weights, options)

    @classmethod
    def options_for(cls, input_shape: tuple[int, int, int], num_classes: int) -> dict[str, Any]:
        """The constructor's options for a dataset of that shape, used by `robench train`; default none.

        Raises:
            UsageError: the defense cannot take such images.
        """
        del input_shape, num_classes
        return {}

    @classmethod
    def weights_variant(cls, options: Mapping[str, Any]) -> str:
        """Names the weights that options need where the dataset's usual ones do not fit; default "": the usual ones."""
        del options
        return ""

    def recipe(self, name: str | None = None) -> Recipe:
        """The training recipe of that name (None: the default one).

        Raises:
            UsageError: the defense has none of that name.
        """
        del name
        raise UsageError(f'defense "{self.name}" has no training recipe')

    def freeze(self) -> Self:
        """Puts the defense in eval mode and switches gradients of its weights off; returns itself."""
        self.eval()
        for parameter in self.parameters():
            parameter.requires_grad_(False)
        return self

    def tell_once(self, what: str, message: str, *values: object) -> None:
        """Logs a warning of this defense, unless one of the same `what` was given before."""
        if what not in self.told:
            self.told |= {what}
            LOG.warning(message, *values)

    def check_traits(self) -> None:
        """Checks what can be checked without a forward pass.

        Raises:
            PluginError: names the trait that is missing or of the wrong kind.
        """
        problems = []
        if not self.name:
            problems.append("name is empty")
        if not (isinstance(getattr(self, "num_classes", None), int) and self.num_classes >= 2):
            problems.append("num_classes must be an int of at least 2")
        shape = getattr(self, "input_shape", None)
        if not (isinstance(shape, tuple) and len(shape) == 3 and all(isinstance(s, int) and s > 0 for s in shape)):
            problems.append(f"input_shape must be a tuple (channels, height, width) of whole numbers; it is {shape!r}")
        if not (isinstance(self.gradient_modes, tuple) and self.gradient_modes):
            problems.append("gradient_modes must be a non-empty tuple")
        if problems:
            raise PluginError(f'defense "{self.name or type(self).__name__}": {"; ".join(problems)}')


@runtime_checkable
class MakesDefense(Protocol):
    """A module that is more than its logits (it can switch its noise off, say) and makes its defense by itself."""

    def as_defense(self, name: str, *, num_classes: int, input_shape: tuple[int, int, int]) -> Defense:
        """A defense around this module, under that name."""
        ...


class WrappedModule(Defense):
    """A plain torch module under the interface of a defense; made by `wrap`."""

    def __init__(self, module: nn.Module, name: str, *, num_classes: int, input_shape: tuple[int, int, int]) -> None:
        """Keeps the module; see `wrap`."""
        super().__init__()
        self.module = module
        self.name = name
        self.num_classes = num_classes
        self.input_shape = input_shape

    def forward(self, x: Images) -> Logits:
        """Calls the module."""
        return self.module(x)


def wrap(
    module: nn.Module,
    *,
    num_classes: int,
    input_shape: tuple[int, int, int] | list[int],
    randomized: bool | None = None,
    name: str = "",
) -> Defense:
    """Adopts any torch module that maps images in [0, 1] to logits.

    No other process can load such an object by name: `robench verify`, resuming from the command line, workers and a
    leaderboard row want it in a file, as `file.py:NAME` (see `load_defense`).

    One that has the method of `MakesDefense` says itself what defense it is: `fortify` makes such modules.

    Args:
        module: the classifier. It is put in eval mode and its weights are frozen.
        num_classes: number of logits.
        input_shape: (channels, height, width).
        randomized: True if two calls on the same images can differ. In eval mode nn.Dropout draws nothing; noise that
            is part of the defense is functional.dropout(..., training=True). None: False, or what the module says.
        name: the name in tables; default the class name in lower case.

    Raises:
        PluginError: a trait is missing or of the wrong kind.
    """
    name = name or type(module).__name__.lower()
    make = module.as_defense if isinstance(module, MakesDefense) else partial(WrappedModule, module)
    shape: Any = tuple(input_shape)  # its length is checked below
    defense = make(name, num_classes=num_classes, input_shape=shape)
    if randomized is not None:
        defense.randomized = randomized
    defense.check_traits()
    return defense.freeze()


def weights_digest(defense: nn.Module) -> str:
    """SHA-256 over the names, shapes, dtypes and bytes of all weights and buffers, in the order of their names.

    After them come tensors and arrays in plain attributes, where there are any; see `robench.plain`.
    """
    return _digest([*_saved(defense), *plain_tensors(defense)])


def state_digest(module: nn.Module) -> str:
    """The digest of the state_dict alone, which is what a weights file holds."""
    return _digest(_saved(module))


def bears_digest(defense: nn.Module, digest: str) -> bool:
    """Whether a run's digest is that of a defense; earlier runs had that of the state_dict alone."""
    return digest == weights_digest(defense) or digest == state_digest(defense)


def has_tensors(defense: nn.Module) -> bool:
    """Whether a defense has anything that its digest can tell."""
    return next(iter([*_saved(defense), *plain_tensors(defense)]), None) is not None


def tensor_digests(defense: nn.Module) -> dict[str, str]:
    """SHA-256 of the bytes of each weight, buffer and plain tensor, by name: tells which one changed."""
    return {name: hashlib.sha256(_bytes(one)).hexdigest() for name, one in (*_saved(defense), *plain_tensors(defense))}


def _saved(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """All weights and buffers of the state_dict, in the order of their names."""
    for name, value in sorted(module.state_dict().items()):
        if isinstance(value, torch.Tensor):
            yield name, value.detach()


def _digest(values: Iterable[tuple[str, Values]]) -> str:
    digest = hashlib.sha256()
    for name, value in values:
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        digest.update(_bytes(value))
    return digest.hexdigest()


def _bytes(value: Values) -> bytes:
    if not isinstance(value, torch.Tensor):
        return value.tobytes()
    flat = value.cpu().contiguous().resolve_conj().resolve_neg().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
