"""Gemma 3 (arXiv:2503.19786): its text models, and the text part of those with images."""

from pallas_attn_models.checkpoints.families.names import ATTENTION, GATED_MLP, OUTER, QK_NORM
from pallas_attn_models.checkpoints.family import Family
from pallas_attn_models.checkpoints.ropes import RopeByLayerType
from pallas_attn_models.checkpoints.settings import (
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
    name="gemma3_text",
    architectures=("Gemma3ForCausalLM", "Gemma3TextModel"),
    settings=(
        Field("vocab_size", "vocab_size", 262208),
        Field("hidden_size", "hidden_size", 2304),
        Field("num_hidden_layers", "num_layers", 26),
        Field("num_attention_heads", "num_heads", 8),
        Field("intermediate_size", "intermediate_size", 9216),
        kv_heads(4),
        Field("head_dim", "head_dim", 256),
        positions(131072),
        epsilon("rms_norm_eps", 1e-6),
        Windows(4096, sliding_except_every(6)),
        RopeByLayerType(theta=1e6, local_name="rope_local_base_freq"),
        flag("attention_bias", "qkv_bias output_bias", False),
        Choice("hidden_activation hidden_act", "activation", {"gelu_pytorch_tanh": "gelu_tanh"}, "gelu_pytorch_tanh"),
        Field(
            "query_pre_attn_scalar",
            "attention_scale",
            256,
            **inverted("query_pre_attn_scalar", lambda x: x**-0.5, lambda x: x**-2),
        ),
        Field("final_logit_softcapping", "logit_softcap", None, null=None),
        Derived("embedding_scale", root_of_hidden),
        tied(True),
        eos(1),
    ),
    constants={"norm": "rms_offset", "norm_position": "both", "qk_norm": "head"},
    irrelevant={"attn_logit_softcapping": "transformers ignores it in Gemma 3"},
    tensors=OUTER,
    layer_tensors=(
        *norm("input_layernorm", "attention_norm"),
        *norm("post_attention_layernorm", "attention_out_norm"),
        *norm("pre_feedforward_layernorm", "mlp_norm"),
        *norm("post_feedforward_layernorm", "mlp_out_norm"),
        *ATTENTION,
        *GATED_MLP,
        *QK_NORM,
    ),
    prefixes={
        "model.language_model.": "model.",
        "language_model.model.": "model.",
        "language_model.lm_head": "lm_head",
    },
    within=("gemma3",),
    other_parts=(r"(model\.)?vision_tower\..*", r"(model\.)?multi_modal_projector\..*"),
)
