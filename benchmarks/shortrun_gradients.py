"""How strong each gradient of the Short Run classifier is, and whether more EOT or steps would change the answer.

Runs protocol quick-1 (FGSM and PGD, along the unrolled gradient and along the last Langevin step's alone), then PGD
with twice the steps and PGD with twice the EOT samples, all on the same images, and compares each with PGD along the
unrolled gradient, paired over the images. Writes one CSV row per attack and, with --card, the same into the model card.
About 25 minutes on two CPU cores at the defaults; the run folder of the protocol is kept for the leaderboard.

    python benchmarks/shortrun_gradients.py --card
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt

import robench
from robench.estimate import Answers
from robench.registry import resolve
from robench.result import Evaluation
from robench.stats import paired_interval
from robench.weights import weights_folder

BASE = "pgd"


def main() -> None:
    """Runs the study."""
    options = _parse()
    defense = robench.load_defense("shortrun", "fashion_mnist")
    steps = robench.load_attack(BASE).passes() // 2
    first = _evaluate(defense, "quick", options.eot, options, folder=options.runs / "protocol")
    reference = _fractions(first.answers(BASE))
    rows = [_row("clean", first, "clean", reference)]
    rows += [_row(entry.key, first, entry.key, reference) for entry in first.spec.attacks]
    _write(options.out, rows)
    for attack, eot in ((f"pgd(steps={2 * steps})", options.eot), (BASE, 2 * options.eot)):
        found = _evaluate(defense, attack, eot, options, folder=options.runs / f"{attack}-eot{eot}")
        rows.append(_row(f"{attack}, EOT {eot}", found, attack, reference))
        _write(options.out, rows)
    if options.card:
        _add_to_card(rows)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=64)
    parser.add_argument("--eps", type=float, default=0.1)
    parser.add_argument("--eot", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"))
    parser.add_argument("--runs", type=Path, default=Path("runs/shortrun-gradients"), help="run folders go here")
    parser.add_argument("--card", action="store_true", help="write the figures into the model card")
    return parser.parse_args()


def _evaluate(
    defense: robench.Defense, attack: str, eot: int, options: argparse.Namespace, *, folder: Path
) -> Evaluation:
    if (folder / "result.json").exists():  # finished by an earlier, interrupted call
        return Evaluation.load(folder)
    return robench.evaluate(
        defense,
        attack,
        robench.ThreatModel("linf", options.eps),
        "fashion_mnist",
        n=options.n,
        eot=eot,
        judge_repeats=options.repeats,
        out=folder,
        resume=folder.exists(),
        progress=True,
        defense_spec="shortrun",
    )


def _fractions(answers: Answers | None) -> npt.NDArray[np.float64]:
    if answers is None:
        raise SystemExit("an attack failed; see the run folder")
    return answers.right / answers.repeats


def _row(label: str, found: Evaluation, key: str, reference: npt.NDArray[np.float64]) -> dict[str, str | float]:
    answers = found.answers(key)
    fractions = _fractions(answers)
    estimate = answers.accuracy() if answers is not None else None
    gap, low, high = paired_interval(reference, fractions)
    queries = found.table[found.table["attack"] == key]
    row: dict[str, str | float] = {
        "attack": label,
        "eps": 0.0 if key == "clean" else found.spec.eps[-1],
        "eot": found.spec.eot,
        "n": found.spec.n,
        "judge_repeats": found.spec.judge_repeats,
        "accuracy": round(estimate.value, 4) if estimate else "",
        "low": round(estimate.low, 4) if estimate else "",
        "high": round(estimate.high, 4) if estimate else "",
        "minus_pgd": round(gap, 4),
        "minus_pgd_low": round(low, 4),
        "minus_pgd_high": round(high, 4),
        "backwards_per_image": round(float(queries["backwards"].mean()), 1),
    }
    sys.stdout.write(f"{row}\n")
    sys.stdout.flush()
    return row


def _write(path: Path, rows: list[dict[str, str | float]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _add_to_card(rows: list[dict[str, str | float]]) -> None:
    path = weights_folder(resolve("defense", "shortrun")) / "fashion_mnist.json"
    card = json.loads(path.read_text(encoding="utf-8"))
    card["attacks"] = rows
    path.write_text(json.dumps(card, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
