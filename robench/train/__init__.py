"""Training: one loop and the recipes that the defenses share."""

from robench.train.loop import train
from robench.train.recipe import Recipe, Stage
from robench.train.run import TrainSettings

__all__ = ["Recipe", "Stage", "TrainSettings", "train"]
