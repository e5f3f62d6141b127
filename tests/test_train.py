"""Training: a cut-off run resumes bit for bit, bad checkpoints are one line, the card says what was done."""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jaxtyping
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from shortened import CutOffError, Shortened
from torch import Tensor

import robench
from robench import DataError, Defense, UsageError, load_defense
from robench.cli import main
from robench.command import TrainRequest, train_command, trained_words
from robench.data import Dataset, load_dataset
from robench.defense import weights_digest
from robench.defenses.convnet import ConvNet
from robench.defenses.convnet_at import ConvNetAT
from robench.defenses.fortified import Fortified
from robench.defenses.shortrun import ShortRun, auto_sigma
from robench.errors import Interrupted
from robench.files import locked
from robench.registry import resolve
from robench.rng import seeded
from robench.train import TrainSettings, run, train
from robench.train.named import TrainJob, customary_bound, train_named
from robench.weights import read_card, save_weights

TOY = f"{Path(__file__).with_name('cli_toys.py')}:Trainable"
TRAIN_IMAGES = 600
HOLDOUT = 64
EVERY_ITERATION = "import robench.train.run as run; run.CHECKPOINT_SECONDS = -1.0"


@pytest.fixture(autouse=True)
def place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.delenv("ROBENCH_DATA", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Here and in the processes beside this one: tiny batches are quicker so, above all on a busy machine."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def images() -> Dataset:
    """256 images of the embedded split, standing in for a training split."""
    return load_dataset("fashion_mnist", n=256, seed=5)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training split in the hub's layout: class c has a bright row at height 2 c + 4. The test split is embedded."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.Generator(np.random.PCG64(0))
    cells, labels = [], []
    for number in range(TRAIN_IMAGES):
        pixels = rng.integers(0, 80, (28, 28), dtype=np.uint8)
        pixels[2 * (number % 10) + 4] = 255
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, format="PNG")
        cells.append({"bytes": buffer.getvalue(), "path": None})
        labels.append(number % 10)
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    (folder / "fashion_mnist").mkdir()
    table = pa.table({"image": pa.array(cells, kind), "label": labels})
    pq.write_table(table, folder / "fashion_mnist" / "train-00000-of-00001.parquet")
    return folder


def make(kind: str) -> Defense:
    makers: dict[str, Callable[[], Defense]] = {
        "shortrun": ShortRun,
        "paper_literal": lambda: ShortRun(preset="paper_literal"),
        "toy": resolve("defense", TOY),
    }
    with seeded("training test"):
        return makers[kind]()


