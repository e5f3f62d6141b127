"""How strong each gradient of the Short Run classifier is, and whether more EOT or steps would change the answer.

Attacks the same images with FGSM and PGD along the unrolled gradient and along the last Langevin step's alone, then
doubles the steps and the EOT samples of the strongest. Writes one CSV row per attack and, with --card, the same figures
into the model card of the weights. About half an hour on two CPU cores at the defaults.

    python benchmarks/shortrun_gradients.py --n 64 --eps 0.1 --card
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import time
from pathlib import Path

import numpy as np

import robench
from robench.result import Evaluation
from robench.stats import paired_interval
from robench.weights import weights_folder

COLUMNS = (
    "attack",
    "steps",
    "eot",
    "eps",
    "n",
    "judge_repeats",
    "accuracy",
    "low",
    "high",
    "vs_base",
    "vs_low",
    "vs_high",
    "seconds",
)


def main() -> None:
    """Runs the study."""
    options = _parse()
    defense = robench.load_defense("shortrun", "fashion_mnist")
    steps, eot = options.steps, options.eot
    base = f"pgd(steps={steps})"
    plan = [
        (base, eot),
        (f"{base}@last_step", eot),
        ("fgsm", eot),
        (f"pgd(steps={2 * steps})", eot),
        (base, 2 * eot),
    ]
    rows, reference = [], None
    for attack, samples in plan:
        start = time.monotonic()
        found = robench.evaluate(
            defense,
            attack,
            robench.ThreatModel("linf", options.eps),
            "fashion_mnist",
            n=options.n,
            eot=samples,
            judge_repeats=options.repeats,
            progress=True,
        )
        reference = reference or found
        row = _row(found, attack, samples, reference) | {"seconds": f"{time.monotonic() - start:.0f}"}
        if not rows:
            rows.append({"attack": "clean", **_clean(found)})
        rows.append(row)
        _write(options.out, rows)
        sys.stdout.write(f"{row}\n")
        sys.stdout.flush()
    if options.card:
        _add_to_card(rows)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=64)
    parser.add_argument("--eps", type=float, default=0.1)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--eot", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"))
    parser.add_argument("--card", action="store_true", help="write the figures into the model card")
    return parser.parse_args()


def _fractions(found: Evaluation, name: str) -> np.ndarray:
    answers = found.answers(name)
    if answers is None:
        raise SystemExit(f"{name} failed")
    return answers.right / answers.repeats


def _clean(found: Evaluation) -> dict[str, str]:
    estimate = found.clean_accuracy
    return {
        "n": str(found.spec.n),
        "judge_repeats": str(found.spec.judge_repeats),
        "accuracy": f"{estimate.value:.4f}",
        "low": f"{estimate.low:.4f}",
        "high": f"{estimate.high:.4f}",
    }


def _row(found: Evaluation, attack: str, eot: int, reference: Evaluation) -> dict[str, str]:
    estimate = found.robust_accuracy
    if estimate is None:
        raise SystemExit(f"{attack} failed")
    key, first = found.spec.attacks[0].key, reference.spec.attacks[0].key
    gap, low, high = paired_interval(_fractions(reference, first), _fractions(found, key))
    steps = attack.partition("steps=")[2].partition(")")[0] or "1"
    return {
        "attack": key,
        "steps": steps,
        "eot": str(eot),
        "eps": f"{found.spec.eps[-1]:g}",
        "n": str(found.spec.n),
        "judge_repeats": str(found.spec.judge_repeats),
        "accuracy": f"{estimate.value:.4f}",
        "low": f"{estimate.low:.4f}",
        "high": f"{estimate.high:.4f}",
        "vs_base": f"{gap:+.4f}",
        "vs_low": f"{low:+.4f}",
        "vs_high": f"{high:+.4f}",
    }


def _write(path: Path, rows: list[dict[str, str]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n", restval="")
        writer.writeheader()
        writer.writerows(rows)


def _add_to_card(rows: list[dict[str, str]]) -> None:
    from robench.registry import resolve

    path = weights_folder(resolve("defense", "shortrun")) / "fashion_mnist.json"
    card = json.loads(path.read_text(encoding="utf-8"))
    card["attacks"] = rows
    path.write_text(json.dumps(card, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
