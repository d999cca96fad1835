"""With ``jax_enable_x64`` everything still computes in 32 bits: the same programs, dtypes and bits."""

import functools
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.interpreters import mlir
from jax._src.lib.triton import dialect as triton_dialect
from jaxlib.mlir import ir, passmanager

import pallas_attn as pa
from bench.machine_code import compiled
from bench.machine_code.compiled import lower_for_cuda
from pallas_attn.kernels import triton as kernels
from pallas_attn.kernels.call import Call
from pallas_attn.scores import traced
from tests import oracle, test_decode, test_gradients, x64_check
from tests.attention_check import LAST, LEFT, B, K, N, S, T, dense, options
from tests.gradient_check import Case
from tests.x64_check import assert_same_with_the_flag, normal, wide_equations

SLOW = pytest.mark.slow
IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["reference", "xla", "interpreted"])


def scores() -> tuple[pa.scores.Score, ...]:
    """One of each kind."""

    def by_distance(logit, q, k, head, params):
        return logit * params["head"][head] + params["distance"][jnp.clip(q - k, 0, 6)]

    return (
        pa.scores.softcap(3.0),
        pa.scores.alibi(normal(N)),
        pa.scores.bias(normal(1, N, T, S)),
        pa.scores.bias(normal(B, 1, 1, S)),
        pa.scores.custom(by_distance, {"head": normal(N), "distance": normal(7)}),
    )


# No traced equation here has a 64-bit result.
MASKS = {
    "window": oracle.sliding_window(7, 2),
    "prefix": oracle.prefix(np.array([17, 3])) | oracle.causal(),
    "sink": oracle.sink(3) | oracle.sliding_window(5),
    "chunked": ~oracle.chunked(10) & oracle.causal(),
    "operands of every kind": test_gradients.CASES["operands of every kind"].mask,
    "per query head": dense(B, N, T, S),
}


@IMPLEMENTATIONS
@pytest.mark.parametrize("name", MASKS)
def test_both_passes_have_no_wide_number(name, implementation):
    case = Case(MASKS[name], LAST, LEFT, sinks=normal(N))
    arrays, (d_out, d_lse) = case.all_arrays(), case.cotangents()
    assert wide_equations(case.both_passes(implementation), arrays, d_out, d_lse) == []


def attend(implementation, query, key, value, mask=None, **changes):
    """One call; its block sizes are small."""
    mask = pa.masks.causal() if mask is None else mask
    changes = {"block_sizes": pa.BlockSizes(16, 16), "q_positions": LAST[:, -query.shape[1] :], **changes}
    return pa.attention(query, key, value, mask, return_lse=True, **changes, **options(implementation))


def tensors(q_len: int = T) -> tuple[np.ndarray, ...]:
    key = normal(B, S, K, 32)
    return normal(B, q_len, N, 32), key, key[:, ::-1]


@IMPLEMENTATIONS
def test_gradients_of_scores_have_no_wide_number(implementation):
    def loss(scores, sinks, *tensors):
        return attend(implementation, *tensors, scores=scores, sinks=sinks)[0].sum()

    assert wide_equations(jax.grad(loss, argnums=(0, 1, 2)), scores(), normal(N), *tensors()) == []


@IMPLEMENTATIONS
@pytest.mark.parametrize("q_len", [3, T])
@pytest.mark.parametrize("kind", ["int8", "float8_e4m3fn", "int4"])
@pytest.mark.parametrize("page", [None, 16, 48])
def test_keys_however_they_are_stored_have_no_wide_number(page, kind, q_len, implementation):
    def call(query, key, value, table):
        key, value = (pa.QuantizedArray.quantize(x, kind, group=8) for x in (key, value))
        return attend(implementation, query, key, value, page_table=table, return_key_weights=True)

    if page is None:
        assert wide_equations(call, *tensors(q_len), None) == []
    else:
        pool, table = normal(7, page, K, 32), np.array([[0, 3, -1], [5, 1, 2]], np.int32)
        assert wide_equations(call, normal(B, q_len, N, 32), pool, pool + 1, table) == []


