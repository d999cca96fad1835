"""GLM-4 (THUDM/glm-4-9b-hf, arXiv:2406.12793)."""

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

FAMILY = Family(
    name="glm",
    architectures=("GlmForCausalLM",),
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
    tensors=OUTER,
    layer_tensors=(*PRE_NORMS, *ATTENTION, *JOINT_GATED_MLP),
)
