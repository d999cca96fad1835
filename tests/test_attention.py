"""The results of attention(): one suite that every implementation runs.

To add a case, add a line to ``CASES``. Padded queries and empty slots hold NaN in all of them.
"""

import dataclasses
import zlib

import numpy as np
import pytest
from hypothesis import Phase, given, settings

from tests import oracle, strategies
from tests.attention_check import (
    BOTH,
    EMPTY_ROW,
    EVERY_IMPLEMENTATION,
    HOLES,
    LAST,
    LEFT,
    PERMUTED,
    Q_BOTH,
    RIGHT,
    B,
    Case,
    K,
    N,
    S,
    T,
    check,
    dense,
    segments,
)
from tests.oracle import positions

# Each feature once, at small odd sizes. SLOW_CASES has variants that are unlikely to fail alone.
CASES = {
    # Lengths, with heads and head sizes.
    "1x1": Case(q_len=1, kv_len=1),
    "1x37, one key head, D 64": Case(oracle.causal(), np.array([[30]], np.int32), q_len=1, kv_heads=1, head_dim=64),
    "63x63, as many key heads, D 80": Case(oracle.causal(), batch=1, q_len=63, kv_len=63, kv_heads=4, head_dim=80),
    "113x203, groups of three, D 96": Case(
        oracle.causal(), batch=1, q_len=113, kv_len=203, q_heads=6, head_dim=96, block_sizes=(32, 64), dtype="bfloat16"
    ),
    "255x1023": Case(
        oracle.causal() & oracle.sliding_window(300),
        positions(255, start=768)[None],
        **{"batch": 1, "q_len": 255, "kv_len": 1023, "q_heads": 2, "kv_heads": 1, "block_sizes": (64, 128)},
    ),
    "D 128, Dv 80": Case(oracle.causal(), LAST, head_dim=128, value_dim=80, dtype="float16"),
    "D 256": Case(oracle.causal(), LAST, head_dim=256),
    "D 5, Dv 1, one head": Case(oracle.causal(), LAST, q_heads=1, kv_heads=1, head_dim=5, value_dim=1),
    # Masks.
    "window": Case(oracle.sliding_window(7), LAST),
    "window, left and right": Case(oracle.sliding_window(4, 9), LAST),
    "prefix": Case(oracle.prefix(np.array([17, 3])) | oracle.causal()),
    "sink": Case(oracle.sink(3) | oracle.sliding_window(5), LAST),
    "chunked": Case(oracle.chunked(10) & oracle.causal(), LAST),
    "segments": Case(segments(B) & oracle.causal(), LAST),
    "dense": Case(dense(B, 1, T, S)),
    "dense, per key head": Case(dense(B, K, T, S)),
    "dense, per query head": Case(dense(1, N, T, S)),
    "not": Case(~oracle.sliding_window(7) & oracle.causal(), LAST),
    "operands of every kind": Case(~(dense(1, K, T, 1) & dense(B, N, 1, S)) & dense(1, 1, T, S) | segments(1), LAST),
    "nothing": Case(~oracle.full()),
    "queries before the keys": Case(oracle.causal(), kv_positions=positions(S, start=8)[None]),
    # Padding and positions.
    "left padding, bfloat16": Case(oracle.causal(), LEFT[:, S - T :], LEFT, dtype="bfloat16"),
    "right padding, float16": Case(oracle.causal(), RIGHT[:, :T], RIGHT, dtype="float16"),
    "padding on both sides": Case(oracle.causal(), Q_BOTH, BOTH),
    "rows of nothing but padding": Case(oracle.full(), np.stack([positions(T, left=T), positions(T)]), EMPTY_ROW),
    "negative positions": Case(oracle.sliding_window(9), *(np.arange(x, dtype=np.int32)[None] - 12 for x in (T, S))),
    "permuted keys": Case(oracle.sliding_window(8), LAST, PERMUTED),
    "key positions per head": Case(oracle.causal(), LAST, HOLES),
    "key positions per head, operands of every kind": Case(
        dense(1, 1, T, S) & dense(1, K, T, S) | oracle.prefix(np.array([9, 5])) & dense(B, N, 1, S), LAST, HOLES
    ),
    # Scale and sizes.
    "scale 0": Case(oracle.causal(), scale=0.0),
    "negative scale": Case(oracle.causal(), LAST, LEFT, scale=-0.7),
    "logits of 1e4": Case(oracle.causal(), LAST, query_size=1e4),
    "logits of 1e4, float16": Case(oracle.causal(), LAST, query_size=1e4, dtype="float16"),
    # Block sizes.
    "long query blocks": Case(oracle.causal(), LAST, LEFT, block_sizes=(32, 16)),
    "blocks longer than the sequence": Case(oracle.causal(), LAST, LEFT, block_sizes=(64, 128)),
    "default block sizes": Case(oracle.causal(), LAST, LEFT, block_sizes=None),
}

