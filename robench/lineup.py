"""From names to the attacks of a run: protocols, options, gradient modes, and the checks before any work."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from robench.attack import ACCESS_LEVELS, Attack
from robench.defense import Defense
from robench.errors import UsageError
from robench.leaderboard import HEAD, TAIL
from robench.plan import AttackEntry, RunSpec
from robench.protocol import Protocol, find_protocol
from robench.registry import load_attack, split_specs
from robench.settings import RANDOMIZED_EOT, Settings
from robench.threat import ThreatModel
from robench.unit_table import CLEAN, WORST
from robench.weights import has_weights

Attacks = Attack | str | Sequence[Attack | str]


def check_defense(defense: object) -> None:
    """Checks that something is a defense, and its traits.

    Raises:
        UsageError: it is none.
        PluginError: a trait is missing or of the wrong kind.
    """
    if isinstance(defense, Defense):
        defense.check_traits()
        return
    came, hint = repr(defense), "see robench.load_defense and robench.wrap"
    if isinstance(defense, str):
        hint = f"load it with robench.load_defense({defense!r})"
    elif isinstance(defense, type):
        came, hint = f"the class {defense.__name__}", f"make one: {defense.__name__}()"
    elif isinstance(defense, nn.Module):
        came, hint = f"the module {type(defense).__name__}", "robench.wrap(module, num_classes=..., input_shape=...)"
    raise UsageError(f"defense must be a robench.Defense; got {came}; {hint}")


def _listed(attacks: object) -> list[Attack | str]:
    """An attack or a name, or several, as a list.

    Raises:
        UsageError: it is something else.
    """
    listed: list[Attack | str] = []
    for one in attacks if isinstance(attacks, Sequence) and not isinstance(attacks, str) else [attacks]:
        if isinstance(one, Attack | str):
            listed.append(one)
            continue
        hint = f"the class {one.__name__}; make one: {one.__name__}()" if isinstance(one, type) else repr(one)
        raise UsageError(f"attacks must be an attack, a name such as pgd, or a list of them; got {hint}")
    return listed


def named_protocol(attacks: Attacks) -> Protocol | None:
    """The protocol that the argument `attacks` names, if it names one.

    Raises:
        UsageError: it is no attack, no name and no list of them.
    """
    given = _listed(attacks)
    return find_protocol(given[0]) if len(given) == 1 and isinstance(given[0], str) else None


def plan_attacks(
    attacks: Attacks, defense: Defense, norm: str, dataset: str
) -> tuple[list[AttackEntry], dict[str, Attack]]:
    """Turns names into attacks: the entries in order and the built attacks by key.

    `NAME@MODE` runs an attack along one gradient mode of the defense. A protocol runs every attack that reads
    gradients along all of them, and on a defense of fewer than four classes the margin stands in for its targeted dlr.

    Raises:
        UsageError: an unknown name, option or mode, no attack at all, something else, two different ones of one
            name, or one that is named like another column of a row.
    """
    protocol = named_protocol(attacks)
    given = _listed(attacks)
    if protocol is not None:
        listed = [_for_classes(text, defense.num_classes) for text in protocol.attacks_for(norm)]
        given = [*listed, *_transfers(protocol, defense, dataset)]
    named = [part for one in given for part in (split_specs(one) if isinstance(one, str) else [one])]
    entries: dict[str, AttackEntry] = {}
    built: dict[str, Attack] = {}
    for one in named:
        attack, written = _build(one)
        wants_all = protocol is not None and attack.access == "gradient"
        for mode in defense.gradient_modes if wants_all else [written]:
            entry = _entry(attack, one if isinstance(one, str) else None, defense.check_mode(mode), defense)
            if entry.key in (CLEAN, WORST, *HEAD, *TAIL) or built.get(entry.key, attack) != attack:
                raise UsageError(f'two things of this run would be named "{entry.key}"; give the attack another name')
            entries[entry.key], built[entry.key] = entry, attack
    if not entries:
        raise UsageError("no attack given; name at least one, for example pgd")
    return list(entries.values()), built


def _for_classes(text: str, num_classes: int) -> str:
    return text.replace("loss='dlr'", "loss='margin'") if num_classes < 4 else text


def _transfers(protocol: Protocol, defense: Defense, dataset: str) -> list[str]:
    sources = [source for source in protocol.sources if source != defense.name]
    return [f"transfer(source={source!r})" for source in sources if has_weights(source, dataset)]


def find_departure(spec: RunSpec, protocol: Protocol) -> str:
    """In which settings a run of a protocol's attacks is none of the protocol; empty if in none that could weaken it.

    More draws and answers than the protocol asks for leave a run what it is, and so does the precision of gradients,
    which the row states.
    """
    eot, repeats = (RANDOMIZED_EOT, protocol.judge_repeats) if spec.randomized else (1, 1)
    return "; ".join(
        text
        for departs, text in (
            (spec.cascade != protocol.cascade, f"cascade is {spec.cascade}"),
            (spec.query_budget is not None, f"the query budget is {spec.query_budget}"),
            (spec.eot < eot, f"{spec.eot} draws for a gradient, not {eot}"),
            (spec.judge_repeats < repeats, f"{spec.judge_repeats} answers for a verdict, not {repeats}"),
        )
        if departs
    )


def check_attacks(
    built: dict[str, Attack], defense: Defense, threats: Sequence[ThreatModel], dataset: str, settings: Settings
) -> None:
    """Checks before any work that every attack fits the threat model, the defense and what was asked for.

    Raises:
        UsageError: the norm, the access, the goal, the defense or its randomness does not fit.
    """
    for key, attack in built.items():
        for threat in threats:
            attack.check_threat(threat)
        if settings.access is not None and ACCESS_LEVELS.index(attack.access) > ACCESS_LEVELS.index(settings.access):
            raise UsageError(f'attack "{key}" needs access to {attack.access}; the run allows {settings.access}')
        if settings.goal is not None and attack.goal != settings.goal:
            raise UsageError(f'attack "{key}" has the goal {attack.goal}; the run asks for {settings.goal}')
        if attack.randomness == "off" and defense.randomized:
            defense.without_randomness()
        attack.check_fit(defense, dataset)


def _build(one: Attack | str) -> tuple[Attack, str | None]:
    if isinstance(one, Attack):
        one.check_traits()
        return one, None
    name, at, mode = one.rpartition("@")
    return (load_attack(name), mode) if at else (load_attack(one), None)


def _entry(attack: Attack, text: str | None, mode: str, defense: Defense) -> AttackEntry:
    spec = attack.spec()
    if text is not None and ":" in text:  # a class from a file or module replays by its path
        path = text.rpartition("@")[0] or text
        spec = path.partition("(")[0] + spec.removeprefix(attack.name)
    is_first = attack.access != "gradient" or mode == defense.gradient_modes[0]
    key = attack.spec() if is_first else f"{attack.spec()}@{mode}"
    return AttackEntry(key, spec, None if is_first else mode, attack.goal)
