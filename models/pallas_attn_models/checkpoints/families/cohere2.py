"""Command R7B and Command A (Cohere): windows with rotation, and layers without either."""

from pallas_attn_models.checkpoints.families.names import ATTENTION, GATED_MLP, OUTER
from pallas_attn_models.checkpoints.family import Family
from pallas_attn_models.checkpoints.ropes import Rope, no_rope_without_window
from pallas_attn_models.checkpoints.settings import (
    HEAD_DIM,
    INTERMEDIATE,
    SIZES,
    Field,
    activation,
    eos,
    epsilon,
    flag,
    kv_heads,
    positions,
    tied,
)
from pallas_attn_models.checkpoints.transforms import norm
from pallas_attn_models.checkpoints.windows import Windows, sliding_except_every

FAMILY = Family(
    name="cohere2",
    architectures=("Cohere2ForCausalLM",),
    settings=(
        *SIZES,
        INTERMEDIATE,
        kv_heads(),
        HEAD_DIM,
        positions(8192),
        epsilon("layer_norm_eps", 1e-5),
        Windows(4096, sliding_except_every(4)),
        Rope(interleaved=True, without=no_rope_without_window),
        flag("attention_bias", "qkv_bias output_bias", False),
        activation(),
        Field("logit_scale", "logit_scale", 0.0625),
        tied(True),
        eos(255001),
    ),
    constants={"norm": "layer_scale", "norm_position": "parallel"},
    supported={
        "use_qk_norm": (None, False),
        "use_parallel_block": (None, True),
        "position_embedding_type": (None, "rope_gptj"),
        "rotary_pct": (None, 1.0),
        "use_gated_activation": (None, True),
        "use_parallel_embedding": (None, False),
        "order_of_interleaved_layers": (None, "local_attn_first"),
    },
    irrelevant={
        "layer_switch": "repeats sliding_window_pattern",
        "use_embedding_sharing": "repeats tie_word_embeddings",
    },
    tensors=OUTER,
    layer_tensors=(*norm("input_layernorm", "attention_norm"), *ATTENTION, *GATED_MLP),
)
