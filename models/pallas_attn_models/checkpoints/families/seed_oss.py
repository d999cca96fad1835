"""Seed-OSS (ByteDance)."""

from pallas_attn_models.checkpoints.families.names import LLAMA_LAYER, OUTER
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

FAMILY = Family(
    name="seed_oss",
    architectures=("SeedOssForCausalLM",),
    settings=(
        *SIZES,
        INTERMEDIATE,
        kv_heads(8),
        Field("head_dim", "head_dim", 128),
        positions(524288),
        epsilon("rms_norm_eps", 1e-6),
        Rope(),
        flag("attention_bias", "qkv_bias", True),
        flag("attention_out_bias", "output_bias", False),
        flag("mlp_bias", "mlp_bias", False),
        activation(),
        tied(False),
        eos(2),
    ),
    tensors=OUTER,
    layer_tensors=LLAMA_LAYER,
)
