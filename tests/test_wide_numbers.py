"""Numbers at and beyond the limits of 32 bits: compared by value or refused, never truncated."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_attn as pa
from pallas_attn import caches, masks, scores
from tests.attention_check import assert_same_bits
from tests.oracle import EMPTY, FULL

B, T, S, N, K, D = 2, 8, 8, 2, 1, 16
TOP = 2**31 - 1
X = np.ones((B, T, N, D), np.float32)


def attention(**options) -> jax.Array:
    return pa.attention(X, X[:, :, :K], X[:, :, :K], implementation="xla", **options)


# --- integers ---

IDS = {
    "int64, equal in their low bits": np.array([[1, 1, 2**32 + 1, 2**32 + 1, 2**33 + 1, -1, -1, 2**32 - 1]]),
    "int64, the ends": np.array([[-(2**63), -(2**63), -1, 0, 0, 2**62, 2**63 - 1, 2**63 - 1]]),
    "uint64": np.array([[0, 1, 1, 2**32, 2**32, 2**64 - 1, 2**64 - 1, 2**63]], np.uint64),
    "uint32": np.array([[0, 1, 1, 2**31, 2**31, 2**32 - 1, 2**32 - 1, 2**31 - 1]], np.uint32),
    "int64 that fit": np.array([[0, 0, 1, 1, 2, 2, -5, TOP]]),
    "int8": np.array([[0, 0, 1, 1, 2, 2, -5, 127]], np.int8),
}
ARANGE = np.arange(T, dtype=np.int32)[None]


@pytest.mark.parametrize("name", IDS)
def test_segment_ids_are_equal_as_they_are(name):
    ids = IDS[name]
    mask = masks.segments(ids)
    np.testing.assert_array_equal(mask.dense_array(ARANGE, ARANGE)[0, 0], ids[0][:, None] == ids[0])
    lists = pa.BlockMask.from_mask(mask, T, T, pa.BlockSizes(2, 2))
    blocks = (ids[0][:, None] == ids[0]).reshape(4, 2, 4, 2)
    np.testing.assert_array_equal(np.asarray(lists.bitmap())[0, 0] == FULL, blocks.all((1, 3)))
    if (np.diff(ids.astype(object)) >= 0).all():
        np.testing.assert_array_equal(np.asarray(lists.bitmap())[0, 0] != EMPTY, blocks.any((1, 3)))


@pytest.mark.parametrize("name", IDS)
def test_segment_ids_that_are_traced_are_equal_as_they_are(name):
    ids = IDS[name]
    with jax.enable_x64(ids.dtype.itemsize == 8):
        allowed = jax.jit(lambda ids: masks.segments(ids).dense_array(ARANGE, ARANGE))(ids)
        both = jax.jit(lambda q, kv: masks.segments(q, kv).dense_array(ARANGE, ARANGE))(ids, ids[:, ::-1])
    np.testing.assert_array_equal(allowed[0, 0], ids[0][:, None] == ids[0])
    np.testing.assert_array_equal(both[0, 0], ids[0][:, None] == ids[0][::-1])


def test_segment_ids_of_two_dtypes():
    wide, narrow = np.array([[1, 2**32 + 1]]), np.array([[1, 1]], np.int16)
    allowed = masks.segments(wide, narrow).dense_array(ARANGE[:, :2], ARANGE[:, :2])
    assert allowed[0, 0].tolist() == [[True, True], [False, False]]
    # No integer dtype represents both.
    with pytest.raises(ValueError, match=r"^segments: expected ids of one dtype, .* got uint64 for q_ids and int64"):
        masks.segments(wide.astype(np.uint64), wide)
    with pytest.raises(ValueError, match=r"^segments: expected ids of one dtype, .* got int64 for q_ids and int32"):
        jax.jit(lambda kv: masks.segments(wide, kv).dense_array(ARANGE, ARANGE))(narrow.astype(np.int32))


UNSIGNED = jnp.full((1, S), 2**31, jnp.uint32)
WIDE = np.array([[0, 1, 2, 3, 2**32, 2**32 + 1, 2**40, -(2**40)]])
REFUSED = {
    "q_positions": lambda: attention(q_positions=WIDE),
    "kv_positions": lambda: attention(kv_positions=WIDE),
    "kv_positions, per head": lambda: attention(kv_positions=WIDE[:, None]),
    "kv_positions, uint32": lambda: attention(kv_positions=np.full((1, S), 2**31, np.uint32)),
    "kv_positions, uint32 of JAX": lambda: attention(kv_positions=UNSIGNED),
    "q_positions of a BlockMask": lambda: pa.BlockMask.from_mask(masks.causal(), WIDE, S),
    "kv_positions of a BlockMask": lambda: pa.BlockMask.from_mask(masks.causal(), T, WIDE),
    "kv_positions of dense_array": lambda: masks.causal().dense_array(ARANGE, WIDE),
    "prefix: lengths": lambda: masks.prefix(WIDE[0]),
    "prefix: lengths, a list": lambda: masks.prefix([2**31]),
    "prefix: lengths, beyond 64 bits": lambda: masks.prefix([10**400]),
    "custom: arrays": lambda: masks.custom(lambda q, k, x: k < x, WIDE[:, None, :, None]),
    "tree: start": lambda: masks.tree(np.eye(2, dtype=bool), [-(2**32)]),
    "left": lambda: masks.sliding_window(2**31),
    "right": lambda: masks.sliding_window(1, 2**32),
    "n": lambda: masks.sink(2**40),
    "size": lambda: masks.chunked(10**400),
    "size of a window": lambda: caches.Window(2**31),
    "recent": lambda: caches.H2O(2**40),
    "num_pages": lambda: caches.Paged(16, 2**40),
    "page_size": lambda: caches.Paged(2**40, 16),
    "group": lambda: caches.Int4(2**40),
    "capacity": lambda: caches.init(batch_size=1, capacity=2**40, kv_heads=1, head_dim=8),
    "batch_size": lambda: caches.init(batch_size=10**400, capacity=8, kv_heads=1, head_dim=8),
    "BlockSizes.q": lambda: pa.BlockSizes(2**40, 16),
    "BlockSizes.chunk": lambda: pa.BlockSizes(16, 16, chunk=10**400),
}


@pytest.mark.parametrize("name", REFUSED)
def test_integers_that_32_bits_do_not_hold_are_refused(name, compilations):
    argument = name.split(",")[0].split(" of ")[0]
    with pytest.raises(ValueError, match=f"^{argument}: expected .*, got "):
        REFUSED[name]()
    assert not compilations


def test_positions_of_other_dtypes_that_fit():
    expected = attention(mask=masks.causal(), kv_positions=ARANGE + 2)
    for dtype in (np.int8, np.uint8, np.uint32, np.int64, np.uint64):
        np.testing.assert_array_equal(attention(mask=masks.causal(), kv_positions=(ARANGE + 2).astype(dtype)), expected)


@pytest.mark.parametrize("dtype", [np.uint32, np.int64, np.uint64])
def test_a_traced_position_that_32_bits_do_not_hold_is_padding(dtype):
    """Jit cannot refuse its value, and it must not become another token's position."""
    wide = np.array([[0, 3, 2**31 - 1, 2**31, 2**31 + 3]], dtype)
    if dtype != np.uint32:
        wide = np.concatenate([wide, np.array([[2**32 + 3, 2**62]], dtype)], 1)
    fits = np.where(wide <= TOP, wide, 0).astype(np.int32) - (wide > TOP)
    with jax.enable_x64(dtype != np.uint32):
        allowed = jax.jit(masks.causal().dense_array)(wide, wide)
    np.testing.assert_array_equal(allowed, masks.causal().dense_array(fits.astype(np.int32), fits.astype(np.int32)))


