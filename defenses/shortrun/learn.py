"""The chain with gradients in the generator's weights and sigma: what stage 3 learns from.

With the terms of `chain`, a step is z <- z - s (z + p grad U(z)) + noise. Let a be the adjoint of the code after it.
What the step adds to the gradient in the weights w is -s p d/dw of S = <a, grad U(z)>, and S is the derivative of U
along a. The weight gradient of U is a sum over layers of <input, cotangent of the output>; its derivative along a
replaces first one of the two by its tangent, then the other. The sweep that gives H a passes all four by.

A step costs two passes through the generator, its way back two more and, for the weights, another two. Autograd counts
as many, but keeps a graph of the graph and cannot work in place.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .chain import Chain, Deconvolution, Jet, Record, Sweeps


class Trace(NamedTuple):
    """One evaluation of grad U.

    Attributes:
        inputs: what went into each transposed convolution, first to last.
        cotangents: what came back to the output of each, first to last.
        records: one per activation, first to last.
    """

    inputs: list[Tensor]
    cotangents: list[Tensor]
    records: list[Record]


def trace_pull(sweeps: Sweeps, z: Tensor, target: Tensor) -> tuple[Tensor, Trace]:
    """Returns grad U(z) = J^T (g(z) - target), `b k`, and what `pull_back` needs to differentiate it."""
    inputs: list[Tensor] = []
    cotangents: list[Tensor] = []
    records: list[Record] = []
    jets: list[Jet] = []
    h = sweeps.enter(z)
    for layer in sweeps.layers:
        if isinstance(layer, Deconvolution):
            inputs.append(h)
            h = layer(h)
        else:
            jets.append(layer(h, True))
            h = jets[-1].value
    c = h - target
    for layer in reversed(sweeps.layers):
        if isinstance(layer, Deconvolution):
            cotangents.append(c)
            c = layer.pull(c)
            continue
        _, slope, bend = jets.pop()
        if bend is not None:
            records.append(Record(slope, bend.mul_(c)))
        c = c.mul_(slope)
    return c[:, :, 0, 0].to(z.dtype), Trace(inputs, cotangents[::-1], records[::-1])


def pull_back(sweeps: Sweeps, a: Tensor, trace: Trace, sums: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Returns H a and J a, and adds the gradient of <a, grad U> in weights and biases to `sums`, layer by layer."""
    h, into, tangents = sweeps.enter(a), [], []
    left = iter(trace.records)
    for layer in sweeps.layers:
        if isinstance(layer, Deconvolution):
            into.append(h)
            h = layer.push(h)
        else:
            tangents.append(h)
            h = h * next(left).slope
    image = c = h
    place = len(sums)
    back = list(zip(trace.inputs, trace.cotangents, into, strict=True))
    bends = list(zip(trace.records, tangents, strict=True))
    for layer in reversed(sweeps.layers):
        if not isinstance(layer, Deconvolution):
            record, tangent = bends.pop()
            c = tangent.mul_(record.bend).addcmul_(c, record.slope)
            continue
        value, cotangent, moved = back.pop()
        if layer.bias is not None:
            place -= 1
            sums[place] += c.sum((0, 2, 3))
        place -= 1
        sums[place] += layer.weight_gradient(torch.cat([value, moved]), torch.cat([c, cotangent]))
        c = layer.pull(c)
    return c[:, :, 0, 0].to(a.dtype), image


def run_to_learn(
    chain: Chain, z: Tensor, target: Tensor, generator: nn.Module, log_sigma: Tensor, *, depth: int
) -> Tensor:
    """Runs the chain from z; the code is differentiable, once, in the generator's weights, log_sigma and the target.

    Args:
        chain: made from the generator's weights and sigma as they are now.
        z: the codes that the chain starts from.
        target: images in the generator's scale.
        generator: whose weights are learned.
        log_sigma: the logarithm of sigma, a scalar.
        depth: how many of the last steps are differentiated; the code before them is a constant.
    """
    return _Learned.apply(target, log_sigma, z, chain, depth, *generator.parameters())  # type: ignore[no-untyped-call]


class _Learned(torch.autograd.Function):
    """The chain as one node of autograd's graph, a function of the target, log_sigma and the generator's weights."""

    @staticmethod
    def forward(
        ctx: Any, target: Tensor, log_sigma: Tensor, z: Tensor, chain: Chain, depth: int, *weights: Tensor
    ) -> Tensor:
        """Runs the chain; keeps a trace of each differentiated step."""
        del log_sigma  # the chain holds it as its precision
        aim = target.to(chain.sweeps.dtype)
        ctx.traces, ctx.pulls = [], []
        for index in range(chain.steps):
            if index < chain.steps - depth:
                pull, _ = chain.sweeps.pull(z, aim, record=False)
            else:
                pull, trace = trace_pull(chain.sweeps, z, aim)
                ctx.traces.append(trace)
                ctx.pulls.append(pull)
            z = chain.move(z, pull)
        ctx.chain = chain
        ctx.save_for_backward(target, *weights)
        return z

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, a: Tensor) -> tuple[Tensor | None, ...]:
        """Takes the adjoint of the last code to the gradients; see the module."""
        chain: Chain = ctx.chain
        factor = chain.step_size * chain.precision
        total, *sums = (torch.zeros_like(tensor) for tensor in ctx.saved_tensors)
        sigma = torch.zeros_like(chain.precision)
        while ctx.traces:
            bent, image = pull_back(chain.sweeps, a, ctx.traces.pop(), sums)
            total += image
            sigma += (a * ctx.pulls.pop()).sum()
            a = a - chain.step_size * (a + chain.precision * bent)
        return (factor * total, 2 * factor * sigma, None, None, None, *(-factor * weight for weight in sums))
