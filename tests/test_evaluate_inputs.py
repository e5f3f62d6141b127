"""What an evaluation takes as data, attacks, bounds and settings, and what it refuses."""

from __future__ import annotations

import math
import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import engine_toys
import numpy as np
import pytest
import torch
from engine_toys import Broken, Linear, NoGradient, Noisy, Nudge, Prototypes, Still, grid_images
from torch import nn
from torch.nn import functional

from robench.data import load_data, load_dataset
from robench.defense import wrap
from robench.errors import PluginError, UsageError
from robench.evaluate import check_loadable, evaluate
from robench.origin import find_origin
from robench.registry import load_attack, load_defense
from robench.settings import make_settings
from robench.threat import ThreatModel
from robench.types import Images, Logits
from robench.verify import verify_run
from robench.weights import save_weights

LINF = ThreatModel("linf", 0.1)
TOYS = engine_toys.__file__


def test_data_as_a_name_a_dataset_and_a_pair() -> None:
    dataset = load_dataset("fashion_mnist", n=16, seed=3)
    threat = ThreatModel("linf", 0.02)
    named = evaluate(Prototypes(), "fgsm", threat, "fashion_mnist", n=16, seed=3)
    given = evaluate(Prototypes(), "fgsm", threat, dataset, seed=3)
    assert named.spec == given.spec
    assert named.table.equals(given.table)
    pair = evaluate(Prototypes(), "fgsm", threat, (dataset.x, dataset.y), seed=3)
    assert pair.spec.data_digest == named.spec.data_digest
    assert (pair.spec.dataset, named.spec.dataset) == ("", "fashion_mnist")
    assert pair.robust_accuracy == named.robust_accuracy
    assert named.table["index"].tolist() == 3 * dataset.index.tolist()


def test_shifted_labels_are_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    x, y = load_data("fashion_mnist", n=16, seed=3)
    threat, defense = ThreatModel("linf", 0.02), Prototypes()
    assert evaluate(defense, "fgsm", threat, (x, y)).notes == ()
    assert not caplog.messages
    for _ in range(2):
        result = evaluate(defense, "fgsm", threat, (x, (y + 1) % 10))
        assert result.to_json()["notes"] == list(result.notes)
        assert "about that of guessing among 10 classes. Are labels shifted" in result.notes[0]
    assert caplog.messages == [f"prototypes: {result.notes[0]}"]


def test_a_defense_loaded_by_name_keeps_it(tmp_path: Path) -> None:
    """A run from Python can be done by workers, and verified, as one of the command line."""
    name, threat = f"{TOYS}:Prototypes", ThreatModel("linf", 0.02)
    result = evaluate(load_defense(name), "fgsm", threat, "fashion_mnist", n=8, out=tmp_path / "run")
    assert (result.spec.defense, result.spec.defense_options) == (name, {})
    check_loadable(result.spec, make_settings({"workers": 2, "out": tmp_path / "other"}))
    assert verify_run(tmp_path / "run", device="cpu").holds
    dataset = load_dataset("fashion_mnist", n=8)
    assert evaluate(load_defense(name), "fgsm", threat, (dataset.x, dataset.y)).spec.defense == ""
    assert evaluate(Prototypes(), "fgsm", threat, dataset).spec.defense == ""
    told = evaluate(load_defense(name), "fgsm", threat, dataset, defense_spec="other", defense_options={"gain": 1})
    assert (told.spec.defense, told.spec.defense_options) == ("other", {"gain": 1})


def test_options_and_weights_stand_beside_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_weights(Linear(), tmp_path / "w.safetensors", {})
    monkeypatch.chdir(tmp_path)
    found = find_origin(load_defense(f"{TOYS}:Noisy(sigma=1.0)", gain=2.0, weights="w.safetensors"), "toys")
    assert found is not None
    assert found.spec == f"{TOYS}:Noisy(sigma=1.0, gain=2.0)"
    assert found.options == {"weights": str(tmp_path / "w.safetensors")}
    assert find_origin(load_defense(f"{TOYS}:Linear", gain=np.float64(2.0)), "toys") is None, "no name writes it"


def test_a_defense_that_was_changed_claims_no_name() -> None:
    loaded = load_defense(f"{TOYS}:Noisy")
    copy = deepcopy(loaded)
    assert find_origin(copy, "toys") == find_origin(loaded, "toys")
    copy.weight.data.mul_(2)  # type: ignore[operator]  # a Parameter
    assert find_origin(copy, "toys") is None
    assert find_origin(loaded, "toys") is not None
    loaded.sigma = 0.1  # type: ignore[assignment]  # no weight, and yet it answers otherwise
    assert find_origin(loaded, "toys") is None


