"""KV caches against a model of Python lists, and in place under jit."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pallas_attn as pa
from tests import tolerances
from tests.oracle import positions

B, CAPACITY, K, D = 3, 11, 2, 4
CHUNKS = (1, 4, 13)  # tokens in one append; the last is longer than the cache
rng = np.random.default_rng(0)


def empty(dtype=jnp.float32, **changes) -> pa.caches.KVCache:
    sizes = {"batch_size": B, "capacity": CAPACITY, "kv_heads": K, "head_dim": D} | changes
    return pa.caches.init(**sizes, dtype=dtype)


def tokens(length: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values ``[B, length, K, D]``, all numbers distinct."""
    generator = np.random.default_rng(seed)
    return tuple(generator.standard_normal((B, length, K, D)).astype(np.float32) for _ in "kv")


class Model:
    """The cache as lists: the tokens of each row, in order of arrival."""

    def __init__(self):
        self.rows = [[] for _ in range(B)]
        self.overflowed = [False] * B

    def append(self, key, value, new_positions):
        for b in range(B):
            for t, position in enumerate(new_positions[b]):
                if position < 0:
                    continue
                if len(self.rows[b]) == CAPACITY:
                    self.overflowed[b] = True
                else:
                    self.rows[b].append((int(position), key[b, t], value[b, t]))

    def truncate(self, lengths):
        for b, length in enumerate(lengths):
            # Dropped tokens came last, so truncation removes them first.
            self.overflowed[b] &= length > len(self.rows[b])
            self.rows[b] = self.rows[b][: max(length, 0)]

    def reset(self, which):
        for b in np.flatnonzero(which):
            self.rows[b], self.overflowed[b] = [], False

    def assert_equals(self, cache: pa.caches.KVCache) -> None:
        view = cache.view()
        assert cache.lengths.tolist() == [len(row) for row in self.rows]
        assert cache.overflowed.tolist() == self.overflowed
        for b, row in enumerate(self.rows):
            held = view.positions[b, 0]
            assert held.tolist() == [position for position, _, _ in row] + [-1] * (CAPACITY - len(row))
            for slot, (_, key, value) in enumerate(row):
                np.testing.assert_array_equal(view.key[b, slot], key)
                np.testing.assert_array_equal(view.value[b, slot], value)


append = jax.jit(pa.caches.KVCache.append)
positions_after = jax.jit(pa.caches.KVCache.positions_after)
truncate = jax.jit(pa.caches.KVCache.truncate)
reset = jax.jit(pa.caches.KVCache.reset)


def new_positions(length: int):
    """Any mix of tokens and padding; without padding half the time."""
    row = st.lists(st.integers(-3, 40), min_size=length, max_size=length)
    real = st.lists(st.integers(0, 40), min_size=length, max_size=length)
    return st.lists(row | real, min_size=B, max_size=B).map(functools.partial(np.array, dtype=np.int32))


steps = st.one_of(
    *(st.tuples(st.just("append"), new_positions(length)) for length in CHUNKS),
    st.tuples(st.just("truncate"), st.lists(st.integers(-1, CAPACITY + 2), min_size=B, max_size=B)),
    st.tuples(st.just("reset"), st.lists(st.booleans(), min_size=B, max_size=B)),
)


@pytest.mark.parametrize("examples", [40, pytest.param(400, marks=pytest.mark.slow)])
def test_any_program_leaves_what_a_list_would_hold(examples):
    settings(max_examples=examples)(given(st.lists(steps, min_size=1, max_size=12))(run_program))()


def run_program(program):
    cache, model = empty(), Model()
    for seed, (name, argument) in enumerate(program):
        if name == "append":
            key, value = tokens(argument.shape[1], seed)
            key[argument < 0] = value[argument < 0] = np.nan  # padding is never stored
            predicted = positions_after(cache, argument)
            cache = append(cache, key, value, argument)
            np.testing.assert_array_equal(cache.view().positions, predicted)
            model.append(key, value, argument)
            assert not np.isnan(cache.key).any()
            assert not np.isnan(cache.value).any()
        elif name == "truncate":
            cache = truncate(cache, np.array(argument, np.int32))
            model.truncate(argument)
        else:
            cache = reset(cache, np.array(argument))
            model.reset(argument)
        model.assert_equals(cache)


