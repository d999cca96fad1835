"""Sinks: an extra logit per head, which takes probability and has no value (arXiv:2508.10925)."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_attn as pa
from tests import oracle, tolerances
from tests.attention_check import BOTH, LAST, LEFT, Q_BOTH, B, K, N, S, T, dense, options
from tests.gradient_check import Case, backward_blocks, check, implementations
from tests.oracle import positions

EVERY_IMPLEMENTATION = pytest.mark.parametrize("implementation", implementations("reference", "xla", "interpreted"))
SINKS = np.array([0.5, -2.0, 3.0, 0.0], np.float32)
BLIND = positions(T, start=-9)[None] + 2**20 * (positions(T, start=-9)[None] >= 0)  # far from every key, or padding

CASES = {
    "causal": Case(oracle.causal(), LAST, LEFT, sinks=SINKS),
    "padding on both sides, bfloat16": Case(oracle.causal(), Q_BOTH, BOTH, sinks=SINKS, dtype="bfloat16"),
    "no key is seen": Case(~oracle.full(), Q_BOTH, sinks=SINKS),
    "some queries see no key": Case(oracle.causal(), positions(T)[None], positions(S, start=8)[None], sinks=SINKS),
    "some queries are far away": Case(oracle.sliding_window(9), BLIND, sinks=SINKS),
    "as many key heads": Case(dense(B, N, T, S), kv_heads=N, sinks=SINKS),
    "sinks that take all": Case(oracle.causal(), LAST, sinks=SINKS + 80),
    "sinks that take nothing": Case(oracle.causal(), LAST, sinks=SINKS - 200),
    "sinks of bfloat16": Case(oracle.causal(), LAST, sinks=SINKS.astype(jnp.bfloat16), dtype="float16"),
    "sinks beside scores": Case(oracle.causal(), LAST, LEFT, sinks=SINKS, scores=(oracle.softcap(2.0),)),
}
ALSO_INTERPRETED = {
    "padding on both sides, bfloat16",
    "no key is seen",
    "sinks that take all",
    "some queries see no key",
}


@pytest.mark.parametrize(
    ("name", "implementation"),
    [
        pytest.param(name, *parameter.values, marks=parameter.marks)
        for name in CASES
        for how, quick in (("reference", CASES), ("xla", CASES), ("interpreted", ALSO_INTERPRETED))
        for parameter in implementations(*([how] if name in quick else []), slow=() if name in quick else (how,))
    ],
)
def test_equals_the_oracle(name, implementation):
    check(CASES[name], implementation)


@EVERY_IMPLEMENTATION
def test_who_sees_no_key_gets_the_sink_and_padding_gets_nothing(implementation):
    case = CASES["no key is seen"]
    rest = case.mask.build(pa.masks), case.q_positions, case.kv_positions
    out, lse, _ = case.call(case.all_arrays(), *rest, implementation)
    assert (out == 0).all()
    real = np.broadcast_to(~case.missing_queries[:, None], lse.shape)
    limit = tolerances.attention_limit(0, np.abs(SINKS).max(), "float32")
    np.testing.assert_allclose(lse, np.where(real, SINKS[None, :, None], -np.inf), rtol=0, atol=limit)


@EVERY_IMPLEMENTATION
def test_a_sink_is_a_key_without_a_value(implementation):
    """The same call with one more key per head, whose logit is the sink and whose value is 0."""
    case = Case(oracle.causal(), LAST, kv_heads=N)
    (query, key, value, *_), *_ = case.complete()
    bias = np.zeros((1, N, 1, S + 1), np.float32)
    bias[0, :, 0, S] = SINKS
    more_key, more_value = (np.concatenate([x, np.zeros_like(x[:, :1])], 1) for x in (key, value))
    array = np.concatenate([case.visible, np.ones((B, N, T, 1), bool)], -1)
    how = {"return_lse": True, **options(implementation)}
    expected = pa.attention(query, more_key, more_value, array, scores=pa.scores.bias(bias), **how)
    actual = pa.attention(query, key, value, pa.masks.causal(), q_positions=LAST, sinks=SINKS, **how)
    for x, like in zip(actual[:2], expected[:2], strict=True):
        limit = tolerances.attention_limit(0, np.abs(like).max(), "float32")
        np.testing.assert_allclose(x, like, rtol=0, atol=limit)


@pytest.mark.parametrize("implementation", implementations("reference", "xla", slow=("interpreted",)))
def test_sinks_that_vanish_are_no_sinks(implementation):
    """-inf is a sink without probability, and without a gradient."""
    case = Case(oracle.causal(), LAST, LEFT)
    arrays, d_out, d_lse = case.complete()
    with backward_blocks((16, 16)):
        program = case.both_passes(implementation)
        (out, lse), gradients = program(arrays, d_out, d_lse)
        vanishing = arrays._replace(sinks=np.full(N, -np.inf, np.float32))
        (other_out, other_lse), others = program(vanishing, d_out, d_lse)
    assert (np.asarray(others.sinks) == 0).all()
    np.testing.assert_array_equal(lse == -np.inf, other_lse == -np.inf)
    pairs = [(out, other_out), *zip(gradients[:3], others[:3], strict=True)]
    for x, like in [(np.where(lse == -np.inf, 0, lse), np.where(other_lse == -np.inf, 0, other_lse)), *pairs]:
        np.testing.assert_allclose(x, like, rtol=0, atol=tolerances.ATTENTION_GRADIENT * np.abs(like).max())


BAD_SINKS = {
    "a list": ([0.0] * N, TypeError, "list"),
    "a number": (0.5, TypeError, "float"),
    "other heads": (np.zeros(N + 1, np.float32), ValueError, "[5]"),
    "key heads": (np.zeros(K, np.float32), ValueError, "[2]"),
    "rank 2": (np.zeros((1, N), np.float32), ValueError, "[1, 4]"),
    "integers": (np.zeros(N, np.int32), ValueError, "int32"),
    "bool": (np.zeros(N, bool), ValueError, "bool"),
}


@pytest.mark.parametrize("name", BAD_SINKS)
def test_sinks_that_do_not_fit(name, compilations):
    sinks, exception, came = BAD_SINKS[name]
    arrays = Case().complete()[0]
    with pytest.raises(exception) as error:
        pa.attention(*arrays[:3], sinks=sinks)
    assert re.search(rf"^sinks: expected .*, got .*{re.escape(came)}", str(error.value)), str(error.value)
    assert not compilations, "refused before anything is compiled"


def test_the_gradient_of_sinks_under_jit_is_that_of_differences():
    case = Case(oracle.causal(), LAST)
    arrays, *_ = case.complete()

    @jax.jit
    def loss(sinks):
        return (pa.attention(*arrays[:3], pa.masks.causal(), q_positions=LAST, sinks=sinks) ** 2).sum()

    gradient = jax.grad(loss)(jnp.asarray(SINKS))
    step = tolerances.CHECK_GRADS_STEP
    for n in range(N):
        moved = [SINKS + s * step * np.eye(N, dtype=np.float32)[n] for s in (1, -1)]
        difference = (loss(moved[0]) - loss(moved[1])) / (2 * step)
        assert abs(gradient[n] - difference) <= tolerances.CHECK_GRADS * np.abs(gradient).max()
