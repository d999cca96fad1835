"""Bits of what is not there, or not listed, reach no output."""

import dataclasses

import jax
import numpy as np
import pytest

import pallas_attn as pa
from tests import oracle
from tests.attention_check import (
    BOTH,
    EVERY_IMPLEMENTATION,
    HOLES,
    KERNELS,
    LAST,
    Q_BOTH,
    B,
    Case,
    K,
    N,
    S,
    T,
    assert_same_bits,
    dense,
    numbers,
    options,
)
from tests.oracle import positions

POISON = [np.nan, np.inf, -np.inf]


@EVERY_IMPLEMENTATION
@pytest.mark.parametrize(
    "case",
    [
        Case(oracle.sliding_window(12) | oracle.sink(2), Q_BOTH + (Q_BOTH >= 0) * 12, BOTH),
        Case(dense(B, N, T, S), Q_BOTH, HOLES, dtype="bfloat16"),
    ],
    ids=["padding on both sides", "holes per key head"],
)
def test_poison_in_padding_changes_no_bit(case, implementation):
    clean = numbers(case)
    holes = [np.isnan(x) for x in case.arrays(0)]
    assert all(hole.any() for hole in holes)
    program = case.program(implementation)
    expected = program(*clean)
    assert np.isfinite(np.asarray(expected.out, np.float32)).all()
    for poison in POISON:
        poisoned = (np.where(hole, x.dtype.type(poison), x) for hole, x in zip(holes, clean, strict=True))
        assert_same_bits(program(*poisoned), expected, f"{poison} reached the output")


@KERNELS
def test_poison_in_blocks_that_no_list_holds_changes_no_bit(implementation):
    """These keys are real, and hidden from everyone by the mask alone: the promise is that they are not even read."""
    blocks, size = 6, 16
    hidden = np.zeros((1, K, 1, blocks * size), bool)
    hidden[:, 0, :, 4 * size : 5 * size] = True
    hidden[:, 1, :, 2 * size : 4 * size] = True
    mask = oracle.sliding_window(40) & ~oracle.dense(hidden)
    case = Case(mask, positions(T, start=70)[None], kv_len=blocks * size)
    block_mask = pa.BlockMask.from_mask(mask.build(pa.masks), *case.geometry, pa.BlockSizes(size, size))
    listed = np.asarray(block_mask.bitmap()).any((0, 2))
    assert listed.astype(int).tolist() == [[0, 1, 1, 1, 0, 1], [0, 1, 0, 0, 1, 1]]

    query, key, value = numbers(case)
    unread = np.repeat(~listed, size, 1).T[None, :, :, None]
    program = case.program(implementation)
    expected = program(query, key, value)
    for poison in POISON:
        poisoned = (np.where(unread, np.float32(poison), x) for x in (key, value))
        assert_same_bits(program(query, *poisoned), expected, f"{poison} reached the output")


@KERNELS
def test_full_blocks_are_computed_without_the_mask(implementation):
    """Half of the speed is there. So lists that say "full" must win over a mask that would say "nothing"."""
    case = Case(q_len=32, kv_len=48)
    query, key, value = numbers(case)
    block_mask = pa.BlockMask.from_mask(pa.masks.full(), 32, 48, pa.BlockSizes(16, 16))
    assert (block_mask.bitmap() == oracle.FULL).all()

    @jax.jit
    def call(block_mask):
        return pa.attention(query, key, value, block_mask, **options(implementation))

    assert_same_bits(call(dataclasses.replace(block_mask, mask=~pa.masks.full())), call(block_mask))


@KERNELS
def test_what_is_not_a_number_reaches_just_the_queries_that_list_its_block(implementation):
    """Real keys that overflowed must show, not turn into zeros; and no query that has nothing to do with them."""
    case = Case(oracle.causal() & oracle.sliding_window(20), LAST)
    block_mask = pa.BlockMask.from_mask(case.mask.build(pa.masks), *case.geometry, pa.BlockSizes(16, 16))
    query, key, value = numbers(case)
    program = case.program(implementation)
    expected = program(query, key, value)
    for block, lists in enumerate(np.asarray(block_mask.bitmap())[0, 0].T > 0):
        poisoned = [x.copy() for x in (key, value)]
        for x in poisoned:
            x[:, block * 16 : (block + 1) * 16] = np.nan
        actual = program(query, *poisoned)
        spared = ~np.repeat(lists, 16)[:T]
        assert_same_bits(actual.out[:, spared], expected.out[:, spared])
        assert_same_bits(actual.lse[:, :, spared], expected.lse[:, :, spared])
        seen = oracle.visible(case.mask, *case.geometry, B, N)[..., block * 16 : (block + 1) * 16].any(-1)
        assert np.isnan(np.asarray(actual.out).swapaxes(1, 2)[seen]).all()
        assert np.isnan(np.asarray(actual.lse)[seen]).all()


@EVERY_IMPLEMENTATION
def test_hidden_keys_of_a_listed_block_have_no_weight(implementation):
    """They are real, so they must be finite; but however large they are, not one bit of them shows."""
    case = Case(oracle.causal(), LAST)
    query, key, value = numbers(case)
    hidden = S - T + 5  # the first key that query 4 does not see
    program = case.program(implementation)
    expected = program(query, key, value)
    # Copies: the first call may still read its arrays.
    large_key, large_value = key.copy(), value.copy()
    large_key[:, hidden:] *= -1e6
    large_value[:, hidden:] = 3e38
    actual = program(query, large_key, large_value)
    assert_same_bits(actual.out[:, :5], expected.out[:, :5])
    assert_same_bits(actual.lse[:, :, :5], expected.lse[:, :, :5])
    assert not np.array_equal(actual.out[:, 5:], expected.out[:, 5:])
