"""OLMoE (arXiv:2409.02060)."""

from pallas_attn_models.checkpoints.families.names import ATTENTION, OUTER, PRE_NORMS, QK_NORM, experts
from pallas_attn_models.checkpoints.family import Family
from pallas_attn_models.checkpoints.ropes import Rope
from pallas_attn_models.checkpoints.settings import (
    HEAD_DIM,
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
from pallas_attn_models.checkpoints.transforms import linear

FAMILY = Family(
    name="olmoe",
    architectures=("OlmoeForCausalLM",),
    settings=(
        *SIZES,
        Field("intermediate_size", "intermediate_size experts.intermediate_size"),
        kv_heads(),
        HEAD_DIM,
        positions(4096),
        epsilon("rms_norm_eps", 1e-5),
        Rope(),
        flag("attention_bias", "qkv_bias output_bias", False),
        Field("clip_qkv", "qkv_clip", None),
        activation(),
        tied(False),
        eos(50279),
        Field("num_experts num_local_experts", "experts.num_experts", 64),
        Field("num_experts_per_tok", "experts.experts_per_token", 8),
        Field("norm_topk_prob", "experts.normalize", False),
    ),
    constants={"qk_norm": "vector"},
    tensors=OUTER,
    layer_tensors=(
        *PRE_NORMS,
        *ATTENTION,
        *QK_NORM,
        *linear("mlp.gate", "mlp.router"),
        *experts("mlp.experts", "gate_proj", "up_proj", "down_proj"),
    ),
)
