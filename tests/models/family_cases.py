"""Random checkpoints of every model family, written by transformers, which is imported only when one is made."""

import copy
import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 - registers bfloat16 in NumPy
import numpy as np
from safetensors.numpy import load_file, save_file

VOCAB = 96
LAYERS = 3
SIZES = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 10000.0}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
MULTIPLIERS = {
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.4,
    "attention_multiplier": 0.2,
    "logits_scaling": 3.0,
}
LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 10,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "n_group": 4,
    "topk_group": 2,
}
LATENT_YARN = {**YARN, "mscale": 0.7, "mscale_all_dim": 1.3}
GPT2 = {"vocab_size": VOCAB, "n_positions": 64, "n_embd": 32, "n_layer": LAYERS, "n_head": 4}
NEOX = {**SIZES, "num_attention_heads": 4}
FALCON = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
    "long_factor": [1.5, 2.0, 3.0, 4.0, 5.0, 6.0],
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A configuration of a family.

    Attributes:
      config: the name of transformers' class, without ``Config``.
      fields: its arguments.
      model: the name of the model's class, if not CONFIG + ``ForCausalLM``.
      eager: whether transformers computes attention step by step. In Falcon that adds ALiBi twice.
    """

    config: str
    fields: Mapping[str, Any]
    model: str | None = None
    eager: bool = True


def _llama_like(config: str, **fields: Any) -> Case:
    return Case(config, {**SIZES, **HEADS, **fields})


CASES: dict[str, Case] = {
    "llama": _llama_like("Llama", attention_bias=True, mlp_bias=True),
    "llama, yarn": _llama_like("Llama", rope_parameters=YARN, max_position_embeddings=64),
    "llama, dynamic": _llama_like(
        "Llama",
        rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
        max_position_embeddings=24,
    ),
    "mistral": _llama_like("Mistral", sliding_window=8),
    "mistral, no window": _llama_like("Mistral", sliding_window=None, head_dim=16),
    "ministral": _llama_like("Ministral", head_dim=16, sliding_window=8),
    "ministral, layer types": _llama_like(
        "Ministral", head_dim=8, sliding_window=8, layer_types=["full_attention", "sliding_attention", "full_attention"]
    ),
    "ministral3": _llama_like(
        "Ministral3",
        head_dim=16,
        max_position_embeddings=64,
        rope_parameters={**YARN, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.5},
    ),
    "ministral3, window": _llama_like("Ministral3", head_dim=8, sliding_window=8),
    "mixtral": _llama_like("Mixtral", num_local_experts=5, num_experts_per_tok=2),
    "mixtral, window": _llama_like(
        "Mixtral", num_local_experts=4, num_experts_per_tok=3, sliding_window=8, head_dim=16
    ),
    "qwen2": _llama_like("Qwen2"),
    "qwen2, windows": _llama_like("Qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=1),
    "qwen3": _llama_like("Qwen3", head_dim=16, tie_word_embeddings=True),
    "qwen3, windows": _llama_like(
        "Qwen3", head_dim=8, attention_bias=True, use_sliding_window=True, sliding_window=8, max_window_layers=2
    ),
    "qwen2_moe": _llama_like("Qwen2Moe", **EXPERTS, shared_expert_intermediate_size=40, mlp_only_layers=[1]),
    "qwen2_moe, sparse step": _llama_like(
        "Qwen2Moe", **EXPERTS, shared_expert_intermediate_size=20, norm_topk_prob=True, decoder_sparse_step=2
    ),
    "qwen3_moe": _llama_like("Qwen3Moe", **EXPERTS, head_dim=16, norm_topk_prob=True),
    "qwen3_moe, dense layer": _llama_like("Qwen3Moe", **EXPERTS, head_dim=16, mlp_only_layers=[0], attention_bias=True),
    "gemma": _llama_like("Gemma", head_dim=16),
    "gemma, one key head": _llama_like("Gemma", head_dim=8, num_key_value_heads=1, attention_bias=True),
    "gemma2": _llama_like("Gemma2", head_dim=16, sliding_window=8, query_pre_attn_scalar=24),
    "gemma2, caps": _llama_like(
        "Gemma2",
        head_dim=16,
        sliding_window=8,
        query_pre_attn_scalar=10,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=None,
        attention_bias=True,
    ),
    "gemma3": dataclasses.replace(
        _llama_like("Gemma3Text", head_dim=16, sliding_window=8, num_hidden_layers=6, query_pre_attn_scalar=24),
        model="Gemma3ForCausalLM",
    ),
    "gemma3, layer types": dataclasses.replace(
        _llama_like(
            "Gemma3Text",
            head_dim=16,
            sliding_window=8,
            layer_types=["full_attention", "sliding_attention", "full_attention"],
            final_logit_softcapping=3.0,
            rope_parameters={
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        ),
        model="Gemma3ForCausalLM",
    ),
    "gpt2": Case("GPT2", GPT2, "GPT2LMHeadModel"),
    "gpt2, scaled by layer": Case(
        "GPT2",
        {**GPT2, "n_inner": 40, "scale_attn_by_inverse_layer_idx": True, "activation_function": "relu"},
        "GPT2LMHeadModel",
    ),
    "gpt_neox": Case("GPTNeoX", {**NEOX, "rotary_pct": 0.5}),
    "gpt_neox, sequential": Case(
        "GPTNeoX",
        {
            **NEOX,
            "num_attention_heads": 2,
            "use_parallel_residual": False,
            "attention_bias": False,
            "hidden_act": "gelu_fast",
        },
    ),
    "phi": _llama_like("Phi"),
    "phi, qk norm": _llama_like("Phi", qk_layernorm=True, num_key_value_heads=None),
    "phi3": _llama_like("Phi3", pad_token_id=0),
    "phi3, longrope": _llama_like(
        "Phi3",
        pad_token_id=0,
        num_attention_heads=2,
        num_key_value_heads=1,
        partial_rotary_factor=0.75,
        sliding_window=40,
        tie_word_embeddings=True,
        original_max_position_embeddings=16,
        max_position_embeddings=64,
        rope_parameters=LONG,
    ),
    "gpt_oss": _llama_like("GptOss", head_dim=16, num_local_experts=6, num_experts_per_tok=2, sliding_window=8),
    "gpt_oss, no bias": _llama_like(
        "GptOss",
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=3,
        sliding_window=8,
        attention_bias=False,
        max_position_embeddings=64,
        rope_parameters={**YARN, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False},
    ),
    "olmo": _llama_like("Olmo"),
    "olmo, clipped": _llama_like("Olmo", clip_qkv=0.5, attention_bias=True),
    "olmo2": _llama_like("Olmo2"),
    "olmo2, bias": _llama_like("Olmo2", attention_bias=True, num_key_value_heads=4),
    "olmo3": _llama_like("Olmo3", sliding_window=8, num_hidden_layers=4),
    "olmo3, yarn": _llama_like(
        "Olmo3",
        sliding_window=8,
        num_hidden_layers=4,
        max_position_embeddings=64,
        rope_parameters={
            "full_attention": YARN,
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    "olmoe": _llama_like("Olmoe", num_experts=6, num_experts_per_tok=2),
    "olmoe, clipped": _llama_like("Olmoe", num_experts=6, num_experts_per_tok=3, norm_topk_prob=True, clip_qkv=0.7),
    "granite": _llama_like("Granite", **MULTIPLIERS),
    "granite, biases": _llama_like("Granite", **MULTIPLIERS, attention_bias=True, mlp_bias=True),
    "granitemoe": _llama_like("GraniteMoe", **MULTIPLIERS, num_local_experts=6, num_experts_per_tok=2),
    "granitemoe, bias": _llama_like(
        "GraniteMoe", **MULTIPLIERS, num_local_experts=3, num_experts_per_tok=2, attention_bias=True
    ),
    "smollm3": _llama_like("SmolLM3", num_hidden_layers=4, pad_token_id=0),
    "smollm3, windows": _llama_like(
        "SmolLM3",
        num_hidden_layers=4,
        pad_token_id=0,
        no_rope_layers=[1, 0, 1, 0],
        use_sliding_window=True,
        sliding_window=8,
        attention_bias=True,
        mlp_bias=True,
    ),
    "cohere": _llama_like("Cohere"),
    "cohere, qk norm": _llama_like("Cohere", use_qk_norm=True, logit_scale=0.3, attention_bias=True),
    "cohere2": _llama_like("Cohere2", sliding_window=8, num_hidden_layers=4),
    "cohere2, layer types": _llama_like(
        "Cohere2",
        sliding_window=8,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
        logit_scale=0.5,
    ),
    "starcoder2": _llama_like("Starcoder2"),
    "starcoder2, window": _llama_like("Starcoder2", sliding_window=8, use_bias=False, tie_word_embeddings=False),
    "glm": _llama_like("Glm", head_dim=16, pad_token_id=0),
    "glm, no bias": _llama_like("Glm", head_dim=16, pad_token_id=0, attention_bias=False, partial_rotary_factor=1.0),
    "glm4": _llama_like("Glm4", head_dim=16, pad_token_id=0),
    "glm4, no bias": _llama_like("Glm4", head_dim=8, pad_token_id=0, attention_bias=False),
    "glm4_moe": _llama_like(
        "Glm4Moe",
        head_dim=16,
        pad_token_id=0,
        n_routed_experts=8,
        num_experts_per_tok=3,
        moe_intermediate_size=24,
        n_group=4,
        topk_group=2,
    ),
    "glm4_moe, qk norm": _llama_like(
        "Glm4Moe",
        head_dim=16,
        pad_token_id=0,
        n_routed_experts=4,
        n_shared_experts=2,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        first_k_dense_replace=2,
        use_qk_norm=True,
        attention_bias=True,
        norm_topk_prob=False,
        routed_scaling_factor=1.5,
    ),
    "deepseek_v2": _llama_like("DeepseekV2", **LATENT, q_lora_rank=20, topk_method="group_limited_greedy"),
    "deepseek_v2, yarn": _llama_like(
        "DeepseekV2",
        **{**LATENT, "n_group": None, "topk_group": None},
        q_lora_rank=None,
        routed_scaling_factor=2.0,
        first_k_dense_replace=1,
        attention_bias=True,
        max_position_embeddings=64,
        rope_parameters=LATENT_YARN,
    ),
    "deepseek_v3": _llama_like("DeepseekV3", **LATENT, q_lora_rank=20, first_k_dense_replace=1),
    "deepseek_v3, yarn": _llama_like(
        "DeepseekV3",
        **LATENT,
        q_lora_rank=None,
        first_k_dense_replace=1,
        n_shared_experts=2,
        rope_interleave=False,
        max_position_embeddings=64,
        rope_parameters=LATENT_YARN,
    ),
    "exaone4": _llama_like("Exaone4", head_dim=16, sliding_window=8, num_hidden_layers=4),
    "exaone4, no windows": _llama_like(
        "Exaone4",
        head_dim=16,
        sliding_window=None,
        sliding_window_pattern=None,
        layer_types=["full_attention"] * LAYERS,
    ),
    "seed_oss": _llama_like("SeedOss", head_dim=16),
    "seed_oss, all biases": _llama_like("SeedOss", head_dim=16, attention_out_bias=True, mlp_bias=True),
    "stablelm": _llama_like("StableLm"),
    "stablelm, parallel": _llama_like("StableLm", use_parallel_residual=True, qk_layernorm=True, use_qkv_bias=True),
    "falcon, 7b": Case("Falcon", FALCON, eager=False),
    "falcon, 40b": Case("Falcon", {**FALCON, "num_kv_heads": 2, "new_decoder_architecture": True}, eager=False),
    "falcon, 1b": Case(
        "Falcon", {**FALCON, "alibi": True, "multi_query": False, "parallel_attn": False, "bias": True}, eager=False
    ),
    "nemotron": _llama_like("Nemotron", head_dim=8),
    "nemotron, biases": _llama_like("Nemotron", head_dim=16, attention_bias=True, mlp_bias=True),
}

_EPSILONS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps")


def make(name: str, directory: Path, dtype: str = "float32", **fields: Any) -> Any:
    """Saves a random checkpoint and returns transformers' model. Norms, biases and epsilons are far from defaults."""
    import torch
    import transformers

    case = CASES[name]
    config = getattr(transformers, f"{case.config}Config")(**{**case.fields, **fields})
    for epsilon in _EPSILONS:
        if hasattr(config, epsilon):
            setattr(config, epsilon, 0.02)
    config._attn_implementation = "eager" if case.eager else "sdpa"
    model = getattr(transformers, case.model or f"{case.config}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(len(name) * 131 + sum(map(ord, name)))

    def normal(shape: Any) -> Any:
        return torch.randn(shape, generator=generator)

    with torch.no_grad():
        for path, parameter in model.named_parameters():
            is_scale = parameter.ndim == 1 and "norm" in path and "bias" not in path
            parameter.copy_(normal(parameter.shape) * 0.25 + 0.8 * is_scale)
        for path, buffer in model.named_buffers():
            if "e_score_correction_bias" in path:
                buffer.copy_(normal(buffer.shape) * 0.2)
        corrections = [buffer for path, buffer in model.named_buffers() if "e_score_correction_bias" in path]
        for parameter in [*model.parameters(), *corrections]:  # as they are in the file
            parameter.copy_(parameter.to(getattr(torch, dtype)))
    # A copy, because the model's rotary frequencies would be rounded, too.
    copy.deepcopy(model).to(getattr(torch, dtype)).save_pretrained(directory)
    return model


def logits_of(model: Any, tokens: np.ndarray) -> np.ndarray:
    """transformers' logits for one row of tokens, float32 ``[T, V]``."""
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(tokens).long()[None]).logits[0].float().numpy()


