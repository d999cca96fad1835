"""The Triton kernels lower for CUDA on this JAX, without a GPU. What the lowering refuses, no interpreter shows."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import pallas_attn as pa
from bench.machine_code import triton_ir
from bench.machine_code.compiled import kernel_irs, lower_for_cuda
from bench.machine_code.kernel_cases import CASES, Setting
from pallas_attn import tuning
from pallas_attn.kernels import triton as kernels
from pallas_attn.kernels.call import Call
from pallas_attn.kernels.lse import Lse
from pallas_attn.kernels.triton import tables
from pallas_attn.pointwise import rules
from pallas_attn.quantized import Kind
from pallas_attn.scores import traced
from tests import idioms

B, T, S, N, K = 2, 100, 333, 8, 2


def bools(*shape):
    return jnp.ones(shape, jnp.bool_)


def ids(*shape):
    return jnp.zeros(shape, jnp.int32)


MASKS = {
    "full": pa.masks.full(),
    "causal": pa.masks.causal(),
    "window": pa.masks.sliding_window(64, 3),
    "prefix": pa.masks.prefix(ids(B)) | pa.masks.causal(),
    "sink": pa.masks.sink(4) | pa.masks.sliding_window(16),
    "chunked": ~pa.masks.chunked(24),
    "segments": pa.masks.segments(ids(B, T), ids(B, S)),
    "dense, per query head": pa.masks.dense(bools(B, N, T, S)),
    "operands of every kind": (pa.masks.dense(bools(1, K, T, 1)) & ~pa.masks.segments(ids(1, T), ids(1, S)))
    | pa.masks.prefix(ids(B)) & pa.masks.dense(bools(1, N, 1, S)) & pa.masks.causal(),
}


def lower(mask, head_dim, dtype, *, value_dim=None, per_head=False, sizes=None, capability=90) -> str:
    """The lowered forward kernel, as text, with the blocks that the tuning table would take."""
    sizes = sizes or tuning.default_block_sizes(
        *(T, S), implementation="triton", head_dim=head_dim, dtype=dtype, compute_capability=capability / 10
    )

    def forward(query, key, value, mask, q_positions, kv_positions):
        block_mask = pa.BlockMask.from_mask(mask, q_positions, kv_positions, sizes)
        return kernels.forward(Call(query, key, value, block_mask), scale=0.1)

    def struct(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct(shape, dtype)

    lowered = lower_for_cuda(
        forward,
        struct(B, T, N, head_dim),
        struct(B, S, K, head_dim),
        struct(B, S, K, value_dim or head_dim),
        mask,
        struct(B, T, dtype=jnp.int32),
        struct(B, *([K] if per_head else []), S, dtype=jnp.int32),
        capability=capability,
    )
    return lowered.as_text()


def assert_is_one_kernel(text: str) -> None:
    assert text.count("__gpu$xla.gpu.triton") == 1
    assert "pallas_attn_forward" in text


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("name", ["causal", "operands of every kind"])
def test_lowers_for_every_dtype(name, head_dim, dtype):
    assert_is_one_kernel(lower(MASKS[name], head_dim, jnp.dtype(dtype)))


@pytest.mark.parametrize("name", MASKS)
def test_lowers_with_every_mask(name):
    assert_is_one_kernel(lower(MASKS[name], 64, jnp.bfloat16, per_head=True))


@pytest.mark.parametrize(("head_dim", "value_dim"), [(5, 1), (32, 32), (80, 48), (96, 256), (256, 96)])
def test_lowers_for_head_sizes_of_any_kind(head_dim, value_dim):
    assert_is_one_kernel(lower(MASKS["causal"], head_dim, jnp.float16, value_dim=value_dim))


@pytest.mark.parametrize("capability", [80, 90])
def test_lowers_for_older_gpus(capability):
    assert_is_one_kernel(lower(MASKS["window"], 128, jnp.bfloat16, capability=capability))


def test_lowers_with_the_smallest_blocks():
    assert_is_one_kernel(lower(MASKS["segments"], 64, jnp.float32, sizes=pa.BlockSizes(16, 16)))


def stored(kind: Kind | None, *shape: int):
    """Keys or values in bfloat16, or in fewer bits."""
    x = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    return x if kind is None else jax.eval_shape(lambda x: pa.QuantizedArray.quantize(x, kind, group=16), x)


@pytest.mark.parametrize("q_len", [1, 5, T], ids=lambda n: f"T {n}")
@pytest.mark.parametrize("page", [None, 16, 48], ids=lambda n: f"page {n}")
@pytest.mark.parametrize("kind", [None, "int8", "float8_e4m3fn", "int4"])
def test_lowers_with_keys_however_they_are_stored(kind, page, q_len):
    length, head_dim = 336, 96
    sizes = tuning.default_block_sizes(
        *(q_len, length), implementation="triton", kernel="decode", head_dim=head_dim, compute_capability=9.0
    )
    tokens = (B, length) if page is None else (50, page)

    def attend(query, key, value, q_positions, kv_positions, page_table, bias):
        block_mask = pa.BlockMask.from_mask(pa.masks.causal(), q_positions, kv_positions, sizes)
        scores = pa.scores.bias(bias), pa.scores.custom(lambda x, q, k, head, slope: x * slope[head], jnp.ones(N))
        call = Call(query, key, value, block_mask, traced(scores), page_table=page_table)
        return kernels.forward(call, scale=0.1, return_key_weights=True)

    def ints(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    text = lower_for_cuda(
        attend,
        jax.ShapeDtypeStruct((B, q_len, N, head_dim), jnp.bfloat16),
        *(stored(kind, *tokens, K, head_dim) for _ in range(2)),
        *(ints(B, q_len), ints(B, length), None if page is None else ints(B, length // page)),
        jax.ShapeDtypeStruct((1, N, 1, length), jnp.float32),
    ).as_text()
    names = ["forward", "key_weights"] if q_len > 16 else ["decode", "merge", "decode_weights"]
    assert text.count("__gpu$xla.gpu.triton") == len(names)
    assert all(f"pallas_attn_{name}" in text for name in names)


def lower_custom(q_len, scores, mask) -> str:
    """Both passes, or decode, with scores and a mask that close over arrays."""
    tokens = (idioms.B, q_len, idioms.N, 64), (idioms.B, idioms.S, idioms.K, 64)
    sizes = pa.BlockSizes(16, 32)

    def attend(query, key):
        block_mask = pa.BlockMask.from_mask(mask, q_len, idioms.S, sizes)
        return kernels.forward(Call(query, key, key, block_mask, traced(scores)), scale=0.1, return_key_weights=True)

    def backward(query, key, lse, delta):
        block_mask = pa.BlockMask.from_mask(mask, q_len, idioms.S, sizes)
        return kernels.backward(Call(query, key, key, block_mask, traced(scores)), lse, delta, query, scale=0.1)

    query, key = (jax.ShapeDtypeStruct(x, jnp.bfloat16) for x in tokens)
    lowered = lower_for_cuda(attend, query, key).as_text()
    if q_len <= tuning.DECODE_QUERIES:
        return lowered
    per_query = jax.ShapeDtypeStruct((idioms.B, idioms.N, q_len), jnp.float32)
    return lowered + lower_for_cuda(backward, query, key, Lse(per_query, per_query), per_query).as_text()


@pytest.mark.parametrize("name", idioms.SCORES)
def test_lowers_with_what_users_write_as_a_score(name):
    """One by one in decode, which compiles most quickly."""
    score = pa.scores.custom(idioms.SCORES[name](idioms.closed()))
    assert "pallas_attn_decode" in lower_custom(3, (score,), pa.masks.causal())


@pytest.mark.parametrize("name", idioms.MASKS)
def test_lowers_with_what_users_write_as_a_mask(name):
    mask = pa.masks.custom(idioms.MASKS[name](idioms.closed()))
    assert "pallas_attn_decode" in lower_custom(3, (), ~mask & pa.masks.causal())


def test_lowers_in_every_kernel_with_functions_that_close_over_arrays():
    """Each of their tables has a gradient of its own."""
    c = idioms.closed()
    names = "relative positions", "a choice of rows", "relu", "the row of the batch", "get with a fill value", "switch"
    scores = tuple(pa.scores.custom(idioms.SCORES[name](c)) for name in names)
    mask = pa.masks.custom(idioms.MASKS["rows compared"](c)) & pa.masks.custom(idioms.MASKS["documents"](c))
    text = lower_custom(T, scores, mask)
    gradients = len([x for x in jax.tree.leaves(traced(scores)) if jnp.issubdtype(x.dtype, jnp.floating)])
    for name, count in {"forward": 1, "key_weights": 1, "d_query": 1, "d_key_value": 1, "d_score": gradients}.items():
        assert text.count(f'name = "pallas_attn_{name}"') == count, name


# Every elementwise operation that a custom function may be made of, of a logit in (-1, 1) or of positions.
OF_LOGIT = (
    "abs acos acosh asin asinh atan atanh cbrt ceil cos cosh digamma erf erf_inv erfc exp exp2 expm1 floor is_finite"
    " lgamma log log1p log2 logistic neg round rsqrt sign sin sinh sqrt square stop_gradient tan tanh"
)
OF_TWO_LOGITS = "add atan2 div eq ge gt le lt max min mul ne nextafter pow rem sub"
OF_POSITIONS = "bitwise_and bitwise_or bitwise_xor shift_left shift_right_arithmetic shift_right_logical"
OF_POSITION = "bitwise_not clz population_count"
OTHERS = {
    "bitcast_convert_type": lambda s, q: lax.bitcast_convert_type(s, jnp.int32),
    "clamp": lambda s, q: lax.clamp(jnp.float32(0), s, jnp.float32(1)),
    "integer_pow": lambda s, q: lax.integer_pow(s, 3),
    "reduce_precision": lambda s, q: lax.reduce_precision(s, 8, 7),
    "select_n": lambda s, q: jnp.where(q > 3, s, -s),
}


def operations():
    """By name: functions of (logit, position)."""
    found = {name: lambda s, q, f=f: f(s) for name in OF_LOGIT.split() if (f := getattr(lax, name, None))}
    found |= {name: lambda s, q, name=name: getattr(lax, name)(s, s * s) for name in OF_TWO_LOGITS.split()}
    found |= {name: lambda s, q, name=name: getattr(lax, name)(q, q + q) for name in OF_POSITIONS.split()}
    return found | {name: lambda s, q, name=name: getattr(lax, name)(q) for name in OF_POSITION.split()} | OTHERS


def as_score(function):
    return pa.scores.custom(lambda s, q, k, h, p: lax.convert_element_type(function(s, q), jnp.float32))


NOT_LOWERED = sorted(tables._NOT_LOWERED & operations().keys())


def test_elementwise_operations_lower():
    each = [function for name, function in operations().items() if name not in NOT_LOWERED]

    def together(s, q):
        return sum((lax.convert_element_type(function(s, q), jnp.float32) for function in each), s)

    score = as_score(together)
    of_derivatives = {"add_any"}
    of_newer_versions = {"log2", "one_minus_square"}
    has = traced((score,))[0].program.primitives | tables._NOT_LOWERED
    assert rules.ELEMENTWISE - has <= of_derivatives | of_newer_versions
    assert "pallas_attn_decode" in lower_custom(3, (score,), pa.masks.causal())


@pytest.mark.parametrize("name", NOT_LOWERED)
def test_other_elementwise_operations_are_known_not_to_lower(name):
    with pytest.raises(Exception, match=f"(?i)unimplemented primitive.*{name}"):
        lower_custom(3, (as_score(operations()[name]),), pa.masks.causal())


@pytest.mark.parametrize("name", ["forward", "d-query", "d-key-value", "key-weights", "decode", "decode-int8"])
def test_full_blocks_are_loaded_without_masks_at_ragged_lengths(name):
    """Blocks that do not divide T or S: the lowering must not mask the loads of a loop that stays within both."""
    (case,) = [case for case in CASES if case.name == name]
    sizes = case.default_sizes(64, "bfloat16", 90)
    for length in (2048, 2047):
        setting = Setting(90, 64, "bfloat16", sizes, length)
        (text,) = [text for kernel, text in kernel_irs(case.lower(setting)) if kernel == case.kernel]
        (full, partial), masks = triton_ir.read(text)
        assert not full.lines & (masks.loads | masks.logic), f"length {length}"
        assert partial.lines & masks.loads
        assert partial.lines & masks.logic
