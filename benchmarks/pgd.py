"""Speed of `pgd` against a bare loop, foolbox and torchattacks on the thesis's ConvNet, undefended and trained.

Everything takes the same net, the same batch, the same number of steps and the same step size, in turn within each
round; the figures are medians over the rounds of ratios of processor time, which other programs disturb less than time
on the wall (run it with one thread: threads that wait count too). `bare loop` is 40 forward and backward passes and the
sign step, nothing else; it is compared with the attack itself while no image may leave. The peers are compared with
the whole of `robench.evaluate`: clean pass, attack, judge.

    python benchmarks/pgd.py --rounds 5
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

import robench
from robench.rng import seeded

STEPS, STEP = 40, 2.5 / 40
Measure = Callable[[], float]


def main() -> None:
    """Runs the rounds and writes the table."""
    options = _parse()
    x, y = robench.load_data("fashion_mnist", n=options.n)
    rows = []
    for name in options.defense:
        defense = robench.load_defense(name, "fashion_mnist")
        seconds, robust = _measure(name, _tasks(defense, x, y, options.eps), options.rounds)
        rows += _rows(name, seconds, robust, options)
    with options.out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        sys.stdout.write(f"{row}\n")


def _measure(name: str, tasks: dict[str, Measure], rounds: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    seconds: dict[str, list[float]] = {what: [] for what in tasks}
    robust: dict[str, float] = {}
    for number in range(rounds):
        for what, task in tasks.items():
            with seeded("benchmark", number):
                started = time.process_time()
                robust[what] = task()
                seconds[what].append(time.process_time() - started)
        latest = {what: round(times[-1], 1) for what, times in seconds.items()}
        sys.stdout.write(f"{name}, round {number + 1} of {rounds}: {latest}\n")
        sys.stdout.flush()
    return seconds, robust


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--defense", nargs="+", default=["convnet", "convnet_at"])
    parser.add_argument("--n", type=int, default=128)
    parser.add_argument("--eps", type=float, default=0.1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"))
    return parser.parse_args()


def _tasks(defense: robench.Defense, x: torch.Tensor, y: torch.Tensor, eps: float) -> dict[str, Measure]:
    """What is timed; each returns the robust accuracy that it leaves."""
    threat = robench.ThreatModel("linf", eps)

    def accuracy(x_adv: torch.Tensor) -> float:
        with torch.no_grad():
            return (defense(x_adv).argmax(1) == y).float().mean().item()

    def bare_loop() -> float:
        x_adv = threat.random_start(x)
        for _ in range(STEPS):
            leaf = x_adv.detach().requires_grad_()
            (grad,) = torch.autograd.grad(functional.cross_entropy(defense(leaf), y, reduction="sum"), leaf)
            x_adv = (x + (x_adv + STEP * eps * grad.sign() - x).clamp(-eps, eps)).clamp(0, 1)
        return float("nan")

    def attack_alone() -> float:
        attack = robench.load_attack("pgd", steps=STEPS, keep="last", stop_early=False)
        attack(robench.Victim(defense, attack.access, len(x)), x, y, threat)
        return float("nan")

    def evaluate(precision: str) -> float:
        found = robench.evaluate(
            defense, f"pgd(steps={STEPS})", threat, (x, y), unit_size=len(x), precision=precision, device="cpu"
        )
        return found.robust_accuracy.value if found.robust_accuracy else float("nan")

    def foolbox_pgd() -> float:
        with warnings.catch_warnings(action="ignore"):
            import foolbox
        model = foolbox.PyTorchModel(defense, bounds=(0, 1), device="cpu")
        attack = foolbox.attacks.LinfPGD(steps=STEPS, rel_stepsize=STEP)
        _, x_adv, _ = attack(model, x, y, epsilons=eps)
        return accuracy(x_adv)

    def torchattacks_pgd() -> float:
        import torchattacks

        return accuracy(torchattacks.PGD(defense, eps=eps, alpha=STEP * eps, steps=STEPS)(x, y))

    return {
        "bare loop": bare_loop,
        "robench, no image leaves": attack_alone,
        "robench": lambda: evaluate("float32"),
        "robench, bfloat16": lambda: evaluate("bfloat16"),
        "foolbox": foolbox_pgd,
        "torchattacks": torchattacks_pgd,
    }


def _rows(
    name: str, seconds: dict[str, list[float]], robust: dict[str, float], options: argparse.Namespace
) -> list[dict[str, Any]]:
    faster = min(("foolbox", "torchattacks"), key=lambda what: statistics.median(seconds[what]))
    rows = []
    for what, times in seconds.items():
        base = "bare loop" if what in ("bare loop", "robench, no image leaves") else faster
        ratios = [one / other for one, other in zip(times, seconds[base], strict=True)]
        rows.append(
            {
                "defense": name,
                "what": what,
                "images": options.n,
                "steps": STEPS,
                "threads": torch.get_num_threads(),
                "rounds": len(times),
                "robust_accuracy": "" if robust[what] != robust[what] else round(robust[what], 4),
                "median_cpu_s": round(statistics.median(times), 2),
                "compared_with": base,
                "median_ratio": round(statistics.median(ratios), 3),
            }
        )
    return rows


if __name__ == "__main__":
    main()
