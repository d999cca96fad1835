"""How much probability every key got: a second walk over the lists, with ``lse`` known, that reads keys alone."""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_attn.kernels.call import Call
from pallas_attn.kernels.lse import Lse
from pallas_attn.kernels.xla.key_blocks import KeyBlock, KeyBlocks
from pallas_attn.kernels.xla.softmax import probabilities
from pallas_attn.kernels.xla.tiles import QueryTile
from pallas_attn.kernels.xla.tiling import Tiling


@functools.partial(jax.jit, static_argnames=("scale",))
def key_weights(call: Call, lse: Lse, *, scale: float) -> Array:
    """Same contract as :func:`pallas_attn.kernels.reference.key_weights`."""
    query, key, _, block_mask, scores, *_ = call
    tiling = Tiling.of_call(call)
    lse = jax.tree.map(lambda x: x.swapaxes(1, 2), lse)  # [B, T, N], as the queries

    def run(sums: Array, at: tuple[Array, ...]) -> tuple[Array, None]:
        tile = QueryTile(tiling, block_mask, at)
        blocks = KeyBlocks(tile, block_mask, scores)
        q = tile.queries(query).astype(jnp.float32).reshape(tiling.tile_heads, tiling.tile_group * tiling.q_block, -1)
        row_lse = jax.tree.map(lambda x: tile.queries(x)[..., None], lse)
        q_valid = tile.is_own[..., None] & (row_lse.peak != -jnp.inf)  # !=, not >, so that NaN propagates

        def add(sums: Array, keys: KeyBlock) -> Array:
            logits = blocks.logits(q, key, keys, scale)
            seen = q_valid if keys.allowed is None else q_valid & keys.allowed
            weights = jnp.where(seen, probabilities(logits, row_lse), 0.0)
            return tile.add_to_keys(sums, keys.start, weights.sum((1, 2))[..., None])

        return blocks.walk(add, sums), None

    zeros = jnp.zeros((tiling.batch, tiling.kv_len, tiling.kv_heads, 1), jnp.float32)
    sums, _ = lax.scan(run, zeros, tiling.programs())
    return sums[..., 0].swapaxes(1, 2) / tiling.group