def test_an_empty_cache():
    cache = empty()
    view = cache.view()
    assert (cache.batch_size, cache.capacity) == (B, CAPACITY)
    assert view.key.shape == view.value.shape == (B, CAPACITY, K, D)
    assert view.positions.shape == (B, 1, CAPACITY)
    assert view.positions.dtype == jnp.int32
    assert view.page_table is None
    assert (view.positions == -1).all()
    assert cache.lengths.tolist() == [0] * B
    assert not cache.overflowed.any()


def test_padding_takes_no_slot_wherever_it_stands():
    key, value = tokens(5)
    left, right, middle = [-1, -1, 0, 1, 2], [7, 8, -1, -1, -1], [-1, 3, -2, 4, -1]
    cache = empty().append(key, value, jnp.array([left, right, middle], jnp.int32))
    assert cache.lengths.tolist() == [3, 2, 2]
    assert cache.positions[:, 0, :4].tolist() == [[0, 1, 2, -1], [7, 8, -1, -1], [3, 4, -1, -1]]
    np.testing.assert_array_equal(cache.key[2, :2], key[2, [1, 3]])


def test_a_full_row_takes_no_more_and_touches_no_other():
    key, value = tokens(CAPACITY)
    full = np.tile(np.arange(CAPACITY, dtype=np.int32), (B, 1))
    cache = append(empty(), key, value, full)
    assert not cache.overflowed.any(), "as many tokens as slots is not too many"
    more_key, more_value = tokens(4, seed=1)
    more = np.array([[-1, -1, -1, -1], [11, 12, 13, 14], [-1, 11, -1, -1]], np.int32)
    after = append(cache, more_key, more_value, more)
    assert after.overflowed.tolist() == [False, True, True]
    for field in ("key", "value", "positions", "lengths"):
        np.testing.assert_array_equal(getattr(after, field), getattr(cache, field))


def test_what_fits_of_a_chunk_is_stored():
    key, value = tokens(13)
    cache = append(empty(), key, value, np.tile(np.arange(13, dtype=np.int32), (B, 1)))
    assert cache.overflowed.all()
    assert cache.lengths.tolist() == [CAPACITY] * B
    np.testing.assert_array_equal(cache.key, key[:, :CAPACITY])


def test_a_flag_stays_until_the_lost_tokens_are_taken_back():
    key, value = tokens(13)
    cache = append(empty(), key, value, np.tile(np.arange(13, dtype=np.int32), (B, 1)))
    none = np.full((B, 4), -1, np.int32)
    assert append(cache, *tokens(4), none).overflowed.all()
    taken_back = truncate(cache, np.array([13, 11, 3], np.int32))
    assert taken_back.overflowed.tolist() == [True, False, False]
    assert taken_back.lengths.tolist() == [11, 11, 3]
    assert reset(cache, np.array([True, False, True])).overflowed.tolist() == [False, True, False]


def test_a_row_that_was_reset_starts_anew():
    cache = append(empty(), *tokens(4), np.tile(np.arange(4, dtype=np.int32), (B, 1)))
    cache = reset(cache, np.array([False, True, False]))
    assert cache.lengths.tolist() == [4, 0, 4]
    key, value = tokens(1, seed=1)
    cache = append(cache, key, value, np.array([[-1], [30], [-1]], np.int32))
    assert cache.positions[1, 0].tolist() == [30] + [-1] * (CAPACITY - 1)
    np.testing.assert_array_equal(cache.key[1, 0], key[1, 0])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_keys_and_values_are_held_in_the_dtype_of_the_cache(dtype):
    key, value = tokens(4)
    cache = empty(dtype).append(key, value, jnp.zeros((B, 4), jnp.int32))
    assert cache.view().key.dtype == cache.view().value.dtype == dtype
    np.testing.assert_array_equal(cache.view().key[:, :4], key.astype(dtype))


def test_bytes():
    slots = B * CAPACITY
    small = B * 4 + B * 1  # lengths and flags
    assert empty(jnp.float32).nbytes == 2 * slots * K * D * 4 + slots * 4 + small
    assert empty(jnp.bfloat16).nbytes == 2 * slots * K * D * 2 + slots * 4 + small
    abstract = jax.eval_shape(empty)
    assert abstract.nbytes == empty().nbytes


