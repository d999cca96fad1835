"""The Triton kernels that split a row's keys: quantised and paged keys, and what only they can get wrong.

In the interpreter; tests/test_decode.py says what decode computes, for every implementation.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_attn as pa
from pallas_attn.kernels import triton
from pallas_attn.kernels.call import Call
from pallas_attn.kernels.lse import Lse
from pallas_attn.kernels.triton.key_weight_pass import weights_of_logits
from pallas_attn.kernels.triton.packing import Packing
from pallas_attn.kernels.triton.specs import Tiling
from tests import oracle, tolerances
from tests.attention_check import assert_error

B, S, N, K, D = 2, 80, 4, 2, 32
LENGTHS = np.array([70, 33])
rng = np.random.default_rng(5)
KINDS = ("int8", "float8_e4m3fn", "int4")


class Example:
    """A call of the kernels, with NaN wherever nobody may look, and what the oracle makes of it."""

    def __init__(self, mask=None, *, q_len=1, q_heads=N, kv_heads=K, head_dim=D, value_dim=None, dtype="float32"):
        def normal(*shape):
            return rng.standard_normal((B, *shape)).astype(jnp.dtype(dtype))

        self.mask = mask or oracle.causal()
        self.query = normal(q_len, q_heads, head_dim)
        self.key, self.value = normal(S, kv_heads, head_dim), normal(S, kv_heads, value_dim or head_dim)
        self.q_positions = (LENGTHS[:, None] - q_len + np.arange(q_len)).astype(np.int32)
        self.kv_positions = np.where(np.arange(S) < LENGTHS[:, None], np.arange(S), -1).astype(np.int32)
        self.kv_positions[0, 20:35] = -1
        self.key[self.empty] = self.value[self.empty] = np.nan
        self.scale = head_dim**-0.5
        self.scores: tuple[oracle.Score, ...] = ()
        self.sinks: np.ndarray | None = None
        self.page_table: Any = None
        self.stored: Any = None

    @property
    def empty(self) -> np.ndarray:
        """Slots without a key, bool ``[B, S]``."""
        return self.kv_positions < 0

    def quantize(self, key_kind, value_kind) -> "Example":
        """Stores keys and values in so many bits; the scales of empty slots are NaN."""

        def store(x, kind):
            if kind is None:
                return x, x
            stored = pa.QuantizedArray.quantize(jnp.asarray(x), kind, **({"group": 8} if kind == "int4" else {}))
            return stored, oracle.dequantize(stored)

        (key, self.key), (value, self.value) = store(self.key, key_kind), store(self.value, value_kind)
        self.stored = key, value
        return self

    def put_into_pages(self, page) -> "Example":
        """Cuts the rows into pages of a pool, in any order; a page of NaN is between them."""
        number = B * S // page
        order = rng.permutation(number) + 1

        def pool(x):
            pages = np.full((number + 2, page, *x.shape[2:]), np.nan if x.dtype.kind == "f" else 0).astype(x.dtype)
            pages[order] = x.reshape(number, page, *x.shape[2:])
            return pages

        self.stored = jax.tree.map(lambda x: pool(np.asarray(x)), self.stored or (self.key, self.value))
        self.page_table = order.reshape(B, -1).astype(np.int32)
        return self

    def run(self, function, sizes=pa.BlockSizes(16, 16, shares=7), **changes):  # noqa: B008
        block_mask = pa.BlockMask.from_mask(
            self.mask.build(pa.masks), jnp.asarray(self.q_positions), jnp.asarray(self.kv_positions), sizes
        )
        key, value = self.stored or (self.key, self.value)
        scores = pa.scores.traced(tuple(score.build(pa.scores) for score in self.scores))
        tensors = jax.tree.map(jnp.asarray, (self.query, key, value))
        call = Call(*tensors, block_mask, scores, self.sinks, self.page_table)
        results = function(call, scale=self.scale, interpret=True, **changes)
        return jax.tree.map(
            lambda x: np.asarray(x.value if isinstance(x, Lse) else x), results, is_leaf=lambda x: isinstance(x, Lse)
        )

    @property
    def pairs(self) -> tuple[np.ndarray, oracle.Pairs]:
        """Who sees whom, and from where."""
        heads = self.query.shape[2]
        seen = oracle.visible(self.mask, self.q_positions, self.kv_positions, B, heads)
        return seen, oracle.Pairs.of(B, heads, self.q_positions, self.kv_positions)

    def key_weights(self) -> tuple[np.ndarray, np.ndarray]:
        """The oracle's lse and weights of keys."""
        seen, pairs = self.pairs
        tensors = self.query, self.key, self.value
        _, lse = oracle.attention(*tensors, seen, self.scale, self.scores, self.sinks, pairs)
        return lse, oracle.key_weights(*tensors[:2], seen, self.scale, lse, self.scores, pairs)

    def check_key_weights(self, **changes) -> np.ndarray:
        *_, weights = self.run(triton.decode, return_key_weights=True, **changes)
        assert weights.dtype == np.float32
        np.testing.assert_allclose(weights, self.key_weights()[1], atol=tolerances.KEY_WEIGHTS, rtol=0)
        seen, _ = self.pairs
        unseen = ~seen.reshape(B, weights.shape[1], -1, S).any(2)
        assert (weights[unseen] == 0).all()
        return weights

    def check(self, function=triton.decode, **changes) -> None:
        seen, pairs = self.pairs
        arguments = self.query, self.key, self.value, seen, self.scale, self.scores, self.sinks, pairs
        expected, plain = oracle.attention(*arguments), oracle.plain_attention(*arguments)
        out, lse = self.run(function, **changes)
        assert (out.dtype, lse.dtype) == (self.query.dtype, np.float32)
        blind = np.isneginf(expected[1])
        np.testing.assert_array_equal(np.isneginf(lse), blind)
        np.testing.assert_array_equal(out.swapaxes(1, 2)[blind], 0)
        assert_error(out.astype(np.float64), expected[0], plain[0], self.query.dtype, "out")
        assert_error(lse[~blind].astype(np.float64), expected[1][~blind], plain[1][~blind], "float32", "lse")


