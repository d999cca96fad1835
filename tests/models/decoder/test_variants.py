"""Variants of the decoder: what a model lacks leaves no operation in its graph."""

import dataclasses
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pallas_attn_models.decoder import Decoder, DecoderConfig, ExpertsConfig, LatentConfig, LayerSizes, RopeConfig
from tests import tolerances

PLAIN = DecoderConfig(
    vocab_size=32,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=4,
    head_dim=8,
    rope=None,
    tie_word_embeddings=True,
)
EXPERTS = ExpertsConfig(num_experts=4, experts_per_token=2, intermediate_size=16)

# name -> fields, and operations that only they have.
VARIANTS = {
    "rope": ({"rope": RopeConfig()}, {"cos", "sin"}),
    "softcap of attention": ({"attention_softcap": 5.0}, {"tanh"}),
    "softcap of logits": ({"logit_softcap": 5.0}, {"tanh"}),
    "alibi": ({"alibi": 1.0}, {"abs"}),
    "clipped": ({"qkv_clip": 1.0}, set()),
    "temperature": ({"query_temperature": (0.1, 8)}, {"log1p"}),
    "exact gelu": ({"activation": "gelu"}, {"erfc"}),
    "experts": ({"experts": EXPERTS}, {"top_k", "ragged_dot_general"}),
    "learned positions": ({"learned_positions": 16}, set()),
    "biases": ({"qkv_bias": True, "output_bias": True, "mlp_bias": True}, set()),
    "sinks": ({"attention_sinks": True}, set()),
    "norms of queries and keys": ({"qk_norm": "head"}, set()),
    "norms after, too": ({"norm_position": "both"}, set()),
    "scales": ({"embedding_scale": 2.0, "residual_scale": 0.5, "logit_scale": 3.0}, set()),
    "layer norm": ({"norm": "layer"}, set()),
    "latent": ({"latent": LatentConfig(8, 8, 4, 6)}, set()),
}


def operations(config: DecoderConfig) -> Counter:
    """The operations of one call, by name."""
    model = Decoder(config, rngs=nnx.Rngs(0), implementation="reference")
    counted = Counter()

    def count(jaxpr) -> None:
        for equation in jaxpr.eqns:
            counted[equation.primitive.name] += 1
            for value in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
                if hasattr(value, "eqns"):
                    count(value)
                elif hasattr(value, "jaxpr"):
                    count(value.jaxpr)

    count(jax.make_jaxpr(lambda tokens: model(tokens).logits)(jnp.zeros((1, 4), jnp.int32)).jaxpr)
    return counted


@pytest.fixture(scope="module")
def plain() -> Counter:
    return operations(PLAIN)


def test_a_plain_model_has_none_of_them(plain):
    assert not plain.keys() & set().union(*(added for _, added in VARIANTS.values()))


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_changes_operations(name, plain):
    fields, added = VARIANTS[name]
    counted = operations(dataclasses.replace(PLAIN, **fields))
    assert added <= counted.keys(), counted
    assert counted != plain


def test_layers_of_different_sizes_decode_as_they_read():
    sizes = (LayerSizes(4, 2, 16, 24), LayerSizes(6, 1, 8, 40))
    config = dataclasses.replace(PLAIN, rope=RopeConfig(), layer_sizes=sizes, sliding_windows=(None, 3))
    model = Decoder(config, rngs=nnx.Rngs(0), implementation="reference")
    tokens = jax.random.randint(jax.random.key(0), (2, 9), 0, 32)
    caches = model.init_caches(batch_size=2, capacity=32, chunk=4)
    assert [cache.view().key.shape[2:] for cache in caches] == [(2, 16), (1, 8)]
    assert caches[1].capacity < caches[0].capacity
    logits = []
    for start in (0, 4, 8):
        out = model(tokens[:, start : start + 4], caches=caches)
        caches, logits = out.caches, [*logits, out.logits]
    read = model(tokens).logits
    np.testing.assert_allclose(jnp.concatenate(logits, axis=1), read, rtol=0, atol=tolerances.CACHED_LOGITS)
