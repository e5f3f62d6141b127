"""The Short Run classifier (E. M. Fischer, MSc thesis, UCLA 2020) and its training recipe."""

from .model import ShortRun, auto_sigma, make_classifier, make_generator

__all__ = ["ShortRun", "auto_sigma", "make_classifier", "make_generator"]
