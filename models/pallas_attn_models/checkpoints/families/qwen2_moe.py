"""Qwen1.5-MoE and Qwen2-MoE (arXiv:2407.10671): experts beside a shared one with a gate."""

from pallas_attn_models.checkpoints.families.names import LLAMA_LAYER, OUTER, experts, shared_expert
from pallas_attn_models.checkpoints.family import Family
from pallas_attn_models.checkpoints.ropes import Rope
from pallas_attn_models.checkpoints.settings import (
    HEAD_DIM,
    INTERMEDIATE,
    SIZES,
    DenseLayers,
    Derived,
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
from pallas_attn_models.checkpoints.windows import Windows, from_layer

FAMILY = Family(
    name="qwen2_moe",
    architectures=("Qwen2MoeForCausalLM",),
    settings=(
        *SIZES,
        INTERMEDIATE,
        kv_heads(16),
        HEAD_DIM,
        positions(32768),
        epsilon("rms_norm_eps", 1e-6),
        Windows(4096, from_layer("max_window_layers", 28), has_flag=True),
        Rope(),
        flag("qkv_bias", "qkv_bias", True),
        activation(),
        tied(False),
        eos(None),
        Field("num_experts num_local_experts", "experts.num_experts", 60),
        Field("num_experts_per_tok", "experts.experts_per_token", 4),
        Field("moe_intermediate_size", "experts.intermediate_size", 1408),
        Field("shared_expert_intermediate_size", "experts.shared_size", 5632),
        Field("norm_topk_prob", "experts.normalize", False),
        Derived("experts.shared_gate", lambda known: True),
        DenseLayers(),
    ),
    tensors=OUTER,
    layer_tensors=(
        *LLAMA_LAYER,
        *linear("mlp.gate", "mlp.router"),
        *experts("mlp.experts", "gate_proj", "up_proj", "down_proj"),
        *shared_expert("mlp.shared_expert"),
        *linear("mlp.shared_expert_gate", "mlp.shared_gate"),
    ),
)
