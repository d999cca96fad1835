"""return_key_weights: how much probability every key got, against a loop over all pairs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_attn as pa
from tests import oracle, tolerances
from tests.attention_check import BOTH, EMPTY_ROW, HOLES, LAST, LEFT, Q_BOTH, B, K, N, S, T, dense, options
from tests.gradient_check import Case
from tests.oracle import positions
from tests.test_quantized_attention import arrays_of, quantize, stands_for

CAUSAL = oracle.causal()
rng = np.random.default_rng(8)
SINKS = rng.standard_normal(N).astype(np.float32)
SCORES = (oracle.softcap(2.0), oracle.bias(rng.standard_normal((B, N, T, S)).astype(np.float32)))
IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["reference", "xla"])

CASES = {
    "full": Case(),
    "full blocks": Case(q_len=32, kv_len=48),
    "causal, left padding": Case(CAUSAL, LAST, LEFT),
    "decode": Case(CAUSAL, LAST[:, -1:], LEFT, q_len=1),
    "decode, three queries, one missing": Case(CAUSAL, np.array([[-1, 20, 36]], np.int32), LEFT, q_len=3),
    "queries that are not there": Case(CAUSAL, Q_BOTH + (Q_BOTH >= 0) * 12, BOTH),
    "a row without keys": Case(CAUSAL, LAST, EMPTY_ROW),
    "empty slots per head": Case(CAUSAL, LAST, HOLES),
    "a mask per query head": Case(dense(1, N, T, S)),
    "a mask per key head": Case(dense(B, K, T, S)),
    "one key head": Case(CAUSAL, LAST, LEFT, kv_heads=1),
    "as many key heads": Case(CAUSAL, LAST, LEFT, kv_heads=N),
    "sinks": Case(CAUSAL, LAST, LEFT, sinks=SINKS),
    "decode, sinks": Case(CAUSAL, LAST[:, -1:], LEFT, q_len=1, sinks=SINKS),
    "scores": Case(CAUSAL, LAST, LEFT, scores=SCORES),
    "scores and sinks": Case(CAUSAL, LAST, LEFT, scores=SCORES, sinks=SINKS),
    "bfloat16": Case(CAUSAL, LAST, LEFT, dtype="bfloat16"),
}


def call(case: Case, implementation: str, query, key, value, page_table=None, **changes) -> pa.AttentionOutput:
    arguments = {
        "mask": case.mask.build(pa.masks),
        "q_positions": case.q_positions,
        "kv_positions": case.kv_positions,
        "scores": [score.build(pa.scores) for score in case.scores],
        "sinks": case.sinks,
        "page_table": page_table,
        "return_key_weights": True,
        "block_sizes": pa.BlockSizes(16, 16),
    }
    return pa.attention(query, key, value, **arguments | changes, **options(implementation))


def expected_of(case: Case, query, key, value) -> np.ndarray:
    _, lse = oracle.attention(query, key, value, case.visible, case.factor, case.scores, case.sinks, case.pairs)
    return oracle.key_weights(query, key, case.visible, case.factor, lse, case.scores, case.pairs)


@IMPLEMENTATIONS
@pytest.mark.parametrize("name", CASES)
def test_equals_a_loop_over_pairs(name, implementation):
    case = CASES[name]
    arrays = case.arrays(0)
    actual = call(case, implementation, *arrays)
    assert actual.lse is None, "what was not asked for is None"
    assert actual.key_weights.dtype == jnp.float32
    assert actual.key_weights.shape == (case.batch, case.kv_heads, case.kv_len)
    expected = expected_of(case, *arrays)
    np.testing.assert_allclose(actual.key_weights, expected, rtol=0, atol=tolerances.KEY_WEIGHTS)
    unseen = ~case.visible.reshape(case.batch, case.kv_heads, -1, case.kv_len).any(2)
    assert (np.asarray(actual.key_weights)[unseen] == 0).all()


@IMPLEMENTATIONS
@pytest.mark.parametrize("name", ["full", "full blocks", "decode", "queries that are not there"])
def test_they_sum_to_the_number_of_queries_that_see_a_key(name, implementation):
    case = CASES[name]
    seeing = case.visible[:, :1].any(-1).sum(-1)  # all heads see alike
    total = np.asarray(call(case, implementation, *case.arrays(0)).key_weights).sum(-1)
    np.testing.assert_allclose(total, np.broadcast_to(seeing, total.shape), rtol=tolerances.KEY_WEIGHTS)


@IMPLEMENTATIONS
@pytest.mark.parametrize("kind", ["int8", "float8_e4m3fn", "int4"])
def test_of_quantised_and_paged_keys(kind, implementation):
    case = Case(CAUSAL, LAST, np.stack([positions(48, left=9), positions(48, left=20)]), kv_len=48, sinks=SINKS)
    query, key, value = case.arrays(0)
    table = np.array([[5, 2, 1], [0, 6, 3]], np.int32)
    pools = [np.full((7, 16, K, 32), np.nan, np.float32) for _ in "kv"]
    for pool, x in zip(pools, (key, value), strict=True):
        pool[table] = x.reshape(B, 3, 16, K, 32)
    pools = [quantize(pool, kind) for pool in pools]
    key, value = (oracle.gather(stands_for(pool), table) for pool in pools)
    actual = call(case, implementation, query, *pools, table)
    expected = expected_of(case, query, key, value)
    np.testing.assert_allclose(actual.key_weights, expected, rtol=0, atol=tolerances.KEY_WEIGHTS)


@IMPLEMENTATIONS
def test_they_are_beside_out_and_lse_which_do_not_change(implementation):
    case = CASES["scores and sinks"]
    arrays = case.arrays(0)
    both = call(case, implementation, *arrays, return_lse=True)
    alone = call(case, implementation, *arrays, return_lse=True, return_key_weights=False)
    np.testing.assert_array_equal(both.out, alone.out)
    np.testing.assert_array_equal(both.lse, alone.lse)
    assert alone.key_weights is None


@pytest.mark.parametrize("name", ["causal, left padding", "decode"])
def test_they_cost_nothing_where_nobody_asks(name):
    case = CASES[name]
    # A shape that nothing else has.
    arrays = case.arrays(0)
    weights = ("f32", case.batch * case.kv_heads * case.kv_len)

    def compiled(asked: bool) -> str:
        program = jax.jit(lambda *x: call(case, "xla", *x, return_key_weights=asked, return_lse=True))
        return program.lower(*arrays).compile().as_text()

    assert weights in arrays_of(compiled(True))
    assert weights not in arrays_of(compiled(False))


@pytest.mark.parametrize("shared", [(), ("key", "value"), ("query",)], ids=["nothing", "keys and values", "the query"])
def test_vmap_equals_a_loop(shared):
    stacks = [CASES["decode, sinks"].arrays(seed) for seed in range(3)]
    arrays = dict(zip(("query", "key", "value"), map(np.stack, zip(*stacks, strict=True)), strict=True))
    axes = {name: None if name in shared else 0 for name in arrays}
    arrays = {name: x[0] if name in shared else x for name, x in arrays.items()}

    def attend(arrays):
        return call(CASES["decode, sinks"], "xla", *(arrays[name] for name in ("query", "key", "value")))

    actual = jax.vmap(attend, (axes,))(arrays)
    for index in range(3):
        expected = attend({name: x if name in shared else x[index] for name, x in arrays.items()})
        for a, b in zip((actual.out, actual.key_weights), (expected.out, expected.key_weights), strict=True):
            np.testing.assert_allclose(a[index], b, rtol=0, atol=tolerances.KEY_WEIGHTS)


@pytest.mark.parametrize("chunk", [None, 1, 2])
def test_decode_has_them_from_the_same_pass(chunk):
    """No product more than the two of attention, and the same weights however rows are cut into pieces."""
    case = CASES["decode, sinks"]
    arrays = case.arrays(0)
    sizes = pa.BlockSizes(16, 16, chunk=chunk)

    def products(asked: bool) -> int:
        program = jax.make_jaxpr(lambda *x: call(case, "xla", *x, return_key_weights=asked, block_sizes=sizes))
        return str(program(*arrays)).count("dot_general[")

    assert products(True) == products(False) == 2
    actual = call(case, "xla", *arrays, block_sizes=sizes).key_weights
    np.testing.assert_allclose(actual, expected_of(case, *arrays), rtol=0, atol=tolerances.KEY_WEIGHTS)


def test_values_are_not_read_twice():
    """Values of NaN make every output NaN and leave the weights as they are."""
    case = CASES["full"]
    query, key, value = case.arrays(0)
    expected = call(case, "xla", query, key, value)
    actual = call(case, "xla", query, key, np.full_like(value, np.nan))
    assert np.isnan(actual.out).all()
    np.testing.assert_array_equal(actual.key_weights, expected.key_weights)


def test_what_is_not_a_number_shows():
    case = CASES["full"]
    query, key, value = case.arrays(0)
    query[0, 3, 0] = np.nan
    weights = call(case, "xla", query, key, value).key_weights
    assert np.isnan(weights[0, 0]).all()
    assert np.isfinite(weights[0, 1]).all()
    assert np.isfinite(weights[1]).all()
