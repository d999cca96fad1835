"""DeepSeek-V2 (arXiv:2405.04434): latent attention, experts chosen from the best groups."""

import dataclasses
from collections.abc import Mapping
from typing import Any

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
    Source,
    activation,
    eos,
    epsilon,
    flag,
    kv_heads,
    positions,
    tied,
)
from pallas_attn_models.checkpoints.transforms import linear
from pallas_attn_models.checks import shown
from pallas_attn_models.decoder import DecoderConfig


@dataclasses.dataclass(frozen=True)
class _Groups:
    """``topk_method``: the best experts of all, or of the best groups."""

    def read(self, source: Source) -> Mapping[str, Any]:
        method = source.take("topk_method", default="greedy")
        if method not in ("greedy", "group_limited_greedy"):
            raise ValueError(f"topk_method: expected 'greedy' or 'group_limited_greedy', got {shown(method)}")
        groups, used = source.take("n_group", default=1), source.take("topk_group", default=1)
        if method == "greedy":
            groups, used = 1, 1
        return {"experts.num_groups": groups, "experts.groups_per_token": used}

    def write(self, config: DecoderConfig) -> Mapping[str, Any]:
        assert config.experts is not None
        groups, used = config.experts.num_groups, config.experts.groups_per_token
        return {"topk_method": "group_limited_greedy", "n_group": groups, "topk_group": used}


FAMILY = Family(
    name="deepseek_v2",
    architectures=("DeepseekV2ForCausalLM",),
    settings=(
        *SIZES,
        INTERMEDIATE,
        kv_heads(),
        Latent(),
        positions(2048),
        epsilon("rms_norm_eps", 1e-6),
        LatentRope(interleaved=True),
        flag("attention_bias", "qkv_bias output_bias", False),
        activation(),
        tied(False),
        eos(2),
        Field("n_routed_experts num_local_experts", "experts.num_experts", 64),
        Field("num_experts_per_tok", "experts.experts_per_token"),
        Field("moe_intermediate_size", "experts.intermediate_size", 1407),
        SharedSize(2),
        Field("routed_scaling_factor", "experts.scale", 1.0),
        _Groups(),
        Derived("experts.normalize", lambda known: False),
        FirstDense(0),
    ),
    supported={
        "moe_layer_freq": (None, 1),
        "norm_topk_prob": (False, None),
        "mlp_bias": (False,),
        "scoring_func": (None, "softmax"),
    },
    irrelevant=IRRELEVANT,
    tensors=OUTER,
    layer_tensors=(
        *PRE_NORMS,
        *LATENT_ATTENTION,
        *GATED_MLP,
        *linear("mlp.gate", "mlp.router"),
        *experts("mlp.experts", "gate_proj", "up_proj", "down_proj"),
        *shared_expert("mlp.shared_experts"),
    ),
    variants=query_tensors,
)
