"""Key weights in Pallas, through the Triton lowering: the attention probability that each key receives.

Decode keeps its logits, and a kernel turns those of visited blocks into weights. With more queries there would be too
many logits: a second pass over the keys, without values, recomputes probabilities from ``lse``. One program per KV
block and head walks the transposed lists, as dK and dV do, so no two programs add to the same memory.
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
from pallas_attn import tuning
from pallas_attn.kernels.call import Call
from pallas_attn.kernels.lse import Lse
from pallas_attn.kernels.triton import specs, tiles
from pallas_attn.kernels.triton.block_walk import BlockWalk
from pallas_attn.kernels.triton.coords import ProgramCoords
from pallas_attn.kernels.triton.key_blocks import KeyBlocks
from pallas_attn.kernels.triton.packing import Packing
from pallas_attn.kernels.triton.query_block import QueryBlock
from pallas_attn.kernels.triton.specs import KernelArgs, Tiling
from pallas_attn.kernels.triton.stored import StoredKeys, Tile
from pallas_attn.schedule import Schedule
from pallas_attn.tuning import BlockSizes

# Little is computed per block: few warps, so that each thread loads 16 bytes.
LOGITS_SIZES = BlockSizes(16, 16, num_warps=2, num_stages=1)


@functools.partial(jax.jit, static_argnames=("scale", "interpret", "block_sizes"))
def key_weights(
    call: Call, lse: Lse, *, scale: float, interpret: bool = False, block_sizes: BlockSizes | None = None
) -> Array:
    """Same contract as :func:`pallas_attn.kernels.reference.key_weights`.

    The lists of the forward pass are shared unless the tuning table has other blocks for this kernel; ``block_sizes``
    replaces both.
    """
    block_mask = call.block_mask.with_block_sizes(block_sizes or _block_sizes(call))
    call = call._replace(value=call.key, block_mask=block_mask)  # no values are read
    tiling = Tiling.of_call(call, scale, interpret)
    inputs = KernelArgs.from_call(call)
    inputs = inputs._replace(lists=block_mask.transposed)
    return specs.call(
        functools.partial(_kernel, tiling=tiling),
        "pallas_attn_key_weights",
        block_mask.block_sizes,
        tiling,
        grid=(tiling.kv_blocks, tiling.kv_heads, tiling.batch),
        in_specs=[
            inputs.block_specs(tiling),
            jax.tree.map(lambda _: tiling.per_query(), lse),
        ],
        out_specs=specs.of_shape((tiling.batch, tiling.kv_heads, tiling.kv_rows)),
        out_shape=jax.ShapeDtypeStruct((tiling.batch, tiling.kv_heads, tiling.kv_len), jnp.float32),
    )(inputs, specs.in_kernels(lse))


def _block_sizes(call: Call) -> BlockSizes:
    """The table's entry for this kernel, with the blocks of the call if it shares those of the forward pass."""

    def entry(kernel: tuning.Kernel) -> BlockSizes:
        return tuning.default_block_sizes(
            *(call.query.shape[1], call.block_mask.shape[3]),
            implementation="triton",
            kernel=kernel,
            head_dim=call.query.shape[-1],
            dtype=call.query.dtype,
        )

    own, of_forward, sizes = entry("key_weights"), entry("forward"), call.block_mask.block_sizes
    is_shared = (own.q, own.kv) == (of_forward.q, of_forward.kv)
    return dataclasses.replace(own, q=sizes.q, kv=sizes.kv) if is_shared else own


def weights_of_logits(
    logits: Array, lse: Lse, schedule: Schedule, indices: Array, tiling: Tiling, packing: Packing
) -> Array:
    """Key weights from the logits of decode, along the same schedule.

    Args:
      logits: float32 ``[B, owners, queries, S]`` in units of ``lse.unit``, -inf where a key is not seen. Blocks
        that are not in the list of their owner may hold anything.
      indices: of the lists, int32 ``[B|1, M, 1, width]``.
    """
    shape = tiling.batch, packing.owners, tiling.kv_len
    blocks = specs.of_shape((*shape[:2], tiling.kv_rows))
    weights = specs.call(
        functools.partial(_logits_kernel, packing=packing, tiling=tiling),
        "pallas_attn_decode_weights",
        LOGITS_SIZES,
        tiling,
        grid=(schedule.row.shape[0], packing.heads, packing.copies(tiling)),
        in_specs=[
            blocks,
            specs.of_shape((*shape[:2], packing.tiles * packing.tile, tiling.kv_rows)),
            *jax.tree.map(specs.whole, (lse, schedule, indices)),
        ],
        out_specs=blocks,
        out_shape=jax.ShapeDtypeStruct(shape, jnp.float32),
        input_output_aliases={0: 0},
    )(jnp.zeros(shape, jnp.float32), logits, specs.in_kernels(lse), schedule, indices)
    return weights.reshape(tiling.batch, tiling.kv_heads, -1, tiling.kv_len).mean(2)