def test_attention_over_a_cache_equals_attention_over_the_tokens():
    """Old contents of slots do not matter: every row was used before, and its empty slots hold NaN."""
    prompt = np.stack([positions(4), positions(4, left=2), positions(4, right=1)])
    cache = empty()
    dirty = np.full((B, 13, K, D), np.nan, np.float32)
    cache = reset(append(cache, dirty, dirty, np.zeros((B, 13), np.int32)), np.ones(B, bool))

    key, value = tokens(4)
    query = rng.standard_normal((B, 4, 4, D)).astype(np.float32)
    cache = append(cache, key, value, prompt)
    view = cache.view()
    for implementation in ("reference", "xla"):
        over_cache, over_tokens = (
            pa.attention(
                *(query, k, v, pa.masks.causal()),
                q_positions=prompt,
                kv_positions=p,
                implementation=implementation,
            )
            for k, v, p in ((view.key, view.value, view.positions), (key, value, prompt))
        )
        limit = tolerances.attention_limit(0, np.abs(value).max(), "float32")
        np.testing.assert_allclose(over_cache, over_tokens, rtol=0, atol=limit)


def test_under_jit_a_donated_cache_is_updated_in_place():
    cache = empty(capacity=64)
    key, value = tokens(4)
    new = np.zeros((B, 4), np.int32)
    programs = {
        "append": (pa.caches.KVCache.append, (key, value, new)),
        "truncate": (pa.caches.KVCache.truncate, (np.zeros(B, np.int32),)),
        "reset": (pa.caches.KVCache.reset, (np.zeros(B, bool),)),
    }
    leaves = jax.tree.leaves(cache)
    for name, (function, arguments) in programs.items():
        text = jax.jit(function, donate_argnums=0).lower(cache, *arguments).compile().as_text()
        aliases = re.search(r"input_output_alias=\{(.*?)\}, entry", text)
        assert aliases, name
        assert len(re.findall(r"\(\d+, \{\}, (?:may|must)-alias\)", aliases[1])) == len(leaves), name
        buffer = f"f32[{B},64,{K},{D}]"
        assert buffer in text, name
        copies = [line for line in text.splitlines() if re.search(r"\bcopy(-start)?\(", line) and buffer in line]
        assert not copies, f"{name} copies the cache: {copies}"


def test_a_donated_cache_keeps_its_memory():
    cache = jax.jit(empty)()
    step = jax.jit(pa.caches.KVCache.append, donate_argnums=0)
    before = [x.unsafe_buffer_pointer() for x in (cache.key, cache.value, cache.positions)]
    old = cache
    cache = step(cache, *tokens(1), np.zeros((B, 1), np.int32))
    assert [x.unsafe_buffer_pointer() for x in (cache.key, cache.value, cache.positions)] == before
    assert old.key.is_deleted()


def test_a_step_compiles_once_whatever_the_rows_hold():
    traces = []

    @jax.jit
    def step(cache, key, value, new):
        traces.append(1)
        return cache.append(key, value, new)

    cache = empty()
    for seed in range(5):
        cache = step(cache, *tokens(4, seed), np.full((B, 4), seed - 1, np.int32))
        cache = reset(truncate(cache, np.full(B, 2, np.int32)), np.arange(B) == seed)
    assert len(traces) == 1


def test_a_cache_passes_through_a_loop():
    """A while_loop or scan can carry a cache: every method preserves structure, shapes and dtypes."""
    cache = empty()
    key, value = tokens(1)

    def body(cache, position):
        new = jnp.full((B, 1), position, jnp.int32)
        return cache.append(key, value, new).truncate(jnp.full((B,), 5)).reset(jnp.zeros((B,), jnp.bool_)), None

    cache, _ = jax.lax.scan(body, cache, jnp.arange(8, dtype=jnp.int32))
    assert cache.lengths.tolist() == [5] * B
    assert cache.positions[0, 0, :6].tolist() == [0, 1, 2, 3, 4, -1]


