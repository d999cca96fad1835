"""The shares of decode: every live block in exactly one, and none larger than necessary."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pallas_attn as pa
from pallas_attn.schedule import Schedule


@st.composite
def counts(draw) -> tuple[np.ndarray, int]:
    """Live blocks of each row, and the width of the lists."""
    width = draw(st.integers(1, 40))
    rows = draw(st.lists(st.one_of(st.just(0), st.just(width), st.integers(0, width)), min_size=1, max_size=12))
    return np.array(rows, np.int32), width


def pieces(schedule: Schedule) -> list[tuple[int, int, int]]:
    """``(row, first, last)`` of every program that is not spare."""
    return [
        piece for piece in zip(*(np.asarray(x).tolist() for x in schedule_fields(schedule)), strict=True) if piece[2]
    ]


def schedule_fields(schedule: Schedule) -> tuple[jax.Array, jax.Array, jax.Array]:
    return schedule.row, schedule.first, schedule.last


def check(schedule: Schedule, num_active: np.ndarray) -> int:
    """Checks that the pieces are the live blocks, in order, each once; returns the size of the largest."""
    schedule = jax.tree.map(np.asarray, schedule)  # JAX compiles every index of an array of another shape
    found = pieces(schedule)
    visited = [(row, slot) for row, first, last in found for slot in range(first, last)]
    assert visited == [(row, slot) for row, count in enumerate(num_active) for slot in range(count)]
    total = int(schedule.total)
    assert len(found) == total, "programs that are not spare come first"
    assert all(np.all(np.asarray(x)[total:] == 0) for x in schedule_fields(schedule)), "a spare program has nothing"
    for row in range(num_active.size):
        begin, count = int(schedule.begin[row]), int(schedule.count[row])
        assert [piece[0] for piece in found[begin : begin + count]] == [row] * count
        assert sum(piece[0] == row for piece in found) == count
    return max((last - first for _, first, last in found), default=0)


@settings(max_examples=25)
@given(counts(), st.integers(1, 20))
def test_balanced_shares_are_within_one_chunk_of_equal(rows, shares):
    num_active, width = rows
    schedule = Schedule.balanced(jnp.asarray(num_active), width, shares)
    largest = check(schedule, num_active)
    chunk = max(1, -(-int(num_active.sum()) // shares))
    assert largest <= chunk
    ends = {(row, count) for row, count in enumerate(num_active.tolist())}
    for row, first, last in pieces(schedule):
        assert last - first == chunk or (row, last) in ends, "only the last share of a row is smaller"
    assert schedule.row.shape[0] <= shares + num_active.size


@settings(max_examples=25)
@given(counts(), st.integers(1, 50))
def test_fixed_shares_do_not_depend_on_the_other_rows(rows, chunk):
    num_active, width = rows
    schedule = Schedule.fixed(jnp.asarray(num_active), width, chunk)
    assert check(schedule, num_active) <= chunk
    for row, count in enumerate(num_active.tolist()):
        alone = pieces(Schedule.fixed(jnp.asarray(num_active[row : row + 1]), width, chunk))
        mine = [(0, first, last) for r, first, last in pieces(schedule) if r == row]
        assert mine == alone == [(0, x, min(x + chunk, count)) for x in range(0, count, chunk)]


def test_one_long_row_among_short_ones_is_spread_over_the_chip():
    """A batch of 1 x 65536 and 31 x 512 keys, in blocks of 64: splitting every row in 16 would not help."""
    num_active = np.array([65536 // 64] + 31 * [512 // 64])
    schedule = Schedule.balanced(jnp.asarray(num_active, jnp.int32), 1024, shares=128)
    sizes = [last - first for _, first, last in pieces(schedule)]
    assert max(sizes) <= 1.1 * np.mean(sizes)
    split_in_16 = np.concatenate([np.diff(np.linspace(0, count, 17).round()) for count in num_active])
    assert split_in_16.max() > 10 * split_in_16.mean()


@pytest.mark.parametrize(
    "sizes", [pa.BlockSizes(16, 16), pa.BlockSizes(16, 16, chunk=2), pa.BlockSizes(16, 16, shares=3)]
)
def test_a_block_mask_of_few_queries_carries_its_schedule(sizes):
    kv_positions = jnp.asarray(np.where(np.arange(100) < np.array([[100], [7], [0]]), np.arange(100), -1), jnp.int32)
    block_mask = pa.BlockMask.from_mask(pa.masks.full(), 1, kv_positions, sizes)
    num_active = np.asarray(block_mask.num_active).reshape(-1)
    assert num_active.tolist() == [7, 1, 0]
    largest = check(block_mask.schedule, num_active)
    assert largest == {(None, 128): 1, (2, 128): 2, (None, 3): 3}[sizes.chunk, sizes.shares]


def test_many_queries_have_no_schedule():
    assert pa.BlockMask.from_mask(pa.masks.full(), 17, 17, pa.BlockSizes(32, 16)).schedule is None
    assert pa.BlockMask.from_mask(pa.masks.full(), 16, 17, pa.BlockSizes(8, 16)).schedule is None
    assert pa.BlockMask.from_mask(pa.masks.full(), 16, 17, pa.BlockSizes(16, 16)).schedule is not None


def test_lengths_change_no_program():
    """Built on the device, so the numbers of live blocks are not compiled in."""

    @jax.jit
    def build(num_active):
        return Schedule.balanced(num_active, 9, 4), Schedule.fixed(num_active, 9, 2)

    for rows in ([9, 9, 9], [0, 0, 0], [1, 9, 0]):
        for schedule in build(jnp.array(rows, jnp.int32)):
            check(schedule, np.array(rows))
    assert build._cache_size() == 1
