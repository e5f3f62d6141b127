"""The pointwise attack: few pixels, found by decisions alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Self

import torch
from torch import Tensor
from torch.nn import functional

from robench.attack import Attack
from robench.errors import UsageError
from robench.threat import ThreatModel
from robench.types import Images, Labels, PerExample
from robench.victim import Victim

SMALLEST: Final = 0.02
"""The first tries change this share of the pixels or more, up to all, on a logarithmic scale."""
SHRINK: Final = 0.6
GROW: Final = 1.1
LARGEST: Final = 0.8
"""After a smaller error the next try has SHRINK times its pixels, after a failure GROW times as many as before, but at
most LARGEST times the smallest error's."""
STRETCH: Final = 0.7
"""Half a patch's largest log aspect: it is up to exp(2 * STRETCH) = 4 times as high as wide, or as wide as high."""


@dataclass(frozen=True)
class Pointwise(Attack):
    """Starts from an error far away and sets pixels back to the original as long as the answer stays wrong.

    Schott et al. 2019 (arXiv 1805.09190), the Pointwise attack. Norm: l0, all channels of a pixel together. Access:
    decisions; of a randomized defense the majority of its EOT draws. Goal: the nearest error. An image for which no
    start is found comes back as it was. No guarantee, but none of the result's pixels can be set back, unless
    `max_queries` ended the search: each was tried once more, alone, and the answer was right. A randomized defense
    may answer otherwise when it is asked again.

    Cost per image: one decision for the original; then for each restart `tries` decisions for the start and about 3
    for each pixel of the result, or about 50. A decision is one forward pass, times EOT. All images ask together, one
    candidate each; those that are done leave.

    Departures from the paper, all of which save queries:
    - The start is salt-and-pepper noise in half of the first tries only. The others are patches in which every value
      goes to the far end of the box: they mislead with fewer pixels. Once an error is found, its size rules the next
      try, smaller after a success and larger after a failure: a patch at the smallest error so far or anywhere, or
      pixels drawn from that error and its neighbours.
    - Pixels are set back in chunks, doubled after success and halved after failure, down to the paper's single pixel.
      A pixel that has to stay goes to the end of the queue, so that the last round is the paper's check.

    Args:
        tries: decisions spent on a small start.
        restarts: independent searches; the smallest result is kept.
        max_queries: most decisions for an image, shared evenly among the restarts, at most half of them for the start;
            the search then ends with what it has, which may hold pixels that could be set back. None: no limit.
    """

    name = "pointwise"
    norms = ("l0",)
    access = "decisions"
    goal = "minimal"
    draws = True

    tries: int = 60
    restarts: int = 1
    max_queries: int | None = None

    def __post_init__(self) -> None:
        """Checks the options.

        Raises:
            UsageError: an option is out of range.
        """
        if self.tries < 1 or self.restarts < 1:
            raise UsageError(f"pointwise: tries and restarts must be at least 1; got {self.tries} and {self.restarts}")
        least = 1 + 2 * self.restarts
        if self.max_queries is not None and self.max_queries < least:
            raise UsageError(
                f"pointwise: max_queries must be at least {least}, one for the original and two for each restart; "
                f"got {self.max_queries}"
            )

    def passes(self) -> int:
        """One decision for the original, then the tries and about 50 for setting back."""
        expected = 1 + self.restarts * (self.tries + 50)
        return expected if self.max_queries is None else min(expected, self.max_queries)

    def __call__(self, victim: Victim, x: Images, y: Labels, threat: ThreatModel) -> Images:
        """Attacks a batch; see the class."""
        right = victim.labels(x) == y
        best, size = x.clone(), torch.where(right, torch.inf, 0.0)
        limit = None if self.max_queries is None else (self.max_queries - 1) // self.restarts
        for _ in range(self.restarts):
            rows = (size > 1).nonzero()[:, 0]
            if len(rows) == 0:
                break
            found = self._search(victim.subset(rows), x[rows], y[rows], threat, limit)
            pixels = threat.distance(x[rows], found)
            closer = (pixels > 0) & (pixels < size[rows])
            best[rows] = torch.where(closer.view(-1, 1, 1, 1), found, best[rows])
            size[rows] = torch.where(closer, pixels, size[rows])
        return torch.where(threat.contains(x, best).view(-1, 1, 1, 1), best, x)

    def _search(self, victim: Victim, x: Images, y: Labels, threat: ThreatModel, limit: int | None) -> Images:
        """One restart: errors of which no pixel can be set back, and the original where no start was found."""
        tries = self.tries if limit is None else min(self.tries, limit // 2)
        start = _Start.nowhere(x)
        for _ in range(tries):
            rows = (start.size > 1).nonzero()[:, 0]
            if len(rows) == 0:
                break
            candidates, boxes = start.propose(x[rows], rows)
            wrong = victim.subset(rows).labels(candidates) != y[rows]
            pixels = threat.distance(x[rows], candidates)
            start.update(rows, candidates, boxes, torch.where(wrong & (pixels > 0), pixels, torch.inf))
        return _set_back(victim, x, y, start.x, None if limit is None else limit - tries)


@dataclass
class _Start:
    """The smallest error of each image so far.

    Attributes:
        x: the error; the original where there is none.
        size: its pixels; infinite where there is none.
        area: most pixels of the next try.
        box: where the error lies: top, left, height, width, `b 4`.
    """

    x: Images
    size: PerExample
    area: PerExample
    box: Tensor

    @classmethod
    def nowhere(cls, x: Images) -> Self:
        """No error yet."""
        size = torch.full((len(x),), torch.inf, device=x.device)
        return cls(x.clone(), size, size.clone(), _whole(x))

    def propose(self, x: Images, rows: Tensor) -> tuple[Images, Tensor]:
        """A candidate for each of the originals x, those of `rows`, and the box it lies in."""
        found = self.size[rows].isfinite()
        pixels = x[0, 0].numel()
        chance = torch.rand(3, len(rows), device=x.device)
        area = torch.where(found, self.area[rows], pixels * SMALLEST ** chance[0]).clamp_min(1)
        near = found & (chance[1] < 0.5)
        whole = _whole(x)
        boxes = _draw_boxes(area, torch.where(near[:, None], self.box[rows], whole), whole)
        candidates = torch.where(_inside(boxes, x), _far_end(x), x)
        noisy, redrawn = ~found & (chance[2] < 0.5), found & (chance[2] < 1 / 3)
        for kind, images, place in (
            (noisy, _salt_and_pepper(x, area / pixels), whole),
            (redrawn, _redraw(x, self.x[rows], area), self.box[rows]),
        ):
            candidates = torch.where(kind.view(-1, 1, 1, 1), images, candidates)
            boxes = torch.where(kind[:, None], place, boxes)
        return candidates, boxes

    def update(self, rows: Tensor, candidates: Images, boxes: Tensor, size: PerExample) -> None:
        """Keeps what is smaller; `size` is infinite where the answer was right."""
        better = size < self.size[rows]
        self.x[rows] = torch.where(better.view(-1, 1, 1, 1), candidates, self.x[rows])
        self.box[rows] = torch.where(better[:, None], boxes, self.box[rows])
        self.size[rows] = torch.where(better, size, self.size[rows])
        wider = torch.minimum(GROW * self.area[rows], LARGEST * self.size[rows])
        self.area[rows] = torch.where(better, SHRINK * size, wider)


def _whole(x: Images) -> Tensor:
    """The box that is the whole image, for each image."""
    return x.new_tensor([0, 0, *x.shape[2:]]).expand(len(x), -1).clone()


def _draw_boxes(area: PerExample, regions: Tensor, whole: Tensor) -> Tensor:
    """Boxes of at most `area` pixels whose centres are uniform in the regions, moved into the image: `b 4`."""
    chance = torch.rand(len(area), 3, device=area.device)
    stretch = torch.exp(STRETCH * (2 * chance[:, 2] - 1))
    height = (area.sqrt() * stretch).minimum(area).minimum(whole[:, 2]).floor().clamp_min(1)
    width = (area / height).minimum(whole[:, 3]).floor()
    sides = torch.stack([height, width], 1)
    centres = regions[:, :2] + chance[:, :2] * regions[:, 2:]
    corners = (centres - sides / 2).round().clamp_min(0).minimum(whole[:, 2:] - sides)
    return torch.cat([corners, sides], 1)


def _inside(boxes: Tensor, x: Images) -> Tensor:
    """The pixels inside each box: b 1 h w."""
    top, left, height, width = boxes[:, :, None].unbind(1)  # b 1 each
    row, column = (torch.arange(side, device=x.device) for side in x.shape[2:])
    in_rows = (row >= top) & (row < top + height)
    in_columns = (column >= left) & (column < left + width)
    return (in_rows[:, :, None] & in_columns[:, None, :])[:, None]


def _salt_and_pepper(x: Images, share: PerExample) -> Images:
    """Each pixel black or white in all channels with probability `share`, else as in x."""
    chance = torch.rand_like(x[:, :1])
    share = share.view(-1, 1, 1, 1)
    return torch.where(chance < share, (chance < share / 2).to(x.dtype), x)


def _redraw(x: Images, x_adv: Images, area: PerExample) -> Images:
    """At most `area` pixels drawn from those that x_adv changes and their neighbours, the latter at their far end."""
    changed = (x_adv != x).any(1, keepdim=True)
    around = functional.max_pool2d(changed.to(x.dtype), kernel_size=3, stride=1, padding=1)
    turn = _shuffle(around.flatten(1) > 0).view_as(around)
    chosen = (turn >= 0) & (turn < area.floor().view(-1, 1, 1, 1))
    return torch.where(chosen, torch.where(changed, x_adv, _far_end(x)), x)


def _far_end(x: Images) -> Images:
    """Each value at the end of the box that is farther from it."""
    return (x < 0.5).to(x.dtype)


def _set_back(victim: Victim, x: Images, y: Labels, x_adv: Images, rounds: int | None) -> Images:
    """Sets pixels of x_adv back to x, chunk by chunk, until none can be or each image has asked `rounds` times.

    The changed pixels wait in a queue; those with turns in [head, head + chunk) are tried together. Set back, they are
    out of the queue; a single pixel that has to stay gets a new turn at its end. An image is done when all that are
    left have stayed, one after the other.
    """
    x_adv = x_adv.clone()
    turn = _shuffle((x_adv != x).any(1).flatten(1))  # b hw
    tail = turn.amax(1) + 1
    head, stayed, chunk = torch.zeros_like(tail), torch.zeros_like(tail), torch.ones_like(tail)
    asked, rows = 0, (tail > 1).nonzero()[:, 0]
    part = victim.subset(rows)
    while len(rows) and asked != rounds:
        asked += 1
        first, size = head[rows], chunk[rows]
        tried = (turn[rows] >= first[:, None]) & (turn[rows] < (first + size)[:, None])
        candidates = torch.where(tried.view(-1, 1, *x.shape[2:]), x[rows], x_adv[rows])
        wrong = part.labels(candidates) != y[rows]
        x_adv[rows] = torch.where(wrong.view(-1, 1, 1, 1), candidates, x_adv[rows])
        stays = ~wrong & (size == 1)
        turn[rows] = torch.where(tried & stays[:, None], tail[rows][:, None], turn[rows])
        head[rows] += torch.where(wrong | stays, size, 0)
        tail[rows] += stays
        stayed[rows] = torch.where(wrong, 0, stayed[rows] + stays)
        left = tail[rows] - head[rows]
        chunk[rows] = torch.where(wrong, 2 * size, size // 2).minimum(left // 2).clamp_min(1)
        done = (left <= 1) | (stayed[rows] >= left)
        if bool(done.any()):
            rows = rows[~done]
            part = victim.subset(rows)
    return x_adv


def _shuffle(changed: Tensor) -> Tensor:
    """The changed pixels' turns, 0, 1, 2... in random order, and -1 for the others: b hw -> b hw."""
    order = torch.where(changed, torch.rand_like(changed, dtype=torch.float32), 2.0)
    turn = order.argsort(1).argsort(1)
    return torch.where(changed, turn, -1)
