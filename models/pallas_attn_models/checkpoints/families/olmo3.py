"""OLMo 3: OLMo 2 with windows on three of four layers."""

from pallas_attn_models.checkpoints.families.names import ATTENTION, GATED_MLP, OUTER, POST_NORMS, QK_NORM
from pallas_attn_models.checkpoints.family import Family
from pallas_attn_models.checkpoints.ropes import RopeByLayerType
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
from pallas_attn_models.checkpoints.windows import Windows, sliding_except_every

FAMILY = Family(
    name="olmo3",
    architectures=("Olmo3ForCausalLM",),
    settings=(
        *SIZES,
        INTERMEDIATE,
        kv_heads(),
        HEAD_DIM,
        positions(2048),
        epsilon("rms_norm_eps", 1e-5),
        Windows(4096, sliding_except_every(4)),
        RopeByLayerType(theta=500000.0),
        flag("attention_bias", "qkv_bias output_bias", False),
        activation(),
        tied(False),
        eos(50279),
    ),
    constants={"norm": "rms_float32", "norm_position": "post", "qk_norm": "vector"},
    tensors=OUTER,
    layer_tensors=(*POST_NORMS, *ATTENTION, *QK_NORM, *GATED_MLP),
)
