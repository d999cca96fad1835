"""Ministral 3 (mistralai/Ministral-3): YaRN, and queries that grow with the logarithm of the position."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from pallas_attn_models.checkpoints.families.names import LLAMA_LAYER, OUTER
from pallas_attn_models.checkpoints.family import Family
from pallas_attn_models.checkpoints.ropes import Rope
from pallas_attn_models.checkpoints.settings import (
    INTERMEDIATE,
    SIZES,
    Field,
    Source,
    activation,
    eos,
    epsilon,
    kv_heads,
    positions,
    tied,
)
from pallas_attn_models.checkpoints.windows import Windows
from pallas_attn_models.decoder import DecoderConfig

# The settings of a config.json without any, in transformers.
_ROPE = {
    "type": "yarn",
    "theta": 1e6,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}


@dataclasses.dataclass(frozen=True)
class _RopeWithTemperature(Rope):
    """Rotary settings that hold the temperature of the queries, too."""

    def read(self, source: Source) -> Mapping[str, Any]:
        settings = self._settings(source) or dict(self.parameters or {})
        beta = settings.pop("llama_4_scaling_beta", None)
        settings.pop("max_position_embeddings", None)  # repeats the one outside
        rope = self._rope(settings, source.known)
        temperature = None if beta is None else (beta, rope.original_max_position_embeddings)
        return {"rope": rope, "query_temperature": temperature}

    def write(self, config: DecoderConfig) -> Mapping[str, Any]:
        fields = dict(super().write(config))
        if config.query_temperature is None:
            return fields
        scaling = {**fields.pop("rope_scaling"), "llama_4_scaling_beta": config.query_temperature[0]}
        theta = fields.pop("rope_theta")
        return {**fields, "rope_parameters": {"rope_theta": theta, **scaling}}


FAMILY = Family(
    name="ministral3",
    architectures=("Ministral3ForCausalLM",),
    settings=(
        *SIZES,
        INTERMEDIATE,
        kv_heads(8),
        Field("head_dim", "head_dim", 128),
        positions(262144),
        epsilon("rms_norm_eps", 1e-5),
        Windows(None),
        _RopeWithTemperature(theta=1e6, parameters=_ROPE),
        activation(),
        tied(False),
        eos(2),
    ),
    tensors=OUTER,
    layer_tensors=LLAMA_LAYER,
)
