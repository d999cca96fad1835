"""Bits of what is not there, or not listed, reach no gradient."""

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
    K,
    N,
    S,
    T,
    assert_same_bits,
    dense,
    options,
)
from tests.gradient_check import Case, backward_blocks, normal
from tests.oracle import positions

POISON = [np.nan, np.inf, -np.inf]
POISONED = {
    "padding on both sides": Case(
        oracle.full(),
        Q_BOTH,
        BOTH,
        scores=(oracle.alibi(normal(N)), oracle.softcap(3.0), oracle.bias(normal(B, N, T, S))),
        sinks=normal(N),
    ),
    "holes per key head": Case(
        oracle.causal() & dense(1, N, T, S),
        Q_BOTH + (Q_BOTH >= 0) * 12,
        HOLES,
        scores=(oracle.bias(normal(B, N, T, S)),),
    ),
}


@EVERY_IMPLEMENTATION
@pytest.mark.parametrize("name", POISONED)
def test_poison_in_what_is_not_there_changes_no_bit(name, implementation):
    """In queries, keys and values that do not exist, in biases of pairs that do not see each other, in gradients."""
    case = POISONED[name]
    program = case.both_passes(implementation)
    clean, d_out, d_lse = case.complete()
    poisoned, poisoned_d_out, poisoned_d_lse = case.all_arrays(), *case.cotangents()
    with backward_blocks(case.block_sizes):
        expected = program(clean, d_out, d_lse)
        for poison in POISON:

            def put(x, like, poison=poison):
                return np.where(np.isnan(like), x.dtype.type(poison), x)

            query, key, value = (put(x, like) for x, like in zip(clean[:3], poisoned[:3], strict=True))
            assert (query != clean.query).any()
            assert (key != clean.key).any()
            *scores, bias = clean.scores
            scores.append(np.where(case.visible, bias, np.float32(poison)))
            actual = program(
                clean._replace(query=query, key=key, value=value, scores=scores),
                put(d_out, poisoned_d_out),
                put(d_lse, poisoned_d_lse),
            )
            assert_same_bits(actual, expected, f"{poison} shows")
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(expected[1]))


@KERNELS
def test_poison_in_blocks_that_no_list_holds_changes_no_bit(implementation):
    """These tokens are real, and hidden by the mask alone: the promise is that they are not even read."""
    blocks, size = 5, 16
    hidden = np.zeros((1, K, 1, blocks * size), bool)
    hidden[:, 0, :, 3 * size : 4 * size] = True
    hidden[:, 1, :, : 2 * size] = True
    blind = np.zeros((1, 1, 3 * size, 1), bool)
    blind[:, :, size : 2 * size] = True
    mask = oracle.sliding_window(40) & ~oracle.dense(hidden) & ~oracle.dense(blind)
    bias = normal(1, 1, 1, blocks * size)
    case = Case(
        mask, positions(3 * size, start=30)[None], q_len=3 * size, kv_len=blocks * size, scores=(oracle.bias(bias),)
    )
    block_mask = pa.BlockMask.from_mask(mask.build(pa.masks), *case.geometry, pa.BlockSizes(size, size))
    listed = np.asarray(block_mask.bitmap())
    no_query = np.repeat(~listed.any((0, 2)), size, 1).T[None, :, :, None]
    no_key = np.repeat(~listed.any((0, 1, 3)), size)[None, :, None, None]
    assert no_query.any((0, 1, 3)).all()
    assert no_key.any()
    arrays, d_out, d_lse = case.complete()
    program = case.both_passes(implementation)
    with backward_blocks(case.block_sizes):
        expected = program(arrays, d_out, d_lse)
        for poison in np.float32(POISON):
            query, d_out_ = (np.where(no_key, poison, x) for x in (arrays.query, d_out))
            key, value = (np.where(no_query, poison, x) for x in arrays[1:3])
            poisoned = arrays._replace(query=query, key=key, value=value)
            assert_same_bits(program(poisoned, d_out_, d_lse), expected, f"{poison} shows")


@KERNELS
def test_what_is_not_a_number_shows_in_gradients(implementation):
    """A real key that overflowed must not look like a gradient of 0."""
    case = Case(oracle.causal(), LAST)
    arrays, d_out, d_lse = case.complete()
    arrays.key[0, 3] = np.nan
    with backward_blocks(case.block_sizes):
        _, gradients = case.both_passes(implementation)(arrays, d_out, d_lse)
    assert np.isnan(gradients.query[0]).all(), "every query of row 0 sees key 3"
    assert np.isnan(gradients.value[0, : S - T]).all(), "all of row 0 are seen by the same queries"
    assert np.isfinite(gradients.query[1]).all()
    assert np.isfinite(gradients.key[1]).all()


@KERNELS
def test_full_blocks_are_computed_without_the_mask(implementation):
    """Half of the speed is there. So lists that say "full" must win over a mask that would say "nothing"."""
    case = Case(q_len=32, kv_len=48)
    arrays, d_out, d_lse = case.complete()
    block_mask = pa.BlockMask.from_mask(pa.masks.full(), 32, 48, pa.BlockSizes(16, 16))
    assert (block_mask.bitmap() == oracle.FULL).all()

    @jax.jit
    def run(block_mask):
        call = lambda *x: pa.attention(*x, block_mask, return_lse=True, **options(implementation))[:2]  # noqa: E731
        return jax.vjp(call, *arrays[:3])[1]((d_out, d_lse))

    with backward_blocks((16, 16)):
        assert_same_bits(run(dataclasses.replace(block_mask, mask=~pa.masks.full())), run(block_mask))
