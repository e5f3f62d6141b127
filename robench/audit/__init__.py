"""The audit: can a robustness number be believed? Runs on the main path give evidence, one check a file judges it."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from robench.audit.checks import CHECKS
from robench.audit.checks.base import Check, Outcome, not_run
from robench.audit.checks.contract import remember
from robench.audit.effort import REDUCED, USUAL
from robench.audit.evidence import RUNS, Evidence
from robench.audit.finding import Audit, Curve, Finding, Plot
from robench.check_names import Overall, Verdict
from robench.data import Dataset
from robench.defense import Defense
from robench.errors import PluginError, UsageError
from robench.evaluate import Data, check_images, load_images
from robench.hidden import refuse_hidden_networks
from robench.lineup import check_defense
from robench.precision import engine_numerics
from robench.report.page import load_template
from robench.settings import Settings
from robench.threat import ThreatModel, as_threats
from robench.types import Images

__all__ = ["CHECKS", "Audit", "Check", "Curve", "Finding", "Overall", "Plot", "Verdict", "audit"]

DEFAULT_N = 128
NORMS = ("linf", "l2")
"""Those of FGSM and square; in l1 and l0 too few attacks are at hand for a comparison."""
EXAMPLES = 10


@engine_numerics()
def audit(  # noqa: PLR0913 - the contract's parameters and what `evaluate` takes too
    defense: Defense,
    threat: ThreatModel | Sequence[ThreatModel],
    data: Data,
    *,
    n: int | None = None,
    seed: int = 0,
    checks: str | Sequence[str] | None = None,
    eot: int | None = None,
    device: str = "auto",
    out: str | Path | None = None,
    progress: bool = False,
    data_dir: str | Path | None = None,
    defense_spec: str = "",
) -> Audit:
    """Asks of a defense whether its robustness in a threat model can be believed.

    The runs that the checks need are planned first, each is done once on the main path, and is taken up again from
    `out` if it was there before.

    Args:
        defense: see `load_defense` and `wrap`.
        threat: norm (linf or l2) and bound of the claim.
        data: as `evaluate` takes it: a dataset's name, or images in [0, 1] and labels.
        n: images; None: 128, fewer where the defense names a first look of its own, or all of a pair.
        seed: seeds the draw of images and all randomness.
        checks: names of the checks to make, in a list or with commas between them; None: all.
        eot: draws in a gradient of a randomized defense; None: 10.
        device: `auto`, `cpu` or `cuda`.
        out: folder of the runs and the report, `audit.html` and `audit.json`, or `audit-partial` of some checks alone;
            None keeps the runs in memory.
        progress: show progress on standard error.
        data_dir: folder with datasets; None: `ROBENCH_DATA`.
        defense_spec: how the command line finds the defense again.

    Returns:
        The Audit: the verdict `pass`, `suspect` or `masked`, and a finding for each check.

    Raises:
        UsageError: no defense, an unknown check or name, several bounds, a norm without checks, a setting of the wrong
            kind or out of range, data that does not fit, or with `out` Jinja2 or matplotlib is missing.
        PluginError: the defense broke the contract so that nothing can be measured, or calls a network that is none of
            its sub-modules.
    """
    started = time.monotonic()
    if out is not None:
        load_template("audit.html", "the audit's")  # a missing package is told before any work
    check_defense(defense)
    claim = _only(as_threats(threat))
    names = [name.strip() for name in checks.split(",")] if isinstance(checks, str) else checks
    chosen = [_find(name) for name in names] if names else list(CHECKS.values())
    settings = Settings(n=n, seed=seed, eot=eot, device=device, data_dir=data_dir)
    effort = REDUCED if defense.first_look else USUAL
    effort = effort if settings.eot is None else replace(effort, eot=settings.eot)
    dataset = _load(data, settings, defense.first_look.get("n"))
    check_images(dataset.x, dataset.y, defense)
    evidence = Evidence(
        defense,
        claim,
        dataset,
        settings.seed,
        settings.resolve_device(),
        effort,
        folder=None if out is None else Path(out),
        progress=progress,
        spec=defense_spec,
    )
    try:
        defense.to(evidence.device)
        refuse_hidden_networks(defense, evidence.x[:1], settings.seed)
        _run_all(chosen, evidence)
        findings = tuple(_judge(check, evidence) for check in chosen)
    finally:
        defense.to("cpu")
    found = Audit(
        defense.name,
        dataset.name,
        str(claim),
        evidence.n,
        settings.seed,
        findings,
        _accuracies(evidence),
        time.monotonic() - started,
        _facts(evidence),
        _examples(evidence),
        nothing.notes if (nothing := evidence.run("nothing")) else (),
    )
    if evidence.folder is not None:
        from robench.report.audit import write_audit

        write_audit(found, evidence.folder)
    return found


def _find(name: str) -> Check:
    if name not in CHECKS:
        raise UsageError(f'there is no check "{name}"; there are: {", ".join(CHECKS)}')
    return CHECKS[name]


def _only(threats: Sequence[ThreatModel]) -> ThreatModel:
    """The one bound of an audit.

    Raises:
        UsageError: several or none, 0, or of a norm without checks.
    """
    if len(threats) != 1:
        raise UsageError(f"an audit is of one bound; got {len(threats)}. Call it for each")
    if threats[0].norm not in NORMS or threats[0].eps <= 0:
        raise UsageError(f"the audit takes {', '.join(NORMS)} and an eps above 0; the threat model is {threats[0]}")
    return threats[0]


def _load(data: Data, settings: Settings, look: int | None) -> Dataset:
    """The images of an audit, where n is left out as many as `audit` says; `look` is n of the defense's first look."""
    if isinstance(data, str):
        return load_images(data, replace(settings, n=settings.n or look or DEFAULT_N))
    dataset = load_images(data, settings)
    if settings.n is not None or look is None or len(dataset.x) <= look or isinstance(data, Dataset):
        return dataset
    return load_images((dataset.x, dataset.y), replace(settings, n=look))


