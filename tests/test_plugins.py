"""Plugins of other distributions, files and modules: found, run, and refused in one line."""

from __future__ import annotations

import json
import keyword
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

import robench.testing
from robench.cli import main
from robench.errors import RobenchError, UsageError
from robench.registry import load_attack, load_defense, parse_spec, resolve, spec_of, split_specs

PLUGIN = Path(__file__).parent / "external_plugin"
COMMAND = (sys.executable, "-c", "from robench.cli import main; main()")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the example plugin installed in it, from a copy, since a build leaves files behind."""
    folder = tmp_path_factory.mktemp("plugin")
    shutil.copytree(PLUGIN, folder / "source", ignore=shutil.ignore_patterns("__pycache__", "build", "*.egg-info"))
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "install")
    offline = ("--no-deps", "--no-index", "--no-build-isolation", "--target", folder / "site", folder / "source")
    done = subprocess.run([*pip, *offline], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert done.returncode == 0, done.stdout
    return folder / "site"


@dataclass
class Answer:
    """What a command left behind."""

    status: int
    out: str
    err: str


class Shell:
    """Runs robench with the plugin on the path: here, which is quick, or as a process of its own."""

    def __init__(self, folder: Path, path: list[Path], capture: pytest.CaptureFixture[str]) -> None:
        self.folder, self.path, self.capture = folder, path, capture

    def here(self, *arguments: str) -> Answer:
        with mock.patch("sys.argv", ["robench", *arguments]):
            try:
                main()
                status = 0
            except SystemExit as stop:
                status = int(stop.code or 0)
        return Answer(status, *self.capture.readouterr())

    def spawn(self, *arguments: str, command: tuple[str, ...] = COMMAND) -> Answer:
        path = os.pathsep.join(map(str, self.path))
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*command, *arguments], cwd=self.folder, env=environment, capture_output=True, text=True, check=False
        )
        return Answer(done.returncode, done.stdout, done.stderr)

    def json(self, *arguments: str) -> dict[str, Any]:
        answer = self.here(*arguments, "--json")
        assert answer.status == 0, answer.err
        content: dict[str, Any] = json.loads(answer.out)
        return content

    def refuse(self, *arguments: str) -> str:
        """The one line of an error that the user can fix."""
        answer = self.here(*arguments)
        assert (answer.status, answer.out) == (2, ""), answer
        (line,) = answer.err.splitlines()
        return line


@pytest.fixture
def shell(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Shell]:
    """In an empty folder; what the plugins import is forgotten afterwards."""
    more = tmp_path / "more"
    more.mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(site)
    monkeypatch.syspath_prepend(more)
    before = set(sys.modules)
    yield Shell(tmp_path, [site, more], capsys)
    for name in set(sys.modules) - before:
        if name.startswith(("robench_example_plugin", "robench_file_")):
            del sys.modules[name]


# entry points


def test_list_shows_plugins_beside_the_built_in_ones(shell: Shell) -> None:
    answer = shell.spawn("list", "--json")
    assert answer.status == 0, answer.err
    names = json.loads(answer.out)["names"]
    assert {"convnet", "example_blur", "shortrun"} <= set(names["defenses"])
    assert {"example_noise", "fgsm", "pgd"} <= set(names["attacks"])


def test_list_of_a_norm_asks_the_plugins(shell: Shell) -> None:
    assert "example_noise" in shell.json("list", "attacks", "--norm", "l2")["names"]["attacks"]
    assert "example_noise" not in shell.json("list", "attacks", "--norm", "l0")["names"]["attacks"]


def test_run_by_entry_point(shell: Shell) -> None:
    answer = shell.spawn("run", "--defense", "example_blur", "--attack", "example_noise,pgd", "--n", "16", "--json")
    assert answer.status == 0, answer.err
    content = json.loads(answer.out)
    assert (content["defense"], content["n"], content["eot"], content["judge_repeats"]) == ("example_blur", 16, 1, 1)
    assert list(content["per_attack"]) == ["example_noise", "pgd"]
    values = {name: estimate["value"] for name, estimate in content["per_attack"].items()}
    assert content["robust_accuracy"]["value"] <= min(values.values())
    assert max(values.values()) <= content["clean_accuracy"]["value"]
    for estimate in (content["clean_accuracy"], content["robust_accuracy"], *content["per_attack"].values()):
        assert 0 <= estimate["low"] <= estimate["value"] <= estimate["high"] <= 1
    assert content["row"]["defense"] == "example_blur"
    assert (shell.folder / content["run"] / "run.json").is_file()
    assert shell.json("verify", content["run"])["holds"]


@pytest.mark.slow
def test_plugin_author_runs_the_contract(shell: Shell) -> None:
    """The shipped contract works in a project of its own: no conftest of robench, no checkout on the path."""
    shutil.copy(PLUGIN / "contract.py", shell.folder)
    pytest_command = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:randomly")
    done = shell.spawn("contract.py", command=pytest_command)
    assert done.status == 0, done.out
    weak = (shell.folder / "contract.py").read_text().replace("draws_tried=200", "draws_tried=1")
    (shell.folder / "contract.py").write_text(weak)
    done = shell.spawn("contract.py", "-k", "known_distance", command=pytest_command)
    assert done.status == 1
    assert "AssertionError: linf eps=" in done.out
    assert "== 12" in done.out, "pytest must have rewritten the asserts of the contract"


def test_testing_without_pytest_says_what_is_missing() -> None:
    with (
        mock.patch.dict(sys.modules, {"pytest": None}),
        pytest.raises(ModuleNotFoundError, match="needs pytest: pip install pytest"),
    ):
        runpy.run_path(robench.testing.__file__)


# classes in files and modules


FILE = '''
from dataclasses import dataclass

import torch
from robench import Attack, Defense


class Mean(Defense):
    """Classifies the brightness: level k of ten where the mean is nearest to k / 20."""

    name = "mean"
    num_classes = 10
    input_shape = (1, 28, 28)

    def __init__(self, gain: float = 1.0) -> None:
        super().__init__()
        self.gain = gain

    def forward(self, x):
        levels = torch.arange(10) / 20
        return -self.gain * (x.mean((1, 2, 3))[:, None] - levels) ** 2


@dataclass(frozen=True)
class Shift(Attack):
    """Makes the image darker or brighter."""

    name = "shift"
    norms = ("linf",)
    access = "none"

    sign: int = 1

    def __call__(self, victim, x, y, threat):
        return threat.project(x, x + self.sign * threat.eps)
'''


def test_run_classes_in_a_file(shell: Shell) -> None:
    (shell.folder / "mine.py").write_text(FILE)
    defense, attacks = "mine.py:Mean(gain=2.0)", "mine.py:Shift,mine.py:Shift(sign=-1)"
    content = shell.json("run", "--defense", defense, "--attack", attacks, "--n", "16", "--out", "found")
    assert content["defense"] == "mean"
    assert list(content["per_attack"]) == ["shift", "shift(sign=-1)"]
    assert content["complete"]
    verified = shell.json("verify", "found")
    assert verified["holds"]
    assert verified["run"] == "found"
    for unit in (shell.folder / "found" / "units").iterdir():
        unit.unlink()
    resumed = shell.json("run", "--resume", "found")
    assert resumed["per_attack"] == content["per_attack"]


@pytest.mark.usefixtures("shell")
def test_class_in_a_module() -> None:
    attack = load_attack("robench_example_plugin.noise:ExampleNoise(draws_tried=3)")
    assert (attack.name, attack.passes()) == ("example_noise", 3)
    assert attack == load_attack(attack.spec())  # by its entry point
    assert load_defense("example_blur(width=5)").name == "example_blur"


# what is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--defense", "example_blurr", "--attack", "pgd"), 'did you mean "example_blur"?'),
        (("--defense", "example_blur", "--attack", "exampel_noise"), 'did you mean "example_noise"?'),
        (("--defense", "example_blur", "--attack", "example_noise(draw_tried=3)"), 'did you mean "draws_tried"?'),
        (("--defense", "example_blur", "--attack", "example_noise(draws_tried=0)"), "must be at least 1; got 0"),
        (("--defense", "example_blur(witdh=3)", "--attack", "pgd"), "its options are: width"),
        (("--defense", "example_blur", "--attack", "example_noise", "--norm", "l0", "--eps", "3"), "supports linf, l2"),
        (("--defense", "mine.py:Meen", "--attack", "pgd"), 'did you mean "Mean"?'),
        (("--defense", "mine.py:Shift", "--attack", "pgd"), "must be a class that extends robench.Defense"),
        (("--defense", "none.py:Mean", "--attack", "pgd"), "the file none.py does not exist"),
        (("--defense", "broken.py:Mean", "--attack", "pgd"), "Error at broken.py:1: No module named 'not_installed'"),
        (("--defense", "no_such_module:Mean", "--attack", "pgd"), "No module named 'no_such_module'"),
        (("--defense", "example_blur", "--attack", "broken_noise"), "SyntaxError"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refusal_is_one_line(shell: Shell, arguments: tuple[str, ...], message: str) -> None:
    (shell.folder / "mine.py").write_text(FILE)
    (shell.folder / "broken.py").write_text("import not_installed\n")
    plugin = shell.folder / "more" / "broken_noise-1.dist-info"
    plugin.mkdir()
    (plugin / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-noise\nVersion: 1\n")
    (plugin / "entry_points.txt").write_text("[robench.attacks]\nbroken_noise = broken_noise:Noise\n")
    (shell.folder / "more" / "broken_noise.py").write_text("class Noise(:\n")
    assert message in shell.refuse("run", "--n", "4", *arguments)


def test_a_broken_plugin_does_not_stop_the_others(shell: Shell) -> None:
    (shell.folder / "broken.py").write_text("import not_installed\n")
    shell.refuse("run", "--n", "4", "--defense", "broken.py:Mean", "--attack", "pgd")
    assert "example_blur" in shell.json("list", "defenses")["names"]["defenses"]


# specs


WORDS = st.from_regex(r"[a-z_][a-z0-9_]{0,8}", fullmatch=True).filter(lambda word: not keyword.iskeyword(word))
NUMBERS = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
VALUES = NUMBERS | st.booleans() | st.none() | st.text(max_size=8) | st.lists(NUMBERS, max_size=3) | st.tuples(NUMBERS)
OPTIONS = st.dictionaries(WORDS, VALUES, max_size=3)


@given(name=WORDS, options=OPTIONS)
def test_spec_round_trip(name: str, options: dict[str, Any]) -> None:
    assert parse_spec(spec_of(name, options)) == (name, options)


def test_a_switch_is_no_text_unless_it_is_quoted() -> None:
    """The text "false" is true; "none" stays a word, as options have it."""
    assert parse_spec("a(x=false, y=true, z=none)") == ("a", {"x": False, "y": True, "z": "none"})
    assert parse_spec("a(x='false')") == ("a", {"x": "false"})
    assert load_attack("pgd(random_start=false)") == load_attack("pgd(random_start=False)")
    with pytest.raises(UsageError, match=r'^attack "pgd": random_start must be true or false; got "no"$'):
        load_attack("pgd(random_start=no)")


def test_a_switch_of_a_function_takes_no_text(tmp_path: Path) -> None:
    (tmp_path / "made.py").write_text("def make(noisy=True):\n    raise AssertionError('was called')\n")
    with pytest.raises(UsageError, match=r'noisy must be true or false; got "no"$'):
        load_defense(f"{tmp_path}/made.py:make(noisy=no)", "fashion_mnist")


@given(specs=st.lists(st.tuples(WORDS, OPTIONS), max_size=4))
def test_list_of_specs_round_trip(specs: list[tuple[str, dict[str, Any]]]) -> None:
    texts = [spec_of(name, options) for name, options in specs]
    assert split_specs(", ".join(texts)) == texts


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("pgd", ("pgd", {})),
        (" pgd ( steps = 5 ) ", ("pgd", {"steps": 5})),
        ("pgd()", ("pgd", {})),
        ("pgd(loss=dlr)", ("pgd", {"loss": "dlr"})),
        ("pgd(step_size=-1e-2)", ("pgd", {"step_size": -0.01})),
        ("path/to/file.py:Class(a=(1, 2))", ("path/to/file.py:Class", {"a": (1, 2)})),
    ],
)
def test_spec_is_read(text: str, expected: tuple[str, dict[str, Any]]) -> None:
    assert parse_spec(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "()",
        "pgd(",
        "pgd)",
        "pgd(5)",
        "pgd(steps=)",
        "pgd(**x)",
        "pgd(steps=5) x",
        "pgd(a=open('f'))",
        "pgd(a=1, a=2)",
    ],
)
def test_malformed_spec_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        resolve("attack", parse_spec(text)[0])


@pytest.mark.parametrize("text", ["fgsm,,pgd", " fgsm , pgd,", ",fgsm,pgd"])
def test_empty_entries_of_a_list_are_left_out(text: str) -> None:
    assert split_specs(text) == ["fgsm", "pgd"]


NETS = """
import robench
from torch import nn


