"""Gemma (arXiv:2403.08295)."""

from pallas_attn_models.checkpoints.families.names import LLAMA_LAYER, OUTER
from pallas_attn_models.checkpoints.family import Family
from pallas_attn_models.checkpoints.ropes import Rope
from pallas_attn_models.checkpoints.settings import (
    INTERMEDIATE,
    SIZES,
    Choice,
    Derived,
    Field,
    eos,
    epsilon,
    flag,
    kv_heads,
    positions,
    root_of_hidden,
    tied,
)

# Old files say "gelu" and mean its approximation by tanh.
_ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu_tanh"}


FAMILY = Family(
    name="gemma",
    architectures=("GemmaForCausalLM",),
    settings=(
        *SIZES,
        INTERMEDIATE,
        kv_heads(16),
        Field("head_dim", "head_dim", 256),
        positions(8192),
        epsilon("rms_norm_eps", 1e-6),
        Rope(),
        flag("attention_bias", "qkv_bias output_bias", False),
        Choice("hidden_act", "activation", _ACTIVATIONS, "gelu_pytorch_tanh"),
        Derived("embedding_scale", root_of_hidden),
        tied(True),
        eos(1),
    ),
    constants={"norm": "rms_offset"},
    supported={"hidden_activation": (None, "gelu_pytorch_tanh")},
    tensors=OUTER,
    layer_tensors=LLAMA_LAYER,
)
