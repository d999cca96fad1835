"""The backward pass: one suite of behaviour that every implementation runs.

To add a case, add a line to ``CASES``. Missing queries and keys hold NaN in all of them, as do the gradients of missing
outputs, and the gradient of lse is never 0.
"""

import contextlib
import dataclasses
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, example, given
from jax.test_util import check_grads

import pallas_attn as pa
from bench.machine_code import lower_for_cuda
from pallas_attn.kernels import triton
from tests import oracle, strategies, tolerances
from tests.gradient_check import Case, assert_gradient, backward_blocks, check, implementations
from tests.oracle import positions
from tests.test_attention import (
    BOTH,
    EMPTY_ROW,
    HOLES,
    LAST,
    LEFT,
    Q_BOTH,
    RIGHT,
    B,
    K,
    N,
    S,
    T,
    assert_same_bits,
    dense,
    options,
    segments,
)

KERNELS = pytest.mark.parametrize("implementation", implementations("xla", "interpreted"))
# Of JAX' transformations, which see kernels as black boxes.
MOSTLY_XLA = pytest.mark.parametrize("implementation", implementations("xla", slow=("interpreted",)))
EVERY_IMPLEMENTATION = pytest.mark.parametrize("implementation", implementations("reference", "xla", "interpreted"))
rng = np.random.default_rng(4)


def normal(*shape: int, dtype=np.float32) -> np.ndarray:
    return rng.standard_normal(shape).astype(dtype)


# Each thing once, at small odd sizes.
CASES = {
    "1x1": Case(q_len=1, kv_len=1),
    "63x63, as many key heads, D 80": Case(oracle.causal(), batch=1, q_len=63, kv_len=63, q_heads=2, head_dim=80),
    "113x203, groups of three, D 96, bfloat16": Case(
        oracle.causal(), batch=1, q_len=113, kv_len=203, q_heads=6, head_dim=96, block_sizes=(32, 64), dtype="bfloat16"
    ),
    "one key head, D 64": Case(oracle.causal(), LAST, kv_heads=1, head_dim=64),
    "D 192, Dv 128, float16": Case(oracle.causal(), LAST, batch=1, head_dim=192, value_dim=128, dtype="float16"),
    "window": Case(oracle.sliding_window(7, 2), LAST),
    "prefix": Case(oracle.prefix(np.array([17, 3])) | oracle.causal()),
    "sink": Case(oracle.sink(3) | oracle.sliding_window(5), LAST),
    "chunked": Case(oracle.chunked(10) & oracle.causal(), LAST),
    "segments": Case(segments(B) & oracle.causal(), LAST),
    "dense, per query head": Case(dense(B, N, T, S)),
    "operands of every kind": Case(~(dense(1, K, T, 1) & dense(B, N, 1, S)) & dense(1, 1, T, S) | segments(1), LAST),
    "nothing": Case(~oracle.full()),
    "left padding, bfloat16": Case(oracle.causal(), LEFT[:, S - T :], LEFT, dtype="bfloat16"),
    "right padding, float16": Case(oracle.causal(), RIGHT[:, :T], RIGHT, dtype="float16"),
    "missing queries in full blocks": Case(oracle.full(), Q_BOTH),
    "rows of nothing but padding": Case(oracle.full(), np.stack([positions(T, left=T), positions(T)]), EMPTY_ROW),
    "key positions per head": Case(oracle.causal(), LAST, HOLES),
    "negative scale": Case(oracle.causal(), LAST, LEFT, scale=-0.7),
    "default block sizes": Case(oracle.causal(), LAST, LEFT, block_sizes=None),
}

