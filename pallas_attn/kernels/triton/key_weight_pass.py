"""How much probability each key got, in Pallas, through the Triton lowering.

Decode leaves its logits, and a kernel turns those of visited blocks into weights. With more queries logits would be too
many: there a second pass over the keys, without values, computes probabilities again from ``lse``. One program per KV
block and head walks the transposed lists, as dK and dV do, so nothing is added to memory by two programs.
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

from pallas_attn import scores as score_algebra
from pallas_attn.kernels.call import Call
from pallas_attn.kernels.lse import Lse
from pallas_attn.kernels.triton import specs, tiles
from pallas_attn.kernels.triton.key_blocks import KeyBlocks
from pallas_attn.kernels.triton.packing import Packing
from pallas_attn.kernels.triton.specs import Cut, Inputs
from pallas_attn.kernels.triton.stored import Place, StoredKeys
from pallas_attn.schedule import Schedule
from pallas_attn.tuning import BlockSizes

# Little is computed per block, so warps are few, and each thread loads 16 bytes.
LOGITS_SIZES = BlockSizes(16, 16, num_warps=2, num_stages=1)


def sizes_of(forward: BlockSizes) -> BlockSizes:
    """Those of the forward pass, whose lists are shared; with one tile per block to copy, not two, more stages fit."""
    return dataclasses.replace(forward, num_stages=max(3, forward.num_stages))


@functools.partial(jax.jit, static_argnames=("scale", "interpret"))
def key_weights(call: Call, lse: Lse, *, scale: float, interpret: bool = False) -> Array:
    """Same contract as :func:`pallas_attn.kernels.reference.key_weights`."""
    call, block_mask = call._replace(value=call.key), call.block_mask  # no values are read
    cut = Cut.of(call, scale, interpret)
    whole = specs.Whole(cut)
    inputs = Inputs.of(call)
    inputs = inputs._replace(lists=block_mask.transposed)
    return specs.call(
        functools.partial(_kernel, cut=cut),
        "pallas_attn_key_weights",
        sizes_of(block_mask.block_sizes),
        cut,
        grid=(cut.kv_blocks, cut.kv_heads, cut.batch),
        in_specs=[inputs.specs(cut, whole), jax.tree.map(lambda _: whole.all(cut.batch, cut.q_heads, cut.q_rows), lse)],
        out_specs=whole.all(cut.batch, cut.kv_heads, cut.kv_rows),
        out_shape=jax.ShapeDtypeStruct((cut.batch, cut.kv_heads, cut.kv_len), jnp.float32),
    )(inputs, specs.in_kernels(lse))


def weights_of_logits(logits: Array, lse: Lse, schedule: Schedule, indices: Array, cut: Cut, packing: Packing) -> Array:
    """The same from logits of decode, whose schedule shares out this work too.

    Args:
      logits: float32 ``[B, owners, queries, S]`` in units of ``lse.unit``, -inf where a key is not seen. Blocks
        that are not in their owner's list may hold anything.
      indices: of the lists, int32 ``[B|1, M, 1, width]``.
    """
    whole = specs.Whole(cut)
    shape = cut.batch, packing.owners, cut.kv_len
    blocks = whole.all(*shape[:2], cut.kv_rows)
    weights = specs.call(
        functools.partial(_logits_kernel, packing=packing, cut=cut),
        "pallas_attn_decode_weights",
        LOGITS_SIZES,
        cut,
        grid=(schedule.row.shape[0], packing.heads, packing.copies(cut)),
        in_specs=[
            blocks,
            whole.all(*shape[:2], packing.tiles * packing.tile, cut.kv_rows),
            jax.tree.map(lambda x: whole.all(*x.shape), lse),
            jax.tree.map(lambda x: whole.all(*x.shape), schedule),
            whole.all(*indices.shape),
        ],
        out_specs=blocks,
        out_shape=jax.ShapeDtypeStruct(shape, jnp.float32),
        input_output_aliases={0: 0},
    )(jnp.zeros(shape, jnp.float32), logits, specs.in_kernels(lse), schedule, indices)
    return weights.reshape(cut.batch, cut.kv_heads, -1, cut.kv_len).mean(2)


def _logits_kernel(
    zeros_ref, logits_ref, lse_refs: Lse, schedule: Schedule, indices, out_ref, *, packing: Packing, cut: Cut
):
    program, head, copy = (pl.program_id(axis) for axis in range(3))
    b, owner, list_row = packing.locate(schedule.row[program], head, copy)

    def add(tile: Any, keys: pl.Slice, exist: Array) -> Array:
        """What the queries of a tile give."""
        rows = packing.rows(owner, tile)
        at = b, rows.n, rows.t
        peak = tiles.load(lse_refs.peak.at[at], rows.exist, jnp.inf)
        log_total = tiles.load(lse_refs.log_total.at[at], rows.exist)
        mask = tiles.outer(peak != jnp.inf, exist, (packing.tile, cut.kv_block))
        logits = tiles.load(logits_ref.at[b, owner, rows.at, keys], mask, -jnp.inf)
        return jnp.sum(cut.probabilities(logits, peak[:, None], log_total[:, None]), axis=0)

    def visit(slot: Array, _):
        block = indices[(*list_row, slot)]
        keys = pl.Slice(block * cut.kv_block, cut.kv_block)
        exist = block * cut.kv_block + jnp.arange(cut.kv_block, dtype=jnp.int32) < cut.kv_len
        weights = add(np.int32(0), keys, exist)
        if packing.tiles > 1:
            weights = tiles.loop(1, packing.tiles, lambda tile, sum: sum + add(tile, keys, exist), weights)
        plgpu.store(out_ref.at[b, owner, keys], weights / packing.group, mask=exist)

    lax.fori_loop(schedule.first[program], schedule.last[program], visit, None)


def _kernel(refs: Inputs, lse_refs: Lse, out_ref, *, cut: Cut):
    j, h, b = (pl.program_id(axis) for axis in range(3))
    stored = StoredKeys(refs, cut, Place(b, h, h * cut.group))
    columns = stored.columns(refs.key)
    keys, exist = stored.slots(j), stored.exist(j)
    positions = stored.positions(j, exist)
    k = stored.tile(refs.key, stored.locate(j), positions >= 0)

    def head(g: Any, state: tuple[Array]) -> tuple[Array]:
        n = h * cut.group + g
        of_head = StoredKeys(refs, cut, Place(b, h, n))

        def load_rows(block: Array, exist: Array | None) -> tuple[KeyBlocks, Array, Array]:
            """A block of queries as what is known of its rows, and the parts of their lse."""
            rows = pl.Slice(block * cut.q_block, cut.q_block)
            q_positions = tiles.load(refs.q_positions.at[tiles.of_head(refs.q_positions, b), rows], exist, -1)
            peak = tiles.load(lse_refs.peak.at[b, n, rows], exist, jnp.inf)
            log_total = tiles.load(lse_refs.log_total.at[b, n, rows], exist)
            return KeyBlocks(of_head, rows, exist, q_positions), peak, log_total

        def weights(blocks: KeyBlocks, lse: list[Array], exist: Array | None, counts: Array | None) -> Array:
            """The probabilities ``[q_block, kv_block]`` of a block of queries; anything where nobody sees."""

            def load_queries(part: tiles.Columns) -> Array:
                mask = tiles.outer(counts, part.exist, (cut.q_block, part.tile))
                return tiles.load(refs.query.at[b, blocks.rows, n, part.at], mask)

            logits = cut.logits(k.products(cut, tuple(load_queries(part) for part in columns)))
            if refs.scores:
                where = blocks.q_positions[:, None], positions[None, :], n, b
                logits = score_algebra.apply(blocks.scores(keys, exist), logits, *where)
            return cut.probabilities(logits, *(x[:, None] for x in lse))

        def full(block: Array, state: tuple[Array]) -> tuple[Array]:
            blocks, *lse = load_rows(block, None)
            return (state[0] + weights(blocks, lse, None, None),)

        def partial(block: Array, state: tuple[Array]) -> tuple[Array]:
            row_exists = block * cut.q_block + jnp.arange(cut.q_block, dtype=jnp.int32) < cut.q_len
            blocks, *lse = load_rows(block, row_exists)
            counts = (blocks.q_positions >= 0) & (lse[0] != jnp.inf)
            allowed = blocks.allowed(keys, exist, positions) & counts[:, None]
            # Chosen, not multiplied by 0: where nothing is seen, an operand may hold anything, NaN included.
            return (state[0] + jnp.where(allowed, weights(blocks, lse, exist, counts), 0.0),)

        of = refs.lists.num_active
        row = of_head.shared(of, lambda x: x.h if of.shape[1] == cut.kv_heads else x.n)
        return tiles.walk(refs.lists, (*row, j), full, partial, state)

    # Summed over its rows at the end alone: different warps hold them.
    state = (jnp.zeros((cut.q_block, cut.kv_block), jnp.float32),)
    # A plain 0 fails in the interpreter.
    (weights,) = tiles.loop(0, cut.group, head, state) if cut.group > 1 else head(np.int32(0), state)
    plgpu.store(out_ref.at[b, h, keys], jnp.sum(weights, axis=0) / cut.group, mask=exist)
