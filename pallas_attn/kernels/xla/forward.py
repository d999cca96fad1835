"""The forward pass: every program walks its list of KV blocks with the online softmax.

Milakov and Gimelshein, arXiv:1805.02867; FlashAttention-2, arXiv:2307.08691, algorithm 1. First come the full blocks,
without any mask code, then the partial ones. Blocks that are in no list are never read.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_attn.block_mask import BlockMask
from pallas_attn.kernels.xla.softmax import Softmax
from pallas_attn.kernels.xla.storage import Stored
from pallas_attn.kernels.xla.tiles import Cut, Program, as_it_is
from pallas_attn.scores import Scores


# jit: outside of jit, too, a call with known shapes compiles nothing.
@functools.partial(jax.jit, static_argnames=("scale",))
def forward(
    query: Array,
    key: Stored,
    value: Stored,
    block_mask: BlockMask,
    scores: Scores = (),
    sinks: Array | None = None,
    *,
    scale: float,
) -> tuple[Array, Array]:
    """Same contract as :func:`pallas_attn.kernels.reference.forward`."""
    cut = Cut.of(query, key, block_mask)
    value_dim = value.shape[-1]
    precision = lax.Precision.HIGHEST if query.dtype == jnp.float32 else lax.Precision.DEFAULT
    tile_shape = (cut.heads, cut.group, cut.q_block)

    def run(at: tuple[Array, ...]) -> tuple[Array, Array]:
        program = Program(cut, block_mask, scores, at)
        q = program.queries(query).astype(jnp.float32) * scale
        q = q.reshape(cut.heads, cut.group * cut.q_block, -1)

        def attend(state: Softmax, start: Array, k: Array, v: Array, kv_positions, allowed) -> Softmax:
            logits = jnp.einsum("hrd,hkd->hrk", q, as_it_is(k), precision=precision).reshape(*tile_shape, cut.kv_block)
            if scores:
                logits = program.score(logits, kv_positions, program.score_operands(start))
            if allowed is not None:
                logits = jnp.where(allowed, logits, -jnp.inf)
            peak, decay, weights = state.weigh(logits)
            total = state.total * decay + weights.sum(-1)
            update = jnp.einsum("hrk,hkd->hrd", weights.reshape(cut.heads, -1, cut.kv_block), v, precision=precision)
            acc = state.acc * decay[..., None] + update.reshape(*tile_shape, value_dim)
            return Softmax(peak, total, acc)

        def full_block(slot: Array, state: Softmax) -> Softmax:
            start = program.first_key(slot)
            kv_positions = program.key_positions(start) if scores else None
            return attend(state, start, program.keys(key, start), program.keys(value, start), kv_positions, None)

        def partial_block(slot: Array, state: Softmax) -> Softmax:
            start, kv_positions, real = program.keys_at(program.first_key(slot))
            allowed = program.allowed(start, kv_positions, real)
            # An empty slot may hold anything, NaN included, and 0 * NaN is NaN.
            v = jnp.where(real[:, None], program.keys(value, start), 0.0)
            return attend(state, start, program.keys(key, start), v, kv_positions, allowed)

        state = Softmax.empty(tile_shape, value_dim)
        state = lax.fori_loop(0, program.num_full, full_block, state)
        state = lax.fori_loop(program.num_full, program.num_active, partial_block, state)
        sink = None if sinks is None else program.heads(sinks.astype(jnp.float32))[..., None]
        return state.finish(program.is_token, sink)

    out, lse = lax.map(run, cut.programs())
    return cut.join_queries(out.astype(query.dtype)), cut.join_queries(lse).swapaxes(1, 2)