SLOW_CASES = {
    "1x203": Case(oracle.causal(), np.array([[150]], np.int32), q_len=1, kv_len=203),
    "113x203, D 80, float16": Case(
        oracle.causal(), positions(113, start=90)[None], batch=1, q_len=113, kv_len=203, head_dim=80, dtype="float16"
    ),
    "113x203, default block sizes": Case(
        oracle.causal(), batch=1, q_len=113, kv_len=203, head_dim=64, block_sizes=None, dtype="bfloat16"
    ),
    "D 256": Case(oracle.causal(), LAST, batch=1, head_dim=256),
    "D 5, Dv 1, one head": Case(oracle.causal(), LAST, q_heads=1, kv_heads=1, head_dim=5, value_dim=1),
    "dense, per key head": Case(dense(B, K, T, S)),
    "dense, shared by the batch": Case(dense(1, 1, T, S, density=0.1)),
    "queries before the keys": Case(oracle.causal(), kv_positions=positions(S, start=8)[None]),
    "permuted keys": Case(oracle.sliding_window(8), LAST, rng.permutation(S).astype(np.int32)[None]),
    "key positions per head, mask per query head": Case(oracle.causal() & dense(B, N, T, S), Q_BOTH + 10, HOLES),
    "key positions for one head": Case(oracle.causal(), LAST, HOLES[:, :1]),
    "scale 0": Case(oracle.causal(), scale=0.0),
    "logits of 1e4": Case(oracle.causal(), LAST, query_size=1e4),
    "blocks longer than the sequence": Case(oracle.causal(), LAST, LEFT, block_sizes=(64, 128)),
    "long query blocks": Case(oracle.causal(), LAST, LEFT, block_sizes=(32, 16)),
    "long key blocks": Case(oracle.causal(), LAST, LEFT, block_sizes=(16, 32)),
    "segments, bfloat16": Case(segments(B) & oracle.causal(), LAST, dtype="bfloat16"),
    "dense, per query head, float16": Case(dense(B, N, T, S), dtype="float16"),
    "key positions per head, bfloat16": Case(oracle.causal(), LAST, HOLES, dtype="bfloat16"),
}

# The interpreter is slow: these show most of what may go wrong in it. The slow suite runs all.
ALSO_INTERPRETED = {
    "1x1",
    "63x63, as many key heads, D 80",
    "dense, per query head",
    "left padding, bfloat16",
    "missing queries in full blocks",
    "rows of nothing but padding",
    "key positions per head",
    "default block sizes",
}
ALSO_REFERENCE = {"one key head, D 64", "missing queries in full blocks", "key positions per head", "nothing"}


@pytest.mark.parametrize(
    ("name", "implementation"),
    [
        pytest.param(name, *parameter.values, marks=parameter.marks)
        for name in CASES | SLOW_CASES
        for how, quick in (("xla", CASES.keys()), ("interpreted", ALSO_INTERPRETED), ("reference", ALSO_REFERENCE))
        for parameter in implementations(*([how] if name in quick else []), slow=() if name in quick else (how,))
    ],
)
def test_equals_the_oracle(name, implementation):
    check((CASES | SLOW_CASES)[name], implementation, seed=zlib.crc32(name.encode()))


@pytest.mark.slow
@pytest.mark.parametrize("implementation", implementations("reference", "xla", "interpreted"))
@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128])
@pytest.mark.parametrize(("q_len", "kv_len"), [(1, 203), (63, 63), (113, 203)])
def test_equals_the_oracle_at_every_length_and_head_size(q_len, kv_len, head_dim, implementation):
    """Dtypes, value sizes, heads and block sizes take turns."""
    turn = [1, 63, 113].index(q_len) + [32, 64, 80, 96, 128].index(head_dim)
    q_heads, kv_heads = [(2, 1), (4, 2), (3, 3)][turn % 3]
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
        dtype=["float32", "bfloat16", "float16"][turn % 3],
        block_sizes=[(32, 32), (64, 32), (16, 64)][turn % 3],
    )
    check(case, implementation, seed=turn)


# The oracle itself.

