"""Golden: two toy defenses, three attacks, 32 images; row.csv and result.json byte for byte.

The toys' weights are in the source (engine_toys.PROTOTYPES) and no answer is near a tie, so that the files are those of
any machine. `pytest --update-golden -k golden` rewrites them; review the diff.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engine_toys import Blindfold, Prototypes

from robench.defense import Defense
from robench.evaluate import evaluate
from robench.result import Evaluation
from robench.threat import ThreatModel

GOLDEN = Path(__file__).parent / "golden"
ATTACKS = "fgsm,pgd(steps=5),pgd(steps=5, restarts=2, loss='margin')"
EPS = 0.08

REPLACED = ("robench_version", "torch_version", "date", "evidence")
"""What an upgrade or another day changes; evidence is the digest of the spec, which names both versions."""


@pytest.fixture(params=[Prototypes, Blindfold], ids=["prototypes", "blindfold"])
def result(request: pytest.FixtureRequest, tmp_path: Path) -> Evaluation:
    return evaluate(
        request.param(),
        ATTACKS,
        ThreatModel("linf", EPS),
        "fashion_mnist",
        n=32,
        seed=5,
        unit_size=12,
        eot=4,
        judge_repeats=10,
        device="cpu",
        out=tmp_path / "run",
    )


def normalise(text: str, row: dict[str, str]) -> str:
    """Puts `<name>` in the place of each value of REPLACED, which must stand in the text exactly once."""
    for name in REPLACED:
        assert text.count(row[name]) == 1, f"{name} {row[name]} does not stand in the text once"
        text = text.replace(row[name], f"<{name}>")
    return text


def test_golden(result: Evaluation, update_golden: bool) -> None:
    assert result.folder is not None
    for source, suffix in (("row.csv", "csv"), ("result.json", "json")):
        found = normalise((result.folder / source).read_bytes().decode(), result.row())
        path = GOLDEN / f"{result.spec.defense_name}.{suffix}"
        if update_golden:
            GOLDEN.mkdir(exist_ok=True)
            path.write_bytes(found.encode())
        assert found.encode() == path.read_bytes(), f"{path} differs; see the head of this file"


def every_answer(defense: Defense, x: torch.Tensor) -> list[torch.Tensor]:
    """The logits of all that the defense may draw."""
    if not isinstance(defense, Blindfold):
        return [defense(x)]
    return [defense.with_corner_hidden(x, torch.full((len(x),), corner)) for corner in range(4)]


def test_golden_answers_are_far_from_ties(result: Evaluation) -> None:
    defense = {"prototypes": Prototypes, "blindfold": Blindfold}[result.spec.defense_name]()
    for key in [entry.key for entry in result.spec.attacks]:
        for logits in every_answer(defense, torch.from_numpy(result.images(key))):
            first, second = logits.topk(2, dim=1).values.T
            assert float((first - second).min()) > 1e-4, key


def test_golden_run_is_worth_keeping(result: Evaluation) -> None:
    """The attacks take something and leave something, and they differ."""
    values = [estimate.value for estimate in result.per_attack.values() if estimate is not None]
    assert len(values) == 3
    assert 0.1 < min(values) < result.clean_accuracy.value - 0.1
    assert len(set(values)) > 1
