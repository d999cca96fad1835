"""Shapes at the edge of what fits: head sizes that are no power of two, and arrays of more elements than 32 bits count.

Nothing large is allocated: programs are traced, and lowered for a GPU that is not there.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_attn as pa
from bench.machine_code.compiled import kernel_irs, lower_for_cuda
from pallas_attn.kernels import triton
from tests import oracle, tolerances
from tests.gradient_check import Case, check, implementations
from tests.oracle import positions

T, S = 21, 37
LAST = positions(T, start=S - T)[None]
# D and Dv.
HEAD_SIZES = [(80, 80), (96, 96), (160, 160), (192, 128), (128, 192), (256, 256)]
QUICK_IN_THE_INTERPRETER = [(160, 160), (192, 128)]


def struct(*shape: int, dtype="bfloat16") -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


def tensors(head_dim: int, value_dim: int, *, q=(1, T, 2), kv=(1, S, 1), dtype="bfloat16") -> tuple:
    return tuple(struct(*x, dtype=dtype) for x in ((*q, head_dim), (*kv, head_dim), (*kv, value_dim)))


def both_passes(query, key, value, mask=None, scores=(), **options):
    """A program with every kernel of a training step."""

    def loss(query, key, value):
        out = pa.attention(query, key, value, mask, scores=scores, **options)
        return (out.astype(jnp.float32) ** 2).sum()

    return jax.value_and_grad(loss, (0, 1, 2))(query, key, value)


@pytest.fixture
def no_gpu_needed(monkeypatch):
    monkeypatch.setattr(triton, "unavailable", lambda: None)


# Head sizes.


@pytest.mark.parametrize(
    ("head_dim", "value_dim", "implementation"),
    [
        pytest.param(*sizes, *parameter.values, marks=parameter.marks)
        for sizes in HEAD_SIZES
        for quick in [["xla", "interpreted"] if sizes in QUICK_IN_THE_INTERPRETER else ["xla"]]
        for parameter in implementations(*quick, slow=tuple({"xla", "interpreted", "reference"} - set(quick)))
    ],
)
def test_head_sizes_equal_the_oracle_in_both_passes(head_dim, value_dim, implementation):
    case = Case(oracle.causal(), LAST, batch=1, q_heads=2, kv_heads=1, head_dim=head_dim, value_dim=value_dim)
    check(case, implementation, seed=head_dim)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("head_dim", "value_dim"), HEAD_SIZES)
def test_head_sizes_lower_for_a_gpu(head_dim, value_dim, dtype, no_gpu_needed):
    arguments = tensors(head_dim, value_dim, dtype=dtype)
    text = lower_for_cuda(lambda *x: both_passes(*x, pa.masks.causal(), implementation="triton"), *arguments).as_text()
    assert text.count("__gpu$xla.gpu.triton") == len(("forward", "d_query", "d_key_value"))


@pytest.mark.parametrize(("head_dim", "value_dim"), [(257, 257), (320, 128), (128, 512)])
def test_larger_heads_are_refused_by_name_and_served_by_default(head_dim, value_dim, no_gpu_needed):
    shapes = tensors(head_dim, value_dim, dtype="float32")
    reason = f"triton: needs head sizes up to 256, got {max(head_dim, value_dim)}"
    for named in ({"interpret": True}, {"implementation": "triton"}):
        with pytest.raises(NotImplementedError, match=reason):
            jax.eval_shape(lambda *x, how=named: both_passes(*x, **how), *shapes)
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.normal(size=x.shape), x.dtype) for x in shapes]
    by_default, expected = (
        jax.jit(lambda *x, how=how: both_passes(*x, pa.masks.causal(), **how))(*arrays)
        for how in ({}, {"implementation": "reference"})
    )
    for a, b in zip(jax.tree.leaves(by_default), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerances.ATTENTION_GRADIENT * np.abs(b).max())


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_8_bit_floats_are_refused_by_name(name, dtype):
    arrays = {"query": struct(1, T, 2, 16), "key": struct(1, S, 1, 16), "value": struct(1, S, 1, 16)}
    arrays[name] = struct(*arrays[name].shape, dtype=dtype)
    with pytest.raises(ValueError, match=rf"^{name}: expected dtype .*cast it.*, got {dtype}"):
        jax.eval_shape(lambda arrays: pa.attention(**arrays), arrays)


# Arrays of 2^31 elements and more.


def widths_of_offsets(dtype: str, program, *arguments) -> dict[str, set[int]]:
    """The bits of every kernel's offsets into arrays of a dtype."""
    widths = {}
    lowered = lower_for_cuda(program, *arguments)
    for name, text in kernel_irs(lowered):
        found = re.findall(rf"tt\.addptr .*ptr<{dtype}>.*[x ]i(32|64)>?$", text, re.MULTILINE)
        widths[name] = {int(bits) for bits in found}
    return widths


