"""Decode: few queries over a long buffer; programs share the live blocks of the whole batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_attn as pa
from tests import oracle
from tests.attention_check import EVERY_IMPLEMENTATION, KERNELS, Case, assert_error, check, options

B, S = 3, 75
rng = np.random.default_rng(0)


def live(*lengths: int, capacity: int = S) -> np.ndarray:
    """Positions of buffer rows that are filled from the left."""
    slots = np.arange(capacity, dtype=np.int32)[None]
    return np.where(slots < np.array(lengths)[:, None], slots, -1).astype(np.int32)


def last(*lengths: int, q_len: int = 1) -> np.ndarray:
    """Positions of the last queries of these rows; -1 for missing ones."""
    return np.maximum(np.array(lengths, np.int32)[:, None] - q_len + np.arange(q_len, dtype=np.int32), -1)


RAGGED = (S, 1, 40)
HOLES = np.where(rng.random((B, S)) < 0.4, -1, rng.permutation(S)).astype(np.int32)
HOLES_PER_HEAD = np.where(rng.random((B, 2, S)) < 0.4, -1, np.arange(S)).astype(np.int32)


def decode(mask: oracle.Mask | None = None, q_len: int = 1, lengths=RAGGED, **changes) -> Case:
    fields = {"q_positions": last(*lengths, q_len=q_len), "kv_positions": live(*lengths), "batch": B, "kv_len": S}
    return Case(mask or oracle.causal(), q_len=q_len, **{**fields, **changes})


CASES = {
    "one query": decode(),
    "lengths from none to all": decode(lengths=(0, S, 17)),
    "nothing at all": decode(lengths=(0, 0, 0)),
    "as many key heads, D 64": decode(kv_heads=4, head_dim=64),
    "one key head, groups of 16, D 128": decode(q_heads=16, kv_heads=1, head_dim=128, dtype="bfloat16"),
    "D 256, Dv 128": decode(head_dim=256, value_dim=128, dtype="float16"),
    "D 80": decode(head_dim=80),
    "groups of three, five queries": decode(q_len=5, q_heads=6),
    "sixteen queries": decode(q_len=16, lengths=(S, 16, 40)),
    "window, two queries": decode(oracle.causal() & oracle.sliding_window(11), q_len=2),
    "holes and keys in any order": decode(kv_positions=HOLES, q_positions=last(S, 30, 50)),
    "holes per key head": decode(kv_positions=HOLES_PER_HEAD),
    "mask per query head": decode(oracle.dense(rng.random((B, 4, 3, S)) < 0.3), q_len=3),
    "one list for all rows": decode(kv_positions=live(50), q_positions=last(50)),
    "bfloat16": decode(dtype="bfloat16"),
    "default block sizes": decode(block_sizes=None),
    "logits of 1e4": decode(query_size=1e4),
}


@EVERY_IMPLEMENTATION
@pytest.mark.parametrize("name", CASES)
def test_equals_the_oracle(name, implementation):
    check(CASES[name], implementation)


TREE = np.array([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]], bool)
SINKS = np.array([0.5, -3.0, 2.0, 8.0])


@KERNELS
@pytest.mark.parametrize("with_sinks", [False, True])
def test_scores_sinks_and_trees(implementation, with_sinks):
    """A tree of four drafts in the last slots, with a softcap, a bias and sinks; one row is padding."""
    q_len, lengths = 4, np.array([S, 50])
    q_positions = (lengths[:, None] - 4 + np.array([[0, 1, 1, 2]])).astype(np.int32)
    q_positions[1] = -1
    kv_positions = np.tile(np.maximum(np.arange(S) - 3, 0)[None], (2, 1)).astype(np.int32)
    kv_positions[0, 5:9] = -1
    query, key, value = (rng.normal(size=(2, n, h, 32)) for n, h in ((q_len, 4), (S, 2), (S, 2)))
    key[0, 5:9] = value[0, 5:9] = query[1] = np.nan
    bias = rng.normal(size=(1, 4, 1, S))
    seen = np.concatenate([np.ones((q_len, S - q_len), bool), TREE], 1)
    seen = oracle.visible(oracle.dense(np.broadcast_to(seen, (1, 1, q_len, S))), q_positions, kv_positions, 2, 4)
    arguments = {
        "scores": [oracle.softcap(2.0), oracle.bias(bias)],
        "sinks": SINKS if with_sinks else None,
        "pairs": oracle.Pairs.of(2, 4, q_positions, kv_positions),
    }
    arrays = [x.astype(np.float32) for x in (query, key, value)]
    expected = oracle.attention(*arrays, seen, 32**-0.5, **arguments)
    plain = oracle.plain_attention(*arrays, seen, 32**-0.5, **arguments)
    actual = pa.attention(
        *arrays,
        pa.masks.tree(TREE),
        q_positions=q_positions,
        kv_positions=kv_positions,
        scores=[pa.scores.softcap(2.0), pa.scores.bias(bias.astype(np.float32))],
        sinks=jnp.asarray(SINKS, jnp.float32) if with_sinks else None,
        return_lse=True,
        block_sizes=pa.BlockSizes(16, 16, shares=4),
        **options(implementation),
    )
    real = np.isfinite(expected[1])
    assert real[0].all()
    assert not real[1].any()
    assert (np.asarray(actual.lse)[~real] == -np.inf).all()
    assert_error(np.asarray(actual.out, np.float64), expected[0], plain[0], "float32", "out")
    lse = np.asarray(actual.lse, np.float64)[real]
    assert_error(lse, expected[1][real], plain[1][real], "float32", "lse")


def run(case: Case, sizes: pa.BlockSizes, implementation: str, rows=slice(None)) -> np.ndarray:
    query, key, value = (jnp.asarray(x[rows]) for x in case.arrays(0))
    return np.asarray(
        pa.attention(
            query,
            key,
            value,
            case.mask.build(pa.masks),
            q_positions=jnp.asarray(case.q_positions[rows]),
            kv_positions=jnp.asarray(case.kv_positions[rows]),
            block_sizes=sizes,
            **options(implementation),
        )
    )


@KERNELS
@pytest.mark.parametrize("shares", [1, 2, 5, 1000])
def test_splitting_changes_nothing_beyond_rounding(implementation, shares):
    case = decode(q_len=2)
    whole = run(case, pa.BlockSizes(16, 16, shares=1), implementation)
    split = run(case, pa.BlockSizes(16, 16, shares=shares), implementation)
    assert_error(split, whole, whole, "float32", "out")


@KERNELS
@pytest.mark.parametrize("heads", [{}, {"kv_heads": 1}, {"q_heads": 16, "kv_heads": 16}])
def test_with_a_fixed_chunk_a_row_does_not_depend_on_the_others(implementation, heads):
    """Bit for bit, whatever the other rows contain, at any index of the batch, and alone."""
    sizes, row = pa.BlockSizes(16, 16, chunk=2), slice(0, 1)
    expected = run(decode(lengths=(S, 3, 40), **heads), sizes, implementation)
    for others in ((S, 60), (0, 0), (17, 33), (1, S)):
        actual = run(decode(lengths=(S, *others), **heads), sizes, implementation)
        np.testing.assert_array_equal(actual[row], expected[row])
    for order in ([1, 2, 0], [2, 1, 0], [2, 0], [1, 1, 0, 0, 2], [0]):
        actual = run(decode(lengths=(S, 3, 40), **heads), sizes, implementation, order)
        np.testing.assert_array_equal(actual, expected[order])


@KERNELS
def test_blocks_that_are_not_listed_are_not_used(implementation):
    """NaN in every key and value of blocks without a live key, and in the empty slots of the others."""
    case = decode(kv_positions=np.where((np.arange(S) // 16 % 2 == 0)[None], live(*RAGGED), -1))
    assert np.isnan(case.arrays(0)[1]).mean() > 0.4
    assert np.isfinite(run(case, pa.BlockSizes(16, 16), implementation)).all()


def test_derivatives_pass_through_decode():
    """The backward pass is the general one: gradients equal the reference's."""
    case = decode(q_len=3)
    query, key, value = (jnp.nan_to_num(jnp.asarray(x)) for x in case.arrays(0))

    def loss(implementation, *arrays):
        out = pa.attention(
            *arrays,
            pa.masks.causal(),
            q_positions=jnp.asarray(case.q_positions),
            kv_positions=jnp.asarray(case.kv_positions),
            implementation=implementation,
            block_sizes=pa.BlockSizes(16, 16),
        )
        return jnp.sum(jnp.sin(out))

    for mine, other in zip(
        *(
            jax.jit(jax.grad(loss, (1, 2, 3)), static_argnums=0)(name, query, key, value)
            for name in ("xla", "reference")
        ),
        strict=True,
    ):
        assert_error(np.asarray(mine), np.asarray(other), np.asarray(other), "float32", "gradient")


