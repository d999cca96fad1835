"""Scores, forward and backward, against the oracle; and invalid scores."""

import dataclasses
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_attn as pa
from tests import oracle, tolerances
from tests.attention_check import BOTH, LAST, LEFT, Q_BOTH, B, K, N, S, T, assert_same_bits, dense, options, seeded
from tests.gradient_check import Case, check, implementations, normal
from tests.oracle import positions

EVERY_IMPLEMENTATION = pytest.mark.parametrize("implementation", implementations("reference", "xla", "interpreted"))

SLOPES = (2.0 ** -np.arange(1, N + 1)).astype(np.float32)
CAUSAL = oracle.causal()

# Full and partial blocks, padding, and blocks that reach beyond the end.
CASES = {
    "softcap": Case(CAUSAL, LAST, LEFT, scores=(oracle.softcap(2.0),)),
    "alibi": Case(CAUSAL, LAST, LEFT, scores=(oracle.alibi(SLOPES),)),
    "bias": Case(CAUSAL, LAST, LEFT, scores=(oracle.bias(normal(B, N, T, S)),)),
    "bias, a pair": Case(CAUSAL, LAST, LEFT, scores=(oracle.bias(normal(1, 1, T, S)),)),
    "bias, a key of a row": Case(CAUSAL, LAST, LEFT, scores=(oracle.bias(normal(B, 1, 1, S)),)),
    "bias, a query of a head": Case(CAUSAL, LAST, LEFT, scores=(oracle.bias(normal(1, N, T, 1)),)),
    "bias, no padding, full blocks": Case(q_len=32, kv_len=48, scores=(oracle.bias(normal(1, N, 32, 48)),)),
    "softcap, then alibi": Case(CAUSAL, LAST, LEFT, scores=(oracle.softcap(2.0), oracle.alibi(SLOPES))),
    "alibi, then softcap": Case(CAUSAL, LAST, LEFT, scores=(oracle.alibi(SLOPES), oracle.softcap(2.0))),
    "a factor per head": Case(CAUSAL, LAST, LEFT, scores=(oracle.factor(normal(N)),)),
    "a number": Case(CAUSAL, LAST, LEFT, scores=(oracle.saturated(np.float32(1.7)),)),
    "a table": Case(CAUSAL, LAST, LEFT, scores=(oracle.buckets(normal(N, oracle.BUCKETS)),)),
    "everything, bfloat16": Case(
        CAUSAL & dense(1, K, T, S, density=0.8),
        Q_BOTH + (Q_BOTH >= 0) * 12,
        BOTH,
        dtype="bfloat16",
        scores=(
            oracle.buckets(normal(N, oracle.BUCKETS, dtype=jnp.bfloat16)),
            oracle.softcap(2.0),
            oracle.factor(normal(N, dtype=jnp.bfloat16)),
            oracle.bias(normal(B, N, 1, S, dtype=jnp.bfloat16)),
            oracle.saturated(normal(dtype=jnp.bfloat16)),
            oracle.alibi(SLOPES.astype(jnp.bfloat16)),
        ),
    ),
}
SLOW_CASES = {
    "everything, as many key heads, D 80": dataclasses.replace(
        CASES["everything, bfloat16"], mask=CAUSAL, kv_heads=N, head_dim=80, dtype="float32"
    ),
    "everything, one key head, float16": dataclasses.replace(
        CASES["everything, bfloat16"], mask=CAUSAL, kv_heads=1, dtype="float16"
    ),
    "everything, default block sizes": dataclasses.replace(CASES["everything, bfloat16"], block_sizes=None),
    "everything, a mask per head": dataclasses.replace(CASES["everything, bfloat16"], mask=CAUSAL & dense(B, N, T, S)),
    "bias of logits of 1e4": Case(CAUSAL, LAST, query_size=1e4, scores=(oracle.bias(normal(B, N, T, S)),)),
    "bias, negative scale": Case(CAUSAL, LAST, scale=-0.4, scores=(oracle.bias(normal(B, N, T, S)),)),
}
ALSO_INTERPRETED = {"bias, a key of a row", "softcap, then alibi", "alibi, then softcap", "a number", "a table"}


