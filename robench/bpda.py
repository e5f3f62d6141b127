"""BPDA: a step that has no useful gradient takes that of another one on the way back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

Step = Callable[[Tensor], Tensor]


def bpda(forward: Step, backward: Step | None = None) -> Step:
    """A step that computes `forward` and is differentiated as if it were `backward`.

    Backward pass differentiable approximation (Athalye, Carlini, Wagner 2018, arXiv 1802.00420, section 4.1): for a
    quantisation, a JPEG-like transform, a lookup. A defense uses it in `adaptive_forward`:

        def adaptive_forward(self, x, mode=None):
            return self.net(self.rounded(x))        # in __init__: self.rounded = robench.bpda(torch.round)

    Cost: one `forward`, and on the way back one pass of `backward` with its derivative.

    Args:
        forward: the step as it is; its own gradient is never asked for.
        backward: a differentiable approximation of it, with the same shape of result; None: the identity, for a step
            whose result has the shape of its argument.

    Raises:
        ValueError: (when called) the results of the two differ in shape.
    """

    def step(x: Tensor) -> Tensor:
        return cast("Tensor", _Substitute.apply(x, forward, backward))  # type: ignore[no-untyped-call]

    return step


class _Substitute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: Step, backward: Step | None) -> Tensor:
        ctx.save_for_backward(x)
        ctx.backward_step = backward
        with torch.no_grad():
            result = forward(x.detach())
        if backward is None and result.shape != x.shape:
            raise ValueError(
                f"bpda without a backward step needs results of the shape of x, {tuple(x.shape)}; "
                f"got {tuple(result.shape)}. Give a differentiable approximation as backward"
            )
        ctx.shape = result.shape
        return result.clone() if result.data_ptr() == x.data_ptr() else result

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,) = grads
        if ctx.backward_step is None:
            return grad, None, None
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            stand_in = ctx.backward_step(leaf)
            if stand_in.shape != ctx.shape:
                raise ValueError(f"bpda: forward gives {tuple(ctx.shape)}, but backward gives {tuple(stand_in.shape)}")
            (found,) = torch.autograd.grad(stand_in, leaf, grad)
        return found, None, None