@pytest.mark.parametrize("keys_are_shared", [False, True])
def test_vmap_equals_a_loop(keys_are_shared):
    """The schedule counts the rows of the whole batch, so a new axis needs a new schedule."""
    size, axis = 4, None if keys_are_shared else 0
    cases = [decode(q_len=2, lengths=lengths) for lengths in ((S, 1, 40), (2, 70, 0), (0, 0, 9), (30, 30, 30))]
    query, key, value = (jnp.nan_to_num(jnp.stack(x)) for x in zip(*(case.arrays(0) for case in cases), strict=True))
    kv_positions = jnp.stack([jnp.asarray(case.kv_positions) for case in cases])
    q_positions = jnp.stack([jnp.asarray(case.q_positions) for case in cases])
    if keys_are_shared:
        key, value, kv_positions = key[0], value[0], kv_positions[0]

    def attend(query, key, value, at, kv):
        sizes = pa.BlockSizes(2, 16)
        mask = pa.masks.causal()
        return pa.attention(
            query, key, value, mask, q_positions=at, kv_positions=kv, implementation="xla", block_sizes=sizes
        )

    actual = jax.jit(jax.vmap(attend, (0, axis, axis, 0, axis)))(query, key, value, q_positions, kv_positions)
    for i in range(size):
        k, v, kv = (x if axis is None else x[i] for x in (key, value, kv_positions))
        expected = np.asarray(attend(query[i], k, v, q_positions[i], kv))
        assert_error(np.asarray(actual[i]), expected, expected, "float32", "out")


def test_lengths_compile_nothing_anew(compilations):
    call = jax.jit(
        lambda q, k, v, at, kv: pa.attention(
            q, k, v, pa.masks.causal(), q_positions=at, kv_positions=kv, implementation="xla"
        )
    )
    case = decode()
    arrays = [jnp.nan_to_num(jnp.asarray(x)) for x in case.arrays(0)]
    for lengths in ((S, 1, 40), (0, 0, 3), (9, S, S)):
        call(*arrays, jnp.asarray(last(*lengths)), jnp.asarray(live(*lengths)))
    assert call._cache_size() == 1
