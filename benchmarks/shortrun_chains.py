"""Accuracy of the Short Run classifier by number of chains and by aggregate, written into the model card.

python benchmarks/shortrun_chains.py --dataset fashion_mnist --n 500
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any, cast

import torch

import robench
from robench.defenses.shortrun import ShortRun
from robench.rng import seeded
from robench.stats import wilson
from robench.weights import weights_folder

CHAINS = (1, 5, 10, 20)


def main() -> None:
    """Measures and writes the card's entries `chains` and `stage_3_gain`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=500)
    parser.add_argument("--dataset", default="fashion_mnist")
    options = parser.parse_args()
    count, dataset = options.n, options.dataset
    model = cast("ShortRun", robench.load_defense("shortrun", dataset))
    x, y = robench.load_data(dataset, "test", count, seed=0)
    with torch.no_grad(), seeded(0, "chains"):
        codes = torch.stack([model.infer(x) for _ in range(max(CHAINS))])  # chains b 200
        logits = model.classifier(codes)  # chains b k
        reconstruction = model.generate(codes[0])
    target = 2 * x - 1
    r2 = 1 - ((reconstruction - target).square().sum() / (target - target.mean(0)).square().sum()).item()
    content: dict[str, Any] = {"images": count, "split": "test", "reconstruction_r2": round(r2, 4)}
    for chains in CHAINS:
        votes = torch.nn.functional.one_hot(logits[:chains].argmax(-1), 10).sum(0)
        answers = {
            "mean_logits": logits[:chains].mean(0),
            "mean_z": model.classifier(codes[:chains].mean(0)).detach(),
            "vote": votes,
        }
        content[str(chains)] = {name: _accuracy(answer, y) for name, answer in answers.items()}
    path = weights_folder(ShortRun) / f"{dataset}.json"
    card = json.loads(path.read_text(encoding="utf-8"))
    held = card["held_out"]
    last = card["stages"][-1]["name"]
    card["chains"] = content
    card["stage_3_gain"] = {
        key: round(held[last][key] - held["discriminative"][key], 4)
        for key in ("accuracy_1_chain", "accuracy_10_chains")
    }
    path.write_text(json.dumps(card, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    sys.stdout.write(json.dumps({"chains": content, "stage_3_gain": card["stage_3_gain"]}, indent=2) + "\n")


def _accuracy(answer: torch.Tensor, y: torch.Tensor) -> dict[str, float]:
    right = int((answer.argmax(1) == y).sum())
    low, high = wilson(right, len(y))
    return {"value": round(right / len(y), 4), "low": round(low, 4), "high": round(high, 4)}


if __name__ == "__main__":
    main()
