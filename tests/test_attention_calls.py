"""Calls of attention(): equivalent arguments, jit, repeatability, independence of rows."""

import dataclasses

import jax
import numpy as np
import pytest

import pallas_attn as pa
from tests import oracle, tolerances
from tests.attention_check import (
    BOTH,
    EVERY_IMPLEMENTATION,
    LAST,
    LEFT,
    RIGHT,
    SMALL,
    B,
    S,
    T,
    assert_same_bits,
    check,
    numbers,
    options,
)
from tests.oracle import positions


@EVERY_IMPLEMENTATION
def test_every_way_to_say_the_same_mask(implementation):
    query, key, value = SMALL.arrays(0)
    expected = SMALL.program(implementation)(query, key, value)
    array = oracle.visible(SMALL.mask, *SMALL.geometry, B, 1)
    sizes, how = pa.BlockSizes(16, 16), options(implementation)
    geometry = {"q_positions": LAST, "kv_positions": LEFT}

    @jax.jit
    def with_a_bool_array(*arrays):
        return pa.attention(*arrays, array, block_sizes=sizes, return_lse=True, **geometry, **how)

    @jax.jit
    def with_a_block_mask(*arrays_and_mask):
        return pa.attention(*arrays_and_mask, return_lse=True, **how)

    block_mask = pa.BlockMask.from_mask(pa.masks.causal(), LAST, LEFT, sizes)
    others = {
        "a bool array": with_a_bool_array(query, key, value),
        "a BlockMask carries positions and block sizes": with_a_block_mask(query, key, value, block_mask),
        "a BlockMask from a jit": with_a_block_mask(query, key, value, jax.jit(lambda mask: mask)(block_mask)),
    }
    for name, other in others.items():
        for actual, like in ((other.out, expected.out), (other.lse, expected.lse)):
            # A different program, so bits may differ.
            limit = tolerances.attention_limit(0, np.abs(value).max(where=np.isfinite(value), initial=0), "float32")
            np.testing.assert_allclose(actual, like, rtol=limit, atol=limit, err_msg=name)


@EVERY_IMPLEMENTATION
def test_defaults(implementation):
    query, key, value = numbers(SMALL)
    how = options(implementation)

    def call(*args, **keywords):
        return jax.jit(lambda q, k, v: pa.attention(q, k, v, *args, **keywords, **how))(query, key, value)

    expected = call(
        pa.masks.full(),
        q_positions=positions(T)[None],
        kv_positions=positions(S)[None],
        scale=query.shape[-1] ** -0.5,
        return_lse=True,
    )
    assert isinstance(expected, pa.AttentionOutput)
    assert expected.key_weights is None
    alone = call()
    assert isinstance(alone, jax.Array)
    assert_same_bits(alone, expected.out)


@EVERY_IMPLEMENTATION
def test_a_call_outside_jit_takes_numpy_arrays_and_compiles_once(implementation, compilations):
    def call(seed):
        query, key, value = (x[:1, :9] for x in SMALL.arrays(seed))
        kv_positions = np.random.default_rng(seed).permutation(9)[None]
        mask = pa.masks.prefix(np.array([seed])) | pa.masks.causal()
        out = pa.attention(query, key, value, mask, kv_positions=kv_positions, **options(implementation))
        return jax.block_until_ready(out)

    first = call(1)
    assert compilations, "the first call compiles, and that is seen"
    compilations.clear()
    call(5)
    assert not compilations, "other values are no other program"
    assert_same_bits(call(1), first, "the same call gives the same bits")


@EVERY_IMPLEMENTATION
def test_under_jit_values_are_no_other_program_and_bits_repeat(implementation):
    traces = []

    @jax.jit
    def call(query, key, value, mask, q_positions, kv_positions):
        traces.append(1)
        block_mask = pa.BlockMask.from_mask(mask, q_positions, kv_positions, pa.BlockSizes(16, 16))
        return pa.attention(query, key, value, block_mask, return_lse=True, **options(implementation))

    def values(seed):
        kv_positions = (LEFT, RIGHT, BOTH)[seed]
        case = dataclasses.replace(SMALL, kv_positions=kv_positions)
        mask = pa.masks.prefix(np.array([seed, 7])) | pa.masks.causal()
        return *case.arrays(seed), mask, case.q_positions, kv_positions

    results = [call(*values(seed)) for seed in range(3)]
    assert not np.array_equal(results[0].out, results[1].out)
    for seed, result in enumerate(results):
        assert_same_bits(call(*values(seed)), result)
    assert len(traces) == 1


@EVERY_IMPLEMENTATION
def test_a_row_does_not_depend_on_other_rows(implementation):
    """Bit for bit, whatever other rows of the batch contain, padding included."""
    query, key, value = SMALL.arrays(0)
    mask = pa.masks.causal()

    @jax.jit
    def call(query, key, value, kv_positions):
        return pa.attention(
            *(query, key, value, mask),
            q_positions=LAST,
            kv_positions=kv_positions,
            return_lse=True,
            block_sizes=pa.BlockSizes(16, 16),
            **options(implementation),
        )

    expected = call(query, key, value, LEFT)
    other = np.stack([LEFT[0], np.full(S, -1, np.int32)])
    poisoned = [x.copy() for x in (query, key, value)]  # the first call may still read its arrays
    for x in poisoned:
        x[1] = np.nan
    actual = call(*poisoned, other)
    assert_same_bits(actual.out[0], expected.out[0])
    assert_same_bits(actual.lse[0], expected.lse[0])


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_blocks_of_any_size(implementation):
    for block_sizes in ((7, 11), (1, 1), (100, 5)):
        check(dataclasses.replace(SMALL, block_sizes=block_sizes), implementation)


@pytest.mark.parametrize(("q_len", "kv_len"), [(5, 9), (9, 5)], ids=["more keys", "more queries"])
def test_causal_at_the_bottom_right(q_len, kv_len):
    """As documented: the shorter side is shifted, so that no position is negative."""
    query, key, value = numbers(SMALL)
    query, key, value = query[:, :q_len], key[:, :kv_len], value[:, :kv_len]
    ends = {"q_positions": np.arange(q_len)[None] + kv_len - q_len}
    if q_len > kv_len:
        ends = {"kv_positions": np.arange(kv_len)[None] + q_len - kv_len}
    aligned = pa.attention(query, key, value, pa.masks.causal(), **ends, implementation="reference")
    explicit = np.tri(q_len, kv_len, kv_len - q_len, dtype=bool)[None, None]
    assert_same_bits(aligned, pa.attention(query, key, value, explicit, implementation="reference"))
    assert (np.asarray(aligned[:, : max(q_len - kv_len, 0)]) == 0).all()
