"""Pages of a shared pool: none is lost or shared by mistake, and no row writes to another row's pages."""

import contextlib
import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pallas_attn as pa
from pallas_attn.caches import H2O, Dense, Int8, Paged, Window
from pallas_attn.caches.pages import AT_ONCE, PageCopies
from tests import cache_models
from tests.cache_models import NearTieError, Row

B, CAPACITY, PAGE, K, D = 3, 48, 16, 2, 2
CHUNKS = (1, 20)
POLICIES = {
    "dense": (Dense(), cache_models.Dense, {}),
    "h2o": (H2O(4), cache_models.HeavyHitters, {"recent": 4}),
    "window": (Window(20, 3), cache_models.Window, {"size": 20, "sinks": 3}),
}


class Pool:
    """Rows of a model with paged slots: an entry of a row's table is None or the index of its page."""

    def __init__(self, name: str, num_pages: int):
        _, model, arguments = POLICIES[name]
        self.rows: list[Row] = [model(CAPACITY, K, **arguments) for _ in range(B)]
        self.tables: list[list[int | None]] = [[None] * (CAPACITY // PAGE) for _ in range(B)]
        self.num_pages = num_pages
        self.fresh = itertools.count()

    @property
    def named(self) -> list[int]:
        return [page for table in self.tables for page in table if page is not None]

    def append(self, positions, key, value) -> None:
        """Refuses a row that needs more pages than are free; later rows may still get theirs."""
        free = self.num_pages - len(set(self.named))
        named = self.named
        for b, row in enumerate(self.rows):
            real = positions[b] >= 0
            after = row.fork()
            after.append(positions[b, real], key[b, real], value[b, real])
            needed = [
                page
                for page in range(CAPACITY // PAGE)
                if self._writes(row, after, page)
                and (self.tables[b][page] is None or named.count(self.tables[b][page]) > 1)
            ]
            if len(needed) > free:
                row.overflowed = True
                continue
            free -= len(needed)
            self.rows[b] = after
            for page in needed:
                self.tables[b][page] = next(self.fresh)

    @staticmethod
    def _writes(before: Row, after: Row, page: int) -> bool:
        slots = range(page * PAGE, (page + 1) * PAGE)
        return any(
            new[slot] is not None and (old[slot] is None or old[slot].number != new[slot].number)
            for old, new in zip(before.slots, after.slots, strict=True)
            for slot in slots
        )

    def keep(self, firsts, paths) -> None:
        """A row that needs more pages than are free keeps the tokens before the first that would move."""
        free = self.num_pages - len(set(self.named))
        named = self.named
        for b, (row, first, path) in enumerate(zip(self.rows, firsts, paths, strict=True)):
            there = [node for node in path if first + node < row.length]
            moving = [n for n, node in enumerate(there) if node != n]
            needed = {page for page in ((first + n) // PAGE for n in moving) if named.count(self.tables[b][page]) > 1}
            if len(needed) > free:
                row.keep(first, there[: moving[0]])
                row.overflowed = True
                continue
            free -= len(needed)
            row.keep(first, path)
            for page in needed:
                self.tables[b][page] = next(self.fresh)

    def release(self) -> None:
        for row, table in zip(self.rows, self.tables, strict=True):
            for page in range(CAPACITY // PAGE):
                if not any(head[slot] for head in row.slots for slot in range(page * PAGE, (page + 1) * PAGE)):
                    table[page] = None

    def assert_equals(self, cache: pa.caches.KVCache) -> None:
        cache_models.assert_slots(cache, self.rows)
        cache_models.assert_tokens(cache, self.rows)
        table, users = np.asarray(cache.pages.table), np.asarray(cache.pages.users)
        assert ((table >= -1) & (table < self.num_pages)).all()
        np.testing.assert_array_equal(users, np.bincount(table[table >= 0], minlength=self.num_pages))
        # Page indices are arbitrary, but not which entries share a page.
        expected = np.array([[-1 if page is None else page for page in row] for row in self.tables])
        np.testing.assert_array_equal(table >= 0, expected >= 0)
        actual, expected = table[table >= 0], expected[expected >= 0]
        np.testing.assert_array_equal(actual[:, None] == actual, expected[:, None] == expected)


append, observe, truncate, reset, fork, copy_rows, keep = (
    jax.jit(getattr(pa.caches.KVCache, name))
    for name in ("append", "observe", "truncate", "reset", "fork", "copy_rows", "keep")
)


def empty(policy=None, num_pages: int = 6, inner=None) -> pa.caches.KVCache:
    storage = Paged(PAGE, num_pages) if inner is None else Paged(PAGE, num_pages, inner)
    return pa.caches.init(
        policy, storage, batch_size=B, capacity=CAPACITY, kv_heads=K, head_dim=D, dtype="float32"
    )  # fmt: skip


def new_tokens(rng: np.random.Generator, starts, length: int, share: float = 1.0):
    real = rng.random((B, length)) < share * (rng.random((B, 1)) < 0.7)
    positions = np.where(real, np.reshape(starts, (B, 1)) + real.cumsum(1) - 1, -1).astype(np.int32)
    key, value = (rng.standard_normal((B, length, K, D)).astype(np.float32) for _ in "kv")
    key[~real] = value[~real] = np.nan
    return positions, key, value


STEPS = ("append", "append", "append", "truncate", "reset", "fork", "fork a prefix", "copy rows", "keep")
PATH = 6  # largest number of nodes in a path


def run(name: str, num_pages: int, program) -> None:
    policy = POLICIES[name][0]
    cache, pool = empty(policy, num_pages), Pool(name, num_pages)
    for step, seed in program:
        rng = np.random.default_rng(seed)
        if step == "append":
            length = int(rng.choice(CHUNKS))
            positions, key, value = new_tokens(rng, [row.length for row in pool.rows], length, rng.choice([0.7, 1]))
            cache = append(cache, key, value, positions)
            pool.append(positions, key, value)
            if policy.observes:
                weights = rng.random((B, K, CAPACITY), np.float32)
                cache = observe(cache, weights)
                for row, w in zip(pool.rows, weights, strict=True):
                    row.observe(w)
        if step.startswith("fork"):
            sources = rng.integers(0, B, B)
            cache = fork(cache, sources.astype(np.int32))
            pool.rows, pool.tables = [pool.rows[b].fork() for b in sources], [[*pool.tables[b]] for b in sources]
        if step == "copy rows":
            sources, targets = rng.integers(-1, B + 1, (2, 4)).astype(np.int32)
            count = rng.integers(0, 5)
            cache = copy_rows(cache, sources, targets, count)
            for source, target in zip(sources[:count], targets[:count], strict=True):
                if 0 <= source < B and 0 <= target < B:
                    pool.rows[target], pool.tables[target] = pool.rows[source].fork(), [*pool.tables[source]]
        if step == "keep" and policy.ordered:
            firsts = np.maximum([row.length for row in pool.rows] - rng.integers(0, 12, B), 0).astype(np.int32)
            paths = np.sort(rng.permuted(np.tile(np.arange(12), (B, 1)), axis=1)[:, :PATH]).astype(np.int32)
            paths = np.where(rng.random((B, 1)) < 0.3, np.arange(PATH, dtype=np.int32), paths)
            counts = rng.integers(0, PATH + 1, B).astype(np.int32)
            cache = keep(cache, firsts, paths, counts)
            pool.keep(firsts, [path[:count].tolist() for path, count in zip(paths, counts, strict=True)])
            pool.release()
        if step in ("truncate", "fork a prefix") and not policy.observes:
            lengths = np.array([row.length for row in pool.rows]) - rng.integers(-1, 20, B)
            cache = truncate(cache, lengths.astype(np.int32))
            for row, length in zip(pool.rows, lengths, strict=True):
                row.truncate(length)
            pool.release()
        if step == "reset":
            which = rng.random(B) < 0.4
            cache = reset(cache, which)
            for b in np.flatnonzero(which):
                pool.rows[b].reset()
            pool.release()
        pool.assert_equals(cache)


steps = st.tuples(st.sampled_from(STEPS), st.integers(0, 2**32 - 1))
programs = st.lists(steps, min_size=4, max_size=14)


@pytest.mark.parametrize(
    ("name", "num_pages"),
    [("dense", 4), ("dense", 6), ("dense", 9), ("h2o", 5), ("h2o", 9), ("window", 6)],
)
class TestAnyProgram:
    @settings(max_examples=40)
    @given(program=programs)
    def test_leaves_what_rows_of_their_own_would_hold(self, name, num_pages, program):
        self.check(name, num_pages, program)

    @pytest.mark.slow
    @settings(max_examples=170)  # more than 1,000 in all
    @given(program=programs)
    def test_of_a_thousand(self, name, num_pages, program):
        self.check(name, num_pages, program)

    def check(self, name, num_pages, program):
        with contextlib.suppress(NearTieError):
            run(name, num_pages, program)


def used(cache: pa.caches.KVCache) -> int:
    return int((np.asarray(cache.pages.users) > 0).sum())


def filled(*lengths: int, **options) -> pa.caches.KVCache:
    """Tokens 0 to length - 1 in each row."""
    rng = np.random.default_rng(0)
    key, value = (rng.standard_normal((B, CAPACITY, K, D)).astype(np.float32) for _ in "kv")
    at = np.arange(CAPACITY)
    positions = np.where(at < np.array(lengths)[:, None], at, -1).astype(np.int32)
    return append(empty(**options), key, value, positions)


def one_more(cache: pa.caches.KVCache, *rows: int, number: float = 7.0) -> pa.caches.KVCache:
    token = np.full((B, 1, K, D), number, np.float32)
    positions = np.where(np.isin(np.arange(B), rows), np.asarray(cache.lengths), -1)
    return append(cache, token, token, positions[:, None].astype(np.int32))


def contents(cache: pa.caches.KVCache, row: int) -> np.ndarray:
    view = cache.view()
    return cache_models.read(view.key, view.page_table)[row, : int(cache.lengths[row])]


def test_a_page_is_taken_when_a_token_needs_it():
    cache = filled(16, 0, 5)
    assert used(cache) == 2
    assert (np.asarray(cache.pages.table) >= 0).tolist() == [[True, False, False], [False] * 3, [True, False, False]]
    assert used(one_more(cache, 2)) == 2
    assert used(one_more(cache, 0, 1)) == 4


def test_rows_share_a_prompt_until_they_write():
    cache = filled(36, 0, 0)
    prompt = contents(cache, 0)
    forked = fork(cache, np.zeros(B, np.int32))
    assert used(forked) == used(cache) == 3, "nothing is copied"
    after = one_more(forked, 0, 1)
    assert used(after) == 5, "the last page of each that wrote"
    users = np.asarray(after.pages.users)
    assert sorted(users[users > 0]) == [1, 1, 1, 3, 3]
    for row in range(B):
        np.testing.assert_array_equal(contents(after, row)[:36], prompt)
    assert (contents(after, 0)[36] == 7).all()
    assert len(contents(after, 2)) == 36


def test_a_page_that_nobody_else_has_any_more_is_not_copied():
    cache = fork(filled(20, 0, 0), np.zeros(B, np.int32))
    cache = reset(cache, np.array([True, False, True]))
    table = np.asarray(cache.pages.table)
    after = one_more(cache, 1)
    np.testing.assert_array_equal(after.pages.table, table)


def test_a_shared_prefix_saves_its_pages():
    cache = filled(40, 0, 0)
    cache = truncate(fork(cache, np.zeros(B, np.int32)), np.array([40, 32, 16], np.int32))
    assert used(cache) == 3
    assert (np.asarray(cache.pages.table) >= 0).sum(1).tolist() == [3, 2, 1]
    after = one_more(cache, 0, 1, 2)
    assert used(after) == 5, "rows 1 and 2 go on in pages of their own"
    np.testing.assert_array_equal(contents(after, 1)[:32], contents(cache, 0)[:32])


def test_a_spent_pool_refuses_a_row_and_serves_the_others():
    cache = filled(32, 16, 15, num_pages=4)
    assert used(cache) == 4
    after = one_more(cache, 0, 1, 2)
    assert after.overflowed.tolist() == [True, True, False]
    assert after.lengths.tolist() == [32, 16, 16]
    for row in range(B):
        np.testing.assert_array_equal(contents(after, row)[: [32, 16, 15][row]], contents(cache, row))
    assert (contents(after, 2)[15] == 7).all()


def test_a_row_that_wants_too_much_leaves_what_there_is_to_the_next():
    cache = filled(40, 16, 0, num_pages=3)
    assert cache.overflowed.tolist() == [False, True, False], "in order: row 0 has all three"
    cache = filled(16, 48, 10, num_pages=3)
    assert cache.overflowed.tolist() == [False, True, False]
    assert cache.lengths.tolist() == [16, 0, 10]
    assert used(cache) == 2


@pytest.mark.parametrize("release", ["reset", "truncate"])
def test_released_pages_serve_others(release):
    cache = filled(48, 16, 0, num_pages=4)
    assert one_more(cache, 2).overflowed[2]
    if release == "reset":
        cache = reset(cache, np.array([True, False, False]))
        assert used(cache) == 1
    else:
        cache = truncate(cache, np.array([17, 16, 0], np.int32))
        assert used(cache) == 3
    after = one_more(cache, 2)
    assert not after.overflowed[2]
    assert (contents(after, 2) == 7).all()
    np.testing.assert_array_equal(contents(after, 1), contents(cache, 1))


def test_scales_are_copied_with_their_page():
    cache = fork(filled(5, 0, 0, inner=Int8()), np.zeros(B, np.int32))
    before = contents(cache, 0)
    after = one_more(cache, 1, number=1e6)
    for row in range(B):
        np.testing.assert_array_equal(contents(after, row)[:5], before)


@pytest.mark.parametrize("page", [-5, 6, 7, 2**31 - 1])
def test_a_page_that_does_not_exist_is_never_written(page):
    """An invalid table only harms its own row."""
    cache = filled(16, 16, 16)
    broken = cache.pages.of_table(cache.pages.table.at[1, 0].set(page))
    cache = dataclasses.replace(cache, pages=broken)
    token = np.full((B, 1, K, D), 9, np.float32)
    for row in (0, 2):
        after = append(
            truncate(cache, np.array([16, 8, 16], np.int32)), token, token, np.array([[-1], [8], [-1]], np.int32)
        )
        np.testing.assert_array_equal(contents(after, row), contents(cache, row))
        assert (np.asarray(after.pages.users) >= 0).all()


def test_steps_without_new_pages_leave_the_table_alone():
    cache = filled(5, 3, 0)
    after = one_more(one_more(cache, 0, 1), 0)
    np.testing.assert_array_equal(after.pages.table, cache.pages.table)
    np.testing.assert_array_equal(after.pages.users, cache.pages.users)
    assert after.lengths.tolist() == [7, 4, 0]


@pytest.mark.parametrize("inner", [None, Int8()], ids=["plain", "int8"])
@pytest.mark.parametrize("most", [1, AT_ONCE, AT_ONCE + 1])
def test_few_pages_are_copied_without_a_loop_and_many_one_after_another(most, inner):
    """A GPU's host runs loops; but all pages at once would take as much memory as the rows."""
    num_pages = 2 * B * (AT_ONCE + 1)
    cache = empty(num_pages=num_pages, inner=inner)
    rng = np.random.default_rng(most)
    pools = jax.tree.map(
        lambda x: jnp.asarray(rng.integers(-99, 99, x.shape).astype(x.dtype)), (cache.key, cache.value)
    )
    pages = rng.permutation(num_pages)[: 2 * B * most].reshape(2, B, most).astype(np.int32)
    pages[:, 1] = -1
    pages[:, 0, : most - 1] = -1
    copies = PageCopies(*map(jnp.asarray, pages))
    primitives = str(jax.make_jaxpr(copies.make)(pools))
    assert ("while" in primitives) == (most > AT_ONCE)
    assert "cond[" not in primitives

    expected = jax.tree.map(lambda x: np.array(x), pools)
    for source, target in zip(*pages.reshape(2, -1), strict=True):
        if source >= 0:
            for pool in jax.tree.leaves(expected):
                pool[target] = pool[source]
    jax.tree.map(np.testing.assert_array_equal, jax.jit(copies.make)(pools), expected)


@pytest.mark.parametrize("policy", [Window(20, 3), H2O(4)], ids=["window", "h2o"])
def test_a_chunk_that_writes_to_many_shared_pages_copies_all_of_them(policy):
    pages = 2 * AT_ONCE
    sizes = {"batch_size": 2, "capacity": pages * PAGE, "kv_heads": K, "head_dim": D, "dtype": "float32"}
    length, more = pages * PAGE - 8, (AT_ONCE + 1) * PAGE
    rng = np.random.default_rng(0)
    first, second = (rng.standard_normal((2, 2, count, K, D)).astype(np.float32) for count in (length, more))
    number = np.arange(length, dtype=np.int32)
    # Only one of the rows that share all pages writes.
    next_number = np.stack([np.arange(more) + length, np.full(more, -1)]).astype(np.int32)

    def life(storage) -> pa.caches.KVCache:
        cache = append(pa.caches.init(policy, storage, **sizes), *first, np.stack([number, number]))
        return append(fork(cache, np.array([0, 0], np.int32)), *second, next_number)

    paged, plain = life(Paged(PAGE, 2 * pages)), life(pa.caches.Plain())
    assert (np.asarray(paged.pages.table[0]) != np.asarray(paged.pages.table[1])).sum() > AT_ONCE
    assert not paged.overflowed.any()
    np.testing.assert_array_equal(paged.positions, plain.positions)
    held = np.broadcast_to(np.asarray(plain.positions) >= 0, (2, K, pages * PAGE)).swapaxes(1, 2)
    key = cache_models.read(paged.view().key, paged.view().page_table)
    np.testing.assert_array_equal(key[held], np.asarray(plain.key)[held])


def test_a_step_of_one_token_copies_at_most_a_page_per_row():
    """Of other policies, whose heads write to pages of their own, at most one per head."""
    positions = jnp.zeros((B, 1), jnp.int32)
    for name, (policy, *_) in POLICIES.items():
        copies = jax.eval_shape(empty(policy).reserve, positions).copies
        assert copies.sources.shape == copies.targets.shape == (B, K if name == "h2o" else 1)
    chunk = jnp.zeros((B, 20), jnp.int32)
    assert jax.eval_shape(empty().reserve, chunk).copies.sources.shape == (B, 1)
    assert jax.eval_shape(empty(Window(20, 3)).reserve, chunk).copies.sources.shape == (B, CAPACITY // PAGE)


def test_pages_are_part_of_what_a_model_can_know_before():
    cache = filled(48, 16, 0, num_pages=4)
    positions = jnp.array([[-1], [16], [0]], jnp.int32)
    token = np.zeros((B, 1, K, D), np.float32)
    expected = append(cache, token, token, positions).view().positions
    np.testing.assert_array_equal(jax.jit(pa.caches.KVCache.positions_after)(cache, positions), expected)
    np.testing.assert_array_equal(expected, cache.positions)
