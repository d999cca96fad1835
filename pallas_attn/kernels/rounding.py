"""Logits that are rounded before the largest of them is subtracted."""

import jax
import jax.numpy as jnp
from jax import Array


@jax.custom_jvp
def rounded(x: Array) -> Array:
    """x, but XLA does not fuse a product that x is into what follows.

    On a CPU ``0.3 * x - y`` is one instruction, which does not round in between: where y is ``0.3 * x``, it gives what
    rounding took from y instead of 0, which is hundreds where x is 1e10. A choice between x and x stops that in every
    version; ``lax.optimization_barrier`` does not in JAX 0.10.
    """
    return jnp.where(x == 0, jnp.zeros_like(x), x)


rounded.defjvp(lambda primals, tangents: (rounded(*primals), *tangents))
