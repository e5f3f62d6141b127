"""A study: many runs described in one TOML file. Read and multiplied out here; `robench.study_run` does the work.

name = "first"                                  # default: the file's name
defenses = ["convnet", "shortrun(n_chains=20)"]
datasets = ["fashion_mnist", "mnist"]           # default fashion_mnist
threats = ["linf", "l2 1.5", "linf 4/255,8/255"]    # norm and bounds; a norm alone takes the dataset's usual bound
protocol = "standard"                           # or attacks = ["pgd", "apgd(restarts=3)"]
seeds = [0, 1]                                  # default 0
n = 1000
audit = true                                    # default false: also audit each defense, dataset and threat model

[settings]                                      # fields of robench.Settings: eot, judge_repeats, unit_size, ...
unit_size = 64

[limits]                                        # of each worker: threads, stall_s, unit_s, memory_gb, gpus
stall_s = 600

[[exclude]]                                     # each leaves out the runs to which all its keys apply
defense = "shortrun*"
dataset = "mnist"
"""

from __future__ import annotations

import fnmatch
import hashlib
import itertools
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final

from robench.errors import UsageError
from robench.protocol import default_eps, find_protocol
from robench.runners.task import Limits
from robench.threat import ThreatModel, parse_eps

STUDY_CSV: Final = "study.csv"
FREE_SETTINGS: Final[dict[str, type]] = {
    **dict.fromkeys(("eot", "judge_repeats", "unit_size", "query_budget"), int),
    **dict.fromkeys(("access", "goal", "precision"), str),
    "cascade": bool,
}
"""Settings that a study's file may hold; the others follow from the study or are given to the command."""
KEYS: Final = ("name", "defenses", "datasets", "threats", "protocol", "attacks", "seeds", "n", "audit")
TABLES: Final = ("settings", "limits", "exclude")
EXCLUDE: Final = ("defense", "dataset", "norm", "eps", "seed")


@dataclass(frozen=True)
class StudyRun:
    """One run of a study.

    Attributes:
        name: of its folder in the study's.
        defense: the defense's name.
        dataset: the dataset's name.
        norm: of the threat models.
        eps: the bounds, ascending.
        seed: the run's seed.
    """

    name: str
    defense: str
    dataset: str
    norm: str
    eps: tuple[float, ...]
    seed: int


@dataclass(frozen=True)
class Study:
    """What a study's file says.

    Attributes:
        name: the study's.
        runs: all its runs, in the order of the file.
        attacks: names of attacks, or one protocol's.
        n: images of each run; None: the default.
        audit: whether each defense is audited on each dataset and threat model.
        settings: of all runs, as `evaluate` takes them.
        limits: of each worker.
    """

    name: str
    runs: tuple[StudyRun, ...]
    attacks: tuple[str, ...]
    n: int | None = None
    audit: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)
    limits: Limits = field(default_factory=Limits)

    def audits(self) -> dict[str, StudyRun]:
        """The audits that go with the runs, by the name of their folder: one for each bound, whatever the seed."""
        found: dict[str, StudyRun] = {}
        for run in self.runs if self.audit else ():
            for eps in run.eps:
                name = audit_name(run, eps)
                found.setdefault(name, StudyRun(name, run.defense, run.dataset, run.norm, (eps,), run.seed))
        return found


def audit_name(run: StudyRun, eps: float) -> str:
    """The folder of the audit that goes with a run at one of its bounds."""
    return "audit-" + _folder_name(run.defense, run.dataset, run.norm, (eps,))


def read_study(path: Path) -> Study:
    """Reads a study's file.

    Raises:
        UsageError: it cannot be read, or says something that it cannot mean; the message names the key.
    """
    try:
        content = tomllib.loads(path.read_bytes().decode())
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:  # TOML or UTF-8
        raise UsageError(f"{path} is not a study: {' '.join(str(error).split())}") from None
    try:
        return make_study(content, path.stem)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None


def make_study(content: Mapping[str, Any], name: str = "study") -> Study:
    """Builds a study from what its file holds.

    Raises:
        UsageError: see `read_study`.
    """
    _check_keys(content, (*KEYS, *TABLES), "the study")
    defenses = _texts(content, "defenses")
    datasets = _texts(content, "datasets", ("fashion_mnist",))
    seeds = _list(content, "seeds", int, (0,))
    attacks = _attacks(content)
    runs = []
    for defense, dataset, threat, seed in itertools.product(
        defenses, datasets, _texts(content, "threats", ("linf",)), seeds
    ):
        norm, eps = _parse_threat(threat, dataset)
        folder = _folder_name(defense, dataset, norm, eps, f"seed{seed}")
        runs.append(StudyRun(folder, defense, dataset, norm, eps, seed))
    kept = _without_excluded(runs, _list(content, "exclude", dict, ()))
    names = [run.name for run in kept]
    for number, name_of_run in enumerate(names):
        if name_of_run in names[:number]:
            raise UsageError(
                f'two runs would share the folder "{name_of_run}"; name each defense, threat and seed once'
            )
    if not kept:
        raise UsageError("no run is left; every one is excluded")
    audit = _one(content, "audit", bool, False)
    if audit:
        _check_audited(kept)
    return Study(
        _one(content, "name", str, name),
        tuple(kept),
        attacks,
        _one(content, "n", int, None),
        audit,
        _settings(_one(content, "settings", dict, {})),
        _limits(_one(content, "limits", dict, {})),
    )


