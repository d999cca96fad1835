"""How a tile of keys is read from what holds them: an array, a quantised one, or pages of either.

Only the tile is dequantised, so that neither a copy of the keys in float32 nor one of their pages in a row ever exists.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_attn.quantized import QuantizedArray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Paged:
    """Keys in pages: key ``s`` of row ``b`` lies in page ``table[b, s // page]`` at ``s % page``.

    Attributes:
      pool: ``[P, page, K, D]``.
      table: int32 ``[B, S // page]``; what is no page of the pool is read as the nearest one.
    """

    pool: Array | QuantizedArray
    table: Array

    @property
    def shape(self) -> tuple[int, ...]:
        """``(B, S, K, D)``."""
        batch, pages = self.table.shape
        _, page, kv_heads, head_dim = self.pool.shape
        return batch, pages * page, kv_heads, head_dim


Stored = Array | QuantizedArray | Paged


def read(x: Stored, row: Array | int, start: Array, head: Array | int, keys: int, heads: int) -> Array:
    """The float32 tile ``[keys, heads, D]`` of ``[B, S, K, D]`` that begins at ``(row, start, head)``."""
    cut = _cut_pages if isinstance(x, Paged) else _cut
    tile = cut(x, row, start, head, keys, heads)
    return tile.dequantize() if isinstance(tile, QuantizedArray) else tile.astype(jnp.float32)


def _cut(x, row, start, head, keys: int, heads: int):
    def tile(x: Array) -> Array:
        at = (row, start, head, *(0,) * (x.ndim - 3))
        return lax.dynamic_slice(x, at, (1, keys, heads, *x.shape[3:]))[0]

    return jax.tree.map(tile, x)


def _cut_pages(x: Paged, row, start, head, keys: int, heads: int):
    pages, page = x.pool.shape[:2]
    # Tiles begin at a multiple of it, also one that is moved back to end with the keys: a piece lies in one page.
    piece = math.gcd(page, keys)
    pieces = []
    for first in range(0, keys, piece):
        index = jnp.clip(x.table[row, (start + first) // page], 0, pages - 1)
        pieces.append(_cut(x.pool, index, (start + first) % page, head, piece, heads))
    return jax.tree.map(lambda *tiles: jnp.concatenate(tiles), *pieces)