def _planned(checks: Iterable[Check], evidence: Evidence) -> list[str]:
    """The runs that the checks need and that make sense for this defense, each once, in the order of the list."""
    wanted = {"nothing", *(name for check in checks if not _excluded(check, evidence) for name in check.runs)}
    return [name for name in RUNS if name in wanted and not evidence.applies(name)]


def _run_all(checks: Sequence[Check], evidence: Evidence) -> None:
    remember(evidence)
    planned = _planned(checks, evidence)
    for number, name in enumerate(planned, 1):
        if evidence.progress:
            sys.stderr.write(f"audit: run {number} of {len(planned)}: {name}\n")
        evidence.run(name)


def _excluded(check: Check, evidence: Evidence) -> str:
    kind = "randomized" if evidence.defense.randomized else "deterministic"
    return f"the defense is {kind}" if check.only not in ("", kind) else ""


def _judge(check: Check, evidence: Evidence) -> Finding:
    started = time.monotonic()
    reason = _excluded(check, evidence)
    try:
        outcome: Outcome = not_run(reason) if reason else check.judge(evidence)
    except PluginError as error:
        outcome = not_run(str(error))
    return Finding(
        check.name,
        outcome.verdict,
        outcome.statistic,
        outcome.threshold,
        outcome.reason,
        check.paper,
        outcome.plot,
        time.monotonic() - started,
    )


def _facts(evidence: Evidence) -> dict[str, Any]:
    """By which a leaderboard row finds its audit, and the effort behind the findings."""
    result = evidence.run("nothing")
    if result is None:
        return {}
    spec = result.spec
    return {
        "spec": evidence.spec,
        "norm": evidence.threat.norm,
        "eps": evidence.threat.eps,
        "eot": evidence.effort.eot,
        "effort": evidence.effort.to_json(),
        "weights_digest": spec.weights_digest,
        "data_digest": spec.data_digest,
        "device": spec.device,
        "robench_version": spec.robench_version,
        "torch_version": spec.torch_version,
    }


def _accuracies(evidence: Evidence) -> dict[str, tuple[float, float, float]]:
    nothing = evidence.run("nothing")
    found: dict[str, Any] = {"clean": nothing and nothing.clean_accuracy}
    found |= {name: evidence.estimate(name) for name in evidence.results if name != "nothing"}
    return {name: (100 * one.value, 100 * one.low, 100 * one.high) for name, one in found.items() if one is not None}


def _examples(evidence: Evidence) -> dict[str, Images]:
    """Some images that PGD broke (or the first ones), what it made of them, and the difference around grey."""
    right = evidence.right("pgd") if "pgd" in evidence.results else None
    if right is None:
        return {}
    result = evidence.run("pgd")
    if result is None:
        return {}
    found = torch.from_numpy(result.images(result.spec.attacks[0].key))
    broken = torch.from_numpy((evidence.clean > 0.5) & (right < 0.5)).nonzero()[:, 0]
    rows = (broken if len(broken) else torch.arange(evidence.n))[:EXAMPLES]
    x, x_adv = evidence.data.x[rows], found[rows]
    spread = (x_adv - x).abs().amax().clamp_min(1e-12)
    return {"original": x, "under PGD": x_adv, "difference": 0.5 + (x_adv - x) / (2 * spread)}
