"""Attention written from its definition: the readable oracle, differentiable by JAX, of any order.

    out_i = sum_j p_ij v_j,    p_ij = exp(s_ij - lse_i),    lse_i = log sum_j exp(s_ij),    s_ij = scale * q_i . k_j

over the keys j that query i may see. It holds the whole T x S matrix, so its memory grows with T times S.
"""

import jax
import jax.numpy as jnp
from jax import Array

from pallas_attn.block_mask import BlockMask
from pallas_attn.kernels.spec import CallSpec


def forward(query: Array, key: Array, value: Array, block_mask: BlockMask, *, scale: float) -> tuple[Array, Array]:
    """Plain attention, float32 inside.

    Args:
      query: ``[B, T, N, D]``; key: ``[B, S, K, D]``; value: ``[B, S, K, Dv]``.
      block_mask: who sees whom; its lists are not used.
      scale: factor of the logits.

    Returns:
      out ``[B, T, N, Dv]`` in query's dtype; lse float32 ``[B, N, T]``. A query that sees no key gets 0 and -inf.
    """
    batch, q_len, q_heads, _ = query.shape
    kv_heads = key.shape[2]
    group = q_heads // kv_heads

    real = (block_mask.kv_positions >= 0).swapaxes(1, 2)[..., None]
    # An empty slot may hold anything, NaN included, and 0 * NaN is NaN.
    key, value = (jnp.where(real, x.astype(jnp.float32), 0.0) for x in (key, value))
    real_query = (block_mask.q_positions >= 0)[:, :, None, None]
    query_f32 = jnp.where(real_query, query.astype(jnp.float32), 0.0).reshape(batch, q_len, kv_heads, group, -1)

    allowed = block_mask.mask.dense_array(block_mask.q_positions, block_mask.kv_positions)
    if allowed.shape[1] == q_heads:
        allowed = allowed.reshape(-1, kv_heads, group, *allowed.shape[2:])
    else:
        allowed = allowed[:, :, None]

    logits = scale * jnp.einsum("btkgd,bskd->bkgts", query_f32, key, precision=jax.lax.Precision.HIGHEST)
    logits = jnp.where(allowed, logits, -jnp.inf)
    peak = jnp.max(logits, -1, keepdims=True)
    peak = jax.lax.stop_gradient(jnp.where(peak == -jnp.inf, 0.0, peak))
    weights = jnp.exp(logits - peak)
    total = weights.sum(-1, keepdims=True)
    seen = total != 0  # not > 0: what is not a number shows
    probabilities = weights / jnp.where(seen, total, 1.0)
    out = jnp.einsum("bkgts,bskd->btkgd", probabilities, value, precision=jax.lax.Precision.HIGHEST)
    lse = jnp.where(seen, peak + jnp.log(jnp.where(seen, total, 1.0)), -jnp.inf)
    return (
        out.reshape(batch, q_len, q_heads, -1).astype(query.dtype),
        lse.reshape(batch, q_heads, q_len),
    )


def unavailable() -> None:
    """XLA runs everywhere."""


def unsupported(spec: CallSpec) -> None:
    """Serves every call."""
