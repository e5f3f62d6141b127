"""Shapes and dtypes of the arrays that the parts hand to each other, as jaxtyping aliases.

They document signatures; beartype checks them in the tests only (about 29 us a call).
"""

from jaxtyping import Bool, Float, Int
from torch import Tensor

Images = Float[Tensor, "b c h w"]
"""Images in [0, 1]."""
Labels = Int[Tensor, " b"]
"""Class numbers, int64."""
Logits = Float[Tensor, "b k"]
PerExample = Float[Tensor, " b"]
"""One float per example."""
Mask = Bool[Tensor, " b"]
"""One truth value per example."""
