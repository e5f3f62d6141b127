"""The command line: quick where it needs no torch, one line and status 2 for what the user can fix, JSON, verify."""

from __future__ import annotations

import hashlib
import importlib
import io
import json
import os
import pickle
import re
import resource
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jaxtyping
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import robench
from robench import Defense, ThreatModel, UsageError, load_defense
from robench.cli import main
from robench.defense import weights_digest
from robench.defenses.convnet.model import ConvNet
from robench.leaderboard import read_rows
from robench.registry import names, resolve
from robench.rng import seeded
from robench.settings import DEFAULT_N, RANDOMIZED_EOT, RANDOMIZED_REPEATS, Settings
from robench.weights import build, read_card, save_weights, shipped_weights, weights_folder

TOYS = Path(__file__).with_name("cli_toys.py")
SQUARES, NOISY, RAISES = f"{TOYS}:Squares", f"{TOYS}:NoisySquares", f"{TOYS}:Raises"
IMAGES = 12
PROGRESS = re.compile(r"^[\w, :-]+: \d+ %, \d+ s, .*$")
COMMAND = [sys.executable, "-c", "from robench.cli import main; main()"]


class Outcome(NamedTuple):
    """What a command did: its exit status, and what it wrote."""

    status: int
    out: str
    err: str

    def json(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads(self.out)
        return content

    @property
    def lines(self) -> list[str]:
        """Lines on standard error, progress aside."""
        return [line for line in self.err.splitlines() if not PROGRESS.fullmatch(line)]


Call = Callable[..., Outcome]


@pytest.fixture(autouse=True)
def place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty working directory, no hub, no data folder, and the program as users have it: without type checks."""
    monkeypatch.delenv("ROBENCH_DATA", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    jaxtyping.config.update("jaxtyping_disable", True)
    yield work
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Runs a command in this process, which has torch already."""

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["robench", *map(str, arguments)])
        status: object = 0
        capsys.readouterr()
        try:
            main()
        except SystemExit as stop:
            status = stop.code
        assert isinstance(status, int)
        return Outcome(status, *capsys.readouterr())

    return run


