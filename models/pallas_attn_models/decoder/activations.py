"""Activation functions of the MLP, by name."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array


def _gelu_tanh(x: Array) -> Array:
    return jax.nn.gelu(x, approximate=True)


def _gelu(x: Array) -> Array:
    return jax.nn.gelu(x, approximate=False)


def _relu_squared(x: Array) -> Array:
    """Primer (So et al. 2021, arXiv:2109.08668)."""
    return jnp.square(jax.nn.relu(x))


# gelu: Hendrycks & Gimpel 2016 (arXiv:1606.08415), exact; gelu_tanh: its approximation by tanh.
# silu: Elfwing et al. 2017 (arXiv:1702.03118).
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": jax.nn.relu,
    "relu_squared": _relu_squared,
}
