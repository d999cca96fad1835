"""Falcon (arXiv:2311.16867): 1B with ALiBi, 7B with one key head and one norm, 40B with groups and two norms."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from pallas_attn_models.checkpoints.families.names import PRE_NORMS
from pallas_attn_models.checkpoints.family import Family
from pallas_attn_models.checkpoints.ropes import Rope
from pallas_attn_models.checkpoints.settings import (
    SIZES,
    Derived,
    Field,
    Source,
    activation,
    eos,
    epsilon,
    flag,
    head_size,
    multiple_of_hidden,
    positions,
    tied,
)
from pallas_attn_models.checkpoints.transforms import linear, norm, same
from pallas_attn_models.checks import shown
from pallas_attn_models.decoder import DecoderConfig

# The norms of a layer have other names in each design.
_NORMS = {
    "pre": PRE_NORMS,
    "parallel": norm("input_layernorm", "attention_norm"),
    "parallel_two": (*norm("ln_attn", "attention_norm"), *norm("ln_mlp", "mlp_norm")),
}


@dataclasses.dataclass(frozen=True)
class _Architecture:
    """Key heads and norms, from four fields."""

    def read(self, source: Source) -> Mapping[str, Any]:
        names = {"new_decoder_architecture": False, "multi_query": True, "parallel_attn": True}
        flags = {name: source.take(name, default=default) for name, default in names.items()}
        for name, value in flags.items():
            if not isinstance(value, bool):
                raise ValueError(f"{name}: expected a bool, got {shown(value)}")
        is_new, is_multi_query, is_parallel = flags.values()
        heads = source.known["num_heads"]
        groups = source.take("num_kv_heads", "n_head_kv", default=heads)
        norms = source.take("num_ln_in_parallel_attn", default=2 if is_new else 1)
        if norms not in (1, 2) or (norms == 2 and not is_new):
            raise ValueError(
                f"num_ln_in_parallel_attn: expected 1, or 2 with new_decoder_architecture, got {shown(norms)}"
            )
        if is_new and norms == 2:
            position = "parallel_two"
        else:
            position = "parallel" if is_new or is_parallel else "pre"
        return {"num_kv_heads": groups if is_new else 1 if is_multi_query else heads, "norm_position": position}

    def write(self, config: DecoderConfig) -> Mapping[str, Any]:
        is_new = config.norm_position == "parallel_two" or config.num_kv_heads not in (1, config.num_heads)
        return {
            "new_decoder_architecture": is_new,
            "multi_query": config.num_kv_heads == 1,
            "parallel_attn": config.norm_position != "pre",
            "num_kv_heads": config.num_kv_heads,
            "num_ln_in_parallel_attn": (2 if config.norm_position == "parallel_two" else 1) if is_new else None,
        }


@dataclasses.dataclass(frozen=True)
class _Alibi:
    """With ALiBi there is no rotation, and the bias is scaled like the products of queries and keys."""

    def read(self, source: Source) -> Mapping[str, Any]:
        alibi = source.take("alibi", default=False)
        if not isinstance(alibi, bool):
            raise ValueError(f"alibi: expected a bool, got {shown(alibi)}")
        return {"rope": None, "alibi": source.known["head_dim"] ** -0.5} if alibi else {"alibi": None}

    def write(self, config: DecoderConfig) -> Mapping[str, Any]:
        return {"alibi": config.alibi is not None}


FAMILY = Family(
    name="falcon",
    architectures=("FalconForCausalLM",),
    settings=(
        *SIZES,
        Derived("head_dim", head_size),
        Field("ffn_hidden_size", "intermediate_size", multiple_of_hidden(4)),
        positions(2048),
        epsilon("layer_norm_epsilon", 1e-5),
        _Architecture(),
        Rope(),
        _Alibi(),
        flag("bias", "qkv_bias output_bias mlp_bias", False),
        activation("activation", "gelu"),
        tied(True),
        eos(11),
    ),
    supported={"apply_residual_connection_post_layernorm": (None, False)},
    constants={"norm": "layer", "mlp_gated": False},
    tensors=(
        *same("transformer.word_embeddings.weight", "embedding.table"),
        *norm("transformer.ln_f", "norm"),
        *linear("lm_head", "head"),
    ),
    layer_prefix="transformer.h",
    layer_tensors=(
        *linear(
            "self_attention.query_key_value", "attention.query", "attention.key", "attention.value", split="by key head"
        ),
        *linear("self_attention.dense", "attention.output"),
        *linear("mlp.dense_h_to_4h", "mlp.up"),
        *linear("mlp.dense_4h_to_h", "mlp.down"),
    ),
    variants=lambda config: _NORMS[config.norm_position],
)
