"""Masks without cheap bounds: draft trees and custom functions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_attn as pa
from tests import tolerances

B, T, S, N, K, D = 2, 6, 37, 4, 2, 16
rng = np.random.default_rng(0)
SIZES = pa.BlockSizes(16, 16)
IMPLEMENTATIONS = {
    "xla": {"implementation": "xla", "block_sizes": SIZES},
    "interpreted": {"interpret": True, "block_sizes": SIZES},
    "reference": {"implementation": "reference"},
}
# Two chains from one root, and one chain.
PARENTS = np.array([[-1, 0, 0, 1, 2, 4], [-1, 0, 1, 2, 3, 4]])


def ancestors(parents: np.ndarray) -> np.ndarray:
    sees = np.zeros((len(parents), len(parents)), bool)
    for node in range(len(parents)):
        at = node
        while at >= 0:
            sees[node, at] = True
            at = parents[at]
    return sees


TREES = np.stack([ancestors(parents) for parents in PARENTS])


def tokens(q_len: int = T):
    shapes = ((B, q_len, N, D), (B, S, K, D), (B, S, K, D))
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerances.ATTENTION_GRADIENT * np.abs(expected).max())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_tree_sees_the_past_and_its_ancestors(implementation):
    query, key, value = tokens()
    written_out = np.ones((B, 1, T, S), bool)
    written_out[:, 0, :, -T:] = TREES
    options = IMPLEMENTATIONS[implementation]
    expected = pa.attention(query, key, value, jnp.asarray(written_out), implementation="reference")
    close(pa.attention(query, key, value, pa.masks.tree(TREES), **options), expected)
    # Siblings share a position: the tree, not the position, decides visibility.
    depth = jnp.asarray([S - T + tree.sum(1) - 1 for tree in TREES], jnp.int32)
    positions = jnp.concatenate([jnp.broadcast_to(jnp.arange(S - T)[None], (B, S - T)), depth], 1)
    close(
        pa.attention(
            query,
            key,
            value,
            pa.masks.tree(jnp.asarray(TREES)) & pa.masks.causal(),
            q_positions=depth,
            kv_positions=positions,
            **options,
        ),
        expected,
    )


def test_a_tree_for_the_whole_batch_and_nothing_before_it():
    tree = pa.masks.tree(TREES[0])
    positions = jnp.arange(T)[None]
    np.testing.assert_array_equal(tree.dense_array(positions, positions)[0, 0], TREES[0])
    assert tree.dense_array(positions, jnp.arange(S)[None])[..., : S - T].all()
    mask = pa.BlockMask.from_mask(~tree, T, S, pa.BlockSizes(3, 5))
    np.testing.assert_array_equal(mask.bitmap()[0, 0, :, : (S - T) // 5], 0)  # only nodes are forbidden


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("starts", [(0, S - T), (17, S - 2), (S, 3)], ids=str)
def test_a_tree_that_begins_at_a_key_of_each_row(implementation, starts):
    query, key, value = tokens()
    written_out = np.zeros((B, 1, T, S), bool)
    for row, start in enumerate(starts):
        written_out[row, :, :, :start] = True
        for node in range(min(T, S - start)):  # nodes past the last key are dropped
            written_out[row, 0, :, start + node] = TREES[row][:, node]
    mask = pa.masks.tree(TREES, start=jnp.array(starts, jnp.int32))
    np.testing.assert_array_equal(mask.dense_array(jnp.arange(T)[None], jnp.arange(S)[None]), written_out)
    expected = pa.attention(query, key, value, jnp.asarray(written_out), implementation="reference")
    close(pa.attention(query, key, value, mask, **IMPLEMENTATIONS[implementation]), expected)
    same = pa.masks.tree(TREES[0], start=np.array(starts)).dense_array(jnp.arange(T)[None], jnp.arange(S)[None])
    np.testing.assert_array_equal(same[0], written_out[0])


def test_a_start_that_does_not_fit():
    with pytest.raises(ValueError, match="tree: start: expected integers, got dtype float64"):
        pa.masks.tree(TREES, start=np.zeros(2))
    with pytest.raises(ValueError, match=r"tree: start: expected rank 1, got shape \(\)"):
        pa.masks.tree(TREES, start=np.int32(3))
    with pytest.raises(ValueError, match=r"tree: start: expected \[2\], the batch size of ancestors, got \[3\]"):
        pa.masks.tree(TREES, start=np.zeros(3, np.int32))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.ones((3, 4), bool), r"tree: ancestors: expected \[T, T\] or \[B\|1, T, T\], got shape \(3, 4\)"),
        (np.ones(3, bool), "tree: ancestors: expected rank 3, got shape"),
        (np.ones((3, 3), int), "tree: ancestors: expected bool, got dtype int64"),
    ],
)
def test_not_a_tree(array, message):
    with pytest.raises(ValueError, match=message):
        pa.masks.tree(array)


def test_a_tree_that_does_not_fit():
    query, key, value = tokens()
    with pytest.raises(ValueError, match="tree: ancestors: expected at most as many nodes as keys, S=4, got 6"):
        pa.attention(query, key[:, :4], value[:, :4], pa.masks.tree(TREES))
    with pytest.raises(ValueError, match=r"mask: expected operands of shape .* got \(1, 1, 5, 37\)"):
        pa.attention(query, key, value, pa.masks.tree(np.eye(5, dtype=bool)))


def every_other(q, kv, step, phase):
    return (q - kv) % step == phase


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_function_equals_its_array(implementation):
    query, key, value = tokens(23)
    step = jnp.asarray(rng.integers(1, 4, (1, N, 1, 1)), jnp.int32)
    phase = jnp.asarray(rng.integers(0, 2, (B, 1, 1, S)), jnp.int32)
    mask = pa.masks.custom(every_other, step, phase) & pa.masks.sliding_window(9, 2)
    q, kv = jnp.arange(23)[None, None, :, None], jnp.arange(S)[None, None, None]
    array = ((q - kv) % step == phase) & (kv > q - 9) & (kv <= q + 2)
    expected = pa.attention(query, key, value, array, implementation="reference")
    close(pa.attention(query, key, value, mask, **IMPLEMENTATIONS[implementation]), expected)


def test_a_function_is_bounded_by_its_company_alone():
    step, phase = jnp.full((1, 1, 1, 1), 2, jnp.int32), jnp.zeros((1, 1, 1, 1), jnp.int32)
    alone = pa.masks.custom(every_other, step, phase)
    window = pa.masks.sliding_window(4)

    def bitmap(mask):
        return np.asarray(pa.BlockMask.from_mask(mask, 32, 32, pa.BlockSizes(4, 4)).bitmap())

    assert (bitmap(alone) == 1).all()
    np.testing.assert_array_equal(bitmap(alone & window), np.minimum(bitmap(window), 1))
    assert (bitmap(~alone) == 1).all()


def test_a_function_compiles_once():
    query, key, value = tokens()
    traces = 0

    def sees(q, kv):
        nonlocal traces
        traces += 1
        return kv <= q

    @jax.jit
    def attend(query, key, value):
        return pa.attention(query, key, value, pa.masks.custom(sees), implementation="xla")

    first = attend(query, key, value)
    count = traces
    attend(query + 1, key, value)
    assert traces == count
    close(first, pa.attention(query, key, value, pa.masks.causal(), implementation="reference"))


def test_not_a_function():
    with pytest.raises(TypeError, match="custom: function: expected a callable, got int"):
        pa.masks.custom(3)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="custom: arrays: expected integers, got dtype float"):
        pa.masks.custom(every_other, np.zeros((1, 1, 1, 1), np.float32))
    with pytest.raises(ValueError, match=r"custom: arrays: expected rank 4, got shape \(3,\)"):
        pa.masks.custom(every_other, np.zeros(3, np.int32))
