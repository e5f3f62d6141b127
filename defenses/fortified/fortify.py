"""`fortify`: denoising autoencoders after chosen layers of any torch module, and the losses that train them."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from robench.defense import Defense, in_eval_mode
from robench.errors import UsageError
from robench.types import PerExample

from .dae import Activation, ConvDAE, DenseDAE, PooledDAE
from .own import OwnFortified, Training


@dataclass
class Trace:
    """One pass through a fortified module.

    Attributes:
        output: what the module returned.
        hidden: what each fortified layer put out, in the order in which they ran.
        decoded: what its autoencoder made of that, and what went on downstream.
        decoders: that autoencoder, each with the noise of the pass; draws anew.
        layers: the name of each, which `FortifiedModule.layers` has in another order where they were so named.
    """

    output: Any = None
    hidden: list[Tensor] = field(default_factory=list)
    decoded: list[Tensor] = field(default_factory=list)
    decoders: list[Callable[[Tensor], Tensor]] = field(default_factory=list)
    layers: list[str] = field(default_factory=list)

    def error(self) -> PerExample:
        """The squared error of reconstruction of each example, summed over features and layers."""
        gaps = [upcast(d) - upcast(h) for d, h in zip(self.decoded, self.hidden, strict=True)]
        return torch.stack([gap.square().flatten(1).sum(1) for gap in gaps]).sum(0)

    def decode_held(self) -> list[Tensor]:
        """What the autoencoders make of the same layers held constant, with noise of its own: it trains them alone."""
        return [decode(h.detach()) for decode, h in zip(self.decoders, self.hidden, strict=True)]


class FortifiedModule(nn.Module):
    """A module whose chosen layers each pass through an autoencoder; made by `fortify`.

    Layer k's output h is replaced by D(E(h + n)) for all that follows (Lamb et al. 2018, arXiv 1804.02485, section 3).
    The module itself keeps its names, weights and code: the autoencoders are hooked in for the time of a pass.

    Attributes:
        module: the module, as given.
        layers: names of the fortified layers.
        daes: their autoencoders, in that order.
        noise_scale: multiplies the noise of all of them; 0 draws none.
        trained_by: how the recipe of the defense that `robench.wrap` makes of it trains it.
    """

    def __init__(
        self, module: nn.Module, layers: Sequence[str], daes: Sequence[nn.Module], trained_by: Training | None = None
    ) -> None:
        """Keeps module and autoencoders; see `fortify`."""
        super().__init__()
        self.module = module
        self.layers = tuple(layers)
        self.daes = nn.ModuleList(daes)
        self.noise_scale = 1.0
        self._draws = 1
        self.trained_by = trained_by or Training()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the module with its layers fortified."""
        return self.trace(*args, **kwargs).output

    def trace(self, *args: Any, **kwargs: Any) -> Trace:
        """Calls the module with its layers fortified and returns what the losses need besides its output."""
        trace = Trace()
        with contextlib.ExitStack() as stack:
            for layer, dae in zip(self.layers, self.daes, strict=True):

                def fortify_output(
                    part: nn.Module, inputs: tuple[Any, ...], h: Tensor, dae: nn.Module = dae, layer: str = layer
                ) -> Tensor:
                    del part, inputs
                    if self._draws > 1 and not trace.layers:
                        h = h.repeat(self._draws, *[1] * (h.ndim - 1))
                    decoded: Tensor = dae(h, self.noise_scale)
                    trace.layers.append(layer)
                    trace.hidden.append(h)
                    trace.decoded.append(decoded)
                    trace.decoders.append(partial(_decode, dae, self.noise_scale))
                    return decoded.clone()  # what follows may work in place, as a ReLU or a sum in a ResNet does

                hook = self.module.get_submodule(layer).register_forward_hook(fortify_output)
                stack.callback(hook.remove)
            trace.output = self.module(*args, **kwargs)
        return trace

    def forward_draws(self, x: Tensor, draws: int) -> Tensor:
        """What a pass of `draws` copies of x puts out, the layers before the first autoencoder run once: draws b ...

        For a module in which no way leads around its first fortified layer and which draws nothing before it.
        """
        self._draws = draws
        try:
            output: Tensor = self(x)
        finally:
            self._draws = 1
        return output.unflatten(0, (draws, -1))

    def is_noisy(self) -> bool:
        """Whether a pass draws noise."""
        return self.noise_scale > 0 and any(float(dae.noise) > 0 for dae in self.daes)  # type: ignore[arg-type]

    def as_defense(self, name: str, *, num_classes: int, input_shape: tuple[int, int, int]) -> Defense:
        """What `robench.wrap` makes of it: the noise can be switched off, it has a detection score and a recipe."""
        return OwnFortified(self, name, num_classes=num_classes, input_shape=input_shape)

    @contextlib.contextmanager
    def without_noise(self) -> Iterator[None]:
        """A context in which the noise is 0, its mean."""
        before, self.noise_scale = self.noise_scale, 0.0
        try:
            yield
        finally:
            self.noise_scale = before


