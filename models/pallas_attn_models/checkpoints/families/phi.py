"""Phi-1, Phi-1.5 and Phi-2 (arXiv:2306.11644, arXiv:2309.05463)."""

from pallas_attn_models.checkpoints.family import Family
from pallas_attn_models.checkpoints.ropes import Rope
from pallas_attn_models.checkpoints.settings import (
    HEAD_DIM,
    INTERMEDIATE,
    SIZES,
    Choice,
    activation,
    eos,
    epsilon,
    kv_heads,
    positions,
    tied,
)
from pallas_attn_models.checkpoints.transforms import linear, norm, same

FAMILY = Family(
    name="phi",
    architectures=("PhiForCausalLM",),
    settings=(
        *SIZES,
        INTERMEDIATE,
        kv_heads(),
        HEAD_DIM,
        positions(2048),
        epsilon("layer_norm_eps", 1e-5),
        Rope(partial=0.5),
        Choice("qk_layernorm", "qk_norm", {False: None, True: "head"}, False),
        activation(default="gelu_new"),
        tied(False),
        eos(2),
    ),
    constants={
        "norm": "layer",
        "norm_position": "parallel",
        "qkv_bias": True,
        "output_bias": True,
        "mlp_bias": True,
        "mlp_gated": False,
        "head_bias": True,
    },
    tensors=(
        *same("model.embed_tokens.weight", "embedding.table"),
        *norm("model.final_layernorm", "norm"),
        *linear("lm_head", "head"),
    ),
    layer_tensors=(
        *norm("input_layernorm", "attention_norm"),
        *linear("self_attn.q_proj", "attention.query"),
        *linear("self_attn.k_proj", "attention.key"),
        *linear("self_attn.v_proj", "attention.value"),
        *linear("self_attn.dense", "attention.output"),
        *norm("self_attn.q_layernorm", "attention.query_norm"),
        *norm("self_attn.k_layernorm", "attention.key_norm"),
        *linear("mlp.fc1", "mlp.up"),
        *linear("mlp.fc2", "mlp.down"),
    ),
    redundant=(r"model\.layers\.[0-9]+\.self_attn\.rotary_emb\.inv_freq",),
)
