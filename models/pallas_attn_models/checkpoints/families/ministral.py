"""Ministral (mistralai/Ministral-8B): Mistral with windows on some layers."""

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
from pallas_attn_models.checkpoints.windows import Windows

FAMILY = Family(
    name="ministral",
    architectures=("MinistralForCausalLM",),
    settings=(
        *SIZES,
        INTERMEDIATE,
        kv_heads(8),
        HEAD_DIM,
        positions(131072),
        epsilon("rms_norm_eps", 1e-6),
        Windows(4096, lambda source, layers: [True] * layers),
        Rope(),
        activation(),
        tied(False),
        eos(2),
    ),
    tensors=OUTER,
    layer_tensors=LLAMA_LAYER,
)
