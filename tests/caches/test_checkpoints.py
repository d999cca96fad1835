"""Gradients under JAX's other transformations: checkpoints, a scan over layers, without jit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_attn as pa
from bench.machine_code.compiled import lower_for_cuda
from pallas_attn.kernels import triton
from tests import oracle, tolerances
from tests.attention_check import LAST, N, T, options
from tests.gradient_check import Case, assert_gradient, backward_blocks, implementations, normal

# JAX's transformations treat kernels as black boxes.
MOSTLY_XLA = pytest.mark.parametrize("implementation", implementations("xla", slow=("interpreted",)))


def count_forward_passes(gradient, implementation: str) -> int:
    x = jax.ShapeDtypeStruct((1, 32, 2, 32), jnp.float32)
    lowered = jax.jit(gradient).lower(x, x, x) if implementation == "xla" else lower_for_cuda(gradient, x, x, x)
    text = lowered.as_text()
    assert text.count("call @backward") == 1
    return text.count("call @forward")


@pytest.mark.parametrize("implementation", ["xla", "triton"])
def test_a_checkpoint_policy_keeps_the_output_and_runs_no_forward_pass_again(implementation, monkeypatch):
    # Lowering for CUDA needs no GPU.
    monkeypatch.setattr(triton, "unavailable", lambda: None)

    def attend(query, key, value):
        # Something before that is worth recomputing, and something after that needs the output.
        out = pa.attention(jnp.sin(query), key, value, pa.masks.causal(), implementation=implementation)
        return (jnp.sin(out) ** 2).sum()

    saves = jax.checkpoint_policies.save_only_these_names("pallas_attn")
    kinds = {
        "none": attend,
        "plain": jax.checkpoint(attend),
        "saves": jax.checkpoint(attend, policy=saves),
    }
    passes = {
        name: count_forward_passes(jax.value_and_grad(kind, (0, 1, 2)), implementation) for name, kind in kinds.items()
    }
    assert passes == {"none": 1, "plain": 2, "saves": 1}


@MOSTLY_XLA
def test_checkpoints_change_no_gradient(implementation):
    case = Case(oracle.causal(), LAST)
    arrays, *_ = case.complete()

    def loss(query, key, value):
        out = pa.attention(jnp.sin(query), key, value, pa.masks.causal(), q_positions=LAST, **options(implementation))
        return (out**2).sum()

    saves = jax.checkpoint_policies.save_only_these_names("pallas_attn")
    with backward_blocks((16, 16)):
        expected = jax.jit(jax.grad(loss, (0, 1, 2)))(*arrays[:3])
        for kind in (jax.checkpoint(loss), jax.checkpoint(loss, policy=saves)):
            for x, like in zip(jax.jit(jax.grad(kind, (0, 1, 2)))(*arrays[:3]), expected, strict=True):
                assert_gradient(*(np.asarray(y) for y in (x, like, like)), dtype="float32", name="a checkpoint")


@MOSTLY_XLA
def test_a_scan_over_layers_with_one_block_mask(implementation):
    layers, case = 3, Case(oracle.causal(), kv_len=T)
    arrays, *_ = case.complete()
    block_mask = pa.BlockMask.from_mask(pa.masks.causal(), T, T, pa.BlockSizes(16, 16))
    scales = normal(layers, N, 1)

    def layer(x, scale):
        return x + pa.attention(x * scale, arrays.key, arrays.value, block_mask, **options(implementation)), None

    def scanned(query, scales, layer=layer):
        return (jax.lax.scan(layer, query, scales[:, None, None])[0] ** 2).sum()

    def unrolled(query, scales):
        for scale in scales[:, None, None]:
            query, _ = layer(query, scale)
        return (query**2).sum()

    expected = jax.jit(jax.grad(unrolled, (0, 1)))(arrays.query, jnp.asarray(scales))
    for how in (layer, jax.checkpoint(layer)):
        value, actual = jax.jit(jax.value_and_grad(lambda *x, how=how: scanned(*x, layer=how), (0, 1)))(
            arrays.query, jnp.asarray(scales)
        )
        assert np.isfinite(value)
        for x, like in zip(actual, expected, strict=True):
            limit = tolerances.ATTENTION_GRADIENT * np.abs(like).max()
            np.testing.assert_allclose(x, like, rtol=0, atol=limit)


@MOSTLY_XLA
def test_gradients_without_jit_are_those_with_it(implementation):
    case = Case(oracle.causal(), LAST)
    arrays, *_ = case.complete()

    def loss(query):
        return (pa.attention(query, *arrays[1:3], pa.masks.causal(), **options(implementation)) ** 2).sum()

    with backward_blocks((16, 16)):
        value, eager = jax.value_and_grad(loss)(jnp.asarray(arrays.query))
        compiled = jax.jit(jax.grad(loss))(arrays.query)
    assert np.isfinite(value)
    np.testing.assert_allclose(eager, compiled, rtol=0, atol=tolerances.ATTENTION_GRADIENT * np.abs(eager).max())
