"""`robench new`: a working plugin in one file, with its contract test beside it."""

from __future__ import annotations

import re
from pathlib import Path
from string import Template

from robench.errors import UsageError

_DEFENSE = Template('''\
"""$title: a defense for robench."""

from __future__ import annotations

import torch
from torch import nn

from robench import Defense
from robench.types import Images, Logits


class $cls(Defense):
    """What it does, in one line.

    Threat models, guarantee or none, cost of a forward in passes, paper and section, where it departs from it.
    """

    name = "$name"
    randomized = False
    num_classes = 10
    input_shape = (1, 28, 28)

    def __init__(self) -> None:
        """Builds the classifier: here a linear one with fixed weights, to be replaced."""
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, 10))
        with torch.no_grad():
            weight = torch.linspace(-1, 1, self.net[1].weight.numel()).sin().view_as(self.net[1].weight)
            self.net[1].weight.copy_(weight)
            self.net[1].bias.zero_()

    def forward(self, x: Images) -> Logits:
        """Classifies images in [0, 1]."""
        return self.net(x)
''')

_ATTACK = Template('''\
"""$title: an attack for robench."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from robench import Attack, ThreatModel, Victim
from robench.types import Images, Labels


@dataclass(frozen=True)
class $cls(Attack):
    """What it does, in one line: here gradient ascent on the margin, to be replaced.

    Norms, guarantee or none, cost per image in passes, paper and section, where it departs from it.

    Args:
        steps: gradient steps.
    """

    name = "$name"
    norms = ("linf", "l2")
    access = "gradient"
    goal = "budget"

    steps: int = 10

    def passes(self) -> int:
        """One forward and one backward pass for each step."""
        return 2 * self.steps

    def __call__(self, victim: Victim, x: Images, y: Labels, threat: ThreatModel) -> Images:
        """Attacks a batch; the engine checks the bounds and judges the result."""
        x_adv = x
        for _ in range(self.steps):
            loss, grad = victim.loss_grad(x_adv, y, "margin")
            step = threat.steepest(grad) * (2.5 * threat.eps / self.steps)
            step = torch.where((loss < 0).view(-1, 1, 1, 1), step, torch.zeros_like(step))  # leave errors alone
            x_adv = threat.project(x, x_adv + step)
        return x_adv
''')

_DEFENSE_TEST = Template('''\
"""The contract of $name: every rule that robench relies on, one inherited test each."""

from pathlib import Path

from robench import Defense, load_defense
from robench.testing import DefenseContract


class Test$cls(DefenseContract):
    """Builds the defense as the command line does."""

    def build(self) -> Defense:
        """A fresh instance."""
        return load_defense(f"{Path(__file__).parent / '$name.py'}:$cls")
''')

_ATTACK_TEST = Template('''\
"""The contract of $name: every rule that robench relies on, one inherited test each."""

from pathlib import Path

from robench import load_attack
from robench.testing import AttackContract


class Test$cls(AttackContract):
    """Loads the attack as the command line does."""

    attack = load_attack(f"{Path(__file__).parent / '$name.py'}:$cls")
''')


def class_name(name: str) -> str:
    """The class of the plugin `name`: `my_defense` holds `MyDefense`."""
    return "".join(part.capitalize() for part in name.split("_"))


def write_plugin(kind: str, name: str, folder: Path) -> list[Path]:
    """Writes `<name>.py` and `test_<name>.py`; returns both.

    Raises:
        UsageError: not a kind, not a name, or a file of that name is there.
    """
    if kind not in ("defense", "attack"):
        raise UsageError(f'robench new makes a defense or an attack; got "{kind}"')
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise UsageError(f'a plugin name has small letters, digits and underscores, such as my_defense; got "{name}"')
    values = {
        "name": name,
        "title": name.replace("_", " ").capitalize(),
        "cls": class_name(name),
    }
    plugin, test = (_DEFENSE, _DEFENSE_TEST) if kind == "defense" else (_ATTACK, _ATTACK_TEST)
    files = {
        folder / f"{name}.py": plugin.substitute(values),
        folder / f"test_{name}.py": test.substitute(values),
    }
    for path in files:
        if path.exists():
            raise UsageError(f"{path} exists already; choose another name or --folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, text in files.items():
            path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write into {folder}: {error.strerror}") from None
    return list(files)
