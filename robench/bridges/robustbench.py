"""Models of RobustBench's zoo as defenses: `robustbench:Carmon2019Unlabeled`.

The package wants modules that its own requirements no longer bring (`autoattack`, `pkg_resources`); loading a model
uses neither, so empty ones stand in for them while it is imported. Its weights it fetches itself; robench reads none.
The wheel of torchattacks brings an old copy of the whole package under the same name, which is not taken for it.
"""

from __future__ import annotations

import base64
import contextlib
import csv
import functools
import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from importlib.metadata import Distribution, distributions
from pathlib import Path
from types import ModuleType
from typing import Any, Final, Self

import torch
from torch import nn

from robench.defense import Defense
from robench.errors import UsageError
from robench.types import Images, Logits

SHAPES: Final = {"cifar10": (10, (3, 32, 32)), "cifar100": (100, (3, 32, 32))}
"""Classes and image shape of the zoo's datasets whose images robench has."""
THREATS: Final = ("Linf", "L2")
STAND_INS: Final = {
    "autoattack": ("AutoAttack",),
    "autoattack.state": ("EvaluationState",),
    "pkg_resources": (),
}
"""What is imported by the zoo and not used to load a model, with the names taken from it."""
OPERATORS: Final = ("nms", "qnms")
_OPERATORS: Final = torch.library.Library("torchvision", "FRAGMENT")
PACKAGE: Final = "robustbench"
ADVICE: Final = "pip install 'robench[robustbench]'"
REINSTALL: Final = f"pip install --force-reinstall --no-deps {PACKAGE}"


class ZooModel(Defense):
    """A model of the zoo; deterministic, with its own normalisation inside."""

    def __init__(self, model: nn.Module, num_classes: int, input_shape: tuple[int, int, int]) -> None:
        """Keeps a loaded model."""
        super().__init__()
        self.model, self.num_classes, self.input_shape = model, num_classes, input_shape

    @classmethod
    def load(
        cls,
        dataset: str | None = None,
        weights: str | Path | None = None,
        *,
        threat: str = "Linf",
        model_dir: str = "models",
        **options: Any,
    ) -> Self:
        """Loads the model, from the files below `model_dir` or from where RobustBench publishes it.

        Args:
            dataset: `cifar10` (the default) or `cifar100`.
            weights: not taken: the zoo knows its own.
            threat: the list of the zoo that the model is in, `Linf` or `L2`.
            model_dir: as RobustBench lays it out: `<model_dir>/<dataset>/<threat>/<name>.pt`.
            options: none.

        Raises:
            UsageError: the package or the model is missing, or an option is wrong.
        """
        dataset = dataset or "cifar10"
        if weights is not None or options:
            raise UsageError(f'defense "{cls.name}" takes the options threat and model_dir; its weights are the zoo\'s')
        if dataset not in SHAPES or threat not in THREATS:
            known = f"dataset {', '.join(SHAPES)} and threat {', '.join(THREATS)}"
            raise UsageError(f'defense "{cls.name}" needs {known}; got {dataset} and {threat}')
        model = _load_model(cls.name.partition(":")[2], dataset, threat, model_dir)
        return cls(model, *SHAPES[dataset])

    def forward(self, x: Images) -> Logits:
        """The model's logits."""
        logits: Logits = self.model(x)
        return logits


@functools.cache
def find_defense(name: str) -> type[ZooModel]:
    """The class of `robustbench:name`; asked twice, it is the same class. Nothing is imported yet."""
    members = {"name": f"robustbench:{name}", "__doc__": f"{name} of RobustBench's zoo.", "__module__": __name__}
    return type("ZooModel", (ZooModel,), members)