def publish(directory: Path) -> None:
    """Respells a checkpoint as published files are: fields of transformers 4, shorter names, redundant buffers."""
    path = directory / "config.json"
    fields = json.loads(path.read_text())
    _respell(fields)
    path.write_text(json.dumps(fields))
    path = directory / "model.safetensors"
    tensors = load_file(path)
    respell = _TENSORS.get(fields["model_type"])
    save_file({**tensors, **_BUFFERS.get(fields["model_type"], {})} if respell is None else respell(tensors), path)


def _respell(fields: dict[str, Any]) -> None:
    fields["torch_dtype"] = fields.pop("dtype")
    fields["auto_map"] = {"AutoConfig": "configuration.Config"}
    parameters = fields.pop("rope_parameters", None)
    if parameters is None:
        return
    if "full_attention" in parameters:
        local = parameters["sliding_attention"]["rope_theta"]
        parameters = parameters["full_attention"]
        if fields["model_type"] == "gemma3_text":
            fields["rope_local_base_freq"] = local
    parameters = dict(parameters)
    neox = fields["model_type"] == "gpt_neox"
    fields["rotary_emb_base" if neox else "rope_theta"] = parameters.pop("rope_theta")
    if (part := parameters.pop("partial_rotary_factor", None)) is not None:
        fields["rotary_pct" if neox else "partial_rotary_factor"] = part
    kind = parameters.pop("rope_type")
    fields["rope_scaling"] = None if kind == "default" else {"type": kind, **parameters}


def _without_prefix(prefix: str, **buffers: np.ndarray) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda tensors: {name.removeprefix(prefix): value for name, value in tensors.items()} | buffers


_BUFFERS: dict[str, dict[str, np.ndarray]] = {
    "llama": {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)},
    "gpt_neox": {
        "gpt_neox.layers.0.attention.bias": np.ones((1, 1, 8, 8), np.float32),
        "gpt_neox.layers.0.attention.masked_bias": np.full((), -1e9, np.float32),
        "gpt_neox.layers.0.attention.rotary_emb.inv_freq": np.ones(4, np.float32),
    },
    "phi": {"model.layers.1.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)},
}
_TENSORS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "gpt2": _without_prefix("transformer.", **{"h.0.attn.bias": np.ones((1, 1, 8, 8), np.float32)}),
}