TINY = {"batch": 2, "q_len": 3, "kv_len": 4, "q_heads": 2, "kv_heads": 1, "head_dim": 3, "value_dim": 2, "scale": 0.6}
TINY_CASE = Case(
    oracle.causal() & oracle.sliding_window(4),
    np.array([[2, 3, -1], [0, 6, 40]], np.int32),  # the last query of row 1 sees nothing
    np.array([[-1, 1, 2, 3], [5, 6, -1, 0]], np.int32),
    **TINY,
)
TINY_SCORES = {
    "none": (),
    "softcap and alibi": (oracle.softcap(2.0), oracle.alibi(np.array([0.2, 0.4], np.float32))),
    "alibi and softcap": (oracle.alibi(np.array([0.2, 0.4], np.float32)), oracle.softcap(2.0)),
    "bias": (oracle.bias(normal(1, 2, 1, 4)), oracle.softcap(2.0), oracle.bias(normal(2, 1, 3, 4))),
    "custom": (oracle.factor(normal(2)), oracle.saturated(np.float32(1.5)), oracle.buckets(normal(2, oracle.BUCKETS))),
}


@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize("name", TINY_SCORES)
def test_the_gradients_of_the_oracle_are_those_of_its_outputs(name, has_sinks):
    """Formulas over matrices against differences of a loop over queries."""
    case = dataclasses.replace(TINY_CASE, scores=TINY_SCORES[name], sinks=normal(2) if has_sinks else None)
    arrays, d_out, d_lse = jax.tree.map(lambda x: np.asarray(x, np.float64), case.complete())

    def loss(arrays) -> float:
        given = iter(arrays.scores)
        scores = [dataclasses.replace(x, argument=next(given)) if x.has_array else x for x in case.scores]
        out, lse = oracle.attention(*arrays[:3], case.visible, case.factor, scores, arrays.sinks, case.pairs)
        return (out * d_out).sum() + (np.where(lse == -np.inf, 0, lse) * d_lse).sum()

    gradients = oracle.gradients(
        *(*arrays[:3], case.visible, case.factor, d_out, d_lse, case.scores, arrays.sinks, case.pairs)
    )
    step = 1e-5
    for array, gradient in zip(jax.tree.leaves(arrays), jax.tree.leaves(gradients._replace(summed=[])), strict=True):
        expected = np.zeros(array.shape)
        for at in np.ndindex(array.shape):
            value, losses = array[at], []
            for moved in (value + step, value - step):
                array[at] = moved
                losses.append(loss(arrays))
            array[at] = value
            expected[at] = (losses[0] - losses[1]) / (2 * step)
        largest = np.abs(expected).max()
        assert largest > 0.01
        np.testing.assert_allclose(gradient, expected, rtol=0, atol=tolerances.ORACLE_GRADIENT * largest)


# The reference and the kernels by JAX's own measure.


@pytest.mark.parametrize(
    ("name", "implementation"),
    [
        ("none", "reference"),
        ("custom", "reference"),
        ("none", "xla"),
        ("softcap and alibi", "xla"),
        ("custom", "xla"),
        ("bias", "xla"),
        ("bias", "interpreted"),
    ],
)
def test_gradients_are_those_of_differences(name, implementation):
    case = dataclasses.replace(TINY_CASE, scores=TINY_SCORES[name], sinks=normal(2))
    arrays, _, d_lse = case.complete()
    rest = case.mask.build(pa.masks), case.q_positions, case.kv_positions

    @jax.jit
    def loss(arrays):
        out, lse, _ = case.call(arrays, *rest, implementation)
        return (out**2).sum() + (jnp.where(lse == -jnp.inf, 0, lse) * d_lse).sum()

    step, limit = tolerances.CHECK_GRADS_STEP, tolerances.CHECK_GRADS
    check_grads(loss, (jax.tree.map(jnp.asarray, arrays),), order=1, modes=["rev"], eps=step, rtol=limit, atol=limit)


@pytest.mark.parametrize("name", ["none", "custom"])
def test_the_reference_has_derivatives_of_every_order_and_mode(name):
    case = dataclasses.replace(TINY_CASE, scores=TINY_SCORES[name], sinks=normal(2))
    arrays, *_ = case.complete()
    rest = case.mask.build(pa.masks), case.q_positions, case.kv_positions

    def loss(arrays):
        return (case.call(arrays, *rest, "reference").out ** 2).sum()

    step, limit = tolerances.CHECK_GRADS_STEP, tolerances.CHECK_GRADS
    check_grads(jax.jit(loss), (jax.tree.map(jnp.asarray, arrays),), order=2, eps=step, rtol=limit, atol=limit)