def fortify(  # noqa: PLR0913 - the hyperparameters of the paper
    module: nn.Module,
    layers: Sequence[str],
    *,
    input_shape: tuple[int, ...] | None = None,
    hidden: int = 256,
    conv_hidden: int | None = None,
    noise: float = 0.1,
    activation: Activation = "leaky_relu",
    training: Training | None = None,
) -> FortifiedModule:
    """Adds a denoising autoencoder after each of the named layers of any module.

    A layer that puts out `b c h w` gets a 5x5 convolutional one, or where h = w = 1 a dense one on the c values; `b d`
    or `b t d` a dense one on the last axis. A layer that one pass calls several times gets one autoencoder, through
    which each call goes, and each counts in the losses. Nothing else changes; with no layers the module computes what
    it did. The autoencoders are untrained: train the result by the recipe of `robench.wrap(...)`, or by a loop of your
    own with `reconstruction_losses`.

    Args:
        module: any torch module; one pass of zeros through it finds the sizes.
        layers: names of submodules, as `module.named_modules()` has them.
        input_shape: shape of one input, without the batch axis; None: that of the module, if it is a defense.
        hidden: length of the code of a dense autoencoder.
        conv_hidden: channels of the code of a convolutional one; None takes the layer's own number.
        noise: standard deviation of the noise before each autoencoder, in training and at test.
        activation: of both halves, `leaky_relu` (slope 0.2) or `relu`.
        training: bound, attack and weights of the recipe; None: the defaults.

    Raises:
        UsageError: there is no such layer, it is named twice, it is not run, its calls put out different shapes or no
            tensor of 2 to 4 axes; no input_shape, or one that the module does not take; an option out of range.
    """
    _check_layers(module, layers)
    if conv_hidden is not None and conv_hidden < 1:
        raise UsageError(f"fortify: conv_hidden must be at least 1; got {conv_hidden}")
    if input_shape is None:
        if not isinstance(module, Defense):
            raise UsageError(
                "fortify: needs the shape of one image, to size the autoencoders. Add it: "
                "fortify(module, layers=[...], input_shape=(3, 32, 32))"
            )
        input_shape = module.input_shape
    like = next((p for p in module.parameters() if p.is_floating_point()), torch.zeros(()))
    shapes = _shapes(module, layers, torch.zeros(1, *input_shape, device=like.device, dtype=like.dtype))
    daes: list[nn.Module] = []
    for layer in layers:
        shape = shapes[layer]
        if len(shape) < 4:
            daes.append(DenseDAE(shape[-1], hidden, noise, activation))
        elif shape[2:] == (1, 1):
            daes.append(PooledDAE(shape[1], hidden, noise, activation))
        else:
            daes.append(ConvDAE(shape[1], shape[1] if conv_hidden is None else conv_hidden, noise, activation))
        daes[-1].to(device=like.device, dtype=like.dtype)
    return FortifiedModule(module, layers, daes, training)


def _check_layers(module: nn.Module, layers: Sequence[str]) -> None:
    if isinstance(layers, str):
        raise UsageError(f'fortify: layers takes a list of names; got the text "{layers}". Write layers=["{layers}"]')
    names = [name for name, _ in module.named_modules() if name]
    for layer in layers:
        if layer not in names:
            near = difflib.get_close_matches(layer, names, 1)
            hint = f' (did you mean "{near[0]}"?)' if near else ""
            raise UsageError(f'fortify: the module has no layer "{layer}"{hint}; there are: {", ".join(names)}')
    if len(set(layers)) < len(layers):
        raise UsageError(f"fortify: each layer is named once; got {', '.join(layers)}")


