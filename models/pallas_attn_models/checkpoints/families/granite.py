"""Granite 3 (IBM): multipliers of embedding, residual stream, attention and logits."""

from pallas_attn_models.checkpoints.families.names import LLAMA_LAYER, OUTER
from pallas_attn_models.checkpoints.family import Family
from pallas_attn_models.checkpoints.ropes import Rope
from pallas_attn_models.checkpoints.settings import (
    HEAD_DIM,
    INTERMEDIATE,
    SIZES,
    Field,
    activation,
    eos,
    epsilon,
    flag,
    inverted,
    kv_heads,
    positions,
    tied,
)

FAMILY = Family(
    name="granite",
    architectures=("GraniteForCausalLM",),
    settings=(
        *SIZES,
        INTERMEDIATE,
        kv_heads(),
        HEAD_DIM,
        positions(2048),
        epsilon("rms_norm_eps", 1e-6),
        Rope(),
        flag("attention_bias", "qkv_bias output_bias", False),
        flag("mlp_bias", "mlp_bias", False),
        activation(),
        tied(False),
        eos(2),
        Field("embedding_multiplier", "embedding_scale", 1.0),
        Field("residual_multiplier", "residual_scale", 1.0),
        Field("attention_multiplier", "attention_scale", 1.0),
        Field("logits_scaling", "logit_scale", 1.0, **inverted("logits_scaling", lambda x: 1 / x, lambda x: 1 / x)),
    ),
    tensors=OUTER,
    layer_tensors=LLAMA_LAYER,
)
