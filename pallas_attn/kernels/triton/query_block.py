"""Loads what belongs to a block of queries."""

import dataclasses

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from pallas_attn.kernels.triton import tiles
from pallas_attn.kernels.triton.coords import ProgramCoords
from pallas_attn.kernels.triton.specs import KernelArgs, Tiling
from pallas_attn.kernels.triton.tiles import Columns


@dataclasses.dataclass(frozen=True)
class QueryBlock:
    """A block of queries of one head.

    Kernels call each load where its result is needed, because registers are scarce while products are computed.

    Attributes:
      at: its queries, as indices in T.
      in_bounds: bool ``[q_block]``; None: all of them.
    """

    refs: KernelArgs
    tiling: Tiling
    coords: ProgramCoords
    at: pl.Slice
    in_bounds: Array | None

    @classmethod
    def full(cls, refs: KernelArgs, tiling: Tiling, coords: ProgramCoords, block: Array) -> "QueryBlock":
        """A block that lies within T."""
        return cls(refs, tiling, coords, pl.Slice(block * tiling.q_block, tiling.q_block), None)

    @classmethod
    def ragged(cls, refs: KernelArgs, tiling: Tiling, coords: ProgramCoords, block: Array) -> "QueryBlock":
        """A block that may reach beyond T."""
        start = block * tiling.q_block
        in_bounds = start + jnp.arange(tiling.q_block, dtype=jnp.int32) < tiling.q_len
        return cls(refs, tiling, coords, pl.Slice(start, tiling.q_block), in_bounds)

    def positions(self) -> Array:
        """int32 ``[q_block]``, -1 where there is no query."""
        ref = self.refs.q_positions
        return tiles.load(ref.at[self.coords.row(ref), self.at], self.in_bounds, -1)

    def tile(self, ref, columns: Columns, valid: Array | None) -> Array:
        """``[q_block, columns]`` of ``[B, T, N, width]``; queries that are not ``valid`` count as 0."""
        mask = tiles.outer(valid, columns.in_bounds, (self.tiling.q_block, columns.tile))
        return tiles.load(ref.at[self.coords.b, self.at, self.coords.n, columns.at], mask)

    def vector(self, ref, valid: Array | None, other: float = 0) -> Array:
        """``[q_block]`` of ``[B, N, T]``; ``other`` for queries that are not ``valid``."""
        return tiles.load(ref.at[self.coords.b, self.coords.n, self.at], valid, other)
