"""Protocols: versioned lists that load, fit their norms, and run as they say."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from engine_toys import Linear, Noisy, Still, TwoClasses, TwoPaths, Upward, grid_images

from robench.attack import Attack
from robench.errors import UsageError
from robench.evaluate import evaluate
from robench.lineup import named_protocol, plan_attacks
from robench.protocol import PROTOCOLS, Protocol, default_eps, find_protocol, get_protocol
from robench.registry import load_attack
from robench.testing import LinearToy
from robench.threat import ThreatModel
from robench.types import Images, Logits

LINF = ThreatModel("linf", 0.02)
LISTED = [(name, norm, spec) for name, one in PROTOCOLS.items() for norm in one.attacks for spec in one.attacks[norm]]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two versions of a protocol whose attacks cost little."""
    lists = {"linf": ("fgsm", "pgd(steps=2)"), "l2": ("fgsm",)}
    protocols = [
        Protocol("small-2", {"linf": ("fgsm",)}, cascade=False),
        Protocol("small-10", lists, judge_repeats=7, sources=("convnet", "convnet_at", "shortrun")),
        Protocol("other-11", lists, cascade=False),
    ]
    monkeypatch.setattr("robench.protocol.PROTOCOLS", {one.name: one for one in protocols})


# the lists


@pytest.mark.parametrize(("name", "norm", "spec"), LISTED)
def test_each_attack_loads_and_serves_the_norm(name: str, norm: str, spec: str) -> None:
    attack = load_attack(spec)
    attack.check_threat(ThreatModel(norm, 1.0))
    assert load_attack(attack.spec()) == attack


def test_standard_has_what_the_name_promises() -> None:
    attacks = [load_attack(spec) for spec in get_protocol("standard-1").attacks_for("linf")]
    assert [attack.name for attack in attacks] == ["apgd", "apgd", "fmn", "square"]
    assert [getattr(attack, "loss", "") for attack in attacks[:2]] == ["ce", "dlr"]
    assert [getattr(attack, "targets", 0) > 0 for attack in attacks[:2]] == [False, True]


def is_at_least(strong: Attack, weak: Attack) -> bool:
    """The same attack with no number smaller: steps, restarts, targets, queries."""
    return strong.name == weak.name and all(
        found >= other if isinstance(other, int) and not isinstance(other, bool) else found == other
        for found, other in zip(dataclasses.astuple(strong), dataclasses.astuple(weak), strict=True)
    )


def test_a_stronger_protocol_has_all_that_the_weaker_one_has() -> None:
    standard, thorough = get_protocol("standard"), get_protocol("thorough")
    for norm in standard.attacks:
        strong = [load_attack(spec) for spec in thorough.attacks_for(norm)]
        for weak in [load_attack(spec) for spec in standard.attacks_for(norm)]:
            assert any(is_at_least(one, weak) for one in strong), f"{weak} in {norm}"
    assert set(standard.attacks) == set(thorough.attacks)
    assert (standard.cascade, thorough.cascade, get_protocol("quick").cascade) == (True, True, False)
    assert min(one.judge_repeats for one in (standard, thorough)) == 100


class Opaque(Linear):
    """A linear classifier that gives no gradient."""

    def forward(self, x: Images) -> Logits:
        return super().forward(x.detach())


def test_blackbox_asks_for_no_gradient_and_breaks_what_has_none() -> None:
    protocol = get_protocol("blackbox")
    for norm in protocol.attacks:
        assert all(load_attack(spec).access != "gradient" for spec in protocol.attacks_for(norm))
    x, y = grid_images(6)
    found = evaluate(Opaque(), "blackbox", ThreatModel("linf", 0.3), (x, y), judge_repeats=1)
    assert found.complete
    assert found.spec.protocol == "blackbox-1"
    assert found.robust_accuracy is not None
    assert found.robust_accuracy.value < found.clean_accuracy.value


@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=PROTOCOLS)
def test_no_attack_is_listed_twice_and_each_norm_can_be_planned(protocol: Protocol) -> None:
    for norm in protocol.attacks:
        entries, built = plan_attacks(protocol.name, LinearToy(), norm, "")
        keys = [entry.key for entry in entries]
        assert len(keys) == len(set(keys)) == len(protocol.attacks_for(norm))
        assert set(built) == set(keys)


