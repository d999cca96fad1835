"""The work of a case in floating-point operations and bytes, and its lower bound in time.

Only *active* work counts: pairs of query and key that the mask allows, and the tokens in any such pair. A pair costs
``4 D`` operations per query head forward: D multiplications and D additions each for the logit and for the weighted sum
of values. Backward it costs 2.5 times that: five matrix products instead of two, as in FlashAttention-2
(arXiv:2307.08691, section 4.1). The exponential is not counted.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

import pallas_attn as pa
from bench.machine import Peaks

_FORWARD_FLOPS = 4
_BACKWARD_FLOPS = 10
# Elements of a mask that are counted at once.
_PIECE = 2**26


@dataclasses.dataclass(frozen=True)
class Counts:
    """Allowed pairs, and the queries and keys in any of them, summed over the batch, per head."""

    pairs: int
    queries: int
    keys: int


@dataclasses.dataclass(frozen=True)
class Work:
    """``pairs`` are counted per query head; ``nbytes`` must move even if everything is read only once."""

    pairs: int
    flops: int
    nbytes: int


def count(mask: pa.masks.Mask, q_positions: Array, kv_positions: Array, batch: int) -> Counts:
    """Counts every pair, some queries at a time, so that no T x S array is held.

    Args:
      mask: shared by all heads.
      q_positions: int32 ``[B|1, T]``; kv_positions: int32 ``[B|1, S]``.
      batch: B.
    """
    if any(x.shape[1] > 1 for x in pa.masks.operands(mask)):
        raise ValueError("mask: expected one shared by all heads, got one per head")
    q_len, kv_len = q_positions.shape[1], kv_positions.shape[1]
    step = max(1, min(q_len, _PIECE // (kv_len * batch)))
    pairs = queries = 0
    seen = jnp.zeros((1, kv_len), jnp.bool_)
    for start in range(0, q_len, step):
        rows = slice(start, min(start + step, q_len))
        piece = jax.tree.map(lambda x, rows=rows: x[:, :, rows] if x.shape[2] > 1 else x, mask)
        per_query, keys = _look(piece, q_positions[:, rows], kv_positions)
        copies = batch // per_query.shape[0]
        pairs += copies * sum(map(int, per_query.sum(1, dtype=jnp.uint32)))
        queries += copies * int((per_query > 0).sum())
        seen = seen | keys
    return Counts(pairs, queries, batch // seen.shape[0] * int(seen.sum()))


@jax.jit
def _look(mask, q_positions, kv_positions) -> tuple[Array, Array]:
    allowed = mask.dense_array(q_positions, kv_positions)[:, 0]
    return allowed.sum(-1, dtype=jnp.int32), allowed.any(1)


def attention_work(
    counts: Counts,
    *,
    q_heads: int,
    kv_heads: int,
    head_dim: int,
    itemsize: int,
    kv_itemsize: float | None = None,
    backward: bool = False,
) -> Work:
    """The work of attention over ``counts``; keys and values have the same head size.

    ``kv_itemsize``: bytes per number of keys and values, scales included, if it differs from ``itemsize``.

    Forward reads q, k and v and writes out. Backward reads these four, the derivative of out and the logsumexp
    (float32), and writes the derivatives of q, k and v.
    """
    pairs = counts.pairs * q_heads
    q_bytes = counts.queries * q_heads * head_dim * itemsize
    kv_bytes = round(counts.keys * kv_heads * head_dim * (kv_itemsize or itemsize))
    if backward:
        lse_bytes = counts.queries * q_heads * 4
        return Work(pairs, _BACKWARD_FLOPS * head_dim * pairs, 4 * q_bytes + 4 * kv_bytes + lse_bytes)
    return Work(pairs, _FORWARD_FLOPS * head_dim * pairs, 2 * q_bytes + 2 * kv_bytes)


def bound_seconds(flops: int | None, nbytes: int | None, peaks: Peaks) -> float:
    """The larger of the times for the operations and for the bytes at the machine's peaks."""
    return max((flops or 0) / (1e12 * peaks.tflops), (nbytes or 0) / (1e9 * peaks.gbps))
