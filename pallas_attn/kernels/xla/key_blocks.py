"""The KV blocks that a tile of queries visits: the walk along its list, and their masks and logits."""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax.numpy as jnp
from jax import Array, lax

from pallas_attn import pointwise
from pallas_attn import scores as score_algebra
from pallas_attn.block_mask import BlockMask
from pallas_attn.kernels.rounding import rounded
from pallas_attn.kernels.xla.storage import Stored
from pallas_attn.kernels.xla.tiles import ZERO, QueryTile
from pallas_attn.scores import Scores

Carry = TypeVar("Carry")

# XLA on a CPU unrolls a bare copy of short rows into moves of single numbers, three times slower than a copy that also
# multiplies. So keys are loaded with the scale of the logits, and values halved, which is exact.
HALF = 0.5


def keep_layout(keys: Array) -> Array:
    """Key tiles ``[..., kv_block, D]`` that XLA on a CPU must not copy to ``[..., D, kv_block]`` for a product over D.

    That copy takes longer than the product.
    """
    return lax.optimization_barrier(keys)


class KeyBlock(NamedTuple):
    """One KV block of a program.

    Attributes:
      start: where its tile begins.
      positions: int32 ``[1, kv_block]``.
      real: bool ``[kv_block]``: the valid keys that belong to the block; None: all.
      allowed: bool ``[1, 1, q_block, kv_block]``: the mask; None: every query sees every key.
    """

    start: Array
    positions: Array
    real: Array | None
    allowed: Array | None

    def materialize_mask(self, before_keys: bool) -> "KeyBlock":
        """The same with the mask in memory: otherwise XLA on a CPU reevaluates it for every column of the values.

        Args:
          before_keys: compute it before keys are read. XLA then reads values next to keys, else after their product.
        """
        if before_keys:
            return KeyBlock(*lax.optimization_barrier(tuple(self)))
        real, allowed = lax.optimization_barrier((self.real, self.allowed))
        return self._replace(real=real, allowed=allowed)

    def mask(self, logits: Array) -> Array:
        """Logits ``[heads, group, q_block, kv_block]``, -inf for masked pairs."""
        return logits if self.allowed is None else jnp.where(self.allowed, logits, -jnp.inf)


class KeyBlocks:
    """The list of a tile of queries, with what turns a block of keys into logits and values."""

    def __init__(self, tile: QueryTile, block_mask: BlockMask, scores: Scores):
        self._tile, self._block_mask, self._scores = tile, block_mask, scores
        row = (tile.b if block_mask.num_full.shape[0] > 1 else ZERO, tile.m, tile.i)
        self._num_full, self._num_active = block_mask.num_full[row], block_mask.num_active[row]
        self._indices = block_mask.indices[row]

    def walk(self, visit: Callable[[Carry, KeyBlock], Carry], carry: Carry) -> Carry:
        """Visits the full blocks of the list, then the partial ones."""
        carry = lax.fori_loop(0, self._num_full, lambda slot, carry: visit(carry, self.full(slot)), carry)
        return lax.fori_loop(
            self._num_full, self._num_active, lambda slot, carry: visit(carry, self.partial(slot)), carry
        )

    def full(self, slot: Array) -> KeyBlock:
        """The block in a slot of the list, all of whose keys are valid and visible to every query."""
        start = self._first_key(slot)
        return KeyBlock(start, self._key_positions(start), None, None)

    def partial(self, slot: Array, exists: Array | bool = True) -> KeyBlock:
        """The block in a slot of the list, which may extend beyond S; without valid keys unless it ``exists``."""
        tiling, first = self._tile.tiling, self._first_key(slot)
        start = jnp.minimum(first, tiling.kv_len - tiling.kv_block)
        positions = self._key_positions(start)
        real = (positions[0] >= 0) & (start + jnp.arange(tiling.kv_block, dtype=jnp.int32) >= first) & exists
        return KeyBlock(start, positions, real, self._allowed(start, positions, real))

    def _first_key(self, slot: Array) -> Array:
        return self._indices[slot] * self._tile.tiling.kv_block

    def _key_positions(self, start: Array) -> Array:
        return self._tile.operand(self._block_mask.kv_positions[:, :, None, :], start)

    def _allowed(self, start: Array, kv_positions: Array, real: Array) -> Array:
        tiling = self._tile.tiling
        mask = pointwise.map_operands(lambda x: self._tile.operand(x, start), self._block_mask.mask)
        allowed = mask.allowed(self._tile.q_positions, kv_positions) & real[None]
        return jnp.broadcast_to(allowed, (1, 1, tiling.q_block, tiling.kv_block))

    def values(self, x: Stored, keys: KeyBlock) -> Array:
        """Half of the values of a block ``[heads, kv_block, Dv]``, and 0 where there is no key."""
        tile = self._tile.keys(x, keys.start, HALF)
        # An empty slot may hold anything, NaN included, and 0 * NaN is NaN.
        return tile if keys.real is None else jnp.where(keys.real[:, None], tile, 0.0)

    def logits(self, q: Array, key: Stored, keys: KeyBlock, scale: float) -> Array:
        """``[heads, group, q_block, kv_block]``, scores applied, of float32 queries ``[heads, group * q_block, D]``."""
        products = self.products(q, self._tile.keys(key, keys.start, scale))
        if not self._scores:
            return products
        return rounded(self.score(products, keys.positions, self.score_operands(keys.start)))

    def products(self, q: Array, k: Array) -> Array:
        """``[heads, group, q_block, kv_block]`` of ``[heads, group * q_block, D]`` and ``[heads, kv_block, D]``.

        Both passes compute products here, of the same factors: large ones must round to the same numbers.
        """
        tiling, k = self._tile.tiling, keep_layout(k)
        # XLA on a CPU transposes the right-hand side, so it should be the smaller one.
        if q.shape[1] < k.shape[1]:
            logits = jnp.einsum("hkd,hrd->hkr", k, q, precision=tiling.precision).swapaxes(1, 2)
        else:
            logits = jnp.einsum("hrd,hkd->hrk", q, k, precision=tiling.precision)
        return logits.reshape(tiling.tile_heads, tiling.tile_group, tiling.q_block, tiling.kv_block)

    def score(self, logits: Array, kv_positions: Array, operands: Scores) -> Array:
        """Applies the scores to logits ``[heads, group, q_block, kv_block]``, given their tiles of this block."""
        tile = self._tile
        heads = tile.heads(jnp.arange(tile.tiling.q_heads, dtype=jnp.int32))[..., None, None]
        positions = tile.q_positions[None, None], kv_positions[None, None]
        return score_algebra.apply(operands, logits, *positions, heads, tile.b)

    def score_operands(self, start: Array) -> Scores:
        """The scores with every operand ``[B|1, N|1, T|1, S|1]`` replaced by its tile, float32."""
        return pointwise.map_operands(lambda x: self._tile.score_operand(x, start).astype(jnp.float32), self._scores)
