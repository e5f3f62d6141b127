"""The cells of the Short Run thesis: what was published, and what is measured beside it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from robench import load_data, load_defense
from robench.defenses.shortrun import ShortRun
from robench.defenses.shortrun.figures import misfit, reconstruct
from robench.defenses.shortrun.paper import TABLES, measure_mse
from robench.paper import Context
from robench.registry import parse_spec, resolve
from robench.reproduce import load_tables
from robench.rng import seeded

DATASETS = ("fashion_mnist", "svhn")


def test_published_figures_are_those_of_the_thesis() -> None:
    found = {(cell.table, cell.row, cell.column): cell.published for cell in TABLES}
    assert len(found) == len(TABLES)
    sizes = ("40,000", "80,000", "120,000")
    for data in DATASETS:
        assert [found[f"table 4.1, {data}", "MSE", size] for size in sizes] == [3.74, 3.74, 3.70]
        assert [found[f"table 4.1, {data}", "FID", size] for size in sizes] == [66.76, 63.66, 59.81]
        assert [found[f"table 4.2, {data}", "Short Run", size] for size in sizes] == [79.0, 80.0, 80.8]
        assert found[f"table 4.2, {data}", "ConvNet", "10,000 labelled"] == 86.5
    assert {cell.published_on for cell in TABLES if cell.published is not None} == {"svhn"}
    assert load_tables("shortrun") == TABLES


def test_each_attacked_cell_stands_in_both_readings_of_eps() -> None:
    attacked = {(cell.dataset, cell.row, cell.column, cell.eps): cell.published for cell in TABLES if cell.attack}
    assert attacked == {
        (data, row, f"FGSM {eps:g}, eps in {scale}", eps * share): value
        for data in DATASETS
        for row, eps, value in [
            ("Short Run", 0.01, 68.4),
            ("Short Run", 0.03, 48.4),
            ("ConvNet", 0.01, 59.5),
            ("ConvNet", 0.03, 30.6),
        ]
        for scale, share in (("[0, 1]", 1.0), ("[-1, 1]", 0.5))
    }


def test_models_are_trained_on_as_many_images_as_the_cell_says() -> None:
    found = {(cell.table, cell.row, cell.column): cell for cell in TABLES if cell.recipe}
    expected = {
        ("table 4.1, svhn", "MSE", "120,000"): "thesis(labelled=10000, unlabelled=120000)",
        ("table 4.2, fashion_mnist", "Short Run", "40,000"): "thesis(labelled=10000, unlabelled=40000)",
        ("figure 4.4, svhn", "ConvNet", "FGSM 0.01, eps in [0, 1]"): "clean(labelled=10000)",
        ("set sizes, fashion_mnist", "Short Run", "3,000 labelled, 40,000 unlabelled"): (
            "thesis(labelled=3000, unlabelled=40000)"
        ),
        ("set sizes, fashion_mnist", "Short Run", "all labelled"): "thesis(labelled=0, unlabelled=0)",
        ("set sizes, fashion_mnist", "ConvNet", "all labelled"): "clean(labelled=0)",
    }
    assert {key: found[key].recipe for key in expected} == expected
    splits = {"svhn": "train+extra", "fashion_mnist": "train"}
    assert {cell.split for cell in found.values() if cell.dataset == "svhn"} == {"train+extra"}
    for cell in found.values():
        assert cell.split == splits[cell.dataset]
        name, options = parse_spec(cell.defense)
        net = resolve("defense", name)(**{"channels": 3, "side": 32, **options})
        if cell.row == "ConvNet":
            first = next(net.parameters())
            assert len(first) == 64  # as wide as the thesis's
        net.recipe(cell.recipe)
    # SVHN is measured on nothing but models trained for the cell
    assert all(cell.recipe or cell.row == "FID" for cell in TABLES if cell.dataset == "svhn")


def test_mse_is_the_mean_over_images_of_the_summed_error(tmp_path: Path) -> None:
    context = Context(6, 0, "cpu", None, tmp_path)
    figure = measure_mse("fashion_mnist")(context)
    model = load_defense("shortrun")
    assert isinstance(model, ShortRun)
    x, _ = load_data("fashion_mnist", n=6, seed=0)
    with torch.no_grad(), seeded(0, "reconstruction"):
        errors = misfit(model, x, reconstruct(model, x)).double()
    assert figure.n == 6
    assert figure.value == pytest.approx(errors.mean().item(), rel=1e-9)
    half = 1.96 * errors.std().item() / 6**0.5
    assert (figure.low, figure.high) == pytest.approx((figure.value - half, figure.value + half))
    assert measure_mse("fashion_mnist")(context) == figure


def test_fid_says_why_it_is_missing(tmp_path: Path) -> None:
    cells = [cell for cell in TABLES if cell.row == "FID"]
    assert len(cells) == 6
    for cell in cells:
        assert cell.measure is not None
        assert cell.measure(Context(6, 0, "cpu", None, tmp_path)) is None
        assert "Inception" in cell.note
