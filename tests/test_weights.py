"""Weights files: what is read, what is refused, and that no pickle is ever run."""

from __future__ import annotations

import json
import pickle
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jaxtyping
import numpy as np
import pytest
import torch
from engine_toys import Linear
from torch import nn
from torch.nn.utils import prune

from robench import DataError, RobenchError, UsageError, load_defense
from robench.defense import state_digest, tensor_digests, weights_digest
from robench.defenses.shortrun import ShortRun
from robench.plain import plain_tensors
from robench.rng import seeded
from robench.weights import load_weights, read_card, save_weights

PLANTED: list[str] = []


def make_model(**options: Any) -> ShortRun:
    with seeded("weights of a test"):
        return ShortRun(**options)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "good.safetensors"
    save_weights(make_model(), path, {"defense": "shortrun", "options": {"n_chains": 3}})
    return path


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Switches the type checks of the tests off, so that a wrong value meets the code's own check."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def assert_refused(path: Path, kind: type[RobenchError], reason: str) -> None:
    """One line that names the file; the module keeps the weights it had."""
    model = make_model()
    before = weights_digest(model)
    with pytest.raises(kind) as caught:
        load_weights(model, path)
    message = str(caught.value)
    assert str(path) in message
    assert reason in message
    assert "\n" not in message
    assert len(message) < 600
    assert weights_digest(model) == before


# what is read


def test_safetensors_round_trip(saved: Path) -> None:
    original = make_model()
    with seeded("other weights"):
        copy = ShortRun()
    assert weights_digest(copy) != weights_digest(original)
    load_weights(copy, saved)
    assert weights_digest(copy) == weights_digest(original)
    assert read_card(saved) == {"defense": "shortrun", "options": {"n_chains": 3}}
    assert [path.name for path in saved.parent.iterdir() if path.suffix not in (".safetensors", ".json")] == []


def test_torch_file_of_plain_tensors_is_read(tmp_path: Path) -> None:
    original = make_model()
    torch.save(original.double().state_dict(), tmp_path / "model.pt")
    with seeded("other weights"):
        copy = ShortRun()
    load_weights(copy, tmp_path / "model.pt")
    assert weights_digest(copy) == weights_digest(original.float())


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_names_are_read_without_what_a_wrapper_put_before_them(prefix: str, tmp_path: Path) -> None:
    torch.save({prefix + name: value for name, value in Linear(gain=5).state_dict().items()}, tmp_path / "w.pt")
    defense = Linear()
    load_weights(defense, tmp_path / "w.pt")
    assert weights_digest(defense) == weights_digest(Linear(gain=5))


@pytest.mark.parametrize(
    ("mine", "theirs", "more", "advice"),
    [
        ("", "model.", False, 'with "model." where .* with "": save {name.removeprefix("model."): value for'),
        ("net.", "model.", False, 'with "model." where .* with "net.": save {"net." + name.removeprefix("model."):'),
        ("net.body.", "body.", False, 'with "" where .* with "net.": save {"net." + name: value for'),
        ("net.", "", True, 'with "" where .* with "net.": save {"net." + name: value for'),
        ("net.", "other.", True, "Check the dataset, the preset and the options"),
    ],
)
def test_names_that_differ_by_a_prefix_are_refused_with_how_to_rename_them(
    mine: str, theirs: str, more: bool, advice: str, tmp_path: Path
) -> None:
    net: nn.Module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    torch.save({theirs + name: value for name, value in net.state_dict().items()}, tmp_path / "w.pt")
    for part in reversed(mine.split(".")[:-1]):
        net = nn.ModuleDict({part: net, **({"more": nn.Linear(1, 1)} if more else {})})
    with pytest.raises(DataError, match=re.escape(advice).replace(r"\.\*", ".*")):
        load_weights(net, tmp_path / "w.pt")


class Outside(Linear):
    """Keeps tensors and an array where no state_dict finds them; `_flat_weights` of nn.RNN are its parameters again."""

    def __init__(self) -> None:
        super().__init__()
        self.bank = {"rows": [torch.zeros(2), (np.zeros(3), 5)], "again": self.weight}
        self.teacher = [nn.Linear(2, 2)]
        self.rnn = nn.RNN(2, 2)
        self.register_buffer("scale", torch.ones(1), persistent=False)


