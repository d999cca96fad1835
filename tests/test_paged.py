"""Keys and values in pages: the same results as with contiguous keys, and no other page is read."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_attn as pa
from tests import oracle
from tests.attention_check import B, K, N, assert_error, options
from tests.oracle import positions

IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["reference", "xla"])
D = 32
rng = np.random.default_rng(9)
PREFILL, DECODE = 21, 2


def normal(*shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def pools_of(page: int, table: np.ndarray, spare: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Two pools; pages without an entry in the table hold NaN."""
    size = table.max() + 1 + spare
    pools = [np.full((size, page, K, D), np.nan, np.float32) for _ in "kv"]
    for pool in pools:
        used = np.unique(table[table >= 0])
        pool[used] = normal(used.size, page, K, D)
    return pools[0], pools[1]


def random_table(pages: int) -> np.ndarray:
    """Pages in random order, with unused pages between them."""
    return (2 * rng.permutation(B * pages) + 1).reshape(B, pages).astype(np.int32)


def check(implementation, query, pools, table, q_positions, kv_positions, mask=None, **changes) -> None:
    """Against the oracle, on the contiguous keys of the table."""
    mask = oracle.causal() if mask is None else mask
    key, value = (oracle.gather(pool, table) for pool in pools)
    slots = np.where(np.repeat(table < 0, pools[0].shape[1], 1), -1, np.broadcast_to(kv_positions, key.shape[:2]))
    seen = oracle.visible(mask, q_positions, slots, query.shape[0], N)
    expected = oracle.attention(query, key, value, seen, D**-0.5)
    plain = oracle.plain_attention(query, key, value, seen, D**-0.5)
    actual = pa.attention(
        query, *pools, mask.build(pa.masks), q_positions=q_positions, kv_positions=kv_positions,
        page_table=table, return_lse=True, **options(implementation), **changes,
    )  # fmt: skip
    blind = ~seen.any(-1)
    out, lse = (np.asarray(x, np.float64) for x in actual[:2])
    assert (out.swapaxes(1, 2)[blind] == 0).all()
    assert (lse[blind] == -np.inf).all()
    assert_error(out, expected[0], plain[0], "float32", "out")
    assert_error(lse[~blind], expected[1][~blind], plain[1][~blind], "float32", "lse")


def queries(q_len: int, kv_len: int) -> tuple[np.ndarray, np.ndarray]:
    return normal(B, q_len, N, D), positions(q_len, start=kv_len - q_len)[None]


# A block within a page, of whole pages, of neither; the default; longer than all keys.
BLOCKS = [(16, 16), (16, 48), (48, 16), (48, 32), (64, 48), (64, None), (16, 128)]


