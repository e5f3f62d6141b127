"""How long boundary and hopskipjump take for a query against foolbox's, and how near they come in as many queries.

In each round foolbox attacks the images, its queries are counted, and then ours may ask as many. One interleaved run on
the undefended ConvNet; prints medians over the rounds and keeps them as CSV. The images are right, and uniform noise is
wrong for them: where foolbox finds no start for one, it attacks none. About two minutes for each attack on one idle CPU
core at the defaults; `--attack` runs one and leaves the others' rows as they are.

    python benchmarks/boundary.py
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import foolbox
import torch
from torch import Tensor

import robench
from robench.rng import seeded


@dataclass
class Case:
    """One comparison.

    Attributes:
        attack: ours.
        norm: its norm.
        peer: foolbox's.
    """

    attack: str
    norm: str
    peer: Any


CASES = {
    "boundary l2": Case("boundary", "l2", foolbox.attacks.BoundaryAttack(steps=200)),
    "hopskipjump l2": Case("hopskipjump", "l2", foolbox.attacks.HopSkipJumpAttack(steps=2)),
    "hopskipjump linf": Case("hopskipjump", "linf", foolbox.attacks.HopSkipJumpAttack(steps=2, constraint="linf")),
}


@dataclass
class Tally:
    """What one of the two needed and reached: seconds and queries of each round, distances of all images."""

    seconds: list[float] = field(default_factory=list)
    queries: list[int] = field(default_factory=list)
    distances: list[float] = field(default_factory=list)

    def per_query(self) -> list[float]:
        """Seconds for a query, by round."""
        return [seconds / queries for seconds, queries in zip(self.seconds, self.queries, strict=True)]


class Bench:
    """The defense, the images, and a count of the rows that it answers."""

    def __init__(self, images: int) -> None:
        """Takes the first images that are right and for which uniform noise is wrong."""
        self.defense = robench.load_defense("convnet", "fashion_mnist")
        x, y = robench.load_data("fashion_mnist", n=64)
        with torch.no_grad(), seeded("noise"):
            noise = self.defense(torch.rand_like(x)).argmax(1).mode().values
            rows = ((self.defense(x).argmax(1) == y) & (y != noise)).nonzero()[:images, 0]
        self.x, self.y = x[rows], y[rows]
        self.rows_asked = 0
        self.defense.register_forward_hook(self._count)

    def _count(self, module: Any, inputs: Any, output: Tensor) -> None:
        del module, inputs
        self.rows_asked += len(output)

    def compare(self, case: Case, rounds: int) -> dict[str, Any]:
        """Runs both `rounds` times in turn."""
        model = foolbox.PyTorchModel(self.defense, bounds=(0, 1), device="cpu")
        threat = robench.ThreatModel(case.norm, 28 if case.norm == "l2" else 1)
        ours, peer = Tally(), Tally()
        for number in range(rounds):
            self._run(lambda: case.peer.run(model, self.x, self.y), threat, number, peer)
            attack = robench.load_attack(case.attack, queries=peer.queries[-1])
            victim = robench.Victim(self.defense, attack.access, len(self.x))
            self._run(lambda one=attack, of=victim: one(of, self.x, self.y, threat), threat, number, ours)
        pairs = zip(ours.per_query(), peer.per_query(), strict=True)
        return {
            "images": len(self.x),
            "rounds": rounds,
            "foolbox_queries": round(statistics.median(peer.queries)),
            "ours_queries": round(statistics.median(ours.queries)),
            "foolbox_s": round(statistics.median(peer.seconds), 3),
            "ours_s": round(statistics.median(ours.seconds), 3),
            "ratio_per_query": round(statistics.median(one / other for one, other in pairs), 3),
            "foolbox_median_distance": round(statistics.median(peer.distances), 4),
            "ours_median_distance": round(statistics.median(ours.distances), 4),
        }

    def _run(self, attack: Callable[[], Tensor], threat: robench.ThreatModel, number: int, tally: Tally) -> None:
        self.rows_asked = 0
        with seeded("round", number):
            start = time.perf_counter()
            found = attack()
            tally.seconds.append(time.perf_counter() - start)
        tally.queries.append(self.rows_asked // len(self.x))
        tally.distances += threat.distance(self.x, found).tolist()


def main() -> None:
    """Runs the benchmark."""
    options = _parse()
    bench = Bench(options.images)
    rows = _read(options.out)
    for name in [options.attack] if options.attack else list(CASES):
        rows[name] = {"attack": name, **bench.compare(CASES[name], options.rounds)}
        _write(options.out, [rows[known] for known in CASES if known in rows])
    for column in rows[next(iter(rows))]:
        sys.stdout.write(f"{column:24s}" + "".join(f"{row[column]!s:>18s}" for row in rows.values()) + "\n")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--attack", choices=list(CASES))
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"))
    return parser.parse_args()


def _read(path: Path) -> dict[str, dict[str, Any]]:
    if not path.exists():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        return {row["attack"]: row for row in csv.DictReader(file)}


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
