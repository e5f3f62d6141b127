"""The ConvNet of the Short Run thesis, adversarially trained."""

from .model import ConvNetAT

__all__ = ["ConvNetAT"]
