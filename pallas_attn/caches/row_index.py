"""Row indices, the ``rows=`` of caches: int32 ``[R]``, distinct; an index outside ``[0, B)`` marks an unused entry.

``None`` stands for all B rows in order, without a copy.
"""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, dtypes, lax

from pallas_attn import bits, checks

Tree = TypeVar("Tree")


def check(rows: Array | None, batch_size: int) -> Array | None:
    """Validates rows; unused entries become ``batch_size``, because negative indices count from the end."""
    if rows is None:
        return None
    rows = checks.array("rows", rows, "an int32 array")
    if not checks.is_integer(rows) or rows.ndim != 1 or rows.size == 0:
        raise ValueError(f"rows: expected int32 [R], R at least 1, got {rows.dtype} {list(rows.shape)}")
    rows = checks.positions("rows", rows, ranks=(1,))
    return jnp.where(in_bounds(rows, batch_size), rows, batch_size)


def in_bounds(rows: Array, batch_size: int) -> Array:
    """bool ``[R]``: whether each entry is in use."""
    return (rows >= 0) & (rows < batch_size)


def take(x: Array, rows: Array | None, fill: float = 0) -> Array:
    """Reads ``rows`` of ``x`` ``[B, ...]``: ``[R, ...]``, with ``fill`` for unused entries."""
    return x if rows is None else x.at[rows].get(mode="fill", fill_value=fill)


def put(x: Array, rows: Array | None, new: Array) -> Array:
    """Writes ``new`` ``[R, ...]`` to ``rows`` of ``x`` ``[B, ...]``."""
    return new if rows is None else x.at[rows].set(new, mode="drop")


def numbers(rows: Array | None, shape: tuple[int, ...]) -> Array:
    """int32 of ``shape`` ``[R, ...]``: the row of every entry."""
    if rows is None:
        return lax.broadcasted_iota(jnp.int32, shape, 0)
    return jnp.broadcast_to(jnp.expand_dims(rows, tuple(range(1, len(shape)))), shape)


def copy(x: Tree, sources: Array, targets: Array, count: Array) -> Tree:
    """Copies row ``sources[n]`` to row ``targets[n]`` in every array of ``x``, for n < ``count`` in order.

    XLA can do it in place; other rows are neither read nor written.
    """

    def copy_in_order(x: Any, sources: Array, targets: Array, count: Array) -> Any:
        def copy_row(n: Array, x: Any) -> Any:
            arrays, structure = jax.tree.flatten(x)
            pair = sources[n], targets[n]
            for index, array in enumerate(arrays):
                row = lax.dynamic_index_in_dim(array, pair[0], keepdims=False)
                # One array after another: XLA would read the rows of all before it writes one.
                arrays[index], pair = lax.optimization_barrier(
                    (lax.dynamic_update_index_in_dim(array, row, pair[1], 0), pair)
                )
            return structure.unflatten(arrays)

        return lax.fori_loop(0, count, copy_row, x)

    @jax.custom_jvp
    def call(x: Tree, sources: Array, targets: Array, count: Array) -> Tree:
        return bits.repack(x, copy_in_order(bits.pack(x), sources, targets, count))

    # JAX cannot differentiate a loop with a traced trip count in reverse mode, so the derivative is a gather.
    @call.defjvp
    def derivative(primals, tangents):
        x, *pairs = primals
        every_row = jnp.arange(jax.tree.leaves(x)[0].shape[0], dtype=jnp.int32)
        origin = copy_in_order(every_row, *pairs)

        def moved(tangent: Array) -> Array:
            return tangent if tangent.dtype == dtypes.float0 else tangent[origin]

        return call(*primals), jax.tree.map(moved, tangents[0])

    return call(x, sources, targets, count)
