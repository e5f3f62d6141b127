"""Strength and time of the protocol `standard` against AutoAttack's standard version, on the same images and nets.

Takes the images in parts; on each part runs AutoAttack (the package pyautoattack, pip install pyautoattack) and then
robench, so that both meet the same noise of the machine, and compares robust accuracy and the medians of the ratios of
time: processor time, which other programs disturb less (with one thread; threads that wait count too), and time on the
wall. A part that was measured is kept in --cache and not run again. Hours on two cores for a net that withstands.

    python benchmarks/autoattack.py --defense "convnet_at(width=16)" --n 500 --seeds 0 1
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import robench

FIELDS = (
    "defense",
    "eps",
    "seed",
    "images",
    "threads",
    "clean",
    "autoattack_robust",
    "robench_robust",
    "gap_points",
    "only_autoattack_broke",
    "only_robench_broke",
    "autoattack_cpu_s",
    "robench_cpu_s",
    "median_cpu_ratio",
    "median_wall_ratio",
    "robench_precision",
    "robench_passes_per_image",
    "note",
)


def main() -> None:
    """Measures what is missing in the cache and writes the table."""
    options = _parse()
    rows = []
    for name in options.defense:
        defense = robench.load_defense(name, "fashion_mnist")
        for seed in options.seeds:
            x, y = robench.load_data("fashion_mnist", n=options.n, seed=options.draw)
            parts = []
            for start in range(0, options.n, options.part)[: options.parts]:
                part = slice(start, start + options.part)
                parts.append(_part(defense, name, x[part], y[part], seed, start, options))
            rows.append(_row(name, seed, parts, options))
            sys.stdout.write(f"{rows[-1]}\n")
            sys.stdout.flush()
    _merge(options.out, rows)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--defense", nargs="+", default=["convnet", "convnet_at(width=16)"])
    parser.add_argument("--n", type=int, default=500)
    parser.add_argument("--part", type=int, default=125, help="images of one part, and of one batch of both")
    parser.add_argument("--parts", type=int, default=None, help="only the first parts, where time is short")
    parser.add_argument("--eps", type=float, default=0.1)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="of both programs' own draws")
    parser.add_argument("--draw", type=int, default=0, help="seed of the draw of test images")
    parser.add_argument("--protocol", default="standard")
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"))
    parser.add_argument("--cache", type=Path, default=Path("runs/autoattack"))
    return parser.parse_args()


def _part(
    defense: robench.Defense,
    name: str,
    x: torch.Tensor,
    y: torch.Tensor,
    seed: int,
    start: int,
    options: argparse.Namespace,
) -> dict[str, Any]:
    plain = "".join(character if character.isalnum() else "-" for character in name)
    stem = f"{plain}-{options.eps}-{options.draw}-{seed}-{options.n}-{start}-{len(x)}-{torch.get_num_threads()}"
    theirs = _cached(options.cache / f"{stem}-autoattack.json", lambda: _autoattack(defense, x, y, seed, options.eps))
    protocol = f"{options.protocol}-{options.precision}"
    ours = _cached(options.cache / f"{stem}-{protocol}.json", lambda: _robench(defense, x, y, seed, options))
    return {"theirs": theirs, "ours": ours}


def _cached(path: Path, measure: Any) -> dict[str, Any]:
    if not path.exists():
        content = measure()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content), encoding="utf-8")
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _timed(task: Callable[[], Any]) -> tuple[Any, float, float]:
    """The result, seconds on the wall, and seconds of processor time."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = task()
    return result, time.perf_counter() - wall, time.process_time() - cpu


def _autoattack(defense: robench.Defense, x: torch.Tensor, y: torch.Tensor, seed: int, eps: float) -> dict[str, Any]:
    from pyautoattack import AutoAttack

    attack = AutoAttack(defense, norm="Linf", eps=eps, version="standard", seed=seed, device="cpu")
    (x_adv, _), seconds, cpu = _timed(lambda: attack.run_standard_evaluation(x, y, batch_size=len(x)))
    threat = robench.ThreatModel("linf", eps)
    if not bool(threat.contains(x, x_adv).all()):
        sys.stdout.write("AutoAttack left the ball\n")
    with torch.no_grad():
        clean, robust = defense(x).argmax(1) == y, defense(x_adv).argmax(1) == y
    return {"seconds": seconds, "cpu": cpu, "clean": clean.tolist(), "robust": (clean & robust).tolist()}


def _robench(
    defense: robench.Defense, x: torch.Tensor, y: torch.Tensor, seed: int, options: argparse.Namespace
) -> dict[str, Any]:
    threat = robench.ThreatModel("linf", options.eps)
    settings: dict[str, Any] = {"seed": seed, "precision": options.precision, "device": "cpu"}
    found, seconds, cpu = _timed(lambda: robench.evaluate(defense, options.protocol, threat, (x, y), **settings))
    if not found.complete:
        raise SystemExit(f"an attack failed: {found.failures}")
    answers = found.answers("worst")
    right = [] if answers is None else (answers.right > 0).tolist()
    after = {key: estimate.value if estimate else None for key, estimate in found.per_attack.items()}
    return {"seconds": seconds, "cpu": cpu, "robust": right, "passes": sum(found.queries().values()), "after": after}


def _row(name: str, seed: int, parts: list[dict[str, Any]], options: argparse.Namespace) -> dict[str, Any]:
    clean = [flag for part in parts for flag in part["theirs"]["clean"]]
    theirs = [flag for part in parts for flag in part["theirs"]["robust"]]
    ours = [flag for part in parts for flag in part["ours"]["robust"]]
    pairs = list(zip(theirs, ours, strict=True))
    n = len(clean)
    return {
        "defense": name,
        "eps": options.eps,
        "seed": seed,
        "images": n,
        "threads": torch.get_num_threads(),
        "clean": round(sum(clean) / n, 4),
        "autoattack_robust": round(sum(theirs) / n, 4),
        "robench_robust": round(sum(ours) / n, 4),
        "gap_points": round(100 * (sum(ours) - sum(theirs)) / n, 2),
        "only_autoattack_broke": sum(our and not their for their, our in pairs),
        "only_robench_broke": sum(their and not our for their, our in pairs),
        "autoattack_cpu_s": round(sum(part["theirs"]["cpu"] for part in parts), 1),
        "robench_cpu_s": round(sum(part["ours"]["cpu"] for part in parts), 1),
        "median_cpu_ratio": _median_ratio(parts, "cpu"),
        "median_wall_ratio": _median_ratio(parts, "seconds"),
        "robench_precision": options.precision,
        "robench_passes_per_image": round(statistics.mean(part["ours"]["passes"] for part in parts), 1),
    }


def _median_ratio(parts: list[dict[str, Any]], clock: str) -> float:
    return round(statistics.median(part["ours"][clock] / part["theirs"][clock] for part in parts), 3)


def _merge(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes the rows; those of other nets, seeds or precisions that the file holds stay."""
    key = ("defense", "eps", "seed", "images", "robench_precision")
    kept = []
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            kept = list(csv.DictReader(file))
    new = {tuple(str(row[name]) for name in key) for row in rows}
    kept = [row for row in kept if tuple(row[name] for name in key) not in new]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows([*kept, *rows])


if __name__ == "__main__":
    main()