def test_digest_has_plain_tensors_and_stays_what_it_was_without() -> None:
    defense = Outside()
    held = [path for path, _ in plain_tensors(defense)]
    assert held == ["bank['rows'][0]", "bank['rows'][1][0]", "scale", "teacher[0].bias", "teacher[0].weight"]
    assert {"weight", *held} <= tensor_digests(defense).keys()
    digests = [weights_digest(defense)]
    for _, value in plain_tensors(defense):
        value.fill(7) if isinstance(value, np.ndarray) else value.detach().fill_(7)
        digests.append(weights_digest(defense))
    assert len(set(digests)) == 6
    assert weights_digest(Linear()) == state_digest(Linear())
    assert state_digest(defense) not in digests


def test_digest_leaves_out_what_hooks_of_torch_compute_at_each_pass() -> None:
    with warnings.catch_warnings(action="ignore"):  # weight_norm is the elder of torch.nn.utils.parametrizations
        layers = nn.Sequential(
            nn.utils.weight_norm(nn.Linear(2, 2)),
            nn.utils.spectral_norm(nn.Linear(2, 2)),
            prune.random_unstructured(nn.Linear(2, 2), "weight", 1),
        )
    assert list(plain_tensors(layers)) == []


def test_load_defense_takes_options_from_the_card_and_overrides_them(saved: Path) -> None:
    defense = load_defense("shortrun", weights=saved)
    assert isinstance(defense, ShortRun)
    assert defense.n_chains == 3
    assert not defense.training
    assert not any(parameter.requires_grad for parameter in defense.parameters())
    assert weights_digest(defense) == weights_digest(make_model())
    other = load_defense("shortrun(n_chains=5)", weights=saved)
    assert isinstance(other, ShortRun)
    assert other.n_chains == 5


@pytest.mark.parametrize(
    ("spec", "dataset", "told"),
    [
        ("convnet_at(width=16, train_eps=0.3)", "fashion_mnist", "with train_eps=0.1, not with train_eps=0.3"),
        ("fortified(train_eps=0.3)", "fashion_mnist", "with train_eps=0.1, not with train_eps=0.3"),
        ("fortified(augment=True)", "mnist", "with augment=False, not with augment=True"),
        ("shortrun(sigma=0.5)", "fashion_mnist", "with sigma left at its default, not with sigma=0.5"),
    ],
)
def test_options_do_not_claim_another_training_than_the_card(spec: str, dataset: str, told: str) -> None:
    with pytest.raises(UsageError, match=re.escape(told)):
        load_defense(spec, dataset)


@pytest.mark.parametrize(
    ("spec", "dataset"),
    [
        ("convnet_at(train_eps=0.3)", "mnist"),
        ("convnet_at(width=16, train_eps=0.1, train_norm='linf')", "fashion_mnist"),
        ("fortified(lambda_adv=2, train_attack=pgd)", "mnist"),
        ("shortrun(sigma=auto)", "fashion_mnist"),
        ("convnet(width=64)", "mnist"),
        ("convnet(width=32)", "cifar10"),
    ],
)
def test_options_may_repeat_what_the_card_says_of_training(spec: str, dataset: str) -> None:
    assert load_defense(spec, dataset).needs_weights


def test_weights_without_a_card_are_read(saved: Path) -> None:
    saved.with_suffix(".json").unlink()
    assert read_card(saved) == {}
    assert weights_digest(load_defense("shortrun", weights=saved)) == weights_digest(make_model())


# what is refused


def test_missing_file(tmp_path: Path) -> None:
    assert_refused(tmp_path / "nowhere.safetensors", UsageError, "does not exist")


def test_folder_in_place_of_a_file(tmp_path: Path) -> None:
    assert_refused(tmp_path, UsageError, "does not exist")


@pytest.mark.parametrize("kept", [0, 4, 100, 100_000])
def test_cut_off_safetensors(saved: Path, kept: int) -> None:
    saved.write_bytes(saved.read_bytes()[:kept])
    assert_refused(saved, DataError, "damaged")


