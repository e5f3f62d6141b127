"""What the commands do between parsing and printing: defaults of a first look, run folders, resume."""

from __future__ import annotations

import datetime
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from robench.advice import advise_without_gradient
from robench.command_audit import check_auditable
from robench.data import load_dataset
from robench.data_names import KNOWN
from robench.defense import Defense
from robench.errors import Interrupted, RobenchError, UsageError
from robench.evaluate import evaluate
from robench.files import Place
from robench.lineup import plan_attacks
from robench.plan import RunSpec
from robench.protocol import default_eps, get_protocol
from robench.registry import load_defense
from robench.result import Evaluation
from robench.settings import Settings
from robench.shell import join_words, quote_word
from robench.store import RunStore
from robench.threat import ThreatModel, exact_eps, parse_eps
from robench.train import TrainSettings
from robench.train.named import TrainJob, find_trained, train_named
from robench.train.run import CHECKPOINT

LOG = logging.getLogger("robench")
FULL_N = 1000


@dataclass(frozen=True)
class RunRequest:
    """The options of `robench run` as given; None is what the user left out."""

    defense: str | None = None
    attack: str | None = None
    protocol: str | None = None
    dataset: str | None = None
    norm: str | None = None
    eps: str | None = None
    n: int | None = None
    seed: int | None = None
    eot: int | None = None
    judge_repeats: int | None = None
    unit_size: int | None = None
    query_budget: int | None = None
    access: str | None = None
    goal: str | None = None
    cascade: bool | None = None
    precision: str | None = None
    device: str | None = None
    weights: Path | None = None
    workers: int = 1
    out: Place | None = None
    resume: Place | None = None
    data_dir: Path | None = None
    audit: bool = False

    def full_command(self, result: Evaluation) -> str:
        """The command that runs the full protocol on the same defense and threat model; "" if that is what was run."""
        from robench.board import eps_text

        spec, n = result.spec, FULL_N
        if spec.n < FULL_N:
            n = self._most_images(spec)
        name = spec.protocol.rpartition("-")[0]
        if spec.n >= n and name in ("standard", "thorough", "blackbox"):
            return ""
        blind = name == "blackbox" or advise_without_gradient(result.reasons.values(), spec.norm)
        full = "blackbox" if blind else "standard"
        words = ["robench", "run", "--defense", spec.defense, "--protocol", full, "--dataset", spec.dataset]
        words += ["--norm", spec.norm, "--eps", eps_text(spec), "--n", str(n), "--seed", str(spec.seed)]
        if "weights" in spec.defense_options:
            words += ["--weights", str(spec.defense_options["weights"])]
        return join_words([*words, *data_words(self.data_dir)])

    def _most_images(self, spec: RunSpec) -> int:
        """FULL_N, or all images where the data has fewer; as many as were run where the data is gone."""
        try:
            return len(load_dataset(spec.dataset, "test", FULL_N, spec.seed, self.data_dir, at_most=True).index)
        except RobenchError:
            return spec.n


def data_words(data_dir: Path | None) -> list[str]:
    """The option that names the folder of the data, where one was given."""
    return [] if data_dir is None else ["--data-dir", str(data_dir)]


def trained_words(options: Mapping[str, Any]) -> list[str]:
    """The options that name the bound for which weights were trained, where those of their card tell it."""
    norm, eps = str(options.get("train_norm", "linf")), options.get("train_eps")
    words = ["--norm", norm] if norm != "linf" else []
    return words if eps is None else [*words, "--eps", exact_eps(eps, norm)]


def run_command(request: RunRequest) -> Evaluation:
    """Runs or resumes an evaluation as the command line asks for it.

    Raises:
        RobenchError: see `evaluate`, `load_defense` and `load_dataset`.
        Interrupted: the message names the command that resumes.
    """
    if request.resume is not None:
        return _resume(request.resume, request)
    if request.defense is None:
        raise UsageError("robench run needs --defense; see 'robench list defenses'")
    if (request.attack is None) == (request.protocol is None):
        raise UsageError("robench run needs either --attack or --protocol; see 'robench list attacks'")
    dataset, norm = request.dataset or "fashion_mnist", request.norm or "linf"
    ThreatModel(norm, 0.0)  # an unknown norm or dataset is named before anything that follows from it
    if dataset not in KNOWN:
        load_dataset(dataset, "test", 1, 0, request.data_dir)
    eps = default_eps(dataset, norm) if request.eps is None else request.eps
    threats = [ThreatModel(norm, parse_eps(part)) for part in eps.split(",")]
    options = {} if request.weights is None else {"weights": str(request.weights.resolve())}
    defense = load_defense(request.defense, dataset, **options)
    attacks = request.attack if request.protocol is None else get_protocol(request.protocol).name
    if request.attack is not None and (untried := _untried_paths(request.attack, defense, norm, dataset)):
        LOG.warning(
            "%s has other gradient paths, along which it may be weaker; a protocol takes them all. Here: --attack %s",
            defense.name,
            quote_word(",".join([request.attack, *untried])),
        )
    folder = request.out or _default_folder(defense, attacks or "")
    if request.audit:
        check_auditable(threats, folder)
    n, eot, judge_repeats = _budget(request, defense)
    settings = Settings(
        n=n,
        seed=request.seed or 0,
        device=request.device or "auto",
        workers=request.workers,
        out=folder,
        progress=True,
        data_dir=request.data_dir,
        unit_size=Settings.unit_size if request.unit_size is None else request.unit_size,
        eot=eot,
        judge_repeats=judge_repeats,
        query_budget=request.query_budget,
        access=request.access,
        goal=request.goal,
        cascade=request.cascade,
        precision=request.precision or "float32",
        defense_spec=request.defense,
        defense_options=options,
    )
    return _run(defense, attacks or "", threats, dataset, settings, audited=request.audit)


