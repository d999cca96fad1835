"""The backward pass: every program walks the same list again and recomputes its probabilities from ``lse``.

    p = exp(s - lse),    dv += p' do,    ds = p * (do v' - delta),    dq += ds k,    dk += ds' q

with ``delta = rowsum(do * out) - dlse`` (FlashAttention-2, arXiv:2307.08691, algorithm 2). Programs run one after the
other, so one walk serves all gradients, and sums have one order: the same bits every time.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_attn import pointwise
from pallas_attn.kernels.call import Call
from pallas_attn.kernels.lse import Lse
from pallas_attn.kernels.rounding import rounded
from pallas_attn.kernels.xla.key_blocks import KeyBlock, KeyBlocks, keep_layout
from pallas_attn.kernels.xla.softmax import probabilities
from pallas_attn.kernels.xla.tiles import QueryTile
from pallas_attn.kernels.xla.tiling import Tiling
from pallas_attn.scores import Scores


class _Gradients(NamedTuple):
    """What programs add to, float32."""

    key: Array  # [B, S, K, D]
    value: Array  # [B, S, K, Dv]
    scores: Scores


@functools.partial(jax.jit, static_argnames=("scale",))
def backward(call: Call, lse: Lse, delta: Array, d_out: Array, *, scale: float) -> tuple[Array, Array, Array, Scores]:
    """Gradients of query, key, value and of the arrays of the scores.

    Args:
      call: of plain keys and values without pages; sinks are in ``lse``.
      scale: as in the forward pass.
      lse: of the forward pass.
      delta: float32 ``[B, N, T]``: ``rowsum(d_out * out) - d_lse``.
      d_out: ``[B, T, N, Dv]``.

    Returns:
      gradients of the shapes and dtypes of query, key, value and scores, with None for tables of integers.
    """
    query, key, value, block_mask, scores, *_ = call
    tiling = Tiling.of_call(call)
    dot = functools.partial(jnp.einsum, precision=tiling.precision)
    peak, log_total, delta = (x.swapaxes(1, 2) for x in (lse.peak, lse.log_total, delta))  # [B, T, N], as the queries

    def run(sums: _Gradients, at: tuple[Array, ...]) -> tuple[_Gradients, Array]:
        tile = QueryTile(tiling, block_mask, at)
        blocks = KeyBlocks(tile, block_mask, scores)
        row_peak = tile.queries(peak)
        # A query that saw nothing, or that is another program's too, has no part in any sum, whatever it holds.
        q_valid = tile.is_own & (row_peak != -jnp.inf)  # !=, not >, so that NaN propagates
        row_lse = Lse(jnp.where(q_valid, row_peak, jnp.inf)[..., None], tile.queries(log_total)[..., None])
        row_delta = jnp.where(q_valid, tile.queries(delta), 0.0)

        def rows(x: Array) -> Array:
            x = jnp.where(q_valid[..., None], tile.queries(x).astype(jnp.float32), 0.0)
            return x.reshape(tiling.tile_heads, tiling.tile_group * tiling.q_block, -1)

        q, do = rows(query), rows(d_out)

        def attend(carry, keys: KeyBlock):
            dq, sums = carry
            start, kv_positions, real, allowed = keys
            k, v = tile.keys(key, start, scale), tile.keys(value, start)
            if real is not None:
                k, v = (jnp.where(real[:, None], x, 0.0) for x in (k, v))
            logits = blocks.products(q, k)
            live = q_valid[..., None] if allowed is None else q_valid[..., None] & allowed

            score_tiles = blocks.score_operands(start)

            def scored(logits: Array, floats: Scores) -> Array:
                # Where nothing is seen an operand may hold anything, NaN included, and 0 * NaN is NaN.
                operands = pointwise.where_live(pointwise.with_floating(score_tiles, floats), live)
                return rounded(blocks.score(logits, kv_positions, operands))

            if allowed is not None:
                logits = jnp.where(allowed, logits, 0.0)
            derivative = None
            if scores:
                logits, derivative = jax.vjp(scored, logits, pointwise.floating(score_tiles))
            p = probabilities(logits, row_lse)
            if allowed is not None:
                p = jnp.where(allowed, p, 0.0)
            dp = dot("hrd,hkd->hrk", do, keep_layout(v)).reshape(p.shape)
            ds = p * (dp - row_delta[..., None])
            d_scores = sums.scores
            if derivative is not None:
                ds, d_tiles = derivative(ds)
                if allowed is not None:
                    ds = jnp.where(allowed, ds, 0.0)
                d_scores = _add_scores(tile, d_scores, d_tiles, start)
            p, ds = (x.reshape(tiling.tile_heads, -1, tiling.kv_block) for x in (p, ds))
            d_value = tile.add_to_keys(sums.value, start, dot("hrk,hrd->hkd", p, do))
            d_key = tile.add_to_keys(sums.key, start, dot("hrk,hrd->hkd", ds, q))
            return dq + dot("hrk,hkd->hrd", ds, k), _Gradients(d_key, d_value, d_scores)

        dq, sums = blocks.walk(attend, (jnp.zeros_like(q), sums))
        return sums, dq.reshape(tiling.tile_heads, tiling.tile_group, tiling.q_block, -1).astype(query.dtype)

    summed = key, value, pointwise.floating(scores)
    zeros = _Gradients(*jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), summed))
    sums, d_query = lax.scan(run, zeros, tiling.programs())
    sums = sums._replace(key=sums.key * scale)
    d_key, d_value, d_scores = jax.tree.map(lambda x, like: x.astype(like.dtype), tuple(sums), summed)
    return tiling.join_queries(d_query), d_key, d_value, d_scores


def _add_scores(tile: QueryTile, sums: Scores, tiles: Scores, start: Array) -> Scores:
    """Adds the gradients of one block's tiles to those of whole operands, and those of tables to each other."""

    def add(x: Array, gradient: Array) -> Array:
        return x + gradient.astype(jnp.float32)

    return pointwise.map_arrays(lambda x, y: tile.add_to_score_operand(x, start, y), add, sums, tiles)