def test_a_traced_length_that_32_bits_do_not_hold_is_beyond_all_positions():
    with jax.enable_x64(True):
        allowed = jax.jit(lambda n: masks.prefix(n).dense_array(ARANGE, ARANGE))(np.array([2**32 + 3, -(2**32) + 3]))
    assert allowed[0].all()
    assert not allowed[1].any()


def test_a_traced_operand_of_a_custom_mask_is_compared_as_it_is():
    limit = np.array([2**32 + 3, -(2**32) + 3])[:, None, None, None]
    below = lambda q, k, x: k.astype(x.dtype) < x  # noqa: E731
    with jax.enable_x64(True):
        allowed = jax.jit(lambda x: masks.custom(below, x).dense_array(ARANGE, ARANGE))(limit)
    assert allowed[0].all()
    assert not allowed[1].any()


def test_a_tree_that_starts_beyond_32_bits_starts_beyond_the_keys():
    ancestors = np.tri(2, dtype=bool)
    allowed = [masks.tree(ancestors, [start]).dense_array(ARANGE[:, :2], ARANGE) for start in (S, 2**32)]
    np.testing.assert_array_equal(*allowed)


def filled_cache() -> caches.KVCache:
    cache = caches.init(batch_size=B, capacity=16, kv_heads=K, head_dim=D, dtype=jnp.float32)
    tokens = np.arange(B, dtype=np.float32)[:, None, None, None] * np.ones((B, 4, K, D), np.float32)
    return cache.append(tokens, tokens, np.array([[0, 1, 2, -1], [0, 1, -1, -1]], np.int32))


