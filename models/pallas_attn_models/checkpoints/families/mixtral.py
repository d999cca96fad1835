"""Mixtral (arXiv:2401.04088)."""

from pallas_attn_models.checkpoints.families.names import ATTENTION, OUTER, PRE_NORMS, experts
from pallas_attn_models.checkpoints.family import Family
from pallas_attn_models.checkpoints.ropes import Rope
from pallas_attn_models.checkpoints.settings import (
    HEAD_DIM,
    SIZES,
    Field,
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
    name="mixtral",
    architectures=("MixtralForCausalLM",),
    settings=(
        *SIZES,
        Field("intermediate_size", "intermediate_size experts.intermediate_size"),
        kv_heads(8),
        HEAD_DIM,
        positions(131072),
        epsilon("rms_norm_eps", 1e-5),
        Windows(None),
        Rope(theta=1e6),
        activation(),
        tied(False),
        eos(2),
        Field("num_local_experts", "experts.num_experts", 8),
        Field("num_experts_per_tok", "experts.experts_per_token", 2),
    ),
    irrelevant={"router_jitter_noise": "for training in PyTorch"},
    tensors=OUTER,
    layer_tensors=(
        *PRE_NORMS,
        *ATTENTION,
        *linear("block_sparse_moe.gate", "mlp.router"),
        *experts("block_sparse_moe.experts", "w1", "w3", "w2"),
    ),
)
