"""Derivatives against finite differences: oracle, reference (all orders) and kernels (first order)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import pallas_attn as pa
from tests import oracle, tolerances
from tests.attention_check import KERNELS, LAST, LEFT, SMALL, numbers, options
from tests.gradient_check import Case, normal

TINY = Case(
    oracle.causal() & oracle.sliding_window(4),
    np.array([[2, 3, -1], [0, 6, 40]], np.int32),  # the last query of row 1 sees nothing
    np.array([[-1, 1, 2, 3], [5, 6, -1, 0]], np.int32),
    **{"q_len": 3, "kv_len": 4, "q_heads": 2, "kv_heads": 1, "head_dim": 3, "value_dim": 2, "scale": 0.6},
)
TINY_SCORES = {
    "none": (),
    "softcap and alibi": (oracle.softcap(2.0), oracle.alibi(np.array([0.2, 0.4], np.float32))),
    "alibi and softcap": (oracle.alibi(np.array([0.2, 0.4], np.float32)), oracle.softcap(2.0)),
    "bias": (oracle.bias(normal(1, 2, 1, 4)), oracle.softcap(2.0), oracle.bias(normal(2, 1, 3, 4))),
    "custom": (oracle.factor(normal(2)), oracle.saturated(np.float32(1.5)), oracle.buckets(normal(2, oracle.BUCKETS))),
}


@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize("name", TINY_SCORES)
def test_the_gradients_of_the_oracle_are_those_of_its_outputs(name, has_sinks):
    """Formulas over matrices against finite differences of a loop over queries."""
    case = dataclasses.replace(TINY, scores=TINY_SCORES[name], sinks=normal(2) if has_sinks else None)
    arrays, d_out, d_lse = jax.tree.map(lambda x: np.asarray(x, np.float64), case.complete())

    def loss(arrays) -> float:
        given = iter(arrays.scores)
        scores = [dataclasses.replace(x, argument=next(given)) if x.has_array else x for x in case.scores]
        out, lse = oracle.attention(*arrays[:3], case.visible, case.factor, scores, arrays.sinks, case.pairs)
        return (out * d_out).sum() + (np.where(lse == -np.inf, 0, lse) * d_lse).sum()

    gradients = oracle.gradients(
        *(*arrays[:3], case.visible, case.factor, d_out, d_lse, case.scores, arrays.sinks, case.pairs)
    )
    step = 1e-5
    for array, gradient in zip(jax.tree.leaves(arrays), jax.tree.leaves(gradients._replace(summed=[])), strict=True):
        expected = np.zeros(array.shape)
        for at in np.ndindex(array.shape):
            value, losses = array[at], []
            for moved in (value + step, value - step):
                array[at] = moved
                losses.append(loss(arrays))
            array[at] = value
            expected[at] = (losses[0] - losses[1]) / (2 * step)
        largest = np.abs(expected).max()
        assert largest > 0.01
        np.testing.assert_allclose(gradient, expected, rtol=0, atol=tolerances.ORACLE_GRADIENT * largest)


# The reference and the kernels with jax.test_util.check_grads.


@pytest.mark.parametrize(
    ("name", "implementation"),
    [
        ("none", "reference"),
        ("custom", "reference"),
        ("none", "xla"),
        ("softcap and alibi", "xla"),
        ("custom", "xla"),
        ("bias", "xla"),
        ("bias", "interpreted"),
    ],
)
def test_gradients_are_those_of_differences(name, implementation):
    case = dataclasses.replace(TINY, scores=TINY_SCORES[name], sinks=normal(2))
    arrays, _, d_lse = case.complete()
    rest = case.mask.build(pa.masks), case.q_positions, case.kv_positions

    @jax.jit
    def loss(arrays):
        out, lse, _ = case.call(arrays, *rest, implementation)
        return (out**2).sum() + (jnp.where(lse == -jnp.inf, 0, lse) * d_lse).sum()

    step, limit = tolerances.CHECK_GRADS_STEP, tolerances.CHECK_GRADS
    check_grads(loss, (jax.tree.map(jnp.asarray, arrays),), order=1, modes=["rev"], eps=step, rtol=limit, atol=limit)


@pytest.mark.parametrize("name", ["none", "custom"])
def test_the_reference_has_derivatives_of_every_order_and_mode(name):
    case = dataclasses.replace(TINY, scores=TINY_SCORES[name], sinks=normal(2))
    arrays, *_ = case.complete()
    rest = case.mask.build(pa.masks), case.q_positions, case.kv_positions

    def loss(arrays):
        return (case.call(arrays, *rest, "reference").out ** 2).sum()

    step, limit = tolerances.CHECK_GRADS_STEP, tolerances.CHECK_GRADS
    check_grads(jax.jit(loss), (jax.tree.map(jnp.asarray, arrays),), order=2, eps=step, rtol=limit, atol=limit)


def test_the_reference_has_the_derivatives_of_the_oracle():
    arrays = TINY.arrays(0)
    generator = np.random.default_rng(1)
    seen = oracle.visible(TINY.mask, *TINY.geometry, TINY.batch, TINY.q_heads)
    out_weights = generator.standard_normal((TINY.batch, TINY.q_len, TINY.q_heads, TINY.value_dim))
    lse_weights = generator.standard_normal((TINY.batch, TINY.q_heads, TINY.q_len)) * seen.any(-1)

    def loss_of_the_oracle(*arrays):
        out, lse = oracle.attention(*arrays, seen, TINY.factor)
        return (out * out_weights).sum() + (np.where(seen.any(-1), lse, 0) * lse_weights).sum()

    def loss(*arrays):
        out, lse, _ = pa.attention(
            *(*arrays, TINY.mask.build(pa.masks)),
            q_positions=TINY.q_positions,
            kv_positions=TINY.kv_positions,
            scale=TINY.scale,
            return_lse=True,
            implementation="reference",
        )
        lse = jnp.where(seen.any(-1), lse, 0)
        return (out * out_weights.astype(np.float32)).sum() + (lse * lse_weights.astype(np.float32)).sum()

    step = 1e-5
    gradients = jax.jit(jax.grad(loss, (0, 1, 2)))(*arrays)
    for which, gradient in enumerate(gradients):
        missing = np.isnan(arrays[which])
        assert (np.asarray(gradient)[missing] == 0).all(), "what is not there has derivative 0, whatever it holds"
        expected = np.zeros(gradient.shape)
        for at in zip(*np.nonzero(~missing), strict=True):
            values = []
            for sign in (1, -1):
                moved = [x.astype(np.float64) for x in arrays]
                moved[which][at] += sign * step
                values.append(loss_of_the_oracle(*moved))
            expected[at] = (values[0] - values[1]) / (2 * step)
        assert np.abs(expected).max() > 0.1
        np.testing.assert_allclose(
            gradient, expected, rtol=0, atol=tolerances.ATTENTION_GRADIENT * np.abs(expected).max()
        )


def test_the_reference_has_finite_derivatives_where_logits_are_large():
    case = Case(oracle.causal(), LAST, LEFT, query_size=1e4)
    query, key, value = case.arrays(0)

    def loss(query, key, value):
        out = pa.attention(
            query, key, value, pa.masks.causal(), q_positions=LAST, kv_positions=LEFT, implementation="reference"
        )
        return (out**2).sum()

    for gradient in jax.jit(jax.grad(loss, (0, 1, 2)))(query, key, value):
        assert np.isfinite(gradient).all()
        assert np.abs(gradient).max() > 0


@KERNELS
def test_a_kernel_has_first_derivatives_only_and_says_so(implementation):
    query, key, value = numbers(SMALL)

    def loss(query):
        return (pa.attention(query, key, value, **options(implementation)) ** 2).sum()

    name = "triton" if implementation == "interpreted" else implementation
    message = f"implementation='{name}' has first derivatives only; for higher ones pass implementation='reference'"
    with pytest.raises(NotImplementedError, match=message):
        jax.grad(lambda x: jax.grad(loss)(x).sum())(query)
    message = f"implementation='{name}' has derivatives in reverse mode only; .* pass implementation='reference'"
    with pytest.raises(TypeError, match=message):
        jax.jvp(loss, (query,), (query,))
    with pytest.raises(TypeError, match=message):
        jax.jit(jax.jacfwd(loss))(query)


@KERNELS
def test_a_kernel_may_stand_in_a_function_that_is_differentiated_by_something_else(implementation):
    """A frozen encoder, or an evaluation step: nothing differentiates the kernel."""
    query, key, value = numbers(SMALL)

    @jax.jit
    @jax.grad
    def gradient(x):
        frozen = pa.attention(jax.lax.stop_gradient(x) * query, key, value, **options(implementation))
        return (x * frozen).sum()

    expected = pa.attention(query, key, value, implementation="reference").sum()
    np.testing.assert_allclose(gradient(jnp.float32(1)), expected, rtol=tolerances.ATTENTION_GRADIENT)
