"""JEM: a classifier whose logits are also an energy-based model of the images (Grathwohl et al., ICLR 2020)."""

from .model import JEM, make_net

__all__ = ["JEM", "make_net"]
