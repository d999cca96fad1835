"""How a call is split into programs, and the tiles that one program loads.

A program is one (batch row, head of the lists, query block). The query heads that share a list are computed together:
all of them, those of one KV head, or a single one. Their tiles have the axes ``[heads, group]``: KV heads, and the
query heads of each.

A tile that would reach beyond the end of an array is moved back to end with it, so that nothing is padded; what the
tile then shows a second time is masked (keys) or not counted (queries).
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from pallas_attn import pointwise
from pallas_attn import scores as score_algebra
from pallas_attn.block_mask import BlockMask
from pallas_attn.kernels.lse import Lse
from pallas_attn.kernels.rounding import rounded
from pallas_attn.kernels.xla import storage
from pallas_attn.kernels.xla.storage import Stored
from pallas_attn.scores import Scores

Carry = TypeVar("Carry")


# XLA on a CPU unrolls a bare copy of short rows into moves of single numbers, three times slower than a copy that also
# multiplies. So keys are loaded with the scale of the logits, and values halved, which is exact.
HALF = 0.5

# Places along an axis are int32; a plain int is int64 beside them under jax_enable_x64.
ZERO = np.int32(0)


@dataclasses.dataclass(frozen=True)
class Tiling:
    """The static shape of a call."""

    batch: int
    q_len: int
    kv_len: int
    q_heads: int
    kv_heads: int
    q_block: int
    kv_block: int
    list_heads: int
    q_blocks: int
    precision: lax.Precision  # of products; a CPU has but one

    @classmethod
    def of(cls, query: Array, key: Stored, block_mask: BlockMask) -> "Tiling":
        (batch, q_len, q_heads, _), (_, kv_len, kv_heads, _) = query.shape, key.shape
        _, list_heads, q_blocks = block_mask.num_full.shape
        q_block, kv_block = min(block_mask.q_block, q_len), min(block_mask.kv_block, kv_len)
        precision = lax.Precision.HIGHEST if query.dtype == jnp.float32 else lax.Precision.DEFAULT
        return cls(batch, q_len, kv_len, q_heads, kv_heads, q_block, kv_block, list_heads, q_blocks, precision)

    @property
    def heads(self) -> int:
        """KV heads of one program."""
        return self.kv_heads if self.list_heads == 1 else 1

    @property
    def group(self) -> int:
        """Query heads of one KV head in one program."""
        return 1 if self.list_heads == self.q_heads else self.q_heads // self.kv_heads

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
        tiles = tiles.reshape(*self.grid, self.heads, self.group, self.q_block, *rest)
        tiles = jnp.moveaxis(tiles, (2, 5), (1, 2))  # [B, q_blocks, q_block, list_heads, heads, group, ...]
        tail = self.q_len - (self.q_blocks - 1) * self.q_block
        if tail < self.q_block:
            head = tiles[:, :-1].reshape(self.batch, -1, *tiles.shape[3:])
            tiles = jnp.concatenate([head, tiles[:, -1, self.q_block - tail :]], axis=1)
        return tiles.reshape(self.batch, self.q_len, self.q_heads, *rest)

    def join_lse(self, tiles: Lse) -> Lse:
        """``[programs, heads, group, q_block]`` of all programs to ``[B, N, T]``."""
        return jax.tree.map(lambda x: self.join_queries(x).swapaxes(1, 2), tiles)


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


class QueryTile:
    """One program: its coordinates, its lists, and how to load its tiles."""

    def __init__(self, tiling: Tiling, block_mask: BlockMask, scores: Scores, at: tuple[Array, ...]):
        self._tiling, self._block_mask, self._scores = tiling, block_mask, scores
        self._b, self._m, i = at
        self._q_start = jnp.minimum(i * tiling.q_block, tiling.q_len - tiling.q_block)
        self._kv_head = self._m * tiling.kv_heads // tiling.list_heads
        row = (self._b if block_mask.num_full.shape[0] > 1 else ZERO, self._m, i)
        self.num_full, self.num_active = block_mask.num_full[row], block_mask.num_active[row]
        self._indices = block_mask.indices[row]
        self._q_positions = self._tile(block_mask.q_positions[:, None, :, None])  # [q_block, 1]
        # bool [1, 1, q_block]: the query is a token, and no earlier program has it too.
        self.is_token = (self._q_positions >= 0).reshape(1, 1, tiling.q_block)
        self.is_own = self.is_token & (
            self._q_start + jnp.arange(tiling.q_block, dtype=jnp.int32)[None, None] >= i * tiling.q_block
        )

    def queries(self, x: Array) -> Array:
        """The tile ``[heads, group, q_block, ...]`` of ``[B, T, N, ...]``."""
        tiling = self._tiling
        x = x.reshape(*x.shape[:2], tiling.list_heads, tiling.heads, tiling.group, *x.shape[3:])
        at = (self._b, self._q_start, self._m, *(ZERO,) * (x.ndim - 3))
        tile = lax.dynamic_slice(x, at, (1, tiling.q_block, 1, *x.shape[3:]))[0, :, 0]
        return jnp.moveaxis(tile, 0, 2)

    def heads(self, x: Array) -> Array:
        """The entries ``[heads, group]`` of ``[N]``."""
        return x.reshape(self._tiling.list_heads, self._tiling.heads, self._tiling.group)[self._m]

    def walk(self, visit: Callable[[Carry, "KeyBlock"], Carry], carry: Carry) -> Carry:
        """Visits the full blocks of the list, then the partial ones."""
        carry = lax.fori_loop(0, self.num_full, lambda slot, carry: visit(carry, self._full_block(slot)), carry)
        return lax.fori_loop(
            self.num_full, self.num_active, lambda slot, carry: visit(carry, self.partial_block(slot)), carry
        )

    def _full_block(self, slot: Array) -> "KeyBlock":
        start = self._first_key(slot)
        return KeyBlock(start, self._key_positions(start), None, None)

    def partial_block(self, slot: Array, exists: Array | bool = True) -> "KeyBlock":
        """The block in a slot of the list, which may extend beyond S; without valid keys unless it ``exists``."""
        first = self._first_key(slot)
        start = jnp.minimum(first, self._tiling.kv_len - self._tiling.kv_block)
        positions = self._key_positions(start)
        real = (positions[0] >= 0) & (start + jnp.arange(self._tiling.kv_block, dtype=jnp.int32) >= first) & exists
        return KeyBlock(start, positions, real, self._allowed(start, positions, real))

    def _first_key(self, slot: Array) -> Array:
        return self._indices[slot] * self._tiling.kv_block

    def _key_positions(self, start: Array) -> Array:
        return self._tile(self._block_mask.kv_positions[:, :, None, :], start)

    def keys(self, x: Stored, start: Array, factor: float = 1.0) -> Array:
        """The float32 tile ``[heads, kv_block, D]`` of ``[B, S, K, D]``, times a factor."""

        def head(h: Array) -> Array:
            return storage.read(x, self._b, start, h, self._tiling.kv_block, 1)[:, 0]

        return jax.vmap(head)(self._kv_head + jnp.arange(self._tiling.heads, dtype=jnp.int32)) * factor

    def values(self, x: Stored, keys: "KeyBlock") -> Array:
        """Half of the values of a block ``[heads, kv_block, Dv]``, and 0 where there is no key."""
        tile = self.keys(x, keys.start, HALF)
        # An empty slot may hold anything, NaN included, and 0 * NaN is NaN.
        return tile if keys.real is None else jnp.where(keys.real[:, None], tile, 0.0)

    def logits(self, q: Array, key: Stored, keys: "KeyBlock", scale: float) -> Array:
        """``[heads, group, q_block, kv_block]``, scores applied, of float32 queries ``[heads, group * q_block, D]``."""
        products = self.products(q, self.keys(key, keys.start, scale))
        if not self._scores:
            return products
        return rounded(self.score(products, keys.positions, self.score_operands(keys.start)))

    def products(self, q: Array, k: Array) -> Array:
        """``[heads, group, q_block, kv_block]`` of ``[heads, group * q_block, D]`` and ``[heads, kv_block, D]``.

        Both passes compute products here, of the same factors: large ones must round to the same numbers.
        """
        tiling, k = self._tiling, keep_layout(k)
        # XLA on a CPU transposes the right-hand side, so it should be the smaller one.
        if q.shape[1] < k.shape[1]:
            logits = jnp.einsum("hkd,hrd->hkr", k, q, precision=tiling.precision).swapaxes(1, 2)
        else:
            logits = jnp.einsum("hrd,hkd->hrk", q, k, precision=tiling.precision)
        return logits.reshape(tiling.heads, tiling.group, tiling.q_block, tiling.kv_block)

    def add_to_keys(self, x: Array, start: Array, tile: Array) -> Array:
        """Adds a tile ``[heads, kv_block, D]`` to its place in float32 ``[B, S, K, D]``."""
        tile = (self.keys(x, start) + tile).swapaxes(0, 1)[None]
        return lax.dynamic_update_slice(x, tile, (self._b, start, self._kv_head, ZERO))

    def _allowed(self, start: Array, kv_positions: Array, real: Array) -> Array:
        mask = pointwise.map_operands(lambda x: self._tile(x, start), self._block_mask.mask)
        allowed = mask.allowed(self._q_positions, kv_positions) & real[None]
        return jnp.broadcast_to(allowed, (1, 1, self._tiling.q_block, self._tiling.kv_block))

    def score(self, logits: Array, kv_positions: Array, operands: Scores) -> Array:
        """Applies the scores to logits ``[heads, group, q_block, kv_block]``, given their tiles of this block."""
        heads = self.heads(jnp.arange(self._tiling.q_heads, dtype=jnp.int32))[..., None, None]
        positions = self._q_positions[None, None], kv_positions[None, None]
        return score_algebra.apply(operands, logits, *positions, heads, self._b)

    def score_operands(self, start: Array) -> Scores:
        """The scores with every operand ``[B|1, N|1, T|1, S|1]`` replaced by its tile ``[heads|1, group|1, .., ..]``.

        Tiles are float32.
        """
        return pointwise.map_operands(lambda x: self._score_tile(x, start).astype(jnp.float32), self._scores)

    def _score_place(self, x: Array, start: Array) -> tuple[tuple, tuple[int, ...], tuple[int, ...]]:
        """Of an operand: where its tile begins, the shape of the split operand, and that of the tile."""
        tiling = self._tiling
        heads = (1, 1, 1) if x.shape[1] == 1 else (tiling.list_heads, tiling.heads, tiling.group)
        split = (x.shape[0], *heads, *x.shape[2:])
        tile = (1, 1, *heads[1:], min(tiling.q_block, x.shape[2]), min(tiling.kv_block, x.shape[3]))
        at = (self._b, self._m, ZERO, ZERO, self._q_start, start)
        return tuple(place if size > 1 else ZERO for place, size in zip(at, split, strict=True)), split, tile

    def _score_tile(self, x: Array, start: Array) -> Array:
        at, split, tile = self._score_place(x, start)
        return lax.dynamic_slice(x.reshape(split), at, tile)[0, 0]

    def add_to_operand(self, x: Array, start: Array, tile: Array) -> Array:
        """Adds the tile of one operand to its place in ``[B|1, N|1, T|1, S|1]``."""
        at, split, size = self._score_place(x, start)
        whole = x.reshape(split)
        summed = lax.dynamic_slice(whole, at, size) + tile[None, None]
        return lax.dynamic_update_slice(whole, summed, at).reshape(x.shape)

    def _tile(self, x: Array, start: Array | np.int32 = ZERO) -> Array:
        """``[q_block|1, kv_block|1]`` of an operand ``[B|1, M|1, T|1, S|1]``; an axis of size 1 is shared."""
        tiling = self._tiling
        at = (self._b, self._m * x.shape[1] // tiling.list_heads, self._q_start, start)
        at = tuple(place if size > 1 else ZERO for place, size in zip(at, x.shape, strict=True))
        size = (1, 1, min(tiling.q_block, x.shape[2]), min(tiling.kv_block, x.shape[3]))
        return lax.dynamic_slice(x, at, size)[0, 0]
