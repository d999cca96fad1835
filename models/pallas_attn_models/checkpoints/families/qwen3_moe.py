"""Qwen3-MoE (arXiv:2505.09388)."""

from pallas_attn_models.checkpoints.families.names import LLAMA_LAYER, OUTER, QK_NORM, experts
from pallas_attn_models.checkpoints.family import Family
from pallas_attn_models.checkpoints.ropes import Rope
from pallas_attn_models.checkpoints.settings import (
    HEAD_DIM,
    INTERMEDIATE,
    SIZES,
    DenseLayers,
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
from pallas_attn_models.checkpoints.windows import Windows

FAMILY = Family(
    name="qwen3_moe",
    architectures=("Qwen3MoeForCausalLM",),
    settings=(
        *SIZES,
        INTERMEDIATE,
        kv_heads(4),
        HEAD_DIM,
        positions(32768),
        epsilon("rms_norm_eps", 1e-6),
        Windows(4096, has_flag=True),
        Rope(),
        flag("attention_bias", "qkv_bias output_bias", False),
        activation(),
        tied(False),
        eos(None),
        Field("num_experts num_local_experts", "experts.num_experts", 128),
        Field("num_experts_per_tok", "experts.experts_per_token", 8),
        Field("moe_intermediate_size", "experts.intermediate_size", 768),
        Field("norm_topk_prob", "experts.normalize", False),
        DenseLayers(),
    ),
    constants={"qk_norm": "head"},
    irrelevant={"max_window_layers": "all layers have the window, or none"},
    tensors=OUTER,
    layer_tensors=(
        *LLAMA_LAYER,
        *QK_NORM,
        *linear("mlp.gate", "mlp.router"),
        *experts("mlp.experts", "gate_proj", "up_proj", "down_proj"),
    ),
)