@pytest.mark.parametrize(
    ("requested", "kept"),
    [
        (np.array([2**32 + 1, -(2**32) + 1]), [3, 0]),
        ([2**32, 2**31], [3, 2]),
        (np.array([2**64 - 1, 1], np.uint64), [3, 1]),
        (np.array([2**31, 0], np.uint32), [3, 0]),
    ],
    ids=["int64", "a list", "uint64", "uint32"],
)
def test_truncate_compares_lengths_as_they_are(requested, kept):
    assert filled_cache().truncate(requested).lengths.tolist() == kept


def test_rows_and_counts_of_a_cache_are_compared_as_they_are():
    cache = filled_cache()
    assert cache.fork(np.array([2**32, -(2**32)])).lengths.tolist() == [2, 3]  # the nearest rows
    assert cache.copy_rows(np.array([2**32]), np.array([1]), 1).lengths.tolist() == [3, 2]  # no row
    assert cache.copy_rows(np.array([0]), np.array([2**32 + 1]), 1).lengths.tolist() == [3, 2]
    assert cache.copy_rows(np.array([0]), np.array([1]), 2**32).lengths.tolist() == [3, 3]
    path = np.arange(2, dtype=np.int32)[None].repeat(B, 0)
    assert cache.keep(np.array([1, 0]), path, np.array([2**32, -(2**32) + 1])).lengths.tolist() == [3, 0]
    assert cache.keep(np.array([2**32, 0]), path, np.array([1, 1])).lengths.tolist() == [3, 1]


# --- positions and settings at the ends of 32 bits ---