@IMPLEMENTATIONS
@pytest.mark.parametrize(
    ("page", "kv_block", "q_len"),
    [*((*blocks, PREFILL) for blocks in BLOCKS), (16, 48, DECODE), (48, 32, DECODE), (64, None, DECODE)],
)
def test_pages_in_any_order(page, kv_block, q_len, implementation):
    table = random_table(96 // page if page < 64 else 2)
    kv_len = table.shape[1] * page
    query, q_positions = queries(q_len, kv_len)
    sizes = kv_block and pa.BlockSizes(16, kv_block)
    left = np.stack([positions(kv_len, left=9), positions(kv_len, left=40)])
    check(implementation, query, pools_of(page, table), table, q_positions, left, block_sizes=sizes)


@IMPLEMENTATIONS
@pytest.mark.parametrize("q_len", [PREFILL, DECODE])
def test_rows_share_pages(q_len, implementation):
    """Rows with a common prompt store it once."""
    table = np.array([[4, 1, 7], [4, 1, 2]], np.int32)
    query, q_positions = queries(q_len, 48)
    check(implementation, query, pools_of(16, table), table, q_positions, positions(48)[None])


@IMPLEMENTATIONS
@pytest.mark.parametrize("q_len", [PREFILL, DECODE])
def test_holes_within_a_row(q_len, implementation):
    """Missing pages between others, and empty slots within a page."""
    table = np.array([[4, -1, 7, 3], [-1, 1, -1, 2]], np.int32)
    query, q_positions = queries(q_len, 64)
    slots = np.where(rng.random((B, 64)) < 0.3, -1, np.arange(64)).astype(np.int32)
    check(implementation, query, pools_of(16, table), table, q_positions, slots)


@IMPLEMENTATIONS
@pytest.mark.parametrize("q_len", [PREFILL, DECODE])
@pytest.mark.parametrize(("bad", "heads"), [(-1, None), (8, K), (1000, None), (2**31 - 1, None), (-(2**31), K)])
def test_a_page_that_the_pool_does_not_have_is_empty(bad, q_len, heads, implementation):
    """Its keys count as empty slots: the first and last page of the pool, to which the index is clipped, hold NaN."""
    table = np.array([[4, bad, 6], [bad, 1, 2]], np.int32)
    there = (table >= 0) & (table < 8)
    pools = pools_of(16, np.where(there, table, -1), spare=1)
    assert len(pools[0]) == 8
    assert np.isnan(pools[0][[0, 7]]).all()
    query, q_positions = queries(q_len, 48)
    slots = positions(48)[None] if heads is None else np.broadcast_to(positions(48), (1, heads, 48))
    arguments = {"q_positions": q_positions, "page_table": table, **options(implementation)}
    actual = pa.attention(query, *pools, pa.masks.causal(), kv_positions=slots, **arguments)
    empty = np.where(np.repeat(there, 16, 1), positions(48), -1)
    whole = [np.nan_to_num(oracle.gather(pool, np.where(there, table, -1))) for pool in pools]
    arguments.pop("page_table")
    expected = pa.attention(query, *whole, pa.masks.causal(), kv_positions=empty, **arguments)
    assert_error(np.asarray(actual), np.asarray(expected), np.asarray(expected), "float32", "out")
    if heads is None:
        default = pa.attention(query, *pools, pa.masks.causal(), page_table=table, **arguments)
        np.testing.assert_array_equal(default, actual)


@IMPLEMENTATIONS
def test_a_block_mask_knows_the_positions_itself(implementation):
    table = random_table(3)
    pools = pools_of(16, table)
    query, q_positions = queries(PREFILL, 48)
    block_mask = pa.BlockMask.from_mask(pa.masks.causal(), q_positions, 48, pa.BlockSizes(16, 32))
    call = {"page_table": table, **options(implementation)}
    actual = pa.attention(query, *pools, block_mask, **call)
    expected = pa.attention(
        query, *(oracle.gather(pool, table) for pool in pools), block_mask, **options(implementation)
    )
    np.testing.assert_array_equal(actual, expected)


@IMPLEMENTATIONS
@pytest.mark.parametrize("kind", ["int8", "float8_e4m3fn", "int4"])
@pytest.mark.parametrize("q_len", [PREFILL, DECODE])
def test_pages_of_quantised_keys(kind, q_len, implementation):
    """The same bits as with contiguous keys."""
    table = random_table(3)
    pools = [pa.QuantizedArray.quantize(jnp.asarray(pool), kind, 8) for pool in pools_of(16, table)]
    rows = [
        jax.tree.map(
            lambda x: jnp.asarray(oracle.gather(np.asarray(x).astype(np.float32), table)).astype(x.dtype), pool
        )
        for pool in pools
    ]
    query, q_positions = queries(q_len, 48)
    call = {"q_positions": q_positions, "return_lse": True, **options(implementation)}
    actual = pa.attention(query, *pools, pa.masks.causal(), page_table=table, **call)
    expected = pa.attention(query, *rows, pa.masks.causal(), **call)
    np.testing.assert_array_equal(actual.out, expected.out)
    np.testing.assert_array_equal(actual.lse, expected.lse)
    assert np.isfinite(actual.out).all()


def test_the_table_is_traced():
    """Another table does not recompile, and vmap may batch it."""
    table = np.stack([random_table(3) for _ in range(3)])
    query, q_positions = queries(DECODE, 48)
    pools = [normal(2 * B * 3, 16, K, D) for _ in "kv"]

    @jax.jit
    def attend(table):
        return pa.attention(query, *pools, pa.masks.causal(), q_positions=q_positions, page_table=table)

    expected = [attend(x) for x in table]
    assert attend._cache_size() == 1
    np.testing.assert_array_equal(jax.vmap(attend)(table), expected)


@pytest.mark.parametrize("page", [None, 16])
@IMPLEMENTATIONS
def test_one_buffer_for_all_sequences(page, implementation):
    """Queries and keys of several sequences in one row, separated by segments, with holes where one has ended."""
    kv_len, owners = 96, np.array([0, 0, 1, -1, 2, 1])  # of the pages
    kv_ids = np.repeat(owners, 16)[None].astype(np.int32)
    slots = np.full((1, kv_len), -1, np.int32)
    for owner in range(3):
        mine = np.flatnonzero(kv_ids[0] == owner)
        slots[0, mine] = np.arange(mine.size)
    slots[0, 40:44] = -1
    slots[0, 90:] = -1
    q_ids = np.array([[0, 1, 2, 1, 0]], np.int32)
    q_positions = np.array([[31, 20, 15, 21, -1]], np.int32)
    key, value = normal(1, kv_len, K, D), normal(1, kv_len, K, D)
    key[slots < 0] = value[slots < 0] = np.nan
    query = normal(1, 5, N, D)
    query[q_positions < 0] = np.nan
    mask = oracle.segments(q_ids, kv_ids) & oracle.causal()
    if page is None:
        seen = oracle.visible(mask, q_positions, slots, 1, N)
        expected = oracle.attention(query, key, value, seen, D**-0.5)[0]
        plain = oracle.plain_attention(query, key, value, seen, D**-0.5)[0]
        actual = pa.attention(
            query, key, value, mask.build(pa.masks), q_positions=q_positions, kv_positions=slots,
            block_sizes=pa.BlockSizes(16, 16), **options(implementation),
        )  # fmt: skip
        assert_error(np.asarray(actual), expected, plain, "float32", "out")
        return
    table = rng.permutation(9)[:6][None].astype(np.int32)
    pools = [np.full((9, page, K, D), np.nan, np.float32) for _ in "kv"]
    for pool, x in zip(pools, (key, value), strict=True):
        pool[table[0]] = x[0].reshape(6, page, K, D)
    check(implementation, query, pools, table, q_positions, slots, mask, block_sizes=pa.BlockSizes(16, 16))


def test_the_cases_have_pieces_of_every_kind():
    """A block within a page, blocks of whole pages, and blocks of neither."""
    pieces = {(math.gcd(*case) == case[0], math.gcd(*case) == case[1]) for case in BLOCKS if case[1]}
    assert pieces == {(True, True), (True, False), (False, True), (False, False)}
