"""Phi-3, Phi-3.5 and Phi-4 (arXiv:2404.14219, arXiv:2412.08905), also the mini ones with LongRoPE."""

from pallas_attn_models.checkpoints.families.names import JOINT_GATED_MLP, OUTER, PRE_NORMS
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
from pallas_attn_models.checkpoints.transforms import linear
from pallas_attn_models.checkpoints.windows import Windows

FAMILY = Family(
    name="phi3",
    architectures=("Phi3ForCausalLM",),
    settings=(
        *SIZES,
        INTERMEDIATE,
        kv_heads(),
        HEAD_DIM,
        positions(4096),
        epsilon("rms_norm_eps", 1e-5),
        Windows(None),
        Rope(partial=1.0, has_original=True),
        activation(),
        tied(False),
        eos(32000),
    ),
    supported={
        "attention_bias": (False, None),
        "mlp_bias": (False, None),
        "full_attn_mod": (1, None),
        "lm_head_bias": (False, None),
        "interpolate_factor": (1, None),
    },
    tensors=OUTER,
    layer_tensors=(
        *PRE_NORMS,
        *linear("self_attn.qkv_proj", "attention.query", "attention.key", "attention.value"),
        *linear("self_attn.o_proj", "attention.output"),
        *JOINT_GATED_MLP,
    ),
)
