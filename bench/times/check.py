"""Checks results before any time is shown.

The oracle is attention in float64, from the formula. It is too slow for every query of a large case, so it computes a
random sample. As in FlashAttention's tests, errors are judged against plain attention in the same dtype.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import pallas_attn as pa
from bench.times.workloads import Append, Attention, BlockClasses, MaskBuild
from tests import oracle, tolerances

_SAMPLE = 48
_SAMPLE_KEYS = 2**21
# Stands for NaN and infinity, which JSON lacks.
_NOT_A_NUMBER = float(np.finfo(np.float32).max)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The largest error, and the allowed one."""

    error: float
    allowed: float

    @property
    def correct(self) -> bool:
        return self.error <= self.allowed

    def of_peer(self) -> "Verdict":
        """The same error with a peer's larger tolerance: a peer only has to compute the same function."""
        return Verdict(self.error, tolerances.BENCH_PEER * self.allowed)


class Oracle:
    """Knows the right result of a workload and judges contenders."""

    def __init__(self, workload: Attention | MaskBuild | Append) -> None:
        match workload:
            case Attention(backward=True):
                self._judge = _gradient_judge(workload)
            case Attention():
                self._judge = _row_judge(workload)
            case MaskBuild():
                self._judge = _lists_judge(workload)
            case Append():
                self._judge = _append_judge(workload)

    def judge(self, result: Any) -> Verdict:
        """Judges a contender's result for the first set of inputs; for attention ``[B, T, N, D]``."""
        return self._judge(result)


def _verdict(differences, allowed: float) -> Verdict:
    error = max((float(np.max(np.abs(x))) for x in differences), default=0.0)
    return Verdict(error if np.isfinite(error) else _NOT_A_NUMBER, allowed)


# --- the output of attention ---


def _row_judge(workload: Attention):
    """Compares a sample of the queries that see any key; the output of every real query must be finite."""
    query, key, value = (np.asarray(x) for x in workload.arrays(0)[:3])
    scale = workload.size.head_dim**-0.5
    group = workload.size.q_heads // workload.size.kv_heads
    rows = _sample(workload)
    exact, plain = [], []
    for (b, t, n), visible in rows:
        one = (query[b, t, n], key[b, visible, n // group], value[b, visible, n // group])
        q, k, v = one[0][None, None, None], one[1][None, :, None], one[2][None, :, None]
        seen = np.ones((1, 1, 1, k.shape[1]), bool)
        exact.append(oracle.attention(q, k, v, seen, scale)[0].ravel())
        plain.append(oracle.plain_attention(q, k, v, seen, scale)[0].ravel())
    exact, plain = np.stack(exact), np.stack(plain)
    limit = tolerances.attention_limit(
        float(np.abs(plain - exact).max()), float(np.abs(exact).max()), jnp.dtype(workload.size.dtype)
    )
    where = tuple(np.array([index for index, _ in rows]).T)
    real = np.asarray(workload.q_positions >= 0)

    def judge(result: Array | np.ndarray) -> Verdict:
        got = np.asarray(result)
        if got.shape != query.shape:
            raise ValueError(f"result: expected shape {query.shape}, got {got.shape}")
        finite = np.isfinite(got.astype(np.float32)).all((2, 3)) | ~real
        sampled = got[where].astype(np.float64) - exact
        return _verdict([sampled, np.where(finite, 0.0, np.inf)], limit)

    return judge


def _sample(workload: Attention) -> list[tuple[tuple[int, int, int], np.ndarray]]:
    """The first and last query of a row and random (b, t, n), each with its visible keys, bool ``[S]``."""
    size, rng = workload.size, np.random.default_rng(0)
    rows, keys = [], 0
    for t in [0, size.q_len - 1, *rng.integers(0, size.q_len, 4 * _SAMPLE)]:
        b, n = int(rng.integers(size.batch)), int(rng.integers(size.q_heads))
        visible = np.asarray(_visible(workload.mask, workload.q_positions, workload.kv_positions, int(t)))
        visible = visible[b % visible.shape[0]]
        if visible.any():
            rows.append(((b, int(t), n), visible))
            keys += size.kv_len
        if len(rows) == _SAMPLE or keys > _SAMPLE_KEYS:
            break
    return rows


@jax.jit
def _visible(mask, q_positions, kv_positions, t):
    """The visible keys of one query, bool ``[B|1, S]``."""
    one = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, t, 1, 2) if x.shape[2] > 1 else x, mask)
    q_position = jax.lax.dynamic_slice_in_dim(q_positions, t, 1, 1)
    return one.dense_array(q_position, kv_positions)[:, 0, 0]


# --- its gradients ---