def _untried_paths(attacks: str, defense: Defense, norm: str, dataset: str) -> list[str]:
    """The attacks on a list that read gradients, along each path of the defense that the list leaves out."""
    entries, built = plan_attacks(attacks, defense, norm, dataset)
    tried = [(one.spec, defense.check_mode(one.mode)) for one in entries if built[one.key].access == "gradient"]
    specs = dict.fromkeys(spec for spec, _ in tried)
    wanted = [(spec, mode) for spec in specs for mode in defense.gradient_modes if (spec, mode) not in tried]
    return [f"{spec}@{mode}" for spec, mode in wanted]


def _budget(request: RunRequest, defense: Defense) -> tuple[int | None, int | None, int | None]:
    """n, eot and judge_repeats: as given, else the defense's first look, unless a protocol was asked for."""
    look = {} if request.protocol is not None else dict(defense.first_look)
    return (
        look.get("n") if request.n is None else request.n,
        look.get("eot") if request.eot is None else request.eot,
        look.get("judge_repeats") if request.judge_repeats is None else request.judge_repeats,
    )


def _run(
    defense: Defense,
    attacks: str | list[str],
    threats: list[ThreatModel],
    dataset: str,
    settings: Settings,
    *,
    audited: bool,
) -> Evaluation:
    content = {item.name: getattr(settings, item.name) for item in fields(settings)}
    try:
        return evaluate(defense, attacks, threats, dataset, **content)
    except KeyboardInterrupt:
        folder = None if settings.data_dir is None else Path(settings.data_dir)
        raise Interrupted(
            f"interrupted; finish it with: {resume_command(settings.out, folder, audit=audited)}"
        ) from None


def resume_command(folder: object, data_dir: Path | None, *, audit: bool = False) -> str:
    """The command that finishes a run."""
    return join_words(["robench", "run", "--resume", str(folder), *(["--audit"] * audit), *data_words(data_dir)])


def _resume(folder: Place, request: RunRequest) -> Evaluation:
    from robench.board import attack_specs

    spec = RunStore.open(folder).spec
    _check_same(request, spec, folder)
    if spec.device == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            f"{folder} holds a run that was begun on a GPU, and torch sees no CUDA device here: resume it where it "
            "does, or begin another with another --out"
        )
    if not spec.defense or not spec.dataset:
        raise UsageError(f"{folder} was run from Python on a defense or data without a name; resume it there")
    defense = load_defense(spec.defense, spec.dataset, **spec.defense_options)
    _check_attacks(request, spec, defense, folder)
    attacks: str | list[str] = spec.protocol or attack_specs(spec)
    settings = Settings(
        n=spec.n,
        seed=spec.seed,
        unit_size=spec.unit_size,
        eot=spec.eot,
        judge_repeats=spec.judge_repeats,
        device=spec.device,
        workers=request.workers,
        out=folder,
        resume=True,
        progress=True,
        data_dir=request.data_dir,
        query_budget=spec.query_budget,
        access=request.access,
        goal=request.goal,
        cascade=spec.cascade,
        precision=spec.precision,
        defense_spec=spec.defense,
        defense_options=spec.defense_options,
    )
    threats = [ThreatModel(spec.norm, eps) for eps in spec.eps]
    if request.audit:
        check_auditable(threats, folder)
    return _run(defense, attacks, threats, spec.dataset, settings, audited=request.audit)


def _check_same(request: RunRequest, spec: RunSpec, folder: Place) -> None:
    """Refuses options beside --resume that say something else than the run folder."""
    eps = None if request.eps is None else tuple(sorted({parse_eps(part) for part in request.eps.split(",")}))
    weights = None if request.weights is None else str(request.weights.resolve())
    told: dict[str, tuple[Any, Any]] = {
        "defense": (request.defense, spec.defense),
        "protocol": (None if request.protocol is None else get_protocol(request.protocol).name, spec.protocol),
        "dataset": (request.dataset, spec.dataset),
        "norm": (request.norm, spec.norm),
        "eps": (None if eps == spec.eps else request.eps, spec.eps),
        "n": (request.n, spec.n),
        "seed": (request.seed, spec.seed),
        "eot": (request.eot, spec.eot),
        "judge_repeats": (request.judge_repeats, spec.judge_repeats),
        "unit_size": (request.unit_size, spec.unit_size),
        "query_budget": (request.query_budget, spec.query_budget),
        "cascade": (request.cascade, spec.cascade),
        "precision": (request.precision, spec.precision),
        "device": (None if request.device == "auto" else request.device, spec.device),
        "weights": (weights, spec.defense_options.get("weights", "the shipped file")),
        "--out": (None if request.out is None else request.out.resolve(), folder.resolve()),
    }
    for name, (value, stored) in told.items():
        if value is not None and value != stored:
            asked = value if name == "eps" else repr(value)  # eps as it was typed
            raise UsageError(f"{folder} holds a run of another spec: {name} is {stored!r}, not {asked}")


