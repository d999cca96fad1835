"""Block-skipping attention in plain XLA: what runs without a GPU.

One program per (batch row, head of the lists, query block) walks its list of KV blocks with the online softmax (Milakov
and Gimelshein, arXiv:1805.02867; FlashAttention-2, arXiv:2307.08691, algorithm 1): first the full blocks, without any
mask code, then the partial ones. Blocks that are in no list are never read.

A tile that would reach beyond the end of an array is moved back to end with it, so that nothing is padded; what the
tile then shows a second time is masked (keys) or dropped (queries).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_attn.block_mask import BlockMask
from pallas_attn.kernels.spec import CallSpec

_LOWEST = jnp.finfo(jnp.float32).min


class _Softmax(NamedTuple):
    """The online softmax of one query tile: running maximum, sum of weights, and weighted sum of values, float32."""

    peak: Array  # [heads, group, queries]
    total: Array  # [heads, group, queries]
    acc: Array  # [heads, group, queries, Dv]


# jit: outside of jit, too, a call with known shapes compiles nothing.
@functools.partial(jax.jit, static_argnames=("scale",))
def forward(query: Array, key: Array, value: Array, block_mask: BlockMask, *, scale: float) -> tuple[Array, Array]:
    """Same contract as :func:`pallas_attn.kernels.reference.forward`."""
    batch, q_len, q_heads, head_dim = query.shape
    _, kv_len, kv_heads, value_dim = value.shape
    q_block, kv_block = min(block_mask.q_block, q_len), min(block_mask.kv_block, kv_len)
    _, list_heads, q_blocks = block_mask.num_full.shape
    # The heads that share a list are computed together: all of them, the query heads of one group, or a single one.
    heads = kv_heads if list_heads == 1 else 1
    group = 1 if list_heads == q_heads else q_heads // kv_heads
    precision = lax.Precision.HIGHEST if query.dtype == jnp.float32 else lax.Precision.DEFAULT
    query = query.reshape(batch, q_len, list_heads, heads, group, head_dim)

    def program(b: Array, m: Array, i: Array) -> tuple[Array, Array]:
        q_start = jnp.minimum(i * q_block, q_len - q_block)
        kv_head = m * kv_heads // list_heads
        q = lax.dynamic_slice(query, (b, q_start, m, 0, 0, 0), (1, q_block, 1, heads, group, head_dim))[0, :, 0]
        q = q.transpose(1, 2, 0, 3).reshape(heads, group * q_block, head_dim).astype(jnp.float32) * scale

        def tile(x: Array, kv_start: Array | int = 0) -> Array:
            """``[q_block|1, kv_block|1]`` of an operand ``[B|1, M|1, T|1, S|1]``; an axis of size 1 is shared."""
            at = (b, m * x.shape[1] // list_heads, q_start, kv_start)
            at = tuple(start if size > 1 else 0 for start, size in zip(at, x.shape, strict=True))
            return lax.dynamic_slice(x, at, (1, 1, min(q_block, x.shape[2]), min(kv_block, x.shape[3])))[0, 0]

        q_positions = tile(block_mask.q_positions[:, None, :, None])
        row = (b if block_mask.num_full.shape[0] > 1 else 0, m, i)
        indices = block_mask.indices[row]

        def load(x: Array, start: Array) -> Array:
            block = lax.dynamic_slice(x, (b, start, kv_head, 0), (1, kv_block, heads, x.shape[-1]))
            return block[0].astype(jnp.float32)

        def attend(state: _Softmax, k: Array, v: Array, allowed: Array | None) -> _Softmax:
            logits = jnp.einsum("hrd,khd->hrk", q, k, precision=precision).reshape(heads, group, q_block, kv_block)
            if allowed is not None:
                logits = jnp.where(allowed[None, None], logits, -jnp.inf)
            peak = jnp.maximum(state.peak, logits.max(-1))
            decay = jnp.exp(state.peak - peak)
            weights = jnp.exp(logits - peak[..., None])
            total = state.total * decay + weights.sum(-1)
            update = jnp.einsum("hrk,khd->hrd", weights.reshape(heads, -1, kv_block), v, precision=precision)
            acc = state.acc * decay[..., None] + update.reshape(heads, group, q_block, value_dim)
            return _Softmax(peak, total, acc)

        def full_block(slot: Array, state: _Softmax) -> _Softmax:
            start = indices[slot] * kv_block
            return attend(state, load(key, start), load(value, start), None)

        def partial_block(slot: Array, state: _Softmax) -> _Softmax:
            first = indices[slot] * kv_block
            start = jnp.minimum(first, kv_len - kv_block)
            kv_positions = tile(block_mask.kv_positions[:, :, None, :], start)
            real = (kv_positions >= 0) & (start + lax.broadcasted_iota(jnp.int32, (1, kv_block), 1) >= first)
            mask = jax.tree.map(lambda x: tile(x, start), block_mask.mask)
            allowed = jnp.broadcast_to(mask.allowed(q_positions, kv_positions) & real, (q_block, kv_block))
            # An empty slot may hold anything, NaN included, and 0 * NaN is NaN.
            v = jnp.where(real.reshape(kv_block, 1, 1), load(value, start), 0.0)
            return attend(state, load(key, start), v, allowed)

        state = _Softmax(
            jnp.full((heads, group, q_block), _LOWEST),
            jnp.zeros((heads, group, q_block), jnp.float32),
            jnp.zeros((heads, group, q_block, value_dim), jnp.float32),
        )
        num_full = block_mask.num_full[row]
        state = lax.fori_loop(0, num_full, full_block, state)
        state = lax.fori_loop(num_full, block_mask.num_active[row], partial_block, state)
        return _finish(state, (q_positions >= 0).reshape(1, 1, q_block))

    grid = (batch, list_heads, q_blocks)
    where = jnp.unravel_index(jnp.arange(batch * list_heads * q_blocks, dtype=jnp.int32), grid)
    out, lse = lax.map(lambda at: program(*at), where)
    out = out.astype(query.dtype).reshape(*grid, heads, group, q_block, value_dim).transpose(0, 2, 5, 1, 3, 4, 6)
    lse = lse.reshape(*grid, heads, group, q_block).transpose(0, 2, 5, 1, 3, 4)
    out = _drop_overlap(out, q_len).reshape(batch, q_len, q_heads, value_dim)
    lse = _drop_overlap(lse, q_len).reshape(batch, q_len, q_heads)
    return out, lse.swapaxes(1, 2)


def _finish(state: _Softmax, real: Array) -> tuple[Array, Array]:
    """Normalises once, at the end. A query that is padding, or that sees no key, gets 0 and -inf."""
    seen = (state.total != 0) & real  # not > 0: what is not a number shows
    total = jnp.where(seen, state.total, 1.0)
    out = jnp.where(seen[..., None], state.acc / total[..., None], 0.0)
    return out, jnp.where(seen, state.peak + jnp.log(total), -jnp.inf)


def _drop_overlap(x: Array, q_len: int) -> Array:
    """Joins query tiles ``[B, blocks, q_block, ...]`` to ``[B, T, ...]``; the last one was moved back to end at T."""
    q_blocks, q_block = x.shape[1:3]
    tail = q_len - (q_blocks - 1) * q_block
    head = x[:, :-1].reshape(x.shape[0], -1, *x.shape[3:])
    return jnp.concatenate([head, x[:, -1, q_block - tail :]], axis=1) if tail < q_block else x


def unavailable() -> None:
    """XLA runs everywhere."""


def unsupported(spec: CallSpec) -> None:
    """Serves every call."""
