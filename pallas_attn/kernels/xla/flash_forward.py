"""The forward pass: every program walks its list of KV blocks with the online softmax.

Milakov and Gimelshein, arXiv:1805.02867; FlashAttention-2, arXiv:2307.08691, algorithm 1. First come the full blocks,
without any mask code, then the partial ones. Blocks that are in no list are never read.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_attn.kernels.call import Call
from pallas_attn.kernels.lse import Lse
from pallas_attn.kernels.xla.key_blocks import KeyBlock, KeyBlocks
from pallas_attn.kernels.xla.softmax import SoftmaxState
from pallas_attn.kernels.xla.tiles import QueryTile
from pallas_attn.kernels.xla.tiling import Tiling


# jit: outside of jit, too, a call with known shapes compiles nothing.
@functools.partial(jax.jit, static_argnames=("scale",))
def forward(call: Call, *, scale: float) -> tuple[Array, Lse]:
    """Same contract as :func:`pallas_attn.kernels.reference.forward`."""
    query, key, value, block_mask, scores, sinks, _ = call
    tiling = Tiling.of_call(call)

    def run(at: tuple[Array, ...]) -> tuple[Array, Lse]:
        tile = QueryTile(tiling, block_mask, at)
        blocks = KeyBlocks(tile, block_mask, scores)
        q = tile.queries(query).astype(jnp.float32).reshape(tiling.tile_heads, tiling.tile_group * tiling.q_block, -1)

        def attend(state: SoftmaxState, keys: KeyBlock) -> SoftmaxState:
            logits = keys.mask(blocks.logits(q, key, keys, scale))
            return state.attend(logits, blocks.values(value, keys), tiling.precision)

        state = SoftmaxState.empty((tiling.tile_heads, tiling.tile_group, tiling.q_block), value.shape[-1])
        state = blocks.walk(attend, state)
        sink = None if sinks is None else tile.heads(sinks.astype(jnp.float32))[..., None]
        return state.finish(tile.is_token, sink)

    out, lse = lax.map(run, tiling.programs())
    return tiling.join_queries(out.astype(query.dtype)), tiling.join_lse(lse)
