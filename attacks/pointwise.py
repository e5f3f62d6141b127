"""The pointwise attack: an error near the original, found by decisions alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Self

import torch
from torch import Tensor
from torch.nn import functional

from robench.attack import Attack
from robench.decisions import BISECTIONS, HeldOracle, bisect, find_starts
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
LARGEST_SHARE: Final = 0.25
SMALLEST_SHARE: Final = 2.0**-10
"""In linf and l2 an image is drawn nearer by a share of the way between these."""
UNLIMITED: Final = 1_000_000_000
VOTES: Final = 9
"""Queries in linf and l2 that have all EOT draws, usually: two about the original, one for the start, six to end."""
EOT_SHARE: Final = 0.2
LEAST_DRAWS: Final = 2
"""Of the EOT draws, the share that a query in linf and l2 has, and how many at least, if there are as many."""


@dataclass(frozen=True)
class Pointwise(Attack):
    """Starts from an error far away and sets pixels back to the original as long as the answer stays wrong.

    Schott et al. 2019 (arXiv 1805.09190), the Pointwise attack. Norms: l0, all channels of a pixel together; linf and
    l2. Access: decisions. Goal: the nearest error. An image for which no start is found comes back as it was. No
    guarantee, but in l0 none of the result's pixels can be set back on a deterministic defense, unless `max_queries`
    ended the search: each was tried once more, alone, and the answer was right.

    A randomized defense is asked the same draws again and again, and an error is wrong in all that have its original
    right: in l0 of the EOT draws, so that it holds in others; in linf and l2, where the image is moved out to the bound
    at the end, of two of ten (docs/decisions/0015-pointwise-holds-its-draws.md). The start in linf and l2, and how far
    the result stands back, are put to a vote of all.

    Cost per image: one decision for the original; then for each restart in l0 `tries` decisions for the start and about
    3 for each pixel of the result, or about 50; in linf and l2 two or three for each pixel of the image. A decision is
    one forward pass, times the draws. All images ask together, one candidate each; those that are done leave, those of
    a randomized defense once they are half of the batch, after which the others' originals are asked about again.

    In linf and l2 few pixels are no aim: an error of few pixels has large changes, and setting back leaves no way to
    smaller ones. The start is the image with all values at the far end of the box, or noise where that is no error. It
    is drawn towards the original along a line to where the answer turns. There a pixel that serves the error cannot be
    set back; whenever others were, the image is drawn nearer by what that has gained. `benchmarks/pointwise.py` has the
    comparison with foolbox's, which sets back first and then draws each pixel nearer for itself. At the end an image is
    moved away a little, as `robench.decisions.Started.finish` tells.

    Departures from the paper, all of which save queries:
    - The start is salt-and-pepper noise in half of the first tries only. The others are patches in which every value
      goes to the far end of the box: they mislead with fewer pixels. Once an error is found, its size rules the next
      try, smaller after a success and larger after a failure: a patch at the smallest error so far or anywhere, or
      pixels drawn from that error and its neighbours.
    - Pixels are set back in chunks, doubled after success and halved after failure, down to the paper's single pixel.
      A pixel that has to stay goes to the end of the queue, so that the last round is the paper's check.

    Args:
        tries: decisions spent on a start, in l0 on a small one.
        restarts: independent searches; the smallest result is kept.
        max_queries: most decisions for an image, shared evenly among the restarts, at most half of them for the start;
            the search then ends with what it has, which may hold pixels that could be set back. None: no limit.
    """

    name = "pointwise"
    norms = ("linf", "l2", "l0")
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
        """As in l0."""
        return self.passes_in("l0")

    def passes_in(self, norm: str) -> int:
        """One decision for the original; then the tries and about 50 for setting back, in linf and l2 about 2,000."""
        expected = 1 + self.restarts * (self.tries + 50 if norm == "l0" else 2000)
        return expected if self.max_queries is None else min(expected, self.max_queries)

    def draws_of(self, eot: int, norm: str) -> int:
        """The EOT draws of the search: all in l0; in linf and l2 two of ten, or two: what it finds is as good."""
        return eot if norm == "l0" else min(eot, max(LEAST_DRAWS, round(EOT_SHARE * eot)))

    def passes_with_eot(self, norm: str, eot: int) -> int:
        """As `passes_in`, of which in linf and l2 a few have all draws."""
        queries = self.passes_in(norm)
        votes = 0 if norm == "l0" else min(VOTES, queries)
        return votes * eot + (queries - votes) * self.draws_of(eot, norm)

    def __call__(self, victim: Victim, x: Images, y: Labels, threat: ThreatModel) -> Images:
        """Attacks a batch; see the class."""
        right = victim.labels(x) == y
        best, size = x.clone(), torch.where(right, torch.inf, 0.0)
        limit = UNLIMITED if self.max_queries is None else (self.max_queries - 1) // self.restarts
        nearest = 1 if threat.norm == "l0" else 0
        for _ in range(self.restarts):
            rows = (size > nearest).nonzero()[:, 0]
            if len(rows) == 0:
                break
            part, search = victim.subset(rows), self._search_pixels if threat.norm == "l0" else self._search_near
            found = search(part, x[rows], y[rows], threat, limit)
            distance = threat.distance(x[rows], found)
            closer = (distance > 0) & (distance < size[rows])
            best[rows] = torch.where(closer.view(-1, 1, 1, 1), found, best[rows])
            size[rows] = torch.where(closer, distance, size[rows])
        return torch.where(threat.contains(x, best).view(-1, 1, 1, 1), best, x)

    def _search_near(self, victim: Victim, x: Images, y: Labels, threat: ThreatModel, limit: int) -> Images:
        """One restart in linf and l2; the original where no start was found."""
        started = find_starts(victim, x, y, limit, first=_far_end(x), tries=min(self.tries, limit // 2))
        if len(started.rows) == 0:
            return x.clone()
        asked = started.oracle
        oracle = HeldOracle.begin(asked.victim, started.x, asked.y, asked.left, self.draws_of(victim.eot, threat.norm))
        x_adv = bisect(oracle, started.x, started.x_adv, "l2", BISECTIONS)
        x_adv = _set_back(oracle, torch.arange(len(x_adv), device=x.device), started.x, x_adv, draw=True)
        return started.finish(x, x_adv, threat)

    def _search_pixels(self, victim: Victim, x: Images, y: Labels, threat: ThreatModel, limit: int) -> Images:
        """One restart in l0: errors of which no pixel can be set back; the original where no start was found."""
        start, rows = _Start.nowhere(x), torch.arange(len(x), device=x.device)
        oracle = HeldOracle.begin(victim, x, y, limit, self.draws_of(victim.eot, threat.norm))
        for _ in range(min(self.tries, limit // 2)):
            rows, oracle = oracle.release(rows, (start.size[rows] <= 1) | oracle.exempt)
            if len(rows) == 0 or oracle.left <= 0:
                break
            candidates, boxes = start.propose(x[rows], rows)
            wrong = oracle.is_wrong(candidates)
            pixels = threat.distance(x[rows], candidates)
            start.update(rows, candidates, boxes, torch.where(wrong & (pixels > 0), pixels, torch.inf))
        return _set_back(oracle, rows, x, start.x)


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


def _set_back(oracle: HeldOracle, rows: Tensor, x: Images, x_adv: Images, *, draw: bool = False) -> Images:
    """Sets pixels of x_adv back to x, chunk by chunk, until none can be or the oracle has no queries left.

    The changed pixels wait in a queue; those with turns in [head, head + chunk) are tried together. Set back, they are
    out of the queue; a single pixel that has to stay gets a new turn at its end. An image is done when all that are
    left have stayed, one after the other.

    With `draw` an image from which pixels were set back is drawn nearer before the next are tried, as often as the
    answer stays wrong, by a share that doubles after success and is halved after failure: otherwise what was gained
    would go into pixels that serve the error.

    Args:
        oracle: that of the images `rows`.
        rows: which images to work on.
        x: originals.
        x_adv: their errors; the original where there is none.
        draw: see above.
    """
    x_adv = x_adv.clone()
    turn = _shuffle((x_adv != x).any(1).flatten(1))  # b hw
    tail = turn.amax(1) + 1
    head, stayed, chunk = torch.zeros_like(tail), torch.zeros_like(tail), torch.ones_like(tail)
    draws_next, share = torch.zeros_like(tail, dtype=torch.bool), torch.full_like(tail, LARGEST_SHARE, dtype=x.dtype)
    rows, oracle = oracle.release(rows, (tail[rows] <= 1) | oracle.exempt)
    while len(rows) and oracle.left > 0:
        first, size, drawing = head[rows], chunk[rows], draws_next[rows]
        tried = (turn[rows] >= first[:, None]) & (turn[rows] < (first + size)[:, None])
        without = torch.where(tried.view(-1, 1, *x.shape[2:]), x[rows], x_adv[rows])
        nearer = x_adv[rows] + share[rows].view(-1, 1, 1, 1) * (x - x_adv)[rows]
        candidates = torch.where(drawing.view(-1, 1, 1, 1), nearer, without)
        wrong = oracle.is_wrong(candidates)
        x_adv[rows] = torch.where(wrong.view(-1, 1, 1, 1), candidates, x_adv[rows])
        draws_next[rows] = wrong & draw
        step = torch.where(wrong, 2 * share[rows], share[rows] / 2).clamp(SMALLEST_SHARE, LARGEST_SHARE)
        share[rows] = torch.where(drawing, step, share[rows])
        back, stays = wrong & ~drawing, ~wrong & ~drawing & (size == 1)
        turn[rows] = torch.where(tried & stays[:, None], tail[rows][:, None], turn[rows])
        head[rows] += torch.where(back | stays, size, 0)
        tail[rows] += stays
        stayed[rows] = torch.where(back, 0, stayed[rows] + stays)
        left = tail[rows] - head[rows]
        grown = torch.where(back, 2 * size, torch.where(drawing, size, size // 2))
        chunk[rows] = grown.minimum(left // 2).clamp_min(1)
        done = ((left <= 1) | (stayed[rows] >= left)) & ~draws_next[rows]
        rows, oracle = oracle.release(rows, done | oracle.exempt)
    return x_adv


def _shuffle(changed: Tensor) -> Tensor:
    """The changed pixels' turns, 0, 1, 2... in random order, and -1 for the others: b hw -> b hw."""
    order = torch.where(changed, torch.rand_like(changed, dtype=torch.float32), 2.0)
    turn = order.argsort(1).argsort(1)
    return torch.where(changed, turn, -1)
