"""What the checks share: the images, and runs of the main path that are each done once and can be resumed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from robench.audit.effort import Effort
from robench.batches import pass_in_batches
from robench.data import Dataset
from robench.defense import Defense
from robench.errors import PluginError
from robench.estimate import Answers, Estimate
from robench.evaluate import evaluate as evaluate
from robench.losses import Loss
from robench.queries import Gradient
from robench.result import Evaluation
from robench.rng import seeded
from robench.threat import ThreatModel
from robench.types import Images, Labels
from robench.unit_table import CLEAN
from robench.victim import Victim
from robench.weights import has_weights

SOURCES: Final = ("convnet", "convnet_at")
"""Surrogates of the transfer run, the first that is not the defense itself and has weights for the data."""


@dataclass(frozen=True)
class RunPlan:
    """A run of the main path that checks ask for by name.

    Attributes:
        attack: as on the command line; `{steps}` and the like stand for the effort's numbers.
        factor: of eps; infinity stands for a bound that holds every image.
        draws: of each gradient: `eot`, `one` or `double`.
    """

    attack: str
    factor: float = 1.0
    draws: str = "eot"


RUNS: Final[Mapping[str, RunPlan]] = {
    "nothing": RunPlan("fgsm", factor=0.0),
    "fgsm": RunPlan("fgsm"),
    "fgsm, half eps": RunPlan("fgsm", factor=0.5),
    "fgsm, double eps": RunPlan("fgsm", factor=2.0),
    "pgd": RunPlan("pgd(steps={steps})"),
    "pgd, half eps": RunPlan("pgd(steps={steps})", factor=0.5),
    "pgd, double eps": RunPlan("pgd(steps={steps})", factor=2.0),
    "pgd, unbounded": RunPlan("pgd(steps={steps})", factor=math.inf),
    "pgd, margin loss": RunPlan("pgd(steps={steps}, loss='margin')"),
    "pgd, double steps": RunPlan("pgd(steps={double_steps})"),
    "pgd, double restarts": RunPlan("pgd(steps={steps}, restarts=2)"),
    "pgd, one draw": RunPlan("pgd(steps={steps})", draws="one"),
    "pgd, double draws": RunPlan("pgd(steps={steps})", draws="double"),
    "pgd, fixed draws": RunPlan("pgd(steps={steps}, randomness='fixed')"),
    "square": RunPlan("square(queries={queries})", draws="one"),
    "noise": RunPlan("noise(tries={noise})", draws="one"),
    "transfer": RunPlan("transfer(source='{source}')"),
}


def _plan(name: str) -> RunPlan:
    """The plan of a run; `pgd@MODE` is PGD along a gradient mode of the defense."""
    base, _, mode = name.partition("@")
    return RunPlan(f"{RUNS[base].attack}@{mode}") if mode else RUNS[base]


@dataclass
class Evidence:
    """The defense, the images and the runs so far.

    Attributes:
        defense: on `device`, frozen.
        threat: norm and bound of the claim.
        data: the images.
        seed: seeds everything.
        device: `cpu` or `cuda`.
        effort: what the runs may cost.
        folder: where runs are kept; None: in memory.
        progress: show the progress of each run.
        spec: how the command line finds the defense again.
        results: the runs so far; None where the defense broke the contract.
        broken: how it broke it.
        shared: measurements that several checks share.
    """

    defense: Defense
    threat: ThreatModel
    data: Dataset
    seed: int
    device: str
    effort: Effort
    folder: Path | None = None
    progress: bool = False
    spec: str = ""
    results: dict[str, Evaluation | None] = field(default_factory=dict)
    broken: str = ""
    shared: dict[str, Any] = field(default_factory=dict)

    @property
    def n(self) -> int:
        """Images."""
        return len(self.data.x)

    @cached_property
    def x(self) -> Images:
        """The images, on the device."""
        return self.data.x.to(self.device)

    @cached_property
    def y(self) -> Labels:
        """Their labels, on the device."""
        return self.data.y.to(self.device)

    @cached_property
    def source(self) -> str | None:
        """The surrogate of the transfer run."""
        known = [name for name in SOURCES if name != self.defense.name and has_weights(name, self.data.name)]
        return known[0] if known else None

    def applies(self, name: str) -> str:
        """Why a run makes no sense here; "" if it does."""
        if name == "transfer" and self.source is None:
            return f"no surrogate has weights for {self.data.name or 'these images'}"
        if name in ("pgd, one draw", "pgd, double draws", "pgd, fixed draws") and not self.defense.randomized:
            return "the defense is deterministic"
        return ""

    def run(self, name: str) -> Evaluation | None:
        """The run of that name, done now if it was not done before; None where the defense broke the contract."""
        if name not in self.results:
            try:
                self.results[name] = self._evaluate(name)
            except PluginError as error:
                self.results[name], self.broken = None, str(error)
            self.defense.to(self.device)
        return self.results[name]

    def right(self, name: str) -> npt.NDArray[np.float64] | None:
        """The share of right answers on each image after a run; None where the attack failed."""
        answers = self.answers(name)
        return None if answers is None else answers.right / answers.repeats

    def answers(self, name: str, key: str = "") -> Answers | None:
        """The judge's answers after a run (on the images of `key`, default the attack's); None where it failed."""
        result = self.run(name)
        return None if result is None else result.answers(key or result.spec.attacks[0].key)

    def estimate(self, name: str) -> Estimate | None:
        """Accuracy after a run; None where the attack failed."""
        answers = self.answers(name)
        return None if answers is None else answers.accuracy()

    @cached_property
    def clean(self) -> npt.NDArray[np.float64]:
        """The share of right answers on each clean image.

        Raises:
            PluginError: the defense broke the contract at once.
        """
        answers = self.answers("nothing", CLEAN)
        if answers is None:
            raise PluginError(self.broken or "the clean pass failed")
        return answers.right / answers.repeats

    def _evaluate(self, name: str) -> Evaluation:
        plan, effort = _plan(name), self.effort
        attack = plan.attack.format(
            steps=effort.steps,
            double_steps=2 * effort.steps,
            queries=effort.queries,
            noise=effort.noise,
            source=self.source,
        )
        folder = None if self.folder is None else self.folder / "runs" / name.replace(", ", "-").replace(" ", "-")
        settings: dict[str, Any] = {"out": folder, "resume": True} if folder is not None and folder.exists() else {}
        if folder is not None and not settings:
            settings = {"out": folder}
        return evaluate(
            self.defense,
            attack,
            ThreatModel(self.threat.norm, self.bound(plan.factor)),
            self.data,
            seed=self.seed,
            device=self.device,
            eot={"eot": effort.eot, "one": 1, "double": 2 * effort.eot}[plan.draws],
            judge_repeats=effort.judge_repeats,
            progress=self.progress,
            defense_spec=self.spec,
            **settings,
        )

    def bound(self, factor: float) -> float:
        """A multiple of eps, cut where the ball holds every image; infinity gives that bound."""
        values = self.data.x[0].numel()
        everything = {"linf": 1.0, "l2": math.sqrt(values)}[self.threat.norm]
        return everything if math.isinf(factor) else min(factor * self.threat.eps, everything)

    def gradient(
        self,
        x: Images,
        y: Labels,
        loss: str | Loss = "ce",
        *,
        draws: int | None = None,
        purpose: str = "gradient",
        mode: str | None = None,
    ) -> Gradient:
        """Loss, gradient and logits at x, averaged over draws, on the randomness of a purpose.

        Raises:
            PluginError: the defense gives no gradient.
        """
        victim = Victim(self.defense, "gradient", len(x), eot=draws or self.effort.eot, mode=mode)
        with seeded(self.seed, "audit", purpose, device=self.device):
            return victim.gradient(x, y, loss)

    def losses(
        self, x: Images, y: Labels, loss: Loss, *, draws: int | None = None, purpose: str = "gradient"
    ) -> npt.NDArray[np.float64]:
        """The loss of each image, averaged over draws (default `local_draws`); one purpose meets one randomness."""
        with torch.no_grad():
            values = self.average(lambda images, labels: loss(self.defense(images), labels), x, y, draws, purpose)
        return values.double().cpu().numpy()

    def average(
        self, ask: Callable[[Images, Labels], Tensor], x: Images, y: Labels, draws: int | None, purpose: str
    ) -> Tensor:
        """What `ask` gives of each image, averaged over draws (None: `local_draws`), on the randomness of a purpose."""
        count = (draws or self.effort.local_draws) if self.defense.randomized else 1
        rows = x.repeat(count, 1, 1, 1), y.repeat(count)
        with seeded(self.seed, "audit", purpose, device=self.device):
            parts = pass_in_batches(self.defense, ask, *rows, together=len(x))
        return torch.cat(parts).unflatten(0, (count, -1)).mean(0)
