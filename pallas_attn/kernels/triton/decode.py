"""Decode in Pallas, through the Triton lowering: few queries against many keys, which are shared out.

A row's list of KV blocks is cut into stretches (:mod:`pallas_attn.schedule`), a program visits one of them, and a
second kernel merges what they found (Flash-Decoding, Dao et al. 2023,
https://crfm.stanford.edu/2023/10/12/flashdecoding.html; shares of equal size over a ragged batch: FlashInfer,
arXiv:2501.01005, section 3.3). The queries of a group, T times its heads, are the rows of one tile, so that a key is
read once for all of them.

What a program leaves is a normalised output and its lse. Merging is the softmax over programs: each is a key whose
logit is that lse and whose value is that output.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_attn.block_mask import BlockMask
from pallas_attn.kernels.triton import specs, tiles
from pallas_attn.kernels.triton.key_blocks import KeyBlocks
from pallas_attn.kernels.triton.softmax import Attend, Softmax
from pallas_attn.kernels.triton.specs import Cut, Inputs, Stored
from pallas_attn.kernels.triton.stored import Place, StoredKeys, parts_of
from pallas_attn.kernels.triton.tiles import LOG2_E, Columns
from pallas_attn.schedule import Schedule
from pallas_attn.scores import Scores
from pallas_attn.tuning import BlockSizes

_MOST_ROWS = {2: 64, 4: 32}  # of a tile, by bytes per element: what more queries there are make further tiles
_MERGED = 16  # programs that one step of the merge takes
MERGE_SIZES = BlockSizes(16, 16, num_warps=4, num_stages=1)


@dataclasses.dataclass(frozen=True)
class _Packing:
    """How rows of lists become rows of tiles."""

    list_rows: int  # batch rows of the lists, B or 1
    list_heads: int  # M
    heads: int  # KV heads of one row of the lists: all of them, or one
    group: int  # query heads that share a tile
    queries: int  # rows that T queries of a group make
    tile: int  # rows of a tile: a power of two, and at least 16, the smallest operand of a matrix instruction

    @classmethod
    def of(cls, cut: Cut, block_mask: BlockMask) -> "_Packing":
        list_rows, list_heads, _ = block_mask.num_active.shape
        heads = cut.kv_heads if list_heads == 1 else 1
        group = cut.q_heads // (list_heads * heads)
        queries = cut.q_len * group
        tile = min(tiles.tile_width(queries), _MOST_ROWS[cut.dtype.itemsize])
        return cls(list_rows, list_heads, heads, group, queries, tile)

    @property
    def tiles(self) -> int:
        """Tiles of one head of one row."""
        return -(-self.queries // self.tile)

    def copies(self, cut: Cut) -> int:
        """Batch rows that share a row of the lists."""
        return cut.batch // self.list_rows


# jit: outside of jit, too, a call with known shapes compiles nothing.
@functools.partial(jax.jit, static_argnames=("scale", "interpret"))
def decode(
    query: Array,
    key: Stored,
    value: Stored,
    block_mask: BlockMask,
    scores: Scores = (),
    sinks: Array | None = None,
    *,
    scale: float,
    interpret: bool = False,
    page_table: Array | None = None,
) -> tuple[Array, Array]:
    """Same contract as :func:`pallas_attn.kernels.reference.forward`, for a BlockMask with a schedule."""
    cut = Cut.of(query, value, block_mask, scale, interpret)
    packing, whole = _Packing.of(cut, block_mask), specs.Whole(cut)
    inputs, schedule = Inputs.of(query, key, value, block_mask, scores, page_table), block_mask.schedule
    if schedule is None:
        raise ValueError("block_mask: expected one with a schedule, of a single block of few queries")
    programs, copies = schedule.row.shape[0], packing.copies(cut)
    vectors = jax.tree.map(lambda x: whole.all(*x.shape), schedule)
    parts, padded = (programs, copies, packing.heads, packing.queries), packing.tiles * packing.tile
    width = tiles.tile_width(cut.value_dim)
    found = specs.call(
        functools.partial(_split_kernel, cut=cut, packing=packing),
        "pallas_attn_decode",
        block_mask.block_sizes,
        cut,
        grid=(programs, packing.heads * packing.tiles, copies),
        in_specs=[inputs.specs(cut, whole), vectors],
        out_specs=[whole.all(*parts[:3], padded, width), whole.all(*parts[:3], padded)],
        out_shape=[jax.ShapeDtypeStruct((*parts, width), jnp.float32), jax.ShapeDtypeStruct(parts, jnp.float32)],
    )(inputs, schedule)
    return specs.call(
        functools.partial(_merge_kernel, cut=cut, packing=packing),
        "pallas_attn_merge",
        MERGE_SIZES,
        cut,
        grid=(cut.q_len, cut.q_heads, cut.batch),
        in_specs=[
            jax.tree.map(lambda x: whole.all(*x.shape), found),
            vectors,
            whole.all(*block_mask.q_positions.shape),
            None if sinks is None else whole.all(cut.q_heads),
        ],
        out_specs=[
            pl.BlockSpec((None, 1, None, width), lambda t, n, b: (b, t, n, 0)),
            pl.BlockSpec((None, None, 1), lambda t, n, b: (b, n, t)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((cut.batch, cut.q_len, cut.q_heads, cut.value_dim), query.dtype),
            jax.ShapeDtypeStruct((cut.batch, cut.q_heads, cut.q_len), jnp.float32),
        ],
    )(found, schedule, block_mask.q_positions, sinks)


def _split_kernel(refs: Inputs, schedule: Schedule, out_ref, lse_ref, *, cut: Cut, packing: _Packing):
    program, head_and_tile, copy = (pl.program_id(axis) for axis in range(3))
    row, first, last = schedule.row[program], schedule.first[program], schedule.last[program]

    @pl.when(first < last)
    def _():
        head, tile = head_and_tile // packing.tiles, lax.rem(head_and_tile, np.int32(packing.tiles))
        m = lax.rem(row, np.int32(packing.list_heads))
        b = row // packing.list_heads + copy
        first_head = (m * packing.heads + head) * packing.group
        places = tile * packing.tile + jnp.arange(packing.tile)
        exists = places < packing.queries
        t, n = places // packing.group, first_head + lax.rem(places, jnp.full_like(places, packing.group))
        q_positions = tiles.load(refs.q_positions.at[tiles.of_head(refs.q_positions, b), t], exists, -1)

        def load_queries(part: Columns) -> Array:
            mask = tiles.outer(exists, part.exist, (packing.tile, part.tile))
            return tiles.load(tiles.at(refs.query, b, t, n, part.at), mask)

        q = tuple(load_queries(part) for part in tiles.columns(cut.head_dim, parts_of(refs.key)))
        columns = tiles.columns(cut.value_dim, parts_of(refs.value))
        place = Place(b, first_head // cut.group, n)
        blocks = KeyBlocks(StoredKeys(refs, cut, place), t, exists, q_positions)
        list_row = b if packing.list_rows > 1 else np.int32(0), m, np.int32(0)
        state = Softmax.empty(packing.tile, columns)
        state = blocks.walk(list_row, Attend(cut, blocks, q, n[:, None]), state, (first, last))
        out, lse = Softmax(*state).finish(None)
        at = program, copy, head, pl.Slice(tile * packing.tile, packing.tile)
        for part, x in zip(columns, out, strict=True):
            plgpu.store(out_ref.at[*at, part.at], x, mask=tiles.outer(exists, part.exist, x.shape))
        plgpu.store(lse_ref.at[at], lse, mask=exists)


def _merge_kernel(found, schedule: Schedule, q_positions, sinks_ref, out_ref, lse_ref, *, cut: Cut, packing: _Packing):
    t, n, b = (pl.program_id(axis) for axis in range(3))
    list_head, copy, zero = n // packing.group, b, np.int32(0)
    m, head = (zero, list_head) if packing.list_heads == 1 else (list_head, zero)
    row = m
    if packing.list_rows > 1:
        row, copy = b * packing.list_heads + m, zero
    begin, count = schedule.begin[row], schedule.count[row]
    place = t * packing.group + lax.rem(n, np.int32(packing.group))
    outs_ref, lses_ref = found
    (columns,) = tiles.columns(cut.value_dim)

    def step(i: Array, state: tuple) -> tuple:
        peak, total, (acc,) = state
        part = i * _MERGED + jnp.arange(_MERGED)
        exists = part < count
        lse = tiles.load(lses_ref.at[begin + part, copy, head, place], exists, -jnp.inf)
        outs = tiles.at(outs_ref, begin + part, copy, head, place, columns.at)
        outs = tiles.load(outs, tiles.outer(exists, columns.exist, (_MERGED, columns.tile)))
        new_peak = jnp.maximum(peak, jnp.max(lse))
        decay = cut.exp2(peak - new_peak)
        weights = cut.exp2(lse - new_peak)
        acc = acc * decay[:, None] + jnp.sum(weights[:, None] * outs, axis=0)[None, :]
        return new_peak, total * decay + jnp.sum(weights), (acc,)

    steps = (count + _MERGED - 1) // _MERGED
    state = Softmax(*lax.fori_loop(0, steps, step, tuple(Softmax.empty(1, (columns,)))))
    if sinks_ref is not None:
        state = state.with_sink(cut, sinks_ref[n])
    real = q_positions[tiles.of_head(q_positions, b), t] >= 0
    (out,), lse = state.finish(jnp.broadcast_to(real, (1,)))
    plgpu.store(out_ref.at[:, :], out.astype(out_ref.dtype), mask=tiles.outer(None, columns.exist, out.shape))
    plgpu.store(lse_ref.at[:], lse / LOG2_E)
