"""The log-sum-exp of each row, in two parts."""

import dataclasses
from typing import Any

from jax import Array

from pallas_attn import pytrees
from pallas_attn.kernels.rounding import rounded


@dataclasses.dataclass(frozen=True)
class Lse:
    """The log-sum-exp of each row as the sum of its largest logit and a remainder.

    Rounded to one number, the remainder would vanish beside a large peak: each of 32 logits of -5e9 would get
    probability 1.

    In kernels and BlockSpecs, the fields hold refs and specs instead of arrays.

    Attributes:
      peak: float32 ``[B, N, T]``: the largest logit, in units of ``unit``; -inf for a query that sees no key.
      log_total: float32 ``[B, N, T]``: ``lse - unit * peak``; 0 for a query that sees no key.
      unit: of the logits: 1, or the factor of the products ``q . k``.
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
