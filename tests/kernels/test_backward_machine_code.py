"""The Triton kernels of the backward pass as machine code, for GPUs that are not there."""

import jax
import jax.numpy as jnp
import pytest

import pallas_attn as pa
from pallas_attn import tuning
from pallas_attn.kernels import triton as kernels
from pallas_attn.kernels.call import Call
from pallas_attn.kernels.lse import Lse

pytest.importorskip("triton", reason="PyPI's triton, which compiles without a GPU, is not installed")

from bench.machine_code.compiled import compile_kernels, lower_for_cuda
from bench.machine_code.kernel_cases import CASES, Setting

B, LENGTH, N, K = 2, 2048, 8, 2


@pytest.fixture
def compiled(monkeypatch):
    """A function: the kernel of one name, with the blocks that the table has for its GPU."""

    def compile_for(head_dim, capability, name, scores=()):
        monkeypatch.setattr(tuning, "gpu_capability", lambda: capability / 10)
        kernels.backward.clear_cache()  # which may hold programs for another GPU
        return _compiled(head_dim, capability, name, scores)

    yield compile_for
    kernels.backward.clear_cache()


def _compiled(head_dim, capability, name, scores):
    def backward(query, key, value, q_positions, kv_positions, scores, lse, delta, d_out):
        block_mask = pa.BlockMask.from_mask(pa.masks.causal(), q_positions, kv_positions, pa.BlockSizes(16, 16))
        return kernels.backward(Call(query, key, value, block_mask, scores), lse, delta, d_out, scale=head_dim**-0.5)

    def tokens(heads):
        return jax.ShapeDtypeStruct((B, LENGTH, heads, head_dim), jnp.bfloat16)

    row = jax.ShapeDtypeStruct((B, N, LENGTH), jnp.float32)
    places = jax.ShapeDtypeStruct((B, LENGTH), jnp.int32)
    lowered = lower_for_cuda(
        backward,
        tokens(N),
        tokens(K),
        tokens(K),
        places,
        places,
        scores,
        Lse(row, row),
        row,
        tokens(N),
        capability=capability,
    )
    (kernel,) = compile_kernels(lowered, capability, name=name)
    return kernel


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("name", ["pallas_attn_d_query", "pallas_attn_d_key_value"])
def test_default_blocks_do_not_spill(compiled, name, head_dim, capability):
    kernel = compiled(head_dim, capability, name)
    assert (kernel.stack_bytes, kernel.spill_stores, kernel.spill_loads) == (0, 0, 0)
    assert kernel.registers <= 255
    assert ("wgmma.mma_async" if capability == 90 else "mma.sync") in kernel.ptx, "no tensor cores"


@pytest.mark.parametrize("name", ["pallas_attn_d_query", "pallas_attn_d_key_value", "pallas_attn_d_score"])
def test_kernels_with_scores_compile(compiled, name):
    scores = (pa.scores.softcap(30.0), pa.scores.bias(jnp.zeros((B, 1, LENGTH, LENGTH), jnp.bfloat16)))
    kernel = compiled(64, 90, name, scores)
    assert "wgmma.mma_async" in kernel.ptx
    assert "atom" not in kernel.ptx, "nothing is added to memory by two programs"


@pytest.mark.parametrize(("head_dim", "capability"), [(64, 80), (256, 80), (256, 90)])
def test_gradients_of_scores_have_blocks_that_do_not_spill(compiled, head_dim, capability):
    scores = (pa.scores.bias(jnp.zeros((1, N, LENGTH, LENGTH), jnp.bfloat16)),)
    kernel = compiled(head_dim, capability, "pallas_attn_d_score", scores)
    assert (kernel.stack_bytes, kernel.spill_stores, kernel.spill_loads) == (0, 0, 0)


def test_what_comes_after_the_loops_is_not_kept_while_they_run():
    (case,) = [case for case in CASES if case.name == "d-key-value-bias"]
    sizes = pa.BlockSizes(32, 128, num_warps=8, num_stages=2)  # with which registers are short
    (kernel,) = compile_kernels(case.lower(Setting(80, 64, "bfloat16", sizes)), 80, name=case.kernel)
    assert kernel.stack_bytes < 40, "40 with the places of the last stores"