# What is not there, and what is not seen.

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


# Repeats.

EVERYTHING = Case(
    oracle.causal() & ~dense(B, N, T, S, density=0.1),
    LAST,
    LEFT,
    scores=(oracle.alibi(normal(N)), oracle.softcap(3.0), oracle.bias(normal(1, 1, T, S))),
    sinks=normal(N),
)


@KERNELS
def test_the_same_call_gives_the_same_bits(implementation):
    with backward_blocks((16, 16)):
        program = EVERYTHING.both_passes(implementation)
        inputs = EVERYTHING.complete()
        expected = program(*inputs)
        for _ in range(100):
            assert_same_bits(program(*inputs), expected)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_bit(side):
    """A block of padding before or after everything."""
    slopes, bias = normal(N), normal(B, N, 32, 48)
    before = 16 if side == "left" else 0
    case = Case(oracle.causal(), q_len=32, kv_len=48, q_positions=positions(32, start=16)[None])
    case = dataclasses.replace(case, kv_positions=positions(48)[None], scores=(oracle.alibi(slopes), oracle.bias(bias)))

    def pad(x: np.ndarray, axes: tuple[int, ...], value: float) -> np.ndarray:
        widths = [(before, 16 - before) if axis in axes else (0, 0) for axis in range(x.ndim)]
        return np.pad(x, widths, constant_values=value)

    q_positions, kv_positions = (pad(x, (1,), -1) for x in case.geometry)
    padded_bias = pad(bias, (2, 3), np.nan)
    padded = dataclasses.replace(
        case,
        **{"q_len": 48, "kv_len": 64, "q_positions": q_positions, "kv_positions": kv_positions},
        scores=(oracle.alibi(slopes), oracle.bias(padded_bias)),
    )
    arrays, d_out, d_lse = case.complete()
    more = arrays._replace(
        **{name: pad(getattr(arrays, name), (1,), np.nan) for name in ("query", "key", "value")},
        scores=[slopes, padded_bias],
    )
    expected = case.both_passes("xla")(arrays, d_out, d_lse)
    (out, lse), gradients = padded.both_passes("xla")(more, pad(d_out, (1,), np.nan), pad(d_lse, (2,), np.nan))

    def cut(x: np.ndarray, *axes: int) -> np.ndarray:
        for axis in axes:
            x, added = np.split(np.roll(x, -before, axis), [-16], axis)
            assert (added[np.isfinite(added)] == 0).all()
        return x

    gradients = gradients._replace(
        **{name: cut(getattr(gradients, name), 1) for name in ("query", "key", "value")},
        scores=[gradients.scores[0], cut(gradients.scores[1], 2, 3)],
    )
    assert_same_bits(((cut(out, 1), cut(lse, 2)), gradients), expected)


# Memory.


def test_no_array_of_queries_times_keys():
    length, heads, head_dim = 8192, 2, 32
    token = jax.ShapeDtypeStruct((1, length, heads, head_dim), jnp.float32)

    def loss(query, key, value):
        return (pa.attention(query, key, value, pa.masks.causal(), implementation="xla") ** 2).sum()

    compiled = jax.jit(jax.value_and_grad(loss, (0, 1, 2))).lower(token, token, token).compile()
    temporary = compiled.memory_analysis().temp_size_in_bytes
    assert temporary < 8 * token.size * 4, "a few arrays of the tokens' size and a few tiles"
    assert temporary < heads * length**2 * 4 / 20


