"""Audits as the command line asks for them: alone, or of the defense of a run."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from robench.errors import Interrupted, UsageError
from robench.files import Place
from robench.protocol import default_eps
from robench.registry import load_defense
from robench.report.page import load_template
from robench.threat import ThreatModel, exact_eps, parse_eps

if TYPE_CHECKING:
    from robench.audit import Audit
    from robench.defense import Defense
    from robench.result import Evaluation


@dataclass(frozen=True)
class AuditRequest:
    """The options of `robench audit` as given."""

    defense: str
    dataset: str
    norm: str
    eps: str | None
    n: int | None
    checks: str | None
    seed: int
    eot: int | None
    device: str
    weights: Path | None
    out: Path | None
    data_dir: Path | None


def audit_command(request: AuditRequest) -> tuple[Path, Audit]:
    """Audits as the command line asks for it and writes the report; returns the folder and the audit.

    Raises:
        RobenchError: see `robench.audit`.
        Interrupted: the message says how to go on.
    """
    ThreatModel(request.norm, 0.0)
    text = default_eps(request.dataset, request.norm) if request.eps is None else request.eps
    threat = ThreatModel(request.norm, parse_eps(text))
    options = {} if request.weights is None else {"weights": str(request.weights.resolve())}
    defense = load_defense(request.defense, request.dataset, **options)
    plain = re.sub(r"[^A-Za-z0-9]+", "-", f"{request.defense}-{request.dataset}-{request.norm}-{text}").strip("-")
    folder = request.out or Path("runs") / f"audit-{plain}-{request.n or 'default'}-{request.seed}"
    found = _audit(
        defense,
        threat,
        folder,
        f"the same command with --out {folder} goes on where it stopped",
        data=request.dataset,
        n=request.n,
        seed=request.seed,
        checks=request.checks,
        eot=request.eot,
        device=request.device,
        data_dir=request.data_dir,
        defense_spec=request.defense,
    )
    return folder, found


def check_auditable(threats: Sequence[ThreatModel], folder: Place) -> None:
    """Checks before a run that its defense can be audited at its bounds, and the report written.

    Raises:
        UsageError: the audit knows no such norm or bound, the folder is behind a URL, or a package is missing.
    """
    from robench.audit import NORMS

    if threats[0].norm not in NORMS or max(threat.eps for threat in threats) <= 0:
        raise UsageError(f"--audit takes {', '.join(NORMS)} and an eps above 0; the threat model is {threats[-1]}")
    if not isinstance(folder, Path):
        raise UsageError(f"audits are written to a folder, not to {folder}; leave --audit out, or give another --out")
    load_template("audit.html", "the audit's")


def audit_run(result: Evaluation, data_dir: Path | None) -> dict[Path, Audit]:
    """Audits the defense of a finished run at each of its bounds above 0, inside the run's folder; by folder.

    On as many images as the audit takes by itself, or the run's where those are fewer. What is there is taken up. The
    run's row then carries the verdict.

    Raises:
        RobenchError: see `robench.audit`.
        Interrupted: the message names the command that goes on.
    """
    from robench.audit import DEFAULT_N
    from robench.command import resume_command

    spec, found = result.spec, dict[Path, "Audit"]()
    defense = load_defense(spec.defense, spec.dataset, **spec.defense_options)
    usual = defense.first_look.get("n", DEFAULT_N)
    for eps in spec.eps:
        if eps == 0:
            continue
        folder = Path(str(result.folder)) / audit_folder(eps, spec.norm)
        found[folder] = _audit(
            defense,
            ThreatModel(spec.norm, eps),
            folder,
            f"finish it with: {resume_command(result.folder, data_dir, audit=True)}",
            data=spec.dataset,
            n=min(usual, spec.n),
            seed=spec.seed,
            eot=spec.eot if spec.randomized else None,
            device=spec.device,
            data_dir=data_dir,
            defense_spec=spec.defense,
        )
    result.save()
    return found


def audit_folder(eps: float, norm: str) -> str:
    """The name of an audit's folder inside that of its run: `audit-0.1`, `audit-8_255`."""
    return "audit-" + exact_eps(eps, norm).replace("/", "_")


def _audit(defense: Defense, threat: ThreatModel, folder: Path, go_on: str, **settings: Any) -> Audit:
    """Audits into a folder, with what `robench.audit` takes besides; `go_on` is for Ctrl-C."""
    from robench.audit import audit

    try:
        return audit(defense, threat, out=folder, progress=True, **settings)
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted; {go_on}") from None