def write_squares(path: Path, n: int = IMAGES, size: int = 4, mode: str = "L") -> Path:
    """Image i has quadrant i % 4 at 0.6 and the others at 0.4, so that exactly eps > 0.1 can break it in linf."""
    cells = []
    for number in range(n):
        pixels = np.full((size, size), 102, dtype=np.uint8)
        row, column = divmod(number % 4, 2)
        pixels[row * size // 2 :, column * size // 2 :][: size // 2, : size // 2] = 153
        buffer = io.BytesIO()
        Image.fromarray(pixels).convert(mode).save(buffer, format="PNG")
        cells.append({"bytes": buffer.getvalue(), "path": None})
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    pq.write_table(pa.table({"image": pa.array(cells, kind), "label": [number % 4 for number in range(n)]}), path)
    return path


@pytest.fixture
def squares(tmp_path: Path) -> Path:
    return write_squares(tmp_path / "squares.parquet")


def in_process(*arguments: object, before: str = "", timeout: float = 120, **environment: str) -> Outcome:
    """Runs a command in a process of its own; `before` is Python to run first."""
    command = [sys.executable, "-c", f"{before}\nfrom robench.cli import main; main()", *map(str, arguments)]
    done = subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, check=False, timeout=timeout
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def assert_one_line(outcome: Outcome, *parts: str) -> None:
    """The form of an error that the user can fix."""
    assert outcome.status == 2, outcome
    assert outcome.out == ""
    assert len(outcome.lines) == 1, outcome.err
    (line,) = outcome.lines
    assert line.startswith("robench: ")
    assert "Traceback" not in outcome.err
    for part in parts:
        assert part in line


# quick without torch


def processor_time() -> float:
    """Seconds of processor time of the processes that this one started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.parametrize("arguments", [["--help"], ["list"], ["run", "--help"]], ids=" ".join)
def test_help_and_list_take_less_than_half_a_second(arguments: list[str]) -> None:
    """Of processor time, which other programs on the machine disturb less than the clock on the wall."""
    times = []
    for _ in range(5):
        started = processor_time()
        done = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, check=False, timeout=60)
        times.append(processor_time() - started)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        assert "run" in done.stdout or "shortrun" in done.stdout
    assert min(times) < 0.5


@pytest.mark.parametrize("arguments", [["--help"], ["list"], ["list", "attacks", "--json"]], ids=" ".join)
def test_help_and_list_import_no_torch(arguments: list[str]) -> None:
    script = (
        "import sys\nfrom robench.cli import main\ntry:\n    main()\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'pandas', 'pyarrow', 'datasets', 'scipy', 'numpy'} & set(sys.modules)\n"
        "sys.stderr.write(f'robench.cli {sorted(heavy)}' if 'robench.cli' in sys.modules else '')"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stderr == "robench.cli []"


@pytest.mark.parametrize("group", [[], ["leaderboard"]], ids=["robench", "leaderboard"])
def test_no_command_prints_the_help_as_it_is(call: Call, group: list[str]) -> None:
    bare, asked = call(*group), call(*group, "--help")
    assert (bare.status, asked.status) == (2, 0)
    assert bare.err == ""
    assert bare.out.split() == asked.out.split()
    assert len(bare.out.splitlines()) > 10


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("--attack", "standrd"), 'did you mean "standard"? There are: '),
        (("--attack", "standrd"), "; protocols: quick-1, blackbox-1, standard-1, thorough-1"),
        (("--attack", "pdg"), 'did you mean "pgd"?'),
        (("--protocol", "thorogh"), 'did you mean "thorough"?'),
        (("--protocol", "pgd"), "it is an attack: --attack pgd"),
    ],
)
def test_a_misspelt_attack_or_protocol_is_guessed(call: Call, squares: Path, words: tuple[str, ...], part: str) -> None:
    assert_one_line(call("run", "--defense", SQUARES, "--dataset", squares, "--eps", "0.1", "--n", 9, *words), part)


def test_the_version_is_told(call: Call) -> None:
    assert call("--version") == (0, f"robench {robench.__version__}\n", "")


def test_the_help_of_run_tells_the_defaults(call: Call) -> None:
    text = " ".join(call("run", "--help").out.split())
    for part in (f"default {DEFAULT_N},", f"default {RANDOMIZED_EOT},", f"default {RANDOMIZED_REPEATS},"):
        assert part in text
    for part in (f"default {Settings.unit_size}.", f"{Settings.precision} (default)", "default fashion_mnist."):
        assert part in text


def test_list_tells_the_customary_bounds_and_refuses_another_norm(call: Call) -> None:
    assert "  fashion_mnist (embedded; eps: linf 0.1, l2 1.5)\n" in call("list", "datasets").out
    assert_one_line(call("list", "attacks", "--norm", "l5"), 'norm must be one of linf, l2, l1, l0; got "l5"')


def test_list_says_what_there_is(call: Call) -> None:
    outcome = call("list", "--json")
    names = outcome.json()["names"]
    assert {"defenses", "attacks", "datasets", "protocols"} <= set(names)
    assert {"shortrun", "convnet"} <= set(names["defenses"])
    assert {"pgd", "fgsm"} <= set(names["attacks"])
    fashion = {"name": "fashion_mnist", "image_shape": [1, 28, 28], "num_classes": 10, "source": "embedded"}
    assert {**fashion, "eps": {"linf": "0.1", "l2": "1.5"}} in names["datasets"]
    assert {"name": "quick-1", "norm": "linf", "attacks": ["fgsm", "pgd"]} in names["protocols"]
    assert names["checks"][0].keys() == {"name", "question"}
    assert (outcome.status, outcome.err) == (0, "")
    assert_one_line(call("list", "things"), "things", "defenses, attacks")


def test_list_tells_the_recipes_that_train_takes(call: Call) -> None:
    told = call("list", "recipes", "--json").json()["names"]["recipes"]
    assert {entry["defense"] for entry in told} >= {"convnet", "convnet_at", "fortified", "jem", "shortrun"}
    for entry in told:
        options = {"train_attack": entry["recipe"]} if entry["defense"] == "fortified" else {}
        defense: Defense = build(resolve("defense", entry["defense"]), options)
        assert defense.recipe(entry["recipe"]).name == entry["recipe"]
        assert not entry["default"] or defense.recipe().name == entry["recipe"]
    lines = call("list", "recipes").out.splitlines()
    assert len(lines) == 1 + len(told)
    assert "  convnet_at trades: its own loss, beta 6 (Zhang et al. 2019)" in lines


def test_list_tells_how_each_weights_file_is_loaded(call: Call) -> None:
    told = call("list", "weights", "--json").json()["names"]["weights"]
    shipped = [(name, stem) for name in names("defense") for stem in shipped_weights(resolve("defense", name))]
    assert len(told) == len(shipped) >= 18
    for entry, (name, stem) in zip(told, shipped, strict=True):
        path = weights_folder(resolve("defense", name)) / f"{stem}.safetensors"
        card = read_card(path)
        assert weights_digest(load_defense(entry["spec"], entry["dataset"])) == card["weights_digest"]
        assert (entry["clean_accuracy"], entry["test_images"]) == (
            card["test"]["clean_accuracy"],
            card["test"]["images"],
        )
    line = "  'fortified(layers=[])' mnist: clean 99.25 % of 2,000 test images, recipe pgd, 1.4 MB"
    assert line in call("list", "weights").out.splitlines()


# a run


def run_squares(call: Call, squares: Path, *arguments: object, attack: str = "pgd", eps: str = "0.15") -> Outcome:
    common = ["--dataset", squares, "--eps", eps, "--n", IMAGES, "--device", "cpu"]
    defense = [] if "--defense" in arguments else ["--defense", SQUARES]
    return call("run", *defense, "--attack", attack, *common, *arguments)


def test_json_is_one_object_with_the_keys_of_the_contract(call: Call, squares: Path) -> None:
    outcome = run_squares(call, squares, "--json", "--out", "run", "--seed", 7, attack="fgsm,pgd", eps="0.05,0.15")
    assert outcome.status == 0, outcome.err
    content = outcome.json()
    assert outcome.lines == []
    keys = {"clean_accuracy", "robust_accuracy", "per_attack", "n", "seed", "eot", "run", "row"}
    assert keys <= set(content)
    estimates = [content["clean_accuracy"], content["robust_accuracy"], *content["per_attack"].values()]
    assert all(set(estimate) == {"value", "low", "high"} for estimate in estimates)
    assert [estimate["value"] for estimate in estimates] == [1.0, 0.0, 0.0, 0.0]
    assert set(content["per_attack"]) == {"fgsm", "pgd"}
    assert (content["n"], content["seed"], content["eot"]) == (IMAGES, 7, 1)
    assert [point["value"] for point in content["curve"]] == [1.0, 1.0, 0.0]
    assert Path(content["run"]) == Path("run")
    assert (Path("run") / "run.json").is_file()
    assert content["row"]["defense"] == "squares"


def test_run_without_json_prints_a_table_and_what_is_next(call: Call, squares: Path, place: Path) -> None:
    outcome = run_squares(call, squares)
    assert outcome.status == 0, outcome.err
    assert "robust accuracy" in outcome.out
    (folder,) = (place / "runs").iterdir()
    assert f"robench verify runs/{folder.name}" in " ".join(outcome.out.split())


def test_real_process_keeps_json_alone_on_standard_output(squares: Path) -> None:
    common = ["--defense", NOISY, "--attack", "fgsm", "--dataset", squares, "--eps", "0.1", "--device", "cpu"]
    outcome = in_process("run", *common, "--n", 4, "--eot", 2, "--judge-repeats", 3, "--json")
    assert outcome.status == 0, outcome.err
    content = outcome.json()
    assert (content["n"], content["eot"], content["judge_repeats"]) == (4, 2, 3)
    assert outcome.lines == []
    assert len(outcome.err.splitlines()) >= 1  # progress


def test_failed_attack_gives_status_1_and_keeps_its_traceback(call: Call, squares: Path) -> None:
    outcome = run_squares(call, squares, "--json", "--out", "run", attack=f"fgsm,{RAISES}")
    assert outcome.status == 1
    content = outcome.json()
    assert content["per_attack"]["raises"] is None
    assert content["per_attack"]["fgsm"]["value"] == 0.0
    assert content["complete"] is False
    assert content["row"]["robust_acc"] == content["row"]["raises"] == ""
    (trace,) = (Path("run") / "failures").iterdir()
    assert "ValueError: the planted failure" in trace.read_text()
    assert "Traceback" not in outcome.err
    assert [line for line in outcome.lines if "run/failures" in line] == outcome.lines


def test_interrupt_gives_status_130_and_a_command_that_resumes(
    call: Call, squares: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = "a run"
    outcome = run_squares(call, squares, "--out", folder, attack=f"{TOYS}:Interrupts")
    assert (outcome.status, outcome.out) == (130, "")
    (line,) = outcome.lines
    words = shlex.split(line.partition("robench run")[2])
    assert words == ["--resume", folder]
    module = sys.modules[type(robench.load_attack(f"{TOYS}:Interrupts")).__module__]
    monkeypatch.setattr(module.Interrupts, "__call__", lambda _self, _victim, x, _y, _threat: x)
    resumed = call("run", *words, "--json")
    assert resumed.status == 0, resumed.err
    assert resumed.json()["robust_accuracy"]["value"] == 1.0


# bad inputs: names and options


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--defense", "shortrum"], ['no defense "shortrum"', 'did you mean "shortrun"?']),
        (["--defense", "shortrum(n_chains=2)"], ['did you mean "shortrun"?']),
        (["--attack", "pdg"], ['no attack "pdg"', 'did you mean "pgd"?']),
        (["--attack", "fgsm,pdg"], ['did you mean "pgd"?']),
        (["--dataset", "fashion_mnits"], ['"fashion_mnits"', "fashion_mnist?"]),
        (["--attack", None, "--protocol", "standart"], ['no protocol "standart"', "standard"]),
        (["--defense", f"{TOYS}:Squars"], ['no class "Squars"', 'did you mean "Squares"?']),
        (["--defense", "nowhere.py:Toy"], ["nowhere.py does not exist"]),
        (["--defense", "no.such.module:Toy"], ["cannot be imported"]),
        (["--defense", f"{TOYS}:Raises"], ["must be a class that extends robench.Defense"]),
        (["--attack", "pgd(stepz=3)"], ['no option "stepz"', 'did you mean "steps"?']),
        (["--attack", "pgd(steps=0)"], ["steps", "at least 1"]),
        (["--attack", "pgd(steps=many)"], ['attack "pgd"', "wrong kind"]),
        (["--attack", "pgd(steps=3"], ["expected NAME(option=value, ...)"]),
        (["--attack", "pgd(loss=mse)"], ['got "mse"', "margin"]),
        (["--attack", "pgd@nowhere"], ['got "nowhere"', "full"]),
        (["--attack", ""], ["attack"]),
        (["--defense", f"{SQUARES}(gian=2)"], ["gian", "its options are: gain"]),
        (["--defense", f"{SQUARES}(gain=much)"], ['defense "squares"', "wrong kind"]),
        (["--n", "8.5"], ["--n takes a whole number; got 8.5. See"]),
        (["--norm", "l7"], ['norm must be one of linf, l2, l1, l0; got "l7"']),
        (
            ["--norm", "l1", "--attack", "fgsm"],
            ['attack "fgsm" supports linf, l2; the threat model is l1', "--norm l1"],
        ),
        (["--access", "scores"], ['attack "pgd" needs access to gradient; the run allows scores']),
        (["--access", "weights"], ['access must be one of none, decisions, scores, gradient; got "weights"']),
        (["--goal", "minimal"], ['attack "pgd" has the goal budget; the run asks for minimal']),
        (["--precision", "float16"], ['precision must be one of float32, bfloat16; got "float16"']),
        (["--attack", "pgd(randomness=none)"], ['randomness must be one of fresh, fixed, off; got "none"']),
        (
            ["--attack", None, "--protocol", "quick", "--norm", "l1"],
            ["quick-1 has attacks in linf, l2; the norm is l1"],
        ),
        (["--device", "tpu"], ['device must be auto, cpu or cuda; got "tpu"']),
        (["--protocol", "quick"], ["either --attack or --protocol"]),
        (["--attack", None], ["either --attack or --protocol"]),
        (["--defense", None], ["--defense"]),
        (["--eps", "-0.1"], ['got "-0.1"']),
        (["--eps", "nan"], ['got "nan"']),
        (["--eps", "inf"], ['got "inf"']),
        (["--eps", "8/0"], ['got "8/0"']),
        (["--eps", "1.01"], ["at most 1; got 1.01", "8/255"]),
        (["--eps", "small"], ['got "small"']),
        (["--eps", "0.1,"], ['got ""']),
        (["--eps", ""], ['got ""']),
        (["--n", IMAGES + 1], [f"1 to {IMAGES}", f"it is {IMAGES + 1}"]),
        (["--n", 0], ["n must be at least 1; got 0"]),
        (["--n", -3], ["n must be at least 1; got -3"]),
        (["--n", "some"], ["--n takes a whole number; got some."]),
        (["--unit-size", 0], ["unit_size must be at least 1; got 0"]),
        (["--eot", 0], ["eot must be at least 1; got 0"]),
        (["--judge-repeats", 0], ["judge_repeats must be at least 1; got 0"]),
        (["--seed", -1], ["seed"]),
        (["--epsilon", 3], ["No such option: --epsilon", "--eps"]),
        (["--data-dir", "nowhere", "--dataset", "cifar10"], ["nowhere is not a folder"]),
    ],
    ids=lambda value: " ".join(str(one) for one in value).replace(str(TOYS), "toys"),
)
def test_bad_input_is_one_line_and_leaves_nothing(
    call: Call, squares: Path, place: Path, arguments: list[object], parts: list[str]
) -> None:
    options: dict[str, object] = {
        "--defense": SQUARES,
        "--attack": "pgd",
        "--dataset": squares,
        "--eps": "0.1",
        "--n": IMAGES,
        "--device": "cpu",
    }
    options |= dict(zip(arguments[::2], arguments[1::2], strict=True))  # type: ignore[arg-type]  # names come first
    given = [word for name, value in options.items() if value is not None for word in (name, value)]
    assert_one_line(call("run", *given, "--out", "run", "--json"), *parts)
    assert_one_line(call("run", *given), *parts)
    assert [*place.iterdir()] == []


def test_unknown_dataset_is_named_also_where_eps_is_left_out(call: Call) -> None:
    outcome = call("run", "--defense", SQUARES, "--attack", "pgd", "--dataset", "fashion_mnits")
    assert_one_line(outcome, '"fashion_mnits"', "fashion_mnist?")


def test_unknown_norm_is_named_also_where_eps_is_left_out(call: Call) -> None:
    outcome = call("run", "--defense", SQUARES, "--attack", "pgd", "--norm", "l7")
    assert_one_line(outcome, 'norm must be one of linf, l2, l1, l0; got "l7"')


def test_dataset_without_a_customary_eps_asks_for_one(call: Call, squares: Path) -> None:
    outcome = call("run", "--defense", SQUARES, "--attack", "pgd", "--dataset", squares)
    assert_one_line(outcome, "squares.parquet", "give one with --eps")


def test_error_of_a_real_process_is_one_line_too(place: Path) -> None:
    outcome = in_process("run", "--defense", "shortrum", "--attack", "pgd")
    assert_one_line(outcome, 'did you mean "shortrun"?')
    assert [*place.iterdir()] == []


@pytest.mark.parametrize(
    ("command", "ask"),
    [
        ("rum", "robench"),
        ("run --attack", "robench"),
        ("verify", "robench verify"),
        ("reproduce", "robench reproduce"),
        ("leaderboard ad", "robench leaderboard"),
    ],
)
def test_wrong_command_is_one_line_with_the_help_to_ask_for(call: Call, command: str, ask: str) -> None:
    assert_one_line(call(*command.split()), f"See '{ask} --help'")


# bad inputs: data


def test_dataset_that_is_not_at_hand_says_how_to_get_it(place: Path) -> None:
    outcome = in_process("run", "--defense", f"{TOYS}:ColourSquares", "--attack", "pgd", "--dataset", "svhn")
    assert_one_line(outcome, 'dataset "svhn"', "HF_HUB_OFFLINE", "svhn/test-*.parquet", "--data-dir", "ROBENCH_DATA")
    assert [*place.iterdir()] == []


def test_n_larger_than_the_embedded_data(call: Call) -> None:
    outcome = call("run", "--defense", f"{TOYS}:GreySquares", "--attack", "pgd", "--n", 10_001)
    assert_one_line(outcome, "1 to 10000", "it is 10001")


@pytest.mark.parametrize(("size", "mode", "shape"), [(6, "L", "(1, 6, 6)"), (4, "RGB", "(3, 4, 4)")])
def test_images_of_another_shape(call: Call, tmp_path: Path, place: Path, size: int, mode: str, shape: str) -> None:
    path = write_squares(tmp_path / "other.parquet", size=size, mode=mode)
    outcome = run_squares(call, path)
    assert_one_line(outcome, 'defense "squares" takes images of shape (1, 4, 4)', f"the data has {shape}")
    assert [*place.iterdir()] == []


def test_embedded_images_of_another_shape(call: Call) -> None:
    outcome = call("run", "--defense", SQUARES, "--attack", "pgd", "--n", 4)
    assert_one_line(outcome, "takes images of shape (1, 4, 4)", "(1, 28, 28)")


@pytest.mark.parametrize("content", [b"", b"PAR1", b"no parquet at all"], ids=["empty", "cut off", "text"])
def test_damaged_parquet(call: Call, tmp_path: Path, place: Path, content: bytes) -> None:
    path = tmp_path / "damaged.parquet"
    path.write_bytes(content)
    assert_one_line(run_squares(call, path), "damaged.parquet")
    assert [*place.iterdir()] == []


@pytest.mark.parametrize("wrong", [-0.01, 1.01, 255.0, float("nan"), float("inf")])
def test_tensors_outside_the_box(wrong: float, tmp_path: Path) -> None:
    x = torch.full((4, 1, 4, 4), 0.5)
    x[2, 0, 1, 1] = wrong
    defense = load_defense(SQUARES)
    with pytest.raises(UsageError, match=r"^images must (lie in \[0, 1\]; got values from|be finite; 1 of 4 hold) .*$"):
        robench.evaluate(defense, "pgd", ThreatModel("linf", 0.1), (x, torch.arange(4)), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_tensors_of_another_shape_and_labels_beyond_the_classes(tmp_path: Path) -> None:
    defense, threat = load_defense(SQUARES), ThreatModel("linf", 0.1)
    with pytest.raises(UsageError, match=r"takes images of shape \(1, 4, 4\); the data has \(1, 5, 4\)"):
        robench.evaluate(defense, "pgd", threat, (torch.rand(4, 1, 5, 4), torch.arange(4)), out=tmp_path / "run")
    with pytest.raises(UsageError, match="labels must be 0 to 3"):
        robench.evaluate(defense, "pgd", threat, (torch.rand(5, 1, 4, 4), torch.arange(5)), out=tmp_path / "run")
    with pytest.raises(UsageError, match="as many labels"):
        robench.evaluate(defense, "pgd", threat, (torch.rand(5, 1, 4, 4), torch.arange(4)), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


# bad inputs: weights


def plant() -> None:
    raise SystemExit("the planted pickle ran")


class Planted:
    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return plant, ()


def write_weights(path: Path, kind: str) -> None:
    with seeded("weights of the command line"):
        net = ConvNet(channels=3 if kind == "shapes" else 1)
    if kind == "pickle":
        path.write_bytes(pickle.dumps(Planted()))
    elif kind == "torch pickle":
        torch.save({"weight": Planted()}, path)
    elif kind != "missing":
        save_weights(net, path, {})
    if kind == "cut off":
        path.write_bytes(path.read_bytes()[:100_000])


@pytest.mark.parametrize(
    ("kind", "name", "parts"),
    [
        ("missing", "w.safetensors", ["w.safetensors does not exist"]),
        ("cut off", "w.safetensors", ["w.safetensors is damaged"]),
        ("shapes", "w.safetensors", ["does not fit", "expected (64, 1, 4, 4), got (64, 3, 4, 4)"]),
        ("pickle", "w.pt", ["never runs a pickle"]),
        ("pickle", "w.safetensors", ["never runs a pickle"]),
        ("torch pickle", "w.pt", ["never runs a pickle"]),
    ],
)
def test_bad_weights(call: Call, tmp_path: Path, place: Path, kind: str, name: str, parts: list[str]) -> None:
    write_weights(tmp_path / name, kind)
    outcome = call("run", "--defense", "convnet", "--attack", "pgd", "--n", 4, "--weights", tmp_path / name)
    assert_one_line(outcome, *parts)
    assert [*place.iterdir()] == []


def test_no_weights_for_the_dataset(call: Call, place: Path) -> None:
    outcome = call("run", "--defense", "convnet", "--attack", "pgd", "--dataset", "svhn")
    assert_one_line(outcome, 'no weights "svhn" of defense "convnet"', "robench train", "--weights")
    assert [*place.iterdir()] == []


# bad inputs: defenses that break the contract


@pytest.mark.parametrize(
    ("offender", "part"),
    [
        ("Nan", 'defense "nan": logits must be finite'),
        ("TooManyClasses", 'defense "too_many_classes": logits must be a tensor of shape (4, 4); got (4, 5)'),
        ("WrongShape", 'defense "wrong_shape": logits must be a tensor of shape (4, 4); got (4,)'),
        ("Undeclared", 'defense "undeclared" is declared deterministic'),
    ],
)
def test_offending_defense(call: Call, squares: Path, place: Path, offender: str, part: str) -> None:
    assert_one_line(run_squares(call, squares, "--defense", f"{TOYS}:{offender}"), part)
    assert [*place.iterdir()] == []


def test_defense_that_offends_under_attack_only(call: Call, squares: Path) -> None:
    outcome = run_squares(call, squares, "--defense", f"{TOYS}:LateNan", "--out", "run", attack="fgsm")
    assert_one_line(outcome, 'defense "late_nan": logits must be finite')
    assert [*(Path("run") / "units").iterdir()] == []
    assert not (Path("run") / "result.json").exists()


# run folders


# a run and its audit


def test_run_with_audit_tells_the_verdict_and_its_row_carries_it(call: Call, squares: Path, place: Path) -> None:
    outcome = run_squares(call, squares, "--audit", "--out", "run", eps="0.05,0.15")
    assert outcome.status == 0, outcome.err
    for eps in ("0.05", "0.15"):
        assert f"audit of linf eps={eps} on 12 images: " in outcome.out
        assert f"report: run/audit-{eps}/audit.html" in outcome.out
        assert (place / f"run/audit-{eps}/audit.html").exists()
    assert "12 images show little; take at least 32" in outcome.out
    before = {path: path.stat().st_mtime_ns for path in (place / "run").rglob("units/*")}
    outcome = call("run", "--resume", "run", "--audit", "--json")
    assert {path: path.stat().st_mtime_ns for path in (place / "run").rglob("units/*")} == before
    audits = {one["eps"]: one for one in outcome.json()["audits"]}
    assert audits.keys() == {0.05, 0.15}
    assert audits[0.15]["folder"] == "run/audit-0.15"
    (stored,) = read_rows(place / "run" / "row.csv")
    told = {"audit_verdict": audits[0.15]["verdict"], "audit_failed_checks": " ".join(audits[0.15]["failed"])}
    for row in (stored, outcome.json()["row"]):
        assert {name: row[name] for name in told} == told
    assert call("verify", "run", "--device", "cpu").status == 0
    assert call("leaderboard", "add", "run").status == 0
    for eps, audit in audits.items():
        (path,) = (place / "leaderboards").glob(f"*-linf-{eps}.csv")
        (row,) = read_rows(path)
        assert row["audit_verdict"] == audit["verdict"]
        assert row["audit_failed_checks"] == " ".join(audit["failed"])
    assert call("leaderboard", "verify", "--trust", "--device", "cpu").status == 0


def test_an_audit_that_is_named_goes_before_the_one_inside_the_run(call: Call, squares: Path, place: Path) -> None:
    assert run_squares(call, squares, "--audit", "--out", "run").status == 0
    shutil.copytree(place / "run" / "audit-0.15", place / "other")
    path = place / "other" / "audit.json"
    content = json.loads(path.read_text())
    for finding in content["findings"]:
        finding["verdict"] = "fail" if finding["check"] == "noise" else "pass"
    path.write_text(json.dumps({**content, "verdict": "masked", "failed": ["noise"]}))
    assert call("leaderboard", "add", "run", "other").status == 0
    (board,) = (place / "leaderboards").glob("*.csv")
    (row,) = read_rows(board)
    assert (row["audit_verdict"], row["audit_failed_checks"]) == ("masked", "noise")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--norm", "l1"], "--audit takes linf, l2 and an eps above 0; the threat model is l1 eps=0.15"),
        (["--eps", "0"], "the threat model is linf eps=0"),
        (["--out", "memory://there/run"], "audits are written to a folder, not to memory://there/run"),
    ],
)
def test_what_cannot_be_audited_is_refused_before_the_run(
    call: Call, squares: Path, place: Path, arguments: list[str], part: str
) -> None:
    words = ["run", "--defense", SQUARES, "--dataset", squares, "--attack", "pgd", "--eps", "0.15", "--device", "cpu"]
    assert_one_line(call(*words, "--audit", *arguments), part)
    assert not list(place.iterdir())


def test_a_missing_package_of_the_report_is_named_before_the_run(
    call: Call, squares: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert_one_line(run_squares(call, squares, "--audit", "--out", "run"), "pip install 'robench[report]'")
    words = ["audit", "--defense", SQUARES, "--dataset", squares, "--eps", "0.15", "--device", "cpu", "--out", "audit"]
    assert_one_line(call(*words), "pip install 'robench[report]'")
    assert not list(place.iterdir())


def test_interrupt_of_the_audit_names_the_command_that_goes_on(
    call: Call, squares: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    evidence = importlib.import_module("robench.audit.evidence")
    with monkeypatch.context() as context:
        context.setattr(evidence, "evaluate", stop)
        outcome = run_squares(call, squares, "--audit", "--out", "run")
    assert outcome.status == 130
    *_, line = outcome.lines
    assert line == "robench: interrupted; finish it with: robench run --resume run --audit"
    assert call(*shlex.split(line.partition("with: robench ")[2])).status == 0
    assert (place / "run" / "audit-0.15" / "audit.json").exists()


def test_audit_cannot_stand_beside_a_study(call: Call) -> None:
    assert_one_line(call("run", "study.toml", "--audit"), "--audit cannot stand beside a study's file")


@pytest.fixture
def finished(call: Call, squares: Path, place: Path) -> Path:
    outcome = run_squares(call, squares, "--out", "finished")
    assert outcome.status == 0, outcome.err
    return place / "finished"


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_run_folder_is_not_run_over(call: Call, squares: Path, finished: Path) -> None:
    before = snapshot(finished)
    assert_one_line(run_squares(call, squares, "--out", "finished"), "holds a run already", "--resume finished")
    assert snapshot(finished) == before


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--n", 8], "n is 12, not 8"),
        (["--seed", 3], "seed is 0, not 3"),
        (["--eps", "0.2"], "eps is (0.15,), not 0.2"),
        (["--attack", "fgsm"], "the attacks are pgd, not fgsm"),
        (["--defense", NOISY], "defense is"),
        (["--dataset", "fashion_mnist"], "dataset is"),
        (["--norm", "l2"], "norm is 'linf', not 'l2'"),
        (["--protocol", "quick"], "protocol is"),
        (["--unit-size", 5], "unit_size is 128, not 5"),
        (["--weights", "other.safetensors"], "weights"),
        (["--out", "elsewhere"], "--out"),
    ],
    ids=lambda value: value if isinstance(value, str) else str(value[0]),
)
def test_resume_refuses_another_spec(call: Call, finished: Path, arguments: list[object], part: str) -> None:
    before = snapshot(finished)
    assert_one_line(call("run", "--resume", "finished", *arguments), "finished", part)
    assert snapshot(finished) == before


def test_resume_of_a_finished_run_with_its_own_options_changes_nothing(call: Call, finished: Path) -> None:
    before = snapshot(finished)
    outcome = call("run", "--resume", "finished", "--eps", "0.15", "--n", IMAGES, "--attack", "pgd", "--json")
    assert outcome.status == 0, outcome.err
    assert snapshot(finished) == before


@pytest.mark.parametrize("command", [["run", "--resume"], ["verify"], ["leaderboard", "add"]], ids=" ".join)
def test_folder_that_is_no_run(call: Call, place: Path, command: list[str]) -> None:
    (place / "empty").mkdir()
    assert_one_line(call(*command, "empty"), "empty is not a run folder")
    assert_one_line(call(*command, "nowhere"), "nowhere is not a run folder")
    assert [path.name for path in place.rglob("*")] == ["empty"]


def test_out_that_cannot_be_made(call: Call, squares: Path, tmp_path: Path, place: Path) -> None:
    """Neither root nor a plain user can make a folder under a file, nor in /proc."""
    (tmp_path / "file").write_text("")
    assert_one_line(run_squares(call, squares, "--out", tmp_path / "file" / "run"), "cannot write", "Not a directory")
    assert_one_line(run_squares(call, squares, "--out", "/proc/robench-run"), "cannot write /proc/robench-run")
    assert [*place.iterdir()] == []


def test_no_room_in_the_middle_of_a_run(squares: Path, call: Call) -> None:
    """A limit on the size of files stands in for a full disk: run.json fits, the unit with its images does not."""
    no_cache = "import sys; sys.dont_write_bytecode = True"  # half a module, cut by the limit, would outlive the test
    limit = f"{no_cache}; import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (2500, 2500))"
    common = ["--defense", SQUARES, "--attack", "pgd", "--dataset", squares, "--eps", "0.15", "--device", "cpu"]
    outcome = in_process("run", *common, "--n", IMAGES, "--out", "run", before=limit)
    assert_one_line(outcome, "cannot write", "File too large", "--out")
    assert sorted(path.name for path in Path("run").rglob("*")) == [".lock", "run.json", "units"]
    resumed = call("run", "--resume", "run", "--json")
    assert resumed.status == 0, resumed.err
    assert resumed.json()["robust_accuracy"]["value"] == 0.0


# verify and leaderboard


def rewrite_unit(folder: Path, change: Callable[[dict[str, list[Any]]], None]) -> None:
    """Changes the stored table and gives the file the name that fits its new content."""
    (path,) = (folder / "units").iterdir()
    table = pq.read_table(path)
    columns = table.to_pydict()
    change(columns)
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns, schema=table.schema), buffer, compression="zstd")
    path.unlink()
    digest = hashlib.sha256(buffer.getvalue()).hexdigest()
    (path.parent / f"00000-{digest}.parquet").write_bytes(buffer.getvalue())


def of_pgd(columns: dict[str, list[Any]]) -> int:
    return columns["attack"].index("pgd")


def put_original(columns: dict[str, list[Any]]) -> None:
    """The first image is one on which the defense is right, so its claimed error does not hold."""
    row = of_pgd(columns)
    pixels = np.full((4, 4), 102 / 255, dtype="<f4")
    quadrant, column = divmod(columns["label"][row], 2)
    pixels[2 * quadrant : 2 * quadrant + 2, 2 * column : 2 * column + 2] = 153 / 255
    columns["x_adv"][row] = pixels.tobytes()


def leave_the_bound(columns: dict[str, list[Any]]) -> None:
    row = of_pgd(columns)
    pixels = np.frombuffer(columns["x_adv"][row], dtype="<f4").copy()
    pixels[:] = 1 - pixels
    columns["x_adv"][row] = pixels.tobytes()


def put_nan(columns: dict[str, list[Any]]) -> None:
    columns["x_adv"][of_pgd(columns)] = np.full(16, np.nan, dtype="<f4").tobytes()


def claim_more(columns: dict[str, list[Any]]) -> None:
    """All votes but the clean ones say that every image held."""
    for row, attack in enumerate(columns["attack"]):
        if attack != "clean":
            columns["votes"][row] = [int(number == columns["label"][row]) for number in range(4)]


def test_verify_holds(call: Call, finished: Path) -> None:
    outcome = call("verify", finished, "--device", "cpu", "--json")
    assert outcome.status == 0, outcome.err
    content = outcome.json()
    assert content["holds"] is True
    assert content["failures"] == []
    assert call("verify", finished, "--device", "cpu").status == 0


def test_verify_of_a_randomized_defense_holds(call: Call, squares: Path) -> None:
    outcome = run_squares(call, squares, "--defense", NOISY, "--out", "noisy", "--judge-repeats", 20, attack="fgsm")
    assert outcome.status == 0, outcome.err
    outcome = call("verify", "noisy", "--device", "cpu")
    assert outcome.status == 0
    assert outcome.out == call("verify", "noisy", "--device", "cpu").out  # the same answers for everybody


def test_verify_draws_other_answers_by_a_seed_and_tells_it(call: Call, squares: Path) -> None:
    """Else a claim could be made that holds on the one draw that everybody gets."""
    run_squares(call, squares, "--defense", NOISY, "--out", "noisy", "--judge-repeats", 20, attack="fgsm")
    told = [call("verify", "noisy", "--device", "cpu", "--json", *seed).json() for seed in ([], *[["--seed", 7]] * 2)]
    assert [one["holds"] for one in told] == [True] * 3
    assert [one.get("seed") for one in told] == [None, 7, 7]
    assert told[1] == told[2]
    assert told[0]["claims"] != told[1]["claims"]
    assert call("verify", "noisy", "--device", "cpu", "--seed", 7).out.endswith("noisy: holds, on answers of seed 7\n")


@pytest.mark.parametrize(
    ("change", "claim"),
    [
        (put_original, "robust accuracy at eps 0.15"),
        (leave_the_bound, "within eps"),
        (put_nan, "finite"),
        (claim_more, "robust accuracy at eps 0.15"),
    ],
)
def test_verify_finds_a_changed_image_or_claim(
    call: Call, finished: Path, change: Callable[[dict[str, list[Any]]], None], claim: str
) -> None:
    rewrite_unit(finished, change)
    outcome = call("verify", finished, "--device", "cpu", "--json")
    assert outcome.status == 1, outcome
    content = outcome.json()
    assert content["holds"] is False
    assert any(claim in failure for failure in content["failures"])
    assert "Traceback" not in outcome.err


@pytest.mark.parametrize(
    ("file", "old", "new", "told"),
    [
        ("result.json", '"n": 12', '"n": 13', "not so: n"),
        ("row.csv", ",12,1,1,", ",13,1,1,", "not so: row.csv"),
        ("result.json", "{", "{{", "Expecting property name"),
        ("row.csv", "rank,", "rang,", "must have, each once, the columns"),
    ],
)
def test_verify_compares_the_figures_told_with_the_table(
    call: Call, finished: Path, file: str, old: str, new: str, told: str
) -> None:
    path = finished / file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    outcome = call("verify", finished, "--device", "cpu", "--json")
    (failure,) = outcome.json()["failures"]
    assert told in failure


def test_verify_refuses_a_unit_without_its_digest(call: Call, finished: Path) -> None:
    (path,) = (finished / "units").iterdir()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    assert_one_line(call("verify", finished), "is damaged", "digest")
    assert_one_line(call("leaderboard", "add", finished), "is damaged", "digest")
    path.unlink()
    assert_one_line(call("verify", finished), "missing")


def test_verify_without_the_data(call: Call, finished: Path, squares: Path) -> None:
    squares.unlink()
    assert_one_line(call("verify", finished), "squares.parquet")


def test_leaderboard_add_writes_one_row_and_adding_twice_changes_nothing(
    call: Call, finished: Path, squares: Path, place: Path
) -> None:
    outcome = call("leaderboard", "add", finished, "--json")
    assert outcome.status == 0, outcome.err
    (path,) = (Path(one) for one in outcome.json()["leaderboards"])
    assert path.parent == Path("leaderboards")
    assert [*squares.parent.glob("*.csv")] == []
    content = path.read_text()
    assert len(content.splitlines()) == 2
    assert ",squares," in content
    assert call("leaderboard", "add", finished).status == 0
    assert path.read_text() == content
    assert sorted(one.name for one in (place / "leaderboards").iterdir()) == [path.name, "evidence"]


def test_leaderboard_folder_that_cannot_be_made(call: Call, finished: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    outcome = call("leaderboard", "add", finished, "--leaderboards", tmp_path / "file" / "boards")
    assert_one_line(outcome, "cannot make the folder")


def test_gradient_paths_that_a_list_leaves_out_are_named(
    call: Call, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """PGD along the first path alone leaves ten steps of JEM twice what the path without refinement leaves."""
    words = ["run", "--defense", "jem(refine_steps=1)", "--n", 2, "--eot", 1, "--judge-repeats", 2, "--device", "cpu"]
    assert call(*words, "--attack", "fgsm,noise(tries=1)", "--out", tmp_path / "one").status == 0
    (proposed,) = re.findall(r"jem has other gradient paths.* --attack '([^']*)'", caplog.text)
    assert proposed == "fgsm,noise(tries=1),fgsm@bpda,fgsm@detached"
    caplog.clear()
    assert call(*words, "--attack", proposed, "--out", tmp_path / "all").status == 0
    assert "gradient paths" not in caplog.text