@pytest.mark.parametrize("kept", [0, 4, 1000, 100_000])
def test_cut_off_torch_file(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "model.pt"
    torch.save(make_model().state_dict(), path)
    path.write_bytes(path.read_bytes()[:kept])
    assert_refused(path, DataError, "damaged")


@pytest.mark.parametrize("name", ["text.pt", "text.safetensors"])
def test_text_in_place_of_weights(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("these are not the weights\n" * 40)
    assert_refused(tmp_path / name, DataError, "damaged")


def test_other_shapes_name_the_first_tensor_that_differs(tmp_path: Path) -> None:
    path = tmp_path / "colour.safetensors"
    save_weights(make_model(channels=3), path, {})
    assert_refused(path, DataError, '"generator.6.bias": expected (1,), got (3,)')


def test_missing_and_extra_tensors(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    state = make_model().state_dict()
    state["extra"] = state.pop("log_sigma")
    torch.save(state, path)
    assert_refused(path, DataError, '2 of 15 tensors differ, first "extra": expected none, got ()')


def plant() -> None:
    """What the planted pickles would call."""
    PLANTED.append("ran")


class Planted:
    """An object whose pickle calls `plant` when it is read without restriction."""

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return plant, ()


@pytest.mark.parametrize("name", ["code.pt", "code.pth", "code.safetensors"])
@pytest.mark.parametrize("write", ["pickle", "torch"])
def test_pickle_with_code_is_refused_and_not_run(tmp_path: Path, name: str, write: str) -> None:
    path = tmp_path / name
    content = {"weight": Planted()}
    if write == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    PLANTED.clear()
    assert_refused(path, DataError, "it never runs a pickle")
    assert PLANTED == []


def test_planted_pickle_would_run_without_the_restriction() -> None:
    """The offender of the test above is live."""
    PLANTED.clear()
    pickle.loads(pickle.dumps(Planted()))
    assert PLANTED == ["ran"]


@pytest.mark.parametrize(
    "content",
    [[1, 2], {"state_dict": {"weight": torch.zeros(2)}}, {"epoch": 3, "weight": torch.zeros(2)}, {1: torch.zeros(2)}],
    ids=["list", "nested", "mixed", "numbered"],
)
def test_torch_file_of_other_things(tmp_path: Path, content: object) -> None:
    path = tmp_path / "checkpoint.pt"
    torch.save(content, path)
    assert_refused(path, DataError, "must hold a dict of tensors (a state_dict)")


def test_a_checkpoint_says_which_part_to_save(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    torch.save({"epoch": 3, "model": make_model().state_dict()}, path)
    assert_refused(path, DataError, "its key 'epoch' holds no tensor, but int. Save checkpoint['model'] alone")
    torch.save({1: torch.zeros(2)}, path)
    assert_refused(path, DataError, "its key 1 is no name")
    torch.save({"weight": torch.zeros(2), "epoch": 3}, path)
    assert_refused(path, DataError, "(a state_dict); its key 'epoch' holds no tensor, but int")


# the card


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "cannot be read"),
        ("\xff\xfe", "cannot be read"),
        ("[1, 2]", "must be a JSON object; got list"),
        ('{"options": [1]}', "options must be a JSON object; got list"),
        ('{"options": null}', "options must be a JSON object; got NoneType"),
    ],
    ids=["cut off", "not text", "list", "options a list", "options null"],
)
def test_card_that_is_no_json_object(saved: Path, text: str, reason: str) -> None:
    card = saved.with_suffix(".json")
    card.write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError) as caught:
        load_defense("shortrun", weights=saved)
    assert str(card) in str(caught.value)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_card_with_an_option_that_does_not_exist(saved: Path) -> None:
    saved.with_suffix(".json").write_text(json.dumps({"options": {"chains": 3}}))
    with pytest.raises(UsageError, match=r"^defense \"shortrun\": .*'chains'; its options are: channels, preset.*$"):
        load_defense("shortrun", weights=saved)


@pytest.mark.parametrize("written", ["'false'", "no"])
def test_a_switch_takes_no_text(saved: Path, written: str) -> None:
    """Any text would be true."""
    word = written.strip("'")
    with pytest.raises(UsageError, match=f'^defense "shortrun": recompute must be true or false; got "{word}"$'):
        load_defense(f"shortrun(recompute={written})", weights=saved)


@pytest.mark.usefixtures("unchecked")
def test_option_of_the_wrong_kind(saved: Path) -> None:
    with pytest.raises(UsageError, match=r'^defense "shortrun": an option is of the wrong kind: .*$'):
        load_defense("shortrun(n_chains=many)", weights=saved)


# what is written


def test_save_replaces_weights_in_one_step_or_not_at_all(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that fails leaves the old file as it was and no temporary file."""
    before = saved.read_bytes()

    def fail(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with seeded("other weights"):
        other = ShortRun()
    with pytest.raises(UsageError, match=r"^cannot write .*good\.safetensors: No space left on device\..*$"):
        save_weights(other, saved, {})
    assert saved.read_bytes() == before
    assert sorted(path.name for path in saved.parent.iterdir()) == ["good.json", "good.safetensors"]


def test_missing_weights_name_the_training_that_makes_them() -> None:
    for width, dataset in ((8, "fashion_mnist"), (64, "cifar10")):
        advice = rf"robench train --defense 'convnet\(width={width}\)' --dataset {dataset}"
        with pytest.raises(UsageError, match=advice):
            load_defense(f"convnet(width={width})", dataset)
