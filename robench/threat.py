"""The threat model: a norm, a bound and the box. The only file that knows a norm."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal, cast, get_args

import torch
from torch import Tensor

from robench.errors import UsageError
from robench.types import Images, Mask, PerExample

Norm = Literal["linf", "l2", "l1", "l0"]
NORMS: Final[tuple[str, ...]] = get_args(Norm)

ABSOLUTE_TOLERANCE: Final = 1e-6
RELATIVE_TOLERANCE: Final = 1e-5
"""An image counts as inside the ball up to `eps * (1 + 1e-5) + 1e-6`: float32 cannot represent most bounds better.

l0 counts pixels and has no tolerance; neither has the box [0, 1].
"""


def parse_eps(text: str) -> float:
    """Reads a bound as people write it: `0.1`, `8/255`, `2`.

    Raises:
        UsageError: not a number, negative, infinite, NaN, or a division by zero.
    """
    numerator, slash, denominator = text.strip().partition("/")
    try:
        value = float(numerator) / float(denominator) if slash else float(numerator)
    except (ValueError, ZeroDivisionError):
        raise UsageError(f'eps must be a number such as 0.1 or 8/255; got "{text}"') from None
    if not (math.isfinite(value) and value >= 0):
        raise UsageError(f'eps must be finite and not negative; got "{text}"')
    return value


def format_eps(eps: float, norm: str) -> str:
    """Prints a bound the way the field writes it: `8/255`, in l2 `36/255`, where that is exact, and 0.1 where not."""
    numerator = eps * 255
    is_pixel_step = norm in ("linf", "l2") and round(numerator) > 0 and abs(numerator - round(numerator)) < 1e-9
    return f"{round(numerator)}/255" if is_pixel_step and eps != round(eps, 4) else f"{eps:g}"


def exact_eps(eps: float, norm: str) -> str:
    """As `format_eps` where that reads back as the same number, else all its digits."""
    text = format_eps(eps, norm)
    return text if parse_eps(text) == eps else repr(eps)


@dataclass(frozen=True)
class ThreatModel:
    """All images of the box [0, 1] within `eps` of the original in one norm.

    Args:
        norm: `linf`, `l2`, `l1`, or `l0` (pixels changed; all channels of one location count as one).
        eps: the bound, in the unit of images in [0, 1]; for `l0` a number of pixels. Text is read by `parse_eps`.

    Raises:
        UsageError: unknown norm; eps no number, negative or not finite; above 1 for linf; not whole for l0.
    """

    norm: str
    eps: float

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise UsageError(f'norm must be one of {", ".join(NORMS)}; got "{self.norm}"{_meant(self.norm, self.eps)}')
        object.__setattr__(self, "eps", _as_number(self.eps))  # 1 and 1.0 are one bound: seeds, digests take it as text
        if not (math.isfinite(self.eps) and self.eps >= 0):
            raise UsageError(f"eps must be finite and not negative; got {self.eps}")
        if self.norm == "linf" and self.eps > 1:
            raise UsageError(
                f"eps for linf is in the unit of images in [0, 1], so at most 1; got {self.eps:g}. "
                "For pixel steps write it as a fraction, for example 8/255"
            )
        if self.norm == "l0" and self.eps != int(self.eps):
            raise UsageError(f"eps for l0 is a number of pixels; got {self.eps:g}")

    def __str__(self) -> str:
        return f"{self.norm} eps={format_eps(self.eps, self.norm)}"

    def whole_box(self, x: Images) -> ThreatModel:
        """The bound in this norm that leaves out no image of the box, of the size of those in x."""
        pixels = x[0, 0].numel()
        values = pixels * x.shape[1]
        return ThreatModel(self.norm, {"linf": 1, "l2": math.sqrt(values), "l1": values, "l0": pixels}[self.norm])

    def distance(self, x: Images, x_adv: Images) -> PerExample:
        """Distance of each pair in this norm."""
        return _DISTANCES[self.norm](x_adv - x)

    def contains(self, x: Images, x_adv: Images) -> Mask:
        """True where x_adv is finite, in the box and within eps (tolerance: see ABSOLUTE_TOLERANCE)."""
        flat = x_adv.flatten(1)
        in_box = ((flat >= 0) & (flat <= 1)).all(1)  # NaN fails both
        slack = 0.0 if self.norm == "l0" else self.eps * RELATIVE_TOLERANCE + ABSOLUTE_TOLERANCE
        return in_box & (self.distance(x, x_adv) <= self.eps + slack)

    def project(self, x: Images, x_adv: Images) -> Images:
        """Moves x_adv into the ball around x and into the box; a point that is inside stays where it is.

        The ball comes first, then the box: since x is in the box, clipping only shortens each coordinate, so the result
        is in both. For l2 and l1 it need not be the nearest such point.
        """
        return (x + _PROJECTIONS[self.norm](x_adv - x, self.eps)).clamp(0, 1)

    def stretch(self, x: Images, x_adv: Images) -> Images:
        """Moves x_adv away from x, along its line, to the distance eps or as far as the box allows, in l0 not at all.

        A point outside the ball is projected, and one at x stays there.
        """
        inside = self.project(x, x_adv)
        if self.norm == "l0":
            return inside
        distance = self.distance(x, inside)
        unit = (inside - x) / torch.where(distance > 0, distance, 1).view(-1, *[1] * (x.ndim - 1))
        return self.project(x, x + self.eps * unit)

    def steepest(self, grad: Images) -> Images:
        """The direction of length 1 in this norm that raises the loss fastest (all zero where grad is).

        linf: the sign; l2: grad / |grad|; l1 and l0: the pixel (l0) or value (l1) with the largest gradient alone.
        """
        return _STEEPEST[self.norm](grad)

    def random_start(self, x: Images) -> Images:
        """A point drawn uniformly from the ball (linf, l2, l1; l0: random pixels), clipped to the box."""
        return self.project(x, x + _DRAWS[self.norm](x, self.eps))


def _meant(norm: object, eps: object) -> str:
    """What was probably meant by a wrong norm: `; did you mean linf?`; empty where nobody can tell."""
    if isinstance(eps, str) and eps in NORMS:
        return f'; the norm comes first: ThreatModel("{eps}", {norm!r})'
    plain = "".join(character for character in str(norm).lower() if character.isalnum())
    found = {"inf": "linf", "linfty": "linf", "linfinity": "linf", "max": "linf"}.get(plain, plain)
    found = f"l{found}" if f"l{found}" in NORMS else found
    return f"; did you mean {found}?" if found in NORMS else ""


def _as_number(eps: object) -> float:
    if isinstance(eps, str):
        return parse_eps(eps)
    try:
        return float(cast("float", eps))
    except (TypeError, ValueError):
        raise UsageError(f'eps must be a number such as 8 / 255, or text such as "8/255"; got {eps!r}') from None


def as_threats(threat: object) -> list[ThreatModel]:
    """A threat model, or several in a list or tuple, as a list.

    Raises:
        UsageError: it is neither.
    """
    threats = list(threat) if isinstance(threat, Sequence) and not isinstance(threat, str) else [threat]
    if not all(isinstance(one, ThreatModel) for one in threats):
        raise UsageError(
            f'threat must be a ThreatModel such as ThreatModel("linf", 8 / 255), or a list of them; got {threat!r}'
        )
    return cast("list[ThreatModel]", threats)


def _column(values: PerExample) -> Tensor:
    return values.view(-1, 1, 1, 1)


def _pixels(delta: Images) -> Tensor:
    return delta.abs().amax(1).flatten(1)  # b c h w -> b hw


def _clip_linf(delta: Images, eps: float) -> Images:
    return delta.clamp(-eps, eps)


def _clip_l2(delta: Images, eps: float) -> Images:
    norms = delta.flatten(1).norm(dim=1).clamp_min(1e-12)
    return delta * _column((eps / norms).clamp_max(1.0))


def _clip_l1(delta: Images, eps: float) -> Images:
    """Euclidean projection on the l1 ball (Duchi et al. 2008, fig. 1)."""
    magnitude = delta.abs().flatten(1)
    ordered = magnitude.sort(dim=1, descending=True).values
    rank = torch.arange(1, ordered.shape[1] + 1, device=delta.device, dtype=delta.dtype)
    thresholds = (ordered.cumsum(1) - eps) / rank
    kept = (ordered > thresholds).sum(1, keepdim=True).clamp_min(1)
    shrink = thresholds.gather(1, kept - 1).clamp_min(0)
    inside = magnitude.sum(1, keepdim=True) <= eps
    clipped = delta.sign() * (magnitude - shrink).clamp_min(0).view_as(delta)
    return torch.where(inside.view(-1, 1, 1, 1), delta, clipped)


def _clip_l0(delta: Images, eps: float) -> Images:
    pixels = _pixels(delta)
    if int(eps) >= pixels.shape[1]:
        return delta
    keep = torch.zeros_like(pixels)
    keep.scatter_(1, pixels.topk(int(eps), dim=1).indices, 1.0)
    return delta * keep.view(-1, 1, *delta.shape[2:])


def _unit_l2(grad: Images) -> Images:
    largest = _column(grad.abs().flatten(1).amax(1))
    scaled = grad / torch.where(largest > 0, largest, 1)  # the gradient of a saturated softmax underflows when squared
    return scaled / _column(scaled.flatten(1).norm(dim=1).clamp_min(1))


def _top_value(grad: Images) -> Images:
    flat = grad.flatten(1)
    best = flat.abs().argmax(1, keepdim=True)
    return torch.zeros_like(flat).scatter_(1, best, flat.gather(1, best).sign()).view_as(grad)


def _top_pixel(grad: Images) -> Images:
    best = grad.abs().sum(1).flatten(1).argmax(1, keepdim=True)
    keep = torch.zeros_like(grad[:, 0].flatten(1)).scatter_(1, best, 1.0)
    return grad.sign() * keep.view(-1, 1, *grad.shape[2:])


def _draw_linf(x: Images, eps: float) -> Images:
    return torch.empty_like(x).uniform_(-eps, eps)


def _draw_l2(x: Images, eps: float) -> Images:
    direction = torch.randn_like(x)
    radius = torch.rand(len(x), device=x.device) ** (1.0 / x[0].numel())
    return direction * _column(eps * radius / direction.flatten(1).norm(dim=1))


def _draw_l1(x: Images, eps: float) -> Images:
    weights = torch.empty_like(x).exponential_()
    radius = torch.rand(len(x), device=x.device) ** (1.0 / x[0].numel())
    sign = torch.randint_like(x, 2) * 2 - 1
    return sign * weights * _column(eps * radius / weights.flatten(1).sum(1))


def _draw_l0(x: Images, eps: float) -> Images:
    order = torch.rand_like(x[:, 0].flatten(1))
    changed = torch.zeros_like(order).scatter_(1, order.topk(min(int(eps), order.shape[1]), dim=1).indices, 1.0)
    return (torch.rand_like(x) - x) * changed.view(-1, 1, *x.shape[2:])


_DISTANCES: Final[dict[str, Callable[[Images], PerExample]]] = {
    "linf": lambda delta: delta.abs().flatten(1).amax(1),
    "l2": lambda delta: delta.flatten(1).norm(dim=1),
    "l1": lambda delta: delta.abs().flatten(1).sum(1),
    "l0": lambda delta: (_pixels(delta) > 0).sum(1).to(delta.dtype),
}
_PROJECTIONS: Final[dict[str, Callable[[Images, float], Images]]] = {
    "linf": _clip_linf,
    "l2": _clip_l2,
    "l1": _clip_l1,
    "l0": _clip_l0,
}
_STEEPEST: Final[dict[str, Callable[[Images], Images]]] = {
    "linf": torch.sign,
    "l2": _unit_l2,
    "l1": _top_value,
    "l0": _top_pixel,
}
_DRAWS: Final[dict[str, Callable[[Images, float], Images]]] = {
    "linf": _draw_linf,
    "l2": _draw_l2,
    "l1": _draw_l1,
    "l0": _draw_l0,
}