SLOW_CASES = {
    "1x1, not seen": Case(~oracle.causal(), q_len=1, kv_len=1),
    "21x1": Case(kv_len=1),
    "window, right": Case(oracle.sliding_window(0, 5)),
    "segments, shared by the batch": Case(segments(1), LAST),
    "dense, shared by the batch": Case(dense(1, 1, T, S, density=0.1)),
    "dense, one row of keys": Case(dense(B, 1, 1, S)),
    "dense, one column of queries": Case(dense(B, 1, T, 1)),
    "far positions": Case(
        oracle.sliding_window(9, 2), *(2**31 - 40 + np.arange(x, dtype=np.int32)[None] for x in (T, S))
    ),
    "key positions per head, shared by the batch": Case(oracle.sliding_window(20), LAST, HOLES[:1]),
    "key positions per head, mask per query head": Case(oracle.causal() & dense(B, N, T, S), Q_BOTH + 10, HOLES),
    "key positions for one head": Case(oracle.causal(), LAST, HOLES[:, :1]),
    "scale, an int": Case(oracle.causal(), scale=2),
    "logits of 1e4, negative scale": Case(oracle.causal(), LAST, query_size=1e4, scale=-0.2),
    "logits of 1e4, bfloat16": Case(oracle.causal(), LAST, LEFT, query_size=1e4, dtype="bfloat16"),
    "long key blocks": Case(oracle.causal(), LAST, LEFT, block_sizes=(16, 32)),
}

LENGTHS = [(1, 1), (1, 203), (63, 63), (113, 203), (255, 1023)]
HEAD_SIZES = [32, 64, 80, 96, 128, 256]
DTYPES = ["float32", "bfloat16", "float16"]


@EVERY_IMPLEMENTATION
@pytest.mark.parametrize("name", [*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW_CASES)])
def test_equals_the_oracle(name, implementation):
    check((CASES | SLOW_CASES)[name], implementation, seed=zlib.crc32(name.encode()))


@pytest.mark.slow
@EVERY_IMPLEMENTATION
@pytest.mark.parametrize("head_dim", HEAD_SIZES)
@pytest.mark.parametrize(("q_len", "kv_len"), LENGTHS)
def test_equals_the_oracle_at_every_length_and_head_size(q_len, kv_len, head_dim, implementation):
    """Cycles through dtypes, value sizes, heads and block sizes."""
    turn = LENGTHS.index((q_len, kv_len)) + HEAD_SIZES.index(head_dim)
    q_heads, kv_heads = [(2, 1), (4, 2), (3, 3)][turn % 3 if kv_len < 1000 else 0]
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
        dtype=DTYPES[turn % 3],
        block_sizes=[(32, 32), (64, 32), (16, 64), (64, 128)][turn % 4],
    )
    check(case, implementation, seed=turn)


@pytest.mark.slow
@EVERY_IMPLEMENTATION
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["prefix", "sink", "chunked", "segments", "dense, per query head", "permuted keys"])
def test_masks_equal_the_oracle_in_half_precision(name, dtype, implementation):
    check(dataclasses.replace(CASES[name], dtype=dtype), implementation)


@pytest.mark.slow
@EVERY_IMPLEMENTATION
def test_random_masks_and_positions_equal_the_oracle(implementation):
    @settings(max_examples=40, phases=[Phase.generate])
    @given(strategies.masks(B, N, K, T, S), strategies.q_positions(B, T), strategies.kv_positions(B, K, S))
    def check_one(mask, q_positions, kv_positions):
        check(Case(mask, q_positions, kv_positions), implementation)

    check_one()
