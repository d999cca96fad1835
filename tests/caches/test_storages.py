"""Storages under every policy: contents, bytes, updates in place, and attention."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_attn as pa
from pallas_attn.caches import H2O, Dense, Float8, Int4, Int8, Paged, Plain, QHitter, Window
from tests import cache_models, oracle, tolerances

B, CAPACITY, K, N, D, PAGE = 3, 32, 2, 4, 8, 16
GROUP = 2
POLICIES = {
    "dense": (Dense(), cache_models.Dense, {}),
    "window": (Window(5, 2), cache_models.Window, {"size": 5, "sinks": 2}),
    "h2o": (H2O(4), cache_models.HeavyHitters, {"recent": 4}),
    "h2o, normalised, norms": (
        H2O(4, normalize=True, value_norm=True),
        *(cache_models.HeavyHitters, {"recent": 4, "normalize": True, "value_norm": True}),
    ),
}
STORAGES = {
    "plain": Plain(),
    "int8": Int8(),
    "int4": Int4(GROUP),
    "float8": Float8(),
    "paged": Paged(PAGE, 7),
    "paged int8": Paged(PAGE, 6, Int8()),
    "paged int4": Paged(PAGE, 6, Int4(GROUP)),
    "paged float8": Paged(PAGE, 6, Float8()),
}
EVERY_STORAGE = pytest.mark.parametrize("storage_name", STORAGES)
KIND = {Int8: ("int8",), Int4: ("int4", GROUP), Float8: ("float8_e4m3fn",)}
LENGTHS = (9, 1, 9, 1, 9, 1, 9, 1, 9)  # of chunks: more tokens than slots


def inner(storage):
    return storage.inner if isinstance(storage, Paged) else storage


def empty(policy=None, storage=None, capacity: int = CAPACITY, dtype="float32") -> pa.caches.KVCache:
    sizes = {"batch_size": B, "capacity": capacity, "kv_heads": K, "head_dim": D}
    return pa.caches.init(policy, storage, **sizes, dtype=dtype)


append, observe, reset = (jax.jit(getattr(pa.caches.KVCache, name)) for name in ("append", "observe", "reset"))


def hold(storage, dtype: str = "float32"):
    """Encodes and decodes tokens ``[.., K, D]`` with the storage; test_quantized.py checks the encodings."""
    storage = inner(storage)
    if isinstance(storage, Plain):
        return lambda x: x.astype(dtype).astype(np.float32)
    quantize = jax.jit(lambda x: pa.QuantizedArray.quantize(x, *KIND[type(storage)]))
    return lambda x: oracle.dequantize(quantize(x)).astype(np.float32)


@jax.jit
def attend(query, cache, positions):
    view, mask = cache.view(), pa.masks.causal()
    if cache.mask is not None:
        mask = mask & cache.mask
    return pa.attention(
        *(query, view.key, view.value, mask),
        q_positions=positions,
        kv_positions=view.positions,
        page_table=view.page_table,
        implementation="xla",
        return_key_weights=cache.policy.observes,
        return_lse=True,
    )


EVERY_PAIR = [
    pytest.param(*pair, marks=() if is_quick else pytest.mark.slow)
    for pair in itertools.product(POLICIES, STORAGES)
    for is_quick in [
        pair[1] == "plain" or pair in [("h2o, normalised, norms", name) for name in ("int4", "paged float8")]
    ]
]


@pytest.mark.parametrize(("policy_name", "storage_name"), EVERY_PAIR)
def test_steps_of_a_layer(policy_name, storage_name):
    """Repeats append, attend, observe; compares contents and outputs with the model and the oracle."""
    policy, model, arguments = POLICIES[policy_name]
    storage = STORAGES[storage_name]
    cache, rows = empty(policy, storage), [model(CAPACITY, K, **arguments) for _ in range(B)]
    rng, held_of = np.random.default_rng(0), hold(storage)
    relation = oracle.causal()
    if policy_name == "window":
        relation = relation & (oracle.sliding_window(5) | oracle.sink(2))
    for i, length in enumerate(LENGTHS if policy_name != "dense" else LENGTHS[:6]):
        real = rng.random((B, length)) < (1 if i == 0 else 0.8)
        start = np.array([[row.length] for row in rows])
        positions = np.where(real, start + real.cumsum(1) - 1, -1).astype(np.int32)
        key, value = (rng.standard_normal((B, length, K, D)).astype(np.float32) for _ in "kv")
        query = 2 * rng.standard_normal((B, length, N, D)).astype(np.float32)
        key[~real] = value[~real] = query[~real] = np.nan
        cache = append(cache, key, value, positions)
        for b, row in enumerate(rows):
            row.append(positions[b, real[b]], key[b, real[b]], value[b, real[b]])
        cache_models.assert_slots(cache, rows)
        cache_models.assert_tokens(cache, rows, held_of)

        result = attend(query, cache, positions)
        held = cache_models.positions_of(rows)
        tokens = [held_of(x) for x in cache_models.tokens_of(rows, D)]
        visible = oracle.visible(relation, positions, held, B, N)
        call = (query, *tokens, visible, D**-0.5)
        out, lse = oracle.attention(*call)
        plain = oracle.plain_attention(np.nan_to_num(query), *call[1:])[0]
        limit = tolerances.attention_limit(np.abs(plain - out).max(), np.abs(tokens[1]).max(), "float32")
        np.testing.assert_allclose(result.out, out, rtol=0, atol=limit)
        if policy.observes:
            weights = oracle.key_weights(query, tokens[0], visible, D**-0.5, lse)
            np.testing.assert_allclose(result.key_weights, weights, rtol=0, atol=tolerances.KEY_WEIGHTS)
            cache = observe(cache, result.key_weights)
            for row, w in zip(rows, weights, strict=True):
                row.observe(w)
    if policy_name != "dense":
        assert min(row.length for row in rows) > CAPACITY, "something had to go"


@EVERY_STORAGE
@pytest.mark.parametrize("policy", [Dense(), H2O(4)], ids=["dense", "h2o"])
def test_what_is_not_a_number_stays_in_its_slot_until_that_is_used_again(storage_name, policy):
    cache = empty(policy, STORAGES[storage_name], dtype="bfloat16")
    rng = np.random.default_rng(0)
    key, value = (rng.standard_normal((B, 3, K, D)).astype(jnp.bfloat16) for _ in "kv")
    bad = np.array(key)
    bad[1, 1, 0, 3] = np.nan
    positions = np.tile(np.arange(3, dtype=np.int32), (B, 1))
    cache = append(cache, bad, value, positions)
    view = cache.view()
    read = cache_models.read(view.key, view.page_table)[:, :3]
    expected = np.zeros(read.shape, bool)
    columns = {Plain: slice(3, 4), Int4: slice(2, 4)}.get(type(inner(STORAGES[storage_name])), slice(0, D))
    expected[1, 1, 0, columns] = True
    np.testing.assert_array_equal(np.isnan(read), expected)
    assert np.isfinite(cache_models.read(view.value, view.page_table)[:, :3]).all()

    cache = append(reset(cache, np.arange(B) == 1), key, value, np.where(np.arange(B)[:, None] == 1, positions, -1))
    view = cache.view()
    assert np.isfinite(cache_models.read(view.key, view.page_table)[:, :3]).all()


EXTREMES = {
    "zeros": np.zeros(D),
    "all equal": np.full(D, -0.7),
    "huge": np.linspace(-1e30, 1e30, D),
    "tiny": np.linspace(-1e-37, 1e-37, D),
    "one that stands out": np.where(np.arange(D) == 3, 1e4, 1),
}


@EVERY_STORAGE
@pytest.mark.parametrize("name", [*EXTREMES, "largest bfloat16"])
def test_error_is_at_most_half_a_quantum(storage_name, name):
    storage, largest = STORAGES[storage_name], float(jnp.finfo(jnp.bfloat16).max)
    dtype = jnp.bfloat16 if name == "largest bfloat16" else jnp.float32
    token = np.array([largest, -largest, 1, 0] * (D // 4)) if name == "largest bfloat16" else EXTREMES[name]
    normal = np.random.default_rng(0).standard_normal((B, 3, K, D))
    x = normal.copy()
    x[1, 1, 0] = token
    x = x.astype(dtype)
    cache = append(empty(Dense(), storage, dtype=dtype), x, x, np.tile(np.arange(3, dtype=np.int32), (B, 1)))
    view = cache.view()
    exact = np.asarray(x, np.float64)
    kind = KIND.get(type(inner(storage)), [None])[0]
    limit = 0
    if kind is not None:
        groups = np.abs(exact).reshape(B, 3, K, -1, GROUP if kind == "int4" else D)
        limit = tolerances.quantization_limit(groups, kind).reshape(exact.shape)
    for stored in (view.key, view.value):
        error = np.abs(cache_models.read(stored, view.page_table)[:, :3] - exact)
        assert (error <= limit).all()


# Bytes of a key or value of one head: numbers, and scales.
VECTOR = {"plain": 2 * D, "int8": D + 4, "float8": D + 4, "int4": D // 2 + 4 * (D // GROUP)}


@EVERY_STORAGE
@pytest.mark.parametrize(
    ("policy", "positions", "scores"),
    [(Dense(), 1, 0), (Window(4), 1, 0), (H2O(4), K, 1), (H2O(4, value_norm=True), K, 2), (QHitter(4), K, 2)],
    ids=str,
)
def test_bytes(storage_name, policy, positions, scores):
    storage = STORAGES[storage_name]
    slots = storage.num_pages * PAGE if isinstance(storage, Paged) else B * CAPACITY
    expected = slots * K * 2 * VECTOR[storage_name.removeprefix("paged ").replace("paged", "plain")]
    expected += B * CAPACITY * (4 * positions + 4 * K * scores)
    expected += B * (4 + 1)  # lengths and flags
    if isinstance(storage, Paged):
        expected += 4 * B * CAPACITY // PAGE + 4 * storage.num_pages
    assert empty(policy, storage, dtype="bfloat16").nbytes == expected
    sizes = {"batch_size": B, "capacity": CAPACITY, "kv_heads": K, "head_dim": D}
    assert pa.caches.nbytes(policy, storage, dtype="bfloat16", **sizes) == expected


def test_bytes_are_known_without_memory_for_them():
    sizes = {"batch_size": 1024, "capacity": 2**20, "kv_heads": 64, "head_dim": 128}
    assert pa.caches.nbytes(**sizes) > 2**44
    assert pa.caches.nbytes(H2O(64), Int4(), **sizes) < pa.caches.nbytes(H2O(64), Int8(), **sizes)


LONG, ROWS = 32768, 2


def long(policy, storage, dtype) -> pa.caches.KVCache:
    sizes = {"batch_size": ROWS, "capacity": LONG, "kv_heads": K, "head_dim": 16}
    return pa.caches.init(policy, storage, dtype=dtype, **sizes)


def compiled(method: str, policy, storage, dtype, *arguments):
    cache = jax.eval_shape(functools.partial(long, policy, storage, dtype))
    function = getattr(pa.caches.KVCache, method)
    return cache, jax.jit(function, donate_argnums=0).lower(cache, *arguments).compile()


def elements(text: str):
    """(opcode, dtype, number of elements) of every instruction of a compiled module."""
    for dtype, shape, opcode in re.findall(r"= (\w+)\[([\d,]*)\]\S* ([\w-]+)\(", text):
        yield opcode, dtype, int(np.prod([int(n) for n in shape.split(",") if n]))


COPIES = {"copy", "copy-start", "convert", "bitcast-convert", "select", "concatenate", "transpose", "gather"}


def copied(cache: pa.caches.KVCache, text: str) -> set[tuple[str, str]]:
    """(opcode, dtype) of the instructions of a compiled module on all keys or all values at once."""
    sizes = {x.size for x in jax.tree.leaves((cache.key, cache.value)) if x.ndim == 4}
    return {(opcode, dtype) for opcode, dtype, size in elements(text) if opcode in COPIES and size in sizes}


IN_PLACE = {
    "float32": (Plain(), "float32"),
    "bfloat16": (Plain(), "bfloat16"),
    "float16": (Plain(), "float16"),
    "int8": (Int8(), "bfloat16"),
    "int4": (Int4(GROUP), "bfloat16"),
    "float8": (Float8(), "bfloat16"),
    "paged": (Paged(PAGE, 4096), "float32"),
    "paged bfloat16": (Paged(PAGE, 4096), "bfloat16"),
    "paged int8": (Paged(PAGE, 4096, Int8()), "bfloat16"),
    "paged int4": (Paged(PAGE, 4096, Int4(GROUP)), "bfloat16"),
    "paged float8": (Paged(PAGE, 4096, Float8()), "bfloat16"),
}


@pytest.mark.parametrize("name", IN_PLACE)
@pytest.mark.parametrize("policy", [Dense(), Window(100, 4), H2O(64)], ids=["dense", "window", "h2o"])
def test_appending_to_a_donated_cache_copies_none_of_it(policy, name):
    storage, dtype = IN_PLACE[name]
    token = jax.ShapeDtypeStruct((ROWS, 1, K, 16), dtype)
    positions = jax.ShapeDtypeStruct((ROWS, 1), jnp.int32)
    cache, program = compiled("append", policy, storage, dtype, token, token, positions)
    text, memory = program.as_text(), program.memory_analysis()
    aliases = re.search(r"input_output_alias=\{(.*?)\}, entry", text)
    assert len(re.findall(r"\(\d+, \{\}, (?:may|must)-alias\)", aliases[1])) == len(jax.tree.leaves(cache))

    assert not copied(cache, text)
    # Ranking needs a separate array of scores.
    ranked = 4 * ROWS * K * LONG if policy.observes else 0
    assert memory.temp_size_in_bytes < ranked + cache.nbytes // 16


@pytest.mark.parametrize("name", ["bfloat16", "float8", "paged bfloat16", "paged float8"])
@pytest.mark.parametrize("length", [1, 64])
def test_attending_to_a_cache_copies_none_of_it(length, name):
    storage, dtype = IN_PLACE[name]
    cache = jax.eval_shape(functools.partial(long, H2O(64), storage, dtype))
    query = jax.ShapeDtypeStruct((ROWS, length, N, 16), dtype)
    positions = jax.ShapeDtypeStruct((ROWS, length), jnp.int32)
    program = attend.lower(query, cache, positions).compile()
    assert not copied(cache, program.as_text())


TOUCH_NOTHING = {
    "observe": (H2O(64), jax.ShapeDtypeStruct((ROWS, K, LONG), jnp.float32)),
    "reset": (H2O(64), jax.ShapeDtypeStruct((ROWS,), jnp.bool_)),
    "truncate": (Window(100), jax.ShapeDtypeStruct((ROWS,), jnp.int32)),
    "fork": (H2O(64), jax.ShapeDtypeStruct((ROWS,), jnp.int32)),
}


@pytest.mark.parametrize(
    ("method", "name"),
    # Without pages, a forked row is a copy.
    [(m, n) for m in TOUCH_NOTHING for n in ("bfloat16", "float8", "paged bfloat16") if m != "fork" or "paged" in n],
)
def test_no_other_step_touches_keys_and_values(method, name):
    policy, argument = TOUCH_NOTHING[method]
    cache, program = compiled(method, policy, *IN_PLACE[name], argument)
    sizes = {x.size for x in jax.tree.leaves((cache.key, cache.value)) if x.ndim == 4}
    touched = {opcode for opcode, _, size in elements(program.as_text()) if size in sizes}
    assert touched <= {"parameter", "get-tuple-element"}


# (call, exception, message)
BAD = {
    "group that does not divide": (lambda: empty(storage=Int4(3)), ValueError, r"group: expected a divisor .* got 3"),
    "group across the middle": (lambda: empty(storage=Int4(8)), ValueError, r"group: expected a divisor .* got 8"),
    "page_size 8": (lambda: Paged(8, 4), ValueError, "page_size: expected a multiple of 16, got 8"),
    "page_size 0": (lambda: Paged(0, 4), ValueError, "page_size: expected a multiple of 16, got 0"),
    "page_size, a float": (lambda: Paged(16.0, 4), TypeError, r"page_size: expected an int, got 16\.0"),
    "page_size and capacity": (
        lambda: empty(storage=Paged(16, 4), capacity=40),
        *(ValueError, "capacity: expected a multiple of page_size=16, got 40"),
    ),
    "no pages": (lambda: Paged(16, 0), ValueError, "num_pages: expected at least 1, got 0"),
    "num_pages, a bool": (lambda: Paged(16, True), TypeError, "num_pages: expected an int, got True"),
    "pages of pages": (lambda: Paged(16, 4, Paged(16, 4)), TypeError, r"inner: expected .* not paged, got Paged"),
    "inner, a class": (lambda: Paged(16, 4, Int8), TypeError, "inner: expected .* got <class"),
    "policy and capacity": (
        lambda: empty(Window(40), Paged(16, 4)),
        *(ValueError, r"capacity: expected at least size \+ sinks = 40, got 32"),
    ),
    "sizes of nbytes": (
        lambda: pa.caches.nbytes(batch_size=0, capacity=1, kv_heads=1, head_dim=1),
        *(ValueError, "batch_size: expected at least 1, got 0"),
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit(name):
    call, exception, message = BAD[name]
    with pytest.raises(exception, match=f"^{message}"):
        call()
