"""The backward pass: one suite that every implementation runs.

To add a case, add a line to ``CASES``. Missing queries and keys hold NaN in all of them, as do the gradients of missing
outputs, and the gradient of lse is never 0.
"""

import dataclasses
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_attn as pa
from tests import oracle
from tests.attention_check import (
    EMPTY_ROW,
    HOLES,
    KERNELS,
    LAST,
    LEFT,
    PERMUTED,
    Q_BOTH,
    RIGHT,
    B,
    K,
    N,
    S,
    T,
    assert_same_bits,
    dense,
    options,
    segments,
)
from tests.gradient_check import Case, backward_blocks, check, implementations, normal
from tests.marks import default_emitters
from tests.oracle import positions

# Each feature once, at small odd sizes.
CASES = {
    "1x1": Case(q_len=1, kv_len=1),
    "63x63, as many key heads, D 80": Case(oracle.causal(), batch=1, q_len=63, kv_len=63, q_heads=2, head_dim=80),
    "113x203, groups of three, D 96, bfloat16": Case(
        oracle.causal(), batch=1, q_len=113, kv_len=203, q_heads=6, head_dim=96, block_sizes=(32, 64), dtype="bfloat16"
    ),
    "one key head, D 64": Case(oracle.causal(), LAST, kv_heads=1, head_dim=64),
    "D 192, Dv 128, float16": Case(oracle.causal(), LAST, batch=1, head_dim=192, value_dim=128, dtype="float16"),
    "window": Case(oracle.sliding_window(7, 2), LAST),
    "prefix": Case(oracle.prefix(np.array([17, 3])) | oracle.causal()),
    "sink": Case(oracle.sink(3) | oracle.sliding_window(5), LAST),
    "chunked": Case(oracle.chunked(10) & oracle.causal(), LAST),
    "segments": Case(segments(B) & oracle.causal(), LAST),
    "dense, per query head": Case(dense(B, N, T, S)),
    "operands of every kind": Case(~(dense(1, K, T, 1) & dense(B, N, 1, S)) & dense(1, 1, T, S) | segments(1), LAST),
    "nothing": Case(~oracle.full()),
    "left padding, bfloat16": Case(oracle.causal(), LEFT[:, S - T :], LEFT, dtype="bfloat16"),
    "right padding, float16": Case(oracle.causal(), RIGHT[:, :T], RIGHT, dtype="float16"),
    "missing queries in full blocks": Case(oracle.full(), Q_BOTH),
    "rows of nothing but padding": Case(oracle.full(), np.stack([positions(T, left=T), positions(T)]), EMPTY_ROW),
    "key positions per head": Case(oracle.causal(), LAST, HOLES),
    "negative scale": Case(oracle.causal(), LAST, LEFT, scale=-0.7),
    "default block sizes": Case(oracle.causal(), LAST, LEFT, block_sizes=None),
}

SLOW_CASES = {
    "1x203": Case(oracle.causal(), np.array([[150]], np.int32), q_len=1, kv_len=203),
    "113x203, D 80, float16": Case(
        oracle.causal(), positions(113, start=90)[None], batch=1, q_len=113, kv_len=203, head_dim=80, dtype="float16"
    ),
    "113x203, default block sizes": Case(
        oracle.causal(), batch=1, q_len=113, kv_len=203, head_dim=64, block_sizes=None, dtype="bfloat16"
    ),
    "D 256": Case(oracle.causal(), LAST, batch=1, head_dim=256),
    "D 5, Dv 1, one head": Case(oracle.causal(), LAST, q_heads=1, kv_heads=1, head_dim=5, value_dim=1),
    "dense, per key head": Case(dense(B, K, T, S)),
    "dense, shared by the batch": Case(dense(1, 1, T, S, density=0.1)),
    "queries before the keys": Case(oracle.causal(), kv_positions=positions(S, start=8)[None]),
    "permuted keys": Case(oracle.sliding_window(8), LAST, PERMUTED),
    "key positions per head, mask per query head": Case(oracle.causal() & dense(B, N, T, S), Q_BOTH + 10, HOLES),
    "key positions for one head": Case(oracle.causal(), LAST, HOLES[:, :1]),
    "scale 0": Case(oracle.causal(), scale=0.0),
    "logits of 1e4": Case(oracle.causal(), LAST, query_size=1e4),
    "blocks longer than the sequence": Case(oracle.causal(), LAST, LEFT, block_sizes=(64, 128)),
    "long query blocks": Case(oracle.causal(), LAST, LEFT, block_sizes=(32, 16)),
    "long key blocks": Case(oracle.causal(), LAST, LEFT, block_sizes=(16, 32)),
    "segments, bfloat16": Case(segments(B) & oracle.causal(), LAST, dtype="bfloat16"),
    "dense, per query head, float16": Case(dense(B, N, T, S), dtype="float16"),
    "key positions per head, bfloat16": Case(oracle.causal(), LAST, HOLES, dtype="bfloat16"),
}