@pytest.mark.parametrize("kind", ["shortrun", "paper_literal"])
def test_stages_update_what_the_thesis_says(
    kind: str, images: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Generator alone, classifier alone, then both; sigma is learned in the third stage of the repaired preset only."""
    defense = make(kind)
    assert isinstance(defense, ShortRun)
    recipe = Shortened(defense, defense.recipe(), {}, batch_size=2)
    parts = {"generator": defense.generator, "classifier": defense.classifier}
    changed: dict[str, set[str]] = {}
    before: dict[str, str] = {}

    def look() -> dict[str, str]:
        return {name: weights_digest(part) for name, part in parts.items()} | {"sigma": str(defense.log_sigma.item())}

    def note(name: str) -> None:
        nonlocal before
        now = look()
        changed[name] = {part for part in now if now[part] != before[part]}
        before = now

    names = iter([stage.name for stage in recipe.stages()])

    def measure(_x: Tensor, _y: Tensor) -> dict[str, float]:
        note(next(names))
        return {}

    recipe.prepare(images.x)
    before = look()
    monkeypatch.setattr(recipe, "measure", measure)
    monkeypatch.setattr(recipe, "prepare", lambda _x: None)  # done above
    train(defense, recipe, images, tmp_path, TrainSettings(holdout=HOLDOUT))
    everything = {"generator", "classifier"} | ({"sigma"} if kind == "shortrun" else set())
    assert changed["generative"] == {"generator"}
    assert changed["discriminative"] == {"classifier"}
    assert {name for name in changed if name.startswith("bptt")}
    assert all(parts == everything for name, parts in changed.items() if name.startswith("bptt"))


def test_prepare_sets_sigma_from_the_data_unless_the_paper_is_taken_at_its_word(images: Dataset) -> None:
    repaired, literal = make("shortrun"), make("paper_literal")
    assert isinstance(repaired, ShortRun)
    assert isinstance(literal, ShortRun)
    for defense in (repaired, literal):
        defense.recipe().prepare(images.x)
    assert repaired.log_sigma.exp().item() == pytest.approx(auto_sigma([2 * images.x - 1]), rel=1e-6)
    assert literal.log_sigma.exp().item() == pytest.approx(6.4, rel=1e-6)


# cut off and resumed


def run_toy(images: Dataset, folder: Path, *, cut: int = 0, resume: bool = False) -> str | None:
    """Trains for a few iterations; returns the weights' digest, None where it was cut off in iteration `cut`."""
    defense = make("toy")
    recipe = Shortened(defense, defense.recipe(), {"first": 9, "second": 9}, batch_size=3)

    def stop(number: int) -> None:
        if number == cut:
            raise CutOffError

    recipe.on_call = stop
    try:
        train(defense, recipe, images, folder, TrainSettings(holdout=HOLDOUT), resume=resume)
    except CutOffError:
        return None
    return weights_digest(defense)


def test_cut_off_training_ends_in_the_same_bits(
    images: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_toy(images, tmp_path / "whole")
    monkeypatch.setattr(run, "CHECKPOINT_SECONDS", -1.0)  # after every iteration
    for cut in (2, 8, 10, 15):
        folder = tmp_path / str(cut)
        assert run_toy(images, folder, cut=cut) is None
        assert run_toy(images, folder, resume=True) == whole
    assert run_toy(images, tmp_path / "again") == whole


def test_interrupt_waits_for_the_end_of_the_iteration(images: Dataset, tmp_path: Path) -> None:
    """A half-made update in a checkpoint would be lost for good, and the resumed weights would differ."""
    before = signal.getsignal(signal.SIGINT)  # ignored, where the tests run in the background
    whole = run_toy(images, tmp_path / "whole")
    defense = make("toy")
    recipe = Shortened(defense, defense.recipe(), dict.fromkeys(["first", "second"], 9), batch_size=3)

    def interrupt(number: int) -> None:
        if number == 12:
            signal.raise_signal(signal.SIGINT)

    recipe.on_call = interrupt
    with pytest.raises(KeyboardInterrupt):
        train(defense, recipe, images, tmp_path / "cut", TrainSettings(holdout=HOLDOUT))
    saved = torch.load(tmp_path / "cut" / "checkpoint.pt", weights_only=True)
    assert (saved["state"]["stage"], saved["state"]["iteration"]) == (1, 3)
    assert run_toy(images, tmp_path / "cut", resume=True) == whole
    assert signal.getsignal(signal.SIGINT) is before


@pytest.fixture
def unchecked() -> Iterator[None]:
    """As users have it, and as the processes beside this one have it: without type checks."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, unchecked: None) -> Callable[[list[str]], int]:
    """Runs a command in this process and returns its exit status."""
    del unchecked

    def run(words: list[str]) -> int:
        monkeypatch.setattr(sys, "argv", ["robench", *words])
        status: object = 0
        try:
            main()
        except SystemExit as stop:
            status = stop.code
        assert isinstance(status, int)
        return status

    return run


def train_words(data_dir: Path, out: str, *more: str, defense: str = TOY) -> list[str]:
    return ["train", "--defense", defense, "--data-dir", str(data_dir), "--device", "cpu", "--out", out, *more]


def stop_process(words: list[str], checkpoint: Path, how: signal.Signals, stage: int = 0) -> tuple[int, str]:
    """Starts `robench train` with a checkpoint after every iteration stops it when the first of a stage is there."""
    process = subprocess.Popen(
        [sys.executable, "-c", f"{EVERY_ITERATION}; from robench.cli import main; main()", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    started = time.monotonic()
    while (
        not (checkpoint.exists() and read_state(checkpoint) > (stage, 0))
        and process.poll() is None
        and time.monotonic() - started < 120
    ):
        time.sleep(0.002)
    process.send_signal(how)
    _, err = process.communicate(timeout=60)
    return process.returncode, err


def read_state(checkpoint: Path) -> tuple[int, int]:
    state = torch.load(checkpoint, weights_only=True)["state"]
    return state["stage"], state["iteration"]


@pytest.mark.parametrize(
    ("defense", "stage", "last"),
    [(TOY, 0, (1, 100)), ("jem(width=4)", 1, (1, 46))],
    ids=["toy", "jem"],
)
def test_killed_process_resumes_bit_for_bit(
    defense: str,
    stage: int,
    last: tuple[int, int],
    data_dir: Path,
    place: Path,
    command: Callable[[list[str]], int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The real defense is killed past its first stage."""
    words = functools.partial(train_words, data_dir, defense=defense)
    scale = [] if defense == TOY else ["--scale", "0.02"]
    assert command(words("whole", *scale)) == 0
    status, _ = stop_process(words("cut", *scale), place / "cut" / "checkpoint.pt", signal.SIGKILL, stage)
    assert status == -signal.SIGKILL
    assert (stage, 0) < read_state(place / "cut" / "checkpoint.pt") < last
    assert [*(place / "cut").glob("*.safetensors")] == []
    capsys.readouterr()
    assert command(words("cut", *scale, "--resume", "--json")) == 0
    card = json.loads(capsys.readouterr().out)["card"]
    (whole,), (cut,) = ([*(place / name).glob("*.safetensors")] for name in ("whole", "cut"))
    assert card["weights_digest"] == read_card(whole)["weights_digest"]
    assert whole.read_bytes() == cut.read_bytes()


def test_interrupted_process_exits_130_with_the_command_that_resumes(
    data_dir: Path, place: Path, command: Callable[[list[str]], int]
) -> None:
    """The command as printed must resume this very run: with its seed, scale and data folder."""
    words = train_words(data_dir, "a cut run", "--seed", "3", "--scale", "0.9", "--precision", "float32")
    assert command([*words[: words.index("--out")], "--out", "whole", *words[words.index("--out") + 2 :]]) == 0
    status, err = stop_process(words, place / "a cut run" / "checkpoint.pt", signal.SIGINT)
    assert status == 130
    assert "Traceback" not in err
    line = err.splitlines()[-1]
    assert line.startswith("robench: interrupted; continue with: robench train ")
    again = shlex.split(line.partition("robench train ")[2])
    assert "--resume" in again
    assert (0, 0) < read_state(place / "a cut run" / "checkpoint.pt") < (1, 90)
    assert command(["train", *again]) == 0
    weights = [(place / name / "fashion_mnist.safetensors").read_bytes() for name in ("whole", "a cut run")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("saved", [False, True], ids=["before the first checkpoint", "after it"])
def test_interrupt_advises_resume_only_where_something_was_saved(
    saved: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = tmp_path / "checkpoint.pt"

    def interrupt(job: TrainJob, *, resume: bool) -> None:
        del resume
        assert job.settings.lr_scale == 0.3
        if saved:
            checkpoint.write_bytes(b"of this run")
        raise KeyboardInterrupt

    monkeypatch.setattr("robench.command.train_named", interrupt)
    request = TrainRequest("jem", "mnist", None, tmp_path, 0, 1.0, "cpu", False, None, lr_scale=0.3)
    with pytest.raises(Interrupted) as caught:
        train_command(request)
    told = str(caught.value)
    assert ("--resume" in told) == saved
    assert ("nothing was saved yet" in told) != saved
    assert "--lr-scale 0.3" in told


def test_each_training_has_a_default_folder_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    folders = []

    def note(job: TrainJob, *, resume: bool) -> tuple[Path, dict[str, Any]]:
        assert not resume
        folders.append(job.folder)
        return job.folder, {}

    monkeypatch.setattr("robench.command.train_named", note)
    plain = TrainRequest("jem(width=4)", "fashion_mnist", None, None, 3, 1.0, "cpu", False, None)
    others: dict[str, Any] = {"recipe": "uniform", "scale": 0.5, "lr_scale": 0.3, "precision": "float32"}
    others |= {"split": "train+extra", "init": Path("old/mnist.safetensors"), "first_stage": "joint", "seed": 4}
    for request in (plain, *(dataclasses.replace(plain, **{name: value}) for name, value in others.items())):
        train_command(request)
    assert folders[0] == Path("runs/train/jem-width-4-fashion_mnist-3")
    assert folders[1] == Path("runs/train/jem-width-4-fashion_mnist-uniform-3")
    assert len(set(folders)) == len(folders)


def test_a_training_is_not_written_over(
    data_dir: Path, place: Path, command: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--recipe", "pgd2", "--scale", "0.001"]
    again = train_words(data_dir, str(place / "kept"), *words, defense="convnet_at(width=8)")
    assert command(again) == 0
    files = {path: path.read_bytes() for path in (place / "kept").iterdir()}
    capsys.readouterr()
    for gone in ("*.safetensors", "checkpoint.pt"):  # either is a reason
        other = shutil.copytree(place / "kept", place / f"without-{gone[2:]}")
        for path in other.glob(gone):
            path.unlink()
        assert command(train_words(data_dir, str(other), *words, defense="convnet_at(width=8)")) == 2
        assert "holds a training already. Go on with it by --resume" in capsys.readouterr().err
    assert command([*again, "--seed", "5"]) == 2
    assert files == {path: path.read_bytes() for path in (place / "kept").iterdir()}
    assert command([*again, "--resume"]) == 0


# what is refused


@pytest.fixture
def job(data_dir: Path, place: Path) -> TrainJob:
    return TrainJob(TOY, "fashion_mnist", place / "run", data_dir=data_dir, test_images=50)


@pytest.fixture
def trained(job: TrainJob) -> TrainJob:
    short = dataclasses.replace(job, settings=TrainSettings(scale=0.02))
    train_named(short)
    return short


@pytest.mark.parametrize("settings", [{"seed": 1}, {"scale": 0.03}, {"holdout": 100}], ids=str)
def test_checkpoint_of_another_run(trained: TrainJob, settings: dict[str, Any]) -> None:
    other = dataclasses.replace(trained, settings=dataclasses.replace(trained.settings, **settings))
    with pytest.raises(UsageError, match=r"^checkpoint .*checkpoint\.pt is of another run: .* Choose another --out.*$"):
        train_named(other, resume=True)


def test_only_what_differs_is_told(trained: TrainJob) -> None:
    other = dataclasses.replace(trained, settings=dataclasses.replace(trained.settings, scale=0.03))
    with pytest.raises(UsageError, match=r"is of another run: scale: expected 0\.03, got 0\.02\. Choose another --out"):
        train_named(other, resume=True)


def test_checkpoint_of_an_earlier_version(trained: TrainJob) -> None:
    path = trained.folder / "checkpoint.pt"
    content = torch.load(path, weights_only=True)
    torch.save({**content, "identity": "toy default fashion_mnist 0123 {'seed': 0}"}, path)
    with pytest.raises(UsageError, match=r"is of another run: an earlier version of robench wrote it\. Choose"):
        train_named(trained, resume=True)


def test_checkpoint_of_another_preset(images: Dataset, tmp_path: Path) -> None:
    """The two presets have tensors of the same names and shapes, so that nothing else would tell them apart."""
    settings = TrainSettings(holdout=HOLDOUT)
    variants = {"shortrun": "", "paper_literal": " {'preset': 'paper_literal'}"}
    for kind, variant in variants.items():
        defense = make(kind)
        recipe = Shortened(defense, defense.recipe(), {}, batch_size=2)
        if kind == "shortrun":
            train(defense, recipe, images, tmp_path, settings, variant=variant)
            continue
        with pytest.raises(UsageError, match=r"is of another run: .*paper_literal"):
            train(defense, recipe, images, tmp_path, settings, resume=True, variant=variant)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[: len(content) // 2],
        lambda content: b"",
        lambda content: b"no checkpoint\n" * 30,
        lambda content: content[:300] + bytes(64) + content[364:],
    ],
    ids=["cut off", "empty", "text", "overwritten"],
)
def test_damaged_checkpoint(trained: TrainJob, damage: Callable[[bytes], bytes]) -> None:
    path = trained.folder / "checkpoint.pt"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=r"(?s)^checkpoint .*checkpoint\.pt is damaged: .*Delete it to start over$"):
        train_named(trained, resume=True)


@pytest.mark.parametrize("content", [[1, 2], {"weights": {}}, torch.zeros(3)], ids=["list", "dict", "tensor"])
def test_file_that_is_no_checkpoint(trained: TrainJob, content: object) -> None:
    torch.save(content, trained.folder / "checkpoint.pt")
    with pytest.raises(DataError, match=r"^checkpoint .* is damaged: it is no checkpoint\. Delete it to start over$"):
        train_named(trained, resume=True)


def test_nothing_to_resume(job: TrainJob) -> None:
    with pytest.raises(UsageError, match=r"^nothing to resume: .*checkpoint\.pt does not exist$"):
        train_named(job, resume=True)


def test_fewer_images_than_are_kept_aside(job: TrainJob) -> None:
    wide = dataclasses.replace(job, settings=TrainSettings(holdout=TRAIN_IMAGES))
    with pytest.raises(UsageError, match=r"^training keeps 600 images aside; the split has 600\. .*$"):
        train_named(wide)
    assert not job.folder.exists()


def test_two_processes_do_not_train_into_one_folder(trained: TrainJob) -> None:
    before = (trained.folder / "checkpoint.pt").read_bytes()
    with locked(trained.folder / ".lock"), pytest.raises(UsageError, match=r"^another process works on .*/run; "):
        train_named(dataclasses.replace(trained, settings=TrainSettings(scale=0.03)))
    assert (trained.folder / "checkpoint.pt").read_bytes() == before


def test_folder_that_cannot_be_made(job: TrainJob, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"^cannot make the folder .*file/run: Not a directory\. .*$"):
        train_named(dataclasses.replace(job, folder=tmp_path / "file" / "run"))


def test_the_next_command_attacks_within_the_bound_of_the_training(
    data_dir: Path, place: Path, command: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert trained_words({"channels": 1}) == []
    assert trained_words({"train_eps": 8 / 255}) == ["--eps", "8/255"]
    words = ["--recipe", "pgd2", "--scale", "0.001"]
    defense = "convnet_at(width=8, train_norm='l2')"
    assert command(train_words(data_dir, str(place / "l2"), *words, defense=defense)) == 0
    assert " --attack pgd --norm l2 --eps 1.5 --data-dir " in capsys.readouterr().out


def test_training_that_diverges(images: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    defense = make("toy")
    recipe = Shortened(defense, defense.recipe(), {"first": 9}, batch_size=3)
    monkeypatch.setattr(recipe, "watched_loss", lambda stage, x, y: stage.loss(x, y) * torch.nan)
    with pytest.raises(
        DataError, match=r'^training diverged in stage "first": the loss is nan\. Lower .* with --lr-scale.*$'
    ):
        train(defense, recipe, images, tmp_path, TrainSettings(holdout=HOLDOUT))


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--defense", "shortrum"], 'did you mean "shortrun"?'),
        (["--defense", "convnet", "--recipe", "thesis"], 'convnet has one recipe, "clean"; got "thesis"'),
        (["--defense", "convnet(widht=8)"], "got an unexpected keyword argument 'widht'; its options are: "),
        (["--defense", "convnet(width='x')"], 'defense "convnet": an option is of the wrong kind'),
        (["--dataset", "cifar10"], "cifar10"),
        (["--dataset", "fashion_mnits"], "fashion_mnist"),
        (["--seed", "-1"], "seed must be at least 0; got -1"),
        (["--defense", "convnet_at(train_norm='l1')"], 'train_norm must be linf or l2; got "l1"'),
        (["--defense", "fortified", "--recipe", "fgsm"], "Choose it by --defense 'fortified(train_attack=fgsm)'"),
        (["--defense", "fortified", "--recipe", "fgms"], 'fortified has the recipes pgd, fgsm; got "fgms"'),
        (["--scale", "0"], "scale must be positive and finite; got 0.0"),
        (["--scale", "nan"], "scale must be positive"),
        (["--scale", "inf"], "scale must be positive and finite; got inf"),
        (["--device", "tpu"], "device must be auto, cpu or cuda"),
        (["--precision", "float16"], 'training takes precision auto or float32; got "float16"'),
        (["--lr-scale", "0"], "lr-scale must be positive and finite; got 0"),
        (["--resume"], "nothing to resume"),
        (["--init", "nowhere.safetensors"], "weights file nowhere.safetensors does not exist"),
        (["--first-stage", "third"], 'recipe "noise" has no stage "third"; its stages are: first, second'),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line(
    data_dir: Path,
    place: Path,
    command: Callable[[list[str]], int],
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    part: str,
) -> None:
    assert command(train_words(data_dir, "run", *words)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert part in line
    assert [*place.rglob("*.safetensors")] == []


# the card


def test_card_says_what_was_done(data_dir: Path, place: Path, job: TrainJob) -> None:
    path, card = train_named(dataclasses.replace(job, settings=TrainSettings(seed=4, scale=0.5)))
    assert path == place / "run" / "fashion_mnist.safetensors"
    assert read_card(path) == json.loads(json.dumps(card))
    expected = {"defense": "trainable", "dataset": "fashion_mnist", "recipe": "noise", "seed": 4, "options": {}}
    assert expected.items() <= card.items()
    assert card["train_images"] == TRAIN_IMAGES - 500
    assert card["train_digest"] == load_dataset("fashion_mnist", "train", data_dir=data_dir).digest
    assert card["torch"] == torch.__version__.split("+")[0]
    assert (card["robench"], card["scale"], card["split_seed"]) == (robench.__version__, 0.5, 4)
    assert card["device"].startswith("cpu, ")
    assert card["wall_time_s"] >= 0
    assert [(stage["name"], stage["iterations"], stage["optimizer"]) for stage in card["stages"]] == [
        ("first", 50, "ranger"),
        ("second", 50, "adam"),
    ]
    assert card["held_out"]["images"] == 500
    assert card["held_out"]["second"]["accuracy"] > 0.2
    test = card["test"]
    assert (test["images"], test["digest"]) == (50, load_dataset("fashion_mnist", n=50).digest)
    assert test["clean_low"] <= test["clean_accuracy"] <= test["clean_high"]
    defense = load_defense(TOY, weights=path)
    assert weights_digest(defense) == card["weights_digest"]


def test_training_goes_on_from_weights_at_a_later_stage(trained: TrainJob, tmp_path: Path) -> None:
    """A few steps leave the weights near those that were given, and the card says whose they were."""
    first = trained.folder / "fashion_mnist.safetensors"
    defense = load_defense(TOY, weights=first)
    with torch.no_grad():
        for parameter in defense.parameters():
            parameter.fill_(7.0)
    given = tmp_path / "given.safetensors"
    card = {**read_card(first), "weights_digest": weights_digest(defense)}
    save_weights(defense, given, card)
    settings = TrainSettings(scale=0.02, init=given, first_stage="second")
    path, further = train_named(dataclasses.replace(trained, folder=tmp_path / "further", settings=settings))
    moved = [(parameter - 7.0).abs().max().item() for parameter in load_defense(TOY, weights=path).parameters()]
    assert 0 < max(moved) < 0.1
    assert [stage["name"] for stage in further["stages"]] == ["second"]
    assert list(further["held_out"]) == ["images", "second"]
    told = ("weights_digest", "dataset", "recipe", "stages", "train_digest", "seed", "split_seed", "scale", "precision")
    hardware = ("device", "wall_time_s")
    assert further["init"] == {name: card[name] for name in (*told, *hardware, "held_out")}


def test_same_seed_same_weights_other_seed_others(job: TrainJob, tmp_path: Path) -> None:
    digests = []
    for number, seed in enumerate([0, 0, 1]):
        settings = TrainSettings(seed=seed, scale=0.02)
        _, card = train_named(dataclasses.replace(job, folder=tmp_path / str(number), settings=settings))
        digests.append(card["weights_digest"])
    assert digests[0] == digests[1] != digests[2]


def test_retraining_over_an_old_run_starts_anew(trained: TrainJob) -> None:
    """Without --resume the old checkpoint must not leak into the new run."""
    first = read_card(trained.folder / "fashion_mnist.safetensors")["weights_digest"]
    shutil.copy(trained.folder / "checkpoint.pt", trained.folder / "old.pt")
    _, card = train_named(trained)
    assert card["weights_digest"] == first


def test_lr_scale_multiplies_every_rate_and_stands_in_the_card(job: TrainJob, tmp_path: Path) -> None:
    cards = []
    for lr_scale in (1.0, 0.5):
        settings = TrainSettings(scale=0.02, lr_scale=lr_scale)
        cards.append(train_named(dataclasses.replace(job, folder=tmp_path / str(lr_scale), settings=settings))[1])
    full, half = ([stage["learning_rate"] for stage in card["stages"]] for card in cards)
    assert half == [0.5 * rate for rate in full]
    assert ("lr_scale" in cards[0], cards[1]["lr_scale"]) == (False, 0.5)
    assert cards[0]["weights_digest"] != cards[1]["weights_digest"]


# the bound of adversarial training


@pytest.mark.parametrize(
    ("cls", "dataset", "written", "bound"),
    [
        (ConvNetAT, "fashion_mnist", {}, 0.1),
        (ConvNetAT, "mnist", {}, 0.3),
        (ConvNetAT, "cifar10", {}, 8 / 255),
        (ConvNetAT, "fashion_mnist", {"train_norm": "l2"}, 1.5),
        (ConvNetAT, "cifar10", {"train_norm": "l2", "train_eps": None}, 0.5),
        (Fortified, "svhn", {}, 8 / 255),
        (ConvNetAT, "mnist", {"train_eps": 0.2}, None),
        (ConvNet, "mnist", {}, None),
    ],
)
def test_bound_of_training_is_the_customary_one(
    cls: type[Defense], dataset: str, written: dict[str, Any], bound: float | None
) -> None:
    assert customary_bound(cls, dataset, written) == ({} if bound is None else {"train_eps": bound})


def test_bound_of_training_has_to_be_given_where_none_is_customary() -> None:
    with pytest.raises(UsageError, match=r'dataset "faces" in linf; give one: .*train_eps='):
        customary_bound(ConvNetAT, "faces", {})


def test_bound_of_training_stands_in_the_card(job: TrainJob) -> None:
    """Without one, an l2 training takes the norm's own; weights then load under that bound and no other."""
    l2 = dataclasses.replace(
        job, defense="convnet_at(width=8, train_norm='l2')", settings=TrainSettings(scale=0.002, holdout=32)
    )
    path, card = train_named(l2)
    assert (card["options"]["train_eps"], card["train_threat"]) == (1.5, "l2 eps=1.5")
    assert load_defense("convnet_at(train_eps=1.5)", weights=path).needs_weights
    with pytest.raises(UsageError, match=r"train_eps=1\.5, not with train_eps=0\.1"):
        load_defense("convnet_at(train_eps=0.1)", weights=path)