CACHE = empty()
KEY, VALUE = (jnp.zeros((B, 4, K, D)) for _ in "kv")
NEW = jnp.zeros((B, 4), jnp.int32)

# (call, exception, argument named, what came)
BAD_INPUT = {
    "batch_size, 0": (lambda: empty(batch_size=0), ValueError, "batch_size", "0"),
    "capacity, negative": (lambda: empty(capacity=-4), ValueError, "capacity", "-4"),
    "kv_heads, float": (lambda: empty(kv_heads=2.0), TypeError, "kv_heads", "2.0"),
    "head_dim, string": (lambda: empty(head_dim="64"), TypeError, "head_dim", "'64'"),
    "capacity, bool": (lambda: empty(capacity=True), TypeError, "capacity", "True"),
    "policy, a string": (lambda: empty(policy="dense"), TypeError, "policy", "'dense'"),
    "policy, a class": (lambda: empty(policy=pa.caches.Dense), TypeError, "policy", "Dense"),
    "policy, a storage": (lambda: empty(policy=pa.caches.Plain()), TypeError, "policy", "Plain"),
    "storage, a string": (lambda: empty(storage="int8"), TypeError, "storage", "'int8'"),
    "dtype, int32": (lambda: empty(dtype=jnp.int32), ValueError, "dtype", "int32"),
    "key, another batch": (lambda: CACHE.append(KEY[:1], VALUE, NEW), ValueError, "key", "(1, 4, 2, 4)"),
    "key, another length": (lambda: CACHE.append(KEY[:, :3], VALUE, NEW), ValueError, "key", "(3, 3, 2, 4)"),
    "key, other heads": (lambda: CACHE.append(KEY[:, :, :1], VALUE, NEW), ValueError, "key", "(3, 4, 1, 4)"),
    "value, another head size": (lambda: CACHE.append(KEY, VALUE[..., :2], NEW), ValueError, "value", "(3, 4, 2, 2)"),
    "value, rank 3": (lambda: CACHE.append(KEY, VALUE[0], NEW), ValueError, "value", "(4, 2, 4)"),
    "value, a list": (lambda: CACHE.append(KEY, [1.0], NEW), TypeError, "value", "list"),
    "key, int32": (lambda: CACHE.append(KEY.astype(jnp.int32), VALUE, NEW), ValueError, "key", "int32"),
    "positions, another batch": (lambda: CACHE.append(KEY, VALUE, NEW[:1]), ValueError, "positions", "(1, 4)"),
    "positions, rank 1": (lambda: CACHE.append(KEY, VALUE, NEW[0]), ValueError, "positions", "(4,)"),
    "positions, rank 3": (lambda: CACHE.append(KEY, VALUE, NEW[None]), ValueError, "positions", "(1, 3, 4)"),
    "positions, float32": (
        lambda: CACHE.append(KEY, VALUE, NEW.astype(jnp.float32)),
        ValueError,
        "positions",
        "float32",
    ),
    "positions, bool": (lambda: CACHE.append(KEY, VALUE, NEW == 0), ValueError, "positions", "bool"),
    "positions, a list": (lambda: CACHE.append(KEY, VALUE, NEW.tolist()), TypeError, "positions", "list"),
    "positions_after, another batch": (lambda: CACHE.positions_after(NEW[:2]), ValueError, "positions", "(2, 4)"),
    "lengths, another batch": (lambda: CACHE.truncate(jnp.zeros(2, jnp.int32)), ValueError, "lengths", "(2,)"),
    "lengths, a number": (lambda: CACHE.truncate(3), ValueError, "lengths", "()"),
    "lengths, float32": (lambda: CACHE.truncate(jnp.zeros(B)), ValueError, "lengths", "float32"),
    "rows, another batch": (lambda: CACHE.reset(jnp.zeros(4, jnp.bool_)), ValueError, "rows", "(4,)"),
    "rows, indices": (lambda: CACHE.reset(jnp.zeros(B, jnp.int32)), ValueError, "rows", "int32"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_input_that_does_not_fit(name):
    call, exception, argument, came = BAD_INPUT[name]
    with pytest.raises(exception) as error:
        call()
    message = str(error.value)
    assert message.startswith(f"{argument}: expected "), message
    assert came in message.split(", got ", 1)[-1], message
