"""Granite 3 MoE (IBM)."""

from pallas_attn_models.checkpoints.families.names import ATTENTION, OUTER, PRE_NORMS
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
    inverted,
    kv_heads,
    positions,
    tied,
)
from pallas_attn_models.checkpoints.transforms import Tensor, linear

FAMILY = Family(
    name="granitemoe",
    architectures=("GraniteMoeForCausalLM",),
    settings=(
        *SIZES,
        Field("intermediate_size", "intermediate_size experts.intermediate_size"),
        kv_heads(),
        HEAD_DIM,
        positions(2048),
        epsilon("rms_norm_eps", 1e-6),
        Rope(),
        flag("attention_bias", "qkv_bias output_bias", False),
        activation(),
        tied(False),
        eos(2),
        Field("embedding_multiplier", "embedding_scale", 1.0),
        Field("residual_multiplier", "residual_scale", 1.0),
        Field("attention_multiplier", "attention_scale", 1.0),
        Field("logits_scaling", "logit_scale", 1.0, **inverted("logits_scaling", lambda x: 1 / x, lambda x: 1 / x)),
        Field("num_local_experts", "experts.num_experts", 8),
        Field("num_experts_per_tok", "experts.experts_per_token", 2),
    ),
    tensors=OUTER,
    layer_tensors=(
        *PRE_NORMS,
        *ATTENTION,
        *linear("block_sparse_moe.router.layer", "mlp.router"),
        Tensor(
            "block_sparse_moe.input_linear.weight", ("mlp.expert_gate.kernel", "mlp.expert_up.kernel"), transposed=True
        ),
        Tensor("block_sparse_moe.output_linear.weight", ("mlp.expert_down.kernel",), transposed=True),
    ),
)