# names


@pytest.mark.usefixtures("small")
def test_a_name_without_version_means_the_newest() -> None:
    for name, found in (("small", "small-10"), ("small-2", "small-2"), ("other", "other-11")):
        protocol = find_protocol(name)
        assert protocol is not None
        assert protocol.name == found
    for unknown in ("small-3", "smal", "", "small-"):
        assert find_protocol(unknown) is None
    with pytest.raises(UsageError, match='no protocol "smal"; there are: small-2, small-10, other-11'):
        get_protocol("smal")


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("attacks", "found"),
    [("small", True), (["small"], True), ("pgd", False), (["small", "pgd"], False), (Still(), False), ([], False)],
)
def test_only_a_protocol_alone_is_one(attacks: Any, found: bool) -> None:
    assert (named_protocol(attacks) is not None) == found


@pytest.mark.usefixtures("small")
def test_a_norm_without_attacks_is_refused_before_any_work() -> None:
    defense = Linear()
    defense.register_forward_pre_hook(lambda *_: pytest.fail("the defense was asked"))
    with pytest.raises(UsageError, match="protocol small-2 has attacks in linf; the norm is l1"):
        evaluate(defense, "small-2", ThreatModel("l1", 1.0), grid_images(3))


def test_bounds_by_default() -> None:
    assert default_eps("cifar10", "linf") == "8/255"
    with pytest.raises(UsageError, match='no customary eps for dataset "toys" in l2; give one with --eps'):
        default_eps("toys", "l2")


# what a run takes from it


@pytest.mark.usefixtures("small")
def test_a_run_follows_its_protocol() -> None:
    data = grid_images(8)
    result = evaluate(Noisy(), "small", LINF, data)
    spec = result.spec
    assert (spec.protocol, spec.cascade, spec.eot, spec.judge_repeats) == ("small-10", True, 10, 7)
    assert list(result.per_attack) == ["fgsm", "pgd(steps=2)"]
    assert result.row()["protocol"] == "small-10"
    assert not evaluate(Noisy(), "other", LINF, data).spec.cascade
    told = evaluate(Noisy(), "small", LINF, data, eot=1, cascade=False, judge_repeats=2).spec
    assert (told.cascade, told.judge_repeats) == (False, 2)
    assert list(evaluate(Linear(), "small", ThreatModel("l2", 0.1), data).per_attack) == ["fgsm"]


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("settings", "departure"),
    [
        ({"eot": 9}, "9 draws for a gradient, not 10"),
        ({"judge_repeats": 6}, "6 answers for a verdict, not 7"),
        ({"cascade": False}, "cascade is False"),
        ({"query_budget": 1000}, "the query budget is 1000"),
        ({"eot": 1, "judge_repeats": 1}, "1 draws for a gradient, not 10; 1 answers for a verdict, not 7"),
        ({"eot": 11, "judge_repeats": 8, "cascade": True, "unit_size": 3, "seed": 4}, ""),
    ],
)
def test_a_weaker_setting_takes_the_name_away_and_says_so(
    settings: dict[str, Any], departure: str, caplog: pytest.LogCaptureFixture
) -> None:
    result = evaluate(Noisy(), "small", LINF, grid_images(4), **settings)
    assert result.spec.protocol == ("" if departure else "small-10")
    assert [record.getMessage().partition(": ")[2] for record in caplog.records] == [departure] * bool(departure)
    assert list(result.per_attack) == ["fgsm", "pgd(steps=2)"]


@pytest.mark.usefixtures("small")
def test_a_deterministic_defense_needs_no_draws_for_the_name() -> None:
    assert evaluate(Linear(), "small", LINF, grid_images(2), eot=1, judge_repeats=1).spec.protocol == "small-10"


@pytest.mark.usefixtures("small")
def test_every_attack_that_reads_gradients_runs_along_all_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [entry.key for entry in plan_attacks("small", TwoPaths(), "linf", "")[0]]
    assert keys == ["fgsm", "fgsm@full", "pgd(steps=2)", "pgd(steps=2)@full"]
    scores = Protocol("scores-1", {"linf": ("fgsm", "square(queries=3)")})
    monkeypatch.setattr("robench.protocol.PROTOCOLS", {"scores-1": scores})
    keys = [entry.key for entry in plan_attacks("scores", TwoPaths(), "linf", "")[0]]
    assert keys == ["fgsm", "fgsm@full", "square(queries=3)"]


