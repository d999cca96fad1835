"""`keep` leaves one path of a draft tree, contiguous, as if no other node had been appended."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_attn as pa
from pallas_attn.caches import H2O, Float8, Int4, Int8, KVCache, Paged, Plain, Window
from tests import cache_models

B, CAPACITY, K, D, T = 3, 32, 2, 16, 6
STORAGES = {
    "plain": Plain(),
    "int8": Int8(),
    "int4": Int4(8),
    "float8": Float8(),
    "paged": Paged(16, 6),
}
append, keep, truncate, fork = (jax.jit(getattr(KVCache, name)) for name in ("append", "keep", "truncate", "fork"))
FIRST = np.array([3, 14, 29], np.int32)  # the nodes of row 1 span two pages; three nodes of row 2 have no room
rng = np.random.default_rng(0)
TOKENS = tuple(rng.standard_normal((B, CAPACITY + T, K, D)).astype(np.float32) for _ in "kv")
DEPTHS = np.array([0, 1, 1, 2, 2, 3])


def empty(storage: pa.caches.Storage, policy=None) -> KVCache:
    sizes = {"batch_size": B, "capacity": CAPACITY, "kv_heads": K, "head_dim": D, "dtype": jnp.float32}
    return pa.caches.init(policy, storage, **sizes)


def with_nodes(storage: pa.caches.Storage, path=range(T), depths=DEPTHS) -> KVCache:
    """``FIRST`` tokens in each row, then some of T nodes."""
    key, value = TOKENS
    at = np.arange(CAPACITY)
    cache = append(
        *(empty(storage), key[:, :CAPACITY], value[:, :CAPACITY]),
        np.where(at < FIRST[:, None], at, -1).astype(np.int32),
    )
    path = list(path)
    nodes = (x[:, CAPACITY:][:, path] for x in TOKENS)
    return append(cache, *nodes, (FIRST[:, None] + np.asarray(depths)[path]).astype(np.int32))


def held(cache: KVCache) -> list[list[np.ndarray]]:
    """Keys and values of each row's tokens."""
    view = cache.view()
    arrays = [cache_models.read(x, view.page_table) for x in (view.key, view.value)]
    return [[x[row, :length] for x in arrays] for row, length in enumerate(cache.lengths.tolist())]


@pytest.mark.parametrize("storage", STORAGES)
def test_a_path_is_what_it_would_have_been_alone(storage):
    path = [0, 2, 4]
    kept = keep(with_nodes(STORAGES[storage]), FIRST, np.tile(np.array([*path, 5], np.int32), (B, 1)), np.full(B, 3))
    alone = with_nodes(STORAGES[storage], path)
    # In row 2 the last node of the path had no room, but would have had without the others.
    assert kept.lengths.tolist() == [6, 17, 31]
    assert kept.overflowed.tolist() == [False, False, True]
    alone = truncate(alone, kept.lengths)
    np.testing.assert_array_equal(kept.positions, alone.positions)
    for one, other in zip(held(kept), held(alone), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("storage", ["plain", "paged"])
@pytest.mark.parametrize("counts", [(0, 6, 2), (3, 0, 3), (1, 2, 6)], ids=str)
def test_a_chain_is_taken_back_as_by_truncate(storage, counts):
    cache = with_nodes(STORAGES[storage], depths=range(T))
    counts = np.array(counts, np.int32)
    kept = keep(cache, FIRST, np.tile(np.arange(T, dtype=np.int32), (B, 1)), counts)
    for one, other in zip(jax.tree.leaves(kept), jax.tree.leaves(truncate(cache, FIRST + counts)), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_page_that_another_row_has_is_never_written():
    cache = fork(with_nodes(Paged(16, 6)), np.array([0, 0, 0], np.int32))
    path = np.tile(np.array([0, 2, 4], np.int32), (B, 1))
    kept = keep(cache, np.full(B, 3, np.int32), path, np.array([6, 3, 0], np.int32))
    before, after = held(cache), held(truncate(cache, kept.lengths))
    assert kept.lengths.tolist() == [6, 6, 3]
    np.testing.assert_array_equal(after[2], held(kept)[2])
    np.testing.assert_array_equal(np.array(before[0])[:, [0, 1, 2, 3, 5, 7]], held(kept)[1])
    assert len({int(page) for page in kept.pages.table[:, 0]}) == 3, "two pages were copied, one was left to row 2"


def test_without_a_page_to_write_to_a_row_keeps_what_is_in_its_place():
    # Row 2 found no page in this pool, so it becomes a copy of row 1; rows 0 and 1 share the third page.
    cache = fork(with_nodes(Paged(16, 3)), np.array([0, 0, 1], np.int32))
    assert sorted(cache.pages.users.tolist()) == [1, 1, 2]
    path = np.tile(np.array([0, 1, 3, 5], np.int32), (B, 1))
    kept = keep(cache, np.array([3, 3, 14], np.int32), path, np.array([4, 2, 4], np.int32))
    assert kept.lengths.tolist() == [5, 5, 18]
    assert kept.overflowed.tolist() == [True, False, False]
    np.testing.assert_array_equal(held(kept)[0], np.array(held(cache)[0])[:, :5])
    np.testing.assert_array_equal(held(kept)[2], np.array(held(cache)[2])[:, [*range(16), 17, 19]])


@pytest.mark.parametrize("policy", [Window(4), H2O(4)])
def test_policies_that_do_not_hold_tokens_in_order_keep_no_path(policy):
    zeros = jnp.zeros(B, jnp.int32)
    with pytest.raises(NotImplementedError, match=f"^{type(policy).__name__} cannot keep a path: "):
        empty(Plain(), policy).keep(zeros, zeros[:, None], zeros)


# (arguments, message)
ZEROS, PATH = jnp.zeros(B, jnp.int32), jnp.zeros((B, 4), jnp.int32)
BAD = {
    "first, a number": ((ZEROS[0], PATH, ZEROS), r"first: expected integers of shape \(3,\), got int32 \(\)"),
    "count, of two": ((ZEROS, PATH, ZEROS[:2]), r"count: expected integers of shape \(3,\), got int32 \(2,\)"),
    "path, of two": ((ZEROS, PATH[:2], ZEROS), r"path: expected int32 \[3, n\], got int32 \[2, 4\]"),
    "path, rank 1": ((ZEROS, PATH[0], ZEROS), r"path: expected int32 \[3, n\], got int32 \[4\]"),
    "path, bool": ((ZEROS, PATH == 0, ZEROS), r"path: expected int32 \[3, n\], got bool \[3, 4\]"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit(name):
    arguments, message = BAD[name]
    with pytest.raises(ValueError, match=f"^{message}"):
        empty(Plain()).keep(*arguments)
