"""The cost model of skipping, without a clock: kernels read the blocks of their lists, once each, and no other.

The kernels' own code runs. Only the functions of JAX by which it reads memory are wrapped, and the mask, so that each
block read and each mask evaluated is counted.
"""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import triton as plgpu

import pallas_attn as pa
from tests import oracle
from tests.oracle import positions

# Sizes by which an array can be told from all others: B, T, S, N, K, D, Dv.
BATCH, Q_LEN, KV_LEN, Q_HEADS, KV_HEADS, HEAD_DIM, VALUE_DIM = 2, 41, 75, 4, 2, 32, 16
BLOCK = 16
rng = np.random.default_rng(0)


@dataclasses.dataclass(frozen=True)
class Case:
    mask: oracle.Mask
    q_positions: np.ndarray = dataclasses.field(default_factory=lambda: positions(Q_LEN, start=KV_LEN - Q_LEN)[None])
    kv_positions: np.ndarray = dataclasses.field(default_factory=lambda: positions(KV_LEN)[None])

    def block_mask(self, wrap=lambda mask: mask) -> pa.BlockMask:
        mask = wrap(self.mask.build(pa.masks))
        return pa.BlockMask.from_mask(mask, self.q_positions, self.kv_positions, pa.BlockSizes(BLOCK, BLOCK))


LEFT = np.stack([positions(KV_LEN, left=33), positions(KV_LEN, left=7)])
HOLES = np.stack([np.where(rng.random(KV_LEN) < 0.5, -1, positions(KV_LEN)) for _ in range(BATCH * KV_HEADS)])
HOLES = HOLES.reshape(BATCH, KV_HEADS, KV_LEN).astype(np.int32)
HOLES[0, 0, :40] = -1
IDS = np.sort(rng.integers(0, 4, (BATCH, KV_LEN)), -1)
SPARSE = np.kron(rng.random((1, Q_HEADS, 3, 5)) < 0.4, np.ones((1, 1, BLOCK, BLOCK), bool))[:, :, :Q_LEN, :KV_LEN]

CASES = {
    "window and sink": Case(oracle.causal() & oracle.sliding_window(20) | oracle.sink(3)),
    "segments": Case(oracle.segments(IDS[:, KV_LEN - Q_LEN :], IDS) & oracle.causal()),
    "left padding": Case(oracle.causal(), LEFT[:, KV_LEN - Q_LEN :], LEFT),
    "window, right padding": Case(
        oracle.causal() & oracle.sliding_window(30),
        np.stack([positions(Q_LEN, start=34, right=20), positions(Q_LEN, start=34, right=1)]),
        np.stack([positions(KV_LEN, right=20), positions(KV_LEN, right=3)]),
    ),
    "empty slots per key head": Case(oracle.causal(), kv_positions=HOLES),
    "dense per query head": Case(oracle.dense(SPARSE)),
}
IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["xla", "interpreted"])


def attend(arrays, block_mask: pa.BlockMask, implementation: str) -> pa.AttentionOutput:
    options = {"interpret": True} if implementation == "interpreted" else {"implementation": implementation}
    return pa.attention(*arrays, block_mask, return_lse=True, **options)


def arrays() -> list[np.ndarray]:
    generator = np.random.default_rng(1)
    shapes = (
        (BATCH, Q_LEN, Q_HEADS, HEAD_DIM),
        (BATCH, KV_LEN, KV_HEADS, HEAD_DIM),
        (BATCH, KV_LEN, KV_HEADS, VALUE_DIM),
    )
    return [generator.standard_normal(shape).astype(np.float32) for shape in shapes]