def test_the_name_of_other_weights_is_not_claimed() -> None:
    convnet = load_defense("convnet")
    assert [find_origin(convnet, data) is None for data in ("fashion_mnist", "mnist", "")] == [False, True, True]
    assert find_origin(load_defense("convnet", "mnist"), "fashion_mnist") is None


def test_a_dataset_of_another_n_is_refused() -> None:
    """Its first images would not be those that its name and n draw."""
    dataset = load_dataset("fashion_mnist", n=16)
    assert evaluate(Prototypes(), "fgsm", LINF, dataset, n=16).spec.n == 16
    with pytest.raises(UsageError, match=r"holds 16 images, and n is 4; leave n out, or load so many: .*n=4"):
        evaluate(Prototypes(), "fgsm", LINF, dataset, n=4)


def test_a_pair_may_be_cut() -> None:
    x, y = grid_images(9)
    assert evaluate(Linear(), "fgsm", LINF, (x, y)).spec.n == 9
    assert evaluate(Linear(), "fgsm", LINF, (x, y), n=4).spec == evaluate(Linear(), "fgsm", LINF, (x[:4], y[:4])).spec


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"n": 0}, "n must be at least 1; got 0"),
        ({"seed": -1}, "seed must be at least 0; got -1"),
        ({"unit_size": 0}, "unit_size must be at least 1"),
        ({"eot": -1}, "eot must be at least 1"),
        ({"judge_repeats": 0}, "judge_repeats must be at least 1"),
        ({"query_budget": 0}, "query_budget must be at least 1"),
        ({"access": "weights"}, 'access must be one of none, decisions, scores, gradient; got "weights"'),
        ({"goal": "nearest"}, 'goal must be one of budget, minimal; got "nearest"'),
        ({"precision": "float16"}, 'precision must be one of float32, bfloat16; got "float16"'),
        ({"device": "tpu"}, 'device must be auto, cpu or cuda; got "tpu"'),
        ({"runner": "cloud"}, 'runner must be .*got "cloud"'),
        ({"epsilon": 1}, 'no setting "epsilon"; there are: access, cascade, data_dir'),
        ({"resume": True}, "give it as out"),
        ({"n": 6}, "at most the 5 images given; got 6"),
    ],
)
def test_settings_out_of_range_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        evaluate(Linear(), "fgsm", LINF, grid_images(5), **given)


