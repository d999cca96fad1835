"""The mask algebra: each mask is the documented relation, and mistakes raise early."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_attn as pa
from tests import oracle

BATCH, HEADS, T, S = 2, 4, 9, 12
rng = np.random.default_rng(0)
# Left padding in one row, right padding in the other; keys out of order, with holes.
Q_POSITIONS = np.array([np.arange(T) - 3, [*range(4, 11), -1, -1]], np.int32)
KV_POSITIONS = np.array([rng.permutation(S), np.where(rng.random(S) < 0.3, -1, rng.permutation(S))], np.int32)
DENSE = rng.random((BATCH, 1, T, S)) < 0.5
Q_IDS, KV_IDS = rng.integers(0, 3, (BATCH, T)), rng.integers(0, 3, (BATCH, S))

MASKS = {
    "full": oracle.full(),
    "causal": oracle.causal(),
    "window of 1": oracle.sliding_window(1),
    "window, left": oracle.sliding_window(4),
    "window, right": oracle.sliding_window(0, 3),
    "window, both": oracle.sliding_window(2, 3),
    "prefix": oracle.prefix(np.array([5, 0])),
    "no sink": oracle.sink(0),
    "sink": oracle.sink(3),
    "chunked": oracle.chunked(4),
    "chunks of 1": oracle.chunked(1),
    "segments": oracle.segments(Q_IDS, KV_IDS),
    "segments, shared by the batch": oracle.segments(Q_IDS[:1], KV_IDS[:1]),
    "dense": oracle.dense(DENSE),
    "dense, shared by the batch": oracle.dense(DENSE[:1]),
    "dense, per head": oracle.dense(rng.random((BATCH, HEADS, T, S)) < 0.5),
    "and": oracle.causal() & oracle.sliding_window(3, 2),
    "or": oracle.prefix(np.array([2, 7])) | oracle.causal(),
    "not": ~oracle.chunked(3),
    "nested": ~((oracle.causal() & ~oracle.sink(2)) | oracle.dense(DENSE)) & oracle.segments(Q_IDS, KV_IDS),
}


@pytest.mark.parametrize("name", MASKS)
def test_is_the_relation_that_its_name_says(name):
    mask = MASKS[name].build(pa.masks)
    actual = mask.dense_array(jnp.asarray(Q_POSITIONS), jnp.asarray(KV_POSITIONS))
    expected = oracle.visible(MASKS[name], Q_POSITIONS, KV_POSITIONS, BATCH, actual.shape[1])
    np.testing.assert_array_equal(np.broadcast_to(actual, expected.shape), expected)
    assert actual.dtype == jnp.bool_


def test_the_worked_examples_of_the_contract():
    positions = jnp.arange(6, dtype=jnp.int32)[None]

    def seen_by(query, mask):
        return np.flatnonzero(
            np.broadcast_to(mask.dense_array(positions, positions), (1, 1, 6, 6))[0, 0, query]
        ).tolist()

    assert seen_by(3, pa.masks.causal()) == [0, 1, 2, 3]
    assert seen_by(3, pa.masks.sliding_window(2)) == [2, 3]  # q - left < k <= q + right
    assert seen_by(3, pa.masks.sliding_window(2, 1)) == [2, 3, 4]
    assert seen_by(0, pa.masks.prefix(jnp.array([2]))) == [0, 1]
    assert seen_by(5, pa.masks.sink(1)) == [0]
    assert seen_by(3, pa.masks.chunked(2)) == [2, 3]
    assert seen_by(3, pa.masks.segments(jnp.array([[7, 7, 7, 8, 8, 9]]))) == [3, 4]
    assert seen_by(1, pa.masks.dense(jnp.eye(6, dtype=bool))) == [1]


def test_positions_per_kv_head():
    kv_positions = np.stack([rng.permutation(S) - 2 for _ in range(4)]).reshape(2, 2, S).astype(np.int32)
    for mask in (MASKS["causal"], MASKS["dense, per head"], MASKS["nested"]):
        actual = mask.build(pa.masks).dense_array(jnp.asarray(Q_POSITIONS), jnp.asarray(kv_positions))
        expected = oracle.visible(mask, Q_POSITIONS, kv_positions, BATCH, actual.shape[1])
        np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.int64])
def test_integers_of_any_width_serve_as_operands(dtype):
    lengths, ids = np.array([5, 0], dtype), KV_IDS.astype(dtype)
    q, kv = jnp.asarray(Q_POSITIONS), jnp.asarray(KV_POSITIONS)
    np.testing.assert_array_equal(
        pa.masks.prefix(lengths).dense_array(q, kv), MASKS["prefix"].build(pa.masks).dense_array(q, kv)
    )
    np.testing.assert_array_equal(
        pa.masks.segments(Q_IDS.astype(dtype), ids).dense_array(q, kv),
        MASKS["segments"].build(pa.masks).dense_array(q, kv),
    )


def test_a_mask_is_a_pytree():
    mask = MASKS["nested"].build(pa.masks)
    leaves, structure = jax.tree.flatten(mask)
    assert all(leaf.ndim == 4 for leaf in leaves)
    traces = []

    @jax.jit
    def written_out(mask, q, kv):
        traces.append(mask)
        return mask.dense_array(q, kv)

    q, kv = jnp.asarray(Q_POSITIONS), jnp.asarray(KV_POSITIONS)
    expected = mask.dense_array(q, kv)
    np.testing.assert_array_equal(written_out(mask, q, kv), expected)
    written_out(jax.tree.unflatten(structure, [~x if x.dtype == bool else x + 1 for x in leaves]), q, kv)
    assert len(traces) == 1, "other values in the operands are no other function"
    written_out(~mask, q, kv)
    assert len(traces) == 2


def test_settings_belong_to_the_structure():
    def structure(mask):
        return jax.tree.structure(mask)

    assert structure(pa.masks.sliding_window(3)) == structure(pa.masks.sliding_window(np.int64(3), 0))
    assert structure(pa.masks.sliding_window(3)) != structure(pa.masks.sliding_window(4))
    assert structure(pa.masks.sink(3)) != structure(pa.masks.sink(4))
    assert structure(pa.masks.chunked(3)) != structure(pa.masks.chunked(4))


CONDITIONS = {
    "bool": lambda a, b: bool(a),
    "and": lambda a, b: a and b,
    "or": lambda a, b: a or b,
    "not": lambda a, b: not a,
    "if": lambda a, b: 1 if a else 2,
    "chained": lambda a, b: a & b or a,
}


@pytest.mark.parametrize("name", CONDITIONS)
def test_a_mask_has_no_truth_value(name):
    # `a and b` would silently be b: a mask that lets too much through.
    with pytest.raises(TypeError, match=r"a mask has no truth value: combine masks with & \| ~"):
        CONDITIONS[name](pa.masks.causal(), pa.masks.sink(1))


@pytest.mark.parametrize("other", [True, 1, None, np.ones((2, 2), bool), "causal"], ids=repr)
def test_only_masks_combine_with_masks(other):
    for name, combine in {"&": lambda x: pa.masks.causal() & x, "|": lambda x: pa.masks.causal() | x}.items():
        with pytest.raises(TypeError, match=f"\\{name}: expected a mask on both sides, got .*{type(other).__name__}"):
            combine(other)


def test_only_masks_combine_with_masks_from_the_left():
    for combine in (lambda m: True & m, lambda m: np.ones((2, 2), bool) & m, lambda m: jnp.ones((2, 2), bool) | m):
        with pytest.raises(TypeError):
            combine(pa.masks.causal())
