"""Mistral (arXiv:2310.06825)."""

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
    name="mistral",
    architectures=("MistralForCausalLM",),
    settings=(
        *SIZES,
        INTERMEDIATE,
        kv_heads(8),
        HEAD_DIM,
        positions(131072),
        epsilon("rms_norm_eps", 1e-6),
        Windows(4096),
        Rope(),
        activation(),
        tied(False),
        eos(2),
    ),
    supported={"attention_bias": (False, None), "mlp_bias": (False, None)},
    tensors=OUTER,
    layer_tensors=LLAMA_LAYER,
)