# For 2^31 elements the largest offset is 2^31 - 1.
@pytest.mark.parametrize(("batch", "bits"), [(1, 32), (2, 64)])
def test_offsets_into_large_arrays_are_wide_enough(batch, bits, no_gpu_needed):
    arguments = tensors(128, 128, q=(batch, 2**17, 128), kv=(batch, 2**17, 128))
    assert arguments[0].size == batch * 2**31
    kernels = widths_of_offsets(
        "bf16", lambda *x: both_passes(*x, pa.masks.causal(), implementation="triton"), *arguments
    )
    assert kernels == {f"pallas_attn_{name}": {bits} for name in ("forward", "d_query", "d_key_value")}


def test_offsets_into_a_large_bias_are_wide_enough(no_gpu_needed):
    def program(query, key, value, bias):
        def loss(bias):
            out = pa.attention(query, key, value, scores=pa.scores.bias(bias), implementation="triton")
            return (out.astype(jnp.float32) ** 2).sum()

        return jax.grad(loss)(bias)

    arguments = *tensors(16, 16, q=(1, 2**16, 1), kv=(1, 2**15 + 1, 1)), struct(1, 1, 2**16, 2**15 + 1, dtype="float16")
    kernels = widths_of_offsets("f16", program, *arguments)
    assert kernels.keys() == {f"pallas_attn_{name}" for name in ("forward", "d_query", "d_score", "d_key_value")}
    assert all(widths == {64} for widths in kernels.values())
    assert 64 in widths_of_offsets("f32", program, *arguments)["pallas_attn_d_score"], "of the gradient"


def multiply(logit, q_position, kv_position, head, params):
    return logit * params[head, kv_position]


LARGE = struct(1, 1, 2**16, 2**15, dtype="bool"), struct(2, 2**30, dtype="float32")


@pytest.mark.parametrize("which", ["bool mask", "parameters"])
def test_arrays_that_offsets_cannot_reach_are_refused_by_name_and_served_by_default(which, no_gpu_needed):
    """Byte arrays have 32-bit offsets up to 2^32 elements, tables of custom scores at any size."""

    def call(query, key, value, mask, table, **how):
        options = {"mask": mask} if which == "bool mask" else {"scores": pa.scores.custom(multiply, table)}
        return pa.attention(query, key, value, **options, **how)

    arguments = *tensors(16, 16, q=(1, 2**16, 1), kv=(1, 2**15, 1)), *LARGE
    for named in ({"interpret": True}, {"implementation": "triton"}):
        with pytest.raises(
            NotImplementedError, match=r"triton: needs .* of fewer than 2\^31 elements, .* got 2147483648"
        ):
            jax.eval_shape(lambda *x, how=named: call(*x, **how), *arguments)
    assert jax.eval_shape(call, *arguments).shape == (1, 2**16, 1, 16)


def test_quantized_keys_that_offsets_cannot_reach_are_refused_by_name_and_served_by_default(no_gpu_needed):
    def call(query, values, scales, **how):
        key = pa.QuantizedArray(values, scales)
        return pa.attention(query, key, key, **how)

    keys = (4, 2**20, 4)
    arguments = struct(4, 1, 4, 128), struct(*keys, 128, dtype="int8"), struct(*keys, dtype="float32")
    with pytest.raises(NotImplementedError, match=r"triton: needs .*quantized keys.* got 2147483648"):
        jax.eval_shape(lambda *x: call(*x, implementation="triton"), *arguments)
    assert jax.eval_shape(call, *arguments).shape == (4, 1, 4, 128)


@pytest.mark.parametrize("implementation", [None, "xla", "reference"])
@pytest.mark.parametrize("name", ["query", "key"])
def test_more_tokens_than_positions_can_count_are_refused(name, implementation):
    arrays = {"query": struct(1, T, 1, 1), "key": struct(1, S, 1, 1), "value": struct(1, S, 1, 1)}
    arrays[name] = struct(1, 2**30 + 1, 1, 1)
    with pytest.raises(ValueError, match=rf"^{name}: expected no axis longer than 2\^30, got .*1073741825"):
        jax.eval_shape(lambda arrays: pa.attention(**arrays, implementation=implementation), arrays)


@pytest.mark.parametrize("implementation", implementations("reference", "xla", "interpreted"))
def test_the_largest_positions(implementation):
    """Differences of positions, and of the limits that mark empty blocks, fit in 32 bits."""
    far_queries, far_keys = (2**31 - 40 + np.arange(length, dtype=np.int32)[None] for length in (T, S))
    far_keys[:, :5], far_keys[:, 20:22] = np.arange(5), -1
    far_queries[:, 7] = -1
    mask = oracle.sliding_window(9, 2) | oracle.sink(3) & ~oracle.chunked(2**30)
    case = Case(mask, far_queries, far_keys, batch=1, scores=(oracle.alibi(np.float32([1e-9, 3e-9, 0, -1e-9])),))
    check(case, implementation)