def dense(heads: int, q_len: int, density: float = 0.3) -> oracle.Mask:
    return oracle.dense(rng.random((B, heads, q_len, S)) < density)


CASES = {
    "three tiles of one head": lambda: Example(q_len=16, q_heads=12, kv_heads=1, head_dim=20, value_dim=24),
    "a list per key head": lambda: Example(dense(K, 3), q_len=3),
    "a list per query head": lambda: Example(dense(N, 3), q_len=3),
    "one list for heads in groups of three": lambda: Example(q_len=5, q_heads=6),
    "bfloat16": lambda: Example(dtype="bfloat16"),
}


@pytest.mark.parametrize("name", CASES)
def test_rows_of_a_group_share_a_tile(name):
    CASES[name]().check()


@pytest.mark.parametrize("mask", [oracle.causal(), dense(N, 3)], ids=["one list", "a list per query head"])
def test_scores_know_the_head_of_every_row(mask):
    call = Example(mask, q_len=3)
    call.scores = (
        oracle.alibi(rng.random(N).astype(np.float32)),
        oracle.bias(rng.standard_normal((B, 1, 3, S)).astype(np.float32)),
        oracle.bias(rng.standard_normal((1, N, 1, S)).astype(np.float32)),
        oracle.buckets(rng.standard_normal((N, oracle.BUCKETS)).astype(np.float32)),
    )
    call.sinks = rng.standard_normal(N).astype(np.float32)
    call.check()


@pytest.mark.parametrize("function", [triton.decode, triton.prefill])
@pytest.mark.parametrize("kinds", [*((kind, kind) for kind in KINDS), ("int4", None), (None, "int8")], ids=str)
def test_quantised_keys_and_values(kinds, function):
    Example(q_len=2, value_dim=48).quantize(*kinds).check(function)


@pytest.mark.parametrize("function", [triton.decode, triton.prefill])
@pytest.mark.parametrize(("head_dim", "value_dim"), [(256, 132), (80, 160)])
def test_wide_heads_of_eight_bits_come_in_halves_for_float32(head_dim, value_dim, function):
    Example(q_len=2, head_dim=head_dim, value_dim=value_dim).quantize("int8", "int8").check(function)


def test_small_scales_are_kept_in_float16():
    """Those of values, below what float16 can say, meet weights of any size."""
    call = Example(dtype="float16")
    call.value = (call.value * 2.0**-14).astype(np.float16)
    call.quantize(None, "int8").check()


def test_groups_of_any_size():
    """Five groups of eight columns in a tile of 64, and two of 20."""
    Example(head_dim=80, value_dim=80).quantize("int4", "int4").check()


@pytest.mark.parametrize("function", [triton.decode, triton.prefill])
@pytest.mark.parametrize(("page", "kv_block"), [(16, 16), (16, 32), (80, 16), (40, 16)])
def test_pages_in_any_order(page, kv_block, function):
    Example().put_into_pages(page).check(function, sizes=pa.BlockSizes(16, kv_block, shares=7))


def test_pages_of_quantised_keys():
    Example(q_len=2).quantize("int4", "int8").put_into_pages(16).check(sizes=pa.BlockSizes(16, 32, shares=7))


