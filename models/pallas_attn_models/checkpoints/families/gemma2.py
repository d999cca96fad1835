"""Gemma 2 (arXiv:2408.00118)."""

from pallas_attn_models.checkpoints.families.names import ATTENTION, GATED_MLP, OUTER
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
    inverted,
    kv_heads,
    positions,
    root_of_hidden,
    tied,
)
from pallas_attn_models.checkpoints.transforms import norm
from pallas_attn_models.checkpoints.windows import Windows, sliding_except_every

FAMILY = Family(
    name="gemma2",
    architectures=("Gemma2ForCausalLM",),
    settings=(
        *SIZES,
        INTERMEDIATE,
        kv_heads(4),
        Field("head_dim", "head_dim", 256),
        positions(8192),
        epsilon("rms_norm_eps", 1e-6),
        Windows(4096, sliding_except_every(2)),
        Rope(),
        flag("attention_bias", "qkv_bias output_bias", False),
        Field("attn_logit_softcapping", "attention_softcap", 50.0, null=None),
        Choice("hidden_activation hidden_act", "activation", {"gelu_pytorch_tanh": "gelu_tanh"}, "gelu_pytorch_tanh"),
        Field(
            "query_pre_attn_scalar",
            "attention_scale",
            256,
            **inverted("query_pre_attn_scalar", lambda x: x**-0.5, lambda x: x**-2),
        ),
        Field("final_logit_softcapping", "logit_softcap", 30.0, null=None),
        Derived("embedding_scale", root_of_hidden),
        tied(True),
        eos(1),
    ),
    constants={"norm": "rms_offset", "norm_position": "both"},
    irrelevant={"sliding_window_size": "repeats sliding_window"},
    tensors=OUTER,
    layer_tensors=(
        *norm("input_layernorm", "attention_norm"),
        *norm("post_attention_layernorm", "attention_out_norm"),
        *norm("pre_feedforward_layernorm", "mlp_norm"),
        *norm("post_feedforward_layernorm", "mlp_out_norm"),
        *ATTENTION,
        *GATED_MLP,
    ),
)
