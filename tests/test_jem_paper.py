"""JEM's published figures as cells: as the slides print them, each with a way to be measured, and the measurements."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hub_toys import write_svhn

from robench import UsageError, load_data
from robench.attack import Attack
from robench.defense import Defense
from robench.defenses.jem import JEM, paper
from robench.defenses.shortrun.paper import measure_mse
from robench.detection import auroc, expected_calibration_error
from robench.outliers import make_outliers
from robench.paper import Cell, Context, Figure
from robench.registry import load_attack, parse_spec
from robench.reproduce import ReproduceRequest, load_tables, reproduce_all
from robench.rng import seeded


@pytest.fixture
def context(tmp_path: Path) -> Context:
    return Context(n=60, seed=0, device="cpu", data_dir=None, folder=tmp_path)


@pytest.fixture
def untrained(monkeypatch: pytest.MonkeyPatch) -> JEM:
    """What `load_defense` gives in the measurements; its scores differ from image to image."""
    with seeded("paper"):
        model = JEM(width=4).freeze()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)

    def load(name: str, dataset: str) -> Defense:
        del name, dataset
        return model

    monkeypatch.setattr(paper, "load_defense", load)
    return model


def cells_of(table: str) -> list[Cell]:
    return [cell for cell in load_tables("jem") if cell.table == table]


def test_published_detection_figures_are_those_of_the_slides() -> None:
    columns = ["svhn", "interpolation", "CIFAR-100", "CelebA"]
    published = {
        "log p(x)": [0.67, 0.65, 0.67, 0.75],
        "max p(y|x)": [0.89, 0.75, 0.87, 0.79],
        "-|d log p(x) / dx|": [0.83, 0.78, 0.82, 0.79],
        "max p(y|x), undefended classifier": [0.93, 0.77, 0.85, 0.62],
    }
    found = {(cell.row, cell.column): cell for cell in cells_of(paper.DETECTION)}
    for row, figures in published.items():
        for column, figure in zip(columns, figures, strict=True):
            cell = found[row, f"cifar10 against {column}"]
            assert cell.published == figure
            assert cell.published_on == "cifar10"
    ours = [cell for cell in found.values() if cell.published is None]
    assert len(ours) == len(published) * len(paper.OURS_AGAINST)
    assert {cell.column for cell in ours} >= {"fashion_mnist against mnist", "mnist against fashion_mnist"}


def test_published_accuracies_are_those_of_the_slides() -> None:
    cells = cells_of(paper.CLEAN)
    assert {cell.row for cell in cells} == {"JEM-0", "JEM-1", "JEM-10"}
    assert all(cell.published is None for cell in cells if cell.row != "JEM-0")
    found = {cell.dataset: cell.published for cell in cells if cell.row == "JEM-0"}
    assert found == {"cifar10": 92.9, "svhn": 96.7, "cifar100": 72.2, "fashion_mnist": None, "mnist": None}


def test_curves_have_every_refinement_under_each_kind_of_attack() -> None:
    cells = cells_of(paper.CURVES)
    assert all(cell.published is None for cell in cells)
    for data in ("fashion_mnist", "mnist", "cifar10"):
        for defense in ("jem", "jem(refine_steps=1)", "jem(refine_steps=10)"):
            own = [cell for cell in cells if (cell.dataset, cell.defense) == (data, defense)]
            names = {(cell.norm, parse_spec(cell.attack.partition("@")[0])[0]) for cell in own}
            in_both = {(norm, attack) for norm in ("linf", "l2") for attack in ("pgd", "pointwise")}
            assert names == in_both | {("linf", "hopskipjump"), ("l2", "boundary"), ("l0", "pointwise")}
            for path in ("@bpda", "@detached"):
                assert any(cell.attack.endswith(path) for cell in own) == (defense != "jem")


def test_cells_name_defenses_and_attacks_that_exist() -> None:
    for cell in load_tables("jem"):
        if cell.defense:
            name, options = parse_spec(cell.defense)
            assert name == "jem"
            model = JEM(**options)
        if cell.attack:
            spec, _, mode = cell.attack.partition("@")
            attack = load_attack(spec)
            assert isinstance(attack, Attack)
            assert cell.norm in attack.norms
            assert not mode or mode in model.gradient_modes


@pytest.mark.parametrize("kind", list(paper.SCORES))
def test_auroc_is_that_of_the_scores(kind: str, context: Context, untrained: JEM) -> None:
    own, _ = load_data("fashion_mnist", "test", 60, 0)
    between = make_outliers("interpolation", own, 60, 0).x
    same = "max_py" if kind == "undefended" else kind  # which takes JEM for the undefended net here
    expected = auroc(untrained.detection_score(own, same), untrained.detection_score(between, same))
    found = paper.measure_auroc("fashion_mnist", "interpolation", kind)(context)
    assert (found.value, found.low, found.high, found.n) == pytest.approx(
        (expected.value, expected.low, expected.high, 60), abs=1e-3
    )
    assert found.value != 0.5


def test_calibration_is_that_of_the_answers_in_percent(context: Context, untrained: JEM) -> None:
    x, y = load_data("fashion_mnist", "test", 60, 0)
    expected = 100 * expected_calibration_error(untrained(x).softmax(1), y)
    found = paper.measure_calibration("jem", "fashion_mnist")(context)
    assert found.value == pytest.approx(expected, abs=1e-3)
    assert found.low <= found.value <= found.high
    assert found.n == 60


@pytest.mark.parametrize(
    "measure",
    [
        paper.measure_calibration("jem", "fashion_mnist"),
        paper.measure_auroc("fashion_mnist", "interpolation", "log_px"),
        measure_mse("fashion_mnist"),
    ],
    ids=["calibration", "auroc", "mse"],
)
def test_one_image_has_no_interval(measure: Callable[[Context], Figure], context: Context) -> None:
    with pytest.raises(UsageError, match=r"^takes at least 2 images; got 1$"):
        measure(dataclasses.replace(context, n=1))


@pytest.mark.parametrize("data", paper.NOT_READ)
def test_data_that_robench_does_not_read_are_left_out_on_purpose(data: str, context: Context) -> None:
    """Nothing that anyone does can cure it, so that it is no failure of a call."""
    cells = [cell for cell in cells_of(paper.DETECTION) if data in cell.column]
    assert len(cells) == len(paper.SCORES)
    for cell in cells:
        assert cell.measure is not None
        assert cell.measure(context) is None
        assert cell.note == f"not measured: {data} is none of the datasets that robench reads by name"


def test_a_figure_is_kept_for_the_weights_that_it_is_of() -> None:
    measured = [cell for cell in load_tables("jem") if cell.measure is not None and "not measured" not in cell.note]
    assert {(cell.table, cell.reads) for cell in measured} == {
        (paper.DETECTION, "jem"),
        (paper.DETECTION, "convnet"),
        (paper.CALIBRATION, "jem"),
        (paper.CALIBRATION, "convnet"),
    }


@pytest.mark.slow
def test_svhn_is_trained_on_and_measured_from_the_hubs_layout(tmp_path: Path) -> None:
    """On made-up images: the cell of the paper's 96.7 % runs from its recipe to a figure."""
    data = write_svhn(tmp_path / "data", train=540, test=2000)
    asked = ReproduceRequest("jem", tmp_path / "out", (paper.CLEAN,), protocol="", dataset="svhn", data_dir=data)
    asked = dataclasses.replace(asked, n=20, train=True, scale=0.001)
    (outcome,) = reproduce_all(asked)
    assert (outcome.cell.published, outcome.problem) == (96.7, "")
    assert outcome.trained == "informative, scale 0.001"
    assert outcome.ours is not None
    assert outcome.ours.n == 2000
    (card,) = (json.loads(path.read_text()) for path in (tmp_path / "out" / "trained").glob("*/svhn.json"))
    assert [stage["name"] for stage in card["stages"]] == ["warmup", "joint"]
    assert (card["dataset"], card["recipe"]) == ("svhn", "informative")
