"""The logarithm of a row's sum of exponentials, as kernels hand it on."""

import dataclasses
from typing import Any

from jax import Array

from pallas_attn import pytrees
from pallas_attn.kernels.rounding import rounded


@dataclasses.dataclass(frozen=True)
class Lse:
    """Of every row the large part of lse, and the rest.

    Rounded to one number, the rest would be lost beside a large peak: of 32 logits of -5e9 each would get
    probability 1.

    In kernels and their specs, what stands for the arrays.

    Attributes:
      peak: float32 ``[B, N, T]``: the largest logit, in units of ``unit``; -inf for a query that saw nothing.
      log_total: float32 ``[B, N, T]``: ``lse - unit * peak``; 0 for a query that saw nothing.
      unit: that of the logits, 1 or what products ``q . k`` are multiplied by.
    """

    peak: Any
    log_total: Any
    unit: float = 1.0

    @property
    def value(self) -> Array:
        """lse, rounded."""
        return self.largest + self.log_total

    @property
    def largest(self) -> Array:
        """The largest logit."""
        return rounded(self.peak * self.unit)


pytrees.register(Lse, data=("peak", "log_total"), static=("unit",))