@IMPLEMENTATIONS
@pytest.mark.parametrize("sizes", [pa.BlockSizes(16, 16), pa.BlockSizes(16, 16, chunk=2)], ids=["shares", "chunks"])
def test_decode_has_no_wide_number(sizes, implementation):
    call = functools.partial(attend, implementation, block_sizes=sizes, return_key_weights=True)
    assert wide_equations(lambda *x: call(*x[:3], scores=x[3]), *tensors(5), scores()[:2]) == []


@IMPLEMENTATIONS
@pytest.mark.parametrize("shared", [(), (1, 2)], ids=["all mapped", "keys shared"])
def test_vmap_has_no_wide_number(shared, implementation):
    axes = tuple(None if i in shared else 0 for i in range(3))

    def both(*tensors):
        loss = lambda *x: attend(implementation, *x)[0].sum()  # noqa: E731
        return jax.vmap(functools.partial(attend, implementation), axes)(*tensors), jax.vmap(
            jax.grad(loss, argnums=(0, 1, 2)), axes
        )(*tensors)

    mapped = [x if i in shared else np.stack([x] * 3) for i, x in enumerate(tensors(2))]
    assert wide_equations(both, *mapped) == []


POLICIES = {
    "dense": pa.caches.Dense(),
    "window": pa.caches.Window(12, 2),
    "H2O": pa.caches.H2O(4, normalize=True, value_norm=True),
    "Q-Hitter": pa.caches.QHitter(4),
}
STORAGES = {
    "plain": pa.caches.Plain(),
    "int8": pa.caches.Int8(),
    "float8": pa.caches.Float8(),
    "int4": pa.caches.Int4(8),
    "paged": pa.caches.Paged(16, 7),
    "paged int4": pa.caches.Paged(16, 7, pa.caches.Int4(8)),
}


def life_of_a_cache(policy: pa.caches.Policy, storage: pa.caches.Storage):
    """Every method of a cache, whose arguments are int32."""

    def run(key, value, query):
        cache = pa.caches.init(
            policy, storage, batch_size=B, capacity=16, kv_heads=K, head_dim=32, dtype=jnp.float32
        )  # fmt: skip
        made = []
        for start in (0, 9):
            new = slice(start, start + 9)
            positions = jnp.arange(start, start + 9, dtype=jnp.int32)[None] - jnp.array([[0], [2]], jnp.int32)
            cache = cache.append(key[:, new], value[:, new], positions)
            view = cache.view()
            seen = {"kv_positions": view.positions, "page_table": view.page_table, "q_positions": positions[:, -2:]}
            out = attend("xla", query[:, :2], view.key, view.value, return_key_weights=True, **seen)
            cache = cache.observe(out.key_weights)
            made.append((out, cache))
        one = np.array([1], np.int32)
        cache = cache.append(key[:1, :1], value[:1, :1], np.array([[18]], np.int32), one)
        made.append(cache.view(one))
        if not policy.observes:
            made.append(cache.truncate(np.array([7, 11], np.int32)))
        if policy.ordered:
            pairs = np.array([[0, 2], [0, 1]], np.int32)
            made.append(cache.keep(np.array([4, 5], np.int32), pairs, np.array([2, 1], np.int32)))
        made.append(cache.fork(np.array([1, 1], np.int32)))
        made.append(cache.copy_rows(one, one - 1, np.int32(1)))
        return made, cache.reset(np.array([True, False]))

    return run


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("policy", POLICIES)
def test_caches_have_no_wide_number(policy, storage):
    run = life_of_a_cache(POLICIES[policy], STORAGES[storage])
    query, key, value = tensors()
    assert wide_equations(run, key, value, query) == []


# Some programs also run.