# The interpreter is slow: these cover most of its failures. The slow suite runs all.
ALSO_INTERPRETED = {
    "1x1",
    "63x63, as many key heads, D 80",
    "dense, per query head",
    "left padding, bfloat16",
    "missing queries in full blocks",
    "rows of nothing but padding",
    "key positions per head",
    "default block sizes",
}
ALSO_REFERENCE = {"one key head, D 64", "missing queries in full blocks", "key positions per head", "nothing"}


@pytest.mark.parametrize(
    ("name", "implementation"),
    [
        pytest.param(name, *parameter.values, marks=parameter.marks)
        for name in CASES | SLOW_CASES
        for how, quick in (("xla", CASES.keys()), ("interpreted", ALSO_INTERPRETED), ("reference", ALSO_REFERENCE))
        for parameter in implementations(*([how] if name in quick else []), slow=() if name in quick else (how,))
    ],
)
def test_equals_the_oracle(name, implementation):
    check((CASES | SLOW_CASES)[name], implementation, seed=zlib.crc32(name.encode()))


@pytest.mark.slow
@pytest.mark.parametrize("implementation", implementations("reference", "xla", "interpreted"))
@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128])
@pytest.mark.parametrize(("q_len", "kv_len"), [(1, 203), (63, 63), (113, 203)])
def test_equals_the_oracle_at_every_length_and_head_size(q_len, kv_len, head_dim, implementation):
    """Cycles through dtypes, value sizes, heads and block sizes."""
    turn = [1, 63, 113].index(q_len) + [32, 64, 80, 96, 128].index(head_dim)
    q_heads, kv_heads = [(2, 1), (4, 2), (3, 3)][turn % 3]
    case = Case(
        oracle.causal(),
        positions(q_len, start=kv_len - q_len, left=q_len // 5)[None],
        positions(kv_len, right=kv_len // 7)[None],
        batch=1,
        q_len=q_len,
        kv_len=kv_len,
        q_heads=q_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        value_dim=[None, 64, None, 48][turn % 4],
        dtype=["float32", "bfloat16", "float16"][turn % 3],
        block_sizes=[(32, 32), (64, 32), (16, 64)][turn % 3],
    )
    check(case, implementation, seed=turn)


# Repeats.

EVERYTHING = Case(
    oracle.causal() & ~dense(B, N, T, S, density=0.1),
    LAST,
    LEFT,
    scores=(oracle.alibi(normal(N)), oracle.softcap(3.0), oracle.bias(normal(1, 1, T, S))),
    sinks=normal(N),
)


@KERNELS
def test_the_same_call_gives_the_same_bits(implementation):
    with backward_blocks((16, 16)):
        program = EVERYTHING.both_passes(implementation)
        inputs = EVERYTHING.complete()
        expected = program(*inputs)
        for _ in range(100):
            assert_same_bits(program(*inputs), expected)


@default_emitters
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_bit(side):
    """A block of padding at the start or the end."""
    slopes, bias = normal(N), normal(B, N, 32, 48)
    before = 16 if side == "left" else 0
    case = Case(oracle.causal(), q_len=32, kv_len=48, q_positions=positions(32, start=16)[None])
    case = dataclasses.replace(case, kv_positions=positions(48)[None], scores=(oracle.alibi(slopes), oracle.bias(bias)))

    def pad(x: np.ndarray, axes: tuple[int, ...], value: float) -> np.ndarray:
        widths = [(before, 16 - before) if axis in axes else (0, 0) for axis in range(x.ndim)]
        return np.pad(x, widths, constant_values=value)

    q_positions, kv_positions = (pad(x, (1,), -1) for x in case.geometry)
    padded_bias = pad(bias, (2, 3), np.nan)
    padded = dataclasses.replace(
        case,
        **{"q_len": 48, "kv_len": 64, "q_positions": q_positions, "kv_positions": kv_positions},
        scores=(oracle.alibi(slopes), oracle.bias(padded_bias)),
    )
    arrays, d_out, d_lse = case.complete()
    more = arrays._replace(
        **{name: pad(getattr(arrays, name), (1,), np.nan) for name in ("query", "key", "value")},
        scores=[slopes, padded_bias],
    )
    expected = case.both_passes("xla")(arrays, d_out, d_lse)
    (out, lse), gradients = padded.both_passes("xla")(more, pad(d_out, (1,), np.nan), pad(d_lse, (2,), np.nan))

    def cut(x: np.ndarray, *axes: int) -> np.ndarray:
        for axis in axes:
            x, added = np.split(np.roll(x, -before, axis), [-16], axis)
            assert (added[np.isfinite(added)] == 0).all()
        return x

    gradients = gradients._replace(
        **{name: cut(getattr(gradients, name), 1) for name in ("query", "key", "value")},
        scores=[gradients.scores[0], cut(gradients.scores[1], 2, 3)],
    )
    assert_same_bits(((cut(out, 1), cut(lse, 2)), gradients), expected)


# Memory.


def test_no_array_of_queries_times_keys():
    length, heads, head_dim = 8192, 2, 32
    token = jax.ShapeDtypeStruct((1, length, heads, head_dim), jnp.float32)

    def loss(query, key, value):
        return (pa.attention(query, key, value, pa.masks.causal(), implementation="xla") ** 2).sum()

    compiled = jax.jit(jax.value_and_grad(loss, (0, 1, 2))).lower(token, token, token).compile()
    temporary = compiled.memory_analysis().temp_size_in_bytes
    assert temporary < 8 * token.size * 4, "a few arrays of the tokens' size and a few tiles"
    assert temporary < heads * length**2 * 4 / 20


@KERNELS
def test_only_the_inputs_the_output_and_lse_are_kept(implementation):
    """The function that ``vjp`` returns is a pytree of its residuals."""
    length = 128
    query = jax.ShapeDtypeStruct((1, length, 4, 32), jnp.bfloat16)
    key, value = (jax.ShapeDtypeStruct((1, length, 2, width), jnp.bfloat16) for width in (32, 64))

    def attend(query, key, value):
        block_mask = pa.BlockMask.from_mask(pa.masks.causal(), length, length, pa.BlockSizes(16, 16))
        return pa.attention(query, key, value, block_mask, **options(implementation))

    kept = jax.tree.leaves(jax.eval_shape(lambda *x: jax.vjp(attend, *x)[1], query, key, value))
    floats = sorted((x.shape, x.dtype.name) for x in kept if jnp.issubdtype(x.dtype, jnp.floating))
    out, lse = ((1, length, 4, 64), "bfloat16"), [((1, 4, length), "float32")] * 2
    assert floats == sorted([*((x.shape, x.dtype.name) for x in (query, key, value)), out, *lse]), "lse is a pair"
    others = [x for x in kept if not jnp.issubdtype(x.dtype, jnp.floating)]
    assert sum(x.size for x in others) <= 2 * length + 8 * (4 + 8), "positions and lists of 8 x 8 blocks"
