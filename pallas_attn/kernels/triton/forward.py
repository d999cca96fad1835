"""The forward kernel in Pallas, through the Triton lowering.

One program computes one query block of one query head: FlashAttention-2 (arXiv:2307.08691, algorithm 1) over the list
of live KV blocks. Loop one runs over full blocks and holds no mask code; loop two runs over partial blocks, evaluates
the mask on positions, and reads only keys that exist. Each iteration reads the index of the *next* block while its own
block is computed, so that an address is never waited for.

Inside the kernel logits are in base 2: ``log2(e)`` is folded into the scale, and ``exp2`` is one instruction.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_attn import scores as score_algebra
from pallas_attn.block_mask import BlockMask
from pallas_attn.kernels.triton import specs, tiles
from pallas_attn.kernels.triton.specs import Cut, Inputs
from pallas_attn.kernels.triton.tiles import LOG2_E
from pallas_attn.scores import Scores

_LOWEST = float(jnp.finfo(jnp.float32).min)


# jit: outside of jit, too, a call with known shapes compiles nothing.
@functools.partial(jax.jit, static_argnames=("scale", "interpret"))
def forward(
    query: Array,
    key: Array,
    value: Array,
    block_mask: BlockMask,
    scores: Scores = (),
    sinks: Array | None = None,
    *,
    scale: float,
    interpret: bool = False,
) -> tuple[Array, Array]:
    """Same contract as :func:`pallas_attn.kernels.reference.forward`.

    Blocks are powers of two, at least 16, and D and Dv at most 256. ``interpret`` runs Pallas' interpreter.
    """
    cut = Cut.of(query, value, block_mask, scale, interpret)
    part = specs.PerQueryHead(cut)
    inputs = Inputs.of(query, key, value, block_mask, scores)
    return specs.call(
        functools.partial(_kernel, cut=cut),
        "pallas_attn_forward",
        block_mask.block_sizes,
        cut,
        grid=(cut.q_blocks, cut.q_heads, cut.batch),
        in_specs=[inputs.specs(cut, part), None if sinks is None else pl.BlockSpec((1,), lambda i, n, b: (n,))],
        out_specs=[part.queries(cut.value_dim), pl.BlockSpec((None, None, cut.q_rows), lambda i, n, b: (b, n, 0))],
        out_shape=[
            jax.ShapeDtypeStruct((cut.batch, cut.q_len, cut.q_heads, cut.value_dim), query.dtype),
            jax.ShapeDtypeStruct((cut.batch, cut.q_heads, cut.q_len), jnp.float32),
        ],
    )(inputs, sinks)


def _kernel(refs: Inputs, sinks_ref, out_ref, lse_ref, *, cut: Cut):
    head_columns, value_columns = tiles.columns(cut.head_dim), tiles.columns(cut.value_dim)
    i, n = refs.lists.order[pl.program_id(0)], pl.program_id(1)
    rows = pl.Slice(i * cut.q_block, cut.q_block)
    row_exists = i * cut.q_block + jnp.arange(cut.q_block) < cut.q_len
    q = tiles.load_rows(refs.query, rows, row_exists, head_columns)
    q_positions = tiles.load(refs.q_positions.at[rows], row_exists, -1)
    to_base_2 = LOG2_E
    if not refs.scores:
        # Only |scale| is folded into exp2, so that the largest logit times it is the largest scaled logit.
        to_base_2 *= abs(cut.scale) or 1.0
        if cut.scale <= 0:
            q = q * jnp.sign(jnp.asarray(cut.scale, q.dtype))

    def attend(state, keys, key_exists, k, v, kv_positions, allowed):
        peak, total, acc = state
        logits = cut.dot(q, k, (1, 1))
        if refs.scores:
            operands = score_algebra.map_operands(
                lambda ref: tiles.load_operand(ref, rows, row_exists, keys, key_exists), refs.scores
            )
            logits = score_algebra.apply(operands, logits * cut.scale, q_positions[:, None], kv_positions[None, :], n)
        if allowed is not None:
            logits = jnp.where(allowed, logits, -jnp.inf)
        new_peak = jnp.maximum(peak, jnp.max(logits, axis=1) * to_base_2)
        decay = cut.exp2(peak - new_peak)
        weights = cut.exp2(logits * to_base_2 - new_peak[:, None])
        total = total * decay + jnp.sum(weights, axis=1)
        acc = acc * decay[:, None] + cut.dot(weights, v, (1, 0))
        return new_peak, total, acc

    def full_block(block, state):
        keys = pl.Slice(block * cut.kv_block, cut.kv_block)
        kv_positions = plgpu.load(refs.kv_positions.at[keys]) if refs.scores else None
        k = tiles.load_rows(refs.key, keys, None, head_columns)
        v = tiles.load_rows(refs.value, keys, None, value_columns)
        return attend(state, keys, None, k, v, kv_positions, None)

    def partial_block(block, state):
        keys = pl.Slice(block * cut.kv_block, cut.kv_block)
        key_exists = block * cut.kv_block + jnp.arange(cut.kv_block) < cut.kv_len
        kv_positions = tiles.load(refs.kv_positions.at[keys], key_exists, -1)
        real = kv_positions >= 0
        mask = jax.tree.map(lambda ref: tiles.load_operand(ref, rows, row_exists, keys, key_exists), refs.mask)
        allowed = mask.allowed(q_positions[:, None], kv_positions[None, :]) & real[None, :]
        # An empty slot is not read: it may hold anything, NaN included, and 0 * NaN is NaN.
        k = tiles.load_rows(refs.key, keys, real, head_columns)
        v = tiles.load_rows(refs.value, keys, real, value_columns)
        return attend(state, keys, key_exists, k, v, kv_positions, allowed)

    state = (
        jnp.full((cut.q_block,), _LOWEST, jnp.float32),
        jnp.zeros((cut.q_block,), jnp.float32),
        jnp.zeros((cut.q_block, tiles.tile_width(cut.value_dim)), jnp.float32),
    )
    peak, total, acc = tiles.walk(refs.lists, i, full_block, partial_block, state)
    if sinks_ref is not None:
        sink = sinks_ref[0].astype(jnp.float32) * LOG2_E
        new_peak = jnp.maximum(peak, sink)
        decay = cut.exp2(peak - new_peak)
        peak, total, acc = new_peak, total * decay + cut.exp2(sink - new_peak), acc * decay[:, None]

    # A query that is padding, or that saw nothing, gets 0 and -inf. Not > 0: what is not a number shows.
    seen = (total != 0) & (q_positions >= 0)
    total = jnp.where(seen, total, 1.0)
    out = jnp.where(seen[:, None], acc / total[:, None], 0.0)
    lse = jnp.where(seen, (peak + jnp.log2(total)) / LOG2_E, -jnp.inf)
    plgpu.store(out_ref.at[rows, :], out.astype(out_ref.dtype), mask=tiles.outer(row_exists, value_columns, out.shape))
    plgpu.store(lse_ref.at[rows], lse, mask=row_exists)
