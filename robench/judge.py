"""The judge: classifies adversarial images again, on its own randomness, and checks the bounds itself.

Independent of the attack: it sees images only, always in float32 (never TF32), and calls the defense as any user does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from robench.batches import pass_in_batches, pass_once
from robench.defense import Defense
from robench.errors import PluginError
from robench.precision import engine_numerics
from robench.progress import Progress
from robench.threat import ThreatModel
from robench.types import Images, Logits


@dataclass(frozen=True)
class Bounds:
    """What the judge found of each adversarial image.

    Attributes:
        finite: no NaN, no infinity.
        in_box: within [0, 1].
        within: within eps, by the tolerance of robench.threat.
        distance: distance from the original, NaN where it is not finite.
    """

    finite: Tensor
    in_box: Tensor
    within: Tensor
    distance: Tensor

    def broken_rule(self) -> str | None:
        """One line on the first bound that any image breaks, None if all hold."""
        for held, rule in (
            (self.finite, "must be finite"),
            (self.in_box, "must lie in [0, 1]"),
            (self.within, "must lie within eps"),
        ):
            if not bool(held.all()):
                count = int((~held).sum())
                return f"adversarial images {rule}; {count} of {len(held)} do not (largest distance {self._largest()})"
        return None

    def _largest(self) -> str:
        return f"{self.distance.nan_to_num(torch.inf).max().item():.6g}"


def check_bounds(x: Images, x_adv: Tensor, threat: ThreatModel) -> Bounds:
    """Measures each adversarial image against the threat model.

    Raises:
        PluginError: the attack returned another shape or dtype.
    """
    if x_adv.shape != x.shape or x_adv.dtype != x.dtype:
        raise PluginError(
            f"adversarial images must be {tuple(x.shape)} {x.dtype}; got {tuple(x_adv.shape)} {x_adv.dtype}"
        )
    flat = x_adv.flatten(1)
    finite = flat.isfinite().all(1)
    in_box = ((flat >= 0) & (flat <= 1)).all(1)
    return Bounds(finite, in_box, threat.contains(x, x_adv), threat.distance(x, x_adv))


@engine_numerics()
def judge(
    defense: Defense,
    x: Images,
    repeats: int,
    *,
    on_rows: Callable[[int], None] | None = None,
    on_answers: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Counts how often the defense answers each class: `repeats` independent answers, `b k` int64.

    A defense that draws once for a pass is asked image by image. Images that share a draw are right or wrong together,
    so that an interval that counts them one by one is too narrow; this takes one pass for each image and repeat.

    Args:
        defense: what is judged.
        x: images in [0, 1].
        repeats: answers per image; draws come from torch's global generator.
        on_rows: called with the number of images after each batch (progress).
        on_answers: called with the answers of each pass, `b`.

    Raises:
        PluginError: logits of the wrong shape, or not finite, or images changed in place.
    """
    votes = torch.zeros(len(x), defense.num_classes, dtype=torch.int64)
    with torch.no_grad():
        for _ in range(repeats):
            passes = pass_in_batches(defense, lambda rows: answer(defense, rows), x, together=1, on_rows=on_rows)
            answers = torch.cat(passes).cpu()
            votes += functional.one_hot(answers, defense.num_classes)
            if on_answers is not None:
                on_answers(answers)
    return votes


def judge_in_units(
    defense: Defense, x: Images, repeats: int, unit_size: int, *, on_answers: Callable[[Tensor], None] | None = None
) -> Tensor:
    """As `judge`, some images after others as in a run, with progress: a slow defense takes minutes."""
    with Progress(f"{defense.name}: judged again", {"answers": len(x) * repeats}, brief=True) as progress:
        votes = [
            judge(defense, rows, repeats, on_rows=progress.advance, on_answers=on_answers)
            for rows in x.split(unit_size)
        ]
    return torch.cat(votes)


def answer(defense: Defense, x: Images) -> Tensor:
    """One answer of the defense for each image: `b` int64.

    Raises:
        PluginError: logits of the wrong shape, or not finite, or images changed in place.
    """
    return checked_logits(defense, x).argmax(1)


def checked_logits(defense: Defense, x: Images) -> Logits:
    """The logits behind one answer for each image.

    Raises:
        PluginError: they are of the wrong shape, or not finite, or images were changed in place.
    """
    logits = pass_once(defense, defense, x.clone())
    expected = (len(x), defense.num_classes)
    if not isinstance(logits, Tensor) or tuple(logits.shape) != expected:
        came = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise PluginError(f'defense "{defense.name}": logits must be a tensor of shape {expected}; got {came}')
    if not bool(logits.isfinite().all()):
        rows = int((~logits.isfinite().all(1)).sum())
        raise PluginError(f'defense "{defense.name}": logits must be finite; {rows} of {len(x)} rows hold NaN or inf')
    return logits if logits.is_floating_point() else logits.float()
