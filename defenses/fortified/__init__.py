"""Fortified Networks: denoising autoencoders on hidden layers, after adversarial training (arXiv 1804.02485)."""

from .fortify import FortifiedModule, Trace, fortify, reconstruction_losses
from .model import Fortified, make_cnn
from .own import OwnFortified, Training

__all__ = [
    "Fortified",
    "FortifiedModule",
    "OwnFortified",
    "Trace",
    "Training",
    "fortify",
    "make_cnn",
    "reconstruction_losses",
]