def _logits_kernel(
    zeros_ref, logits_ref, lse_refs: Lse, schedule: Schedule, indices, out_ref, *, packing: Packing, tiling: Tiling
):
    program, head, copy = (pl.program_id(axis) for axis in range(3))
    b, owner, list_row = packing.locate(schedule.row[program], head, copy)

    def add(tile: Any, keys: pl.Slice, in_bounds: Array) -> Array:
        """The contribution of a tile of queries."""
        rows = packing.rows(owner, tile)
        at = b, rows.n, rows.t
        peak = tiles.load(lse_refs.peak.at[at], rows.in_bounds, jnp.inf)
        log_total = tiles.load(lse_refs.log_total.at[at], rows.in_bounds)
        mask = tiles.outer(peak != jnp.inf, in_bounds, (packing.tile, tiling.kv_block))
        logits = tiles.load(logits_ref.at[b, owner, rows.at, keys], mask, -jnp.inf)
        return jnp.sum(tiling.probabilities(logits, peak[:, None], log_total[:, None]), axis=0)

    def visit(slot: Array, _):
        block = indices[(*list_row, slot)]
        keys = pl.Slice(block * tiling.kv_block, tiling.kv_block)
        in_bounds = block * tiling.kv_block + jnp.arange(tiling.kv_block, dtype=jnp.int32) < tiling.kv_len
        weights = add(np.int32(0), keys, in_bounds)
        if packing.tiles > 1:
            weights = tiles.loop(1, packing.tiles, lambda tile, sum: sum + add(tile, keys, in_bounds), weights)
        plgpu.store(out_ref.at[b, owner, keys], weights / packing.group, mask=in_bounds)

    lax.fori_loop(schedule.first[program], schedule.last[program], visit, None)


def _kernel(refs: KernelArgs, lse_refs: Lse, out_ref, *, tiling: Tiling):
    j, h, b = (pl.program_id(axis) for axis in range(3))
    stored = StoredKeys(refs, tiling, ProgramCoords(b, h, h * tiling.group))
    columns = stored.columns(refs.key)
    keys, in_bounds = stored.slots(j), stored.in_bounds(j)
    positions = stored.positions(j, in_bounds)
    valid = positions >= 0
    k = stored.tile(refs.key, stored.locate(j), valid)

    def keys_for(block: Array, valid: Array | None) -> Tile:
        """The keys, to be multiplied with a block of queries."""
        if tiling.interpret or not (tiling.dtype == jnp.float32 and tiling.head_dim > 64):
            return k
        # Without matrix instructions a thread multiplies whole rows. XLA would keep those of the keys, which are the
        # same for each block of queries, in registers, and spill. So they are loaded with each block: the compiler does
        # not know that the index of a block is at least 0.
        return stored.tile(refs.key, stored.locate(j + jnp.minimum(block, 0)), valid)

    def head(g: Any, state: tuple[Array]) -> tuple[Array]:
        coords = ProgramCoords(b, h, h * tiling.group + g)
        keys_of_head = StoredKeys(refs, tiling, coords)

        def load(queries: QueryBlock) -> tuple[QueryBlock, KeyBlocks, Array, Array]:
            """A block of queries, what its mask and scores depend on, and the parts of its lse."""
            blocks = KeyBlocks(keys_of_head, queries.at, queries.in_bounds, queries.positions())
            peak = queries.vector(lse_refs.peak, queries.in_bounds, jnp.inf)
            return queries, blocks, peak, queries.vector(lse_refs.log_total, queries.in_bounds)

        def weights(
            k: Tile, queries: QueryBlock, blocks: KeyBlocks, peak: Array, log_total: Array, q_valid: Array | None
        ) -> Array:
            """The probabilities ``[q_block, kv_block]`` of a block of queries; undefined for masked pairs."""
            q = tuple(queries.tile(refs.query, part, q_valid) for part in columns)
            logits = tiling.logits(k.products(tiling, q))
            if refs.scores:
                where = blocks.q_positions[:, None], positions[None, :], coords.n, b
                logits = score_algebra.apply(blocks.scores(keys, in_bounds), logits, *where)
            return tiling.probabilities(logits, peak[:, None], log_total[:, None])

        def full(block: Array) -> Array:
            return weights(keys_for(block, None), *load(QueryBlock.full(refs, tiling, coords, block)), None)

        def partial(block: Array) -> Array:
            queries, blocks, peak, log_total = load(QueryBlock.ragged(refs, tiling, coords, block))
            q_valid = (blocks.q_positions >= 0) & (peak != jnp.inf)
            allowed = blocks.allowed(keys, in_bounds, positions) & q_valid[:, None]
            # Chosen, not multiplied by 0: where nothing is seen, an operand may hold anything, NaN included.
            k = keys_for(block, valid)
            return jnp.where(allowed, weights(k, queries, blocks, peak, log_total, q_valid), 0.0)

        def step(state: list, weights: Array) -> tuple[Array]:
            return (state[0] + weights,)

        walk = BlockWalk.of(refs.lists, (*coords.at(refs.lists.num_active, tiling), j))
        carry = lax.fori_loop(walk.first, walk.num_full, walk.visit(full, step), walk.start(state))
        _, total = lax.fori_loop(walk.num_full, walk.last, walk.visit(partial, step), carry)
        return (total,)

    # Summed over its rows at the end alone: different warps hold them.
    state = (jnp.zeros((tiling.q_block, tiling.kv_block), jnp.float32),)
    # A plain 0 fails in the interpreter.
    (weights,) = tiles.loop(0, tiling.group, head, state) if tiling.group > 1 else head(np.int32(0), state)
    plgpu.store(out_ref.at[b, h, keys], jnp.sum(weights, axis=0) / tiling.group, mask=in_bounds)
