"""Qwen2 and Qwen2.5 (arXiv:2407.10671, arXiv:2412.15115)."""

from pallas_attn_models.checkpoints.families.names import LLAMA_LAYER, OUTER
from pallas_attn_models.checkpoints.family import Family
from pallas_attn_models.checkpoints.ropes import Rope
from pallas_attn_models.checkpoints.settings import (
    HEAD_DIM,
    INTERMEDIATE,
    SIZES,
    activation,
    eos,
    epsilon,
    kv_heads,
    positions,
    tied,
)
from pallas_attn_models.checkpoints.windows import Windows, from_layer

FAMILY = Family(
    name="qwen2",
    architectures=("Qwen2ForCausalLM",),
    settings=(
        *SIZES,
        INTERMEDIATE,
        kv_heads(32),
        HEAD_DIM,
        positions(32768),
        epsilon("rms_norm_eps", 1e-6),
        Windows(4096, from_layer("max_window_layers", 28), has_flag=True),
        Rope(),
        activation(),
        tied(False),
        eos(None),
    ),
    constants={"qkv_bias": True},
    supported={"use_mrope": (False, None)},
    tensors=OUTER,
    layer_tensors=LLAMA_LAYER,
)
