"""What the bridges share: the attack that runs foreign code, and the model that foreign code gets to see."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import importlib
import inspect
import os
import sys
import warnings
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar, Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from robench.attack import Access, Attack, Goal
from robench.errors import BudgetExhausted, UsageError
from robench.registry import load_attack
from robench.rng import foreign_generators
from robench.threat import ThreatModel
from robench.types import Images, Labels, Logits
from robench.victim import Victim

INSTALL: Final = {"foolbox": "pip install foolbox", "torchattacks": "pip install --no-deps torchattacks"}


class UnclearRows(Exception):  # noqa: N818 - a signal to go on one image at a time
    """A query had rows that cannot be shared out among the examples."""


@dataclass(frozen=True)
class Traits:
    """What a bridge knows of a foreign attack.

    Attributes:
        norms: the norms it serves.
        access: the most that it needs to be shown.
        goal: `budget` or `minimal`.
        one_by_one: whether it queries some of the examples only, so that it must get them one by one.
    """

    norms: tuple[str, ...]
    access: Access
    goal: Goal
    one_by_one: bool = False


@dataclass(frozen=True)
class ForeignAttack(Attack):
    """An attack of another package behind the Victim; its subclasses are made by `make_class`.

    The foreign code sees a model without parameters that answers through the Victim: labels only (as one-hot scores)
    where its access is `decisions`, the mean logits of the EOT draws for `scores`, and those with their graph for
    `gradient`; the loss is thus that of the mean logits. It draws from torch's, numpy's and Python's generators, which
    follow the run's seed. Bound and norm come from the threat model.

    A minimal-norm attack gets the images that are right, and what it returns stands where it lies within the bound and
    is wrong when asked again; elsewhere the original does. Of the other attacks the result stands as it is, projected
    where it lies outside. Cost per image: what the foreign code asks, and two forwards more for a minimal-norm attack.
    Code that queries some of the examples alone is run on one image at a time, so that each query has an owner; where
    that is not known of it beforehand, the queries until it shows are counted and lost.
    """

    draws = True  # whether it does depends on its options

    bridge: ClassVar[str] = ""
    foreign: ClassVar[Any] = None
    one_by_one: ClassVar[bool] = False

    def __reduce__(self) -> tuple[Callable[..., Attack], tuple[str]]:
        """Pickles as the spec: the class is made on demand and has no place in a module."""
        return load_attack, (self.spec(),)

    def passes(self) -> int:
        """A guess from the option that counts steps: a pass for each, two with gradients."""
        counts = [getattr(self, name, None) for name in ("steps", "max_iterations", "n_queries", "num_iter_set")]
        steps = next((count for count in counts if isinstance(count, int)), 1)
        return steps * (2 if self.access == "gradient" else 1)

    def __call__(self, victim: Victim, x: Images, y: Labels, threat: ThreatModel) -> Images:
        """Attacks a batch; see the class."""
        if threat.eps == 0:
            return x.clone()
        if self.goal == "minimal":
            return self._nearest(victim, x, y, threat)
        found = self._run_safely(victim, x, y, threat)
        return torch.where(threat.contains(x, found).view(-1, 1, 1, 1), found, threat.project(x, found))

    def _nearest(self, victim: Victim, x: Images, y: Labels, threat: ThreatModel) -> Images:
        rows = (victim.labels(x) == y).nonzero()[:, 0]
        if len(rows) == 0:
            return x.clone()
        part, originals = victim.subset(rows), x[rows]
        found = self._run_safely(part, originals, y[rows], threat).clamp(0, 1)
        found = torch.where(threat.contains(originals, found).view(-1, 1, 1, 1), found, originals)  # NaN too is outside
        wrong = part.labels(found) != y[rows]
        return x.index_copy(0, rows, torch.where(wrong.view(-1, 1, 1, 1), found, originals))

    def _run_safely(self, victim: Victim, x: Images, y: Labels, threat: ThreatModel) -> Images:
        with foreign_generators(), contextlib.redirect_stdout(sys.stderr):
            if not self.one_by_one and len(x) > 1:
                with contextlib.suppress(UnclearRows):
                    return self._run(victim, x, y, threat).detach().to(x)
            return self._run_one_by_one(victim, x, y, threat).detach().to(x)

    def _run_one_by_one(self, victim: Victim, x: Images, y: Labels, threat: ThreatModel) -> Images:
        """Runs image after image; one that uses its budget up does not keep the others from theirs."""
        found, exhausted = [], None
        for i in range(len(x)):
            part = victim.subset(torch.tensor([i]))
            try:
                found.append(self._run(part, x[i : i + 1], y[i : i + 1], threat))
            except BudgetExhausted as error:
                found.append(x[i : i + 1])
                exhausted = error
        if exhausted is not None:
            raise exhausted
        return torch.cat(found)

    def _run(self, victim: Victim, x: Images, y: Labels, threat: ThreatModel) -> Tensor:
        """Runs the foreign code once; implemented by each bridge."""
        raise NotImplementedError

    def _options(self) -> dict[str, Any]:
        """The foreign constructor's options."""
        own = {field.name for field in dataclasses.fields(Attack)}
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name not in own}


