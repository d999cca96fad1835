"""What kernels do with tiles: load them, multiply them, and walk a list of blocks."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_attn import scores as score_algebra
from pallas_attn.scores import Scores

LOG2_E = math.log2(math.e)


def exp2(x: Array) -> Array:
    """2 to the power of float32 ``x`` as the GPU's own instruction, for kernels that are compiled.

    ``jnp.exp2`` becomes libdevice's, which keeps results below 2**-126 with a compare and two products per element.
    """
    result = jax.ShapeDtypeStruct(x.shape, jnp.float32)
    (y,) = plgpu.elementwise_inline_asm(
        "ex2.approx.ftz.f32 $0, $1;", args=[x], constraints="=f,f", pack=1, result_shape_dtypes=[result]
    )
    return y


def dot(a: Array, b: Array, contract: tuple[int, int]) -> Array:
    """The float32 product of two tiles, over axis ``contract[0]`` of a and ``contract[1]`` of b."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    axes = ((contract[:1], contract[1:]), ((), ()))
    return lax.dot_general(a, b, axes, precision=precision, preferred_element_type=jnp.float32)


def tile_width(head_dim: int) -> int:
    """Columns of a tile: the next power of two, and at least 16, the smallest operand of a matrix instruction."""
    return max(16, 1 << (head_dim - 1).bit_length())


def columns(head_dim: int) -> Array | None:
    """Which columns of a tile exist; None means all."""
    width = tile_width(head_dim)
    return None if head_dim == width else jnp.arange(width) < head_dim


def outer(rows: Array | None, columns: Array | None, shape: tuple[int, ...]) -> Array | None:
    """The mask of a 2-D tile from masks of its rows and columns; None means all."""
    masks = [rows[:, None]] if rows is not None else []
    masks += [columns[None, :]] if columns is not None else []
    return functools.reduce(jnp.logical_and, [jnp.broadcast_to(m, shape) for m in masks]) if masks else None


def load(ref, mask: Array | None, other: float = 0) -> Array:
    """What a mask excludes is not read and comes as ``other``."""
    return plgpu.load(ref) if mask is None else plgpu.load(ref, mask=mask, other=jnp.array(other, ref.dtype))


def load_rows(ref, rows: pl.Slice, row_mask: Array | None, column_mask: Array | None, *head: Array) -> Array:
    """Rows of a ref ``[rows, columns]``, or, given a head, ``[rows, heads, columns]``."""
    return load(ref.at[(rows, *head, slice(None))], outer(row_mask, column_mask, (_length(rows), ref.shape[-1])))


def load_operand(
    ref, rows: pl.Slice, row_mask: Array | None, keys: pl.Slice, key_mask: Array | None, *at: Array | int
) -> Array:
    """The tile ``[q_block|1, kv_block|1]`` of an operand ``[T|1, S|1]``; an axis of size 1 is shared.

    An operand with more axes is taken at the index ``at`` of these.
    """
    at_rows, row_mask = (rows, row_mask) if ref.shape[-2] > 1 else (pl.Slice(0, 1), None)
    at_keys, key_mask = (keys, key_mask) if ref.shape[-1] > 1 else (pl.Slice(0, 1), None)
    mask = outer(row_mask, key_mask, (_length(at_rows), _length(at_keys)))
    return load(ref.at[(*at, at_rows, at_keys)], mask)


def of_head(ref, head: Array | int) -> Any:
    """The index of a head along the first axis, which the heads of a group may share."""
    return head if ref.shape[0] > 1 else np.int32(0)  # a plain int fails in the interpreter


def _length(rows: pl.Slice) -> int:
    return int(rows.size)  # which a Slice says may be an array


def where_live(operands: Scores, live: Array) -> Scores:
    """Float32 tiles. Where nothing is seen an operand may hold anything, NaN included, and 0 * NaN is NaN."""
    return score_algebra.map_operands(lambda x: jnp.where(live, x.astype(jnp.float32), 0.0), operands)


def walk(lists, row: Array, full: Callable, partial: Callable, state, *head: Array):
    """Runs ``full(block, state)``, then ``partial(block, state)``, over the blocks in a row of the lists.

    The index of the *next* block is read while its own block is computed, so that an address is never waited for.
    """
    width = lists.indices.shape[-1]
    row_of_head = (*(of_head(lists.indices, n) for n in head), row)

    def step(visit: Callable):
        def body(slot: Array, carry):
            block, *state = carry
            following = lists.indices[(*row_of_head, jnp.minimum(slot + 1, width - 1))]
            return following, *visit(block, state)

        return body

    num_full, num_active = lists.num_full[row_of_head], lists.num_active[row_of_head]
    carry = lax.fori_loop(0, num_full, step(full), (lists.indices[(*row_of_head, 0)], *state))
    _, *state = lax.fori_loop(num_full, num_active, step(partial), carry)
    return tuple(state)
