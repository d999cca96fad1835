"""Decode: which queries share a tile, so that each key is read once for all of them."""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl

from pallas_attn.block_mask import BlockMask
from pallas_attn.kernels.triton import tiles
from pallas_attn.kernels.triton.specs import Tiling

_MOST_ROWS = {2: 64, 4: 32}  # of a tile, by bytes per element: what more queries there are make further tiles


class Rows(NamedTuple):
    """The rows of a tile."""

    at: pl.Slice  # their places among the queries of an owner
    in_bounds: Array  # bool [tile]
    t: Array  # int32 [tile]: each one's query
    n: Array  # int32 [tile]: and its head


@dataclasses.dataclass(frozen=True)
class Packing:
    """How rows of lists become rows of tiles.

    The queries of an *owner* share tiles. Owners are KV heads, or query heads where these have lists of their own.
    """

    list_rows: int  # batch rows of the lists, B or 1
    list_heads: int  # M
    heads: int  # owners that share a row of the lists: all of them, or one
    group: int  # query heads of an owner
    queries: int  # rows that their T queries make
    tile: int  # rows of a tile: a power of two, and at least 16, the smallest operand of a matrix instruction

    @classmethod
    def of(cls, tiling: Tiling, block_mask: BlockMask) -> "Packing":
        list_rows, list_heads, _ = block_mask.num_active.shape
        heads = tiling.kv_heads if list_heads == 1 else 1
        group = tiling.q_heads // (list_heads * heads)
        queries = tiling.q_len * group
        tile = min(tiles.tile_width(queries), _MOST_ROWS[tiling.dtype.itemsize])
        return cls(list_rows, list_heads, heads, group, queries, tile)

    @property
    def tiles(self) -> int:
        """Tiles of an owner in one batch row."""
        return -(-self.queries // self.tile)

    @property
    def owners(self) -> int:
        """How many there are."""
        return self.list_heads * self.heads

    def copies(self, tiling: Tiling) -> int:
        """Batch rows that share a row of the lists."""
        return tiling.batch // self.list_rows

    def locate(self, row: Array, head: Any, copy: Any) -> tuple[Array, Array, tuple]:
        """The batch row and the owner that a program of the schedule works for, and its row of the lists."""
        m = lax.rem(row, np.int32(self.list_heads))
        b = row // self.list_heads + copy
        list_row = b if self.list_rows > 1 else np.int32(0), m, np.int32(0)
        return b, m * self.heads + head, list_row

    def rows(self, owner: Array, tile: Any) -> Rows:
        """The rows of an owner's tile."""
        places = tile * self.tile + jnp.arange(self.tile, dtype=jnp.int32)
        t, n = places // self.group, owner * self.group + lax.rem(places, jnp.full_like(places, self.group))
        return Rows(pl.Slice(tile * self.tile, self.tile), places < self.queries, t, n)