class ShownModel(nn.Module):
    """The defense as foreign code sees it: no parameters, no modules, only answers."""

    def __init__(self, ask: Callable[[Images], Logits], x: Images) -> None:
        """Shows what `ask` answers about the examples x."""
        super().__init__()
        self._ask = ask
        self._examples = len(x)
        self.anchor = nn.Parameter(x.new_empty(0), requires_grad=False)  # tells torchattacks the device
        self.eval()

    def forward(self, x: Images) -> Logits:
        """Answers a query.

        Raises:
            UnclearRows: the rows are no multiple of the examples.
        """
        if len(x) % self._examples or len(x) == 0:
            raise UnclearRows(f"{len(x)} rows for {self._examples} examples")
        return self._ask(x.to(self.anchor.dtype))


def show(victim: Victim, access: Access, x: Images) -> ShownModel:
    """The victim of the images x, as far as an attack of that access may see it."""
    if access == "gradient":
        return ShownModel(victim.differentiable, x)
    return ShownModel(victim.logits, x) if access == "scores" else show_labels(victim.labels, victim.num_classes, x)


def show_labels(ask: Callable[[Images], Labels], num_classes: int, x: Images) -> ShownModel:
    """Labels alone, as one-hot scores."""
    return ShownModel(lambda images: functional.one_hot(ask(images), num_classes).to(images.dtype), x)


def make_class(base: type[ForeignAttack], name: str, foreign: Any, traits: Traits, hidden: Collection[str]) -> Any:
    """Makes the attack class of a foreign class: its options are those of the constructor, but for the hidden ones.

    Args:
        base: the bridge's base class.
        name: the name after the colon.
        foreign: the foreign class.
        traits: what is known of it.
        hidden: options that the bridge fills in or that no text can hold.
    """
    parameters = list(inspect.signature(foreign.__init__).parameters.values())[1:]
    fields: list[Any] = []
    for parameter in parameters:
        if parameter.name in hidden or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        required = parameter.default is parameter.empty
        default = dataclasses.MISSING if required else parameter.default
        fields.append((parameter.name, Any, dataclasses.field(default=default, kw_only=True)))
    namespace = {
        "__doc__": f"{base.bridge}'s {foreign.__name__}; see ForeignAttack.",
        "__module__": base.__module__,
        "name": f"{base.bridge}:{name}",
        "norms": traits.norms,
        "access": traits.access,
        "goal": traits.goal,
        "one_by_one": traits.one_by_one,
        "foreign": foreign,
    }
    return dataclasses.make_dataclass(foreign.__name__, fields, bases=(base,), namespace=namespace, frozen=True)


def import_package(package: str) -> ModuleType:
    """Imports foolbox or torchattacks.

    Raises:
        UsageError: it is not installed or cannot be imported; says what to do.
    """
    try:
        with warnings.catch_warnings(), _without_git():
            warnings.simplefilter("ignore", DeprecationWarning)  # foolbox 3.3.4 imports from an old place in scipy
            return importlib.import_module(package)
    except ImportError as error:
        raise UsageError(f'attacks "{package}:..." need {package} ({error}): {INSTALL[package]}') from error


@contextlib.contextmanager
def _without_git() -> Iterator[None]:
    """Foolbox imports GitPython, which otherwise refuses to be imported where there is no git command."""
    variable = "GIT_PYTHON_REFRESH"
    before = os.environ.get(variable)
    os.environ[variable] = before or "quiet"
    try:
        yield
    finally:
        if before is None:
            del os.environ[variable]


def check_name(package: str, name: str, known: Collection[str], refused: dict[str, str]) -> None:
    """Checks that a package has the attack and that the bridge serves it.

    Raises:
        UsageError: says what there is and what was probably meant, or why it is refused.
    """
    if name in refused:
        raise UsageError(f'attack "{package}:{name}" cannot be run: {refused[name]}')
    if name not in known:
        folded = {one.casefold(): one for one in known}
        near = difflib.get_close_matches(name.casefold(), list(folded), n=1)
        meant = f'did you mean "{folded[near[0]]}"? ' if near else ""
        raise UsageError(f'{package} has no attack "{name}"; {meant}There are: {", ".join(sorted(known))}')
