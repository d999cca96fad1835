"""Gradients of weights through a Decoder's caches equal those of one call without caches."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import pallas_attn as pa
from pallas_attn import caches
from pallas_attn_models import CachedDecoder, Decoder
from pallas_attn_models.decoder import decoder as decoder_module
from tests import tolerances
from tests.marks import quick
from tests.models.decoder.test_decoder import SMALL, random_tokens, widen

CONFIG = dataclasses.replace(SMALL, head_dim=16)
B, CHUNK, CHUNKS = 2, 8, 4
T = CHUNK * CHUNKS
TOKENS = random_tokens(0, B, T + 1, vocab_size=CONFIG.vocab_size)
READ, NEXT = TOKENS[:, :-1], TOKENS[:, 1:]
WINDOW = 11


def split(dtype=jnp.float32, **fields):
    model = Decoder(dataclasses.replace(CONFIG, **fields), rngs=nnx.Rngs(0), dtype=dtype, param_dtype=jnp.float32)
    widen(model, 0)
    return nnx.split(model)


def surprise(logits, following) -> jax.Array:
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), following[..., None], axis=-1).sum() / TOKENS.size


def at_once(graph, weights) -> jax.Array:
    return surprise(nnx.merge(graph, weights)(READ).logits, jnp.asarray(NEXT))


def step(graph, rows, weights, layers, chunk):
    tokens, following = chunk
    out = nnx.merge(graph, weights)(tokens, caches=layers, rows=rows)
    return out.caches, surprise(out.logits, following)


def pieces(x) -> jax.Array:
    return jnp.asarray(x).reshape(B, CHUNKS, CHUNK).swapaxes(0, 1)


def in_chunks(graph, weights, rows=None, **options) -> jax.Array:
    """The loss of chunks in a rematerialized scan with the caches as carry."""
    batch_size = B if rows is None else B + 2
    layers = nnx.merge(graph, weights).init_caches(batch_size=batch_size, **options)
    body = jax.checkpoint(functools.partial(step, graph, rows, weights))
    return jax.lax.scan(body, layers, (pieces(READ), pieces(NEXT)))[1].sum()


def assert_same_gradients(actual, expected, limit: float) -> None:
    largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(expected))
    assert largest > 0.01
    for ours, theirs in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=limit * largest)


CASES = {
    "dense": ({"capacity": T}, {}),
    "window": ({"capacity": WINDOW + CHUNK, "policy": caches.Window(WINDOW)}, {"sliding_windows": (WINDOW, WINDOW)}),
    "windows of the model": ({"capacity": T, "chunk": CHUNK}, {"sliding_windows": (WINDOW, None)}),
    "h2o": ({"capacity": T, "policy": caches.H2O(4, normalize=True, value_norm=True)}, {}),
    "paged": ({"capacity": T, "storage": caches.Paged(16, B * T // 16)}, {}),
    "bfloat16 caches": ({"capacity": T, "dtype": jnp.bfloat16}, {"dtype": jnp.bfloat16}),
    "rows": ({"capacity": T, "rows": jnp.array([2, 0], jnp.int32)}, {}),
}


@pytest.mark.parametrize("name", quick(CASES, "dense", "window", "h2o", "bfloat16 caches", "rows"))
def test_weights_have_the_gradients_of_a_decoder_without_caches(name):
    options, fields = CASES[name]
    graph, weights = split(**fields)
    loss, gradients = jax.jit(jax.value_and_grad(functools.partial(in_chunks, graph, **options)))(weights)
    expected_loss, expected = jax.jit(jax.value_and_grad(functools.partial(at_once, graph)))(weights)
    kind = "bfloat16" if "bfloat16" in name else "float32"
    assert abs(loss - expected_loss) < tolerances.CACHE_GRADIENT[kind]
    assert_same_gradients(gradients, expected, tolerances.CACHE_GRADIENT[kind])


def test_the_choice_of_heavy_hitters_is_a_constant(monkeypatch):
    """Caches that evict tokens, against the decoder without caches under equivalent masks."""
    graph, weights = split()
    options = {"capacity": 16, "policy": caches.H2O(recent=3)}
    gradients = jax.jit(jax.grad(functools.partial(in_chunks, graph, **options)))(weights)

    model = nnx.merge(graph, weights)
    layers, run = model.init_caches(batch_size=B, **options), jax.jit(lambda *x: nnx.merge(graph, weights)(*x).caches)
    masks = np.zeros((CONFIG.num_layers, B, CONFIG.num_kv_heads, T, T), bool)
    for start in range(0, T, CHUNK):
        layers = run(READ[:, start : start + CHUNK], None, layers)
        for layer, cache in enumerate(layers):
            held = np.asarray(cache.positions)
            masks[layer, :, :, start : start + CHUNK] = (held[..., None] == np.arange(T)).any(2)[:, :, None]
    masks &= np.tril(np.ones((T, T), bool))
    assert masks.sum() < CONFIG.num_layers * B * CONFIG.num_kv_heads * T * (T + 1) / 2, "some tokens went"

    token = jnp.arange(T, dtype=jnp.int32)[None]
    block_masks = tuple(pa.BlockMask.from_mask(pa.masks.dense(jnp.asarray(mask)), token, token) for mask in masks)
    monkeypatch.setattr(decoder_module, "block_masks", lambda *_: block_masks)
    expected = jax.jit(jax.grad(functools.partial(at_once, graph)))(weights)
    assert_same_gradients(gradients, expected, tolerances.CACHE_GRADIENT["float32"])


def test_a_prefix_that_caches_hold_has_gradients():
    """Prefix tuning: differentiates the earlier cache content, here by a factor of all values."""
    graph, weights = split()
    model = nnx.merge(graph, weights)
    layers = jax.jit(lambda layers: model(READ[:, :CHUNK], caches=layers).caches)(
        model.init_caches(batch_size=B, capacity=T)
    )

    @jax.jit
    def loss(factor):
        scaled = [dataclasses.replace(cache, value=factor * cache.value) for cache in layers]
        return step(graph, None, weights, scaled, (READ[:, CHUNK:], jnp.asarray(NEXT[:, CHUNK:])))[1]

    eps = tolerances.CHECK_GRADS_STEP
    expected = (loss(1 + eps) - loss(1 - eps)) / (2 * eps)
    assert abs(expected) > 0.01
    np.testing.assert_allclose(jax.grad(loss)(1.0), expected, rtol=tolerances.CHECK_GRADS)


def test_a_cached_decoder_has_gradients():
    graph, weights = split()

    @jax.jit
    @jax.grad
    def gradients(weights):
        decoder = CachedDecoder(nnx.merge(graph, weights), batch_size=B, capacity=T)
        calls = zip(pieces(READ), pieces(NEXT), strict=True)
        return sum(surprise(decoder(tokens).logits, following) for tokens, following in calls)

    expected = jax.jit(jax.grad(functools.partial(at_once, graph)))(weights)
    assert_same_gradients(gradients(weights), expected, tolerances.CACHE_GRADIENT["float32"])


STORAGES = {"int8": caches.Int8(), "float8": caches.Float8(), "paged int4": caches.Paged(16, 4, caches.Int4(8))}


@pytest.mark.parametrize("name", quick(STORAGES, "int8"))
def test_only_weights_above_a_quantized_cache_have_gradients(name):
    graph, weights = split()
    options = {"capacity": T, "storage": STORAGES[name], "policy": caches.H2O(recent=4)}
    loss = functools.partial(in_chunks, graph, **options)
    with pytest.raises(NotImplementedError, match=r"has no gradient|have no gradient"):
        jax.make_jaxpr(jax.grad(loss))(weights)

    graph, head, rest = nnx.split(nnx.merge(graph, weights), nnx.PathContains("head"), ...)
    gradient = jax.jit(jax.grad(lambda head: in_chunks(graph, nnx.merge_state(head, rest), **options)))(head)
    assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(gradient)) > 0.01
