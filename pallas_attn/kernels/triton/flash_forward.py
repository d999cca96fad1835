"""The forward kernel in Pallas, through the Triton lowering.

One program computes one query block of one query head: FlashAttention-2 (arXiv:2307.08691, algorithm 1) over the list
of live KV blocks. Loop one runs over full blocks and holds no mask code; loop two runs over partial blocks, evaluates
the mask on positions, and reads only keys that exist. Each iteration reads the index of the *next* block while its own
block is computed, so that no load waits for its address.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_attn.kernels.call import Call
from pallas_attn.kernels.lse import Lse
from pallas_attn.kernels.triton import specs, tiles
from pallas_attn.kernels.triton.block_walk import BlockWalk
from pallas_attn.kernels.triton.coords import ProgramCoords
from pallas_attn.kernels.triton.key_blocks import KeyBlock, KeyBlocks
from pallas_attn.kernels.triton.query_block import QueryBlock
from pallas_attn.kernels.triton.softmax import SoftmaxState
from pallas_attn.kernels.triton.specs import KernelArgs, Tiling
from pallas_attn.kernels.triton.stored import StoredKeys


# jit: outside of jit, too, a call with known shapes compiles nothing.
@functools.partial(jax.jit, static_argnames=("scale", "interpret"))
def forward(call: Call, *, scale: float, interpret: bool = False) -> tuple[Array, Lse]:
    """Same contract as :func:`pallas_attn.kernels.reference.forward`.

    Blocks are powers of two, at least 16, and D and Dv at most 256. ``interpret`` runs Pallas' interpreter.
    """
    query, sinks = call.query, call.sinks
    tiling, inputs = Tiling.of_call(call, scale, interpret), KernelArgs.from_call(call)
    per_query = jax.ShapeDtypeStruct((tiling.batch, tiling.q_heads, tiling.q_len), jnp.float32)
    return specs.call(
        functools.partial(_kernel, tiling=tiling),
        "pallas_attn_forward",
        call.block_mask.block_sizes,
        tiling,
        grid=(tiling.q_blocks, tiling.q_heads, tiling.batch),
        in_specs=[inputs.block_specs(tiling), None if sinks is None else specs.whole(sinks)],
        out_specs=(tiling.queries(tiling.value_dim), Lse(tiling.per_query(), tiling.per_query(), tiling.unit)),
        out_shape=(
            jax.ShapeDtypeStruct((*query.shape[:-1], tiling.value_dim), query.dtype),
            Lse(per_query, per_query, tiling.unit),
        ),
    )(inputs, sinks)


def _kernel(refs: KernelArgs, sinks_ref, out_ref, lse_refs: Lse, *, tiling: Tiling):
    n, b = pl.program_id(1), pl.program_id(2)
    coords = ProgramCoords(b, n // tiling.group, n)
    heads = coords.at(refs.lists.order, tiling)
    i = refs.lists.order[(*heads, pl.program_id(0))]
    queries, keys = QueryBlock.ragged(refs, tiling, coords, i), StoredKeys(refs, tiling, coords)
    columns, value_columns = keys.columns(refs.key), keys.columns(refs.value)
    q = tuple(queries.tile(refs.query, part, queries.in_bounds) for part in columns)
    q_positions = queries.positions()
    blocks = KeyBlocks(keys, queries.at, queries.in_bounds, q_positions)

    def step(state: tuple, block: KeyBlock) -> SoftmaxState:
        logits = blocks.logits(block.k.products(tiling, q), block)
        return SoftmaxState(*state).update(tiling, logits, block.v)

    walk = BlockWalk.of(refs.lists, (*heads, i), keys.locate)
    carry = walk.start(SoftmaxState.empty(tiling.q_block, value_columns))
    carry = lax.fori_loop(walk.first, walk.num_full, walk.visit(blocks.full, step), carry)
    _, *state = lax.fori_loop(walk.num_full, walk.last, walk.visit(blocks.partial, step), carry)

    # Recomputed: what the loops do not need must not occupy registers, or the stack, while they run.
    queries = QueryBlock.ragged(refs, tiling, coords, tiling.opaque(i))
    state, above = SoftmaxState(*state), 0.0
    if sinks_ref is not None:
        state, above = state.with_sink(tiling, sinks_ref[n])
    out, peak, log_total = state.finish(queries.positions() >= 0, above)
    for part, x in zip(value_columns, out, strict=True):
        tiles.store_rows(out_ref, (b, queries.at, n), part, queries.in_bounds, x)
    plgpu.store(lse_refs.peak.at[b, n, queries.at], peak, mask=queries.in_bounds)
    plgpu.store(lse_refs.log_total.at[b, n, queries.at], log_total, mask=queries.in_bounds)
