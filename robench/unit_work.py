"""What the units of a run work with, and who hears of their progress."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from torch import Tensor

from robench.attack import Attack
from robench.defense import Defense, tensor_digests
from robench.drafts import Drafts
from robench.errors import PluginError
from robench.plain import note_passing
from robench.plan import AttackEntry, RunSpec, Unit
from robench.types import Images, Labels

RECALLED: Final = "recalled "
"""Before the kind of passes that need not be done again: they were before the unit was interrupted."""


@dataclass
class UnitWork:
    """What a unit works with: the run's spec, the defense, the attacks by key, the images, and who hears of progress.

    Attributes:
        spec: the run's spec.
        defense: on the run's device.
        attacks: built attacks, by key of the spec's entries.
        x: all images of the run.
        y: their labels.
        index: position of each image in its split.
        on_passes: called with the number of passes just made and who asked: `judge` or `attack`. Also told, for
            the time left: `begun`, the passes of attacks that a unit takes at most, `spared`, those of them that turn
            out not to be needed, and `recalled judge` and `recalled attack`; see `RECALLED`.
        drafts: what a unit found before it was interrupted, and where to keep what it finds; None keeps nothing.
        failures: tracebacks of attacks that failed in this unit, by key; filled by `run_unit`.
        passes: so far in all units, by who asked.
        recalled_s: seconds that what a unit need not do again had taken; of the unit at work.
        tensors: digest of each weight, buffer and plain tensor of the defense before any work.
    """

    spec: RunSpec
    defense: Defense
    attacks: dict[str, Attack]
    x: Images
    y: Labels
    index: Tensor
    on_passes: Callable[[int, str], None] | None = None
    drafts: Callable[[Unit], Drafts] | None = None
    failures: dict[str, str] = field(default_factory=dict)
    passes: Counter[str] = field(default_factory=Counter)
    recalled_s: float = 0.0
    tensors: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        self.tensors = tensor_digests(self.defense)

    def tell(self, kind: str, passes: int) -> None:
        """Tells whoever hears of progress."""
        self.passes[kind.removeprefix(RECALLED)] += passes
        if self.on_passes is not None and passes > 0:
            self.on_passes(passes, kind)

    def expected(self, entry: AttackEntry, images: int, eps: float) -> int:
        """Passes of an attack on images at one bound if none of them goes wrong before its end.

        The one search of a minimal-norm attack, for all bounds, is made at the smallest.
        """
        attack = self.attacks[entry.key]
        searches = attack.goal != "minimal" or eps == self.spec.eps[0]
        return searches * images * attack.passes_with_eot(self.spec.norm, self.spec.eot)

    def expected_in_all(self, images: int) -> int:
        """The passes of all attacks at all bounds."""
        return sum(self.expected(entry, images, eps) for entry in self.spec.attacks for eps in self.spec.eps)

    def find_change(self) -> str:
        """The first weight, buffer or plain tensor that is not as the run was planned with; empty where all are."""
        note_passing(self.defense, self.tensors)
        after = tensor_digests(self.defense)
        changed = (name for name in sorted({*self.tensors, *after}) if self.tensors.get(name) != after.get(name))
        return next(changed, "")

    def check_unchanged(self) -> None:
        """Checks that the defense still has the weights that the run was planned with.

        Raises:
            PluginError: it has not; names the first that changed.
        """
        if changed := self.find_change():
            advice = "BatchNorm left in train mode? Call eval()"
            if changed not in self.defense.state_dict():
                advice = "If a pass leaves it behind, and it is no weight: None before the run, or a local variable"
            raise PluginError(
                f'defense "{self.defense.name}": its weights or buffers changed during the run (first '
                f'"{changed}"); nothing counts. {advice}'
            )
