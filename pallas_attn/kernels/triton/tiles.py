"""Operations on tiles: loads, stores, products."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

LOG2_E = math.log2(math.e)


def exp2(x: Array) -> Array:
    """2 to the power of float32 ``x`` by the GPU's own instruction, for compiled kernels.

    ``jnp.exp2`` becomes libdevice's, which keeps results below 2**-126 with a compare and two products per element.
    """
    result = jax.ShapeDtypeStruct(x.shape, jnp.float32)
    (y,) = plgpu.elementwise_inline_asm(
        "ex2.approx.ftz.f32 $0, $1;", args=[x], constraints="=f,f", pack=1, result_shape_dtypes=[result]
    )
    return y


def minus(x: Array, y: Array) -> Array:
    """``x - y`` of float32 numbers, for compiled kernels; x is rounded first, even if it is a product.

    A compiler may fuse a product and a difference without rounding in between. ``.rn`` forbids that.
    """
    shape = jnp.broadcast_shapes(x.shape, y.shape)
    (difference,) = plgpu.elementwise_inline_asm(
        "sub.rn.f32 $0, $1, $2;",
        args=[jnp.broadcast_to(x, shape), jnp.broadcast_to(y, shape)],
        constraints="=f,f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(shape, jnp.float32)],
    )
    return difference


def opaque(x: Array) -> Array:
    """The int32 number ``x`` through an opaque ``mov``, so that it is rematerialized instead of kept; compiled only."""
    (y,) = plgpu.elementwise_inline_asm(
        "mov.b32 $0, $1;",
        args=[jnp.broadcast_to(x, (1,))],
        constraints="=r,r",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct((1,), jnp.int32)],
    )
    return jnp.max(y)  # of one


def dot(a: Array, b: Array, contract: tuple[int, int]) -> Array:
    """The float32 product of two tiles, over axis ``contract[0]`` of a and ``contract[1]`` of b."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    axes = ((contract[:1], contract[1:]), ((), ()))
    return lax.dot_general(a, b, axes, precision=precision, preferred_element_type=jnp.float32)


def tile_width(head_dim: int) -> int:
    """Columns of a tile: the next power of two, and at least 16, the smallest operand of a matrix instruction."""
    return max(16, 1 << (head_dim - 1).bit_length())


class Columns(NamedTuple):
    """Neighboring columns of an array, in a tile that may be wider."""

    at: pl.Slice
    in_bounds: Array | None  # bool [tile]; None: all of them

    @property
    def tile(self) -> int:
        """Number of columns of the tile."""
        return _length(self.at)


def known_slice(start: int, size: int) -> pl.Slice:
    """A slice with a static int32 start: under jax_enable_x64 the interpreter fails at int64."""
    int32: Any = np.int32(start)
    return pl.Slice(int32, size)


def columns(width: int, parts: int = 1) -> tuple[Columns, ...]:
    """The columns of an array, cut into equal parts."""
    size = width // parts
    tile = tile_width(size)
    in_bounds = None if size == tile else jnp.arange(tile, dtype=jnp.int32) < size
    return tuple(Columns(known_slice(part * size, tile), in_bounds) for part in range(parts))


def outer(rows: Array | None, columns: Array | None, shape: tuple[int, ...]) -> Array | None:
    """The mask of a 2-D tile from masks of its rows and columns; None means all."""
    masks = [rows[:, None]] if rows is not None else []
    masks += [columns[None, :]] if columns is not None else []
    return functools.reduce(jnp.logical_and, [jnp.broadcast_to(m, shape) for m in masks]) if masks else None


def load(ref, mask: Array | None, other: float = 0) -> Array:
    """Loads a ref; masked elements are not read and become ``other``."""
    return plgpu.load(ref) if mask is None else plgpu.load(ref, mask=mask, other=jnp.array(other, ref.dtype))


def at(ref, *index: Any) -> Any:
    """``ref.at[index]``, of slices and numbers, or of vectors too: those of the last axis are columns, others rows.

    The interpreter takes no index of vectors and slices.
    """
    vectors = [isinstance(x, Array) and x.ndim > 0 for x in index]
    if not any(vectors):
        return ref.at[index]
    vectors = [x.start + jnp.arange(_length(x), dtype=jnp.int32) if isinstance(x, pl.Slice) else x for x in index]
    shape = next(x.size for x in vectors[:-1] if jnp.ndim(x)), vectors[-1].size
    places = [jnp.broadcast_to(x[:, None], shape) if jnp.ndim(x) else x for x in vectors[:-1]]
    return ref.at[(*places, jnp.broadcast_to(vectors[-1][None, :], shape))]


def load_operand(
    ref, heads: tuple, rows: pl.Slice | Array, row_mask: Array | None, keys: pl.Slice, key_mask: Array | None
) -> Array:
    """The tile ``[q_block|1, kv_block|1]`` of an operand ``[B|1, 1|K|N, T|1, S|1]``; an axis of size 1 is shared.

    ``heads`` is its index along the first axes, with one head, or one for each of the rows.
    """
    if isinstance(rows, Array) and any(jnp.ndim(x) for x in heads):
        at_rows = rows if ref.shape[-2] > 1 else jnp.zeros_like(rows)
    else:
        at_rows, row_mask = (rows, row_mask) if ref.shape[-2] > 1 else (pl.Slice(0, 1), None)
    at_keys, key_mask = (keys, key_mask) if ref.shape[-1] > 1 else (pl.Slice(0, 1), None)
    mask = outer(row_mask, key_mask, (_length(at_rows), _length(at_keys)))
    return load(at(ref, *heads, at_rows, at_keys), mask)


def store_rows(ref, index: tuple, columns: Columns, row_mask: Array | None, x: Array) -> None:
    """Stores the rows of a tile that are in bounds, in the dtype of the ref; ``index`` is all but the last axis."""
    x = x.astype(ref.dtype)
    plgpu.store(at(ref, *index, columns.at), x, mask=outer(row_mask, columns.in_bounds, x.shape))


def _length(rows: pl.Slice | Array) -> int:
    return int(rows.size)  # which a Slice says may be an array


def loop(first: int, last: int, body: Callable, state: Any) -> Any:
    """``lax.fori_loop`` with static bounds and an int32 index, which would be int64 there under jax_enable_x64."""

    def step(carry: tuple, _: None) -> tuple:
        index, state = carry
        return (index + 1, body(index, state)), None

    (_, state), _ = lax.scan(step, (np.int32(first), state), length=last - first)
    return state