@KERNELS
def test_only_the_inputs_the_output_and_lse_are_kept(implementation):
    """The function that ``vjp`` returns is a pytree of what it keeps."""
    length = 128
    query = jax.ShapeDtypeStruct((1, length, 4, 32), jnp.bfloat16)
    key, value = (jax.ShapeDtypeStruct((1, length, 2, width), jnp.bfloat16) for width in (32, 64))

    def attend(query, key, value):
        block_mask = pa.BlockMask.from_mask(pa.masks.causal(), length, length, pa.BlockSizes(16, 16))
        return pa.attention(query, key, value, block_mask, **options(implementation))

    kept = jax.tree.leaves(jax.eval_shape(lambda *x: jax.vjp(attend, *x)[1], query, key, value))
    floats = sorted((x.shape, x.dtype.name) for x in kept if jnp.issubdtype(x.dtype, jnp.floating))
    out, lse = ((1, length, 4, 64), "bfloat16"), ((1, 4, length), "float32")
    assert floats == sorted([*((x.shape, x.dtype.name) for x in (query, key, value)), out, lse])
    others = [x for x in kept if not jnp.issubdtype(x.dtype, jnp.floating)]
    assert sum(x.size for x in others) <= 2 * length + 8 * (4 + 8), "positions and lists of 8 x 8 blocks"


# Checkpoints, and other transformations.


def count_forward_passes(gradient, implementation: str) -> int:
    x = jax.ShapeDtypeStruct((1, 32, 2, 32), jnp.float32)
    lowered = jax.jit(gradient).lower(x, x, x) if implementation == "xla" else lower_for_cuda(gradient, x, x, x)
    text = lowered.as_text()
    assert text.count("call @backward") == 1
    return text.count("call @forward")


@pytest.mark.parametrize("implementation", ["xla", "triton"])
def test_a_checkpoint_policy_keeps_the_output_and_runs_no_forward_pass_again(implementation, monkeypatch):
    # Lowering for CUDA needs no GPU.
    monkeypatch.setattr(triton, "unavailable", lambda: None)

    def attend(query, key, value):
        # Something before, that is worth forgetting, and something after, that needs the output.
        out = pa.attention(jnp.sin(query), key, value, pa.masks.causal(), implementation=implementation)
        return (jnp.sin(out) ** 2).sum()

    saves = jax.checkpoint_policies.save_only_these_names("pallas_attn")
    kinds = {
        "none": attend,
        "plain": jax.checkpoint(attend),
        "saves": jax.checkpoint(attend, policy=saves),
    }
    passes = {
        name: count_forward_passes(jax.value_and_grad(kind, (0, 1, 2)), implementation) for name, kind in kinds.items()
    }
    assert passes == {"none": 1, "plain": 2, "saves": 1}


@MOSTLY_XLA
def test_checkpoints_change_no_gradient(implementation):
    case = Case(oracle.causal(), LAST)
    arrays, *_ = case.complete()

    def loss(query, key, value):
        out = pa.attention(jnp.sin(query), key, value, pa.masks.causal(), q_positions=LAST, **options(implementation))
        return (out**2).sum()

    saves = jax.checkpoint_policies.save_only_these_names("pallas_attn")
    with backward_blocks((16, 16)):
        expected = jax.jit(jax.grad(loss, (0, 1, 2)))(*arrays[:3])
        for kind in (jax.checkpoint(loss), jax.checkpoint(loss, policy=saves)):
            for x, like in zip(jax.jit(jax.grad(kind, (0, 1, 2)))(*arrays[:3]), expected, strict=True):
                assert_gradient(*(np.asarray(y) for y in (x, like, like)), dtype="float32", name="a checkpoint")