def _shapes(module: nn.Module, layers: Sequence[str], x: Tensor) -> dict[str, tuple[int, ...]]:
    """Shape of each layer's output; the module's mode is as before afterwards."""
    found: dict[str, list[Any]] = {layer: [] for layer in layers}
    with contextlib.ExitStack() as stack, torch.no_grad(), in_eval_mode(module):
        for layer in layers:

            def note(part: nn.Module, inputs: tuple[Any, ...], output: Any, layer: str = layer) -> None:
                del part, inputs
                found[layer].append(output)

            stack.callback(module.get_submodule(layer).register_forward_hook(note).remove)
        try:
            module(x)
        except (RuntimeError, ValueError) as error:  # what torch raises for shapes that do not fit
            told = str(error).splitlines()[0]
            raise UsageError(
                f"fortify: the module does not take images of input_shape {tuple(x.shape[1:])}: {told}"
            ) from error
    return {layer: _shape(layer, outputs) for layer, outputs in found.items()}


def _shape(layer: str, outputs: list[Any]) -> tuple[int, ...]:
    """The one shape of all that a layer put out in a pass."""
    if not outputs:
        raise UsageError(f'fortify: layer "{layer}" is not run by a pass of the module. Choose another')
    if not all(isinstance(output, Tensor) and 2 <= output.ndim <= 4 for output in outputs):
        raise UsageError(f'fortify: layer "{layer}" must put out a tensor of 2 to 4 axes. Choose another')
    shapes = list(dict.fromkeys(tuple(output.shape[1:]) for output in outputs))
    if len(shapes) > 1:
        raise UsageError(
            f'fortify: layer "{layer}" is called {len(outputs)} times in a pass and puts out different shapes: '
            f"{', '.join(map(str, shapes))}; one autoencoder fits one. Choose a layer before or after it"
        )
    return tuple(outputs[0].shape)


def _decode(dae: nn.Module, noise_scale: float, h: Tensor) -> Tensor:
    """Outside of autocast, too, where h may be of less precision than the weights."""
    return dae(h.to(next(dae.parameters()).dtype), noise_scale)


class Reconstruction(NamedTuple):
    """The two losses of reconstruction, each summed over the fortified layers."""

    rec: Float[Tensor, ""]
    adv: Float[Tensor, ""]


def reconstruction_losses(clean: Trace, adversarial: Trace | None, *, stop_gradient: bool = False) -> Reconstruction:
    """L_rec and L_adv (arXiv 1804.02485, eqs. 4 and 5), as a mean over features and examples.

    Per layer L_rec = |D(E(h + n)) - h|^2 and L_adv = |D(E(h~ + n)) - h|^2: both targets are the clean layer.
    The paper writes a sum over features; the released code has the mean, to which its weights belong.

    Args:
        clean: the pass of the images themselves.
        adversarial: the pass of the adversarial images, in the same order; None: L_adv is 0.
        stop_gradient: hold the layers, as target and as what is reconstructed, so that both losses train the
            autoencoders alone: the released code's `blocking_option` (class ECMLP_block). The noise is drawn anew.
    """
    targets = [upcast(h.detach() if stop_gradient else h) for h in clean.hidden]
    like = clean.hidden[0] if clean.hidden else clean.output  # an output may be anything, such as a dict
    zero = torch.zeros((), device=like.device if isinstance(like, Tensor) else None)

    def error(trace: Trace) -> Tensor:
        pairs = zip(trace.decode_held() if stop_gradient else trace.decoded, targets, strict=True)
        return torch.stack([(upcast(decoded) - target).square().mean() for decoded, target in pairs]).sum()

    if not targets:
        return Reconstruction(zero, zero)
    return Reconstruction(error(clean), zero if adversarial is None else error(adversarial))


def upcast(x: Tensor) -> Tensor:
    """Half precision to float32; other dtypes as they are."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