@pytest.mark.parametrize(
    ("name", "implementation"),
    [
        ("key positions per head", "reference"),
        ("left padding, bfloat16", "xla"),
        pytest.param("operands of every kind", "xla", marks=SLOW),
        pytest.param("1x1", "interpreted", marks=SLOW),
        ("key positions per head", "interpreted"),
    ],
)
def test_both_passes_are_the_same(name, implementation):
    case = test_gradients.CASES[name]
    arrays, (d_out, d_lse) = case.all_arrays(), case.cotangents()
    assert_same_with_the_flag(case.both_passes(implementation), arrays, d_out, d_lse)


@pytest.mark.parametrize("implementation", ["xla", pytest.param("interpreted", marks=SLOW)])
def test_decode_is_the_same(implementation):
    case = test_decode.CASES["holes per key head"]
    assert_same_with_the_flag(case.program(implementation), *case.arrays(0))


@pytest.mark.parametrize(
    ("policy", "storage"),
    [("Q-Hitter", "int8"), *(pytest.param(*x, marks=SLOW) for x in (("dense", "paged int4"), ("window", "float8")))],
)
def test_caches_are_the_same(policy, storage):
    query, key, value = tensors()
    assert_same_with_the_flag(jax.jit(life_of_a_cache(POLICIES[policy], STORAGES[storage])), key, value, query)


def test_what_one_makes_the_other_reads():
    """A BlockMask, a cache and a compiled function, made with the flag and used without it, and vice versa."""
    tokens = tensors(2)
    step = jax.jit(
        lambda cache, block_mask, *x: (
            attend("xla", *x, block_mask, q_positions=None, block_sizes=None),
            cache.append(*x[1:], LEFT),
        )
    )

    def make():
        cache = pa.caches.init(batch_size=B, capacity=S, kv_heads=K, head_dim=32, dtype=jnp.float32)
        return cache, pa.BlockMask.from_mask(pa.masks.causal(), LAST[:, -2:], LEFT, pa.BlockSizes(16, 16))

    made = jax.jit(make)()
    expected = step(*made, *tokens)
    with jax.enable_x64(True):
        made_with = jax.jit(make)()
        x64_check.assert_same_bits(step(*made, *tokens), expected)
    x64_check.assert_same_bits(step(*made_with, *tokens), expected)


@pytest.mark.parametrize("implementation", ["xla", pytest.param("reference", marks=SLOW)])
def test_integers_of_64_bits_are_the_same_numbers(implementation):
    """Positions, page tables, rows and paths as ``jnp.arange`` gives them under the flag."""
    pool, table = normal(7, 16, K, 32), np.array([[0, 3, -1], [5, 1, 2]], np.int32)
    query, positions = normal(B, 3, N, 32), np.array([[40, 41, 42], [9, 10, -1]], np.int32)
    call = jax.jit(
        lambda *x: pa.attention(
            query, pool, pool, pa.masks.causal(), q_positions=x[0], page_table=x[1], implementation=implementation
        )
    )

    def keep(key, positions, rows, first, path):
        cache = pa.caches.init(batch_size=B, capacity=48, kv_heads=K, head_dim=32, dtype=jnp.float32)
        cache = cache.append(key, key, positions[:, ::-1]).append(key[:1], key[:1], positions[:1], rows)
        return cache.keep(first, path, first + 1)

    arguments = positions, np.array([1], np.int32), np.array([1, 2], np.int32), np.array([[0, 1], [0, 1]], np.int32)
    expected = call(positions, table), jax.jit(keep)(query[:, :, :K], *arguments)
    with jax.enable_x64(True):
        widened = [jnp.asarray(x, jnp.int64) for x in (positions, table, *arguments)]
        assert all(x.dtype == jnp.int64 for x in widened)
        actual = call(*widened[:2]), jax.jit(keep)(query[:, :, :K], *widened[2:])
    x64_check.assert_same_bits(actual, expected)


def test_a_float64_query_is_refused():
    with jax.enable_x64(True):
        x = jnp.zeros((1, 4, 2, 16))
        assert x.dtype == jnp.float64
        with pytest.raises(ValueError, match=r"^query: expected dtype float32, bfloat16, float16 .* got float64"):
            pa.attention(x, x, x)