@MOSTLY_XLA
def test_a_scan_over_layers_with_one_block_mask(implementation):
    layers, case = 3, Case(oracle.causal(), kv_len=T)
    arrays, *_ = case.complete()
    block_mask = pa.BlockMask.from_mask(pa.masks.causal(), T, T, pa.BlockSizes(16, 16))
    scales = normal(layers, N, 1)

    def layer(x, scale):
        return x + pa.attention(x * scale, arrays.key, arrays.value, block_mask, **options(implementation)), None

    def scanned(query, scales, layer=layer):
        return (jax.lax.scan(layer, query, scales[:, None, None])[0] ** 2).sum()

    def unrolled(query, scales):
        for scale in scales[:, None, None]:
            query, _ = layer(query, scale)
        return (query**2).sum()

    expected = jax.jit(jax.grad(unrolled, (0, 1)))(arrays.query, jnp.asarray(scales))
    for how in (layer, jax.checkpoint(layer)):
        value, actual = jax.jit(jax.value_and_grad(lambda *x, how=how: scanned(*x, layer=how), (0, 1)))(
            arrays.query, jnp.asarray(scales)
        )
        assert np.isfinite(value)
        for x, like in zip(actual, expected, strict=True):
            limit = tolerances.ATTENTION_GRADIENT * np.abs(like).max()
            np.testing.assert_allclose(x, like, rtol=0, atol=limit)


@MOSTLY_XLA
def test_gradients_without_jit_are_those_with_it(implementation):
    case = Case(oracle.causal(), LAST)
    arrays, *_ = case.complete()

    def loss(query):
        return (pa.attention(query, *arrays[1:3], pa.masks.causal(), **options(implementation)) ** 2).sum()

    with backward_blocks((16, 16)):
        value, eager = jax.value_and_grad(loss)(jnp.asarray(arrays.query))
        compiled = jax.jit(jax.grad(loss))(arrays.query)
    assert np.isfinite(value)
    np.testing.assert_allclose(eager, compiled, rtol=0, atol=tolerances.ATTENTION_GRADIENT * np.abs(eager).max())


# Random programs.


def capped_twice(factor: float) -> Case:
    """Much cancels: the caps' slopes where they are flat, and the pairs of a query that sees one key or two."""
    holes = np.array([[*(4, 5, -1, -1), *range(8, 15), -1, *range(16, 20), -1, 21, -1, 23, 24, 25]], np.int32)
    return Case(
        oracle.chunked(2),
        np.arange(-3, 7, dtype=np.int32)[None],
        holes,
        batch=3,
        q_len=10,
        kv_len=22,
        q_heads=1,
        kv_heads=1,
        head_dim=32,
        scale=-0.3,
        block_sizes=(16, 32),
        scores=(oracle.factor(np.array([factor], np.float32)), oracle.softcap(0.5), oracle.softcap(0.5)),
    )


def one_bias_for_all() -> Case:
    """Its gradient is the sum of all derivatives of logits, which cancel; float16 outputs are rounded."""
    row = np.arange(5, 28, dtype=np.int32)
    nothing = np.full_like(row, -1)
    generator = np.random.default_rng(0)
    shapes = (1, 6, 4, 1), (1, 1, 1, 1)
    return Case(
        oracle.sliding_window(0, 5),
        np.arange(4, dtype=np.int32)[None],
        np.stack([row, nothing, nothing])[:, None],
        batch=3,
        q_len=4,
        kv_len=23,
        q_heads=6,
        kv_heads=2,
        head_dim=32,
        value_dim=8,
        dtype="float16",
        block_sizes=(16, 32),
        scores=tuple(oracle.bias(generator.standard_normal(shape).astype(np.float32)) for shape in shapes),
    )


@contextlib.contextmanager
def quickly_compiled():
    """Without the optimisations of LLVM, which take most of the time of programs that run once."""
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", False)


@pytest.mark.parametrize(
    ("implementation", "examples"),
    [
        ("xla", 15),
        pytest.param("xla", 500, marks=pytest.mark.slow),
        pytest.param("interpreted", 60, marks=pytest.mark.slow),
        pytest.param("triton", 100, marks=[pytest.mark.gpu, pytest.mark.slow]),
    ],
)
def test_random_programs_equal_the_oracle(implementation, examples):
    @strategies.repeatable(max_examples=examples, phases=[Phase.explicit, Phase.generate])
    @example(capped_twice(-1.5))
    @example(one_bias_for_all())
    @given(strategies.programs())
    def check_one(case):
        check(case, implementation, few_pairs=True)

    many_on_a_cpu = examples > 15 and implementation != "triton"
    with quickly_compiled() if many_on_a_cpu else contextlib.nullcontext():
        check_one()
