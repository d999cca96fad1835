"""Keys and values in their storage format, and how a program loads a tile of them.

Nothing is dequantized in memory. 8-bit numbers are multiplied as they are, and their scales multiply the result: the
scales of keys multiply columns of the logits, those of values the weights. 4-bit numbers have a scale per group of
columns, which multiplies the tile. Pages are looked up together with the index of their block, one block ahead.
"""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_attn.kernels.triton import tiles
from pallas_attn.kernels.triton.coords import ProgramCoords
from pallas_attn.kernels.triton.specs import KernelArgs, Tiling
from pallas_attn.kernels.triton.tiles import Columns
from pallas_attn.quantized import KVArray, QuantizedArray

_TINY = float(jnp.finfo(jnp.float32).tiny)
_WIDE = 128  # columns


class Tile(NamedTuple):
    """Keys or values of a block: their columns, in one part or in two halves."""

    parts: tuple[Array, ...]  # [kv_block, D], or two of [kv_block, D / 2]; see StoredKeys.columns
    scale: Array | None = None  # float32 [kv_block]

    def products(self, tiling: Tiling, q: tuple[Array, ...]) -> Array:
        """Float32 ``q k'``, of queries whose columns are cut like those of the keys."""
        pairs = zip(q, self.parts, strict=True)
        first, *rest = [tiling.dot(x, part.astype(tiling.dtype), (1, 1)) for x, part in pairs]
        products = sum(rest, first)
        return products if self.scale is None else products * self.scale[None, :]

    def sums(self, tiling: Tiling, weights: Array) -> tuple[Array, ...]:
        """Float32 ``weights v``."""
        if self.scale is None:
            return tuple(tiling.dot(weights, part, (1, 0)) for part in self.parts)
        # A scale may underflow in float16, so the largest of the block is factored out.
        unit = jnp.maximum(jnp.max(self.scale), _TINY) if tiling.dtype == jnp.float16 else None
        weights = weights * (self.scale if unit is None else self.scale / unit)[None, :]
        sums = tuple(tiling.dot(weights, part.astype(tiling.dtype), (1, 0)) for part in self.parts)
        return sums if unit is None else tuple(x * unit for x in sums)


class KVBlockRef(NamedTuple):
    """A block of keys and the pages that hold it."""

    block: Array
    page: Array | None  # one page for all keys, or one for each