class Counter:
    """What kernels have done since the last call of :meth:`take`."""

    def __init__(self):
        self._reads = {"key": [], "value": []}
        self._masks = 0

    def read(self, which: str, start: jax.Array) -> None:
        """Traced: the block of keys (or values) that begins at ``start`` is read."""
        jax.debug.callback(lambda x: self._reads[which].append(-(-int(x) // BLOCK)), start)

    def evaluated(self) -> None:
        """Traced: a mask is evaluated."""

        def count():
            self._masks += 1

        jax.debug.callback(count)

    def take(self) -> tuple[list[int], list[int], int]:
        """Key blocks read, value blocks read, both sorted, and how many masks were evaluated."""
        jax.effects_barrier()
        taken = sorted(self._reads["key"]), sorted(self._reads["value"]), self._masks
        self.__init__()
        return taken


@pytest.fixture
def counter(monkeypatch):
    """Counts what kernels do that are traced from now on."""
    counter = Counter()
    dynamic_slice, load = jax.lax.dynamic_slice, plgpu.load
    shapes = {(BATCH, KV_LEN, KV_HEADS, HEAD_DIM): "key", (BATCH, KV_LEN, KV_HEADS, VALUE_DIM): "value"}
    kv_rows = -(-KV_LEN // BLOCK) * BLOCK
    refs = {(BATCH, kv_rows, KV_HEADS, HEAD_DIM): "key", (BATCH, kv_rows, KV_HEADS, VALUE_DIM): "value"}

    def counting_slice(operand, start_indices, slice_sizes, **options):
        if which := shapes.get(operand.shape):
            assert slice_sizes[1] == BLOCK
            counter.read(which, start_indices[1])
        return dynamic_slice(operand, start_indices, slice_sizes, **options)

    def counting_load(ref, **options):
        if which := refs.get(ref.ref.shape):
            _, rows, *_ = ref.transforms[-1].indices
            assert rows.size == BLOCK
            counter.read(which, rows.start)
        return load(ref, **options)

    monkeypatch.setattr(jax.lax, "dynamic_slice", counting_slice)
    monkeypatch.setattr(plgpu, "load", counting_load)
    jax.clear_caches()  # of kernels that were traced without counting
    yield counter
    jax.clear_caches()


def counted(mask: pa.masks.Mask, counter: Counter) -> pa.masks.Mask:
    """The same mask, which counts how often it is evaluated."""

    @jax.tree_util.register_dataclass
    @dataclasses.dataclass(frozen=True)
    class Counted(pa.masks.Mask):
        mask: pa.masks.Mask

        def allowed(self, q, kv):
            counter.evaluated()
            return self.mask.allowed(q, kv)

        def bounds(self, q, kv):
            return self.mask.bounds(q, kv)

    return Counted(mask)


def only(block_mask: pa.BlockMask, row: tuple[int, int, int]) -> pa.BlockMask:
    """With all lists emptied but one, so that whatever is done is done for this one."""
    chosen = np.zeros(block_mask.num_full.shape, bool)
    chosen[row] = True
    lists = dataclasses.replace(
        block_mask.lists,
        num_full=jnp.where(chosen, block_mask.num_full, 0),
        num_active=jnp.where(chosen, block_mask.num_active, 0),
    )
    return dataclasses.replace(block_mask, lists=lists)


@IMPLEMENTATIONS
@pytest.mark.parametrize("name", CASES)
def test_each_list_is_read_once_and_masks_are_evaluated_for_its_partial_blocks(name, implementation, counter):
    block_mask = CASES[name].block_mask(lambda mask: counted(mask, counter))
    batch, heads, _ = block_mask.num_full.shape
    # The rows of the batch that share a list walk it each. So do the query heads in Triton; XLA takes them together.
    walks = BATCH // batch * (Q_HEADS // heads if implementation == "interpreted" else 1)
    inputs = arrays()
    counter.take()
    for row in np.ndindex(block_mask.num_full.shape):
        num_full, num_active = int(block_mask.num_full[row]), int(block_mask.num_active[row])
        attend(inputs, only(block_mask, row), implementation)
        keys, values, masks = counter.take()
        expected = sorted(block_mask.indices[row][:num_active].tolist() * walks)
        assert keys == expected, f"blocks of keys that were read for list {row}"
        assert values == expected, f"blocks of values that were read for list {row}"
        assert masks == (num_active - num_full) * walks, f"masks that were evaluated for list {row}"

    attend(inputs, block_mask, implementation)
    keys, _, masks = counter.take()
    assert len(keys) == int(block_mask.num_active.sum()) * walks
    assert len(keys) - masks == int(block_mask.num_full.sum()) * walks


def test_the_cases_have_lists_of_every_kind():
    """Full and partial blocks, empty lists, lists that rows or heads share and that they do not."""
    seen = collections.Counter()
    for case in CASES.values():
        block_mask = case.block_mask()
        full, active = np.asarray(block_mask.num_full), np.asarray(block_mask.num_active)
        seen["full and partial"] += bool(((full > 0) & (active > full)).any())
        seen["neither all nor nothing"] += bool(((active > 0) & (active < block_mask.grid[1])).any())
        seen["empty"] += bool((active == 0).any())
        seen[f"rows {full.shape[0]}"] += 1
        seen[f"heads {full.shape[1]}"] += 1
    assert all(seen[kind] for kind in ("full and partial", "neither all nor nothing", "empty"))
    assert all(seen[f"rows {rows}"] for rows in (1, BATCH))
    assert all(seen[f"heads {heads}"] for heads in (1, KV_HEADS, Q_HEADS))


@pytest.mark.parametrize(
    "implementation",
    ["xla", "interpreted", pytest.param("triton", marks=pytest.mark.gpu)],
)
@pytest.mark.parametrize("name", ["window, right padding", "dense per query head"])
def test_poison_outside_of_one_list_does_not_reach_its_queries(name, implementation):
    """For each query block of each head: all other KV blocks hold NaN, and not one bit of its output changes."""
    block_mask = CASES[name].block_mask()
    program = jax.jit(lambda *inputs: attend(inputs, block_mask, implementation))
    query, key, value = arrays()
    expected = program(query, key, value)
    classes = np.asarray(block_mask.bitmap())
    classes = np.broadcast_to(classes, (BATCH, *classes.shape[1:]))
    classes = np.repeat(classes, Q_HEADS // classes.shape[1], 1)
    poisoned_lists = 0
    for n, i in np.ndindex(Q_HEADS, block_mask.grid[0]):
        unread = np.repeat(classes[:, n, i] == 0, BLOCK, 1)[:, :KV_LEN]
        poisoned_lists += unread.any(1).sum()
        inputs = [x.copy() for x in (key, value)]
        for x in inputs:
            x[:, :, n // (Q_HEADS // KV_HEADS)][unread] = np.nan
        actual = program(query, *inputs)
        rows = slice(i * BLOCK, (i + 1) * BLOCK)
        where = f"head {n}, query block {i}"
        np.testing.assert_array_equal(actual.out[:, rows, n], expected.out[:, rows, n], where)
        np.testing.assert_array_equal(actual.lse[:, n, rows], expected.lse[:, n, rows], where)
    assert poisoned_lists >= BATCH * Q_HEADS
