"""GLM-4-0414 (THUDM): norms before and after attention and MLP."""

from pallas_attn_models.checkpoints.families.names import ATTENTION, JOINT_GATED_MLP, OUTER, PRE_NORMS
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
from pallas_attn_models.checkpoints.transforms import norm

FAMILY = Family(
    name="glm4",
    architectures=("Glm4ForCausalLM",),
    settings=(
        *SIZES,
        INTERMEDIATE,
        kv_heads(2),
        Field("head_dim", "head_dim", 128),
        positions(131072),
        epsilon("rms_norm_eps", 1.5625e-07),
        Rope(partial=0.5, interleaved=True),
        flag("attention_bias", "qkv_bias", True),
        activation(),
        tied(False),
        eos([151329, 151336, 151338]),
    ),
    constants={"norm_position": "both"},
    tensors=OUTER,
    layer_tensors=(
        *PRE_NORMS,
        *norm("post_self_attn_layernorm", "attention_out_norm"),
        *norm("post_mlp_layernorm", "mlp_out_norm"),
        *ATTENTION,
        *JOINT_GATED_MLP,
    ),
)
