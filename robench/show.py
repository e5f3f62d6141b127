"""`robench show`: how a defense sees images, how well its confidence is calibrated, what its detection scores tell.

Everything is computed here; robench.report.exhibit draws it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from robench.data import Dataset, load_dataset
from robench.defense import Defense
from robench.detection import ReliabilityBin, auroc, calibration_interval, reliability_table
from robench.estimate import Estimate
from robench.evaluate import check_images
from robench.outliers import Outliers, make_outliers
from robench.registry import load_defense
from robench.rng import seeded
from robench.settings import Settings
from robench.stats import wilson
from robench.types import Images, PerExample

SHOWN = 10
"""Images in a row of pictures."""


@dataclass(frozen=True)
class ShowRequest:
    """What to show.

    Attributes:
        defense: a defense as on the command line.
        dataset: images of the kind that it was trained on (test split).
        folder: where the pictures go.
        against: another dataset, to be told from the first by the detection scores, or `interpolation`; see
            `make_outliers`.
        n: images behind the figures, of each dataset.
        seed: seeds the draw of images and all randomness.
        device: `auto`, `cpu` or `cuda`.
        weights: a weights file to read instead of the shipped one.
        data_dir: folder with datasets; None: `ROBENCH_DATA`.
    """

    defense: str
    dataset: str
    folder: Path
    against: str | None = None
    n: int = 256
    seed: int = 0
    device: str = "auto"
    weights: Path | None = None
    data_dir: Path | None = None


@dataclass(frozen=True)
class Scores:
    """One detection score on both datasets.

    Attributes:
        kind: its name.
        inside: on images of the defense's own dataset.
        outside: on the other one's.
        auroc: the chance that an outlier is more suspicious than an inlier.
    """

    kind: str
    inside: PerExample
    outside: PerExample
    auroc: Estimate


@dataclass(frozen=True)
class Exhibit:
    """What was found.

    Attributes:
        request: what was asked.
        name: the defense's name.
        pictures: rows of images, by name.
        accuracy: of one answer per image.
        calibration: expected calibration error.
        reliability: confidence against accuracy by bins.
        diagnostics: the defense's own figures.
        scores: of each detection score, where another dataset was given.
        outliers_made: how its images were brought into the shape of the first; "" for as they are.
    """

    request: ShowRequest
    name: str
    pictures: Mapping[str, Images]
    accuracy: Estimate
    calibration: Estimate
    reliability: list[ReliabilityBin]
    diagnostics: Mapping[str, float]
    scores: list[Scores]
    outliers_made: str = ""

    def to_json(self) -> dict[str, Any]:
        """As JSON types."""
        return {
            "defense": self.request.defense,
            "dataset": self.request.dataset,
            "against": self.request.against,
            "outliers_made": self.outliers_made,
            "n": self.request.n,
            "accuracy": self.accuracy.to_json(),
            "calibration_error": self.calibration.to_json(),
            "reliability": [row._asdict() for row in self.reliability],
            "diagnostics": dict(self.diagnostics),
            "auroc": {score.kind: score.auroc.to_json() for score in self.scores},
            "folder": str(self.request.folder),
        }


def show_defense(request: ShowRequest) -> Exhibit:
    """Computes and draws all that a defense has to show; the pictures are in `request.folder`.

    Raises:
        UsageError: unknown names, data that does not fit, no detection score to compare, matplotlib is missing.
    """
    from robench.report.drawing import find_figure
    from robench.report.exhibit import draw_exhibit

    find_figure("robench show")  # matplotlib missing, it is told before any work
    options = {} if request.weights is None else {"weights": str(request.weights)}
    defense = load_defense(request.defense, request.dataset, **options)
    data = load_dataset(request.dataset, "test", request.n, request.seed, request.data_dir)
    check_images(data.x, data.y, defense)
    outliers = _outliers(request, defense, data.x)
    device = Settings(device=request.device).resolve_device()
    defense.to(device)
    try:
        with torch.no_grad():
            exhibit = _examine(request, defense, data, outliers, device)
    finally:
        defense.to("cpu")
    draw_exhibit(exhibit)
    return exhibit


def _outliers(request: ShowRequest, defense: Defense, own: Images) -> Outliers | None:
    if request.against is None:
        return None
    defense.check_score(None)
    return make_outliers(request.against, own, request.n, request.seed, request.data_dir)


def _examine(request: ShowRequest, defense: Defense, data: Dataset, outliers: Outliers | None, device: str) -> Exhibit:
    x, y = data.x.to(device), data.y.to(device)
    with seeded(request.seed, "show", device=device):
        logits = torch.cat([defense(rows) for rows in _batches(x, defense)])
        probabilities = logits.softmax(1)
        right = int((logits.argmax(1) == y).sum())
        return Exhibit(
            request,
            defense.name,
            {name: images.cpu() for name, images in defense.pictures(x[:SHOWN]).items()}
            or {"original": data.x[:SHOWN]},
            Estimate(right / len(y), *wilson(right, len(y))),
            calibration_interval(probabilities, y),
            reliability_table(probabilities, y),
            defense.diagnostics(x, y),
            [] if outliers is None else _scores(defense, x, outliers.x.to(device)),
            "" if outliers is None else outliers.made,
        )


def _scores(defense: Defense, inside: Images, outside: Images) -> list[Scores]:
    found = []
    for kind in defense.detection_scores:
        both = [
            torch.cat([defense.detection_score(rows, kind) for rows in _batches(x, defense)]).cpu()
            for x in (inside, outside)
        ]
        found.append(Scores(kind, both[0], both[1], auroc(both[0], both[1])))
    return found


def _batches(x: Images, defense: Defense) -> Iterable[Images]:
    return x.split(defense.batch_rows or 256)