def _load_model(name: str, dataset: str, threat: str, model_dir: str) -> nn.Module:
    if fault := _find_fault():
        raise UsageError(f'defense "robustbench:{name}" needs the package {PACKAGE} ({fault[0]}): {fault[1]}')
    try:
        zoo = _import_zoo()
    except (ImportError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(f'defense "robustbench:{name}" needs the package robustbench ({reason}): {ADVICE}') from None
    try:
        with contextlib.redirect_stdout(sys.stderr):  # it tells there of each download
            model: nn.Module = zoo.load_model(name, model_dir=model_dir, dataset=dataset, threat_model=threat)
    except KeyError:
        raise UsageError(f'RobustBench has no model "{name}" for {dataset} in {threat}') from None
    except Exception as error:  # noqa: BLE001 - the download may fail in as many ways as the network
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        place = Path(model_dir) / dataset / threat / f"{name}.pt"
        raise UsageError(f"RobustBench could not load {name}: {reason}. Put its file at {place}") from None
    return model.eval()


def _import_zoo() -> Any:
    with _stand_ins():
        try:
            return importlib.import_module("robustbench.utils")
        except RuntimeError as error:
            if "torchvision::" not in str(error):
                raise
        # A torchvision without its compiled operators, as beside a CPU build of torch: no model of the zoo calls them.
        for name in [name for name in sys.modules if name.partition(".")[0] in ("torchvision", "robustbench", "timm")]:
            del sys.modules[name]
        for operator in OPERATORS:
            _OPERATORS.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return importlib.import_module("robustbench.utils")


def _find_fault() -> tuple[str, str] | None:
    """Why the package that would be imported is not RobustBench's own, and what to do; None if it is, or there is none.

    Which of two packages in one folder was installed last, only the files tell, by the digests in their RECORDs. One
    that was changed by hand is let be.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(next(iter(spec.submodule_search_locations))).resolve()
    installed = list(distributions(name=PACKAGE))[:1]
    recorded = {path: told for found in installed for path, told in _recorded(found, folder).items()}
    changed = [path for path, told in recorded.items() if _digest(path) != told]
    if recorded and not changed:
        return None
    missing = [path for path in changed if not path.exists()]
    suspects = changed or [folder / "__init__.py"]
    owner = next((other.name for other in distributions() if _brings(other, suspects, folder)), "")
    if not installed:
        whose = f"is a copy that {owner} brings along" if owner else f"belongs to no installed {PACKAGE}"
        return f"the one in {folder} {whose}", ADVICE
    if owner:
        where = "has overwritten its files" if recorded else f"brings a copy that is found first, in {folder}"
        return f"{owner} {where}", REINSTALL
    return (f"{missing[0]} is missing", REINSTALL) if missing else None


def _recorded(found: Distribution, folder: Path) -> dict[Path, str]:
    """The digests of a distribution's files of this package, as far as they lie below the folder."""
    lines = csv.reader((found.read_text("RECORD") or "").splitlines())
    told = [(line[0], line[1]) for line in lines if len(line) > 1 and line[0].startswith(f"{PACKAGE}/")]
    paths = {Path(str(found.locate_file(name))).resolve(): digest for name, digest in told if digest}
    return {path: digest for path, digest in paths.items() if path.is_relative_to(folder)}


def _brings(other: Distribution, paths: list[Path], folder: Path) -> bool:
    """Whether another distribution has brought one of these files, as it is now."""
    recorded = _recorded(other, folder)
    return any(path in recorded and recorded[path] == _digest(path) for path in paths) and other.name != PACKAGE


def _digest(path: Path) -> str:
    """A file's digest as in a RECORD; empty if it is not there."""
    try:
        content = path.read_bytes()
    except OSError:
        return ""
    return "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()


@contextlib.contextmanager
def _stand_ins() -> Iterator[None]:
    """Puts an empty module where one is missing, and takes it away again."""
    placed = []
    for name, members in STAND_INS.items():
        if name in sys.modules or (name.partition(".")[0] not in placed and _is_there(name)):
            continue
        module = ModuleType(name)
        for member in members:
            setattr(module, member, type(member, (), {}))
        sys.modules[name] = module
        placed.append(name)
    try:
        yield
    finally:
        for name in placed:
            sys.modules.pop(name, None)


def _is_there(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False
