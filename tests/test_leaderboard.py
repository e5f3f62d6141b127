"""Leaderboards: columns, order, ranks, and a CSV that survives any name."""

from __future__ import annotations

import csv
import dataclasses
import random
import shutil
from pathlib import Path

import pytest
from board_toys import make_row
from engine_toys import Bad, Linear, Noisy, Prototypes, Still, grid_images
from hypothesis import given, settings
from hypothesis import strategies as st

from robench.errors import DataError, UsageError
from robench.estimate import Estimate
from robench.evaluate import evaluate
from robench.leaderboard import (
    HEAD,
    TAIL,
    Row,
    add_row,
    board_name,
    estimate_cells,
    percent,
    rank_rows,
    read_rows,
    row_csv,
    rows_csv,
)
from robench.result import Evaluation
from robench.stats import wilson
from robench.threat import ThreatModel

LINF = ThreatModel("linf", 0.1)

COLUMNS_OF_THE_DESIGN = [
    *("rank", "defense", "protocol", "weights_digest", "randomized", "clean_acc", "clean_low", "clean_high"),
    *("robust_acc", "robust_low", "robust_high", "majority_acc", "worst_attack", "<attacks>"),
    *("audit_verdict", "audit_failed_checks", "n", "eot", "judge_repeats", "seed"),
    *("forwards_per_example", "backwards_per_example", "device", "precision", "robench_version", "torch_version"),
    *("data_digest", "evidence", "date"),
]


@pytest.fixture(scope="module")
def result() -> Evaluation:
    return evaluate(Noisy(), "pgd(steps=2),fgsm", LINF, grid_images(6), eot=1, judge_repeats=5)


def named(result: Evaluation, defense: str = "noisy", dataset: str = "toys", **fields: object) -> Evaluation:
    """The same result under other names."""
    spec = dataclasses.replace(result.spec, defense_name=defense, dataset=dataset, **fields)  # type: ignore[arg-type]
    return result.under(spec, "2026-01-02")


def add(result: Evaluation, folder: Path) -> list[Path]:
    """Adds the rows of a result at all its bounds."""
    paths = [folder / board_name(result.spec.dataset, result.spec.norm, eps) for eps in result.spec.eps]
    for path, eps in zip(paths, result.spec.eps, strict=True):
        add_row(result.row(eps), path)
    return paths


# the row


def test_columns_are_those_of_the_design_in_order(result: Evaluation) -> None:
    header = next(csv.reader([row_csv(result.row()).splitlines()[0]]))
    before, after = header.index("worst_attack") + 1, header.index("audit_verdict")
    assert [*header[:before], "<attacks>", *header[after:]] == COLUMNS_OF_THE_DESIGN
    assert header[before:after] == ["fgsm", "pgd(steps=2)"]  # by name


def test_row_is_what_the_run_found(result: Evaluation) -> None:
    row = named(result).row()
    assert result.robust_accuracy is not None
    assert result.majority is not None
    expected = {
        "rank": "",
        "defense": "noisy",
        "protocol": "",
        "randomized": "yes",
        "clean_acc": f"{result.clean_accuracy.value:.4f}",
        "robust_acc": f"{result.robust_accuracy.value:.4f}",
        "robust_low": f"{result.robust_accuracy.low:.4f}",
        "robust_high": f"{result.robust_accuracy.high:.4f}",
        "majority_acc": f"{result.majority.value:.4f}",
        "worst_attack": result.worst_attack(),
        "audit_verdict": "not run",
        "n": "6",
        "eot": "1",
        "judge_repeats": "5",
        "seed": "0",
        "forwards_per_example": "4.0",
        "backwards_per_example": "3.0",
        "device": result.spec.device,
        "precision": "float32",
        "date": "2026-01-02",
    }
    assert {key: row[key] for key in expected} == expected
    assert result.spec.weights_digest.startswith(row["weights_digest"])
    assert result.spec.data_digest.startswith(row["data_digest"])
    assert len(row["weights_digest"]) == len(row["data_digest"]) == len(row["evidence"]) == 16


def test_terminal_and_page_show_the_same_digits_of_every_count() -> None:
    """The page knows the four decimals of the CSV alone: the terminal rounds no other way."""
    for n in (100, 128, 1000):
        for right in range(n + 1):
            estimate = Estimate(right / n, *wilson(right, n))
            shown = percent(estimate_cells("robust", estimate), "robust")
            assert shown is not None
            assert str(estimate) == "{:.1f} % [{:.1f}, {:.1f}]".format(*shown)


