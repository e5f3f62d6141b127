"""Speed and strength of the pointwise attack against foolbox's, in one interleaved run on the same images.

The images are those that the defense gets right, in blocks. On each block foolbox's PointwiseAttack runs (in l0 without
its search for a smaller l2 distance), then each of ours. Seconds are CPU seconds of this process on one thread. `ratio`
is the median over the blocks of our time over foolbox's; queries are forward passes per image. About 10 minutes on an
idle CPU core at the defaults.

    python benchmarks/pointwise.py
"""

from __future__ import annotations

import argparse
import csv
import time
from dataclasses import dataclass, field
from pathlib import Path

import foolbox
import torch

import robench
from robench.defense import Defense
from robench.rng import foreign_generators, seeded
from robench.types import Images, Labels

PEER = "foolbox"
WIDE = {"linf": 1.0}
"""Bounds that hold all images; else the number of values."""


@dataclass
class Measured:
    """What one attack cost and reached.

    Attributes:
        seconds: CPU seconds of each block.
        distances: of each image, in the norm.
        queries: forward passes of each block's images together.
    """

    seconds: list[float] = field(default_factory=list)
    distances: list[float] = field(default_factory=list)
    queries: list[int] = field(default_factory=list)


def main() -> None:
    """Runs the comparison."""
    options = _parse()
    torch.set_num_threads(1)
    defense = robench.load_defense(options.defense, "fashion_mnist")
    x, y = _right_images(defense, options.images)
    rows = [row for norm in options.norms for row in _compare(norm, defense, x, y, options)]
    for key in rows[0]:
        print(f"{key:20}", *(f"{row[key]!s:>36}" for row in rows))
    with options.out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _compare(
    norm: str, defense: Defense, x: Images, y: Labels, options: argparse.Namespace
) -> list[dict[str, str | float]]:
    """A row for each of our attacks in one norm."""
    threat = robench.ThreatModel(norm, WIDE.get(norm, x[0].numel()))
    found = {name: Measured() for name in (PEER, *options.attacks)}
    blocks = zip(x.split(options.block), y.split(options.block), strict=True)
    for number, (images, labels) in enumerate(blocks):
        for name, measured in found.items():
            with seeded("benchmark", number, name), foreign_generators():
                _measure(name, measured, defense, images, labels, threat)
    return [{"norm": norm} | _row(name, found[name], found[PEER], options.defense, len(x)) for name in options.attacks]


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--defense", default="convnet")
    parser.add_argument("--norms", nargs="+", default=["l0", "l2", "linf"])
    parser.add_argument("--images", type=int, default=24)
    parser.add_argument("--block", type=int, default=8, help="images in one batch, of foolbox and of ours")
    parser.add_argument("--attacks", nargs="+", default=["pointwise", "pointwise(restarts=3)"])
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"))
    return parser.parse_args()


def _right_images(defense: Defense, count: int) -> tuple[Images, Labels]:
    x, y = robench.load_data("fashion_mnist", n=2 * count)
    with torch.no_grad():
        right = (defense(x).argmax(1) == y).nonzero()[:count, 0]
    return x[right], y[right]


def _measure(
    name: str, measured: Measured, defense: Defense, x: Images, y: Labels, threat: robench.ThreatModel
) -> None:
    asked: list[int] = []
    hook = defense.register_forward_hook(lambda module, inputs, output: asked.append(len(output)))
    began = time.process_time()
    x_adv = _run_peer(defense, x, y, threat) if name == PEER else _run_ours(name, defense, x, y, threat)
    measured.seconds.append(time.process_time() - began)
    hook.remove()
    with torch.no_grad():
        if bool((defense(x_adv).argmax(1) == y).any()):
            raise SystemExit(f"{name} left an image right")
    measured.distances += threat.distance(x, x_adv).tolist()
    measured.queries.append(sum(asked))


def _run_peer(defense: Defense, x: Images, y: Labels, threat: robench.ThreatModel) -> Images:
    model = foolbox.PyTorchModel(defense, bounds=(0, 1), device="cpu")
    attack = foolbox.attacks.PointwiseAttack(l2_binary_search=threat.norm != "l0")
    return attack.run(model, x, foolbox.criteria.Misclassification(y))


def _run_ours(spec: str, defense: Defense, x: Images, y: Labels, threat: robench.ThreatModel) -> Images:
    attack = robench.load_attack(spec)
    victim = robench.Victim(defense, attack.access, len(x))
    return attack(victim, x, y, threat)


def _row(name: str, ours: Measured, peer: Measured, defense: str, images: int) -> dict[str, str | float]:
    ratios = [mine / theirs for mine, theirs in zip(ours.seconds, peer.seconds, strict=True)]
    row: dict[str, str | float] = {
        "what": f"{name} on {defense}",
        "images": images,
        "blocks": len(ratios),
        "ours_s": round(sum(ours.seconds), 2),
        "foolbox_s": round(sum(peer.seconds), 2),
        "ratio": round(_median(ratios), 4),
        "ratio_low": round(min(ratios), 4),
        "ratio_high": round(max(ratios), 4),
    }
    for label, measured in (("ours", ours), (PEER, peer)):
        row[f"{label}_median"] = round(_median(measured.distances), 4)
        row[f"{label}_mean"] = round(sum(measured.distances) / images, 4)
        row[f"{label}_queries"] = round(sum(measured.queries) / images, 1)
    return row


def _median(values: list[float]) -> float:
    return float(torch.tensor(values).quantile(0.5))


if __name__ == "__main__":
    main()
