"""Executed kernels compute attention and its gradients, and access memory as they should."""

import dataclasses

import numpy as np
import pytest

from tests import oracle
from tests.attention_check import BOTH, EMPTY_ROW, HOLES, LAST, LEFT, Q_BOTH, B, K, N, S, T, dense, segments
from tests.gradient_check import normal
from tests.lowered.calls import Case, check
from tests.lowered.execution import executed
from tests.oracle import positions

CAUSAL = oracle.causal()
TRAINING = {
    "17 queries of one key": Case(q_len=17, kv_len=1, block_sizes=(32, 16)),
    "63 tokens, as many key heads, D 80": Case(CAUSAL, batch=1, q_len=63, kv_len=63, q_heads=2, head_dim=80),
    "groups of three, Dv 48, float16": Case(CAUSAL, LAST, q_heads=6, value_dim=48, dtype="float16"),
    "full blocks, bfloat16": Case(q_len=32, kv_len=48, dtype="bfloat16"),
    "padding on both sides": Case(CAUSAL | oracle.sink(3), Q_BOTH, BOTH, block_sizes=(32, 16)),
    "rows of nothing but padding": Case(
        q_positions=np.stack([positions(T, left=T), positions(T)]), kv_positions=EMPTY_ROW
    ),
    "key positions per head, segments": Case(segments(B) & CAUSAL, LAST, HOLES, block_sizes=(16, 32)),
    "operands of every kind": Case(~(dense(1, K, T, 1) & dense(B, N, 1, S)) & dense(1, 1, T, S)),
    "a bias of every pair, sinks": Case(
        CAUSAL, LAST, LEFT, scores=(oracle.bias(normal(B, N, T, S)), oracle.softcap(2.0)), sinks=normal(N)
    ),
    "slopes, a table and a number": Case(
        oracle.sliding_window(20, 2),
        LAST,
        LEFT,
        scores=(
            oracle.alibi(np.abs(normal(N))),
            oracle.buckets(normal(N, oracle.BUCKETS)),
            oracle.saturated(np.float32(1.7)),
        ),
    ),
}
FORWARD = {
    "key weights": Case(CAUSAL, LAST, BOTH, key_weights=True),
    "key weights, a mask per head": Case(dense(1, N, T, S), LAST, HOLES, key_weights=True, block_sizes=(32, 32)),
    "key weights, D 96": Case(CAUSAL, LAST, BOTH, key_weights=True, head_dim=96),
    "key weights, D 160, with blocks of their own": Case(CAUSAL, LAST, LEFT, key_weights=True, head_dim=160),
}


@pytest.mark.parametrize("name", TRAINING)
def test_both_passes(name, watch):
    check(_with_gradients(TRAINING[name]))
    assert {"pallas_attn_forward", "pallas_attn_d_query", "pallas_attn_d_key_value"} <= watch.programs.keys()
    assert ("pallas_attn_d_score" in watch.programs) == any(x.has_array for x in TRAINING[name].scores)


@pytest.mark.parametrize("name", FORWARD)
def test_key_weights(name, watch):
    check(FORWARD[name])
    assert watch.programs.keys() == {"pallas_attn_forward", "pallas_attn_key_weights"}


@pytest.mark.parametrize("capability", [80, 90])
def test_default_block_sizes(capability):
    """They depend on the GPU."""
    with executed(capability=capability) as watch:
        check(_with_gradients(Case(CAUSAL, LAST, LEFT[:1], batch=1, kv_heads=1, block_sizes=None, dtype="bfloat16")))
        watch.assert_clean()
    assert watch.programs["pallas_attn_d_query"] > 0


def _with_gradients(case: Case) -> Case:
    return dataclasses.replace(case, gradients=True)