@pytest.mark.parametrize(
    ("name", "implementation"),
    [
        pytest.param(name, *parameter.values, marks=parameter.marks)
        for name in CASES | SLOW_CASES
        for how, quick in (("reference", CASES), ("xla", CASES), ("interpreted", ALSO_INTERPRETED))
        for parameter in implementations(*([how] if name in quick else []), slow=() if name in quick else (how,))
    ],
)
def test_equals_the_oracle(name, implementation):
    check((CASES | SLOW_CASES)[name], implementation)


PATTERNS = {
    "".join(name if whole else "1" for name, whole in zip("BNTS", pattern, strict=True)): pattern
    for pattern in itertools.product((True, False), repeat=4)
}
# Patterns in no other case. Only the summing Triton kernel depends on which axes are shared.
QUICK_PATTERNS = {"1111", "BN11", "111S", "1NT1"}


@pytest.mark.parametrize(
    ("name", "implementation"),
    [
        pytest.param(name, *parameter.values, marks=parameter.marks)
        for name in PATTERNS
        for how, quick in (("xla", QUICK_PATTERNS), ("interpreted", {"B1T1"}), ("reference", {}))
        for parameter in implementations(*([how] if name in quick else []), slow=() if name in quick else (how,))
    ],
)
def test_the_gradient_of_a_bias_is_summed_over_what_it_is_shared_by(name, implementation):
    shape = [size if whole else 1 for size, whole in zip((B, N, T, S), PATTERNS[name], strict=True)]
    check(Case(CAUSAL, LAST, LEFT, scores=(oracle.bias(normal(*shape)),)), implementation)


def test_the_order_of_scores_matters():
    """Otherwise the cases above could pass with scores in another order."""
    case = CASES["softcap, then alibi"]
    outputs = []
    for scores in (case.scores, case.scores[::-1]):
        arrays = case.complete()[0]
        outputs.append(
            oracle.attention(*arrays[:3], case.visible, case.factor, scores, pairs=case.pairs)[0],
        )
    assert np.abs(outputs[0] - outputs[1]).max() > 0.1


@EVERY_IMPLEMENTATION
def test_several_parameters_of_one_function(implementation):
    """A pytree: an array per head, a table and a number in one formula."""
    case = Case(CAUSAL, LAST)
    (query, key, value, *_), d_out, _ = case.complete()
    params = ((normal(N), normal(N, 3)), {"gain": np.float32(0.3)})

    def change(logit, q, k, head, params):
        (slopes, table), gain = params
        return gain["gain"] * logit + slopes[head] * table[head, (q - k).clip(0, table.shape[1] - 1)]

    @jax.jit
    def run(params):
        def call(params):
            return pa.attention(
                *(query, key, value, pa.masks.causal()),
                q_positions=LAST,
                scores=pa.scores.custom(change, params),
                block_sizes=pa.BlockSizes(16, 16),
                **options(implementation),
            )

        out, back = jax.vjp(call, params)
        return out, back(d_out)[0]

    def by_the_oracle(params) -> np.ndarray:
        (slopes, table), gain = params
        pairs = case.pairs
        bias = (slopes[:, None] * table)[pairs.n, (pairs.q - pairs.k).clip(0, 2)]
        scores = [oracle.factor(np.full(N, gain["gain"])), oracle.bias(bias)]
        return oracle.attention(query, key, value, case.visible, case.factor, scores, pairs=pairs)[0]

    out, gradient = run(params)
    expected = by_the_oracle(params)
    np.testing.assert_allclose(out, expected, rtol=0, atol=tolerances.ATTENTION_GRADIENT * np.abs(expected).max())
    # One parameter after the other, in a random direction.
    leaves, structure = jax.tree.flatten(jax.tree.map(np.float64, params))
    for which, (leaf, actual) in enumerate(zip(leaves, jax.tree.leaves(gradient), strict=True)):
        direction, step = seeded("direction", which).standard_normal(leaf.shape), 1e-5
        moved = [[*leaves[:which], leaf + x * direction, *leaves[which + 1 :]] for x in (step, -step)]
        plus, minus = (by_the_oracle(jax.tree.unflatten(structure, x)) for x in moved)
        difference = ((plus - minus) / (2 * step) * d_out).sum()
        terms = np.asarray(actual, np.float64) * direction
        assert abs(terms.sum() - difference) <= tolerances.ATTENTION_GRADIENT * np.abs(terms).sum()


