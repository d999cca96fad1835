"""Decode in Pallas, through the Triton lowering: few queries against many keys, which are split among programs.

A row's list of KV blocks is split into shares (:mod:`pallas_attn.schedule`), a program visits one of them, and a
second kernel merges the partial results (Flash-Decoding, Dao et al. 2023,
https://crfm.stanford.edu/2023/10/12/flashdecoding.html; shares of equal size over a ragged batch: FlashInfer,
arXiv:2501.01005, section 3.3). The queries of a group, T times its heads, are the rows of one tile, so that a key is
read once for all of them.

A program writes its partial softmax state: largest logit, sum of weights, weighted sum of values. If key weights are
requested, it also writes its logits.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_attn.kernels.call import Call
from pallas_attn.kernels.lse import Lse
from pallas_attn.kernels.triton import specs, tiles
from pallas_attn.kernels.triton.block_walk import BlockWalk
from pallas_attn.kernels.triton.coords import ProgramCoords
from pallas_attn.kernels.triton.key_blocks import KeyBlock, KeyBlocks
from pallas_attn.kernels.triton.key_weight_pass import weights_of_logits
from pallas_attn.kernels.triton.packing import Packing
from pallas_attn.kernels.triton.softmax import SoftmaxState
from pallas_attn.kernels.triton.specs import KernelArgs, Tiling
from pallas_attn.kernels.triton.stored import StoredKeys
from pallas_attn.kernels.triton.tiles import Columns
from pallas_attn.schedule import Schedule
from pallas_attn.tuning import BlockSizes

_MERGED = 16  # programs merged per step
MERGE_SIZES = BlockSizes(16, 16, num_warps=4, num_stages=1)


# jit: outside of jit, too, a call with known shapes compiles nothing.
@functools.partial(jax.jit, static_argnames=("scale", "interpret", "return_key_weights"))
def decode(call: Call, *, scale: float, interpret: bool = False, return_key_weights: bool = False) -> tuple[Any, ...]:
    """Same contract as :func:`pallas_attn.kernels.reference.forward`, for a BlockMask with a schedule."""
    query, block_mask, sinks = call.query, call.block_mask, call.sinks
    tiling = Tiling.of_call(call, scale, interpret)
    packing = Packing.of(tiling, block_mask)
    inputs, schedule = KernelArgs.from_call(call), block_mask.schedule
    if schedule is None:
        raise ValueError("block_mask: expected one with a schedule, of a single block of few queries")
    # An operand that no kernel reads would be written all the same, in a launch of its own.
    inputs = inputs._replace(lists=dataclasses.replace(inputs.lists, num_active=None, order=None))
    programs, copies = schedule.row.shape[0], packing.copies(tiling)
    vectors = jax.tree.map(specs.whole, schedule)
    parts, padded = (programs, copies, packing.heads, packing.queries), packing.tiles * packing.tile
    width = tiles.tile_width(tiling.value_dim)
    padded_parts, padded_logits = (*parts[:3], padded), (tiling.batch, packing.owners, padded, tiling.kv_rows)
    out_specs = [specs.of_shape(x) for x in (padded_parts, padded_parts, (*padded_parts, width))]
    out_shape = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (parts, parts, (*parts, width))]
    if return_key_weights:
        out_specs.append(specs.of_shape(padded_logits))
        of_keys = tiling.batch, packing.owners, packing.queries, tiling.kv_len
        out_shape.append(jax.ShapeDtypeStruct(of_keys, jnp.float32))
    found = specs.call(
        functools.partial(_split_kernel, tiling=tiling, packing=packing),
        "pallas_attn_decode",
        block_mask.block_sizes,
        tiling,
        grid=(programs, packing.heads * packing.tiles, copies),
        in_specs=[inputs.block_specs(tiling), vectors],
        out_specs=out_specs,
        out_shape=out_shape,
    )(inputs, schedule)
    softmaxes = SoftmaxState(*found[:3])
    per_query = jax.ShapeDtypeStruct((tiling.batch, tiling.q_heads, tiling.q_len), jnp.float32)
    one_query = pl.BlockSpec((None, None, 1), lambda t, n, b: (b, n, t))
    out, lse = specs.call(
        functools.partial(_merge_kernel, tiling=tiling, packing=packing),
        "pallas_attn_merge",
        MERGE_SIZES,
        tiling,
        grid=(tiling.q_len, tiling.q_heads, tiling.batch),
        in_specs=[
            jax.tree.map(specs.whole, softmaxes),
            vectors,
            specs.whole(block_mask.q_positions),
            None if sinks is None else specs.whole(sinks),
        ],
        out_specs=(
            pl.BlockSpec((None, 1, None, width), lambda t, n, b: (b, t, n, 0)),
            Lse(one_query, one_query, tiling.unit),
        ),
        out_shape=(
            jax.ShapeDtypeStruct((tiling.batch, tiling.q_len, tiling.q_heads, tiling.value_dim), query.dtype),
            Lse(per_query, per_query, tiling.unit),
        ),
    )(softmaxes, schedule, block_mask.q_positions, sinks)
    if not return_key_weights:
        return out, lse
    return out, lse, weights_of_logits(found[3], lse, schedule, block_mask.indices, tiling, packing)


def _split_kernel(
    refs: KernelArgs,
    schedule: Schedule,
    m_ref,
    l_ref,
    acc_ref,
    logits_ref: Any = None,
    *,
    tiling: Tiling,
    packing: Packing,
):
    program, head_and_tile, copy = (pl.program_id(axis) for axis in range(3))
    row, first, last = schedule.row[program], schedule.first[program], schedule.last[program]

    @pl.when(first < last)
    def _():
        head, tile = head_and_tile // packing.tiles, lax.rem(head_and_tile, np.int32(packing.tiles))
        b, owner, list_row = packing.locate(row, head, copy)
        at, in_bounds, t, n = packing.rows(owner, tile)
        coords = ProgramCoords(b, owner * packing.group // tiling.group, n)
        q_positions = tiles.load(refs.q_positions.at[coords.row(refs.q_positions), t], in_bounds, -1)
        keys = StoredKeys(refs, tiling, coords)

        def load_queries(part: Columns) -> Array:
            mask = tiles.outer(in_bounds, part.in_bounds, (packing.tile, part.tile))
            return tiles.load(tiles.at(refs.query, b, t, n, part.at), mask)

        q, value_columns = tuple(map(load_queries, keys.columns(refs.key))), keys.columns(refs.value)
        blocks = KeyBlocks(keys, t, in_bounds, q_positions)

        def step(state: list, block: KeyBlock) -> SoftmaxState:
            logits = blocks.logits(block.k.products(tiling, q), block)
            if logits_ref is not None:
                mask = tiles.outer(in_bounds, block.in_bounds, logits.shape)
                plgpu.store(logits_ref.at[b, owner, at, block.keys], logits, mask=mask)
            return SoftmaxState(*state).update(tiling, logits, block.v)

        walk = BlockWalk.of(refs.lists, list_row, keys.locate, (first, last))
        carry = walk.start(SoftmaxState.empty(packing.tile, value_columns))
        carry = lax.fori_loop(walk.first, walk.num_full, walk.visit(blocks.full, step), carry)
        _, m, l, acc = lax.fori_loop(walk.num_full, walk.last, walk.visit(blocks.partial, step), carry)
        plgpu.store(m_ref.at[program, copy, head, at], m, mask=in_bounds)
        plgpu.store(l_ref.at[program, copy, head, at], l, mask=in_bounds)
        for part, x in zip(value_columns, acc, strict=True):
            tiles.store_rows(acc_ref, (program, copy, head, at), part, in_bounds, x)


def _merge_kernel(
    found: SoftmaxState,
    schedule: Schedule,
    q_positions,
    sinks_ref,
    out_ref,
    lse_refs: Lse,
    *,
    tiling: Tiling,
    packing: Packing,
):
    t, n, b = (pl.program_id(axis) for axis in range(3))
    list_head, copy, zero = n // packing.group, b, np.int32(0)
    list_head, head = (zero, list_head) if packing.list_heads == 1 else (list_head, zero)
    row = list_head
    if packing.list_rows > 1:
        row, copy = b * packing.list_heads + list_head, zero
    begin, count = schedule.begin[row], schedule.count[row]
    place = t * packing.group + lax.rem(n, np.int32(packing.group))
    coords = ProgramCoords(b, n // tiling.group, n)
    m_ref, l_ref, acc_ref = found
    (columns,) = tiles.columns(tiling.value_dim)

    def step(i: Array, state: tuple) -> tuple:
        m, l, (acc,) = state
        part = i * _MERGED + jnp.arange(_MERGED, dtype=jnp.int32)
        in_bounds = part < count
        at = begin + part, copy, head, place
        ms, ls = tiles.load(m_ref.at[at], in_bounds, -jnp.inf), tiles.load(l_ref.at[at], in_bounds)
        accs = tiles.load(
            tiles.at(acc_ref, *at, columns.at), tiles.outer(in_bounds, columns.in_bounds, (_MERGED, columns.tile))
        )
        new_m = jnp.maximum(m, jnp.max(ms))
        decay = tiling.exp(tiling.minus(m, new_m), tiling.unit)
        kept = tiling.exp(tiling.minus(ms, new_m), tiling.unit)
        acc = acc * decay[:, None] + jnp.sum(kept[:, None] * accs, axis=0)[None, :]
        return new_m, l * decay + jnp.sum(kept * ls), (acc,)

    steps = (count + _MERGED - 1) // _MERGED
    state = SoftmaxState(*lax.fori_loop(0, steps, step, tuple(SoftmaxState.empty(1, (columns,)))))
    state, above = (state, 0.0) if sinks_ref is None else state.with_sink(tiling, sinks_ref[n])
    valid = q_positions[coords.row(q_positions), t] >= 0
    (out,), peak, log_total = state.finish(jnp.broadcast_to(valid, (1,)), above)
    plgpu.store(out_ref.at[:, :], out.astype(out_ref.dtype), mask=tiles.outer(None, columns.in_bounds, out.shape))
    plgpu.store(lse_refs.peak.at[:], peak)
    plgpu.store(lse_refs.log_total.at[:], log_total)
