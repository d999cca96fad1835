"""Command R and R+ (Cohere)."""

from pallas_attn_models.checkpoints.families.names import ATTENTION, GATED_MLP, OUTER, QK_NORM
from pallas_attn_models.checkpoints.family import Family
from pallas_attn_models.checkpoints.ropes import Rope
from pallas_attn_models.checkpoints.settings import (
    HEAD_DIM,
    INTERMEDIATE,
    SIZES,
    Choice,
    Field,
    activation,
    eos,
    epsilon,
    flag,
    kv_heads,
    positions,
    tied,
)
from pallas_attn_models.checkpoints.transforms import norm

FAMILY = Family(
    name="cohere",
    architectures=("CohereForCausalLM",),
    settings=(
        *SIZES,
        INTERMEDIATE,
        kv_heads(),
        HEAD_DIM,
        positions(8192),
        epsilon("layer_norm_eps", 1e-5),
        Rope(theta=500000.0, interleaved=True),
        Choice("use_qk_norm", "qk_norm", {False: None, True: "heads"}, False),
        flag("attention_bias", "qkv_bias output_bias", False),
        activation(),
        Field("logit_scale", "logit_scale", 0.0625),
        tied(True),
        eos(255001),
    ),
    constants={"norm": "layer_scale", "norm_position": "parallel"},
    tensors=OUTER,
    layer_tensors=(*norm("input_layernorm", "attention_norm"), *ATTENTION, *QK_NORM, *GATED_MLP),
)
