"""The caches of all layers as one pytree, in which layers with the same tokens share their index."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import keystr, tree_flatten_with_path

import pallas_attn as pa
from pallas_attn.caches import H2O, Dense, Int8, KVCache, Paged, Plain, Window
from pallas_attn_models.decoder import LayerCaches

B, CAPACITY, K, D = 2, 32, 2, 8


def make(policy=None, storage=None, capacity: int = CAPACITY) -> KVCache:
    sizes = {"batch_size": B, "capacity": capacity, "kv_heads": K, "head_dim": D}
    return pa.caches.init(policy, storage, **sizes, dtype="float32")


def size(tree) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def test_layers_of_one_kind_hold_one_index():
    layers = [make(), make(Window(8)), make(), make(Window(8)), make(storage=Int8()), make(capacity=48)]
    caches = LayerCaches(layers)
    assert len(caches) == 6
    assert [*caches] == [*caches[:]] == layers
    index = size((layers[0].positions, layers[0].lengths, layers[0].overflowed))
    assert size(caches) == sum(size(layer) for layer in layers) - 2 * index
    assert caches.distinct == (layers[0], layers[1], layers[4], layers[5])


def test_layers_that_may_hold_other_tokens_share_nothing():
    heads = [make(H2O(4)), make(H2O(4))]
    assert size(LayerCaches(heads)) == sum(map(size, heads))
    # A draft model lags behind the model.
    assert size(LayerCaches([make()], [make()])) == 2 * size(make())


@pytest.mark.parametrize("storage", [Plain(), Paged(16, 3)], ids=["plain", "paged"])
def test_a_jitted_function_reads_and_returns_the_index_once(storage):
    """Rows of one cache after steps under jit, with the index passed on once, equal those of caches by themselves."""
    rng = np.random.default_rng(0)
    alone = [make(Dense(), storage), make(Dense(), storage)]
    caches = LayerCaches(alone)

    @jax.jit
    def step(caches, tokens, positions):
        keys = iter(tokens)
        after = caches.map(lambda cache: cache.append(*next(keys), positions))
        # Donated and looped over as a Generator does.
        return jax.lax.fori_loop(0, 1, lambda _, caches: caches.map(lambda c: c.truncate(c.lengths - 1)), after)

    for start in (0, 4, 8):
        tokens = rng.standard_normal((2, 2, B, 5, K, D)).astype(np.float32)
        positions = np.broadcast_to(np.arange(start, start + 5, dtype=np.int32), (B, 5))
        caches = step(caches, tokens, positions)
        alone = [cache.append(*pair, positions) for cache, pair in zip(alone, tokens, strict=True)]
        alone = [cache.truncate(cache.lengths - 1) for cache in alone]
    assert caches[1].positions is caches[0].positions
    for one, expected in zip(caches, alone, strict=True):
        jax.tree.map(np.testing.assert_array_equal, one, expected)
    names = [keystr(path) for path, _ in tree_flatten_with_path(step.lower(caches, tokens, positions).out_info)[0]]
    assert sum("lengths" in name for name in names) == 1
    assert sum("users" in name for name in names) == (storage != Plain())


def test_caches_of_a_model_can_be_replaced():
    caches = LayerCaches([make(), make()], [make()])
    filled = [cache.append(*jnp.ones((2, B, 1, K, D)), jnp.zeros((B, 1), jnp.int32)) for cache in caches[:2]]
    after = jax.tree.map(jnp.asarray, caches.replaced(slice(0, 2), filled))
    assert [cache.lengths.tolist() for cache in after] == [[1, 1], [1, 1], [0, 0]]
    assert jax.tree.structure(after) == jax.tree.structure(caches)
