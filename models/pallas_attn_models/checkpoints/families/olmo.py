"""OLMo (arXiv:2402.00838): norms without weights."""

from pallas_attn_models.checkpoints.families.names import ATTENTION, GATED_MLP, OUTER
from pallas_attn_models.checkpoints.family import Family
from pallas_attn_models.checkpoints.ropes import Rope
from pallas_attn_models.checkpoints.settings import (
    HEAD_DIM,
    INTERMEDIATE,
    SIZES,
    Field,
    activation,
    eos,
    flag,
    kv_heads,
    positions,
    tied,
)

FAMILY = Family(
    name="olmo",
    architectures=("OlmoForCausalLM",),
    settings=(
        *SIZES,
        INTERMEDIATE,
        kv_heads(),
        HEAD_DIM,
        positions(2048),
        Rope(),
        flag("attention_bias", "qkv_bias output_bias", False),
        Field("clip_qkv", "qkv_clip", None),
        activation(),
        tied(False),
        eos(50279),
    ),
    constants={"norm": "layer_plain", "rms_norm_eps": 1e-5},
    tensors=OUTER,
    layer_tensors=(*ATTENTION, *GATED_MLP),
)
