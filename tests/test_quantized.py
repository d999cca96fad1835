"""QuantizedArray: quantization errors, the packing of int4, and invalid arguments."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_attn as pa
from pallas_attn.quantized import QuantizedArray
from tests import oracle, tolerances

KINDS = ("int8", "float8_e4m3fn", "int4")
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)
GROUP = 8
rng = np.random.default_rng(0)
X = rng.standard_normal((3, 5, 2, 32)).astype(np.float32)
WIDE = X * 10.0 ** rng.uniform(-20, 20, X.shape[:-1])[..., None].astype(np.float32)

ARRAYS = {
    "normal": X,
    "bfloat16": X.astype(jnp.bfloat16),
    "float16": X.astype(np.float16),
    "of very different sizes": WIDE,
    "all equal": np.full_like(X, -0.7),
    "one that stands out": np.where(np.arange(32) == 17, 1e4, X).astype(np.float32),
    "zeros": np.zeros_like(X),
    "huge": X * np.float32(5e37),
    "tiny": X * np.float32(1e-37),
    "subnormal": X * np.float32(1e-42),
}


def quantize(x, kind: str) -> QuantizedArray:
    return QuantizedArray.quantize(jnp.asarray(x), kind, GROUP)


@EVERY_KIND
@pytest.mark.parametrize("name", ARRAYS)
def test_it_is_half_a_quantum_away(name, kind):
    x = ARRAYS[name].astype(np.float64)
    quantized = quantize(ARRAYS[name], kind)
    actual = np.asarray(quantized.dequantize(), np.float64)
    groups = np.abs(x).reshape(*x.shape[:-1], -1, GROUP if kind == "int4" else 32)
    limit = tolerances.quantization_limit(groups, kind).reshape(x.shape)
    assert (np.abs(actual - x) <= limit).all()
    np.testing.assert_array_equal(actual.astype(np.float32), oracle.dequantize(quantized).astype(np.float32))


@EVERY_KIND
def test_its_sizes_are_those_of_what_it_stands_for(kind):
    quantized = quantize(X, kind)
    quantized.check("x")
    assert quantized.kind == kind
    assert quantized.shape == X.shape
    assert quantized.ndim == X.ndim
    assert quantized.group == (GROUP if kind == "int4" else 32)
    tokens = 3 * 5 * 2
    assert quantized.nbytes == tokens * {"int8": 32 + 4, "float8_e4m3fn": 32 + 4, "int4": 16 + 4 * 4}[kind]
    assert quantized.scales.dtype == jnp.float32
    assert quantized.dequantize().dtype == jnp.float32


@EVERY_KIND
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_visible_in_its_own_vector(kind, bad):
    x = X.copy()
    x[1, 2, 0, 3] = bad
    actual = np.array(quantize(x, kind).dequantize())
    group = slice(0, GROUP if kind == "int4" else 32)
    assert np.isnan(actual[1, 2, 0, group]).all()
    x[1, 2, 0, group] = actual[1, 2, 0, group] = 0
    assert np.isfinite(actual).all()
    assert np.isnan(quantize(np.full_like(X, bad), kind).dequantize()).all()


def test_two_columns_of_int4_share_a_byte():
    """Every pair of numbers: the low bits hold the column of the first half, the high bits that of the second."""
    pairs = np.array(list(itertools.product(range(-8, 8), repeat=2)))
    for low, high in pairs:
        byte = np.uint8((low & 15) + 16 * (high & 15))
        quantized = QuantizedArray(jnp.full((1, 1), byte), jnp.ones((1, 2)))
        np.testing.assert_array_equal(quantized.dequantize(), [[low, high]])
    x = np.clip(pairs.reshape(1, -1), -7, 7).astype(np.float32)
    x = np.where(np.arange(x.size) % GROUP == 0, 7, x)  # a scale of 1 in each group
    quantized = quantize(x, "int4")
    np.testing.assert_array_equal(quantized.dequantize(), x)
    first, second = np.split(x.astype(np.int64), 2, -1)
    np.testing.assert_array_equal(quantized.values, (first & 15) + 16 * (second & 15))


@EVERY_KIND
def test_it_is_a_pytree(kind):
    expected = quantize(X, kind)
    jitted = jax.jit(lambda x: quantize(x, kind))(X)
    mapped = jax.vmap(lambda x: quantize(x, kind))(X)
    for other in (jitted, mapped, jax.tree.map(lambda x: x, expected)):
        np.testing.assert_array_equal(other.values, expected.values)
        np.testing.assert_array_equal(other.scales, expected.scales)
    whole = expected.dequantize()
    np.testing.assert_array_equal(jax.vmap(lambda x: x.dequantize())(expected), whole)
    np.testing.assert_array_equal(jax.tree.map(lambda x: x[1], expected).dequantize(), whole[1])


def zeros(dtype, *shape) -> np.ndarray:
    return np.zeros(shape, dtype)


BAD = {
    "kind": (lambda: QuantizedArray.quantize(X, "int5"), ValueError, "kind: expected .*, got 'int5'"),
    "integers": (lambda: QuantizedArray.quantize(X.astype(np.int32), "int8"), ValueError, "x: expected .*, got int32"),
    "a number": (lambda: QuantizedArray.quantize(np.float32(1), "int8"), ValueError, r"x: expected .* \[\]"),
    "group of 12": (lambda: QuantizedArray.quantize(X, "int4", 12), ValueError, "group: expected .* 16 .*, got 12"),
    "group across the middle": (lambda: QuantizedArray.quantize(X, "int4", 32), ValueError, "group: .*, got 32"),
    "no group": (lambda: QuantizedArray.quantize(X, "int4", 0), ValueError, "group: expected .*, got 0"),
    "an odd D": (lambda: QuantizedArray.quantize(X[..., :7], "int4", 1), ValueError, "group: expected .*, got 1"),
    "no tokens": (
        lambda: QuantizedArray.quantize(X[:0], "int8"),
        ValueError,
        r"x: expected no empty axis, got shape \(0",
    ),
    "no columns": (lambda: QuantizedArray.quantize(X[..., :0], "int4"), ValueError, "x: expected no empty axis"),
    "values, a list": (lambda: QuantizedArray([1], X).check("key"), TypeError, "key.values: expected .*, got list"),
    "values, int32": (
        lambda: QuantizedArray(zeros(np.int32, 3, 2, 8), zeros(np.float32, 3, 2)).check("key"),
        *(ValueError, "key.values: expected dtype .*, got int32"),
    ),
    "scales, float16": (
        lambda: QuantizedArray(zeros(np.int8, 3, 2, 8), zeros(np.float16, 3, 2)).check("key"),
        *(ValueError, r"key.scales: expected float32 \[3, 2\], got float16"),
    ),
    "scales, other heads": (
        lambda: QuantizedArray(zeros(np.int8, 3, 2, 8), zeros(np.float32, 3, 1)).check("key"),
        *(ValueError, r"key.scales: expected float32 \[3, 2\], got float32 \[3, 1\]"),
    ),
    "scales of groups, int8": (
        lambda: QuantizedArray(zeros(np.int8, 3, 2, 8), zeros(np.float32, 3, 2, 2)).check("key"),
        *(ValueError, r"key.scales: .* got float32 \[3, 2, 2\]"),
    ),
    "scales of tokens, int4": (
        lambda: QuantizedArray(zeros(np.uint8, 3, 2, 8), zeros(np.float32, 3, 2)).check("key"),
        *(ValueError, r"key.scales: expected float32 \[3, 2, 'groups'\] .* got float32 \[3, 2\]"),
    ),
    "an odd number of groups": (
        lambda: QuantizedArray(zeros(np.uint8, 3, 2, 6), zeros(np.float32, 3, 2, 3)).check("key"),
        *(ValueError, r"key.scales: .* got float32 \[3, 2, 3\]"),
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit(name):
    call, exception, message = BAD[name]
    with pytest.raises(exception, match=f"^{message}"):
        call()


def test_it_is_exported():
    assert pa.QuantizedArray is QuantizedArray