@EVERY_IMPLEMENTATION
def test_a_function_may_look_at_positions_alone(implementation):
    """Its result broadcasts to the logits, and it needs no parameters."""
    case = Case(CAUSAL, LAST)
    arrays, *_ = case.complete()

    def call(score):
        return pa.attention(
            *arrays[:3],
            pa.masks.causal(),
            q_positions=LAST,
            scores=score,
            block_sizes=pa.BlockSizes(16, 16),
            **options(implementation),
        )

    def recency(logit, q, k, head, params):
        return (k - q).astype(jnp.float32) / 8

    array = (positions(S)[None] - LAST[0][:, None])[None, None] / np.float32(8)
    # A factor of 0 leaves the bias alone.
    expected, _ = oracle.attention(
        *arrays[:3], case.visible, 0.0, [oracle.bias(array.astype(np.float32))], pairs=case.pairs
    )
    out = call(pa.scores.custom(recency))
    np.testing.assert_allclose(out, expected, rtol=0, atol=tolerances.ATTENTION_GRADIENT * np.abs(expected).max())


@EVERY_IMPLEMENTATION
def test_a_bias_that_is_not_a_number_where_nobody_looks_changes_no_bit(implementation):
    case = CASES["bias"]
    arrays, *_ = case.complete()
    rest = case.mask.build(pa.masks), case.q_positions, case.kv_positions
    program = jax.jit(lambda arrays: case.call(arrays, *rest, implementation)[:2])
    expected = program(arrays)
    for poison in np.float32([np.nan, np.inf, -np.inf]):
        array = np.where(case.visible, arrays.scores[0], poison)
        assert_same_bits(program(arrays._replace(scores=[array])), expected)


@EVERY_IMPLEMENTATION
def test_one_score_is_a_sequence_of_one(implementation):
    case = Case(CAUSAL, LAST)
    arrays, *_ = case.complete()
    score = pa.scores.softcap(2)

    def call(scores):
        return pa.attention(*arrays[:3], scores=scores, block_sizes=pa.BlockSizes(16, 16), **options(implementation))

    assert_same_bits(call(score), call([score]))
    assert_same_bits(call(()), call(None))


