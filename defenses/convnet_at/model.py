"""The ConvNet of table A.3 after adversarial training: the baseline that a defense has to beat."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Final

from robench.defenses.convnet import ConvNet
from robench.errors import UsageError
from robench.threat import ThreatModel

if TYPE_CHECKING:
    from robench.train.recipe import Recipe

TRAIN_EPS: Final = {"linf": 0.1, "l2": 1.5}
"""The bound of training by norm where neither a card nor `robench train` names one."""


class ConvNetAT(ConvNet):
    """The undefended ConvNet's net, trained on adversarial images (Madry et al. 2018, arXiv 1706.06083, eq. 2.1).

    Deterministic, no guarantee; cost of a forward as the ConvNet's. The weights fit one bound, `train_eps` in
    `train_norm`; which one the shipped weights have stands in their card.
    """

    name = "convnet_at"
    training_options = ("train_eps", "train_norm")
    recipes: ClassVar[Mapping[str, str]] = {
        "madry": "PGD of 7 steps (Madry et al. 2018)",
        "fast": "one step from a random start, RS-FGSM (Wong et al. 2020), and a step more where it overfits to itself",
        "pgd2": "two steps from a random start",
        "trades": "its own loss, beta 6 (Zhang et al. 2019)",
    }

    def __init__(
        self,
        channels: int = 1,
        width: int | None = None,
        side: int = 28,
        train_eps: float | None = None,
        train_norm: str = "linf",
    ) -> None:
        """Builds an untrained net.

        Args:
            channels: image channels.
            width: channels of the first layer, as for `convnet`.
            side: height and width of the images.
            train_eps: the bound of the training images, in units of [0, 1]; no part of a forward pass. None: 0.1 in
                linf and 1.5 in l2, as for Fashion-MNIST; `robench train` takes the customary bound of the dataset.
            train_norm: its norm, `linf` or `l2`.

        Raises:
            UsageError: an option is out of range.
        """
        if train_norm not in TRAIN_EPS:
            raise UsageError(f'convnet_at: train_norm must be linf or l2; got "{train_norm}"')
        train_eps = TRAIN_EPS[train_norm] if train_eps is None else train_eps
        if ThreatModel(train_norm, train_eps).eps == 0:
            raise UsageError(f"convnet_at: train_eps must be above 0; got {train_eps}")
        super().__init__(channels, width, side)
        self.train_eps, self.train_norm = train_eps, train_norm

    @classmethod
    def weights_variant(cls, options: Mapping[str, Any]) -> str:
        """The width where another one is asked for, and `l2`."""
        parts = [super().weights_variant(options), "l2" if options.get("train_norm") == "l2" else ""]
        return "-".join(part for part in parts if part)

    def recipe(self, name: str | None = None) -> Recipe:
        """One of `recipes`; `madry` unless another is named."""
        from robench.train.recipe import check_recipe

        from .train import AdversarialRecipe

        return AdversarialRecipe(self, check_recipe("convnet_at", self.recipes, name or "madry"))