def _check_audited(runs: Sequence[StudyRun]) -> None:
    from robench.audit import NORMS

    unfit = [run.name for run in runs if run.norm not in NORMS or run.eps[0] == 0]
    if unfit:
        raise UsageError(f"the audit takes {', '.join(NORMS)} and bounds above 0; {unfit[0]} is none. Leave audit out")


def _attacks(content: Mapping[str, Any]) -> tuple[str, ...]:
    if ("protocol" in content) == ("attacks" in content):
        raise UsageError("a study has either a protocol or attacks")
    if "attacks" in content:
        return _texts(content, "attacks")
    protocol = find_protocol(_one(content, "protocol", str, ""))
    if protocol is None:
        raise UsageError(f"there is no protocol \"{content['protocol']}\"; see 'robench list protocols'")
    return (protocol.name,)


def _parse_threat(text: str, dataset: str) -> tuple[str, tuple[float, ...]]:
    norm, _, bounds = text.strip().partition(" ")
    ThreatModel(norm, 0.0)
    written = bounds.strip() or default_eps(dataset, norm)
    eps = sorted({ThreatModel(norm, parse_eps(part)).eps for part in written.split(",")})
    return norm, tuple(eps)


def _without_excluded(runs: Sequence[StudyRun], rules: Sequence[Mapping[str, Any]]) -> list[StudyRun]:
    kept = list(runs)
    for number, rule in enumerate(rules, 1):
        _check_keys(rule, EXCLUDE, f"exclude no. {number}")
        left_out = [run for run in runs if rule and _applies(rule, run)]
        if not left_out:
            raise UsageError(f"exclude no. {number} applies to no run")
        kept = [run for run in kept if run not in left_out]
    return kept


def _applies(rule: Mapping[str, Any], run: StudyRun) -> bool:
    for key, wanted in rule.items():
        if key == "eps":
            if parse_eps(str(wanted)) not in run.eps:
                return False
        elif not fnmatch.fnmatchcase(str(getattr(run, key)), str(wanted)):
            return False
    return True


def _settings(given: Mapping[str, Any]) -> dict[str, Any]:
    from robench.settings import make_settings

    _check_keys(given, tuple(FREE_SETTINGS), "settings")
    for key, value in given.items():
        if type(value) is not FREE_SETTINGS[key]:
            raise UsageError(f"settings: {key} must be of kind {FREE_SETTINGS[key].__name__}; got {value!r}")
    make_settings(dict(given))
    return dict(given)


def _limits(given: Mapping[str, Any]) -> Limits:
    names = {("unit_s" if one.name == "task_s" else one.name): one.name for one in fields(Limits)}
    _check_keys(given, tuple(names), "limits")
    for key, value in given.items():
        kind = int if key == "threads" else int | float
        if isinstance(value, bool) or not isinstance(value, kind) or not 0 < value < float("inf"):
            raise UsageError(f"limits: {key} must be a number above 0; got {value!r}")
    return Limits(**{names[key]: value for key, value in given.items()})


def _check_keys(given: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise UsageError(f'{where} has no key "{unknown[0]}"; there are: {", ".join(known)}')


def _one(content: Mapping[str, Any], key: str, kind: type, default: Any) -> Any:
    value = content.get(key, default)
    if value is not default and type(value) is not kind:
        raise UsageError(f"{key} must be of kind {kind.__name__}; got {value!r}")
    return value


def _list(content: Mapping[str, Any], key: str, kind: type, default: Sequence[Any]) -> list[Any]:
    value = content.get(key, default)
    value = value if isinstance(value, list | tuple) else [value]
    if any(type(one) is not kind for one in value) or (not value and not isinstance(default, tuple)):
        raise UsageError(f"{key} must be a list of {kind.__name__}; got {value!r}")
    return list(value)


def _texts(content: Mapping[str, Any], key: str, default: Sequence[str] = ()) -> tuple[str, ...]:
    found = _list(content, key, str, default)
    if not found or not all(one.strip() for one in found):
        raise UsageError(f"{key} must name at least one; got {found!r}")
    return tuple(found)


def _folder_name(defense: str, *parts: str | tuple[float, ...]) -> str:
    """A folder's name: `convnet_width_16-mnist-linf-0.1_0.3`; of a defense's file only the last part."""
    written = [
        defense.rpartition("/")[2] or defense,
        *(part if isinstance(part, str) else _join(part) for part in parts),
    ]
    words = [re.sub(r"[^A-Za-z0-9.]+", "_", text).strip("_.") for text in written]
    name = "-".join(word for word in words if word)
    return name if len(name) <= 120 else f"{name[:110]}-{hashlib.sha256(repr(written).encode()).hexdigest()[:8]}"


def _join(bounds: tuple[float, ...]) -> str:
    return "_".join(f"{eps:.6g}" for eps in bounds)
