"""The Langevin chain with its derivatives written out: autograd's numbers at a lower cost.

Let U(z) = |g(z) - t|^2 / 2 be the misfit of a code and J the Jacobian of the generator g. One step of the chain is
z <- z - s (z + p grad U(z)) + noise, with grad U(z) = J^T (g(z) - t). Backwards through it, the adjoint a of the code
becomes (1 - s) a - s p H a, and the gradient with respect to the target t gains s p J a. H, the Hessian of U, is
symmetric, so one forward-over-reverse sweep gives both products (Pearlmutter 1994, "Fast exact multiplication by the
Hessian"): a is pushed forward through the generator, which is J a, and what comes out is pulled back.

A step costs two passes through the generator, its sweep two more. Everything here takes the weights as constants; where
they are to be learned, see `learn`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.grad import conv2d_weight

FEW_CHANNELS: Final = 4
"""Up to this many output channels a transposed convolution is quicker as a matrix product and a fold."""


class Jet(NamedTuple):
    """An activation f at its input a.

    Attributes:
        value: f(a).
        slope: f'(a).
        bend: f''(a); None where it was not asked for.
    """

    value: Tensor
    slope: Tensor
    bend: Tensor | None


class Record(NamedTuple):
    """What the second-order sweep needs of one activation.

    Attributes:
        slope: f'(a).
        bend: f''(a) times the cotangent that reached f in the first-order sweep.
    """

    slope: Tensor
    bend: Tensor


def mish(a: Tensor, bend: bool) -> Jet:
    """Mish, a tanh(softplus(a)): with s = sigmoid(a) and u = s (2 - s) that tanh is u / (2 - u), for any a.

    Works in place, a included: on a CPU fresh memory costs more than the arithmetic.
    """
    s = torch.sigmoid(a)
    t = (2 - s).mul_(s)
    spare = 2 - t
    t.div_(spare)
    dt = torch.addcmul(s, s, torch.mul(t, t, out=spare), value=-1, out=spare)  # dt / da
    second = (1 - s).addcmul_(s, t, value=-2).mul_(a).add_(2).mul_(dt) if bend else None
    slope = torch.addcmul(t, a, dt, out=s)
    return Jet(a.mul_(t), slope, second)


def tanh(a: Tensor, bend: bool) -> Jet:
    """Hyperbolic tangent."""
    value = a.tanh_()
    slope = 1 - value * value
    return Jet(value, slope, -2 * value * slope if bend else None)


def sigmoid(a: Tensor, bend: bool) -> Jet:
    """Logistic function."""
    value = a.sigmoid_()
    slope = value * (1 - value)
    return Jet(value, slope, (1 - 2 * value) * slope if bend else None)


Activation = Callable[[Tensor, bool], Jet]
ACTIVATIONS: Final[dict[type[nn.Module], Activation]] = {nn.Mish: mish, nn.Tanh: tanh, nn.Sigmoid: sigmoid}
"""Each takes its input, which it may overwrite, and whether the second derivative is wanted."""


class Plain(NamedTuple):
    """An activation f by torch's own kernels: quicker on a GPU, where each pass over memory counts.

    Attributes:
        value: f(a).
        pull: f'(a) times a cotangent, of the cotangent and a.
    """

    value: Callable[[Tensor], Tensor]
    pull: Callable[[Tensor, Tensor], Tensor]


PLAIN: Final[dict[Activation, Plain]] = {
    mish: Plain(functional.mish, torch.ops.aten.mish_backward),
    tanh: Plain(torch.tanh, lambda c, a: torch.ops.aten.tanh_backward(c, a.tanh())),
    sigmoid: Plain(torch.sigmoid, lambda c, a: torch.ops.aten.sigmoid_backward(c, a.sigmoid())),
}


class Deconvolution:
    """A transposed convolution: a linear map with its transpose, and a bias."""

    def __init__(self, layer: nn.ConvTranspose2d, dtype: torch.dtype | None = None) -> None:
        """Takes the layer's weights as they are now."""
        self.weight = layer.weight.detach().to(dtype)  # in out k k
        self.bias = None if layer.bias is None else layer.bias.detach().to(dtype)
        self.stride, self.padding, self.output_padding = (
            cast("tuple[int, int]", pair) for pair in (layer.stride, layer.padding, layer.output_padding)
        )

    def __call__(self, h: Tensor) -> Tensor:
        """The layer's output; torch adds the bias more quickly on its own than within a transposed convolution."""
        h = self.push(h)
        return h if self.bias is None else h.add_(self.bias[:, None, None])

    def push(self, h: Tensor) -> Tensor:
        """The linear map."""
        if self.weight.shape[1] <= FEW_CHANNELS:
            return self._fold(h)
        return functional.conv_transpose2d(h, self.weight, None, self.stride, self.padding, self.output_padding)

    def pull(self, c: Tensor) -> Tensor:
        """The transpose of the linear map."""
        if c.is_cuda and self.weight.shape[1] <= FEW_CHANNELS:
            return self.pull_patches(c)
        return functional.conv2d(c, self.weight, None, self.stride, self.padding)

    def pull_patches(self, c: Tensor) -> Tensor:
        """As `pull`, by a matrix product: with few channels that is quicker on a GPU, and its result channels-last."""
        rows, columns = self.padding
        patches = functional.pad(c, (columns, columns, rows, rows))
        for axis in (0, 1):
            patches = patches.unfold(2 + axis, self.weight.shape[2 + axis], self.stride[axis])  # -> b out h w k k
        return (patches.permute(0, 2, 3, 1, 4, 5).flatten(3) @ self.weight.flatten(1).T).permute(0, 3, 1, 2)

    def weight_gradient(self, h: Tensor, c: Tensor) -> Tensor:
        """The gradient in the weights of <c, push(h)>."""
        return conv2d_weight(c, self.weight.shape, h, self.stride, self.padding)

    def _fold(self, h: Tensor) -> Tensor:
        kernel = tuple(self.weight.shape[2:])
        size = tuple(
            (h.shape[2 + axis] - 1) * self.stride[axis]
            - 2 * self.padding[axis]
            + kernel[axis]
            + self.output_padding[axis]
            for axis in (0, 1)
        )
        columns = h.flatten(2).mT @ self.weight.flatten(1)  # b in h w -> b h*w out*k*k
        if h.is_cuda and kernel == tuple(2 * step for step in self.stride):
            return self.add_halves(columns.unflatten(1, h.shape[2:]), size)
        return functional.fold(columns.mT, size, kernel, padding=self.padding, stride=self.stride)

    def add_halves(self, columns: Tensor, size: tuple[int, ...]) -> Tensor:
        """As `fold` where the kernel is twice the stride, so that each pixel gets two by two terms; quicker on a GPU.

        Args:
            columns: what each input pixel gives to the pixels under its kernel, `b h w out*k*k`.
            size: height and width of the result.
        """
        (_, height, width, _), (down, right), (rows, cols) = columns.shape, self.stride, self.padding
        blocks = columns.unflatten(3, (-1, 2, down, 2, right)).permute(4, 6, 0, 3, 1, 5, 2, 7)  # 2 2 b out h s w s
        ends = (size[0] + rows + 2 * down, size[1] + cols + 2 * right)
        whole = columns.new_zeros(len(columns), blocks.shape[3], -(-ends[0] // down), down, -(-ends[1] // right), right)
        for below in (0, 1):
            for beside in (0, 1):
                whole[:, :, below : below + height, :, beside : beside + width] += blocks[below, beside]
        return whole.flatten(4).flatten(2, 3)[:, :, rows : rows + size[0], cols : cols + size[1]]


class FromPoint(Deconvolution):
    """A transposed convolution without padding, of an input of one pixel: a matrix product."""

    def push(self, h: Tensor) -> Tensor:
        """The linear map."""
        image = (h.flatten(1) @ self._matrix()).unflatten(1, (*self.weight.shape[2:], -1))
        return image.permute(0, 3, 1, 2)

    def pull(self, c: Tensor) -> Tensor:
        """The transpose of the linear map."""
        return (c.permute(0, 2, 3, 1).flatten(1) @ self._matrix().T)[:, :, None, None]

    def weight_gradient(self, h: Tensor, c: Tensor) -> Tensor:
        """The gradient in the weights of <c, push(h)>."""
        product = h.flatten(1).T @ c.permute(0, 2, 3, 1).flatten(1)  # in k*k*out
        return product.unflatten(1, (*self.weight.shape[2:], -1)).permute(0, 3, 1, 2)

    def _matrix(self) -> Tensor:
        return self.weight.permute(0, 2, 3, 1).flatten(1)  # in out k k -> in k*k*out, no copy in channels-last


class Sweeps:
    """First- and second-order sweeps through a generator of transposed convolutions and activations."""

    def __init__(self, generator: nn.Sequential, dtype: torch.dtype | None = None) -> None:
        """Takes the generator's weights as they are now; see `can_sweep` for what it may be made of.

        Args:
            generator: from codes `b k 1 1` to images.
            dtype: what the sweeps compute in, bfloat16 in training; codes go in and come out in their own. None: that
                of the weights.
        """
        self.dtype = dtype or next(generator.parameters()).dtype
        self.layers: list[Deconvolution | Activation] = []
        for layer in generator:
            if isinstance(layer, nn.ConvTranspose2d):
                from_point = not self.layers and not any((*layer.padding, *layer.output_padding))
                kind = FromPoint if from_point else Deconvolution
                self.layers.append(kind(layer, self.dtype))
            else:
                self.layers.append(ACTIVATIONS[type(layer)])

    def enter(self, z: Tensor) -> Tensor:
        """A code `b k` as the generator's input `b k 1 1`."""
        return z[:, :, None, None].to(self.dtype)

    def pull(self, z: Tensor, target: Tensor, *, record: bool) -> tuple[Tensor, list[Record]]:
        """Returns grad U(z) = J^T (g(z) - target), `b k`, and one record per activation if asked for, first to last."""
        if z.is_cuda and not record:
            return self.pull_plainly(z, target), []
        h, jets = self.enter(z), []
        for layer in self.layers:
            if isinstance(layer, Deconvolution):
                h = layer(h)
            else:
                jets.append(layer(h, record))
                h = jets[-1].value
        c = h - target
        del h
        records = []
        for layer in reversed(self.layers):
            if isinstance(layer, Deconvolution):
                c = layer.pull(c)
                continue
            _, slope, bend = jets.pop()
            if bend is not None:
                records.append(Record(slope, bend.mul_(c)))
            c = c.mul_(slope)
        return c[:, :, 0, 0].to(z.dtype), records[::-1]

    def pull_plainly(self, z: Tensor, target: Tensor) -> Tensor:
        """Returns grad U(z), `b k`, as `pull`, by two kernels for each activation instead of ten."""
        h, inputs = self.enter(z), []
        for layer in self.layers:
            if isinstance(layer, Deconvolution):
                h = layer(h)
            else:
                inputs.append(h)
                h = PLAIN[layer].value(h)
        c = h - target
        for layer in reversed(self.layers):
            c = layer.pull(c) if isinstance(layer, Deconvolution) else PLAIN[layer].pull(c, inputs.pop())
        return c[:, :, 0, 0].to(z.dtype)

    def push(self, a: Tensor, records: list[Record]) -> tuple[Tensor, list[Tensor]]:
        """Returns J a, an image, and the tangents that reached the activations, first to last."""
        h, tangents, left = self.enter(a), [], iter(records)
        for layer in self.layers:
            if isinstance(layer, Deconvolution):
                h = layer.push(h)
            else:
                tangents.append(h)
                h = h * next(left).slope
        return h, tangents

    def pull_tangent(self, image: Tensor, records: list[Record], tangents: list[Tensor]) -> Tensor:
        """Returns H a, `b k`, from what `push` returned for a; overwrites the tangents."""
        c, left = image, list(zip(records, tangents, strict=True))
        for layer in reversed(self.layers):
            if isinstance(layer, Deconvolution):
                c = layer.pull(c)
            else:
                record, tangent = left.pop()
                c = tangent.mul_(record.bend).addcmul_(c, record.slope)
        return c[:, :, 0, 0]


def can_sweep(generator: nn.Module) -> bool:
    """Says whether `Sweeps` knows all layers of the generator: transposed convolutions first, then activations too."""
    if not (isinstance(generator, nn.Sequential) and len(generator) and isinstance(generator[0], nn.ConvTranspose2d)):
        return False
    return all(
        type(layer) in ACTIVATIONS
        or (isinstance(layer, nn.ConvTranspose2d) and layer.groups == 1 and set(layer.dilation) == {1})
        for layer in generator
    )


@dataclass(frozen=True)
class Chain:
    """A Langevin chain on the codes of images.

    Attributes:
        sweeps: the generator.
        precision: p above, 1 / sigma^2, a scalar tensor.
        step_size: s above.
        steps: Langevin steps.
        temperature: what the noise is multiplied by: 1, or 0 for none.
    """

    sweeps: Sweeps
    precision: Tensor
    step_size: float
    steps: int
    temperature: float = 1.0

    def move(self, z: Tensor, pull: Tensor) -> Tensor:
        """One step (eq. 3.9), given grad U(z)."""
        noise = self.temperature * (2 * self.step_size) ** 0.5 * torch.randn_like(z)
        return z - self.step_size * (z + self.precision * pull) + noise

    @torch.no_grad()
    def run(self, z: Tensor, target: Tensor) -> Tensor:
        """Runs the chain from z; no gradient is kept."""
        target = target.to(self.sweeps.dtype)
        for _ in range(self.steps):
            z = self.move(z, self.sweeps.pull(z, target, record=False)[0])
        return z

    def run_differentiably(self, z: Tensor, target: Tensor, *, depth: int, recompute: bool) -> Tensor:
        """Runs the chain from z, differentiable in the target alone, and once (no gradient of the gradient).

        Args:
            z: the codes that the chain starts from.
            target: images in the generator's scale.
            depth: how many of the last steps are differentiated; the code before them is a constant.
            recompute: keep the codes alone and repeat each step's sweep on the way back: a gradient takes about 1.6
                times as long, and memory grows with the steps by one code each only.
        """
        if not (torch.is_grad_enabled() and target.requires_grad):
            return self.run(z, target)
        return _Differentiated.apply(target, z, self, depth, recompute)  # type: ignore[no-untyped-call]


class _Differentiated(torch.autograd.Function):
    """The chain as one node of autograd's graph."""

    @staticmethod
    def forward(ctx: Any, target: Tensor, z: Tensor, chain: Chain, depth: int, recompute: bool) -> Tensor:
        """Runs the chain; keeps of each differentiated step its records, or the code alone."""
        aim = target.to(chain.sweeps.dtype)
        kept: list[Tensor] = []
        for index in range(chain.steps):
            inside = index >= chain.steps - depth
            pull, records = chain.sweeps.pull(z, aim, record=inside and not recompute)
            if inside:
                kept += [z] if recompute else [part for record in records for part in record]
            z = chain.move(z, pull)
        ctx.chain, ctx.depth, ctx.recompute = chain, depth, recompute
        ctx.save_for_backward(target, *kept)
        return z

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, a: Tensor) -> tuple[Tensor | None, ...]:
        """Takes the adjoint of the last code to the gradient with respect to the target; see the module."""
        target, *kept = ctx.saved_tensors
        chain: Chain = ctx.chain
        sweeps, size = chain.sweeps, len(kept) // ctx.depth
        aim, total = target.to(sweeps.dtype), torch.zeros_like(target)
        for index in reversed(range(ctx.depth)):
            part = kept[index * size : (index + 1) * size]
            if ctx.recompute:
                _, records = sweeps.pull(part[0], aim, record=True)
            else:
                records = [Record(*pair) for pair in zip(part[::2], part[1::2], strict=True)]
            image, tangents = sweeps.push(a, records)
            total += image
            if index > 0:
                bent = sweeps.pull_tangent(image, records, tangents)
                a = a - chain.step_size * (a + chain.precision * bent)
        return chain.step_size * chain.precision * total, None, None, None, None
