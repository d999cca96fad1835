"""StarCoder2 (arXiv:2402.19173)."""

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
from pallas_attn_models.checkpoints.windows import Windows

FAMILY = Family(
    name="starcoder2",
    architectures=("Starcoder2ForCausalLM",),
    settings=(
        *SIZES,
        INTERMEDIATE,
        kv_heads(2),
        HEAD_DIM,
        positions(4096),
        epsilon("norm_epsilon", 1e-5),
        Windows(None),
        Rope(),
        flag("use_bias", "qkv_bias output_bias mlp_bias", True),
        activation(default="gelu_pytorch_tanh"),
        tied(True),
        eos(50256),
    ),
    constants={"norm": "layer", "mlp_gated": False},
    supported={"norm_type": ("layer_norm", None), "mlp_type": ("default", None)},
    irrelevant={"activation_function": "repeats hidden_act"},
    tensors=OUTER,
    layer_tensors=(*PRE_NORMS, *ATTENTION, *linear("mlp.c_fc", "mlp.up"), *linear("mlp.c_proj", "mlp.down")),
)
