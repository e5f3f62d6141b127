"""Training: one loop and the recipes that the defenses share."""

from robench.train.loop import TrainSettings, train
from robench.train.recipe import Recipe, Stage

__all__ = ["Recipe", "Stage", "TrainSettings", "train"]
