"""The forward kernel in Pallas, through the Triton lowering.

One program computes one query block of one query head: FlashAttention-2 (arXiv:2307.08691, algorithm 1) over the list
of live KV blocks. Loop one runs over full blocks and holds no mask code; loop two runs over partial blocks, evaluates
the mask on positions, and reads only keys that exist. Each iteration reads the index of the *next* block while its own
block is computed, so that no load waits for its address.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_attn.kernels.call import Call
from pallas_attn.kernels.lse import Lse
from pallas_attn.kernels.triton import specs, tiles
from pallas_attn.kernels.triton.key_blocks import KeyBlocks
from pallas_attn.kernels.triton.softmax import OnlineSoftmaxStep
from pallas_attn.kernels.triton.specs import KernelArgs, Tiling
from pallas_attn.kernels.triton.stored import StoredKeys


# jit: outside of jit, too, a call with known shapes compiles nothing.
@functools.partial(jax.jit, static_argnames=("scale", "interpret"))
def forward(call: Call, *, scale: float, interpret: bool = False) -> tuple[Array, Lse]:
    """Same contract as :func:`pallas_attn.kernels.reference.forward`.

    Blocks are powers of two, at least 16, and D and Dv at most 256. ``interpret`` runs Pallas' interpreter.
    """
    query, block_mask, sinks = call.query, call.block_mask, call.sinks
    tiling = Tiling.of_call(call, scale, interpret)
    layout = specs.PerQueryHead(tiling)
    inputs = KernelArgs.from_call(call)
    rows = pl.BlockSpec((None, None, tiling.q_rows), lambda i, n, b: (b, n, 0))
    per_row = jax.ShapeDtypeStruct((tiling.batch, tiling.q_heads, tiling.q_len), jnp.float32)
    return specs.call(
        functools.partial(_kernel, tiling=tiling),
        "pallas_attn_forward",
        block_mask.block_sizes,
        tiling,
        grid=(tiling.q_blocks, tiling.q_heads, tiling.batch),
        in_specs=[
            inputs.block_specs(tiling, layout),
            None if sinks is None else pl.BlockSpec((1,), lambda i, n, b: (n,)),
        ],
        out_specs=(layout.queries(tiling.value_dim), Lse(rows, rows, tiling.unit)),
        out_shape=(
            jax.ShapeDtypeStruct((tiling.batch, tiling.q_len, tiling.q_heads, tiling.value_dim), query.dtype),
            Lse(per_row, per_row, tiling.unit),
        ),
    )(inputs, sinks)


def _kernel(refs: KernelArgs, sinks_ref, out_ref, lse_refs: Lse, *, tiling: Tiling):
    i, n, b = refs.lists.order[pl.program_id(0)], pl.program_id(1), pl.program_id(2)
    rows = pl.Slice(i * tiling.q_block, tiling.q_block)
    row_in_bounds = i * tiling.q_block + jnp.arange(tiling.q_block, dtype=jnp.int32) < tiling.q_len
    stored = StoredKeys(refs, tiling)
    value_columns = stored.columns(refs.value)
    q = tuple(tiles.load_rows(refs.query, rows, row_in_bounds, part) for part in stored.columns(refs.key))
    q_positions = tiles.load(refs.q_positions.at[rows], row_in_bounds, -1)
    blocks = KeyBlocks(stored, rows, row_in_bounds, q_positions)
    state = OnlineSoftmaxStep(tiling, blocks, q, n, b).walk((i,), value_columns)
    state, above = (state, 0.0) if sinks_ref is None else state.with_sink(tiling, sinks_ref[0])
    out, peak, log_total = state.finish(q_positions >= 0, above)
    for part, x in zip(value_columns, out, strict=True):
        mask = tiles.outer(row_in_bounds, part.in_bounds, x.shape)
        plgpu.store(out_ref.at[rows, part.at], x.astype(out_ref.dtype), mask=mask)
    plgpu.store(lse_refs.peak.at[rows], peak, mask=row_in_bounds)
    plgpu.store(lse_refs.log_total.at[rows], log_total, mask=row_in_bounds)
