"""DeepSeek-V3 and R1 (arXiv:2412.19437): latent attention, experts chosen by sigmoids with a bias."""

from pallas_attn_models.checkpoints.families.latent import (
    IRRELEVANT,
    LATENT_ATTENTION,
    Latent,
    LatentRope,
    query_tensors,
)
from pallas_attn_models.checkpoints.families.names import (
    GATED_MLP,
    OUTER,
    PRE_NORMS,
    experts,
    shared_expert,
)
from pallas_attn_models.checkpoints.family import Family
from pallas_attn_models.checkpoints.settings import (
    INTERMEDIATE,
    SIZES,
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
    name="deepseek_v3",
    architectures=("DeepseekV3ForCausalLM",),
    settings=(
        *SIZES,
        INTERMEDIATE,
        kv_heads(),
        Latent(),
        positions(4096),
        epsilon("rms_norm_eps", 1e-6),
        LatentRope(interleaved=True),
        flag("attention_bias", "qkv_bias output_bias", False),
        activation(),
        tied(False),
        eos(1),
        Field("n_routed_experts num_local_experts", "experts.num_experts", 256),
        Field("num_experts_per_tok", "experts.experts_per_token", 8),
        Field("moe_intermediate_size", "experts.intermediate_size", 2048),
        SharedSize(1),
        Field("routed_scaling_factor", "experts.scale", 2.5),
        Field("n_group", "experts.num_groups", 8),
        Field("topk_group", "experts.groups_per_token", 4),
        Field("norm_topk_prob", "experts.normalize", True),
        Derived("experts.score", lambda known: "sigmoid"),
        Derived("experts.correction", lambda known: True),
        FirstDense(3),
    ),
    supported={"moe_layer_freq": (None, 1), "topk_method": (None, "noaux_tc"), "scoring_func": (None, "sigmoid")},
    irrelevant=IRRELEVANT,
    tensors=OUTER,
    layer_tensors=(
        *PRE_NORMS,
        *LATENT_ATTENTION,
        *GATED_MLP,
        *linear("mlp.gate", "mlp.router"),
        *same("mlp.gate.e_score_correction_bias", "mlp.correction"),
        *experts("mlp.experts", "gate_proj", "up_proj", "down_proj"),
        *shared_expert("mlp.shared_experts"),
    ),
    variants=query_tensors,
)