def test_each_bound_has_a_row_of_its_own(tmp_path: Path) -> None:
    bounds = [ThreatModel("linf", eps) for eps in (0.0, 0.6)]
    result = named(evaluate(Linear(), "fgsm,pgd(steps=3)", bounds, grid_images(9)))
    paths = add(result, tmp_path)
    assert [path.name for path in paths] == ["toys-linf-0.csv", "toys-linf-0.6.csv"]
    first, second = (read_rows(path)[0] for path in paths)
    assert first["robust_acc"] == "1.0000"
    assert float(second["robust_acc"]) < 1
    assert first["forwards_per_example"] != second["forwards_per_example"]  # pgd stops at an error


@pytest.mark.parametrize(
    ("dataset", "norm", "eps", "name"),
    [
        ("fashion_mnist", "linf", 0.1, "fashion_mnist-linf-0.1.csv"),
        ("cifar10", "linf", 8 / 255, "cifar10-linf-8_255.csv"),
        ("cifar10", "l2", 0.5, "cifar10-l2-0.5.csv"),
        ("mnist", "l0", 5.0, "mnist-l0-5.csv"),
        ("hf:org/name", "linf", 0.1, "hf_org_name-linf-0.1.csv"),
        ("/data/../my.parquet", "linf", 0.1, "_data_.._my.parquet-linf-0.1.csv"),
    ],
)
def test_board_name(dataset: str, norm: str, eps: float, name: str) -> None:
    assert board_name(dataset, norm, eps) == name


@pytest.mark.parametrize("dataset", ["fashion/mnist", "fashion mnist", "fashion::mnist"])
def test_a_dataset_gets_no_board_of_another(dataset: str) -> None:
    with pytest.raises(UsageError, match=f'leaderboard of "{dataset}" would be that of fashion_mnist'):
        board_name(dataset, "linf", 0.1)


# adding


def test_adding_twice_changes_nothing(result: Evaluation, tmp_path: Path) -> None:
    (path,) = add(named(result), tmp_path)
    once = path.read_bytes()
    assert once.count(b"\n") == 2
    assert add(named(result), tmp_path) == [path]
    assert path.read_bytes() == once


def test_a_larger_run_of_the_same_defense_protocol_and_weights_replaces_the_old(
    result: Evaluation, tmp_path: Path
) -> None:
    add(named(result), tmp_path)
    add(named(result, protocol="quick-1"), tmp_path)
    add(named(result, weights_digest="f" * 64), tmp_path)
    (path,) = add(named(result, seed=7, n=7), tmp_path)
    rows = read_rows(path)
    assert sorted((row["protocol"], row["weights_digest"][:1] == "f", row["seed"]) for row in rows) == [
        ("", False, "7"),
        ("", True, "0"),
        ("quick-1", False, "0"),
    ]


@given(order=st.permutations(range(5)))
@settings(max_examples=8)
def test_the_order_of_adding_does_not_matter(
    order: list[int], result: Evaluation, tmp_path_factory: pytest.TempPathFactory
) -> None:
    runs = [named(result, f"defense{number % 3}", protocol=f"p-{number}") for number in range(5)]
    folder = tmp_path_factory.getbasetemp() / "boards"
    shutil.rmtree(folder, ignore_errors=True)
    for number in order:
        (path,) = add(runs[number], folder)
    assert path.read_text() == rows_csv(rank_rows([run.row() for run in runs]))


