"""A decoder without values: its parameters have shapes and dtypes only."""

import dataclasses

from flax import nnx
from jax.typing import DTypeLike

from pallas_attn_models.decoder.config import PER_LAYER, DecoderConfig, LayerConfig
from pallas_attn_models.decoder.decoder import Decoder, DecoderLayer, check_dtype


def abstract_decoder(
    config: DecoderConfig,
    *,
    dtype: DTypeLike,
    param_dtype: DTypeLike | None = None,
    implementation: str | None = None,
) -> Decoder:
    """The same as ``nnx.eval_shape(lambda: Decoder(config, ..))``, but traces each kind of layer only once.

    The arguments are those of :class:`Decoder`.
    """
    dtype = check_dtype("dtype", dtype)
    param_dtype = dtype if param_dtype is None else check_dtype("param_dtype", param_dtype)
    dtypes = {"dtype": dtype, "param_dtype": param_dtype, "implementation": implementation}
    model = nnx.eval_shape(lambda: Decoder(one_layer(config), rngs=nnx.Rngs(0), **dtypes))
    kinds: dict[LayerConfig, tuple[nnx.GraphDef[DecoderLayer], nnx.State]] = {}
    layers = []
    for index in range(config.num_layers):
        kind = config.layer(index)
        if kind not in kinds:
            layer = nnx.eval_shape(lambda kind=kind: DecoderLayer(config, kind, rngs=nnx.Rngs(0), **dtypes))
            kinds[kind] = nnx.split(layer)
        layers.append(nnx.merge(*kinds[kind], copy=True))
    model.config, model.layers = config, nnx.List(layers)
    return model


def one_layer(config: DecoderConfig) -> DecoderConfig:
    """The same configuration with the first layer only."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    per_layer = {name: values[name][:1] for name in PER_LAYER}
    return dataclasses.replace(config, num_layers=1, dense_layers=(), **per_layer)
