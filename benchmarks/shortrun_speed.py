"""What a gradient of the Short Run classifier costs, against the inference of the same chains alone.

Times, in one interleaved run, the inference of images * eot chains without gradient and one EOT gradient of them by
each path: autograd's graph of the whole chain (`create_graph`), the chain differentiated by hand, and the latter with
each step recomputed on the way back. Ratios are to the inference of the same repetition; the table gives their median
and range. One Langevin step is timed as well, with the ways of torch that are not kept: a Hessian-vector product by
torch.func, and the first-order sweep under torch.compile (--compile; it needs a C++ compiler). Then the peak memory of
one gradient, each in a process of its own, in one pass over all chains and in the parts that the engine passes (Linux).

On a machine that does other work take --clock cpu: the processor time of this process, on one thread.

    python benchmarks/shortrun_speed.py --threads 1
"""

from __future__ import annotations

import argparse
import csv
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import cast
from unittest import mock

import torch
from torch import Tensor

import robench
from robench.defenses.shortrun import ShortRun
from robench.defenses.shortrun import model as shortrun_model
from robench.defenses.shortrun.chain import Sweeps
from robench.rng import seeded

PATHS = ("create_graph", "by hand", "by hand, recomputed")
INFERENCE = "inference"
Row = dict[str, str | float]


def main() -> None:
    """Runs the study."""
    options = _parse()
    torch.set_num_threads(options.threads)
    rows = _chains(options) + _steps(options)
    _write(options.out, rows)
    if not options.no_memory:
        rows += _memory(options)
        _write(options.out, rows)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--eot", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--rows", type=int, nargs="+", help="rows of one pass; several to compare (default: the model's)"
    )
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--compile", action="store_true", help="also time the first-order sweep under torch.compile")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"))
    return parser.parse_args()


def _load(rows: int | None = None) -> ShortRun:
    model = cast("ShortRun", robench.load_defense("shortrun", "fashion_mnist"))
    if rows is not None:
        model.batch_rows = rows
    return model


@contextmanager
def _path(model: ShortRun, path: str) -> Iterator[None]:
    by_hand = path != "create_graph"
    model.recompute = path.endswith("recomputed")
    with mock.patch.object(shortrun_model, "can_sweep", return_value=by_hand):
        yield


def _gradient(model: ShortRun, path: str, x: Tensor, y: Tensor, eot: int) -> None:
    with _path(model, path), seeded(0, "speed"):
        robench.Victim(model, "gradient", len(x), eot=eot).gradient(x, y, "ce")


def _infer(model: ShortRun, path: str, x: Tensor, eot: int) -> None:
    with _path(model, path), seeded(0, "speed"), torch.no_grad():
        model.infer(x.repeat(eot, 1, 1, 1))


def _chains(options: argparse.Namespace) -> list[Row]:
    """Times whole chains: inference and gradients, interleaved."""
    model, chains = _load(), options.images * options.eot
    x, y = robench.load_data("fashion_mnist", "test", options.images, seed=0)
    for path in PATHS:
        _gradient(model, path, x[:2], y[:2], 1)  # whatever torch sets up on its first calls
    runs: dict[tuple[str, int], Callable[[], None]] = {
        (INFERENCE, shortrun_model.CHAIN_ROWS): lambda: _infer(model, "by hand", x, options.eot),
        ("inference by autograd", shortrun_model.CHAIN_ROWS): lambda: _infer(model, "create_graph", x, options.eot),
    }
    for rows in options.rows or [model.batch_rows]:
        for path in PATHS:

            def run(path: str = path, rows: int = rows) -> None:
                model.batch_rows = rows
                _gradient(model, path, x, y, options.eot)

            runs[path, rows] = run
    return _table(_interleave(runs, options), f"{chains} chains", chains, options)


