"""SmolLM3 (Hugging Face): no rotation in every fourth layer."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from pallas_attn_models.checkpoints.families.names import LLAMA_LAYER, OUTER
from pallas_attn_models.checkpoints.family import Family
from pallas_attn_models.checkpoints.ropes import Rope
from pallas_attn_models.checkpoints.settings import (
    HEAD_DIM,
    INTERMEDIATE,
    SIZES,
    Source,
    activation,
    eos,
    epsilon,
    flag,
    kv_heads,
    positions,
    tied,
)
from pallas_attn_models.checkpoints.windows import Windows
from pallas_attn_models.checks import require_size, shown
from pallas_attn_models.decoder import DecoderConfig


@dataclasses.dataclass(frozen=True)
class _RopePerLayer(Rope):
    """Rotary settings with a list of the layers that use them, as 1 and 0."""

    def read(self, source: Source) -> Mapping[str, Any]:
        rope = super().read(source)["rope"]
        layers = source.layers()
        interval = source.take("no_rope_layer_interval", default=4)
        require_size("no_rope_layer_interval", interval)
        default = [int((layer + 1) % interval != 0) for layer in range(layers)]
        used = source.take("no_rope_layers", default=default)
        if not isinstance(used, list) or len(used) != layers or not all(one in (0, 1) for one in used):
            raise ValueError(f"no_rope_layers: expected {layers} of 0 or 1, got {shown(used)}")
        if all(used):
            return {"rope": rope, "layer_ropes": ()}
        return {"rope": rope, "layer_ropes": tuple(rope if one else None for one in used)}

    def write(self, config: DecoderConfig) -> Mapping[str, Any]:
        used = [int(config.layer(index).rope is not None) for index in range(config.num_layers)]
        return {**super().write(config), "no_rope_layers": used}


def _without_rope(source: Source, layers: int) -> list[bool]:
    """Layers without rotation have the window, if there is one."""
    return [rope is None for rope in source.known["layer_ropes"] or [source.known["rope"]] * layers]


FAMILY = Family(
    name="smollm3",
    architectures=("SmolLM3ForCausalLM",),
    settings=(
        *SIZES,
        INTERMEDIATE,
        kv_heads(4),
        HEAD_DIM,
        positions(32768),
        epsilon("rms_norm_eps", 1e-6),
        _RopePerLayer(theta=2e6),
        Windows(None, _without_rope, has_flag=True),
        flag("attention_bias", "qkv_bias output_bias", False),
        flag("mlp_bias", "mlp_bias", False),
        activation(),
        tied(True),
        eos(128001),
    ),
    supported={"pretraining_tp": (None, 1, 2)},  # not used by transformers
    irrelevant={"max_window_layers": "layer_types says which layers have the window"},
    tensors=OUTER,
    layer_tensors=LLAMA_LAYER,
)
