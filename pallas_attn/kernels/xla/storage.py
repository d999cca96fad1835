"""How a tile of keys is read from what holds them: an array, a quantized one, or pages of either.

Only the tile is dequantized, so that neither a copy of the keys in float32 nor one of their pages in a row ever exists.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from pallas_attn import bits
from pallas_attn.quantized import KVArray, QuantizedArray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class PagedArray:
    """KeyBlock in pages: key ``s`` of row ``b`` lies in page ``table[b, s // page]`` at ``s % page``.

    Attributes:
      pool: ``[P, page, K, D]``.
      table: int32 ``[B, S // page]``; what is no page of the pool is read as the nearest one.
    """

    pool: KVArray
    table: Array

    @property
    def shape(self) -> tuple[int, ...]:
        """``(B, S, K, D)``."""
        batch, pages = self.table.shape
        _, page, kv_heads, head_dim = self.pool.shape
        return batch, pages * page, kv_heads, head_dim


Stored = KVArray | PagedArray


def read(x: Stored, row: Array | int, start: Array, head: Array | int, keys: int, heads: int) -> Array:
    """The float32 tile ``[keys, heads, D]`` of ``[B, S, K, D]`` that begins at ``(row, start, head)``."""
    if isinstance(x, PagedArray):
        tile = _cut_pages(x, row, start, head, keys, heads)
    else:
        tile = _cut(x, row, start, head, keys, heads)
    return tile.dequantize() if isinstance(tile, QuantizedArray) else tile.astype(jnp.float32)


def _cut(x, row, start, head, keys: int, heads: int):
    def cut(x: Array) -> Array:
        at = (row, start, head, *(np.int32(0),) * (x.ndim - 3))
        tile = lax.dynamic_slice(bits.integers(x), at, (1, keys, heads, *x.shape[3:]))[0]
        return lax.bitcast_convert_type(tile, x.dtype)

    return jax.tree.map(cut, x)


def _cut_pages(x: PagedArray, row, start, head, keys: int, heads: int):
    pages, page = x.pool.shape[:2]
    # Tiles begin at a multiple of it, also one that is moved back to end with the keys: a piece lies in one page.
    piece = math.gcd(page, keys)
    places = start + jnp.arange(0, keys, piece, dtype=jnp.int32)
    indices = jnp.clip(x.table[row, places // page], 0, pages - 1)
    pieces = jax.vmap(lambda index, first: _cut(x.pool, index, first, head, piece, heads))(indices, places % page)
    return jax.tree.map(lambda tiles: tiles.reshape(keys, *tiles.shape[2:]), pieces)
