"""attention() of quantized keys and values equals that of the dequantized ones, without a dequantized copy."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_attn as pa
from tests import oracle
from tests.attention_check import HOLES, LAST, LEFT, B, K, N, S, T, assert_error, dense, options
from tests.gradient_check import Case

PLAIN, KINDS = "plain", ("int8", "float8_e4m3fn", "int4")
IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["reference", "xla"])
CAUSAL = oracle.causal()
rng = np.random.default_rng(7)
DECODE = {"q_len": 3, "q_positions": LAST[:, -3:]}

# Calls, and the kinds of key and value.
CASES = {
    **{kind: (Case(CAUSAL, LAST, LEFT), kind, kind) for kind in KINDS},
    **{f"decode, {kind}": (Case(CAUSAL, kv_positions=LEFT, **DECODE), kind, kind) for kind in KINDS},
    "full blocks": (Case(q_len=32, kv_len=48), "int8", "int4"),
    "int4 keys, plain values": (Case(CAUSAL, LAST, LEFT), "int4", PLAIN),
    "plain keys, float8 values": (Case(CAUSAL, LAST, LEFT), PLAIN, "float8_e4m3fn"),
    "decode, int8 keys, int4 values": (Case(CAUSAL, kv_positions=LEFT, **DECODE), "int8", "int4"),
    "empty slots per head": (Case(CAUSAL, LAST, HOLES), "int4", "int8"),
    "decode, empty slots per head": (Case(CAUSAL, kv_positions=HOLES, **DECODE), "int4", "int8"),
    "a mask per head": (Case(dense(1, N, T, S)), "int8", "int8"),
    "one key head, other value size": (Case(CAUSAL, LAST, LEFT, kv_heads=1, value_dim=48), "int8", "int4"),
    "bfloat16": (Case(CAUSAL, LAST, LEFT, dtype="bfloat16"), "int8", "int8"),
    "float16, mixed": (Case(CAUSAL, LAST, LEFT, dtype="float16"), "int4", PLAIN),
    "decode, bfloat16": (Case(CAUSAL, kv_positions=LEFT, dtype="bfloat16", **DECODE), "float8_e4m3fn", "int4"),
    "scores and sinks": (
        Case(CAUSAL, LAST, LEFT, scores=(oracle.softcap(2.0),), sinks=rng.standard_normal(N).astype(np.float32)),
        *("int8", "int4"),
    ),
}


def quantize(x: np.ndarray, kind: str):
    """Poison stays: NaN quantizes to NaN scales with arbitrary values."""
    if kind == PLAIN:
        return x
    quantized = pa.QuantizedArray.quantize(jnp.asarray(x), kind, group=8)
    poison = np.asarray(jnp.isnan(x.astype(np.float32)).any(-1))
    assert np.isnan(np.asarray(quantized.dequantize())[poison]).all()
    return quantized


def stands_for(x) -> np.ndarray:
    return oracle.dequantize(x) if isinstance(x, pa.QuantizedArray) else x


@IMPLEMENTATIONS
@pytest.mark.parametrize("name", CASES)
def test_attends_to_what_they_stand_for(name, implementation):
    case, key_kind, value_kind = CASES[name]
    arrays = case.all_arrays()
    given = arrays._replace(key=quantize(arrays.key, key_kind), value=quantize(arrays.value, value_kind))
    mask = case.mask.build(pa.masks)
    actual = jax.jit(lambda *given: case.call(given[0], *given[1:], implementation))(
        given, mask, case.q_positions, case.kv_positions
    )
    key, value = stands_for(given.key), stands_for(given.value)
    rest = case.visible, case.factor, case.scores, case.sinks, case.pairs
    expected = oracle.attention(arrays.query, key, value, *rest)
    rounded = [x.astype(jnp.dtype(case.dtype)) for x in (key, value)]
    plain = oracle.plain_attention(arrays.query, *rounded, *rest)
    assert actual.out.dtype == case.dtype
    seen = expected[1] > -np.inf
    out, lse = (np.asarray(x, np.float64) for x in actual[:2])
    assert (lse[~seen] == -np.inf).all()
    assert (out.swapaxes(1, 2)[~seen] == 0).all()
    assert_error(out, expected[0], plain[0], case.dtype, "out")
    assert_error(lse[seen], expected[1][seen], plain[1][seen], "float32", "lse")


LENGTH = 2048
ROWS = {"prefill": 24, "decode": 1}


def arrays_of(text: str) -> set[tuple[str, int]]:
    """The dtype and size of every array in a compiled program."""
    found = re.findall(r"\b([a-z]+[0-9][0-9a-z]*)\[([0-9,]+)\]", text)
    return {(dtype, math.prod(map(int, shape.split(",")))) for dtype, shape in found}


@pytest.mark.parametrize("is_paged", [False, True], ids=["contiguous", "paged"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", ROWS)
def test_no_copy_of_the_whole_is_made(step, kind, is_paged):
    """Neither of floats nor, with gathered pages, of anything: the program allocates only tiles."""
    query = jnp.zeros((B, ROWS[step], N, 32))
    tokens = jnp.zeros((B * LENGTH // 32, 32, K, 32) if is_paged else (B, LENGTH, K, 32))
    kv = pa.QuantizedArray.quantize(tokens, kind, 8)
    table = jnp.arange(B * LENGTH // 32, dtype=jnp.int32).reshape(B, -1) if is_paged else None

    @jax.jit
    def call(query, key, value):
        return pa.attention(
            query, key, value, pa.masks.causal(), page_table=table, implementation="xla",
            q_positions=jnp.full((1, ROWS[step]), LENGTH - 1, jnp.int32), block_sizes=pa.BlockSizes(16, 32),
        )  # fmt: skip

    compiled = call.lower(query, kv, kv).compile()
    whole = B * LENGTH * K * 32
    stored = {"int8": "s8", "float8_e4m3fn": "f8e4m3fn", "int4": "u8"}[kind]
    found = arrays_of(compiled.as_text())
    assert (stored, kv.values.size) in found, "what is looked for would be found"
    # XLA on a CPU cannot slice 8-bit floats, only their bits.
    floats = {(dtype, size) for dtype, size in found if dtype.startswith(("f", "bf")) and size >= whole}
    assert floats <= {("f8e4m3fn", whole)}
    if kind != "float8_e4m3fn":
        assert compiled.memory_analysis().temp_size_in_bytes < 4 * whole / 2


@pytest.mark.parametrize("shape", ["prefill", "decode"])
def test_vmap_is_a_loop(shape):
    t = 19 if shape == "prefill" else 2
    query = jnp.asarray(rng.standard_normal((3, B, t, N, 32)), jnp.float32)
    key, value = (
        pa.QuantizedArray.quantize(jnp.asarray(rng.standard_normal((3, B, S, K, 32)), jnp.float32), "int4", 8)
        for _ in range(2)
    )

    def attend(query, key, value):
        return pa.attention(query, key, value, pa.masks.causal(), return_key_weights=True, **options("xla"))

    for axes in ((0, 0, 0), (None, 0, None)):
        pairs = list(zip((query, key, value), axes, strict=True))
        arguments = [x if axis == 0 else jax.tree.map(lambda x: x[1], x) for x, axis in pairs]
        actual = jax.vmap(attend, axes)(*arguments)
        for i in range(3):
            one = [jax.tree.map(lambda x: x[i if axis == 0 else 1], x) for x, axis in pairs]  # noqa: B023
            expected = attend(*one)
            np.testing.assert_array_equal(actual.out[i], expected.out)
            np.testing.assert_array_equal(actual.key_weights[i], expected.key_weights)


def test_the_cases_are_of_both_kinds():
    """Few enough queries for decode, and more."""
    few = [case.q_len <= 16 for case, *_ in CASES.values()]
    assert min(few.count(True), few.count(False)) >= 5