def _gradient_judge(workload: Attention):
    """Compares all gradients of one batch row and one KV head."""
    size, rng = workload.size, np.random.default_rng(0)
    b, head = int(rng.integers(size.batch)), int(rng.integers(size.kv_heads))
    group = size.q_heads // size.kv_heads
    heads = slice(head * group, (head + 1) * group)

    def slices(dq, dk, dv) -> list[np.ndarray]:
        """``[G, T, D]``, ``[S, D]``, ``[S, D]``."""
        parts = (dq[b, :, heads].swapaxes(0, 1), dk[b, :, head], dv[b, :, head])
        return [np.asarray(x).astype(np.float64) for x in parts]

    query, key, value, cotangent = workload.arrays(0)
    arguments = [query[b, :, heads], key[b, :, head], value[b, :, head], cotangent[b, :, heads]]
    mask, q_positions, kv_positions = jax.tree.map(
        lambda x: x[b % x.shape[0]][None], (workload.mask, workload.q_positions, workload.kv_positions)
    )
    visible = np.asarray(mask.dense_array(q_positions, kv_positions))[0, 0]
    scale = size.head_dim**-0.5
    exact = _exact_gradients([np.asarray(x).astype(np.float64) for x in arguments], visible, scale)
    plain = _plain_gradients(arguments, jnp.asarray(visible), scale)
    limits = [
        tolerances.gradient_limit(float(np.abs(p - e).max()), float(np.abs(e).max()), jnp.dtype(size.dtype))
        for p, e in zip(plain, exact, strict=True)
    ]

    def judge(result) -> Verdict:
        got = slices(*result)
        verdicts = [_verdict([g - e], limit) for g, e, limit in zip(got, exact, limits, strict=True)]
        # Gradients may be 0 everywhere, such as those of queries that see one key.
        return max(verdicts, key=lambda verdict: verdict.error / max(verdict.allowed, np.finfo(float).tiny))

    return judge


def _exact_gradients(arrays, visible, scale) -> list[np.ndarray]:
    """FlashAttention-2 (arXiv:2307.08691), section 2.2, in float64, of query ``[T, G, D]``, key ``[S, D]``, ..."""
    query, key, value, cotangent = arrays
    d_query, d_key, d_value = [], np.zeros_like(key), np.zeros_like(value)
    for q, do in zip(query.swapaxes(0, 1), cotangent.swapaxes(0, 1), strict=True):
        logits = np.where(visible, scale * (q @ key.T), -np.inf)
        peak = logits.max(1, keepdims=True, initial=-1e300)
        weights = np.exp(logits - peak)
        total = weights.sum(1, keepdims=True)
        weights /= np.where(total > 0, total, 1)
        d_value += weights.T @ do
        d_weights = do @ value.T
        d_logits = weights * (d_weights - (weights * d_weights).sum(1, keepdims=True))
        d_query.append(scale * (d_logits @ key))
        d_key += scale * (d_logits.T @ q)
    return [np.stack(d_query), d_key, d_value]


def _plain_gradients(arrays, visible, scale) -> list[np.ndarray]:
    """Gradients of plain attention in the inputs' dtype, with float32 sums."""

    def attend(query, key, value):
        logits = scale * jnp.einsum("tgd,sd->gts", query, key, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(jnp.where(visible[None], logits, -1e30), axis=-1)
        weights = jnp.where(visible[None], weights, 0).astype(query.dtype)
        out = jnp.einsum("gts,sd->tgd", weights, value, preferred_element_type=jnp.float32)
        return out.astype(query.dtype)

    *inputs, cotangent = arrays
    d_query, d_key, d_value = jax.jit(lambda do, *qkv: jax.vjp(attend, *qkv)[1](do))(cotangent, *inputs)
    return [np.asarray(x).astype(np.float64) for x in (d_query.swapaxes(0, 1), d_key, d_value)]


# --- lists, caches ---


def block_classes(workload: MaskBuild, q_block: int, kv_block: int) -> np.ndarray:
    """The class of every block of the first batch row, ``[nq, nk]``, from every pair."""
    x = workload.attention
    q_positions, kv_positions = x.q_positions[:1], x.kv_positions[:1]
    mask = jax.tree.map(lambda operand: operand[:1], x.mask)
    visible = np.asarray(mask.dense_array(q_positions, kv_positions))
    return oracle.block_classes(visible, np.asarray(q_positions), np.asarray(kv_positions), q_block, kv_block)[0, 0]


def _lists_judge(workload: MaskBuild):
    """Counts the blocks of the first batch row whose class differs."""

    def judge(result: BlockClasses) -> Verdict:
        expected = block_classes(workload, result.q_block, result.kv_block)
        return Verdict(float((result.classes != expected).sum()), 0.0)

    return judge


def _append_judge(workload: Append):
    """Checks that the new tokens are in their slots and nothing else has changed."""
    size, before = workload.size, workload.state().view()
    key, value, positions = (np.asarray(x) for x in workload.tokens)

    def judge(result: pa.caches.KVCache) -> Verdict:
        rows, after = np.arange(size.batch)[:, None], result.view()
        slots = workload.lengths[:, None] + np.arange(size.new)
        differences = []
        for old, new, written in (
            (before.key, after.key, key),
            (before.value, after.value, value),
            (before.positions[:, 0], after.positions[:, 0], positions),
        ):
            expected = np.array(old)
            expected[rows, slots] = written
            differences.append(np.asarray(new).astype(np.float32) - expected.astype(np.float32))
        return _verdict(differences, 0.0)

    return judge