class Net(nn.Module):
    def forward(self, x):
        return x.flatten(1)[:, :10]


class Mine(robench.Defense):
    name, num_classes, input_shape = "mine", 10, (1, 28, 28)

    def __init__(self, gain=1.0):
        super().__init__()
        self.gain = gain

    def forward(self, x):
        return self.gain * x.flatten(1)[:, :10]


net = Net()
wrapped = robench.wrap(net, num_classes=10, input_shape=(1, 28, 28), name="wrapped")


def trained():
    return net


def make(gain=2.0):
    return Mine(gain)


def fail():
    raise RuntimeError("no weights here")
"""


@pytest.mark.parametrize(
    ("written", "name", "gain"),
    [("nets.py:wrapped", "wrapped", None), ("nets.py:make(gain=3.0)", "mine", 3.0), ("nets.py", "mine", 1.0)],
)
def test_an_instance_a_function_and_a_file_of_one_defense_are_taken(
    written: str, name: str, gain: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    defense = load_defense(written, "fashion_mnist")
    assert (defense.name, getattr(defense, "gain", None), defense.training) == (name, gain, False)
    assert defense.origin is not None
    assert defense.origin.spec == written


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (":Net", r"plain torch module. Write into nets.py: defense = robench.wrap\(Net\(\), num_classes=10, inp"),
        (":net", r"defense = robench.wrap\(net, .*, input_shape=\(1, 28, 28\)\) and take --defense nets.py:defense"),
        (":trained", r"defense = robench.wrap\(trained\(\), "),
        (":make(gan=3)", "got an unexpected keyword argument 'gan'; its options are: gain"),
        (":wrapped(gain=3)", "is made already and takes no options; got gain"),
        (":fail", "raised RuntimeError at nets.py:35: no weights here"),
        (":robench", "must be a class that extends robench.Defense, an instance of one, or a function"),
    ],
)
def test_what_is_no_defense_says_what_to_write(
    written: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RobenchError, match=message):
        load_defense(f"nets.py{written}", "fashion_mnist")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            f"{NETS}\n\nclass Other(Mine):\n    name = 'other'\n",
            "several defenses; name one: some.py:Mine, some.py:Oth",
        ),
        ("import robench\n", "some.py holds no robench.Defense; name a function that returns one"),
    ],
)
def test_a_file_of_no_or_of_several_defenses_asks_for_a_name(
    text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "some.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=message):
        load_defense("some.py")
    with pytest.raises(UsageError, match=r'attack "some.py": name its class: some.py:Class'):
        load_attack("some.py")
    with pytest.raises(UsageError, match=r"the file nowhere.py does not exist"):
        load_defense("nowhere.py")
