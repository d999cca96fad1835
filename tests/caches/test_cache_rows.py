"""Operations on some rows equal those on all rows that leave the others unchanged: bit for bit, and in place."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_attn as pa
from pallas_attn.caches import H2O, Dense, Float8, Int4, Int8, KVCache, Paged, Plain, QHitter, Window
from tests import tolerances
from tests.marks import quick

B, CAPACITY, K, D = 5, 32, 2, 16
POLICIES = {
    "dense": Dense(),
    "window": Window(10, sinks=2),
    "h2o": H2O(4, normalize=True, value_norm=True),
    "q-hitter": QHitter(4),
}
PAGES = B * CAPACITY // 16
STORAGES = {
    "plain": Plain(),
    "int8": Int8(),
    "int4": Int4(8),
    "float8": Float8(),
    "paged": Paged(16, PAGES),
    "few pages": Paged(16, 4, Int8()),
}
PAIRS = [
    ("dense", "plain"),
    ("dense", "few pages"),
    ("window", "int4"),
    ("h2o", "paged"),
    ("q-hitter", "float8"),
    ("h2o", "int8"),
]
EVERY_PAIR = pytest.mark.parametrize(("policy", "storage"), PAIRS, ids=map(", ".join, PAIRS))

append, observe, copy_rows, fork = (jax.jit(getattr(KVCache, x)) for x in ("append", "observe", "copy_rows", "fork"))


def empty(policy="dense", storage="plain", **changes) -> KVCache:
    sizes = {"batch_size": B, "capacity": CAPACITY, "kv_heads": K, "head_dim": D, "dtype": jnp.float32} | changes
    return pa.caches.init(POLICIES[policy], STORAGES[storage], **sizes)


def assert_same(actual: KVCache, expected: KVCache) -> None:
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        x, y = (np.asarray(z).view(np.uint8) if z.dtype.itemsize == 1 else np.asarray(z) for z in (x, y))
        np.testing.assert_array_equal(x, y, err_msg=jax.tree_util.keystr(path))


def new_tokens(rng: np.random.Generator, lengths, length: int):
    """Keys, values and positions of the next tokens; some are padding."""
    real = rng.random((len(lengths), length)) < rng.choice([0.6, 1.0])
    positions = np.where(real, np.asarray(lengths)[:, None] + real.cumsum(1) - 1, -1).astype(np.int32)
    key, value = (rng.standard_normal((*real.shape, K, D)).astype(np.float32) for _ in "kv")
    return key, value, positions


def spread(x: np.ndarray, rows: np.ndarray, fill) -> np.ndarray:
    """``[B, ...]``: x in its rows, ``fill`` elsewhere."""
    whole = np.full((B, *x.shape[1:]), fill, x.dtype)
    used = (rows >= 0) & (rows < B)
    whole[rows[used]] = x[used]
    return whole


@EVERY_PAIR
def test_some_rows_of_a_cache_equal_all_where_the_others_have_only_padding(policy, storage):
    whole = some = empty(policy, storage)
    for seed in range(9):
        rng = np.random.default_rng(seed)
        rows = rng.permutation(B)[:3].astype(np.int32)
        rows[rng.integers(0, 3)] = rng.choice([-1, -B, B, B + 1, 2**31 - 1, rows[0]]) if seed % 2 else rows[0]
        rows = np.array(list(dict.fromkeys(rows.tolist()))[:2], np.int32)
        used = (rows >= 0) & (rows < B)
        # Valid tokens in an unused entry are dropped.
        key, value, positions = new_tokens(rng, some.lengths[np.clip(rows, 0, B - 1)], 7)
        all_rows = (spread(key, rows, np.nan), spread(value, rows, np.nan), spread(positions, rows, -1))
        predicted = some.positions_after(jnp.asarray(positions), jnp.asarray(rows))
        whole, some = append(whole, *all_rows), append(some, key, value, positions, rows)
        if POLICIES[policy].observes:
            weights = rng.random((2, K, CAPACITY), np.float32)
            # Unobserved rows do not change: adding 0 changes no score here.
            whole, some = observe(whole, spread(weights, rows, 0)), observe(some, weights, rows)
        assert_same(some, whole)
        view = some.view(jnp.asarray(rows))
        np.testing.assert_array_equal(np.asarray(predicted)[used], np.asarray(view.positions)[used])
        np.testing.assert_array_equal(np.asarray(view.positions)[used], np.asarray(whole.positions)[rows[used]])
        assert (np.asarray(view.positions)[~used] == -1).all()


def test_what_is_not_observed_is_left_alone_to_the_bit():
    cache = empty("h2o")
    nan = jnp.full((B, K, CAPACITY), jnp.nan)
    cache = dataclasses.replace(cache, state=dict.fromkeys(cache.state, nan))
    key, value, positions = new_tokens(np.random.default_rng(0), [0, 0], 4)
    rows = np.array([3, B], np.int32)
    after = observe(append(cache, key, value, positions, rows), np.ones((2, K, CAPACITY), np.float32), rows)
    for name, x in after.state.items():
        assert np.isnan(np.asarray(x)[[0, 1, 2, 4]]).all(), name
        assert not np.isnan(np.asarray(x)[3, :, :4]).any(), name


@pytest.mark.parametrize("storage", quick(["plain", "int4", "paged"], "int4", "paged"))
@pytest.mark.parametrize("implementation", quick(["reference", "xla"], "xla"))
@pytest.mark.parametrize("length", [1, 20])
def test_attention_over_some_rows(storage, implementation, length):
    rng = np.random.default_rng(0)
    cache = append(empty("dense", storage), *new_tokens(rng, [0] * B, 27))
    query = rng.standard_normal((3, length, 2 * K, D)).astype(np.float32)
    rows = jnp.array([4, B, 1], jnp.int32)

    def attend(query, view, positions):
        return pa.attention(
            *(query, view.key, view.value, pa.masks.causal()),
            **{"q_positions": positions, "kv_positions": view.positions, "page_table": view.page_table},
            implementation=implementation,
        )

    positions = np.broadcast_to(np.arange(27 - length, 27, dtype=np.int32), (3, length))
    out = attend(query, cache.view(rows), positions)
    expected = attend(spread(query, np.asarray(rows), 0), cache.view(), spread(positions, np.asarray(rows), -1))
    limit = tolerances.attention_limit(0, 4, "float32")
    np.testing.assert_allclose(out[jnp.array([0, 2])], expected[rows[jnp.array([0, 2])]], rtol=0, atol=limit)
    np.testing.assert_array_equal(out[1], 0)


def test_a_view_of_some_rows_is_the_cache_itself():
    cache = empty()
    view = cache.view(jnp.array([2, -7, 9], jnp.int32))
    assert view.key is cache.key
    assert view.value is cache.value
    assert view.page_table.tolist() == [[2], [B], [B]]


def test_copies_are_made_one_after_the_other():
    rng = np.random.default_rng(0)
    cache = append(empty("h2o", "int8"), *new_tokens(rng, [0, 3, 5, 7, 9], 12))
    cache = observe(cache, rng.random((B, K, CAPACITY), np.float32))
    sources, targets = np.array([0, 3, 1, 4, 2], np.int32), np.array([3, 1, 1, B, 0], np.int32)
    for count, expected in ((0, range(B)), (1, [0, 1, 2, 0, 4]), (4, [0, 0, 2, 0, 4]), (9, [2, 0, 2, 0, 4])):
        assert_same(copy_rows(cache, sources, targets, count), fork(cache, np.array(expected, np.int32)))


@EVERY_PAIR
def test_copied_rows_are_what_a_fork_makes(policy, storage):
    rng = np.random.default_rng(0)
    cache = append(empty(policy, storage), *new_tokens(rng, [0] * B, 20))
    copied = copy_rows(cache, np.array([1, -1, 3], np.int32), np.array([0, 2, 4], np.int32), 3)
    assert_same(copied, fork(cache, np.array([1, 1, 2, 3, 3], np.int32)))


@EVERY_PAIR
def test_some_rows_of_a_donated_cache_are_updated_in_place(policy, storage):
    cache = empty(policy, storage)
    rows = jnp.array([3, 7], jnp.int32)
    key, value, positions = new_tokens(np.random.default_rng(0), [0, 0], 4)
    programs = {
        "append": (KVCache.append, (key, value, positions, rows)),
        "copy_rows": (KVCache.copy_rows, (rows, rows, 1)),
        "observe": (KVCache.observe, (jnp.zeros((2, K, CAPACITY)), rows)),
    }
    if policy == "dense":
        path = jnp.array([[0, 2, 3]] * B, jnp.int32)
        programs["keep"] = (KVCache.keep, (jnp.zeros(B, jnp.int32), path, jnp.full(B, 3)))
    for name, (function, arguments) in programs.items():
        text = jax.jit(function, donate_argnums=0).lower(cache, *arguments).compile().as_text()
        (aliases,) = re.findall(r"input_output_alias=\{(.*?)\}, entry", text)
        assert aliases.count("-alias)") >= len(jax.tree.leaves((cache.key, cache.value, cache.positions))), name
        for buffer in jax.tree.leaves((cache.key, cache.value)):
            shape = re.escape(",".join(map(str, buffer.shape)))
            assert re.search(rf"\w+\[{shape}\]", text), name
            copies = re.findall(rf"= \(?\w+\[{shape}\]\S* copy(?:-start)?\(.*", text)
            assert not copies, f"{name} copies the cache: {copies}"


KEY, NEW = jnp.zeros((2, 4, K, D)), jnp.zeros((2, 4), jnp.int32)
ROWS = jnp.array([3, 1], jnp.int32)
# (call, exception, message)
BAD = {
    "rows, a list": (
        lambda: empty().append(KEY, KEY, NEW, [3, 1]),
        TypeError,
        r"rows: expected an int32 array \(NumPy or JAX\), got list",
    ),
    "rows, bool": (
        lambda: empty().positions_after(NEW, ROWS == 1),
        *(ValueError, r"rows: expected int32 \[R\], R at least 1, got bool \[2\]"),
    ),
    "rows, rank 2": (
        lambda: empty().view(ROWS[None]),
        ValueError,
        r"rows: expected int32 \[R\], .* got int32 \[1, 2\]",
    ),
    "positions of all rows": (
        lambda: empty().append(KEY, KEY, jnp.zeros((B, 4), jnp.int32), ROWS),
        *(ValueError, r"positions: expected shape \(2, t\), got \(5, 4\)"),
    ),
    "key_weights of all rows": (
        lambda: empty("h2o").observe(jnp.zeros((B, K, CAPACITY)), ROWS),
        *(ValueError, r"key_weights: expected float32 \[2, 2, 32\], got float32 \[5, 2, 32\]"),
    ),
    "a capacity that is no page": (
        lambda: empty(capacity=24).view(ROWS),
        *(ValueError, "rows: expected None, or a capacity that is a multiple of 16, got capacity 24"),
    ),
    "sources, bool": (lambda: empty().copy_rows(ROWS == 1, ROWS, 1), ValueError, r"sources: .* got bool \[2\]"),
    "targets, fewer": (lambda: empty().copy_rows(ROWS, ROWS[:1], 1), ValueError, r"targets: .* got int32 \[1\]"),
    "count, of each": (lambda: empty().copy_rows(ROWS, ROWS, ROWS), ValueError, "count: expected an integer, got"),
    "count, float": (lambda: empty().copy_rows(ROWS, ROWS, 1.0), ValueError, "count: expected an integer, got"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit(name):
    call, exception, message = BAD[name]
    with pytest.raises(exception, match=f"^{message}"):
        call()
