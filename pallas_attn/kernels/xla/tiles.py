"""The tiles of one program: its part of every array.

A tile that would reach beyond the end of an array is moved back to end with it, so that nothing is padded; what the
tile then shows a second time is masked (keys) or not counted (queries).
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from pallas_attn.block_mask import BlockMask
from pallas_attn.kernels.xla import storage
from pallas_attn.kernels.xla.storage import Stored
from pallas_attn.kernels.xla.tiling import Tiling

# Places along an axis are int32; a plain int is int64 beside them under jax_enable_x64.
ZERO = np.int32(0)


class QueryTile:
    """One program: its place in every array, and the tiles there."""

    def __init__(self, tiling: Tiling, block_mask: BlockMask, at: tuple[Array, ...]):
        self.tiling = tiling
        self.b, self.m, self.i = at
        self._q_start = jnp.minimum(self.i * tiling.q_block, tiling.q_len - tiling.q_block)
        self._kv_head = self.m * tiling.kv_heads // tiling.list_heads
        self.q_positions = self.operand(block_mask.q_positions[:, None, :, None])  # [q_block, 1]
        # bool [1, 1, q_block]: the query is a token, and no earlier program has it too.
        self.is_token = (self.q_positions >= 0).reshape(1, 1, tiling.q_block)
        self.is_own = self.is_token & (
            self._q_start + jnp.arange(tiling.q_block, dtype=jnp.int32)[None, None] >= self.i * tiling.q_block
        )

    def queries(self, x: Array) -> Array:
        """The tile ``[heads, group, q_block, ...]`` of ``[B, T, N, ...]``."""
        tiling = self.tiling
        x = x.reshape(*x.shape[:2], tiling.list_heads, tiling.tile_heads, tiling.tile_group, *x.shape[3:])
        at = (self.b, self._q_start, self.m, *(ZERO,) * (x.ndim - 3))
        tile = lax.dynamic_slice(x, at, (1, tiling.q_block, 1, *x.shape[3:]))[0, :, 0]
        return jnp.moveaxis(tile, 0, 2)

    def heads(self, x: Array) -> Array:
        """The entries ``[heads, group]`` of ``[N]``."""
        return x.reshape(self.tiling.list_heads, self.tiling.tile_heads, self.tiling.tile_group)[self.m]

    def keys(self, x: Stored, start: Array, factor: float = 1.0) -> Array:
        """The float32 tile ``[heads, kv_block, D]`` of ``[B, S, K, D]``, times a factor."""

        def head(h: Array) -> Array:
            return storage.read(x, self.b, start, h, self.tiling.kv_block, 1)[:, 0]

        return jax.vmap(head)(self._kv_head + jnp.arange(self.tiling.tile_heads, dtype=jnp.int32)) * factor

    def add_to_keys(self, x: Array, start: Array, tile: Array) -> Array:
        """Adds a tile ``[heads, kv_block, D]`` to its place in float32 ``[B, S, K, D]``."""
        tile = (self.keys(x, start) + tile).swapaxes(0, 1)[None]
        return lax.dynamic_update_slice(x, tile, (self.b, start, self._kv_head, ZERO))

    def operand(self, x: Array, start: Array | np.int32 = ZERO) -> Array:
        """The tile ``[q_block|1, kv_block|1]`` of positions or of a mask's operand ``[B|1, M|1, T|1, S|1]``.

        An axis of size 1 is shared.
        """
        tiling = self.tiling
        at = (self.b, self.m * x.shape[1] // tiling.list_heads, self._q_start, start)
        at = tuple(place if size > 1 else ZERO for place, size in zip(at, x.shape, strict=True))
        size = (1, 1, min(tiling.q_block, x.shape[2]), min(tiling.kv_block, x.shape[3]))
        return lax.dynamic_slice(x, at, size)[0, 0]

    def score_operand(self, x: Array, start: Array) -> Array:
        """The tile ``[heads|1, group|1, q_block|1, kv_block|1]`` of a score's operand ``[B|1, N|1, T|1, S|1]``."""
        at, split, tile = self._score_place(x, start)
        return lax.dynamic_slice(x.reshape(split), at, tile)[0, 0]

    def add_to_score_operand(self, x: Array, start: Array, tile: Array) -> Array:
        """Adds the tile of one operand to its place in ``[B|1, N|1, T|1, S|1]``."""
        at, split, size = self._score_place(x, start)
        whole = x.reshape(split)
        summed = lax.dynamic_slice(whole, at, size) + tile[None, None]
        return lax.dynamic_update_slice(whole, summed, at).reshape(x.shape)

    def _score_place(self, x: Array, start: Array) -> tuple[tuple, tuple[int, ...], tuple[int, ...]]:
        """Of an operand: where its tile begins, the shape of the split operand, and that of the tile."""
        tiling = self.tiling
        heads = (1, 1, 1) if x.shape[1] == 1 else (tiling.list_heads, tiling.tile_heads, tiling.tile_group)
        split = (x.shape[0], *heads, *x.shape[2:])
        tile = (1, 1, *heads[1:], min(tiling.q_block, x.shape[2]), min(tiling.kv_block, x.shape[3]))
        at = (self.b, self.m, ZERO, ZERO, self._q_start, start)
        return tuple(place if size > 1 else ZERO for place, size in zip(at, split, strict=True)), split, tile
