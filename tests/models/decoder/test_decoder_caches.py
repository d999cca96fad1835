"""Decoders with every policy and storage: what the cache must preserve, and what it changes."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import pallas_attn as pa
from pallas_attn import caches
from pallas_attn_models import Decoder
from tests import tolerances
from tests.marks import quick
from tests.models.decoder.test_decoder import SMALL, compiled, random_tokens, widen

CONFIG = dataclasses.replace(SMALL, head_dim=16)
B, T, CAPACITY = 2, 40, 48
POLICIES = {
    "dense": caches.Dense(),
    "window": caches.Window(T, sinks=2),
    "h2o": caches.H2O(recent=4),
    "h2o by age and value": caches.H2O(recent=4, normalize=True, value_norm=True),
    "q-hitter": caches.QHitter(recent=4),
}
STORAGES = {
    "plain": caches.Plain(),
    "int8": caches.Int8(),
    "int4": caches.Int4(group=8),
    "float8": caches.Float8(),
    "paged": caches.Paged(16, B * CAPACITY // 16),
    "paged int8": caches.Paged(16, B * CAPACITY // 16, caches.Int8()),
}
CHUNKS = {"at once": T, "in chunks": 7, "token by token": 1}


def decoder(seed: int = 0, dtype=jnp.float32, **fields) -> Decoder:
    model = Decoder(dataclasses.replace(CONFIG, **fields), rngs=nnx.Rngs(seed), dtype=dtype)
    if dtype == jnp.float32:
        widen(model, seed)
    return model


def read(model: Decoder, tokens: np.ndarray, at_once: int, **options):
    """Logits ``[B, T, V]`` of tokens fed in chunks, the last ones left-padded, and the caches."""
    run = compiled(model)
    layers = model.init_caches(batch_size=tokens.shape[0], **options)
    logits = []
    for start in range(0, tokens.shape[1], at_once):
        piece = tokens[:, start : start + at_once]
        missing = at_once - piece.shape[1]
        positions = np.arange(start - missing, start + piece.shape[1], dtype=np.int32)
        positions[:missing] = -1
        piece = np.pad(piece, ((0, 0), (missing, 0)))
        out = run(piece, np.tile(positions, (tokens.shape[0], 1)), layers)
        layers = out.caches
        logits.append(np.asarray(out.logits)[:, missing:])
    return np.concatenate(logits, axis=1), layers


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return random_tokens(0, B, T, vocab_size=CONFIG.vocab_size)


@pytest.mark.parametrize("policy", quick(POLICIES, "window", "q-hitter"))
def test_with_enough_room_every_policy_equals_the_uncached_forward(policy, tokens):
    model = decoder()
    uncached = compiled(model)(tokens).logits
    for chunk in CHUNKS.values():
        logits, layers = read(model, tokens, chunk, capacity=CAPACITY, policy=POLICIES[policy])
        np.testing.assert_allclose(logits, uncached, rtol=0, atol=tolerances.CACHED_LOGITS)
        assert not any(cache.overflowed.any() for cache in layers)


def test_in_bfloat16_the_cache_adds_no_error(tokens):
    precise, model = decoder(), decoder()
    expected = np.asarray(compiled(precise)(tokens).logits)
    half = Decoder(CONFIG, rngs=nnx.Rngs(0), dtype=jnp.bfloat16, param_dtype=jnp.float32)
    nnx.update(half, nnx.state(model))
    plain = np.abs(np.asarray(compiled(half)(tokens).logits) - expected).max()
    for policy in POLICIES.values():
        logits, _ = read(half, tokens, 7, capacity=CAPACITY, policy=policy)
        assert np.abs(logits - expected).max() <= 2 * plain


# The pairs that the default suite runs; -m slow runs the others.
QUICK = {("window", "paged"), ("q-hitter", "int4")}


@pytest.mark.parametrize(
    ("policy", "storage"),
    [
        pytest.param(policy, storage, marks=() if (policy, storage) in QUICK else pytest.mark.slow)
        for policy in ("dense", "window", "h2o by age and value", "q-hitter")
        for storage in ("int8", "int4", "float8", "paged", "paged int8")
    ],
)
def test_stored_values_do_not_depend_on_policy_or_chunks(policy, storage, tokens):
    model = decoder()
    dense, _ = read(model, tokens, CHUNKS["at once"], capacity=CAPACITY, storage=STORAGES[storage])
    for chunk in (CHUNKS["in chunks"], CHUNKS["token by token"]):
        logits, _ = read(model, tokens, chunk, capacity=CAPACITY, policy=POLICIES[policy], storage=STORAGES[storage])
        np.testing.assert_allclose(logits, dense, rtol=0, atol=tolerances.CACHED_LOGITS)


def test_fewer_bits_are_further_away(tokens):
    model = decoder()
    uncached = np.asarray(compiled(model)(tokens).logits)
    errors = [
        np.abs(read(model, tokens, 7, capacity=CAPACITY, storage=STORAGES[name])[0] - uncached).mean()
        for name in ("paged", "int8", "float8", "int4")
    ]
    assert errors == sorted(errors)
    assert errors[0] < errors[1] / 100


@pytest.mark.parametrize("storage", ["plain", "paged int8"])
def test_a_window_cache_of_a_layer_with_a_window_changes_nothing(storage, tokens):
    model = decoder(sliding_windows=(8, None))
    options = {"capacity": CAPACITY, "storage": STORAGES[storage]}
    dense, _ = read(model, tokens, 5, **options)
    logits, layers = read(model, tokens, 5, **options, chunk=5)
    np.testing.assert_allclose(logits, dense, rtol=0, atol=tolerances.CACHED_LOGITS)
    assert layers[0].policy == caches.Window(8)
    assert layers[0].capacity < CAPACITY
    assert layers[1].policy == caches.Dense()
    assert not any(cache.overflowed.any() for cache in layers)
    assert layers[0].nbytes < layers[1].nbytes


@pytest.mark.parametrize("policy", [caches.Window(10, sinks=2), caches.H2O(recent=4)], ids=["window", "h2o"])
def test_a_prompt_much_longer_than_the_cache(policy):
    tokens = random_tokens(1, B, 300, vocab_size=CONFIG.vocab_size)
    model = decoder()
    logits, layers = read(model, tokens, 5, capacity=16, policy=policy)
    assert np.isfinite(logits).all()
    for cache in layers:
        assert cache.lengths.tolist() == [300, 300]
        assert not cache.overflowed.any()
        assert (cache.positions >= 0).all()
        assert (cache.positions.max(-1) == 299).all()
    if isinstance(policy, caches.Window):
        # The mask of a single layer is known, so a model of one layer equals masked attention over all tokens.
        shallow = decoder(num_layers=1)
        chunked, _ = read(shallow, tokens, 5, capacity=16, policy=policy)
        whole, _ = read(shallow, tokens, 300, capacity=300, policy=policy)
        np.testing.assert_allclose(chunked, whole, rtol=0, atol=tolerances.CACHED_LOGITS)
        assert np.abs(chunked - np.asarray(compiled(shallow)(tokens).logits)).max() > 0.1


def test_heads_of_an_h2o_cache_keep_tokens_of_their_own():
    tokens = random_tokens(1, B, 200, vocab_size=CONFIG.vocab_size)
    _, layers = read(decoder(), tokens, 5, capacity=32, policy=caches.H2O(recent=8))
    kept = [np.sort(cache.positions, axis=-1) for cache in layers]
    assert any((one[:, 0] != one[:, 1]).any() for one in kept)
    assert (kept[0] != kept[1]).any()
    for one in kept:
        assert (one[..., -8:] == np.arange(192, 200)).all()


@pytest.mark.parametrize("policy", quick(["dense", "window", "h2o"], "window"))
@pytest.mark.parametrize("storage", ["plain", "paged int8"])
def test_one_executable_updates_in_place(policy, storage):
    model = decoder()
    layers = model.init_caches(batch_size=B, capacity=4096, policy=POLICIES[policy], storage=_with_room(storage))
    graph, state = nnx.split(model)

    @functools.partial(jax.jit, donate_argnums=3)
    def step(state, tokens, positions, layers):
        return nnx.merge(graph, state)(tokens, positions, layers).caches

    token, position = np.zeros((B, 1), np.int32), np.zeros((B, 1), np.int32)
    text = step.lower(state, token, position, layers).compile().as_text()
    (aliases,) = re.findall(r"input_output_alias=\{(.*?)\}, entry", text) or [text.split("\n", 1)[0]]
    buffers = jax.tree.leaves([(cache.key, cache.value) for cache in layers])
    assert aliases.count("alias)") >= len(buffers)
    for buffer in buffers:
        shape = ",".join(map(str, buffer.shape))
        copies = re.findall(rf"= \w+\[{re.escape(shape)}\]\S* copy\(", text)
        assert not copies, copies[:2]
    before = step._cache_size()
    for n in range(3):
        layers = step(state, token, position + n, layers)
    assert step._cache_size() == before + 1


ROWS_OF = {
    "dense, plain": (caches.Dense(), caches.Plain()),
    "window, int8": (caches.Window(20, sinks=2), caches.Int8()),
    "h2o, paged": (caches.H2O(recent=4), caches.Paged(16, 15)),
}


@pytest.mark.parametrize("name", quick(ROWS_OF, "window, int8", "h2o, paged"))
def test_some_rows_of_the_caches_equal_the_whole_batch(name):
    policy, storage = ROWS_OF[name]
    rows_in_all, length = 5, 7
    model = decoder(sliding_windows=(8, None))
    whole = some = model.init_caches(batch_size=rows_in_all, capacity=CAPACITY, policy=policy, storage=storage)
    run = compiled(model)
    graph, state = nnx.split(model)
    run_rows = jax.jit(
        lambda tokens, positions, layers, rows: nnx.merge(graph, state)(tokens, positions, layers, rows=rows)
    )
    lengths = np.zeros(rows_in_all, np.int32)
    for seed in range(6):
        rng = np.random.default_rng(seed)
        rows = rng.permutation(rows_in_all)[:2].astype(np.int32)
        tokens = random_tokens(seed, 3, length, vocab_size=CONFIG.vocab_size)
        positions = (np.append(lengths[rows], 0)[:, None] + np.arange(length)).astype(np.int32)
        all_tokens, all_positions = (np.full((rows_in_all, length), fill, np.int32) for fill in (0, -1))
        all_tokens[rows], all_positions[rows] = tokens[:2], positions[:2]
        expected = run(all_tokens, all_positions, whole)
        # The third entry is unused, and its content is irrelevant.
        entries = np.append(rows, rng.choice([-1, rows_in_all, 99])).astype(np.int32)
        out = run_rows(tokens, positions, some, rows=entries)
        np.testing.assert_allclose(out.logits[:2], expected.logits[rows], rtol=0, atol=tolerances.CACHED_LOGITS)
        whole, some = expected.caches, out.caches
        lengths[rows] += length
        for one, other in zip(some, whole, strict=True):
            np.testing.assert_array_equal(one.lengths, lengths)
            np.testing.assert_array_equal(one.positions, other.positions)


def test_default_positions_of_some_rows_go_on_where_each_is(tokens):
    model = decoder()
    layers = model.init_caches(batch_size=3, capacity=CAPACITY)
    layers = model(tokens[:, :9], None, layers, rows=jnp.array([2, 0], jnp.int32)).caches
    layers = model(tokens[:1, 9:14], None, layers, rows=jnp.array([2], jnp.int32)).caches
    out = model(np.stack([tokens[1, 9:14], tokens[0, 14:19]]), None, layers, rows=jnp.array([0, 2], jnp.int32))
    expected = compiled(model)(tokens).logits
    np.testing.assert_allclose(out.logits[0], expected[1, 9:14], rtol=0, atol=tolerances.CACHED_LOGITS)
    np.testing.assert_allclose(out.logits[1], expected[0, 14:19], rtol=0, atol=tolerances.CACHED_LOGITS)
    assert out.caches[0].lengths.tolist() == [14, 0, 19]


# Two chains from one root: 0-1-3-5 and 0-2-4.
PARENTS = [-1, 0, 0, 1, 2, 3]
DEPTHS = [0, 1, 1, 2, 2, 3]


@pytest.mark.parametrize("storage", quick(["plain", "paged int8"], "paged int8"))
def test_a_tree_is_verified_as_each_of_its_paths(storage, tokens):
    """The caches then equal those after feeding the path alone."""
    model = decoder(sliding_windows=(8, None))
    run = compiled(model)
    graph, state = nnx.split(model)
    run_tree = jax.jit(
        lambda tokens, positions, layers, tree: nnx.merge(graph, state)(tokens, positions, layers, tree=tree)
    )
    layers = model.init_caches(batch_size=B, capacity=CAPACITY, storage=STORAGES[storage])
    start = np.array([11, 17], np.int32)
    at = np.arange(T)
    layers = run(tokens, np.where(at < start[:, None], at, -1).astype(np.int32), layers).caches
    nodes = random_tokens(7, B, len(PARENTS), vocab_size=CONFIG.vocab_size)
    sees = np.eye(len(PARENTS), dtype=bool)
    for node, parent in enumerate(PARENTS[1:], start=1):
        sees[node] |= sees[parent]
    positions = start[:, None] + np.array(DEPTHS, np.int32)
    out = run_tree(nodes, positions, layers, sees)
    for path in ([0, 1, 3, 5], [0, 2, 4]):
        alone = run(nodes[:, path], positions[:, path], layers)
        np.testing.assert_allclose(out.logits[:, path], alone.logits, rtol=0, atol=tolerances.CACHED_LOGITS)
        count = np.full(B, len(path), np.int32)
        padded = np.tile(np.array([*path, *range(len(path), len(PARENTS))], np.int32), (B, 1))
        for tree, chain in zip(out.caches, alone.caches, strict=True):
            kept = tree.keep(start, padded, count)
            np.testing.assert_array_equal(kept.lengths, chain.lengths)
            np.testing.assert_array_equal(kept.positions, chain.positions)
        kept = tuple(tree.keep(start, padded, count) for tree in out.caches)
        after = run(nodes[:, :1], (start + len(path))[:, None], kept).logits
        expected = run(nodes[:, :1], (start + len(path))[:, None], alone.caches).logits
        np.testing.assert_allclose(after, expected, rtol=0, atol=tolerances.CACHED_LOGITS)


def _bad_call(**options):
    model = decoder()
    layers = model.init_caches(batch_size=3, capacity=32, policy=options.pop("policy", None))
    return model(np.zeros((2, 4), np.int32), options.pop("positions", None), layers, **options)


AT = np.zeros((2, 4), np.int32)
ROWS = np.array([2, 0], np.int32)
TREE = np.eye(4, dtype=bool)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: _bad_call(), "caches[0]: expected the batch size of tokens, 2, got 3"),
        (lambda: _bad_call(rows=ROWS[:1]), "rows: expected int32 [2], as tokens, got int32 [1]"),
        (lambda: _bad_call(rows=ROWS > 0), "rows: expected int32 [2], as tokens, got bool [2]"),
        (lambda: decoder()(AT, rows=ROWS), "rows: expected None without caches, got int32 [2]"),
        (lambda: decoder()(AT, AT, tree=TREE), "tree: expected Dense caches in every layer, got no caches"),
        (
            lambda: _bad_call(rows=ROWS, tree=TREE),
            "tree: expected also positions, which follow the depth of each node, got None",
        ),
        (
            lambda: _bad_call(rows=ROWS, tree=TREE, positions=AT, policy=[caches.Dense(), caches.H2O(4)]),
            "tree: expected Dense caches in every layer, got Dense, H2O",
        ),
        (
            lambda: _bad_call(rows=ROWS, tree=TREE[:3], positions=AT),
            "tree: expected bool [4, 4] or [2|1, 4, 4], got bool [3, 4]",
        ),
    ],
)
def test_rows_and_trees_that_do_not_fit(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def _with_room(storage: str) -> caches.Storage:
    held = STORAGES[storage]
    if isinstance(held, caches.Paged):
        held = dataclasses.replace(held, num_pages=B * 4096 // 16)
    return held


def test_one_policy_for_each_layer(tokens):
    model = decoder()
    policies = [caches.Window(T), caches.H2O(recent=4)]
    options = {"capacity": [T + 1, CAPACITY], "policy": policies, "storage": [caches.Plain(), caches.Paged(16, 6)]}
    logits, layers = read(model, tokens, 7, **options)
    assert [cache.policy for cache in layers] == policies
    np.testing.assert_allclose(logits, compiled(model)(tokens).logits, rtol=0, atol=tolerances.CACHED_LOGITS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capacity": [8, 8, 8]}, "capacity: expected one, or one per layer, 2, got 3"),
        ({"capacity": 8, "policy": [caches.Dense()]}, "policy: expected one, or one per layer, 2, got 1"),
        ({"capacity": 8, "storage": []}, "storage: expected one, or one per layer, 2, got 0"),
        ({"capacity": 8, "policy": caches.Window(8, 1)}, "capacity: expected at least size + sinks = 9, got 8"),
        ({"capacity": 40, "storage": caches.Paged(16, 4)}, "capacity: expected a multiple of page_size=16, got 40"),
    ],
)
def test_invalid_requests_are_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        decoder().init_caches(batch_size=1, **options)


def test_a_mask_is_built_once_for_layers_that_agree(tokens):
    model = decoder(num_layers=4, sliding_windows=(8, None, 8, None))
    out = compiled_masks(model, tokens, model.init_caches(batch_size=B, capacity=CAPACITY))
    assert out == [0, 1, 0, 1]
    h2o = model.init_caches(batch_size=B, capacity=CAPACITY, policy=caches.H2O(recent=4))
    assert compiled_masks(model, tokens, h2o) == [0, 1, 2, 3]


def compiled_masks(model: Decoder, tokens: np.ndarray, layers: tuple[pa.caches.KVCache, ...]) -> list[int]:
    """For each layer, the number of the first layer with the same BlockMask object."""
    found: list[list[int]] = []

    @jax.jit
    def run(layers):
        masks = model(tokens[:, :4], None, layers).block_masks
        first = [id(mask) for mask in masks]
        found.append([sorted(set(first), key=first.index).index(one) for one in first])
        return masks[0].num_active

    run(layers)
    return found[0]