@pytest.mark.usefixtures("small")
def test_transfer_comes_from_every_source_with_weights_but_the_defense_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []

    def has_weights(name: str, dataset: str) -> bool:
        asked.append((name, dataset))
        return name != "shortrun"

    monkeypatch.setattr("robench.lineup.has_weights", has_weights)
    defense = Linear()
    defense.name = "convnet_at"
    entries, built = plan_attacks("small", defense, "linf", "toys")
    assert [entry.key for entry in entries] == ["fgsm", "pgd(steps=2)", "transfer"]  # convnet is its default source
    assert getattr(built["transfer"], "source", None) == "convnet"
    assert asked == [("convnet", "toys"), ("shortrun", "toys")]
    assert [entry.key for entry in plan_attacks("other", defense, "linf", "toys")[0]] == ["fgsm", "pgd(steps=2)"]


# what the user limits: refused before any work


LEVELS = ["none", "decisions", "scores", "gradient"]
NEEDS: dict[str, Attack | str] = {
    "none": Still(),
    "decisions": Upward(),
    "scores": "square(queries=5)",
    "gradient": "fgsm",
}


@pytest.mark.parametrize("needed", LEVELS)
@pytest.mark.parametrize("allowed", LEVELS)
def test_access_above_what_is_allowed_is_refused(needed: str, allowed: str) -> None:
    defense, attacks = Linear(), [Still(), NEEDS[needed]]
    if LEVELS.index(needed) <= LEVELS.index(allowed):
        assert evaluate(defense, attacks, LINF, grid_images(2), access=allowed).complete
        return
    defense.register_forward_pre_hook(lambda *_: pytest.fail("the defense was asked"))
    with pytest.raises(UsageError, match=f"needs access to {needed}; the run allows {allowed}"):
        evaluate(defense, attacks, LINF, grid_images(2), access=allowed)


@pytest.mark.parametrize("goal", ["budget", "minimal"])
def test_another_goal_than_asked_for_is_refused(goal: str) -> None:
    names = {"budget": "fgsm", "minimal": "fmn(steps=2)"}
    assert evaluate(Linear(), names.pop(goal), LINF, grid_images(2), goal=goal).complete
    (other,) = names.values()
    defense = Linear()
    defense.register_forward_pre_hook(lambda *_: pytest.fail("the defense was asked"))
    with pytest.raises(UsageError, match=f"has the goal {next(iter(names))}; the run asks for {goal}"):
        evaluate(defense, other, LINF, grid_images(2), goal=goal)


def test_goal_is_recorded_with_the_attack() -> None:
    spec = evaluate(Linear(), "fgsm,fmn(steps=2)", LINF, grid_images(2)).spec
    assert [entry.goal for entry in spec.attacks] == ["budget", "minimal"]


def test_an_attack_that_does_not_fit_the_defense_is_refused_before_any_work() -> None:
    defense = Linear()
    defense.register_forward_pre_hook(lambda *_: pytest.fail("the defense was asked"))
    with pytest.raises(UsageError, match="apgd: loss targeted dlr needs at least 4 classes; the defense has 3"):
        evaluate(defense, "apgd(loss='dlr', targets=2)", LINF, grid_images(2))


def test_with_few_classes_the_margin_stands_in_for_targeted_dlr() -> None:
    few, _ = plan_attacks("standard", Linear(), "linf", "")
    enough, _ = plan_attacks("standard", LinearToy(), "linf", "")
    assert [entry.key for entry in few][:2] == ["apgd", "apgd(loss='margin', targets=9)"]
    assert [entry.key for entry in enough][:2] == ["apgd", "apgd(loss='dlr', targets=9)"]
    x, _ = grid_images(1)
    result = evaluate(TwoClasses(), "standard", LINF, (x, TwoClasses()(x).argmax(1)))
    assert result.complete
    assert result.queries()["backwards"] > 0
