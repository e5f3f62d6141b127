"""What one step of Short Run's stage 3 costs: autograd's graph of the chain, the chain by hand, and in bfloat16.

Interleaved: each repetition times all three on the same batch, and ratios are to autograd in the same repetition; the
table gives medians and ranges. Beside it stands the relative error of the generator's gradient against autograd's. On
a machine that does other work take --clock cpu: the processor time of this process, on one thread.

    python benchmarks/shortrun_training.py --threads 1 --clock cpu
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import cast
from unittest import mock

import torch
from torch import Tensor

import robench
from robench.defenses.shortrun import ShortRun
from robench.defenses.shortrun import model as shortrun_model
from robench.rng import seeded

PATHS = ("autograd", "by hand", "by hand, bfloat16")


def main() -> None:
    """Measures and writes the table beside this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = time.perf_counter if options.clock == "wall" else time.process_time
    with seeded("benchmark weights"):
        model = ShortRun()
    x, y = robench.load_data("fashion_mnist", "test", options.images)
    expected = gradient(model, x, y, PATHS[0])
    times: dict[str, list[float]] = {path: [] for path in PATHS}
    errors = {}
    for path in PATHS:  # also warms up
        errors[path] = ((gradient(model, x, y, path) - expected).norm() / expected.norm()).item()
    for _ in range(options.repeats):
        for path in PATHS:
            times[path].append(measure(clock, model, x, y, path))
    with options.out.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["path", "images", "seconds", "ratio", "ratio_low", "ratio_high", "gradient_error", "clock"])
        for path, seconds in times.items():
            ratios = [mine / base for mine, base in zip(seconds, times[PATHS[0]], strict=True)]
            figures = [statistics.median(seconds), statistics.median(ratios), min(ratios), max(ratios)]
            row = [path, options.images, *(f"{figure:.3f}" for figure in figures), f"{errors[path]:.2g}", options.clock]
            writer.writerow(row)


def measure(clock: Callable[[], float], model: ShortRun, x: Tensor, y: Tensor, path: str) -> float:
    """Seconds of one gradient."""
    start = clock()
    gradient(model, x, y, path)
    return clock() - start


def gradient(model: ShortRun, x: Tensor, y: Tensor, path: str) -> Tensor:
    """Takes the gradient of stage 3's cross-entropy in all weights; returns that of the generator as one vector."""
    model.zero_grad()
    model.sweep_dtype = torch.bfloat16 if path == PATHS[2] else None
    with mock.patch.object(shortrun_model, "can_sweep", return_value=path != PATHS[0]), seeded("benchmark"):
        loss = torch.nn.functional.cross_entropy(model.classifier(model.infer_differentiably(x)), y)
        loss.backward()
    return torch.cat([cast("Tensor", parameter.grad).flatten() for parameter in model.generator.parameters()])


if __name__ == "__main__":
    main()
