"""What attention() computes: one suite of behaviour that every implementation runs.

To add a case, add a line to ``CASES``. Padded queries and empty slots hold NaN in all of them.
"""

import dataclasses
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given

import pallas_attn as pa
from tests import oracle, strategies, tolerances
from tests.attention_check import (
    EVERY_IMPLEMENTATION,
    KERNELS,
    NO_GPU,
    B,
    Case,
    K,
    N,
    S,
    T,
    check,
    options,
)
from tests.oracle import positions

rng = np.random.default_rng(0)


def dense(*shape: int, density: float = 0.5) -> oracle.Mask:
    return oracle.dense(rng.random(shape) < density)


def segments(batch: int, longest: int = 9) -> oracle.Mask:
    """Sorted document numbers; queries are the last T of the S tokens."""
    ids = np.sort(rng.integers(0, S // longest, (batch, S)), -1)
    return oracle.segments(ids[:, S - T :], ids)


LAST = positions(T, start=S - T)[None]  # queries at the end of the keys
LEFT = np.stack([positions(S, left=9), positions(S, left=20)])
RIGHT = np.stack([positions(S, right=9), positions(S, right=30)])
BOTH = np.stack([positions(S, left=9, right=9), positions(S, left=3, right=17)])
EMPTY_ROW = np.stack([positions(S), positions(S, left=S)])
Q_BOTH = np.stack([positions(T, left=3, right=4), positions(T, right=13)])
HOLES = np.stack([np.where(rng.random(S) < 0.3, -1, rng.permutation(S)) for _ in range(B * K)]).reshape(B, K, S)
HOLES = HOLES.astype(np.int32)

# Each thing once, at small odd sizes. What is likely to fail only together with it is in SLOW_CASES.
CASES = {
    # Lengths, with heads and head sizes.
    "1x1": Case(q_len=1, kv_len=1),
    "1x37, one key head, D 64": Case(oracle.causal(), np.array([[30]], np.int32), q_len=1, kv_heads=1, head_dim=64),
    "63x63, as many key heads, D 80": Case(oracle.causal(), batch=1, q_len=63, kv_len=63, kv_heads=4, head_dim=80),
    "113x203, groups of three, D 96": Case(
        oracle.causal(), batch=1, q_len=113, kv_len=203, q_heads=6, head_dim=96, block_sizes=(32, 64), dtype="bfloat16"
    ),
    "255x1023": Case(
        oracle.causal() & oracle.sliding_window(300),
        positions(255, start=768)[None],
        **{"batch": 1, "q_len": 255, "kv_len": 1023, "q_heads": 2, "kv_heads": 1, "block_sizes": (64, 128)},
    ),
    "D 128, Dv 80": Case(oracle.causal(), LAST, head_dim=128, value_dim=80, dtype="float16"),
    "D 256": Case(oracle.causal(), LAST, head_dim=256),
    "D 5, Dv 1, one head": Case(oracle.causal(), LAST, q_heads=1, kv_heads=1, head_dim=5, value_dim=1),
    # Masks.
    "window": Case(oracle.sliding_window(7), LAST),
    "window, left and right": Case(oracle.sliding_window(4, 9), LAST),
    "prefix": Case(oracle.prefix(np.array([17, 3])) | oracle.causal()),
    "sink": Case(oracle.sink(3) | oracle.sliding_window(5), LAST),
    "chunked": Case(oracle.chunked(10) & oracle.causal(), LAST),
    "segments": Case(segments(B) & oracle.causal(), LAST),
    "dense": Case(dense(B, 1, T, S)),
    "dense, per key head": Case(dense(B, K, T, S)),
    "dense, per query head": Case(dense(1, N, T, S)),
    "not": Case(~oracle.sliding_window(7) & oracle.causal(), LAST),
    "operands of every kind": Case(~(dense(1, K, T, 1) & dense(B, N, 1, S)) & dense(1, 1, T, S) | segments(1), LAST),
    "nothing": Case(~oracle.full()),
    "queries before the keys": Case(oracle.causal(), kv_positions=positions(S, start=8)[None]),
    # Padding and positions.
    "left padding, bfloat16": Case(oracle.causal(), LEFT[:, S - T :], LEFT, dtype="bfloat16"),
    "right padding, float16": Case(oracle.causal(), RIGHT[:, :T], RIGHT, dtype="float16"),
    "padding on both sides": Case(oracle.causal(), Q_BOTH, BOTH),
    "rows of nothing but padding": Case(oracle.full(), np.stack([positions(T, left=T), positions(T)]), EMPTY_ROW),
    "negative positions": Case(oracle.sliding_window(9), *(np.arange(x, dtype=np.int32)[None] - 12 for x in (T, S))),
    "permuted keys": Case(oracle.sliding_window(8), LAST, rng.permutation(S).astype(np.int32)[None]),
    "key positions per head": Case(oracle.causal(), LAST, HOLES),
    "key positions per head, operands of every kind": Case(
        dense(1, 1, T, S) & dense(1, K, T, S) | oracle.prefix(np.array([9, 5])) & dense(B, N, 1, S), LAST, HOLES
    ),
    # Scale and sizes.
    "scale 0": Case(oracle.causal(), scale=0.0),
    "negative scale": Case(oracle.causal(), LAST, LEFT, scale=-0.7),
    "logits of 1e4": Case(oracle.causal(), LAST, query_size=1e4),
    "logits of 1e4, float16": Case(oracle.causal(), LAST, query_size=1e4, dtype="float16"),
    # Block sizes.
    "long query blocks": Case(oracle.causal(), LAST, LEFT, block_sizes=(32, 16)),
    "blocks longer than the sequence": Case(oracle.causal(), LAST, LEFT, block_sizes=(64, 128)),
    "default block sizes": Case(oracle.causal(), LAST, LEFT, block_sizes=None),
}

SLOW_CASES = {
    "1x1, not seen": Case(~oracle.causal(), q_len=1, kv_len=1),
    "21x1": Case(kv_len=1),
    "window, right": Case(oracle.sliding_window(0, 5)),
    "segments, shared by the batch": Case(segments(1), LAST),
    "dense, shared by the batch": Case(dense(1, 1, T, S, density=0.1)),
    "dense, one row of keys": Case(dense(B, 1, 1, S)),
    "dense, one column of queries": Case(dense(B, 1, T, 1)),
    "far positions": Case(
        oracle.sliding_window(9, 2), *(2**31 - 40 + np.arange(x, dtype=np.int32)[None] for x in (T, S))
    ),
    "key positions per head, shared by the batch": Case(oracle.sliding_window(20), LAST, HOLES[:1]),
    "key positions per head, mask per query head": Case(oracle.causal() & dense(B, N, T, S), Q_BOTH + 10, HOLES),
    "key positions for one head": Case(oracle.causal(), LAST, HOLES[:, :1]),
    "scale, an int": Case(oracle.causal(), scale=2),
    "logits of 1e4, negative scale": Case(oracle.causal(), LAST, query_size=1e4, scale=-0.2),
    "logits of 1e4, bfloat16": Case(oracle.causal(), LAST, LEFT, query_size=1e4, dtype="bfloat16"),
    "long key blocks": Case(oracle.causal(), LAST, LEFT, block_sizes=(16, 32)),
}

LENGTHS = [(1, 1), (1, 203), (63, 63), (113, 203), (255, 1023)]
HEAD_SIZES = [32, 64, 80, 96, 128, 256]
DTYPES = ["float32", "bfloat16", "float16"]


@EVERY_IMPLEMENTATION
@pytest.mark.parametrize("name", [*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW_CASES)])
def test_equals_the_oracle(name, implementation):
    check((CASES | SLOW_CASES)[name], implementation, seed=zlib.crc32(name.encode()))


@pytest.mark.slow
@EVERY_IMPLEMENTATION
@pytest.mark.parametrize("head_dim", HEAD_SIZES)
@pytest.mark.parametrize(("q_len", "kv_len"), LENGTHS)
def test_equals_the_oracle_at_every_length_and_head_size(q_len, kv_len, head_dim, implementation):
    """Dtypes, value sizes, heads and block sizes take turns."""
    turn = LENGTHS.index((q_len, kv_len)) + HEAD_SIZES.index(head_dim)
    q_heads, kv_heads = [(2, 1), (4, 2), (3, 3)][turn % 3 if kv_len < 1000 else 0]
    case = Case(
        oracle.causal(),
        positions(q_len, start=kv_len - q_len, left=q_len // 5)[None],
        positions(kv_len, right=kv_len // 7)[None],
        batch=1,
        q_len=q_len,
        kv_len=kv_len,
        q_heads=q_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        value_dim=[None, 64, None, 48][turn % 4],
        dtype=DTYPES[turn % 3],
        block_sizes=[(32, 32), (64, 32), (16, 64), (64, 128)][turn % 4],
    )
    check(case, implementation, seed=turn)


@pytest.mark.slow
@EVERY_IMPLEMENTATION
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["prefix", "sink", "chunked", "segments", "dense, per query head", "permuted keys"])
def test_masks_equal_the_oracle_in_half_precision(name, dtype, implementation):
    check(dataclasses.replace(CASES[name], dtype=dtype), implementation)


@pytest.mark.slow
@EVERY_IMPLEMENTATION
def test_random_masks_and_positions_equal_the_oracle(implementation):
    @strategies.repeatable(max_examples=40, phases=[Phase.generate])
    @given(strategies.masks(B, N, K, T, S), strategies.q_positions(B, T), strategies.kv_positions(B, K, S))
    def check_one(mask, q_positions, kv_positions):
        check(Case(mask, q_positions, kv_positions), implementation)

    check_one()


# What surrounds the numbers: arguments, jit, repeats.

SMALL = Case(oracle.causal(), LAST, LEFT)


def numbers(case: Case, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Query, key and value without NaN."""
    return tuple(np.nan_to_num(x, nan=0.5) for x in case.arrays(seed))


def assert_same_bits(actual, expected, message: str = "") -> None:
    """Equal as integers: NaN equals itself, 0 and -0 differ."""
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, b = (np.asarray(x) for x in (a, b))
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a.view(f"u{a.itemsize}"), b.view(f"u{b.itemsize}"), message)


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
            # Another program, so not the same bits.
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
def test_a_row_does_not_depend_on_its_neighbours(implementation):
    """Bit for bit: what other rows of the batch hold, and whether they hold anything, is not this row's business."""
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
    key[1] = value[1] = query[1] = np.nan
    actual = call(query, key, value, other)
    assert_same_bits(actual.out[0], expected.out[0])
    assert_same_bits(actual.lse[0], expected.lse[0])


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_blocks_of_any_size(implementation):
    for block_sizes in ((7, 11), (1, 1), (100, 5)):
        check(dataclasses.replace(SMALL, block_sizes=block_sizes), implementation)


# Poison: bits of what is not there reach nothing.


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
    key[:, hidden:] *= -1e6
    value[:, hidden:] = 3e38
    actual = program(query, key, value)
    assert_same_bits(actual.out[:, :5], expected.out[:, :5])
    assert_same_bits(actual.lse[:, :, :5], expected.lse[:, :, :5])
    assert not np.array_equal(actual.out[:, 5:], expected.out[:, 5:])


# Derivatives.


TINY = Case(
    oracle.causal() & oracle.sliding_window(4),
    np.array([[2, 3, -1], [0, 6, 40]], np.int32),  # the last query of row 1 sees nothing
    np.array([[-1, 1, 2, 3], [5, 6, -1, 0]], np.int32),
    **{"q_len": 3, "kv_len": 4, "q_heads": 2, "kv_heads": 1, "head_dim": 3, "value_dim": 2},
)


def test_the_reference_has_the_derivatives_of_the_oracle():
    arrays = TINY.arrays(0)
    generator = np.random.default_rng(1)
    seen = oracle.visible(TINY.mask, *TINY.geometry, TINY.batch, TINY.q_heads)
    out_weights = generator.standard_normal((TINY.batch, TINY.q_len, TINY.q_heads, TINY.value_dim))
    lse_weights = generator.standard_normal((TINY.batch, TINY.q_heads, TINY.q_len)) * seen.any(-1)

    def loss_of_the_oracle(*arrays):
        out, lse = oracle.attention(*arrays, seen, 0.6)
        return (out * out_weights).sum() + (np.where(seen.any(-1), lse, 0) * lse_weights).sum()

    def loss(*arrays):
        out, lse, _ = pa.attention(
            *(*arrays, TINY.mask.build(pa.masks)),
            q_positions=TINY.q_positions,
            kv_positions=TINY.kv_positions,
            scale=0.6,
            return_lse=True,
            implementation="reference",
        )
        lse = jnp.where(seen.any(-1), lse, 0)
        return (out * out_weights.astype(np.float32)).sum() + (lse * lse_weights.astype(np.float32)).sum()

    step = 1e-5
    gradients = jax.jit(jax.grad(loss, (0, 1, 2)))(*arrays)
    for which, gradient in enumerate(gradients):
        missing = np.isnan(arrays[which])
        assert (np.asarray(gradient)[missing] == 0).all(), "what is not there has derivative 0, whatever it holds"
        expected = np.zeros(gradient.shape)
        for at in zip(*np.nonzero(~missing), strict=True):
            values = []
            for sign in (1, -1):
                moved = [x.astype(np.float64) for x in arrays]
                moved[which][at] += sign * step
                values.append(loss_of_the_oracle(*moved))
            expected[at] = (values[0] - values[1]) / (2 * step)
        assert np.abs(expected).max() > 0.1
        np.testing.assert_allclose(
            gradient, expected, rtol=0, atol=tolerances.ATTENTION_GRADIENT * np.abs(expected).max()
        )


def test_the_reference_has_finite_derivatives_where_logits_are_large():
    case = Case(oracle.causal(), LAST, LEFT, query_size=1e4)
    query, key, value = case.arrays(0)

    def loss(query, key, value):
        out = pa.attention(
            query, key, value, pa.masks.causal(), q_positions=LAST, kv_positions=LEFT, implementation="reference"
        )
        return (out**2).sum()

    for gradient in jax.jit(jax.grad(loss, (0, 1, 2)))(query, key, value):
        assert np.isfinite(gradient).all()
        assert np.abs(gradient).max() > 0


@KERNELS
def test_a_kernel_has_first_derivatives_only_and_says_so(implementation):
    query, key, value = numbers(SMALL)

    def loss(query):
        return (pa.attention(query, key, value, **options(implementation)) ** 2).sum()

    name = "triton" if implementation == "interpreted" else implementation
    message = f"implementation='{name}' has first derivatives only; for higher ones pass implementation='reference'"
    with pytest.raises(NotImplementedError, match=message):
        jax.grad(lambda x: jax.grad(loss)(x).sum())(query)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(loss, (query,), (query,))


@KERNELS
def test_a_kernel_may_stand_in_a_function_that_is_differentiated_by_something_else(implementation):
    """A frozen encoder, or a step that only evaluates: nothing asks for the kernel's derivative."""
    query, key, value = numbers(SMALL)

    @jax.jit
    @jax.grad
    def gradient(x):
        frozen = pa.attention(jax.lax.stop_gradient(x) * query, key, value, **options(implementation))
        return (x * frozen).sum()

    expected = pa.attention(query, key, value, implementation="reference").sum()
    np.testing.assert_allclose(gradient(jnp.float32(1)), expected, rtol=tolerances.ATTENTION_GRADIENT)


# The choice of an implementation.


def test_implementations_are_told_best_first():
    assert list(pa.implementations()) == ["triton", "xla", "reference"]
    assert pa.implementations()["xla"] is None
    assert pa.implementations()["reference"] is None


@pytest.mark.skipif(NO_GPU is None, reason="says why there are no compiled kernels, and here they are")
def test_without_a_gpu_the_reason_says_so_and_xla_serves():
    assert "NVIDIA GPU" in pa.implementations()["triton"]
    query, key, value = numbers(SMALL)
    assert_same_bits(
        pa.attention(query, key, value, pa.masks.causal()),
        pa.attention(query, key, value, pa.masks.causal(), implementation="xla"),
    )


@pytest.mark.gpu
def test_with_a_gpu_the_compiled_kernels_serve():
    query, key, value = numbers(SMALL)
    assert_same_bits(
        pa.attention(query, key, value, pa.masks.causal()),
        pa.attention(query, key, value, pa.masks.causal(), implementation="triton"),
    )
