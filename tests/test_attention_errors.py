"""Bad input of attention(), masks, BlockMask and BlockSizes: the right exception, before anything is compiled.

Each message names the argument, says what was expected and what came.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_attn as pa

B, T, S, N, K, D = 2, 5, 7, 4, 2, 8
PAGE = 16


def array(*shape, dtype=np.float32) -> np.ndarray:
    return np.zeros(shape, dtype)


def int32(*shape) -> np.ndarray:
    return array(*shape, dtype=np.int32)


def bools(*shape) -> np.ndarray:
    return array(*shape, dtype=np.bool_)


GOOD = {"query": array(B, T, N, D), "key": array(B, S, K, D), "value": array(B, S, K, D)}
MASK = pa.masks.causal()
BLOCK_MASK = pa.BlockMask.from_mask(MASK, T, S)


def assert_explains(error: pytest.ExceptionInfo, argument: str, came: str) -> None:
    message = str(error.value)
    assert re.search(rf"^{re.escape(argument)}: expected ", message), f"does not name the argument: {message}"
    after = message.split(f"{argument}: expected ", 1)[1]
    assert ", got " in after, f"does not say what came: {message}"
    assert came in after.split(", got ", 1)[1], f"does not say what came: {message}"


# Changes to a valid call -> (exception, name of the argument, what the message says it got).
BAD_CALLS = {
    # Arrays.
    "query, a list": ({"query": [[1.0]]}, TypeError, "query", "list"),
    "key, None": ({"key": None}, TypeError, "key", "NoneType"),
    "value, a number": ({"value": 3.0}, TypeError, "value", "float"),
    "query, rank 3": ({"query": array(B, T, D)}, ValueError, "query", "(2, 5, 8)"),
    "key, rank 5": ({"key": array(1, B, S, K, D)}, ValueError, "key", "(1, 2, 7, 2, 8)"),
    "value, rank 3": ({"value": array(B, S, D)}, ValueError, "value", "(2, 7, 8)"),
    "query, no tokens": ({"query": array(B, 0, N, D)}, ValueError, "query", "(2, 0, 4, 8)"),
    "key, no tokens": ({"key": array(B, 0, K, D), "value": array(B, 0, K, D)}, ValueError, "key", "(2, 0, 2, 8)"),
    "value, no columns": ({"value": array(B, S, K, 0)}, ValueError, "value", "(2, 7, 2, 0)"),
    "query, int32": ({"query": int32(B, T, N, D)}, ValueError, "query", "int32"),
    "all float64": ({n: x.astype(np.float64) for n, x in GOOD.items()}, ValueError, "query", "float64"),
    "key, bfloat16": ({"key": array(B, S, K, D, dtype=jnp.bfloat16)}, ValueError, "key", "bfloat16"),
    "value, float16": ({"value": array(B, S, K, D, dtype=np.float16)}, ValueError, "value", "float16"),
    "key, another batch": ({"key": array(3, S, K, D), "value": array(3, S, K, D)}, ValueError, "key", "(3, 7, 2, 8)"),
    "key, a batch of 1": ({"key": array(1, S, K, D), "value": array(1, S, K, D)}, ValueError, "key", "(1, 7, 2, 8)"),
    "key, another head size": ({"key": array(B, S, K, 16)}, ValueError, "key", "(2, 7, 2, 16)"),
    "value, another batch": ({"value": array(1, S, K, D)}, ValueError, "value", "(1, 7, 2, 8)"),
    "value, another length": ({"value": array(B, 9, K, D)}, ValueError, "value", "(2, 9, 2, 8)"),
    "value, other heads": ({"value": array(B, S, 1, D)}, ValueError, "value", "(2, 7, 1, 8)"),
    "N not a multiple of K": ({"key": array(B, S, 3, D), "value": array(B, S, 3, D)}, ValueError, "key", "K=3"),
    "more key heads": ({"key": array(B, S, 8, D), "value": array(B, S, 8, D)}, ValueError, "key", "K=8"),
    # Masks.
    "mask, a string": ({"mask": "causal"}, TypeError, "mask", "str"),
    "mask, a function": ({"mask": pa.masks.causal}, TypeError, "mask", "function"),
    "mask, a list": ({"mask": [[True]]}, TypeError, "mask", "list"),
    "mask, int32": ({"mask": int32(B, 1, T, S)}, ValueError, "mask", "int32"),
    "mask, float32": ({"mask": array(B, 1, T, S)}, ValueError, "mask", "float32"),
    "mask, rank 2": ({"mask": bools(T, S)}, ValueError, "mask", "[5, 7]"),
    "mask, rank 3": ({"mask": bools(B, T, S)}, ValueError, "mask", "[2, 5, 7]"),
    "mask, another T": ({"mask": bools(B, 1, 6, S)}, ValueError, "mask", "(2, 1, 6, 7)"),
    "mask, another S": ({"mask": bools(B, 1, T, 8)}, ValueError, "mask", "(2, 1, 5, 8)"),
    "mask, transposed": ({"mask": bools(B, 1, S, T)}, ValueError, "mask", "(2, 1, 7, 5)"),
    "mask, another batch": ({"mask": bools(3, 1, T, S)}, ValueError, "mask", "3"),
    "mask, other heads": ({"mask": bools(B, 3, T, S)}, ValueError, "mask", "3"),
    "mask, more heads": ({"mask": bools(B, 8, T, S)}, ValueError, "mask", "8"),
    "mask, heads that only divide N": (
        {"key": array(B, S, 4, D), "value": array(B, S, 4, D), "mask": bools(B, 2, T, S)},
        *(ValueError, "mask", "2"),
    ),
    "mask, heads that only divide N, beside N": (
        {
            "key": array(B, S, 1, D),
            "value": array(B, S, 1, D),
            "mask": pa.masks.dense(bools(B, 2, T, S)) & pa.masks.dense(bools(B, 4, T, S)),
        },
        *(ValueError, "mask", "2"),
    ),
    "prefix, another batch": ({"mask": pa.masks.prefix(int32(3))}, ValueError, "mask", "3"),
    "prefix, a batch of 3 in a mask of 2": (
        {"mask": pa.masks.prefix(int32(3)) | pa.masks.prefix(int32(2))},
        *(ValueError, "mask", "(3, 1, 1, 1)"),
    ),
    "segments, another T": ({"mask": pa.masks.segments(int32(B, 6), int32(B, S))}, ValueError, "mask", "(2, 1, 6, 1)"),
    "segments, another S": ({"mask": pa.masks.segments(int32(B, T))}, ValueError, "mask", "(2, 1, 1, 5)"),
    # Positions.
    "q_positions, a list": ({"q_positions": [[0, 1, 2, 3, 4]]}, TypeError, "q_positions", "list"),
    "q_positions, a number": ({"q_positions": 5}, TypeError, "q_positions", "int"),
    "q_positions, float32": ({"q_positions": array(B, T)}, ValueError, "q_positions", "float32"),
    "q_positions, bool": ({"q_positions": bools(B, T)}, ValueError, "q_positions", "bool"),
    "q_positions, rank 1": ({"q_positions": int32(T)}, ValueError, "q_positions", "(5,)"),
    "q_positions, rank 3": ({"q_positions": int32(B, N, T)}, ValueError, "q_positions", "(2, 4, 5)"),
    "q_positions, another T": ({"q_positions": int32(B, S)}, ValueError, "q_positions", "(2, 7)"),
    "q_positions, another batch": ({"q_positions": int32(3, T)}, ValueError, "q_positions", "(3, 5)"),
    "kv_positions, a number": ({"kv_positions": 7}, TypeError, "kv_positions", "int"),
    "kv_positions, float32": ({"kv_positions": array(B, S)}, ValueError, "kv_positions", "float32"),
    "kv_positions, rank 1": ({"kv_positions": int32(S)}, ValueError, "kv_positions", "(7,)"),
    "kv_positions, rank 4": ({"kv_positions": int32(B, K, 1, S)}, ValueError, "kv_positions", "(2, 2, 1, 7)"),
    "kv_positions, another S": ({"kv_positions": int32(B, T)}, ValueError, "kv_positions", "(2, 5)"),
    "kv_positions, another S, per head": ({"kv_positions": int32(B, K, T)}, ValueError, "kv_positions", "(2, 2, 5)"),
    "kv_positions, another batch": ({"kv_positions": int32(3, S)}, ValueError, "kv_positions", "(3, 7)"),
    "kv_positions, query heads": ({"kv_positions": int32(B, N, S)}, ValueError, "kv_positions", "(2, 4, 7)"),
    # A BlockMask has its own positions.
    "BlockMask and q_positions": (
        {"mask": BLOCK_MASK, "q_positions": int32(B, T)},
        ValueError,
        "q_positions",
        "a value",
    ),
    "BlockMask and kv_positions": (
        {"mask": BLOCK_MASK, "kv_positions": int32(B, S)},
        *(ValueError, "kv_positions", "a value"),
    ),
    "BlockMask and block_sizes": (
        {"mask": BLOCK_MASK, "block_sizes": pa.BlockSizes(16, 16)},
        *(ValueError, "block_sizes", "a value"),
    ),
    "BlockMask, another T": ({"mask": pa.BlockMask.from_mask(MASK, 6, S)}, ValueError, "mask.q_positions", "(1, 6)"),
    "BlockMask, another S": (
        {"mask": pa.BlockMask.from_mask(MASK, T, T)},
        ValueError,
        "mask.kv_positions",
        "(1, 1, 5)",
    ),
    "BlockMask, another batch": (
        {"mask": pa.BlockMask.from_mask(MASK, int32(3, T), S)},
        *(ValueError, "mask.q_positions", "(3, 5)"),
    ),
    "BlockMask, other heads": (
        {"mask": pa.BlockMask.from_mask(pa.masks.dense(bools(1, 3, T, S)), T, S)},
        *(ValueError, "mask", "3"),
    ),
    "BlockMask, keys per query head": (
        {"mask": pa.BlockMask.from_mask(MASK, T, int32(B, N, S))},
        *(ValueError, "mask.kv_positions", "(2, 4, 7)"),
    ),
    # Options.
    "scale, a string": ({"scale": "1"}, TypeError, "scale", "str"),
    "scale, a bool": ({"scale": True}, TypeError, "scale", "bool"),
    "scale, complex": ({"scale": 1j}, TypeError, "scale", "complex"),
    "scale, an array": ({"scale": jnp.float32(1)}, TypeError, "scale", "Array"),
    "scale, NaN": ({"scale": float("nan")}, ValueError, "scale", "nan"),
    "scale, infinite": ({"scale": float("inf")}, ValueError, "scale", "inf"),
    "implementation, unknown": ({"implementation": "cuda"}, ValueError, "implementation", "'cuda'"),
    "implementation, a bool": ({"implementation": False}, TypeError, "implementation", "False"),
    "interpret with xla": ({"interpret": True, "implementation": "xla"}, ValueError, "interpret", "'xla'"),
    "block_sizes, a tuple": ({"block_sizes": (16, 16)}, TypeError, "block_sizes", "tuple"),
    "block_sizes, an int": ({"block_sizes": 16}, TypeError, "block_sizes", "int"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_a_call_that_does_not_fit(name, compilations):
    change, exception, argument, came = BAD_CALLS[name]
    with pytest.raises(exception) as error:
        pa.attention(**{**GOOD, **change})
    assert_explains(error, argument, came)
    assert not compilations, "refused before anything is compiled"


def test_the_valid_call_passes():
    """Otherwise the invalid calls would prove nothing."""
    assert pa.attention(**GOOD, mask=MASK).shape == (B, T, N, D)


@pytest.mark.parametrize("name", ["query, rank 3", "mask, other heads", "kv_positions, another S", "scale, a string"])
def test_a_call_that_does_not_fit_is_refused_while_it_is_traced(name):
    change, exception, argument, came = BAD_CALLS[name]
    arguments = {**GOOD, **change}
    static = {key: x for key, x in arguments.items() if not hasattr(x, "dtype")}
    arrays = {key: x for key, x in arguments.items() if hasattr(x, "dtype")}
    with pytest.raises(exception) as error:
        jax.eval_shape(lambda arrays: pa.attention(**arrays, **static), arrays)
    assert_explains(error, argument, came)


POOL = array(9, PAGE, K, D)
PAGED = {"query": array(B, T, N, D), "key": POOL, "value": POOL, "page_table": int32(B, 3)}
BAD_PAGED_CALLS = {
    "page_table, a list": ({"page_table": [[0], [1]]}, TypeError, "page_table", "list"),
    "page_table, float32": ({"page_table": array(B, 3)}, ValueError, "page_table", "float32"),
    "page_table, rank 1": ({"page_table": int32(B)}, ValueError, "page_table", "int32 [2]"),
    "page_table, rank 3": ({"page_table": int32(B, 3, 1)}, ValueError, "page_table", "int32 [2, 3, 1]"),
    "page_table, one row": ({"page_table": int32(1, 3)}, ValueError, "page_table", "int32 [1, 3]"),
    "page_table, no pages": ({"page_table": int32(B, 0)}, ValueError, "page_table", "int32 [2, 0]"),
    "page_table, more keys": ({"page_table": int32(B, 2**26 + 1)}, ValueError, "page_table", "67108865 pages of 16"),
    "page of 8": (
        {"key": array(9, 8, K, D), "value": array(9, 8, K, D)},
        *(ValueError, "key", "(9, 8, 2, 8)"),
    ),
    "page of 24": (
        {"key": array(9, 24, K, D), "value": array(9, 24, K, D)},
        *(ValueError, "key", "(9, 24, 2, 8)"),
    ),
    "pool, rank 3": ({"key": array(9 * PAGE, K, D)}, ValueError, "key", "(144, 2, 8)"),
    "pool, no pages": ({"key": array(0, PAGE, K, D)}, ValueError, "key", "(0, 16, 2, 8)"),
    "pool, another head size": ({"key": array(9, PAGE, K, 16)}, ValueError, "key", "(9, 16, 2, 16)"),
    "pools of other sizes": ({"value": array(8, PAGE, K, D)}, ValueError, "value", "(8, 16, 2, 8)"),
    "pools of other pages": ({"value": array(9, 32, K, D)}, ValueError, "value", "(9, 32, 2, 8)"),
    "pool, float16": ({"key": array(9, PAGE, K, D, dtype=np.float16)}, ValueError, "key", "float16"),
    "kv_positions of the pool": ({"kv_positions": int32(B, PAGE)}, ValueError, "kv_positions", "(2, 16)"),
    "kv_positions, rows of the pool": ({"kv_positions": int32(9, 3 * PAGE)}, ValueError, "kv_positions", "(9, 48)"),
    "mask, keys of a page": ({"mask": bools(B, 1, T, PAGE)}, ValueError, "mask", "(2, 1, 5, 16)"),
    "bias, keys of a page": (
        {"scores": pa.scores.bias(array(B, 1, T, PAGE))},
        *(ValueError, "scores: bias", "(2, 1, 5, 16)"),
    ),
    "BlockMask, another S": (
        {"mask": pa.BlockMask.from_mask(MASK, T, PAGE)},
        *(ValueError, "mask.kv_positions", "(1, 1, 16)"),
    ),
}


@pytest.mark.parametrize("name", BAD_PAGED_CALLS)
def test_a_paged_call_that_does_not_fit(name, compilations):
    change, exception, argument, came = BAD_PAGED_CALLS[name]
    with pytest.raises(exception) as error:
        pa.attention(**{**PAGED, **change})
    assert_explains(error, argument, came)
    assert not compilations, "refused before anything is compiled"


def quantized(*shape, kind: str = "int8") -> pa.QuantizedArray:
    *leading, head_dim = shape
    if kind == "int4":
        return pa.QuantizedArray(array(*leading, head_dim // 2, dtype=np.uint8), array(*leading, 2))
    return pa.QuantizedArray(array(*leading, head_dim, dtype=np.dtype(kind)), array(*leading))


BAD_QUANTIZED_CALLS = {
    "query": ({"query": quantized(B, T, N, D)}, TypeError, "query", "QuantizedArray"),
    "rank 3": ({"key": quantized(S, K, D)}, ValueError, "key", "(7, 2, 8)"),
    "no tokens": ({"key": quantized(B, 0, K, D)}, ValueError, "key", "(2, 0, 2, 8)"),
    "another head size": ({"key": quantized(B, S, K, 16)}, ValueError, "key", "(2, 7, 2, 16)"),
    "another head size, int4": ({"key": quantized(B, S, K, 16, kind="int4")}, ValueError, "key", "(2, 7, 2, 16)"),
    "another length": ({"value": quantized(B, 9, K, D)}, ValueError, "value", "(2, 9, 2, 8)"),
    "values, int32": (
        {"key": pa.QuantizedArray(int32(B, S, K, D), array(B, S, K))},
        *(ValueError, "key.values", "int32"),
    ),
    "scales, float16": (
        {"value": pa.QuantizedArray(array(B, S, K, D, dtype=np.int8), array(B, S, K, dtype=np.float16))},
        *(ValueError, "value.scales", "float16 [2, 7, 2]"),
    ),
    "scales, another length": (
        {"value": pa.QuantizedArray(array(B, S, K, D, dtype=np.int8), array(B, T, K))},
        *(ValueError, "value.scales", "float32 [2, 5, 2]"),
    ),
    "scales, None": (
        {"key": pa.QuantizedArray(array(B, S, K, D, dtype=np.int8), None)},
        TypeError,
        "key.scales",
        "None",
    ),
}


@pytest.mark.parametrize("name", BAD_QUANTIZED_CALLS)
def test_a_quantized_call_that_does_not_fit(name, compilations):
    change, exception, argument, came = BAD_QUANTIZED_CALLS[name]
    with pytest.raises(exception) as error:
        pa.attention(**{**GOOD, **change})
    assert_explains(error, argument, came)
    assert not compilations, "refused before anything is compiled"


def test_the_valid_paged_and_quantized_calls_pass():
    assert jax.eval_shape(lambda: pa.attention(**PAGED, mask=MASK)).shape == (B, T, N, D)
    for kind in ("int8", "float8_e4m3fn", "int4"):
        call = {**GOOD, "key": quantized(B, S, K, D, kind=kind), "value": quantized(B, S, K, D)}
        assert jax.eval_shape(lambda: pa.attention(**call)).shape == (B, T, N, D)  # noqa: B023


QUANTIZED_CALL = {
    **GOOD,
    "key": quantized(B, S, K, D),
    "value": quantized(B, S, K, D, kind="int4"),
    "scores": pa.scores.bias(array(1, 1, T, S)),
    "sinks": array(N),
}
# The differentiated argument: floats in a call with quantized keys or values.
DIFFERENTIATED = {
    "query": ("query", QUANTIZED_CALL),
    "scales of keys": ("key", {**QUANTIZED_CALL, "value": array(B, S, K, D)}),
    "scales of values": ("value", {**QUANTIZED_CALL, "key": array(B, S, K, D)}),
    "plain keys": ("key", {**QUANTIZED_CALL, "key": array(B, S, K, D)}),
    "bias": ("scores", QUANTIZED_CALL),
    "sinks": ("sinks", QUANTIZED_CALL),
    "scales of pages": ("key", {**PAGED, "key": quantized(*POOL.shape), "value": quantized(*POOL.shape)}),
}


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("name", DIFFERENTIATED)
def test_a_quantized_call_has_no_gradient_and_raises(name, implementation):
    argument, call = DIFFERENTIATED[name]
    leaves, structure = jax.tree.flatten(call[argument])
    floats = [x for x in leaves if x.dtype == jnp.float32]
    assert floats

    def loss(floats):
        given = iter(floats)
        changed = structure.unflatten([next(given) if x.dtype == jnp.float32 else x for x in leaves])
        return pa.attention(**{**call, argument: changed}, implementation=implementation).sum()

    refused = pytest.raises(NotImplementedError, match=r"^quantized keys and values have no gradient: give plain ones")
    for wrap in (lambda f: f, jax.jit, jax.checkpoint):
        with refused:
            jax.make_jaxpr(jax.grad(wrap(loss)))(floats)
    with refused:
        jax.jit(jax.jacfwd(loss)).lower(floats)
    for stopped in (
        lambda x: x[0].sum() + jax.lax.stop_gradient(loss(x)),
        lambda x: x[0].sum() + loss(jax.lax.stop_gradient(x)),
    ):
        assert (jax.jit(jax.grad(stopped))(floats)[0] == 1).all()


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_key_weights_have_no_gradient_but_do_not_hinder_that_of_the_output(implementation):
    def attend(query):
        call = {**GOOD, "query": query}
        return pa.attention(**call, return_key_weights=True, implementation=implementation)

    with pytest.raises(NotImplementedError, match=r"^key_weights have no gradient: stop it by"):
        jax.grad(lambda query: attend(query).key_weights.sum())(jnp.ones((B, T, N, D)))
    for wrap in (lambda f: f, jax.jit, jax.checkpoint):
        assert jax.grad(wrap(lambda query: attend(query).out.sum()))(jnp.ones((B, T, N, D))).shape == (B, T, N, D)


CANNOT_SERVE = {
    "q block not a power of two": (
        {"block_sizes": pa.BlockSizes(24, 32)},
        "powers of two and at least 16, got q=24",
    ),
    "kv block too small": ({"block_sizes": pa.BlockSizes(32, 8)}, "powers of two and at least 16, got kv=8"),
    "blocks of a BlockMask": (
        {"mask": pa.BlockMask.from_mask(MASK, T, S, pa.BlockSizes(16, 12))},
        "powers of two and at least 16, got kv=12",
    ),
    "head size": ({n: np.zeros((*x.shape[:3], 257), np.float32) for n, x in GOOD.items()}, "up to 256, got 257"),
    "value size": ({"value": array(B, S, K, 300)}, "up to 256, got 300"),
}


@pytest.mark.parametrize("how", [{"interpret": True}, {"interpret": True, "implementation": "triton"}], ids=str)
@pytest.mark.parametrize("name", CANNOT_SERVE)
def test_a_named_implementation_that_cannot_serve_raises_its_reason(name, how, compilations):
    change, reason = CANNOT_SERVE[name]
    with pytest.raises(NotImplementedError, match=re.escape(reason)) as error:
        pa.attention(**{**GOOD, **change}, **how)
    assert "triton" in str(error.value)
    assert not compilations


@pytest.mark.parametrize("name", CANNOT_SERVE)
def test_an_unsupported_call_falls_back_to_the_next_implementation(name):
    change, _ = CANNOT_SERVE[name]
    assert jax.eval_shape(lambda: pa.attention(**{**GOOD, **change})).shape[:3] == (B, T, N)


@pytest.mark.skipif(pa.implementations()["triton"] is None, reason="here the compiled kernels can run")
def test_a_named_implementation_that_cannot_run_here_raises_its_reason(compilations):
    with pytest.raises(NotImplementedError, match="triton: needs an NVIDIA GPU, and JAX sees none"):
        pa.attention(**GOOD, implementation="triton")
    assert not compilations


# Masks, BlockMask and BlockSizes: (call, exception, name of the argument, what the message says it got).
BAD_PARTS = {
    "sliding_window, float": (lambda: pa.masks.sliding_window(2.0), TypeError, "left", "float"),
    "sliding_window, bool": (lambda: pa.masks.sliding_window(True), TypeError, "left", "bool"),
    "sliding_window, an array": (lambda: pa.masks.sliding_window(jnp.int32(3)), TypeError, "left", "Array"),
    "sliding_window, right a string": (lambda: pa.masks.sliding_window(2, "1"), TypeError, "right", "str"),
    "sliding_window, negative": (lambda: pa.masks.sliding_window(-1), ValueError, "left", "-1"),
    "sliding_window, right negative": (lambda: pa.masks.sliding_window(3, -2), ValueError, "right", "-2"),
    "sliding_window, empty": (lambda: pa.masks.sliding_window(0), ValueError, "sliding_window", "left=0, right=0"),
    "sliding_window, beyond int32": (lambda: pa.masks.sliding_window(2**31), ValueError, "left", "2147483648"),
    "sink, negative": (lambda: pa.masks.sink(-1), ValueError, "n", "-1"),
    "sink, float": (lambda: pa.masks.sink(1.5), TypeError, "n", "float"),
    "sink, beyond int32": (lambda: pa.masks.sink(2**40), ValueError, "n", "1099511627776"),
    "chunked, 0": (lambda: pa.masks.chunked(0), ValueError, "size", "0"),
    "chunked, None": (lambda: pa.masks.chunked(None), TypeError, "size", "NoneType"),
    "chunked, beyond int32": (lambda: pa.masks.chunked(2**31), ValueError, "size", "2147483648"),
    "prefix, float32": (lambda: pa.masks.prefix(array(B)), ValueError, "prefix: lengths", "float32"),
    "prefix, bool": (lambda: pa.masks.prefix(bools(B)), ValueError, "prefix: lengths", "bool"),
    "prefix, a number": (lambda: pa.masks.prefix(3), ValueError, "prefix: lengths", "()"),
    "prefix, rank 2": (lambda: pa.masks.prefix(int32(B, T)), ValueError, "prefix: lengths", "(2, 5)"),
    "segments, rank 1": (lambda: pa.masks.segments(int32(T)), ValueError, "segments: q_ids", "(5,)"),
    "segments, float32": (lambda: pa.masks.segments(array(B, T)), ValueError, "segments: q_ids", "float32"),
    "segments, kv_ids rank 3": (
        lambda: pa.masks.segments(int32(B, T), int32(B, 1, S)),
        *(ValueError, "segments: kv_ids", "(2, 1, 7)"),
    ),
    "segments, kv_ids float32": (
        lambda: pa.masks.segments(int32(B, T), array(B, S)),
        *(ValueError, "segments: kv_ids", "float32"),
    ),
    "dense, int32": (lambda: pa.masks.dense(int32(T, S)), ValueError, "dense: array", "int32"),
    "dense, rank 3": (lambda: pa.masks.dense(bools(B, T, S)), ValueError, "dense: array", "(2, 5, 7)"),
    "dense, rank 1": (lambda: pa.masks.dense(bools(T)), ValueError, "dense: array", "(5,)"),
    "from_mask, None": (lambda: pa.BlockMask.from_mask(None, T, S), TypeError, "mask", "NoneType"),
    "from_mask, an array": (lambda: pa.BlockMask.from_mask(bools(B, 1, T, S), T, S), TypeError, "mask", "ndarray"),
    "from_mask, 0 queries": (lambda: pa.BlockMask.from_mask(MASK, 0, S), ValueError, "q_positions", "0"),
    "from_mask, -1 keys": (lambda: pa.BlockMask.from_mask(MASK, T, -1), ValueError, "kv_positions", "-1"),
    "from_mask, a list": (lambda: pa.BlockMask.from_mask(MASK, T, [[0, 1]]), TypeError, "kv_positions", "list"),
    "from_mask, float32": (lambda: pa.BlockMask.from_mask(MASK, array(1, T), S), ValueError, "q_positions", "float32"),
    "from_mask, q rank 1": (lambda: pa.BlockMask.from_mask(MASK, int32(T), S), ValueError, "q_positions", "(5,)"),
    "from_mask, q rank 3": (
        lambda: pa.BlockMask.from_mask(MASK, int32(B, N, T), S),
        ValueError,
        "q_positions",
        "(2, 4, 5)",
    ),
    "from_mask, kv rank 4": (
        lambda: pa.BlockMask.from_mask(MASK, T, int32(B, K, 1, S)),
        *(ValueError, "kv_positions", "(2, 2, 1, 7)"),
    ),
    "from_mask, no keys": (lambda: pa.BlockMask.from_mask(MASK, T, int32(B, 0)), ValueError, "kv_positions", "(2, 0)"),
    "from_mask, two batches": (
        lambda: pa.BlockMask.from_mask(MASK, int32(2, T), int32(3, S)),
        *(ValueError, "mask", "[2, 3]"),
    ),
    "from_mask, heads that do not divide": (
        lambda: pa.BlockMask.from_mask(pa.masks.dense(bools(1, 3, T, S)), T, int32(1, 2, S)),
        *(ValueError, "mask", "[2, 3]"),
    ),
    "from_mask, three kinds of heads": (
        lambda: pa.BlockMask.from_mask(
            pa.masks.dense(bools(1, 2, T, S)) & pa.masks.dense(bools(1, 8, T, S)), T, int32(1, 4, S)
        ),
        *(ValueError, "mask", "[2, 4, 8]"),
    ),
    "from_mask, another T": (
        lambda: pa.BlockMask.from_mask(pa.masks.dense(bools(6, S)), T, S),
        *(ValueError, "mask", "(1, 1, 6, 7)"),
    ),
    "from_mask, another S": (
        lambda: pa.BlockMask.from_mask(pa.masks.segments(int32(1, T)), T, S),
        *(ValueError, "mask", "(1, 1, 1, 5)"),
    ),
    "from_mask, block_sizes a tuple": (
        lambda: pa.BlockMask.from_mask(MASK, T, S, (16, 16)),
        *(TypeError, "block_sizes", "tuple"),
    ),
    "BlockSizes, 0": (lambda: pa.BlockSizes(0, 16), ValueError, "BlockSizes.q", "0"),
    "BlockSizes, negative": (lambda: pa.BlockSizes(16, -16), ValueError, "BlockSizes.kv", "-16"),
    "BlockSizes, no warps": (lambda: pa.BlockSizes(16, 16, num_warps=0), ValueError, "BlockSizes.num_warps", "0"),
    "BlockSizes, no stages": (lambda: pa.BlockSizes(16, 16, num_stages=0), ValueError, "BlockSizes.num_stages", "0"),
    "BlockSizes, float": (lambda: pa.BlockSizes(16.0, 16), TypeError, "BlockSizes.q", "16.0"),
    "BlockSizes, string": (lambda: pa.BlockSizes(16, "16"), TypeError, "BlockSizes.kv", "'16'"),
    "BlockSizes, bool": (lambda: pa.BlockSizes(True, 16), TypeError, "BlockSizes.q", "True"),
}


@pytest.mark.parametrize("name", BAD_PARTS)
def test_a_part_that_does_not_fit(name):
    call, exception, argument, came = BAD_PARTS[name]
    with pytest.raises(exception) as error:
        call()
    assert_explains(error, argument, came)
