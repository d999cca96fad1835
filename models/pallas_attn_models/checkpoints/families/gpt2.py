"""GPT-2 (Radford et al. 2019, Language Models are Unsupervised Multitask Learners)."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from pallas_attn_models.checkpoints.family import Family
from pallas_attn_models.checkpoints.settings import (
    Derived,
    Field,
    Source,
    activation,
    eos,
    epsilon,
    equal_to,
    flag,
    head_size,
    multiple_of_hidden,
    tied,
)
from pallas_attn_models.checkpoints.transforms import linear, norm, same
from pallas_attn_models.checks import shown
from pallas_attn_models.decoder import DecoderConfig


@dataclasses.dataclass(frozen=True)
class _Scale:
    """``scale_attn_weights``: whether logits are divided by the root of the head size."""

    def read(self, source: Source) -> Mapping[str, Any]:
        scales = source.take("scale_attn_weights", default=True)
        if not isinstance(scales, bool):
            raise ValueError(f"scale_attn_weights: expected a bool, got {shown(scales)}")
        return {"attention_scale": None if scales else 1.0}

    def write(self, config: DecoderConfig) -> Mapping[str, Any]:
        return {"scale_attn_weights": config.attention_scale is None}


FAMILY = Family(
    name="gpt2",
    architectures=("GPT2LMHeadModel",),
    settings=(
        Field("vocab_size", "vocab_size"),
        Field("n_embd hidden_size", "hidden_size"),
        Field("n_layer num_hidden_layers", "num_layers"),
        Field("n_head num_attention_heads", "num_heads"),
        Field("n_inner", "intermediate_size", multiple_of_hidden(4)),
        Derived("num_kv_heads", equal_to("num_heads")),
        Derived("head_dim", head_size),
        Field("n_positions max_position_embeddings", "max_position_embeddings learned_positions", 1024),
        epsilon("layer_norm_epsilon", 1e-5),
        activation("activation_function", "gelu_new"),
        _Scale(),
        flag("scale_attn_by_inverse_layer_idx", "scale_by_layer", False),
        tied(True),
        eos(50256),
    ),
    constants={
        "rope": None,
        "norm": "layer",
        "qkv_bias": True,
        "output_bias": True,
        "mlp_bias": True,
        "mlp_gated": False,
    },
    irrelevant={
        "attn_pdrop": "dropout, which only training in PyTorch applies",
        "reorder_and_upcast_attn": "softmax is computed in float32 anyway",
        "n_ctx": "an older synonym of n_positions",
    }
    | dict.fromkeys(
        ("summary_activation", "summary_first_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj"),
        "for a classification head",
    ),
    tensors=(
        *same("transformer.wte.weight", "embedding.table"),
        *same("transformer.wpe.weight", "positions.table"),
        *norm("transformer.ln_f", "norm"),
        *linear("lm_head", "head"),
    ),
    layer_prefix="transformer.h",
    layer_tensors=(
        *norm("ln_1", "attention_norm"),
        *norm("ln_2", "mlp_norm"),
        *linear("attn.c_attn", "attention.query", "attention.key", "attention.value", transposed=False),
        *linear("attn.c_proj", "attention.output", transposed=False),
        *linear("mlp.c_fc", "mlp.up", transposed=False),
        *linear("mlp.c_proj", "mlp.down", transposed=False),
    ),
    redundant=(r"transformer\.h\.[0-9]+\.attn\.(masked_)?bias",),
)
