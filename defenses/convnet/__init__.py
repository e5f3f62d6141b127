"""The undefended ConvNet of the Short Run thesis (table A.3)."""

from .model import ConvNet, make_convnet

__all__ = ["ConvNet", "make_convnet"]
