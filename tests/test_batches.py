"""Passes in batches: where memory runs out they are halved, for the rest of the unit, and the result says so."""

from __future__ import annotations

import pytest
import torch
from engine_toys import Linear, Noisy, grid_images

from robench import ThreatModel
from robench.batches import RowsByDevice, is_out_of_memory, own_batches, pass_in_batches, usual_rows
from robench.evaluate import evaluate
from robench.judge import judge
from robench.types import Images, Logits

LINF = ThreatModel("linf", 0.1)


class Tight(Linear):
    """The linear toy on a device whose memory holds `most` images."""

    name = "tight"

    def __init__(self, most: int = 3, error: type[BaseException] = torch.OutOfMemoryError) -> None:
        super().__init__()
        self.most, self.error, self.sizes = most, error, list[int]()

    def forward(self, x: Images) -> Logits:
        self.sizes.append(len(x))
        if len(x) > self.most:
            raise self.error("out of memory")
        return super().forward(x)


def test_slices_are_halved_until_they_fit_and_stay_small() -> None:
    defense, (x, y) = Tight(), grid_images(16)
    votes = judge(defense, x, 2)
    assert bool((votes.argmax(1) == y).all())
    assert defense.sizes == [16, 8, 4, *[2] * 8, *[2] * 8]


def test_several_tensors_are_cut_alike() -> None:
    defense = Tight(most=2)
    x, y = grid_images(5)
    parts = pass_in_batches(defense, lambda x, y: (defense(x), y), x, y)
    assert torch.equal(torch.cat([part[1] for part in parts]), y)
    assert [len(part[1]) for part in parts] == [2, 2, 1]


def test_each_slice_is_told_when_it_is_done() -> None:
    told: list[int] = []
    pass_in_batches(Tight(most=2), Tight(most=2), grid_images(5)[0], on_rows=told.append)
    assert told == [2, 2, 1], "and nothing of those that did not fit"


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError, RuntimeError])
def test_one_image_too_many_is_an_error(error: type[BaseException]) -> None:
    with pytest.raises(error, match="out of memory"):
        judge(Tight(0, error), grid_images(4)[0], 1)


def test_other_errors_are_not_tried_again() -> None:
    defense = Tight(0, ValueError)
    with pytest.raises(ValueError, match="out of memory"):
        judge(defense, grid_images(4)[0], 1)
    assert defense.sizes == [4]
    assert not is_out_of_memory(RuntimeError("shapes differ"))


def test_the_batch_size_comes_back() -> None:
    defense = Tight()
    with own_batches(defense) as notes:
        judge(defense, grid_images(8)[0], 1)
    assert defense.batch_rows is None
    assert notes == ["out of memory: batches of 2 images instead of 512"]
    with own_batches(Linear()) as notes:
        judge(Linear(), grid_images(8)[0], 1)
    assert notes == []


def test_a_gpu_is_given_larger_batches() -> None:
    assert usual_rows("cuda:0") > usual_rows("cpu")
    with own_batches(defense := Tight(), "cuda") as notes:
        defense.batch_rows = 2
    assert notes == [f"out of memory: batches of 2 images instead of {usual_rows('cuda')}"]


class Large(Noisy):
    """Takes larger batches on a GPU."""

    batch_rows = RowsByDevice(cpu=4, gpu=64)


def test_a_defense_names_a_batch_for_each_kind_of_device() -> None:
    model = Large()
    assert (Large.batch_rows, model.batch_rows) == (4, 4)
    assert pass_in_batches(model, len, torch.zeros(10)) == [4, 4, 2]
    model.to("meta")
    assert model.batch_rows == 64
    with own_batches(model, "cuda") as notes:
        model.batch_rows = 5
        assert model.batch_rows == 5
    assert notes == ["out of memory: batches of 5 images instead of 64"]
    assert model.batch_rows == 64
    model.to_empty(device="cpu")
    assert model.batch_rows == 4, "what was set on the GPU is gone"


def test_a_run_goes_on_with_the_same_figures_and_says_so() -> None:
    run = {"attacks": "pgd(steps=3),square(queries=20)", "threat": LINF, "data": grid_images(20), "unit_size": 10}
    tight, roomy = evaluate(Tight(most=4), **run), evaluate(Linear(), **run)  # type: ignore[arg-type]
    assert tight.table["votes"].map(list).tolist() == roomy.table["votes"].map(list).tolist()
    assert tight.notes == tuple(
        f"unit {number}: out of memory: batches of 2 images instead of 512" for number in (0, 1)
    )
    assert tight.to_json()["notes"] == list(tight.notes)
    assert "notes" not in roomy.to_json()


def test_notes_are_stored_with_the_unit(tmp_path: object) -> None:
    stored = evaluate(Tight(most=4), "fgsm", LINF, grid_images(12), unit_size=6, out=f"{tmp_path}/run")
    assert len(stored.notes) == 2
    assert type(stored).load(f"{tmp_path}/run").notes == stored.notes


def test_the_draws_of_a_randomized_defense_stay_independent() -> None:
    """Halving on the way must not give two halves the same noise."""

    class TightNoisy(Noisy):
        full = True

        def forward(self, x: Images) -> Logits:
            if self.full and len(x) > 32:
                raise torch.OutOfMemoryError("out of memory")
            return super().forward(x)

    x = torch.full((64, 2, 3, 3), 0.5)
    with own_batches(TightNoisy()):
        votes = judge(TightNoisy(), x, 50)
    assert not torch.equal(votes[:32], votes[32:])
