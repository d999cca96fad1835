"""OLMo 2 (arXiv:2501.00656): norms after attention and MLP, and over whole queries and keys."""

from pallas_attn_models.checkpoints.families.names import ATTENTION, GATED_MLP, OUTER, POST_NORMS, QK_NORM
from pallas_attn_models.checkpoints.family import Family
from pallas_attn_models.checkpoints.ropes import Rope
from pallas_attn_models.checkpoints.settings import (
    HEAD_DIM,
    INTERMEDIATE,
    SIZES,
    activation,
    eos,
    epsilon,
    flag,
    kv_heads,
    positions,
    tied,
)

FAMILY = Family(
    name="olmo2",
    architectures=("Olmo2ForCausalLM",),
    settings=(
        *SIZES,
        INTERMEDIATE,
        kv_heads(),
        HEAD_DIM,
        positions(2048),
        epsilon("rms_norm_eps", 1e-5),
        Rope(),
        flag("attention_bias", "qkv_bias output_bias", False),
        activation(),
        tied(False),
        eos(50279),
    ),
    constants={"norm": "rms_float32", "norm_position": "post", "qk_norm": "vector"},
    tensors=OUTER,
    layer_tensors=(*POST_NORMS, *ATTENTION, *QK_NORM, *GATED_MLP),
)
