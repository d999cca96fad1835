"""How a call is split into programs, and how their tiles are joined again.

A program is one (batch row, head of the lists, query block). The query heads that share a list are computed together:
all of them, those of one KV head, or a single one. Their tiles have the axes ``[heads, group]``: KV heads, and the
query heads of each.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_attn.kernels.call import Call, CallShape
from pallas_attn.kernels.lse import Lse


@dataclasses.dataclass(frozen=True)
class Tiling(CallShape):
    """The static facts of a call: its shape, its blocks and the precision of its products."""

    q_block: int
    kv_block: int
    list_heads: int
    q_blocks: int
    precision: lax.Precision  # of products; a CPU has but one

    @staticmethod
    def of_call(call: Call) -> "Tiling":
        """Of a call whose keys are laid out ``[B, S, K, D]``, however they are stored."""
        block_mask = call.block_mask
        shape = CallShape.of(call.query, call.key, call.value)
        _, list_heads, q_blocks = block_mask.num_full.shape
        return Tiling(
            **vars(shape),
            q_block=min(block_mask.q_block, shape.q_len),
            kv_block=min(block_mask.kv_block, shape.kv_len),
            list_heads=list_heads,
            q_blocks=q_blocks,
            precision=lax.Precision.HIGHEST if call.query.dtype == jnp.float32 else lax.Precision.DEFAULT,
        )

    @property
    def tile_heads(self) -> int:
        """KV heads of one program."""
        return self.kv_heads if self.list_heads == 1 else 1

    @property
    def tile_group(self) -> int:
        """Query heads of one KV head in one program."""
        return 1 if self.list_heads == self.q_heads else self.group

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.batch, self.list_heads, self.q_blocks

    def programs(self) -> tuple[Array, ...]:
        """The coordinates ``(b, m, i)`` of all programs."""
        count = self.batch * self.list_heads * self.q_blocks
        return jnp.unravel_index(jnp.arange(count, dtype=jnp.int32), self.grid)

    def join_queries(self, tiles: Array) -> Array:
        """``[programs, heads, group, q_block, ...]`` of all programs to ``[B, T, N, ...]``."""
        rest = tiles.shape[4:]
        tiles = tiles.reshape(*self.grid, self.tile_heads, self.tile_group, self.q_block, *rest)
        tiles = jnp.moveaxis(tiles, (2, 5), (1, 2))  # [B, q_blocks, q_block, list_heads, heads, group, ...]
        tail = self.q_len - (self.q_blocks - 1) * self.q_block
        if tail < self.q_block:
            head = tiles[:, :-1].reshape(self.batch, -1, *tiles.shape[3:])
            tiles = jnp.concatenate([head, tiles[:, -1, self.q_block - tail :]], axis=1)
        return tiles.reshape(self.batch, self.q_len, self.q_heads, *rest)

    def join_lse(self, tiles: Lse) -> Lse:
        """``[programs, heads, group, q_block]`` of all programs to ``[B, N, T]``."""
        return jax.tree.map(lambda x: self.join_queries(x).swapaxes(1, 2), tiles)
