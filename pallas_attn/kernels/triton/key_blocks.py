"""Loads the KV blocks that a tile of queries visits."""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from pallas_attn import pointwise
from pallas_attn import scores as score_algebra
from pallas_attn.kernels.triton import tiles
from pallas_attn.kernels.triton.stored import KVBlockRef, StoredKeys, Tile
from pallas_attn.scores import Scores


class KeyBlock(NamedTuple):
    """A block of keys and values, with its mask."""

    k: Tile
    v: Tile
    keys: pl.Slice  # their indices in S
    in_bounds: Array | None  # bool [kv_block]; None: all of them
    positions: Any  # int32 [kv_block]; None if nothing uses them
    allowed: Array | None  # bool [rows, kv_block]; None: every query sees every key


@dataclasses.dataclass(frozen=True)
class KeyBlocks:
    """Loads blocks of keys for a tile of queries.

    Attributes:
      rows: the indices of the tile's queries in T: a slice, or int32 ``[rows]``.
      row_in_bounds: bool ``[rows]``; None: all of them.
      q_positions: int32 ``[rows]``.
    """

    stored: StoredKeys
    rows: pl.Slice | Array
    row_in_bounds: Array | None
    q_positions: Array

    def full(self, at: KVBlockRef) -> KeyBlock:
        """A full block: all keys are valid and visible to every query."""
        stored, refs = self.stored, self.stored.refs
        positions = stored.positions(at.block, None) if refs.scores else None
        k, v = stored.tile(refs.key, at, None), stored.tile(refs.value, at, None)
        return KeyBlock(k, v, stored.slots(at.block), None, positions, None)

    def partial(self, at: KVBlockRef) -> KeyBlock:
        """A partial block. Only valid keys are read: an empty slot may hold NaN, and 0 * NaN is NaN."""
        stored, refs = self.stored, self.stored.refs
        keys, in_bounds = stored.slots(at.block), stored.in_bounds(at.block)
        positions = stored.positions(at.block, in_bounds)
        allowed = self.allowed(keys, in_bounds, positions)
        k, v = stored.tile(refs.key, at, positions >= 0), stored.tile(refs.value, at, positions >= 0)
        return KeyBlock(k, v, keys, in_bounds, positions, allowed)

    def logits(self, products: Array, block: KeyBlock) -> Array:
        """Logits from products ``q k'``, in units of :attr:`Tiling.unit`; -inf where a key is not seen."""
        tiling, coords = self.stored.tiling, self.stored.coords
        logits = tiling.logits(products)
        if self.stored.refs.scores:
            heads = coords.n if jnp.ndim(coords.n) == 0 else coords.n[:, None]
            where = self.q_positions[:, None], block.positions[None, :], heads, coords.b
            logits = score_algebra.apply(self.scores(block.keys, block.in_bounds), logits, *where)
        if block.allowed is not None:
            logits = jnp.where(block.allowed, logits, -jnp.inf)
        return tiling.rounded(logits)

    def scores(self, keys: pl.Slice, in_bounds: Array | None) -> Scores:
        """The scores, with the tiles of their operands for a block."""
        return pointwise.map_operands(lambda ref: self._operand(ref, keys, in_bounds), self.stored.refs.scores)

    def allowed(self, keys: pl.Slice, in_bounds: Array, positions: Array) -> Array:
        """The mask of a block, bool ``[rows, kv_block]``."""
        mask = pointwise.map_operands(lambda ref: self._operand(ref, keys, in_bounds), self.stored.refs.mask)
        allowed = mask.allowed(self.q_positions[:, None], positions[None, :]) & (positions >= 0)[None, :]
        return jnp.broadcast_to(allowed, (self.q_positions.size, positions.size))

    def _operand(self, ref: Any, keys: pl.Slice, in_bounds: Array | None) -> Array:
        heads = self.stored.coords.at(ref, self.stored.tiling)
        return tiles.load_operand(ref, heads, self.rows, self.row_in_bounds, keys, in_bounds)