def test_a_process_with_the_flag_gives_the_same_bits():
    """As users set it, before anything else; strict promotion, as everywhere in these tests."""
    variables = {
        "JAX_ENABLE_X64": "1",
        "JAX_NUMPY_DTYPE_PROMOTION": "strict",
        "JAX_NUMPY_RANK_PROMOTION": "raise",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    run = subprocess.run(
        [sys.executable, "-m", "tests.x64_check"],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["int64", x64_check.digest(x64_check.everything())]


# Kernels for CUDA.


def simplified(call: dict) -> str:
    """A kernel's Triton IR with constants inlined at their uses, because their order is irrelevant."""
    context = mlir.make_ir_context()
    triton_dialect.register_dialect(context)
    with context, ir.Location.unknown():
        module = ir.Module.parse(call["ir"].value_bytes)
        passmanager.PassManager.parse("builtin.module(canonicalize,cse)").run(module.operation)
        text = module.operation.get_asm(enable_debug_info=False)
    constant = re.compile(r"^ *(%\w+) = (arith\.constant .*)\n", re.MULTILINE)
    values = dict(constant.findall(text))
    return re.sub(r"%\w+", lambda name: values.get(name[0], name[0]), constant.sub("", text))


def lowered_kernels(kind: str | None, page: int | None, q_len: int, dtype: str, differentiate: bool) -> dict[str, str]:
    """Every kernel of a call, by name."""
    head_dim, length = 64, 96
    sizes = pa.BlockSizes(32, 32)
    tokens = (B, length) if page is None else (9, page)

    def call(query, key, value, q_positions, kv_positions, table, sinks, scores):
        block_mask = pa.BlockMask.from_mask(pa.masks.sliding_window(40, 2), q_positions, kv_positions, sizes)
        call = Call(query, key, value, block_mask, traced(scores), sinks, table)
        out, lse, weights = kernels.forward(call, scale=0.1, return_key_weights=True)
        if not differentiate:
            return out, lse.value, weights
        return kernels.backward(call._replace(sinks=None), lse, lse.value, out, scale=0.1)

    def struct(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))

    key = struct(*tokens, K, head_dim)
    if kind is not None:
        key = jax.eval_shape(lambda x: pa.QuantizedArray.quantize(x, kind, group=16), key)
    biases = pa.scores.bias(normal(1, N, 1, length)), *scores()[:2], scores()[-1]
    lowered = lower_for_cuda(
        lambda *x: call(*x),
        struct(B, q_len, N, head_dim),
        *(key, key),
        struct(B, q_len, dtype="int32"),
        struct(B, K, length, dtype="int32"),
        None if page is None else struct(B, length // page, dtype="int32"),
        struct(N, dtype="float32"),
        biases,
    )
    calls = compiled.triton_calls(lowered.compiler_ir("stablehlo").operation)
    return {f"{i} {call['name'].value}": simplified(call) for i, call in enumerate(calls)}


@pytest.mark.parametrize(
    ("kind", "page", "q_len", "dtype", "differentiate"),
    [
        (None, None, 50, "bfloat16", True),
        ("int4", 16, 50, "bfloat16", False),
        (None, None, 2, "bfloat16", False),
        ("float8_e4m3fn", 48, 2, "bfloat16", False),
        pytest.param(None, None, 50, "float32", True, marks=SLOW),
        pytest.param(None, 48, 50, "float16", False, marks=SLOW),
        pytest.param("int8", None, 50, "float32", False, marks=SLOW),
        pytest.param("int4", 16, 2, "float16", False, marks=SLOW),
    ],
)
def test_kernels_for_cuda_are_the_same(kind, page, q_len, dtype, differentiate):
    without = lowered_kernels(kind, page, q_len, dtype, differentiate)
    with jax.enable_x64(True):
        with_it = lowered_kernels(kind, page, q_len, dtype, differentiate)
    assert len(without) == (7 if differentiate else 2 if q_len > 16 else 3)
    assert with_it == without