@pytest.mark.parametrize(
    ("attacks", "message"),
    [
        ([], "no attack given"),
        ("", "no attack given|expected a name"),
        ("pdg", 'no attack "pdg"; did you mean "pgd"'),
        ("pgd(step=1)", 'no option "step"; did you mean "steps"'),
        ("pgd(steps=0)", "steps and restarts must be at least 1"),
    ],
)
def test_attacks_that_do_not_exist_are_refused(attacks: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        evaluate(Linear(), attacks, LINF, grid_images(2))


def test_two_attacks_of_one_name_are_refused() -> None:
    toys = Path(engine_toys.__file__)
    with pytest.raises(UsageError, match='two things of this run would be named "nudge"'):
        evaluate(Linear(), [Nudge(), f"{toys}:Nudge"], LINF, grid_images(2))
    assert list(evaluate(Linear(), "fgsm,fgsm()", LINF, grid_images(2)).per_attack) == ["fgsm"]  # the same twice is one


class Counted(Linear):
    """Votes, in whole numbers."""

    def forward(self, x: Images) -> Logits:
        return functional.one_hot(super().forward(x).argmax(1), self.num_classes)


@pytest.mark.parametrize("attack", ["square(queries=5)", "hopskipjump(queries=60)", "pgd(steps=2)"])
def test_logits_may_be_whole_numbers(attack: str) -> None:
    defense = Counted()
    if attack.startswith("pgd"):
        defense.adaptive_forward = lambda x, mode=None: Linear.forward(defense, x)  # type: ignore[method-assign]
    assert evaluate(defense, attack, LINF, grid_images(4)).robust_accuracy is not None


@pytest.mark.parametrize("name", ["clean", "worst", "robust_acc", "n"])
def test_an_attack_named_like_a_column_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its figure would stand in the row as another's."""
    monkeypatch.setattr(Nudge, "name", name)
    with pytest.raises(UsageError, match=f'two things of this run would be named "{name}"'):
        evaluate(Linear(), [Nudge()], LINF, grid_images(2))


def test_an_attack_from_a_file_is_replayed_by_its_path() -> None:
    name = f"{engine_toys.__file__}:Nudge"
    (entry,) = evaluate(Linear(), f"{name}(up=False)", LINF, grid_images(2)).spec.attacks
    assert (entry.key, entry.spec) == ("nudge(up=False)", f"{name}(up=False)")
    assert load_attack(entry.spec).spec() == entry.key


def test_norm_that_an_attack_does_not_support_is_refused_before_any_work() -> None:
    with pytest.raises(
        UsageError, match=r'attack "pgd" supports linf, l2, l1; the threat model is l0\. Choose another'
    ):
        evaluate(Broken(), [Still(), "pgd"], ThreatModel("l0", 3), grid_images(2))


def test_threats_are_of_one_norm() -> None:
    with pytest.raises(UsageError, match="one norm and at least one eps"):
        evaluate(Linear(), "fgsm", [LINF, ThreatModel("l2", 1)], grid_images(2))
    with pytest.raises(UsageError, match="one norm and at least one eps"):
        evaluate(Linear(), "fgsm", [], grid_images(2))
    bounds = [ThreatModel("linf", eps) for eps in (0.2, 0.1, 0.2)]
    assert evaluate(Linear(), "fgsm", bounds, grid_images(2)).spec.eps == (0.1, 0.2)


def refused_data() -> dict[str, tuple[Any, str]]:
    x, y = grid_images(3)
    return {
        "none": ((x[:0], y[:0]), "at least one image"),
        "bytes": ((255 * x, y), r"must lie in \[0, 1\].*Divide by 255"),
        "nan": ((x.where(x > 0.3, math.nan), y), "images must be finite; 3 of 3 hold NaN or inf. Leave them out"),
        "normalised": ((2 * x - 1, y), r"must lie in \[0, 1\].*Undo the normalisation, and do it inside the defense"),
        "channels last": ((x.permute(0, 2, 3, 1), y), r"Put the channels first: x.permute\(0, 3, 1, 2\)"),
        "shape": ((x[:, :1], y), r"takes images of shape \(2, 3, 3\); the data has \(1, 3, 3\)"),
        "labels": ((x, y + 2), 'labels must be 0 to 2 for defense "linear"'),
        "negative": ((x, y - 3), "labels must be 0 to 2 .*got -3 to "),
        "count": ((x, y[:2]), "as many labels"),
        "name": ("fashion_mist", "Did you mean fashion_mnist"),
    }


@pytest.mark.parametrize("case", refused_data())
def test_data_that_does_not_fit_is_refused(case: str) -> None:
    data, message = refused_data()[case]
    with pytest.raises(UsageError, match=message):
        evaluate(Linear(), "fgsm", LINF, data)


@pytest.mark.parametrize("how", ["nan", "inf", "shape"])
def test_a_defense_that_breaks_the_contract_is_refused(how: str) -> None:
    with pytest.raises(PluginError, match='defense "broken": logits must be'):
        evaluate(Broken(how), "fgsm", LINF, grid_images(2))


def test_a_defense_that_draws_in_secret_is_refused() -> None:
    defense = Noisy()
    defense.randomized = False
    with pytest.raises(PluginError, match=r"declared deterministic, but two of 10 calls .* Set randomized = True"):
        evaluate(defense, "fgsm", LINF, grid_images(2))


class Numpy(Linear):
    """A defense that leaves torch, as one of another framework does."""

    name = "numpy"

    def forward(self, x: Images) -> Logits:
        return torch.from_numpy((x.numpy() - 0.5).reshape(len(x), -1) @ self.weight.numpy().T)


def test_where_no_gradient_passes_the_attacks_that_need_none_are_named(caplog: pytest.LogCaptureFixture) -> None:
    result = evaluate(Numpy(), "fgsm", LINF, grid_images(4))
    assert re.match(r"RuntimeError at test_evaluate_inputs.py:\d+: Can't call numpy", result.reasons["fgsm"])
    assert "call x.detach().numpy() in its forward" in caplog.messages[-1]
    assert "--protocol blackbox asks for no gradient. For other attacks" in caplog.messages[-1]
    evaluate(NoGradient(), "fgsm", LINF, grid_images(4))
    assert caplog.messages[-1].startswith("no_gradient: --protocol blackbox asks")


class Falls(Linear):
    """Cannot take four images."""

    name = "falls"

    def forward(self, x: Images) -> Logits:
        return super().forward(x.view(1, -1))


def test_a_forward_that_raises_is_one_line_that_says_where() -> None:
    message = r'defense "falls": forward raised RuntimeError at engine_toys.py:\d+: mat1'
    with pytest.raises(PluginError, match=message):
        evaluate(Falls(), "fgsm", LINF, grid_images(8))


def test_an_input_shape_may_be_a_list_where_a_module_is_wrapped() -> None:
    assert wrap(nn.Flatten(), num_classes=3, input_shape=[1, 1, 3]).input_shape == (1, 1, 3)
    listed = Linear()
    listed.input_shape = [2, 3, 3]  # type: ignore[assignment]
    with pytest.raises(PluginError, match=r"a tuple \(channels, height, width\) of whole numbers; it is \[2, 3, 3\]"):
        listed.check_traits()
