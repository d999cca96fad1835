"""Checks for the flag ``jax_enable_x64``: no 64-bit equations, and the same results as without the flag.

    python -m tests.x64_check

prints a digest of the results of :func:`everything`, with the flags of the process environment.
"""

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, jaxprs_in_params

import pallas_attn as pa
from tests.attention_check import assert_same_bits


def wide_equations(function: Callable, *arguments: Any) -> list[str]:
    """The equations with 64-bit results in the jaxpr of a function traced under the flag, including inner jaxprs.

    A Python number beside an array is a 64-bit constant until it takes the array's dtype; it is not an equation.
    """
    with jax.enable_x64(True):
        # A new function object, so that JAX does not reuse an earlier trace.
        traced = jax.make_jaxpr(lambda *arguments: function(*arguments))(*arguments)
    return [str(equation) for equation in _equations(traced.jaxpr) if any(map(_is_wide, equation.outvars))]


def _equations(jaxpr: Any) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        yield equation
        within = [*jaxprs_in_params(equation.params)]
        if equation.primitive.name == "pallas_call":
            within += [block.index_map_jaxpr for block in equation.params["grid_mapping"].block_mappings]
        for inner in within:
            yield from _equations(inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner)


def _is_wide(variable: Any) -> bool:
    dtype = getattr(variable.aval, "dtype", None)
    if dtype is None or jnp.issubdtype(dtype, jax.dtypes.extended):  # a key of random numbers
        return False
    return jnp.dtype(dtype).itemsize > 4


def assert_same_with_the_flag(function: Callable, *arguments: Any) -> None:
    """Compares structure, dtypes and bits with the flag and without."""
    without = function(*arguments)
    with jax.enable_x64(True):
        with_it = function(*arguments)
    assert jax.tree.structure(with_it) == jax.tree.structure(without)
    assert_same_bits(with_it, without)


def normal(*shape: int) -> np.ndarray:
    """Random numbers seeded by the shape."""
    return np.random.default_rng(shape).standard_normal(shape).astype(np.float32)


@jax.jit
def everything() -> Any:
    """A little of everything that runs on a CPU, as users write it: integers have JAX's default dtype."""
    query, key, value = normal(2, 21, 4, 16), normal(2, 37, 2, 16), normal(2, 37, 2, 16)
    late, sizes = jnp.arange(16, 37)[None], pa.BlockSizes(16, 16)

    def loss(query, key, value, slopes):
        scores = (pa.scores.softcap(5.0), pa.scores.alibi(slopes))
        options = {"scores": scores, "q_positions": late, "block_sizes": sizes, "implementation": "xla"}
        return pa.attention(query, key, value, pa.masks.sliding_window(9, 1), **options).sum()

    gradients = jax.grad(loss, argnums=(0, 1, 2, 3))(query, key, value, normal(4))
    block_mask = pa.BlockMask.from_mask(pa.masks.causal(), late[:, -1:], jnp.arange(37)[None], sizes)
    one = pa.attention(query[:, :1], key, value, block_mask, interpret=True)
    cache = pa.caches.init(
        storage=pa.caches.Paged(16, 6, pa.caches.Int8()), batch_size=2, capacity=48, kv_heads=2, head_dim=16
    )
    cache = cache.append(key, value, jnp.tile(jnp.arange(37), (2, 1)))
    view = cache.view(jnp.arange(1))
    held = pa.attention(
        query[:1, :2],
        view.key,
        view.value,
        pa.masks.causal(),
        q_positions=late[:, -2:],
        kv_positions=view.positions,
        page_table=view.page_table,
        return_key_weights=True,
    )
    return gradients, block_mask, one, cache, held


def digest(x: Any) -> str:
    """A digest of dtypes, shapes and bits."""
    found = hashlib.sha256()
    for leaf in map(np.asarray, jax.tree.leaves(x)):
        found.update(f"{leaf.dtype} {leaf.shape}".encode())
        found.update(leaf.tobytes())
    return found.hexdigest()


if __name__ == "__main__":
    print(jnp.arange(1).dtype, digest(everything()))
