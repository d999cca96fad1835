"""Attention written from its definition: the readable oracle, differentiable by JAX, of any order.

    out_i = sum_j p_ij v_j,    p_ij = exp(s_ij - lse_i),    lse_i = log(sum_j exp(s_ij) + exp(sink)),
    s_ij = score(scale * q_i . k_j)

over the keys j that query i may see. It holds the whole T x S matrix, so its memory grows with T times S.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from pallas_attn import pointwise
from pallas_attn import scores as score_algebra
from pallas_attn.block_mask import BlockMask
from pallas_attn.kernels.call import Call, CallSpec
from pallas_attn.kernels.lse import Lse
from pallas_attn.kernels.rounding import rounded
from pallas_attn.masks import repeat_heads
from pallas_attn.quantized import KVArray, QuantizedArray


def forward(call: Call, *, scale: float, return_key_weights: bool = False) -> tuple[Any, ...]:
    """Plain attention, computed in float32.

    Args:
      call: its lists are not used. A page that the pool does not have is read as the nearest one.
      scale: factor of the logits.
      return_key_weights: return :func:`key_weights` too.

    Returns:
      out ``[B, T, N, Dv]`` in query's dtype, and lse. A query that sees no key gets 0, and -inf (with
      a sink: the sink); one that is padding gets 0 and -inf.
    """
    query, key, value, block_mask, _, sinks, page_table = call
    (batch, q_len, q_heads, _), kv_heads = query.shape, key.shape[2]
    real_query = (block_mask.q_positions >= 0)[:, None, :, None]  # [B|1, 1, T, 1]
    logits = _logits(call, scale)
    sink = jnp.full((q_heads,), -jnp.inf, jnp.float32) if sinks is None else sinks.astype(jnp.float32)
    sink = jnp.where(real_query, sink[None, :, None, None], -jnp.inf)

    peak = jnp.maximum(jnp.max(logits, -1, keepdims=True), sink)
    peak = jax.lax.stop_gradient(jnp.where(peak == -jnp.inf, 0.0, peak))
    weights = jnp.exp(logits - peak)
    total = weights.sum(-1, keepdims=True) + jnp.exp(sink - peak)
    seen = total != 0  # !=, not >, so that NaN propagates
    total = jnp.where(seen, total, 1.0)
    probabilities = (weights / total).reshape(batch, kv_heads, q_heads // kv_heads, q_len, -1)
    value = _real_keys(value, block_mask, page_table)
    out = jnp.einsum("bkgts,bskd->btkgd", probabilities, value, precision=jax.lax.Precision.HIGHEST)
    out = out.reshape(batch, q_len, q_heads, -1)
    out = jnp.where(seen.swapaxes(1, 2), out, 0.0)  # for the gradient, where that of the output may be NaN
    lse = Lse(jnp.where(seen, peak, -jnp.inf)[..., 0], jnp.log(total)[..., 0])
    out = out.astype(query.dtype)
    if not return_key_weights:
        return out, lse
    return out, lse, key_weights(call, lse, scale=scale)


def key_weights(call: Call, lse: Lse, *, scale: float) -> Array:
    """How much probability every key got: ``w_s = sum_t mean_n p_ts``, over real queries and the heads of a group.

    Args:
      call, scale: as in :func:`forward`; values are not used.
      lse: of the forward pass; sinks are in it.

    Returns:
      float32 ``[B, K, S]``; 0 for a key that no query sees.
    """
    logits = _logits(call, scale)
    probabilities = jnp.exp(logits - lse.peak[..., None] - lse.log_total[..., None])
    probabilities = jnp.where(logits == -jnp.inf, 0.0, probabilities)
    batch, q_heads, q_len, kv_len = logits.shape
    kv_heads = call.key.shape[2]
    return probabilities.reshape(batch, kv_heads, q_heads // kv_heads, q_len, kv_len).mean(2).sum(2)


def _logits(call: Call, scale: float) -> Array:
    """float32 ``[B, N, T, S]``; -inf for a key that the query does not see."""
    query, key, _, block_mask, scores, _, page_table = call
    (batch, q_len, q_heads, _), kv_heads = query.shape, key.shape[2]
    q_positions = block_mask.q_positions[:, None, :, None]  # [B|1, 1, T, 1]
    kv_positions = block_mask.kv_positions[:, :, None, :]  # [B|1, 1|K, 1, S]
    query_f32 = jnp.where((q_positions >= 0).swapaxes(1, 2), query.astype(jnp.float32) * scale, 0.0)
    query_f32 = query_f32.reshape(batch, q_len, kv_heads, q_heads // kv_heads, -1)
    key = _real_keys(key, block_mask, page_table)

    allowed = block_mask.mask.dense_array(block_mask.q_positions, block_mask.kv_positions)
    allowed = repeat_heads(allowed, q_heads)  # [B|1, N|1, T, S]

    logits = jnp.einsum("btkgd,bskd->bkgts", query_f32, key, precision=jax.lax.Precision.HIGHEST)
    logits = logits.reshape(batch, q_heads, q_len, -1)
    if scores:
        # Twice, so that derivatives of what is not allowed are those of constants.
        operands = pointwise.where_live(scores, allowed)
        heads = jnp.arange(q_heads, dtype=jnp.int32)[None, :, None, None]
        rows = jnp.arange(batch, dtype=jnp.int32)[:, None, None, None]
        kv_positions = repeat_heads(kv_positions, q_heads)
        logits = jnp.where(allowed, logits, 0.0)
        logits = rounded(score_algebra.apply(operands, logits, q_positions, kv_positions, heads, rows))
    return jnp.where(allowed, logits, -jnp.inf)


def _real_keys(x: KVArray, block_mask: BlockMask, page_table: Array | None) -> Array:
    """Keys or values in a row, float32 ``[B, S, K, D]``; 0 in empty slots."""
    x = x.dequantize() if isinstance(x, QuantizedArray) else x.astype(jnp.float32)
    if page_table is not None:
        x = x[jnp.clip(page_table, 0, x.shape[0] - 1)]  # [B, S // page, page, K, D]
        x = x.reshape(x.shape[0], -1, *x.shape[3:])
    # An empty slot may hold anything, NaN included, and 0 * NaN is NaN.
    return jnp.where((block_mask.kv_positions >= 0).swapaxes(1, 2)[..., None], x, 0.0)


def unavailable() -> None:
    """XLA runs everywhere."""


def unsupported(spec: CallSpec) -> None:
    """Serves every call."""
