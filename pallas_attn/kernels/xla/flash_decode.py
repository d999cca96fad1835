"""Decode: with few queries one row of the batch does not keep a machine busy, so several lanes run in parallel.

The live blocks of all rows form one long list. Every lane walks a part of it, one block per step, and the products of
a step are large enough to use all cores. At each new piece of a row a lane starts a new softmax; the pieces of a row
are merged at the end (Flash-Decoding, Dao et al. 2023,
https://crfm.stanford.edu/2023/10/12/flashdecoding.html).
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_attn.kernels.call import Call
from pallas_attn.kernels.xla.key_blocks import KeyBlocks
from pallas_attn.kernels.xla.softmax import SoftmaxState, probabilities
from pallas_attn.kernels.xla.tiles import QueryTile
from pallas_attn.kernels.xla.tiling import Tiling

# KV heads per step, summed over the lanes; and the maximum number of lanes.
_HEADS = 16
_LANES = 4
# Up to this size, the keys of a step are multiplied while they are in the CPU's caches; larger ones are read together
# with the values, which is faster if both come from memory.
_CACHED_BYTES = 2**20


class _Visit(NamedTuple):
    """The work of a lane in one step."""

    row: Array  # int32: batch row and head of the lists, b * M + m
    slot: Array  # int32: of the row's list
    live: Array  # bool; False: the lane is at its end
    fresh: Array  # bool: the block is the first one of its piece
    piece: Array  # int32


@dataclasses.dataclass(frozen=True)
class _Pieces:
    """How rows are split into pieces and pieces assigned to lanes, in the order of the list of all blocks.

    A piece begins with a row and, without a fixed chunk, with a lane. With one it begins after every ``chunk`` blocks
    of its row and belongs to one lane: its bits depend neither on the other rows nor on the lane.
    """

    begin: Array  # int32 [rows]: the first block of a row
    end: Array  # int32 [rows]
    lanes: Array  # int32 [lanes + 1]: the first block of a lane
    first: Array  # int32 [rows]: the first piece of a row
    count: Array  # int32 [rows]
    chunk: int | None

    @staticmethod
    def of(num_active: Array, lanes: int, chunk: int | None) -> "_Pieces":
        """Lanes of equal length, or as near to it as whole chunks allow."""
        end = jnp.cumsum(num_active, dtype=jnp.int32)
        begin = end - num_active
        length = jnp.maximum(-(-end[-1] // lanes), 1)
        cuts = jnp.minimum(jnp.arange(lanes + 1, dtype=jnp.int32) * length, end[-1])
        if chunk is None:
            rows = jnp.arange(num_active.shape[0], dtype=jnp.int32)
            first = begin // length
            count = jnp.where(num_active > 0, (end - 1) // length - first + 1, 0)
            return _Pieces(begin, end, cuts, rows + first, count, None)
        row = _row_of(cuts, end)
        cuts = jnp.minimum(begin[row] - (begin[row] - cuts) // chunk * chunk, end[row])
        count = -(-num_active // chunk)
        return _Pieces(begin, end, cuts, jnp.cumsum(count, dtype=jnp.int32) - count, count, chunk)

    @property
    def steps(self) -> Array:
        """int32: of the longest lane."""
        return jnp.max(self.lanes[1:] - self.lanes[:-1])

    def visit(self, n: Array, spare: int) -> _Visit:
        """The work of every lane in step n; lanes that are not live write to piece ``spare``."""
        at = self.lanes[:-1] + n
        live = at < self.lanes[1:]
        row = _row_of(at, self.end)
        slot = at - self.begin[row]
        if self.chunk is None:
            fresh, piece = (slot == 0) | (n == 0), row + jnp.arange(at.shape[0], dtype=jnp.int32)
        else:
            fresh, piece = slot % self.chunk == 0, self.first[row] + slot // self.chunk
        return _Visit(row, slot, live, fresh, jnp.where(live, piece, spare))


def _row_of(block: Array, end: Array) -> Array:
    """The row of every block; the last row for what lies beyond all blocks."""
    row = jnp.sum(end[None] <= block[:, None], axis=1, dtype=jnp.int32)
    return jnp.minimum(row, end.shape[0] - 1)


@functools.partial(jax.jit, static_argnames=("scale", "return_key_weights"))
def decode(call: Call, *, scale: float, return_key_weights: bool = False) -> tuple[Any, ...]:
    """Same contract as :func:`pallas_attn.kernels.reference.forward`, for a single block of queries.

    With ``block_sizes.chunk`` a row's bits do not depend on the other rows. Key weights come from the same pass, whose
    logits are kept.
    """
    query, key, value, block_mask, scores, sinks, _ = call
    tiling = Tiling.of_call(call)
    tile_shape, value_dim = (tiling.tile_heads, tiling.tile_group, tiling.q_block), value.shape[-1]
    rows, width, chunk = tiling.batch * tiling.list_heads, block_mask.indices.shape[-1], block_mask.block_sizes.chunk
    num_active = jnp.broadcast_to(block_mask.num_active[..., 0], (tiling.batch, tiling.list_heads)).reshape(-1)
    # With a fixed chunk the same number whatever the batch: products of another shape may round otherwise.
    lanes = min(max(1, _HEADS // tiling.tile_heads), _LANES)
    if chunk is None:
        lanes = min(lanes, rows * width)
    cached = 4 * lanes * tiling.tile_heads * tiling.kv_block * key.shape[-1] <= _CACHED_BYTES
    pieces = _Pieces.of(num_active, lanes, chunk)
    spare = rows + lanes - 1 if chunk is None else rows * -(-width // chunk)
    q_of_rows = _queries_of_rows(query, tiling)

    def tile_of(visit: _Visit) -> QueryTile:
        return QueryTile(
            tiling, block_mask, (visit.row // tiling.list_heads, visit.row % tiling.list_heads, jnp.int32(0))
        )

    def attend(state: SoftmaxState, visit: _Visit) -> tuple[SoftmaxState, Array]:
        blocks = KeyBlocks(tile_of(visit), block_mask, scores)
        keys = blocks.partial(visit.slot, visit.live).materialize_mask(not cached)
        logits = keys.mask(blocks.logits(q_of_rows[visit.row], key, keys, scale))
        return state.where(~visit.fresh).attend(logits, blocks.values(value, keys), tiling.precision), logits

    def step(
        n: Array, carry: tuple[SoftmaxState, SoftmaxState, Array | None]
    ) -> tuple[SoftmaxState, SoftmaxState, Array | None]:
        state, parts, kept = carry
        visit = pieces.visit(n, spare)
        state, logits = jax.vmap(attend)(state, visit)
        for lane in range(lanes):
            put = functools.partial(lax.dynamic_update_index_in_dim, index=visit.piece[lane], axis=0)
            parts = jax.tree.map(put, parts, state.at(lane))
        if kept is not None:
            kept = lax.dynamic_update_index_in_dim(kept, logits, n, 0)
        return state, parts, kept

    kept = None
    if return_key_weights:
        steps = -(-rows * width // lanes) + (chunk or 1) - 1
        kept = jnp.zeros((steps, lanes, *tile_shape, tiling.kv_block), jnp.float32)
    state, parts = (SoftmaxState.empty((n, *tile_shape), value_dim) for n in (lanes, spare + 1))
    _, parts, kept = lax.fori_loop(0, pieces.steps, step, (state, parts, kept))

    def merge(n: Array, state: SoftmaxState) -> SoftmaxState:
        has_it = (n < pieces.count)[:, None, None, None]
        return state.merge(parts.at(pieces.first + n).where(has_it))

    state = lax.fori_loop(0, pieces.count.max(), merge, SoftmaxState.empty((rows, *tile_shape), value_dim))
    is_token = jnp.repeat(block_mask.q_positions >= 0, tiling.list_heads, axis=0)[:, None, None]
    sink = None
    if sinks is not None:
        sink = sinks.astype(jnp.float32).reshape(tiling.list_heads, tiling.tile_heads, tiling.tile_group, 1)
        sink = jnp.tile(sink, (tiling.batch, 1, 1, 1))
    out, lse = state.finish(jnp.tile(is_token, (rows // is_token.shape[0], 1, 1, 1)), sink)
    results = tiling.join_queries(out.astype(query.dtype)), tiling.join_lse(lse)
    if kept is None:
        return results

    def weigh(logits: Array, visit: _Visit) -> Array:
        """The weights ``[heads, kv_block]`` of a block's keys, summed over all queries."""
        row = jax.tree.map(lambda x: x[visit.row][..., None], lse)
        seen = visit.live & (row.peak != -jnp.inf) & (logits != -jnp.inf)  # !=, not >, so that NaN propagates
        return jnp.where(seen, probabilities(logits, row), 0.0).sum((1, 2))

    def add(n: Array, sums: Array) -> Array:
        visit = pieces.visit(n, spare)
        weights = jax.vmap(weigh)(lax.dynamic_index_in_dim(kept, n, 0, keepdims=False), visit)
        for lane in range(lanes):
            one = jax.tree.map(lambda x, n=lane: x[n], visit)
            tile = tile_of(one)
            start = KeyBlocks(tile, block_mask, scores).partial(one.slot).start
            sums = tile.add_to_keys(sums, start, weights[lane][..., None])
        return sums

    sums = lax.fori_loop(
        0, pieces.steps, add, jnp.zeros((tiling.batch, tiling.kv_len, tiling.kv_heads, 1), jnp.float32)
    )
    return *results, sums[..., 0].swapaxes(1, 2) / tiling.group


def _queries_of_rows(query: Array, tiling: Tiling) -> Array:
    """``[B, T, N, D]`` to float32 ``[rows, heads, group * T, D]``."""
    q = query.astype(jnp.float32)
    q = q.reshape(tiling.batch, tiling.q_len, tiling.list_heads, tiling.tile_heads, tiling.tile_group, -1)
    return jnp.moveaxis(q, 1, 4).reshape(
        tiling.batch * tiling.list_heads, tiling.tile_heads, tiling.tile_group * tiling.q_len, -1
    )