# Invalid scores: (call, exception, name of the argument, what the message says it got).
BAD_SCORES = {
    "softcap, 0": (lambda: pa.scores.softcap(0), ValueError, "softcap: cap", "0"),
    "softcap, negative": (lambda: pa.scores.softcap(-3.0), ValueError, "softcap: cap", "-3.0"),
    "softcap, NaN": (lambda: pa.scores.softcap(float("nan")), ValueError, "softcap: cap", "nan"),
    "softcap, infinite": (lambda: pa.scores.softcap(float("inf")), ValueError, "softcap: cap", "inf"),
    "softcap, a string": (lambda: pa.scores.softcap("2"), TypeError, "softcap: cap", "str"),
    "softcap, a bool": (lambda: pa.scores.softcap(True), TypeError, "softcap: cap", "bool"),
    "softcap, an array": (lambda: pa.scores.softcap(jnp.float32(2)), TypeError, "softcap: cap", "Array"),
    "alibi, rank 2": (lambda: pa.scores.alibi(np.ones((1, N), np.float32)), ValueError, "alibi: slopes", "(1, 4)"),
    "alibi, a number": (lambda: pa.scores.alibi(0.5), ValueError, "alibi: slopes", "()"),
    "alibi, int32": (lambda: pa.scores.alibi(np.ones(N, np.int32)), ValueError, "alibi: slopes", "int32"),
    "bias, rank 2": (lambda: pa.scores.bias(np.ones((T, S), np.float32)), ValueError, "bias: array", "(21, 37)"),
    "bias, rank 5": (
        lambda: pa.scores.bias(np.ones((1,) * 5, np.float32)),
        ValueError,
        "bias: array",
        "(1, 1, 1, 1, 1)",
    ),
    "bias, bool": (lambda: pa.scores.bias(np.ones((1, 1, T, S), bool)), ValueError, "bias: array", "bool"),
    "bias, int32": (lambda: pa.scores.bias(np.ones((1, 1, T, S), np.int32)), ValueError, "bias: array", "int32"),
    "custom, a string": (lambda: pa.scores.custom("softcap"), TypeError, "custom: function", "str"),
    "custom, complex numbers": (
        lambda: pa.scores.custom(lambda x, *_: x, {"a": np.ones(3, complex)}),
        *(ValueError, "custom: params", "complex128"),
    ),
}
FLOAT = np.float32
BAD_CALLS = {
    "a number": (2.0, TypeError, "scores", "2.0"),
    "a name": ("softcap", TypeError, "scores", "'softcap'"),
    "a function": (pa.scores.softcap, TypeError, "scores", "function softcap"),
    "a mask": (pa.masks.causal(), TypeError, "scores", "Causal"),
    "a mask among scores": ([pa.scores.softcap(2), pa.masks.causal()], TypeError, "scores", "Causal"),
    "slopes of other heads": (pa.scores.alibi(np.ones(N + 1, FLOAT)), ValueError, "scores: alibi", "(1, 5, 1, 1)"),
    "slopes of key heads": (pa.scores.alibi(np.ones(K, FLOAT)), ValueError, "scores: alibi", "(1, 2, 1, 1)"),
    "bias of another batch": (
        pa.scores.bias(np.ones((3, 1, T, S), FLOAT)),
        ValueError,
        "scores: bias",
        "(3, 1, 21, 37)",
    ),
    "bias of key heads": (pa.scores.bias(np.ones((B, K, T, S), FLOAT)), ValueError, "scores: bias", "(2, 2, 21, 37)"),
    "bias of another T": (pa.scores.bias(np.ones((B, N, S, S), FLOAT)), ValueError, "scores: bias", "(2, 4, 37, 37)"),
    "bias of another S": (
        [pa.scores.softcap(3), pa.scores.bias(np.ones((B, N, T, T), FLOAT))],
        *(ValueError, "scores: bias", "(2, 4, 21, 21)"),
    ),
}


def assert_explains(error: pytest.ExceptionInfo, argument: str, came: str) -> None:
    message = str(error.value)
    assert re.search(rf"^{re.escape(argument)}: expected .*, got .*{re.escape(came)}", message), message


@pytest.mark.parametrize("name", BAD_SCORES)
def test_a_score_that_is_wrong(name):
    make, exception, argument, came = BAD_SCORES[name]
    with pytest.raises(exception) as error:
        make()
    assert_explains(error, argument, came)


@pytest.mark.parametrize("name", BAD_CALLS)
def test_scores_that_do_not_fit_the_call(name, compilations):
    scores, exception, argument, came = BAD_CALLS[name]
    arrays = Case().complete()[0]
    with pytest.raises(exception) as error:
        pa.attention(*arrays[:3], scores=scores)
    assert_explains(error, argument, came)
    assert not compilations, "refused before anything is compiled"


@EVERY_IMPLEMENTATION
def test_other_values_of_the_same_score_compile_nothing(implementation, compilations):
    arrays = Case().complete()[0]

    def function(logit, q, k, head, params):
        return logit * params[head]

    def call(seed):
        slopes = np.random.default_rng(seed).standard_normal(N).astype(np.float32)
        scores = [pa.scores.alibi(slopes), pa.scores.custom(function, slopes), pa.scores.softcap(2)]
        return jax.block_until_ready(pa.attention(*arrays[:3], scores=scores, **options(implementation)))

    first = call(0)
    assert compilations, "the first call compiles, and that is seen"
    compilations.clear()
    assert not np.array_equal(call(1), first)
    assert not compilations