@dataclasses.dataclass(frozen=True)
class StoredKeys:
    """The keys and values of one head of one batch row."""

    refs: KernelArgs
    tiling: Tiling
    coords: ProgramCoords

    def columns(self, stored: KVArray) -> tuple[Columns, ...]:
        """The columns of the keys (or values), split as in their tiles."""
        width = self._width(stored)
        if not isinstance(stored, QuantizedArray):
            return tiles.columns(width)
        # 8-bit numbers become float32 before they are multiplied: a wide row would leave too few registers.
        is_wide = self.tiling.dtype == jnp.float32 and width > _WIDE and width % 2 == 0
        return tiles.columns(width, 2 if stored.kind == "int4" or is_wide else 1)

    def locate(self, block: Array) -> KVBlockRef:
        """Looks up the pages of a block."""
        if self.refs.page_table is None:
            return KVBlockRef(block, None)
        pages, page = self._pool
        row = (self.coords.row(self.refs.page_table),)
        if page % self.tiling.kv_block == 0:
            found = self.refs.page_table[(*row, block // (page // self.tiling.kv_block))]
        else:
            keys = block * self.tiling.kv_block + jnp.arange(self.tiling.kv_block, dtype=jnp.int32)
            # Not //, which checks the sign of every key.
            index = jnp.minimum(lax.div(keys, jnp.full_like(keys, page)), self.refs.page_table.shape[-1] - 1)
            found = plgpu.load(self.refs.page_table.at[(*row, index)])
        return KVBlockRef(block, jnp.clip(found, 0, pages - 1))

    def slots(self, block: Array) -> pl.Slice:
        """The indices of its keys in S."""
        return pl.Slice(block * self.tiling.kv_block, self.tiling.kv_block)

    def in_bounds(self, block: Array) -> Array:
        """Which of its keys are below S, bool ``[kv_block]``."""
        return block * self.tiling.kv_block + jnp.arange(self.tiling.kv_block, dtype=jnp.int32) < self.tiling.kv_len

    def positions(self, block: Array, in_bounds: Array | None) -> Array:
        """int32 ``[kv_block]``, -1 where there is no key."""
        ref = self.refs.kv_positions
        return tiles.load(ref.at[(*self.coords.at(ref, self.tiling), self.slots(block))], in_bounds, -1)

    def tile(self, stored: KVArray, at: KVBlockRef, valid: Array | None) -> Tile:
        """The keys (or values) of a block; those that are not ``valid`` are not read, and count as 0."""
        index = self._at(at)
        if not isinstance(stored, QuantizedArray):
            return Tile(tuple(self._load(stored, index, part, valid) for part in self.columns(stored)))
        if stored.kind != "int4":
            parts = tuple(self._load(stored.values, index, part, valid) for part in self.columns(stored))
            return Tile(parts, tiles.load(stored.scales.at[index], valid))
        # Two's complement of four bits.
        (two_columns,) = tiles.columns(self._width(stored) // 2)
        high = self._load(stored.values, index, two_columns, valid).astype(jnp.int8)
        halves = (lax.shift_right_arithmetic(x, jnp.full_like(x, 4)) for x in (high << 4, high))
        scaled = (self._scaled(stored, x, index, valid, part) for part, x in enumerate(halves))
        return Tile(tuple(scaled))

    def _load(self, ref: Any, index: tuple, part: Columns, valid: Array | None) -> Array:
        mask = tiles.outer(valid, part.in_bounds, (self.tiling.kv_block, part.tile))
        return tiles.load(tiles.at(ref, *index, part.at), mask)

    def _scaled(self, stored: QuantizedArray, values: Array, index: tuple, valid: Array | None, half: int) -> Array:
        """Half of an int4 tile times its scales, in the dtype of the products."""
        (rows, columns), groups = values.shape, stored.scales.shape[-1]
        group = self._width(stored) // 2 // groups
        at = (*index, np.int32(half))
        if groups * group == columns:
            scale = tiles.load(
                tiles.at(stored.scales, *at, pl.Slice(0, groups)), tiles.outer(valid, None, (rows, groups))
            )
            scale = jnp.broadcast_to(scale[:, :, None], (rows, groups, group)).reshape(rows, columns)
        else:  # groups are no power of two, or a tile is wider than its columns
            each = jnp.minimum(jnp.arange(columns, dtype=jnp.int32) // group, groups - 1)
            scale = tiles.load(tiles.at(stored.scales, *at, each), tiles.outer(valid, None, (rows, columns)))
        return (values.astype(jnp.float32) * scale).astype(self.tiling.dtype)

    @property
    def _pool(self) -> tuple[int, int]:
        """How many pages there are, and keys per page."""
        key = self.refs.key
        pages, page, *_ = (key.values if isinstance(key, QuantizedArray) else key).shape
        return pages, page

    def _at(self, at: KVBlockRef) -> tuple:
        """The index of the block's keys along all axes but the last."""
        keys = self.slots(at.block)
        if at.page is None:
            return (self.coords.b, keys, self.coords.h)
        _, page = self._pool
        if at.page.ndim == 0:
            offset = lax.rem(keys.start, np.int32(page))
            return (at.page, pl.Slice(offset, self.tiling.kv_block), self.coords.h)
        offsets = keys.start + jnp.arange(self.tiling.kv_block, dtype=jnp.int32)
        return (at.page, lax.rem(offsets, jnp.full_like(offsets, page)), self.coords.h)

    def _width(self, stored: KVArray) -> int:
        """Columns of the keys (or values); a ref may be wider."""
        return self.tiling.head_dim if stored is self.refs.key else self.tiling.value_dim