def test_pages_that_are_not_there_are_not_read():
    """A block mask that knows better than its page table: the index is moved into the pool, the keys count as empty."""
    call = Example().put_into_pages(16)
    call.kv_positions[1, 16:32] = -1
    call.page_table[1, 1] = 2**30
    call.page_table[1, -1] = -1
    call.check()


def with_scores_and_sinks(call: Example) -> Example:
    call.sinks = rng.standard_normal(N).astype(np.float32)
    call.scores = (oracle.softcap(2.0), oracle.alibi(rng.random(N).astype(np.float32)))
    return call


def with_padding(call: Example) -> Example:
    call.q_positions[0, 0] = -1
    call.query[0, 0] = np.nan
    return call


WINDOW = oracle.causal() & oracle.sliding_window(20) | oracle.sink(3)
WEIGHED = CASES | {
    "scores and sinks": lambda: with_scores_and_sinks(Example(q_len=3)),
    "a negative scale, queries that are not there": lambda: with_padding(Example(q_len=3)),
    "a window, int8 keys": lambda: Example(WINDOW, q_len=2).quantize("int8", "int4"),
    "a window, int4 keys in pages": lambda: Example(WINDOW).quantize("int4", None).put_into_pages(16),
}


@pytest.mark.parametrize("name", WEIGHED)
def test_key_weights_come_from_the_same_pass(name):
    call = WEIGHED[name]()
    call.scale = -0.3 if "negative" in name else call.scale
    weights = call.check_key_weights()
    if call.sinks is None:
        seeing = call.pairs[0].any(-1).reshape(B, weights.shape[1], -1, call.query.shape[1])
        np.testing.assert_allclose(weights.sum(-1), seeing.mean(2).sum(-1), rtol=tolerances.KEY_WEIGHTS)


def test_key_weights_are_beside_out_and_lse_which_do_not_change():
    call = with_scores_and_sinks(Example())
    for both, alone in zip(call.run(triton.decode, return_key_weights=True), call.run(triton.decode), strict=False):
        np.testing.assert_array_equal(both, alone)


def test_logits_that_nobody_wrote_do_not_matter():
    """The memory of blocks that are in no list, and of keys and queries that are not there, may hold anything."""
    call = with_padding(Example(WINDOW, q_len=3))
    block_mask = pa.BlockMask.from_mask(
        WINDOW.build(pa.masks), jnp.asarray(call.q_positions), jnp.asarray(call.kv_positions), pa.BlockSizes(16, 16)
    )
    written = np.repeat(block_mask.bitmap() > 0, 16, axis=-1)  # [B, 1, 1, S]
    assert 0 < written.mean() < 1
    tensors = map(jnp.asarray, (call.query, call.key, call.value))
    tiling = Tiling.of_call(Call(*tensors, block_mask), call.scale, True)
    packing = Packing.of(tiling, block_mask)
    logits = jnp.where(written, jnp.zeros((B, K, packing.queries, S)), jnp.nan).at[0, :, : packing.group].set(jnp.nan)
    lse = Lse(jnp.zeros((B, N, 3)).at[0, :, 0].set(-jnp.inf), jnp.zeros((B, N, 3)), tiling.unit)
    weights = weights_of_logits(logits, lse, block_mask.schedule, block_mask.indices, tiling, packing)
    queries = np.array([2, 3])[:, None, None]
    np.testing.assert_array_equal(weights, np.broadcast_to(np.where(written[:, 0], queries, 0), (B, K, S)))


@pytest.mark.parametrize(("q_len", "asked"), [(1, False), (1, True), (16, True), (17, True)])
def test_only_prefill_reads_keys_twice_and_only_if_asked(q_len, asked):
    call = Example(q_len=q_len)
    call.key, call.value = np.nan_to_num(call.key), np.nan_to_num(call.value)

    def attend(query, key, value):
        return pa.attention(query, key, value, return_key_weights=asked, interpret=True)

    program = str(jax.make_jaxpr(attend)(call.query, call.key, call.value))
    assert ("pallas_attn_decode_weights" in program) == (asked and q_len <= 16)
    assert ("pallas_attn_key_weights" in program) == (asked and q_len > 16)


def test_the_second_pass_over_keys():
    call = with_scores_and_sinks(Example(q_len=3)).quantize("int4", None).put_into_pages(16)
    lse, expected = call.key_weights()

    def weigh(call, **options):
        return triton.key_weights(call, Lse(jnp.asarray(lse, jnp.float32), jnp.zeros(lse.shape)), **options)

    np.testing.assert_allclose(call.run(weigh), expected, atol=tolerances.KEY_WEIGHTS, rtol=0)


def test_a_schedule_is_needed():
    with pytest.raises(ValueError, match="block_mask: expected one with a schedule"):
        Example(q_len=17).run(triton.decode)
