"""Block lists against brute force: tight where promised, sound everywhere, and always well formed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

import pallas_attn as pa
from pallas_attn import block_mask
from tests import oracle, strategies
from tests.oracle import positions

BATCH, Q_HEADS, KV_HEADS = 2, 4, 2
EMPTY, PARTIAL, FULL = oracle.EMPTY, oracle.PARTIAL, oracle.FULL
rng = np.random.default_rng(1)


def build(mask: oracle.Mask, q_positions, kv_positions, q_block=4, kv_block=3) -> pa.BlockMask:
    return pa.BlockMask.from_mask(mask.build(pa.masks), q_positions, kv_positions, pa.BlockSizes(q_block, kv_block))


def brute_force(mask: oracle.Mask, q_positions, kv_positions, like: pa.BlockMask) -> np.ndarray:
    """The class of every block, in the batch and the heads of ``like``."""
    q_positions, kv_positions = (
        np.arange(x, dtype=np.int32)[None] if isinstance(x, int) else np.asarray(x) for x in (q_positions, kv_positions)
    )
    batch = max(BATCH if mask_has_batch(mask) else 1, q_positions.shape[0], kv_positions.shape[0])
    seen = oracle.visible(mask, q_positions, kv_positions, batch, like.shape[1])
    return oracle.block_classes(seen, q_positions, kv_positions, like.q_block, like.kv_block)


def mask_has_batch(mask: oracle.Mask) -> bool:
    return any(
        mask_has_batch(x) if isinstance(x, oracle.Mask) else isinstance(x, np.ndarray) and len(x) == BATCH
        for x in mask.args
    )


def assert_well_formed(bm: pa.BlockMask, lists: pa.BlockLists | None = None) -> None:
    """Checks what does not depend on the mask: the lists agree with their own bitmap."""
    classes = np.asarray(bm.bitmap())
    if lists is None:
        lists, nk = bm.lists, bm.grid[1]
        assert classes.shape == (*bm.num_full.shape, nk)
    else:
        # In transposed lists a block is full only if it has no padding query.
        queries = np.asarray(bm.q_positions)[:, None, :, None]
        exists = np.pad(queries >= 0, [(0, 0), (0, 0), (0, -queries.shape[2] % bm.q_block), (0, 0)])
        exists = exists.reshape(len(queries), 1, -1, bm.q_block, 1).all(3)
        classes = np.where(exists, classes, np.minimum(classes, PARTIAL)).swapaxes(-1, -2)
    num_full, num_active, rows = oracle.lists(classes)
    np.testing.assert_array_equal(lists.num_full, num_full)
    np.testing.assert_array_equal(lists.num_active, num_active)
    width = lists.indices.shape[-1]
    for actual, expected in zip(np.asarray(lists.indices).reshape(-1, width), rows, strict=True):
        # Full blocks first, ascending, then partial ones, ascending; none twice, none lost; zeros fill the row.
        assert actual.tolist() == expected + [0] * (width - len(expected))
    work = num_full + 2 * (num_active - num_full)
    order = np.asarray(lists.order)
    np.testing.assert_array_equal(np.sort(order, -1), np.broadcast_to(np.arange(order.shape[-1]), order.shape))
    assert (np.diff(np.take_along_axis(work, order, -1), axis=-1) <= 0).all(), "the heaviest row comes first"
    for x in (lists.num_full, lists.num_active, lists.indices, lists.order):
        assert x.dtype == jnp.int32


def assert_sound(bm: pa.BlockMask, expected: np.ndarray) -> None:
    classes = np.broadcast_to(bm.bitmap(), expected.shape)
    assert (classes[expected != EMPTY] != EMPTY).all(), "a block that someone sees is in no list"
    assert (expected[classes == FULL] == FULL).all(), "a block is called full and is not"


T, S = 22, 29
SORTED_IDS = np.sort(rng.integers(0, 5, (BATCH, S)), -1)

# (mask, query positions, key positions): ints, or rows of positions.
TIGHT = {
    "full": (oracle.full(), T, S),
    "causal": (oracle.causal(), T, S),
    "causal, decoding": (oracle.causal(), positions(5, start=20)[None], S),
    "causal, left padding": (
        oracle.causal(),
        np.stack([positions(S, left=9), positions(S)]),
        np.stack([positions(S, left=9), positions(S)]),
    ),
    "causal, right padding": (
        oracle.causal(),
        np.stack([positions(S, right=9), positions(S, right=S)]),
        np.stack([positions(S, right=9), positions(S, right=S)]),
    ),
    "full, padding on both sides": (
        oracle.full(),
        np.stack([positions(T, left=5, right=7), positions(T, left=4, right=3)]),
        np.stack([positions(S, left=6, right=4), positions(S, left=3, right=13)]),
    ),
    "causal, key positions per head": (
        oracle.causal(),
        np.stack([positions(T), positions(T, left=5)]),
        np.stack([[positions(S), positions(S, right=9)], [positions(S, left=5), positions(S, left=7, right=3)]]),
    ),
    "window": (oracle.sliding_window(5), T, S),
    "window, narrow": (oracle.sliding_window(1), T, S),
    "window, left and right": (oracle.sliding_window(4, 6), T, S),
    "window, right": (oracle.sliding_window(0, 7), T, S),
    "window, padding": (
        oracle.sliding_window(6),
        np.stack([positions(S, left=9), positions(S, right=4)]),
        np.stack([positions(S, left=9), positions(S, right=4)]),
    ),
    "prefix": (oracle.prefix(np.array([8, 0])), T, S),
    "prefix or causal": (oracle.prefix(np.array([7, 12])) | oracle.causal(), T, S),
    "sink": (oracle.sink(4), T, S),
    "chunks": (oracle.chunked(6), T, S),
    "chunks of a block": (oracle.chunked(12), T, S),
    "chunks, padding": (oracle.chunked(5), np.stack([positions(T, left=5)]), np.stack([positions(S, right=4)])),
    "segments": (oracle.segments(SORTED_IDS, SORTED_IDS), S, S),
    "segments, one": (oracle.segments(np.zeros((1, T), int), np.zeros((1, S), int)), T, S),
    "segments, padding": (
        oracle.segments(SORTED_IDS, SORTED_IDS),
        np.stack([positions(S, right=4), positions(S, left=7)]),
        np.stack([positions(S, right=4), positions(S, left=7)]),
    ),
    "dense, sparse": (oracle.dense(rng.random((BATCH, 1, T, S)) < 0.1), T, S),
    "dense, holes": (oracle.dense(rng.random((1, KV_HEADS, T, S)) < 0.98), T, S),
    "dense, per head": (oracle.dense(rng.random((BATCH, Q_HEADS, T, S)) < 0.5), T, S),
    "dense, padding": (
        oracle.dense(rng.random((BATCH, 1, T, S)) < 0.1),
        np.stack([positions(T, left=5, right=3), positions(T, right=11)]),
        np.stack([positions(S, right=14), positions(S, left=10)]),
    ),
    "nothing": (~oracle.full(), T, S),
    "not causal": (~oracle.causal(), T, S),
}


@pytest.fixture
def op_by_op(monkeypatch):
    """Builds lists op by op: compiling a program for each of a thousand structures would take half an hour."""
    monkeypatch.setattr(block_mask, "_build_lists", block_mask._build_lists.__wrapped__)


@pytest.mark.parametrize("name", TIGHT)
def test_lists_are_tight(name, op_by_op):
    mask, q_positions, kv_positions = TIGHT[name]
    bm = build(mask, q_positions, kv_positions)
    expected = brute_force(mask, q_positions, kv_positions, bm)
    np.testing.assert_array_equal(np.broadcast_to(bm.bitmap(), expected.shape), expected)
    assert_well_formed(bm)


@pytest.mark.parametrize(("q_block", "kv_block"), [(1, 1), (1, 8), (7, 1), (22, 29), (64, 16)])
def test_lists_are_tight_for_blocks_of_any_size(q_block, kv_block, op_by_op):
    mask = oracle.sliding_window(5, 2)
    q_positions, kv_positions = positions(T, left=4)[None], positions(S, left=4, right=6)[None]
    bm = build(mask, q_positions, kv_positions, q_block, kv_block)
    assert bm.grid == (-(-T // q_block), -(-S // kv_block))
    np.testing.assert_array_equal(bm.bitmap(), brute_force(mask, q_positions, kv_positions, bm))
    assert_well_formed(bm)


@pytest.mark.parametrize(("q_len", "kv_len"), [(1, 1), (1, 29), (22, 1)])
def test_lists_are_tight_where_an_axis_has_length_one(q_len, kv_len):
    array = rng.random((BATCH, 1, q_len, kv_len)) < 0.5
    for mask in (oracle.dense(array), oracle.causal(), ~oracle.prefix(np.array([1, 0]))):
        bm = build(mask, q_len, kv_len)
        expected = brute_force(mask, q_len, kv_len, bm)
        np.testing.assert_array_equal(np.broadcast_to(bm.bitmap(), expected.shape), expected)


def test_every_negative_position_is_padding():
    """Left padding is ``arange(T) - start``: -3, -2, -1, 0, 1, ..."""
    ramp = np.arange(T)[None] - 9
    for mask in (oracle.causal(), oracle.sliding_window(3, 2), oracle.chunked(4), ~oracle.sink(2)):
        one, other = (build(mask, x.astype(np.int32), x.astype(np.int32)) for x in (ramp, np.maximum(ramp, -1)))
        jax.tree.map(np.testing.assert_array_equal, one.lists, other.lists)
        assert_sound(one, brute_force(mask, ramp, ramp, one))


def test_what_an_operand_holds_at_padding_does_not_matter():
    q_positions, kv_positions = positions(S, right=10)[None], positions(S, left=8)[None]

    def classes(ids_at_padding, array_at_padding):
        q_ids, kv_ids = (np.where(p >= 0, SORTED_IDS[:1], ids_at_padding) for p in (q_positions, kv_positions))
        real = (q_positions[0] >= 0)[:, None] & (kv_positions[0] >= 0)
        array = np.where(real, np.arange(S)[:, None] > 11, array_at_padding)[None, None]
        mask = oracle.segments(q_ids, kv_ids) | oracle.dense(array)
        return np.asarray(build(mask, q_positions, kv_positions).bitmap())

    np.testing.assert_array_equal(classes(-7, True), classes(10**6, False))


@pytest.mark.parametrize("examples", [40, pytest.param(1000, marks=pytest.mark.slow)])
def test_random_masks_lose_no_block(op_by_op, examples):
    batch, q_len, kv_len = BATCH, 11, 14

    # The shapes of positions are fixed, to save time.
    @settings(max_examples=examples)
    @given(
        strategies.masks(batch, Q_HEADS, KV_HEADS, q_len, kv_len),
        strategies.q_positions(batch, q_len).map(lambda x: np.broadcast_to(x, (batch, q_len))),
        strategies.kv_positions(batch, KV_HEADS, kv_len).map(
            lambda x: np.broadcast_to(x if x.ndim == 3 else x[:, None], (batch, KV_HEADS, kv_len))
        ),
    )
    def check(mask, q_positions, kv_positions):
        bm = build(mask, q_positions, kv_positions)
        assert_sound(bm, brute_force(mask, q_positions, kv_positions, bm))
        assert_well_formed(bm)

    check()


@pytest.mark.parametrize("kv_shape", [(1,), (BATCH,), (1, 1), (BATCH, 1), (1, KV_HEADS), (BATCH, KV_HEADS)], ids=str)
@pytest.mark.parametrize("q_batch", [1, BATCH])
def test_positions_and_operands_of_every_shape(q_batch, kv_shape, op_by_op):
    q_positions = np.stack([positions(T, start=5, left=3 * b) for b in range(q_batch)])
    kv_positions = np.stack([rng.permutation(S) - 5 for _ in range(np.prod(kv_shape))]).reshape(*kv_shape, S)
    for heads in (1, KV_HEADS, Q_HEADS):
        mask = oracle.causal() & ~oracle.dense(rng.random((1, heads, T, S)) < 0.2) | oracle.prefix(np.array([4, 1]))
        bm = build(mask, q_positions, kv_positions)
        expected = brute_force(mask, q_positions, kv_positions, bm)
        assert bm.shape == (*expected.shape[:2], T, S)
        assert bm.shape[1] == max(heads, kv_shape[1] if len(kv_shape) == 2 else 1)
        assert_sound(bm, expected)
        assert_well_formed(bm)


@pytest.mark.parametrize("name", ["causal, key positions per head", "dense, per head", "prefix or causal", "nothing"])
def test_transposed_lists_are_the_lists_of_the_transposed_relation(name):
    mask, q_positions, kv_positions = TIGHT[name]
    bm = build(mask, q_positions, kv_positions)
    assert_well_formed(bm, bm.transposed)
    assert bm.transposed.indices.shape[-2:] == bm.grid[::-1]


@pytest.mark.parametrize("blocks", [(4, 3), (1, 5)])
def test_a_window_keeps_lists_short_and_loses_nothing(op_by_op, blocks):
    for left, right in ((1, 0), (0, 1), (2, 0), (3, 2), (5, 0), (6, 1), (0, 9), (12, 7), (40, 3)):
        mask = oracle.sliding_window(left, right)
        bm = build(mask, T, S, *blocks)
        np.testing.assert_array_equal(bm.bitmap(), brute_force(mask, T, S, bm))
        assert_well_formed(bm)


def test_the_width_of_a_window_is_that_of_its_blocks():
    def width(mask, q_positions=1024, kv_positions=1024):
        return jax.eval_shape(lambda: build(mask, q_positions, kv_positions, 16, 8)).indices.shape[-1]

    # A block of 16 queries with a window of 8 sees 23 consecutive keys, which touch at most 4 blocks of 8.
    assert width(oracle.sliding_window(8)) == 4
    assert width(oracle.sliding_window(8) & oracle.causal()) == 4
    assert width(oracle.causal() & oracle.sliding_window(100) & oracle.sliding_window(8)) == 4
    # These have no bound: the window is one alternative of an `|`, or positions are arbitrary.
    for mask in (oracle.sliding_window(8) | oracle.sink(1), ~oracle.sliding_window(8), oracle.causal()):
        assert width(mask) == 1024 // 8
    assert width(oracle.sliding_window(8), positions(1024)[None]) == 1024 // 8
    assert width(oracle.sliding_window(8), 1024, positions(1024)[None]) == 1024 // 8
    assert width(oracle.sliding_window(5000)) == 1024 // 8


def test_a_window_over_permuted_positions_fits_its_list():
    """A ring buffer: any block may hold keys of any window, so the window must not limit the width."""
    kv_positions = rng.permutation(S)[None]
    mask = oracle.sliding_window(6)
    bm = build(mask, np.arange(S)[None], kv_positions)
    expected = brute_force(mask, np.arange(S)[None], kv_positions, bm)
    assert_sound(bm, expected)
    assert expected.astype(bool).sum(-1).max() > 4, "the case is meant to need long lists"
    assert_well_formed(bm)


def test_order_puts_partial_blocks_at_twice_the_work_of_full_ones():
    # Block row 0 sees 3 full blocks (work 3), row 1 two partial (work 4), row 2 none, row 3 one partial (work 2).
    array = np.zeros((8, 6), bool)
    array[:2] = True
    array[2, [0, 2]] = True
    array[7, 5] = True
    bm = build(oracle.dense(array[None, None]), 8, 6, 2, 2)
    assert bm.bitmap().tolist() == [[[[2, 2, 2], [1, 1, 0], [0, 0, 0], [0, 0, 1]]]]
    assert bm.order.tolist() == [[[1, 0, 3, 2]]]
    assert bm.num_full.tolist() == [[[3, 0, 0, 0]]]
    assert bm.num_active.tolist() == [[[3, 2, 0, 1]]]
    assert bm.indices.tolist() == [[[[0, 1, 2], [0, 1, 0], [0, 0, 0], [2, 0, 0]]]]
    assert float(bm.density()) == 6 / 12


def test_full_blocks_come_before_partial_ones():
    # Causal and windowed: the diagonal and the far end are partial, and blocks in between are full.
    bm = build(oracle.causal() & oracle.sliding_window(9), 16, 16, 2, 2)
    assert bm.bitmap()[0, 0, 6].tolist() == [0, 0, 1, 2, 2, 2, 1, 0]
    assert bm.indices[0, 0, 6, :5].tolist() == [3, 4, 5, 2, 6]


def test_density_is_the_share_of_blocks_visited():
    assert float(build(oracle.full(), T, S).density()) == 1
    assert float(build(~oracle.full(), T, S).density()) == 0
    bm = build(*TIGHT["causal, key positions per head"])
    assert float(bm.density()) == pytest.approx(np.mean(np.asarray(bm.bitmap()) != EMPTY))
    window = build(oracle.sliding_window(5), T, S)  # whose lists are narrower than a row of blocks
    assert float(window.density()) == pytest.approx(np.mean(np.asarray(window.bitmap()) != EMPTY))


def test_it_prints_as_a_picture():
    """test_picture.py checks the contents of the picture."""
    assert str(build(oracle.causal(), 8, 8, 2, 2)).splitlines() == [
        "BlockMask(B=1, heads=1, T=8, S=8, blocks of 2x2, density 62.5%)",
        "all batch rows, all heads: density 62.5%",
        "        keys",
        "queries 0 4",
        "      0 ▒···",
        "      2 █▒··",
        "      4 ██▒·",
        "      6 ███▒",
        "█ full  ▒ partial  · empty",
        "one character = 2 queries x 2 keys",
    ]


def test_a_traced_block_mask_can_be_printed():
    texts = []

    @jax.jit
    def trace(q_positions):
        texts.append(str(build(oracle.causal(), q_positions, 8)))
        return q_positions

    trace(jnp.arange(6, dtype=jnp.int32)[None])
    assert "T=6, S=8" in texts[0]


def test_builds_under_jit_once_for_all_values():
    traces = []

    @jax.jit
    def lists(mask, q_positions, kv_positions):
        traces.append(1)
        return pa.BlockMask.from_mask(mask, q_positions, kv_positions, pa.BlockSizes(4, 3))

    def mask(lengths, ids):
        return (oracle.prefix(np.array(lengths)) | oracle.causal()) & oracle.segments(ids, ids)

    for lengths, ids, left in (
        ([3, 9], SORTED_IDS, 2),
        ([0, 29], SORTED_IDS[::-1].copy(), 20),
        ([1, 1], 0 * SORTED_IDS, 0),
    ):
        p = np.stack([positions(S, left=left), positions(S, right=left)]).astype(np.int32)
        m = mask(lengths, ids)
        compiled, eager = lists(m.build(pa.masks), p, p), build(m, p, p)
        assert_sound(compiled, brute_force(m, p, p, compiled))
        jax.tree.map(np.testing.assert_array_equal, compiled.lists, eager.lists)
    assert len(traces) == 1


def test_building_again_compiles_nothing(compilations):
    def once(seed):
        p = np.random.default_rng(seed).permutation(S)[None].astype(np.int32)
        jax.block_until_ready(build(oracle.causal() & oracle.sink(5), p, p, 5, 4))

    once(0)
    assert compilations, "the first call compiles, and that is seen"
    compilations.clear()
    once(1)
    assert not compilations


def test_a_block_mask_is_a_pytree():
    bm = build(*TIGHT["causal, left padding"])
    again = jax.jit(lambda x: x)(bm)
    assert isinstance(again, pa.BlockMask)
    assert again.block_sizes == bm.block_sizes
    jax.tree.map(np.testing.assert_array_equal, again, bm)


def test_its_facts():
    mask, q_positions, kv_positions = TIGHT["causal, key positions per head"]
    bm = build(mask, q_positions, kv_positions)
    assert (bm.q_block, bm.kv_block) == (4, 3)
    assert bm.shape == (BATCH, KV_HEADS, T, S)
    assert bm.grid == (6, 10)
    assert bm.num_full.shape == bm.num_active.shape == bm.order.shape == (BATCH, KV_HEADS, 6)
    assert bm.indices.shape == (BATCH, KV_HEADS, 6, 10)
    np.testing.assert_array_equal(bm.kv_positions, kv_positions)
    shared = build(oracle.causal(), T, S)
    assert shared.shape == (1, 1, T, S)
    assert build(oracle.prefix(np.array([2, 3])), T, S).shape == (BATCH, 1, T, S)


def test_lists_need_no_array_of_queries_times_keys():
    ids = np.zeros((1, 2**15), np.int32)
    mask = oracle.causal() & oracle.sliding_window(4096) | oracle.segments(ids, ids)
    program = jax.make_jaxpr(lambda p: build(mask, p, p, 128, 128))(np.arange(2**15, dtype=np.int32)[None])
    blocks = (2**15 // 128) ** 2
    largest = max(variable.aval.size for variable in _all_variables(program.jaxpr))
    assert blocks <= largest <= 4 * blocks


def _all_variables(jaxpr):
    for equation in jaxpr.eqns:
        yield from equation.outvars
        for inner in jax.tree.leaves(list(equation.params.values())):
            if hasattr(inner, "jaxpr"):
                yield from _all_variables(inner.jaxpr)


NOTHING = {
    "prefix: lengths": lambda: pa.masks.prefix(np.zeros(0, np.int32)),
    "segments: q_ids": lambda: pa.masks.segments(np.zeros((0, 5), np.int32)),
    "segments: kv_ids": lambda: pa.masks.segments(np.zeros((1, 5), np.int32), np.zeros((1, 0), np.int32)),
    "dense: array": lambda: pa.masks.dense(np.zeros((0, 1, 5, 5), bool)),
    "tree: ancestors": lambda: pa.masks.tree(np.zeros((0, 0), bool)),
    "tree: start": lambda: pa.masks.tree(np.ones((1, 1), bool), np.zeros(0, np.int32)),
    "custom: arrays": lambda: pa.masks.custom(lambda q, k, x: x, np.zeros((0, 1, 1, 1), bool)),
    "q_positions": lambda: pa.BlockMask.from_mask(pa.masks.causal(), np.zeros((0, 5), np.int32), 5),
    "kv_positions": lambda: pa.BlockMask.from_mask(pa.masks.causal(), 5, np.zeros((0, 1, 5), np.int32)),
}


@pytest.mark.parametrize("argument", NOTHING)
def test_a_batch_of_nothing_is_refused(argument):
    with pytest.raises(ValueError, match=rf"^{argument}: expected .*no empty axis, got shape \("):
        NOTHING[argument]()