def test_a_folder_that_cannot_be_made_is_the_user_s_to_fix(result: Evaluation, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot make the folder"):
        add(named(result), tmp_path / "file" / "boards")


# ranks


def test_equal_ends_share_a_rank_and_the_next_is_skipped() -> None:
    rows = [make_row("d", "0.1000"), make_row("b", "0.7000"), make_row("a", "0.7000"), make_row("c", "0.9000")]
    assert [(row["rank"], row["defense"]) for row in rank_rows(rows)] == [
        ("1", "c"),
        ("2", "a"),
        ("2", "b"),
        ("4", "d"),
    ]


@pytest.mark.parametrize("missing", ["robust_acc", "robust_low", "clean_high", "majority_acc", "n", "pgd"])
def test_a_row_that_misses_a_number_has_no_rank_and_comes_last(missing: str) -> None:
    partial = make_row("a", "0.9900") | {missing: "", "rank": "1"}
    ranked = rank_rows([partial, make_row("z", "0.0100")])
    assert [(row["rank"], row["defense"]) for row in ranked] == [("1", "z"), ("", "a")]


@given(order=st.permutations(range(5)))
@settings(max_examples=10)
def test_masked_rows_rank_below_all_others(order: list[int]) -> None:
    rows = [
        make_row("a", "0.9000", audit_verdict="masked"),
        make_row("b", "0.5000", audit_verdict="suspect"),
        make_row("c", "0.3000", audit_verdict="not run"),
        make_row("d", "0.3000", audit_verdict="masked"),
        make_row("e", "0.9500", robust_acc=""),
    ]
    ranked = rank_rows([rows[number] for number in order])
    assert [(row["defense"], row["rank"]) for row in ranked] == [
        ("b", "1"),
        ("c", "2"),
        ("a", "3"),
        ("d", "4"),
        ("e", ""),
    ]


def test_a_failed_attack_takes_the_rank_also_after_reading(tmp_path: Path) -> None:
    whole = evaluate(Linear(gain=1.0), [Still()], LINF, grid_images(4))
    broken = evaluate(Linear(), [Still(), Bad()], LINF, grid_images(4))
    add(named(broken, "broken"), tmp_path)
    (path,) = add(named(whole, "whole"), tmp_path)
    assert [(row["rank"], row["defense"], row["robust_acc"]) for row in read_rows(path)] == [
        ("1", "whole", "1.0000"),
        ("", "broken", ""),
    ]


def test_an_attack_that_another_protocol_lacks_takes_no_rank() -> None:
    rows = [make_row("a", protocol="quick-1"), make_row("b", protocol="standard-0", apgd="0.4")]
    assert [row["rank"] for row in rank_rows(rows)] == ["1", "1"]


def test_each_protocol_has_its_own_ranks() -> None:
    rows = [
        make_row("a", "0.9000", protocol="quick-1"),
        make_row("b", "0.2000", protocol="standard-0"),
        make_row("c", "0.3000", protocol="standard-0"),
    ]
    assert [(row["protocol"], row["rank"], row["defense"]) for row in rank_rows(rows)] == [
        ("standard-0", "1", "c"),
        ("standard-0", "2", "b"),
        ("quick-1", "1", "a"),
    ]


@given(seed=st.integers(0, 10**6), size=st.integers(1, 8))
def test_ranking_does_not_depend_on_the_order_of_the_rows(seed: int, size: int) -> None:
    chance = random.Random(seed)
    rows = [
        make_row(chance.choice("ab"), chance.choice(["0.5000", "0.7500", ""]), date=chance.choice(["1", "2", "3"]))
        for _ in range(size)
    ]
    ranked = rank_rows(rows)
    assert rank_rows(chance.sample(rows, size)) == ranked == rank_rows(ranked)


# the CSV

NAMES = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)
ODD_NAMES = (
    "=cmd()", "=1+1", "+1", "-1", "-x", "@SUM(A1)", "'=x", "''", "'", "'quoted'", "<script>alert(1)</script>", "a,b",
    'say "x"', "two\nlines", "a\r\nb", "\rcr", "\ttab", "naïve ☃ 名前", "1e5", "nan", "-inf", " padded ",
)  # fmt: skip


def check_round_trip(rows: list[Row], path: Path) -> None:
    text = rows_csv(rows)
    path.write_bytes(text.encode())
    read = read_rows(path)
    assert [{key: cell for key, cell in row.items() if cell or key in (*HEAD, *TAIL)} for row in rows] == read
    assert rows_csv(read) == text


@pytest.mark.parametrize("name", ODD_NAMES)
def test_any_name_survives_byte_for_byte(name: str, tmp_path: Path) -> None:
    check_round_trip([make_row(name, protocol=name), make_row("next", **{name: "0.5"})], tmp_path / "board.csv")