def _steps(options: argparse.Namespace) -> list[Row]:
    """Times one Langevin step of one pass, to first and second order, by the ways that torch has and by hand."""
    model = _load()
    rows = model.batch_rows
    x, _ = robench.load_data("fashion_mnist", "test", rows, seed=0)
    target, sweeps = 2 * x - 1, Sweeps(model.generator)
    with seeded(0, "speed"):
        z, a = torch.randn(rows, 200), torch.randn(rows, 200)

    def misfit(z: Tensor) -> Tensor:
        return (model.generate(z) - target).square().sum() / 2

    def by_autograd() -> None:
        leaf = z.clone().requires_grad_()
        torch.autograd.grad(misfit(leaf), leaf)

    def by_create_graph() -> None:
        leaf = z.clone().requires_grad_()
        (pull,) = torch.autograd.grad(misfit(leaf), leaf, create_graph=True)
        torch.autograd.grad(pull, leaf, a)

    def by_torch_func() -> None:
        torch.func.jvp(torch.func.grad(misfit), (z,), (a,))

    @torch.no_grad()
    def by_hand() -> None:
        _, records = sweeps.pull(z, target, record=True)
        image, tangents = sweeps.push(a, records)
        sweeps.pull_tangent(image, records, tangents)

    def first_order(sweep: Callable[..., Tensor]) -> Callable[[], None]:
        @torch.no_grad()
        def run() -> None:
            sweep(z, target)

        return run

    def sweep(z: Tensor, target: Tensor) -> Tensor:
        return sweeps.pull(z, target, record=False)[0]

    runs = {
        (INFERENCE, rows): first_order(sweep),
        ("first order, autograd", rows): by_autograd,
        ("second order, create_graph", rows): by_create_graph,
        ("second order, torch.func", rows): by_torch_func,
        ("second order, by hand", rows): by_hand,
    }
    if options.compile:
        runs["first order, by hand, torch.compile", rows] = first_order(torch.compile(sweep))
    return _table(_interleave(runs, options, often=10), "one step", rows, options)


def _interleave(
    runs: dict[tuple[str, int], Callable[[], None]], options: argparse.Namespace, often: int = 1
) -> dict[tuple[str, int], list[float]]:
    """Seconds of each repetition of each run."""
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    seconds: dict[tuple[str, int], list[float]] = {key: [] for key in runs}
    for _ in range(options.repeats * often):
        for key, run in runs.items():
            start = clock()
            run()
            seconds[key].append(clock() - start)
    return seconds


def _table(
    seconds: dict[tuple[str, int], list[float]], what: str, chains: int, options: argparse.Namespace
) -> list[Row]:
    """One row per run; prints the table."""
    base = next(found for (path, _), found in seconds.items() if path == INFERENCE)
    rows: list[Row] = []
    print(f"{what}, {options.threads} threads, {options.clock} clock: milliseconds, and ratio to the inference alone")
    for (path, per_pass), found in seconds.items():
        ratios = [mine / alone for mine, alone in zip(found, base, strict=True)]
        row: Row = {
            "what": what,
            "path": path,
            "chains": chains,
            "rows_per_pass": per_pass,
            "threads": options.threads,
            "clock": options.clock,
            "median_ms": round(1e3 * statistics.median(found), 2),
            "ratio": round(statistics.median(ratios), 3),
            "ratio_low": round(min(ratios), 3),
            "ratio_high": round(max(ratios), 3),
        }
        spread = f"[{row['ratio_low']}, {row['ratio_high']}]"
        print(f"  {path:36} {per_pass:4} rows  {row['median_ms']:10} ms  {row['ratio']:6} {spread}")
        rows.append(row)
    return rows


def _memory(options: argparse.Namespace) -> list[Row]:
    """Peak memory of one gradient, above that of the loaded model: one fresh process each."""
    rows: list[Row] = []
    print("peak memory of one gradient")
    n = options.images
    cases = ((n // 4, False), (n // 2, False), (n, False), (n, True))
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        for path, (images, in_parts) in itertools.product(PATHS, cases):
            chains = images * options.eot
            per_pass, peak = pool.submit(_peak, path, images, options.eot, in_parts).result()
            row: Row = {"what": "peak memory", "path": path, "chains": chains, "rows_per_pass": per_pass, "threads": 1}
            rows.append({**row, "peak_mib": round(peak)})
            print(f"  {path:36} {chains:4} chains  {per_pass:4} rows  {peak:8.0f} MiB")
    return rows


def _peak(path: str, images: int, eot: int, in_parts: bool) -> tuple[int, float]:
    """Rows of one pass, and how far a gradient lifts the peak of this process, in MiB."""
    torch.set_num_threads(1)
    model = _load(None if in_parts else images * eot)
    x, y = robench.load_data("fashion_mnist", "test", images, seed=0)
    _gradient(model, path, x[:1], y[:1], 1)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts anew from what is held now
    before = _resident("VmRSS")
    _gradient(model, path, x, y, eot)
    return model.batch_rows, _resident("VmHWM") - before


def _resident(entry: str) -> float:
    """The process's resident memory in MiB: VmRSS now, VmHWM at its peak."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split(f"{entry}:")[1].split()[0]) / 1024


def _write(path: Path, rows: list[Row]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
