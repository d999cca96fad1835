"""Executed decode kernels: the pass over shares of keys, the merge, and key weights."""

import numpy as np
import pytest

from tests import oracle
from tests.gradient_check import normal
from tests.lowered.calls import Case, check
from tests.test_decode import HOLES_PER_HEAD, RAGGED, B, S, last, live

CAUSAL = oracle.causal()


def decode(mask: oracle.Mask = CAUSAL, q_len: int = 1, lengths: tuple[int, ...] = RAGGED, **changes) -> Case:
    """A buffer of S slots per row."""
    fields = {"q_positions": last(*lengths, q_len=q_len), "kv_positions": live(*lengths), "batch": B, "kv_len": S}
    return Case(mask, q_len=q_len, **{**fields, **changes})


CASES = {
    "rows without keys": decode(lengths=(0, S, 17), key_weights=True),
    "no keys at all": decode(lengths=(0, 0, 0), key_weights=True),
    "programs of two blocks": decode(chunk=2, dtype="bfloat16", head_dim=64),
    "three programs": decode(q_len=2, shares=3, key_weights=True),
    "tiles of 33 rows": decode(q_len=11, q_heads=6, lengths=(S, 20, 0), key_weights=True, dtype="float16"),
    "a list per query head": decode(oracle.dense(normal(B, 4, 3, S) > 0), q_len=3, key_weights=True),
    "holes per key head": decode(kv_positions=HOLES_PER_HEAD, q_len=5, key_weights=True, head_dim=24, value_dim=40),
    "one list for all rows": decode(kv_positions=live(50), q_positions=last(50), key_weights=True),
    "scores and sinks": decode(
        q_len=4,
        scores=(oracle.softcap(2.0), oracle.alibi(np.abs(normal(4))), oracle.bias(normal(B, 4, 4, S))),
        sinks=normal(4),
    ),
    "default block sizes": decode(block_sizes=None, head_dim=80),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_the_oracle(name, watch):
    check(CASES[name])
    expected = {"pallas_attn_decode", "pallas_attn_merge"}
    expected |= {"pallas_attn_decode_weights"} if CASES[name].key_weights else set()
    assert watch.programs.keys() == expected


def test_gradients_after_decode(watch):
    check(decode(q_len=3, gradients=True))
    assert {"pallas_attn_decode", "pallas_attn_d_query", "pallas_attn_d_key_value"} <= watch.programs.keys()
