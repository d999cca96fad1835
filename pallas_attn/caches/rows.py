"""Some rows of a batch, by their numbers: int32 ``[R]``, distinct; one that no row has is an unused entry.

``None`` stands for all B rows in order, of which no copy is made.
"""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, dtypes, lax

from pallas_attn import bits, checks

Tree = TypeVar("Tree")


def check(rows: Array | None, batch_size: int) -> Array | None:
    """The same rows; unused entries become ``batch_size``, where a negative one would count from the end."""
    if rows is None:
        return None
    rows = checks.array("rows", rows, "an int32 array")
    if not checks.is_integer(rows) or rows.ndim != 1 or rows.size == 0:
        raise ValueError(f"rows: expected int32 [R], R at least 1, got {rows.dtype} {list(rows.shape)}")
    rows = checks.positions("rows", rows, ranks=(1,))
    return jnp.where(exist(rows, batch_size), rows, batch_size)


def exist(rows: Array, batch_size: int) -> Array:
    """bool ``[R]``: which entries are in use."""
    return (rows >= 0) & (rows < batch_size)


def take(x: Array, rows: Array | None, fill: float = 0) -> Array:
    """``[R, ...]`` of ``x`` ``[B, ...]``; ``fill`` for unused entries."""
    return x if rows is None else x.at[rows].get(mode="fill", fill_value=fill)


def put(x: Array, rows: Array | None, new: Array) -> Array:
    """``x`` ``[B, ...]`` with ``new`` ``[R, ...]`` as its rows."""
    return new if rows is None else x.at[rows].set(new, mode="drop")


def numbers(rows: Array | None, shape: tuple[int, ...]) -> Array:
    """int32 of ``shape`` ``[R, ...]``: every entry's row."""
    if rows is None:
        return lax.broadcasted_iota(jnp.int32, shape, 0)
    return jnp.broadcast_to(jnp.expand_dims(rows, tuple(range(1, len(shape)))), shape)


def copy(x: Tree, sources: Array, targets: Array, count: Array) -> Tree:
    """Every array of ``x`` after row ``targets[n]`` became what row ``sources[n]`` is, for n < ``count`` in order.

    In place where the arrays may be: rows that are not concerned are not touched.
    """

    def by_turns(x: Any, sources: Array, targets: Array, count: Array) -> Any:
        def copy_row(n: Array, x: Any) -> Any:
            source, target = sources[n], targets[n]
            return jax.tree.map(
                lambda x: lax.dynamic_update_index_in_dim(
                    x, lax.dynamic_index_in_dim(x, source, keepdims=False), target, 0
                ),
                x,
            )

        return lax.fori_loop(0, count, copy_row, x)

    @jax.custom_jvp
    def call(x: Tree, sources: Array, targets: Array, count: Array) -> Tree:
        return bits.like(x, by_turns(bits.hold(x), sources, targets, count))

    # JAX cannot differentiate a loop of so many turns as an array says: the derivative has no loop.
    @call.defjvp
    def derivative(primals, tangents):
        x, *pairs = primals
        every_row = jnp.arange(jax.tree.leaves(x)[0].shape[0], dtype=jnp.int32)
        origin = by_turns(every_row, *pairs)

        def moved(tangent: Array) -> Array:
            return tangent if tangent.dtype == dtypes.float0 else tangent[origin]

        return call(*primals), jax.tree.map(moved, tangents[0])

    return call(x, sources, targets, count)