def _check_attacks(request: RunRequest, spec: RunSpec, defense: Defense, folder: Place) -> None:
    """The same for the attacks, however they are written."""
    if request.attack is None:
        return
    asked, stored = plan_attacks(request.attack, defense, spec.norm, spec.dataset)[0], list(spec.attacks)
    if asked != stored:
        names = ", ".join(entry.key for entry in stored)
        raise UsageError(f"{folder} holds a run of another spec: the attacks are {names}, not {request.attack}")


def _default_folder(defense: Defense, attacks: str) -> Path:
    now = datetime.datetime.now().astimezone().strftime("%Y%m%d-%H%M%S")
    plain = re.sub(r"[^A-Za-z0-9]+", "-", attacks).strip("-")[:40]
    folder = Path("runs") / f"{now}-{defense.name}-{plain}"
    return folder if not folder.exists() else Path(f"{folder}-2")


@dataclass(frozen=True)
class TrainRequest:
    """The options of `robench train` as given."""

    defense: str
    dataset: str
    recipe: str | None
    out: Path | None
    seed: int
    scale: float
    device: str
    resume: bool
    data_dir: Path | None
    tensorboard: bool = False
    init: Path | None = None
    first_stage: str = ""
    precision: str = "auto"
    split: str = "train"
    lr_scale: float = 1.0


def train_command(request: TrainRequest) -> tuple[Path, dict[str, Any]]:
    """Trains as the command line asks for it; returns the weights file and its card.

    Raises:
        RobenchError: see `train_named`; or, without `resume`, the folder holds a training already.
        Interrupted: the message names the command that resumes.
    """
    folder = request.out or Path("runs") / "train" / _train_folder(request)
    if not request.resume and ((folder / CHECKPOINT).exists() or find_trained(folder, request.dataset)):
        raise UsageError(f"{folder} holds a training already. Go on with it by --resume, or choose another --out")
    settings = TrainSettings(
        seed=request.seed,
        scale=request.scale,
        device=Settings(device=request.device).resolve_device(),
        tensorboard=request.tensorboard,
        init=request.init,
        first_stage=request.first_stage,
        precision=request.precision,
        lr_scale=request.lr_scale,
    )
    job = TrainJob(
        request.defense,
        request.dataset,
        folder,
        recipe=request.recipe,
        data_dir=request.data_dir,
        split=request.split,
        settings=settings,
    )
    try:
        return train_named(job, resume=request.resume)
    except KeyboardInterrupt:
        resume = request.resume or (folder / CHECKPOINT).exists()
        told = "continue with" if resume else "nothing was saved yet; start again with"
        raise Interrupted(f"interrupted; {told}: {_train_again(request, folder, resume=resume)}") from None


def _train_folder(request: TrainRequest) -> str:
    """The folder's name: all that makes it another training, as far as it is not the default."""
    parts = [
        request.recipe or "",
        request.split if request.split != "train" else "",
        f"scale{request.scale:g}" if request.scale != 1 else "",
        f"lr{request.lr_scale:g}" if request.lr_scale != 1 else "",
        request.precision if request.precision != "auto" else "",
        f"from {request.init}" if request.init is not None else "",
        request.first_stage,
    ]
    first, *others = (re.sub(r"[^A-Za-z0-9]+", "-", part).strip("-") for part in [request.defense, *parts])
    return "-".join([first, request.dataset, *(part for part in others if part), str(request.seed)])


def _train_again(request: TrainRequest, folder: Path, *, resume: bool) -> str:
    words = ["robench", "train", "--defense", request.defense, "--dataset", request.dataset, "--out", str(folder)]
    words += ["--seed", str(request.seed), "--scale", repr(request.scale), "--device", request.device]
    words += ["--resume"] if resume else []
    words += ["--lr-scale", repr(request.lr_scale)] if request.lr_scale != 1 else []
    words += ["--tensorboard"] if request.tensorboard else []
    words += ["--recipe", request.recipe] if request.recipe is not None else []
    words += ["--init", str(request.init)] if request.init is not None else []
    words += ["--first-stage", request.first_stage] if request.first_stage else []
    words += ["--precision", request.precision] if request.precision != "auto" else []
    words += ["--split", request.split] if request.split != "train" else []
    return join_words([*words, *data_words(request.data_dir)])