FAR = np.array([[0, 1, 7, 2**30 - 1, 2**30, -1, TOP - 8, TOP - 7, TOP - 1, TOP, -1, -1]], np.int32)
RELATIONS = {
    "full": (masks.full(), lambda q, k: k == k),
    "causal": (masks.causal(), lambda q, k: k <= q),
    "chunks of 7": (masks.chunked(7), lambda q, k: q // 7 == k // 7),
    "chunks of 2^31 - 1": (masks.chunked(TOP), lambda q, k: q // TOP == k // TOP),
    "prefix": (masks.prefix([TOP]), lambda q, k: k < TOP),
    "prefix, negative": (masks.prefix([-TOP - 1]), lambda q, k: k < -TOP - 1),
    "sink": (masks.sink(TOP), lambda q, k: k < TOP),
    "segments": (masks.segments(FAR), lambda q, k: q == k),
    "custom": (masks.custom(lambda q, k: k >= q), lambda q, k: k >= q),
}
RELATIONS |= {
    f"window of {left} and {right}": (
        masks.sliding_window(left, right),
        lambda q, k, left=left, right=right: (k > q - left) & (k <= q + right),
    )
    for left in (0, 1, 8, TOP)
    for right in (0, 3, TOP)
    if left + right
}
RELATIONS |= {f"not {name}": (~mask, lambda q, k, f=f: ~f(q, k)) for name, (mask, f) in RELATIONS.items()}


@pytest.mark.parametrize("name", RELATIONS)
def test_masks_of_far_positions(name):
    """Against the relation in 64 bits."""
    mask, relation = RELATIONS[name]
    q, k = FAR.astype(np.int64)[0, :, None], FAR.astype(np.int64)[0]
    allowed = relation(q, k) & (q >= 0) & (k >= 0)
    np.testing.assert_array_equal(mask.dense_array(FAR, FAR)[0, 0], allowed)
    classes = np.asarray(pa.BlockMask.from_mask(mask, FAR, FAR, pa.BlockSizes(2, 2)).bitmap())[0, 0]
    for (i, j), kind in np.ndenumerate(classes):
        block = np.s_[2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
        assert kind != EMPTY or not allowed[block].any(), (i, j)
        assert kind != FULL or allowed[block][FAR[0, block[0]] >= 0].all(), (i, j)


def test_heavy_hitters_count_the_queries_of_far_positions():
    """A token's score is divided by the number of positions from its own to the newest, here 2^31 and 1."""
    cache = caches.init(
        caches.H2O(1, normalize=True), batch_size=1, capacity=3, kv_heads=1, head_dim=D, dtype=jnp.float32
    )
    token = np.ones((1, 2, 1, D), np.float32)
    cache = cache.append(token, token, np.array([[0, TOP - 1]], np.int32))
    cache = cache.observe(np.array([[[2.0**31, 2.0**-20, 0.0]]], np.float32))
    cache = cache.append(token[:, :1], token[:, :1], np.array([[TOP]], np.int32))
    scores = cache.policy.score(cache._slots_of(None))[0, 0]
    assert scores[:2].tolist() == [1.0, 2.0**-21]


# --- sizes ---


def test_what_is_too_large_is_refused_before_memory_is_touched(compilations):
    prefix = masks.prefix(np.ones(64, np.int32))
    compilations.clear()
    with pytest.raises(ValueError, match=r"^q_positions: expected at most 1073741824, got 2147483648"):
        pa.BlockMask.from_mask(masks.causal(), 2**31, 4)
    with pytest.raises(ValueError, match=r"^kv_positions: expected at most 1073741824, got an int of 1329 bits"):
        pa.BlockMask.from_mask(masks.causal(), 4, 10**400)
    with pytest.raises(ValueError, match=r"^block_sizes: expected fewer than 2\^31 pairs of blocks, got 1 x 1 x "):
        pa.BlockMask.from_mask(masks.causal(), 2**30, 2**30)
    with pytest.raises(ValueError, match=r"^block_sizes: expected fewer than 2\^31 pairs of blocks, got 64 x 1 x "):
        pa.BlockMask.from_mask(prefix, 2**28, 2**28, pa.BlockSizes(2**14, 2**14))
    assert not compilations


@pytest.mark.parametrize("q_len", [1, T])
def test_blocks_that_are_larger_than_all_there_is(q_len):
    query = X[:, :q_len] * np.arange(q_len, dtype=np.float32)[None, :, None, None]
    value = X * np.arange(S, dtype=np.float32)[None, :, None, None]

    def attend(sizes: pa.BlockSizes | None):
        return pa.attention(query, X, value, masks.causal(), block_sizes=sizes, implementation="xla")

    huge = pa.BlockSizes(10**9, 10**9)
    assert_same_bits(attend(huge), attend(None))
    lists = pa.BlockMask.from_mask(masks.causal(), q_len, S, huge)
    assert lists.bitmap().tolist() == [[[[1]]]], "a block that reaches beyond the last key is never full"
    with pytest.raises(NotImplementedError, match="needs block sizes of at most 1024, got q=536870912"):
        pa.attention(query, X, value, block_sizes=pa.BlockSizes(2**29, 2**29), interpret=True)


# --- floating-point numbers ---

BEYOND = (1e39, -1e39, 10**400, -(10**400), 1e-50, 5e-324, float("nan"), float("inf"), np.float64(1e300))
HUGE = np.full((1, 1, 1, 1), -1e39)


@pytest.mark.parametrize("value", BEYOND, ids=lambda x: f"{type(x).__name__} {float(min(max(x, -1e308), 1e308))}")
@pytest.mark.parametrize("argument", ["scale", "softcap: cap", "balance"])
def test_numbers_that_float32_does_not_hold_are_refused(argument, value, compilations):
    call = {
        "scale": lambda: attention(scale=value),
        "softcap: cap": lambda: scores.softcap(value),
        "balance": lambda: caches.QHitter(4, balance=value),
    }[argument]
    with pytest.raises(ValueError, match=f"^{argument}: expected .*, got "):
        call()
    assert not compilations


@pytest.mark.parametrize("cap", [1e31, 1e38, 3.4e38])
def test_a_cap_that_would_take_logits_for_0_is_refused(cap):
    with pytest.raises(ValueError, match=r"^softcap: cap: expected "):
        scores.softcap(cap)


def test_the_largest_cap_and_scale_do_what_they_say():
    """Powers of two, so that nothing is rounded."""
    assert_same_bits(attention(scores=scores.softcap(2.0**99), return_lse=True).lse, attention(return_lse=True).lse)
    for options in ({"implementation": "xla"}, {"interpret": True}):
        tiny, plain = (
            pa.attention(X * np.float32(factor), X, X, scale=1 / factor, return_lse=True, **options).lse
            for factor in (2.0**-125, 1.0)
        )
        assert_same_bits(tiny, plain)


HUGE_ARRAYS = {
    "alibi: slopes": lambda: scores.alibi(HUGE[0, 0, 0]),
    "alibi: slopes, a list": lambda: scores.alibi([1e39, 1.0]),
    "alibi: slopes, an int": lambda: scores.alibi([10**40, 1]),
    "bias: array": lambda: scores.bias(HUGE),
    "custom: params": lambda: scores.custom(lambda s, q, k, h, p: s + p, 1e39),
    "custom: params, a tree": lambda: scores.custom(lambda s, q, k, h, p: s + p["a"], {"a": HUGE[0, 0]}),
    "custom: params, an int": lambda: scores.custom(lambda s, q, k, h, p: s + p, 10**400),
    "sinks": lambda: attention(sinks=np.array([0.0, 1e39])),
    "x": lambda: pa.QuantizedArray.quantize(HUGE, "int8"),
    "key": lambda: filled_cache().append(*np.full((2, B, 4, K, D), 1e39), np.zeros((B, 4), np.int32)),
}


@pytest.mark.parametrize("name", HUGE_ARRAYS)
def test_arrays_that_float32_does_not_hold_are_refused(name):
    with pytest.raises(ValueError, match=f"^{name.split(',')[0]}: expected .*, got "):
        HUGE_ARRAYS[name]()


def test_arrays_of_64_bits_that_fit_count_as_float32():
    values = np.random.default_rng(0).standard_normal((1, N, T, S))
    for make in (lambda x: {"scores": scores.bias(x)}, lambda x: {"sinks": x[0, :, 0, 0]}):
        np.testing.assert_array_equal(attention(**make(values)), attention(**make(values.astype(np.float32))))
    assert not np.isnan(attention(scores=scores.bias(np.where(values > 0, 0.0, -np.inf)))).all()


# --- jax_enable_x64, where integers have 64 bits unless told otherwise ---


@pytest.mark.parametrize("options", [{"implementation": "xla"}, {"interpret": True}], ids=["xla", "interpreted"])
def test_ids_positions_and_lengths_of_64_bits_that_are_traced(options):
    generator = np.random.default_rng(0)
    query, key, value = generator.standard_normal((3, 1, 20, N, D)).astype(np.float32)

    def attend(ids, positions, limit):
        below = masks.custom(lambda q, k, x: k.astype(x.dtype) < x, limit)
        mask = masks.segments(ids) & masks.causal() & below | masks.prefix(positions[0, 3:4])
        return pa.attention(query, key, value, mask, q_positions=positions, kv_positions=positions, **options)

    ids, positions, limit = np.repeat(np.arange(4), 5)[None], np.arange(20)[None], np.full((1, 1, 1, 1), 15)
    expected = jax.jit(attend)(*(x.astype(np.int32) for x in (ids, positions, limit)))
    with jax.enable_x64(True):
        actual = jax.jit(attend)(ids + 2**40, positions, limit)
    assert_same_bits(actual, expected)
