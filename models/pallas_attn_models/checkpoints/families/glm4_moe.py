"""GLM-4.5 (arXiv:2508.06471): experts chosen as in DeepSeek-V3."""

from pallas_attn_models.checkpoints.families.names import LLAMA_LAYER, OUTER, QK_NORM, experts, shared_expert
from pallas_attn_models.checkpoints.family import Family
from pallas_attn_models.checkpoints.ropes import Rope
from pallas_attn_models.checkpoints.settings import (
    HEAD_DIM,
    INTERMEDIATE,
    SIZES,
    Choice,
    Derived,
    Field,
    FirstDense,
    SharedSize,
    activation,
    eos,
    epsilon,
    flag,
    kv_heads,
    positions,
    tied,
)
from pallas_attn_models.checkpoints.transforms import linear, same

FAMILY = Family(
    name="glm4_moe",
    architectures=("Glm4MoeForCausalLM",),
    settings=(
        *SIZES,
        INTERMEDIATE,
        kv_heads(8),
        HEAD_DIM,
        positions(131072),
        epsilon("rms_norm_eps", 1e-5),
        Rope(partial=0.5),
        flag("attention_bias", "qkv_bias", False),
        Choice("use_qk_norm", "qk_norm", {False: None, True: "head"}, False),
        activation(),
        tied(False),
        eos(None),
        Field("n_routed_experts num_local_experts", "experts.num_experts", 128),
        Field("num_experts_per_tok", "experts.experts_per_token", 8),
        Field("moe_intermediate_size", "experts.intermediate_size", 1408),
        SharedSize(1),
        Field("norm_topk_prob", "experts.normalize", True),
        Field("routed_scaling_factor", "experts.scale", 1.0),
        Field("n_group", "experts.num_groups", 1),
        Field("topk_group", "experts.groups_per_token", 1),
        Derived("experts.score", lambda known: "sigmoid"),
        Derived("experts.correction", lambda known: True),
        FirstDense(1),
    ),
    irrelevant={"num_nextn_predict_layers": "layers that predict further tokens, which generation here does not use"},
    tensors=OUTER,
    layer_tensors=(
        *LLAMA_LAYER,
        *QK_NORM,
        *linear("mlp.gate", "mlp.router"),
        *same("mlp.gate.e_score_correction_bias", "mlp.correction"),
        *experts("mlp.experts", "gate_proj", "up_proj", "down_proj"),
        *shared_expert("mlp.shared_experts"),
    ),
)
