"""Qwen3 (arXiv:2505.09388)."""

from pallas_attn_models.checkpoints.families.names import LLAMA_LAYER, OUTER, QK_NORM
from pallas_attn_models.checkpoints.family import Family
from pallas_attn_models.checkpoints.ropes import Rope
from pallas_attn_models.checkpoints.settings import (
    INTERMEDIATE,
    SIZES,
    Field,
    activation,
    eos,
    epsilon,
    flag,
    kv_heads,
    positions,
    tied,
)
from pallas_attn_models.checkpoints.windows import Windows, from_layer

FAMILY = Family(
    name="qwen3",
    architectures=("Qwen3ForCausalLM",),
    settings=(
        *SIZES,
        INTERMEDIATE,
        kv_heads(32),
        Field("head_dim", "head_dim", 128),
        positions(32768),
        epsilon("rms_norm_eps", 1e-6),
        Windows(4096, from_layer("max_window_layers", 28), has_flag=True),
        Rope(),
        flag("attention_bias", "qkv_bias output_bias", False),
        activation(),
        tied(False),
        eos(None),
    ),
    constants={"qk_norm": "head"},
    tensors=OUTER,
    layer_tensors=(*LLAMA_LAYER, *QK_NORM),
)
