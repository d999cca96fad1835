"""Nemotron-4 and Minitron (arXiv:2402.16819, arXiv:2407.14679)."""

from pallas_attn_models.checkpoints.families.names import ATTENTION, OUTER, PRE_NORMS
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
from pallas_attn_models.checkpoints.transforms import linear

FAMILY = Family(
    name="nemotron",
    architectures=("NemotronForCausalLM",),
    settings=(
        *SIZES,
        INTERMEDIATE,
        kv_heads(),
        HEAD_DIM,
        positions(4096),
        epsilon("norm_eps layer_norm_eps", 1e-5),
        Rope(partial=0.5, partial_name="partial_rotary_factor"),
        flag("attention_bias", "qkv_bias output_bias", False),
        flag("mlp_bias", "mlp_bias", False),
        activation(default="relu2"),
        tied(False),
        eos(3),
    ),
    constants={"norm": "layer_offset", "mlp_gated": False},
    tensors=OUTER,
    layer_tensors=(*PRE_NORMS, *ATTENTION, *linear("mlp.up_proj", "mlp.up"), *linear("mlp.down_proj", "mlp.down")),
)