@given(
    names=st.lists(NAMES, min_size=1, max_size=3), attack=NAMES.filter(lambda name: name and name not in (*HEAD, *TAIL))
)
def test_any_text_survives_byte_for_byte(
    names: list[str], attack: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    check_round_trip([make_row(name, **{attack: "0.25"}) for name in names], tmp_path_factory.getbasetemp() / "any.csv")


@given(cells=st.lists(st.lists(st.sampled_from(["", "0.25"]), min_size=3, max_size=3), min_size=1, max_size=4))
def test_attacks_that_failed_survive_byte_for_byte(
    cells: list[list[str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A column of an attack that has no figure in any row is none, before and after reading."""
    rows = [make_row(str(place), pgd=a, fgsm=b, cw=c) for place, (a, b, c) in enumerate(cells)]
    check_round_trip(rows, tmp_path_factory.getbasetemp() / "failed.csv")


@pytest.mark.parametrize("name", ["=cmd()", "+x", "-x", "@x", "\tx", "\rx", "-inf"])
def test_no_cell_starts_a_formula(name: str) -> None:
    lines = list(csv.reader(rows_csv([make_row(name, **{name: "0.5"})]).splitlines(keepends=True)))
    assert not [cell for line in lines for cell in line if cell[:1] in tuple("=+-@\t\r")]
    assert rows_csv([make_row("x", "-0.5")]).count("'") == 0  # a number is none


def test_damage_is_named(tmp_path: Path) -> None:
    path = tmp_path / "board.csv"
    whole = rows_csv([make_row("a"), make_row("b")])
    damages = {
        "": "must have, each once, the columns rank, defense",
        whole.replace("robust_low", "robust", 1): "must have, each once, the columns",
        whole.replace("pgd", "rank", 1): "must have, each once, the columns",
        rows_csv([make_row("a", **{"pgd(steps=2, restarts=3)": "0.5"})]).replace(",", ";"): (
            'must have "," between its cells; it has ";". Save it with commas'
        ),
        whole.replace("\n", "\n\n", 2): "line 2: expected 29 cells, got 0",
        whole[: -len(whole.splitlines()[-1]) // 2]: "line 3: expected 29 cells, got",
        whole.replace("0.5000", "half", 1): 'line 2: robust_low must be a number; got "half"',
        whole.replace("0.5000", "nan", 1): "robust_low must be a number",
        whole.replace(",0.6,", ",most,", 1): 'line 2: pgd must be a number; got "most"',
        whole + '"open': "cannot be read",
    }
    for text, message in damages.items():
        path.write_text(text)
        with pytest.raises(DataError, match=f"leaderboard {path}.*{message}"):
            read_rows(path)
    for content in (whole.encode().replace(b"a", b"\xff"), b"\x00\xff"):
        path.write_bytes(content)
        with pytest.raises(DataError, match="cannot be read"):
            read_rows(path)
    path.unlink()
    with pytest.raises(DataError, match="cannot be read"):
        read_rows(path)


def test_what_a_spreadsheet_adds_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "board.csv"
    path.write_bytes(b"\xef\xbb\xbf" + rows_csv([make_row("a")]).replace("\n", "\r\n").encode() + b"\r\n\r\n")
    assert [row["defense"] for row in read_rows(path)] == ["a"]


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ({"n": "1e3"}, 'n must be a whole number; got "1e3"'),
        ({"n": "128.5"}, 'n must be a whole number; got "128.5"'),
        ({"n": "9" * 19}, "n must be a whole number"),
        ({"eot": "1_0"}, "eot must be a whole number"),
        ({"judge_repeats": "20.0"}, "judge_repeats must be a whole number"),
        ({"seed": "0x1"}, "seed must be a number"),
        ({"robust_acc": "5"}, 'robust_acc must be a share between 0 and 1; got "5"'),
        ({"clean_low": "-0.1"}, "clean_low must be a share"),
        ({"majority_acc": "60"}, "majority_acc must be a share"),
        ({"pgd": "1.1"}, "pgd must be a share"),
        ({"robust_low": "0.9", "robust_high": "0.1"}, 'robust_low must not be above robust_high; got "0.9" and "0.1"'),
        ({"clean_low": "0.9", "clean_high": "0.1"}, "clean_low must not be above clean_high"),
    ],
)
def test_a_cell_that_its_column_cannot_hold_is_named(cells: dict[str, str], message: str, tmp_path: Path) -> None:
    path = tmp_path / "board.csv"
    path.write_text(rows_csv([make_row("a"), make_row("b", **cells)]))
    with pytest.raises(DataError, match=f"leaderboard {path}, line 3: {message}"):
        read_rows(path)


def test_a_damaged_board_is_not_overwritten(result: Evaluation, tmp_path: Path) -> None:
    (path,) = add(named(result), tmp_path)
    path.write_text("rank,defense\n")
    with pytest.raises(DataError, match=str(path)):
        add(named(result), tmp_path)
    assert path.read_text() == "rank,defense\n"


def test_row_file_of_a_run_is_its_row(tmp_path: Path) -> None:
    result = evaluate(Prototypes(), "fgsm", ThreatModel("linf", 0.02), "fashion_mnist", n=10, out=tmp_path / "run")
    (row,) = read_rows(tmp_path / "run" / "row.csv")
    assert row == result.row()
