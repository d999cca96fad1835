"""Hypothesis strategies for masks, positions, scores and whole calls, in the oracle's terms."""

import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from tests import gradient_check, oracle

small = st.integers(0, 6)
# Arrays come from seeds: hypothesis shrinks the structure around them, and a seed prints in one line.
generators = st.integers(0, 2**32 - 1).map(np.random.default_rng)


@st.composite
def q_positions(draw, batch: int, q_len: int):
    """int32 ``[B|1, T]``: consecutive from any start, padded left, right or anywhere, permuted, or all padding."""
    rng = draw(generators)
    rows = [_row(rng, q_len) for _ in range(draw(st.sampled_from([1, batch])))]
    return np.stack(rows).astype(np.int32)


@st.composite
def kv_positions(draw, batch: int, kv_heads: int, kv_len: int):
    """int32 ``[B|1, S]`` or ``[B|1, K|1, S]``, of the same kinds."""
    rng = draw(generators)
    leading = draw(st.sampled_from([(1,), (batch,), (batch, 1), (1, kv_heads), (batch, kv_heads)]))
    rows = [_row(rng, kv_len) for _ in range(np.prod(leading))]
    return np.stack(rows).reshape(*leading, kv_len).astype(np.int32)


def _row(rng: np.random.Generator, length: int) -> np.ndarray:
    positions = np.arange(length) + rng.integers(0, 8)
    match rng.integers(8):
        case 0:
            positions = np.arange(length) - rng.integers(0, length + 1)  # left padding, as -3, -2, -1, 0, 1, ...
        case 1:
            positions[length - rng.integers(0, length + 1) :] = -1
        case 2:
            positions[: rng.integers(0, length)] = -1
            positions[length - rng.integers(0, length) :] = -1
        case 3:
            positions[rng.random(length) < 0.4] = -1
        case 4:
            positions = rng.permutation(positions)
            positions[rng.random(length) < 0.2] = -1
        case 5:
            positions[:] = -1
    return positions


@st.composite
def masks(draw, batch: int, q_heads: int, kv_heads: int, q_len: int, kv_len: int, max_leaves: int = 8):
    """Any primitive, or a composition with and, or, not, nested to a depth of about three."""
    head_counts = st.sampled_from([1, kv_heads, q_heads])
    batches = st.sampled_from([1, batch])

    def segments(rng, q_batch, kv_batch, largest, is_sorted):
        ids = rng.integers(0, largest + 1, (q_batch, q_len)), rng.integers(0, largest + 1, (kv_batch, kv_len))
        return oracle.segments(*(np.sort(x, -1) if is_sorted else x for x in ids))

    leaves = st.one_of(
        st.builds(oracle.full),
        st.builds(oracle.causal),
        st.builds(oracle.sliding_window, st.integers(1, 6), small),
        st.builds(oracle.sliding_window, st.just(0), st.integers(1, 6)),
        generators.map(lambda rng: oracle.prefix(rng.integers(0, kv_len + 4, batch))),
        st.builds(oracle.sink, small),
        st.builds(oracle.chunked, st.integers(1, 9)),
        st.builds(segments, generators, batches, batches, st.integers(0, 3), st.booleans()),
        st.builds(
            lambda rng, b, heads, density: oracle.dense(rng.random((b, heads, q_len, kv_len)) < density),
            generators,
            batches,
            head_counts,
            st.sampled_from([0.05, 0.5, 0.98]),
        ),
    )
    return draw(
        st.recursive(
            leaves,
            lambda mask: st.one_of(
                st.builds(oracle.Mask.__and__, mask, mask),
                st.builds(oracle.Mask.__or__, mask, mask),
                st.builds(oracle.Mask.__invert__, mask),
            ),
            max_leaves=max_leaves,
        )
    )


@st.composite
def scores(draw, batch: int, q_heads: int, q_len: int, kv_len: int):
    """Up to three scores; biases of every broadcast pattern, in float32 or bfloat16."""

    def array(rng, *shape):
        return rng.standard_normal(shape).astype(np.float32)

    def bias(rng, *shared, dtype):
        shape = (1 if is_shared else size for is_shared, size in zip(shared, extents, strict=True))
        return oracle.bias(array(rng, *shape).astype(dtype))

    extents = (batch, q_heads, q_len, kv_len)
    kinds = st.one_of(
        st.sampled_from([0.5, 3, 50.0]).map(oracle.softcap),
        generators.map(lambda rng: oracle.alibi(array(rng, q_heads) / 8)),
        st.builds(bias, generators, *[st.booleans()] * 4, dtype=st.sampled_from([jnp.float32, jnp.bfloat16])),
        generators.map(lambda rng: oracle.factor(array(rng, q_heads))),
        generators.map(lambda rng: oracle.buckets(array(rng, q_heads, oracle.BUCKETS))),
        generators.map(lambda rng: oracle.saturated(array(rng))),
    )
    return tuple(draw(st.lists(kinds, max_size=3)))


@st.composite
def programs(draw):
    """A whole call: :class:`tests.gradient_check.Case`."""
    batch, kv_heads, group = (draw(st.integers(1, 3)) for _ in range(3))
    q_len, kv_len = draw(st.integers(1, 40)), draw(st.integers(1, 50))
    q_heads = kv_heads * group
    return gradient_check.Case(
        draw(masks(batch, q_heads, kv_heads, q_len, kv_len)),
        draw(q_positions(batch, q_len)),
        draw(kv_positions(batch, kv_heads, kv_len)),
        **{"batch": batch, "q_len": q_len, "kv_len": kv_len, "q_heads": q_heads, "kv_heads": kv_heads},
        head_dim=draw(st.sampled_from([1, 16, 20, 32])),
        value_dim=draw(st.sampled_from([None, 8, 24])),
        dtype=draw(st.sampled_from(["float32", "bfloat16", "float16"])),
        scale=draw(st.sampled_from([None, -0.3])),
        block_sizes=draw(st.sampled_from([(16, 16), (16, 32), (32, 16)])),
        scores=draw(scores(batch, q_heads, q_len, kv_len)),
        sinks=draw(st.none() | generators.map(lambda rng: rng.standard_normal(q_heads).astype(np.float32))),
    )
