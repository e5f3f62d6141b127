"""The ConvNet of table A.3 after adversarial training: the baseline that a defense has to beat."""

from __future__ import annotations

from typing import TYPE_CHECKING

from robench.defenses.convnet import ConvNet
from robench.errors import UsageError

if TYPE_CHECKING:
    from robench.train.recipe import Recipe


class ConvNetAT(ConvNet):
    """The undefended ConvNet's net, trained on adversarial images (Madry et al. 2018, arXiv 1706.06083, eq. 2.1).

    Deterministic, no guarantee; cost of a forward as the ConvNet's. The weights fit one bound, `train_eps` in linf.
    """

    name = "convnet_at"

    def __init__(self, channels: int = 1, width: int = 64, train_eps: float = 0.1) -> None:
        """Builds an untrained net.

        Args:
            channels: image channels.
            width: channels of the first layer; the others scale with it.
            train_eps: the linf bound of the training images; no part of a forward pass.

        Raises:
            UsageError: an option is out of range.
        """
        if not 0 < train_eps <= 1:
            raise UsageError(f"convnet_at: train_eps must be above 0 and at most 1; got {train_eps}")
        super().__init__(channels, width)
        self.train_eps = train_eps

    def recipe(self, name: str | None = None) -> Recipe:
        """`madry` (the default): seven steps; `fast`: two steps of a random start."""
        from .train import INNER, AdversarialRecipe

        name = name or "madry"
        if name not in INNER:
            raise UsageError(f'convnet_at has the recipes {", ".join(INNER)}; got "{name}"')
        return AdversarialRecipe(self, name)
