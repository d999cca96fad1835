"""The logarithm of a row's sum of exponentials, as kernels hand it on."""

from typing import NamedTuple

from jax import Array


class Lse(NamedTuple):
    """A large number and a small one, in natural units, whose sum it is; float32 ``[B, N, T]``.

    Rounded to one number, the small one would be lost beside a large one: of 32 logits of -5e9 each would get
    probability 1.
    """

    peak: Array  # the largest logit; -inf for a query that saw nothing
    log_total: Array  # log(sum(exp(logits - peak))); 0 for a query that saw nothing

    @property
    def value(self) -> Array:
        """Their sum, rounded."""
        return self.peak + self.log_total
