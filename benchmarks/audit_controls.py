"""The audit's confusion table: decoys that it must call masked, and sound defenses that it must not.

    python benchmarks/audit_controls.py --n 256 --seeds 0 1 2 --out benchmarks/audit_controls.csv

Takes hours on two cores; `--only NAME` does some, and what is in the CSV file is not repeated.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable
from pathlib import Path

import torch

from robench import Defense, ThreatModel, load_defense
from robench.audit import Audit, audit
from robench.data import load_dataset
from robench.testing.decoys import PLANTED, TRAINED, InputNoise
from robench.types import Images, Logits

BASE = "convnet(width=16)"
DECOYS = {**PLANTED, **TRAINED}
EPS = 0.1
COLUMNS = ("defense", "kind", "n", "seed", "verdict", "failed", "suspect", "named", "clean", "pgd", "seconds")


class Linear(Defense):
    """Softmax regression on the training images: its gradient is the same everywhere."""

    name = "linear"
    num_classes, input_shape = 10, (1, 28, 28)

    def __init__(self, images: int = 5000) -> None:
        """Fits it."""
        super().__init__()
        data = load_dataset("fashion_mnist", "train", images, 0)
        self.layer = torch.nn.Linear(784, 10)
        torch.nn.init.zeros_(self.layer.weight)
        torch.nn.init.zeros_(self.layer.bias)
        optimizer = torch.optim.LBFGS(self.layer.parameters(), max_iter=100)

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(self(data.x), data.y) + 1e-3 * self.layer.weight.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)  # type: ignore[no-untyped-call]
        self.freeze()

    def forward(self, x: Images) -> Logits:
        """Logits of the flat image."""
        logits: Logits = self.layer(x.flatten(1))
        return logits


HONEST: dict[str, Callable[[], Defense]] = {
    "undefended": lambda: load_defense(BASE),
    "adversarially trained": lambda: load_defense("convnet_at(width=16)"),
    "TRADES": lambda: load_defense("robench.testing.decoy_training:Trades"),
    "linear model": Linear,
    "adversarially trained, input noise": lambda: InputNoise(load_defense("convnet_at(width=16)"), sigma=0.05),
    "short run": lambda: load_defense("shortrun"),
}


def main() -> None:
    """Runs what is missing and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=256)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = _read(arguments.out)
    done = {(row["defense"], row["n"], row["seed"]) for row in rows}
    for seed in arguments.seeds:
        for name in arguments.only or [*HONEST, *DECOYS]:
            if (name, str(arguments.n), str(seed)) in done:
                continue
            rows.append(_look(name, arguments.n, seed))
            _write(arguments.out, rows)
            print(rows[-1], flush=True)
    _summarise(rows)


def _look(name: str, n: int, seed: int) -> dict[str, str]:
    count = 32 if name == "short run" else n  # its passes cost a thousand times as much
    data = load_dataset("fashion_mnist", "test", count, seed)
    if name in HONEST:
        found = audit(HONEST[name](), ThreatModel("linf", EPS), data, seed=seed)
        return _row(name, n, found, ())
    planted = DECOYS[name]
    defense = planted.make(load_defense(BASE), data.x, planted.eps)
    return _row(name, n, audit(defense, ThreatModel("linf", planted.eps), data, seed=seed), planted.checks)


def _row(name: str, n: int, found: Audit, wanted: tuple[str, ...]) -> dict[str, str]:
    suspect = [finding.check for finding in found.findings if finding.verdict == "suspect"]
    named = bool(set(wanted) & {*found.failed, *suspect})
    return {
        "defense": name,
        "kind": "decoy" if wanted else "honest",
        "n": str(n),
        "seed": str(found.seed),
        "verdict": found.verdict,
        "failed": " ".join(found.failed),
        "suspect": " ".join(suspect),
        "named": "yes" if named else "no",
        "clean": f"{found.accuracies['clean'][0]:.1f}",
        "pgd": f"{found.accuracies['pgd'][0]:.1f}" if "pgd" in found.accuracies else "",
        "seconds": f"{found.seconds:.0f}",
    }


def _summarise(rows: list[dict[str, str]]) -> None:
    for kind in ("decoy", "honest"):
        mine = [row for row in rows if row["kind"] == kind]
        counts = {verdict: sum(row["verdict"] == verdict for row in mine) for verdict in ("masked", "suspect", "pass")}
        print(kind, counts, "named:", sum(row["named"] == "yes" for row in mine))


def _read(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _write(path: Path, rows: list[dict[str, str]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
