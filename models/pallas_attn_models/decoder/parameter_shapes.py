"""The shapes of a decoder's parameters by path, from its configuration and without a whole decoder."""

import functools

import jax.numpy as jnp
from flax import nnx

from pallas_attn_models.decoder.abstract import one_layer
from pallas_attn_models.decoder.config import DecoderConfig, LayerConfig
from pallas_attn_models.decoder.decoder import Decoder, DecoderLayer

_OPTIONS = {"dtype": jnp.float32, "param_dtype": jnp.float32, "implementation": None}


@functools.lru_cache(maxsize=256)
def layer_shapes(config: DecoderConfig, layer: LayerConfig) -> dict[str, tuple[int, ...]]:
    """The parameters of a layer of this kind, by paths from the layer such as ``mlp.up.kernel``."""
    return _shapes(nnx.eval_shape(lambda: DecoderLayer(config, layer, rngs=nnx.Rngs(0), **_OPTIONS)))


@functools.lru_cache(maxsize=256)
def outer_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """The parameters outside the layers, by paths from the decoder."""
    shapes = _shapes(nnx.eval_shape(lambda: Decoder(one_layer(config), rngs=nnx.Rngs(0))))
    return {path: shape for path, shape in shapes.items() if not path.startswith("layers.")}


def _shapes(module: nnx.Module) -> dict[str, tuple[int, ...]]:
    flat = nnx.to_flat_state(nnx.state(module, nnx.Param))
    return {".".join(map(str, path)): tuple(parameter.shape) for path, parameter in flat}
