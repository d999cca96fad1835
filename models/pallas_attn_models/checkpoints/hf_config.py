"""Converts between a Hugging Face ``config.json`` and :class:`DecoderConfig`.

Every field is used, or must have a value that this decoder implements (:data:`SUPPORTED`), or cannot affect the logits
(:data:`IRRELEVANT`). Any other field is an error: better not to run a model than to run it with other weights or
another formula than in training.
"""

from collections.abc import Mapping
from typing import Any

from pallas_attn_models.checks import listed, require_size, shown
from pallas_attn_models.decoder import MAX_LAYERS, ROPE_FIELDS, DecoderConfig, RopeConfig

# Field -> values that this decoder implements.
SUPPORTED: dict[str, tuple[Any, ...]] = {
    "model_type": ("llama", "mistral"),
    "architectures": (["LlamaForCausalLM"], ["MistralForCausalLM"], None),
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "attention_dropout": (0.0, None),
    "pretraining_tp": (1, None),
    "quantization_config": (None,),
    "partial_rotary_factor": (1.0, None),
    "rope_interleaved": (False, None),
    "is_encoder_decoder": (False, None),
    "add_cross_attention": (False, None),
    "cross_attention_hidden_size": (None,),
    "tie_encoder_decoder": (False, None),
    "chunk_size_feed_forward": (0, None),
    "pruned_heads": ({}, None),
}

_DTYPE = "the caller of load_hf chooses the dtype"
_GENERATION = "a sampling default; Sampling decides"
_IDENTITY = "origin of the checkpoint"
_KERNEL = "selects a PyTorch kernel"
_LABELS = "class names; a language model has none"
_OUTPUT = "selects the outputs of a PyTorch call"
_TOKENIZER = "for the tokenizer"
_TRAINING = "for training in PyTorch"

# Field -> reason why it cannot affect the logits.
IRRELEVANT: dict[str, str] = {
    "_attn_implementation": _KERNEL,
    "_attn_implementation_autoset": _KERNEL,
    "_commit_hash": _IDENTITY,
    "_flash_attn_2_enabled": _KERNEL,
    "_name_or_path": _IDENTITY,
    "attn_implementation": _KERNEL,
    "bad_words_ids": _GENERATION,
    "begin_suppress_tokens": _GENERATION,
    "bos_token_id": _TOKENIZER,
    "decoder_start_token_id": _TOKENIZER,
    "diversity_penalty": _GENERATION,
    "do_sample": _GENERATION,
    "dtype": _DTYPE,
    "early_stopping": _GENERATION,
    "encoder_no_repeat_ngram_size": _GENERATION,
    "exponential_decay_length_penalty": _GENERATION,
    "finetuning_task": _LABELS,
    "forced_bos_token_id": _GENERATION,
    "forced_eos_token_id": _GENERATION,
    "gradient_checkpointing": _TRAINING,
    "id2label": _LABELS,
    "initializer_range": _TRAINING,
    "is_decoder": "every Llama is a decoder",
    "is_llama_config": _IDENTITY,
    "label2id": _LABELS,
    "length_penalty": _GENERATION,
    "max_length": _GENERATION,
    "max_sequence_length": "an older synonym of max_position_embeddings",
    "min_length": _GENERATION,
    "no_repeat_ngram_size": _GENERATION,
    "num_beam_groups": _GENERATION,
    "num_beams": _GENERATION,
    "num_labels": _LABELS,
    "num_return_sequences": _GENERATION,
    "output_attentions": _OUTPUT,
    "output_hidden_states": _OUTPUT,
    "output_scores": _OUTPUT,
    "pad_token_id": _TOKENIZER,
    "prefix": _TOKENIZER,
    "problem_type": _LABELS,
    "remove_invalid_values": _GENERATION,
    "repetition_penalty": _GENERATION,
    "return_dict": _OUTPUT,
    "return_dict_in_generate": _OUTPUT,
    "sep_token_id": _TOKENIZER,
    "suppress_tokens": _GENERATION,
    "task_specific_params": _GENERATION,
    "temperature": _GENERATION,
    "tf_legacy_loss": _TRAINING,
    "tokenizer_class": _TOKENIZER,
    "top_k": _GENERATION,
    "top_p": _GENERATION,
    "torch_dtype": _DTYPE,
    "torchscript": _OUTPUT,
    "transformers.js_config": "for another runtime",
    "transformers_version": _IDENTITY,
    "typical_p": _GENERATION,
    "unsloth_fixed": _IDENTITY,
    "unsloth_version": _IDENTITY,
    "use_bfloat16": _DTYPE,
    "use_cache": "the caller decides by passing caches",
}


def config_from_hf(fields: Mapping[str, Any]) -> DecoderConfig:
    """Converts the parsed ``config.json`` of a Llama or Mistral checkpoint.

    Absent fields get transformers' defaults, except for sizes, which are required. Rotary settings may be spelled
    ``rope_parameters``, or ``rope_theta`` with ``rope_scaling``.

    Raises:
      ValueError: a field that is unknown or missing, or has an unsupported value.
      TypeError: ``fields`` is not a mapping.
    """
    if not isinstance(fields, Mapping):
        raise TypeError(f"fields: expected the mapping in config.json, got {type(fields).__name__}")
    fields = dict(fields)
    is_mistral = fields.get("model_type") == "mistral"
    for name, allowed in SUPPORTED.items():
        if name in fields or name == "model_type":
            value = fields.pop(name, None)
            if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in allowed):
                raise ValueError(f"{name}: expected {' or '.join(map(repr, allowed))}, got {shown(value)}")
    for name in IRRELEVANT:
        fields.pop(name, None)

    def required(name: str) -> Any:
        if name not in fields:
            raise ValueError(f"{name}: expected a value in config.json, got none")
        return fields.pop(name)

    def optional(name: str, default: Any) -> Any:
        value = fields.pop(name, None)
        return default if value is None else value

    hidden_size = required("hidden_size")
    num_heads = required("num_attention_heads")
    require_size("hidden_size", hidden_size)
    require_size("num_attention_heads", num_heads)
    if fields.get("head_dim") is None and hidden_size % num_heads:
        raise ValueError(f"head_dim: expected a value, because {num_heads=} does not divide {hidden_size=}, got none")
    max_position_embeddings = optional("max_position_embeddings", 131072 if is_mistral else 2048)
    num_layers = required("num_hidden_layers")
    window = fields.pop("sliding_window", 4096 if is_mistral else None)
    if window is not None and not is_mistral:
        raise ValueError(f"sliding_window: expected None for a Llama, got {shown(window)}")
    if window is not None:
        require_size("sliding_window", window)
        require_size("num_hidden_layers", num_layers, MAX_LAYERS)
    config = DecoderConfig(
        vocab_size=required("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=required("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=optional("num_key_value_heads", 8 if is_mistral else num_heads),
        head_dim=optional("head_dim", hidden_size // num_heads),
        rms_norm_eps=optional("rms_norm_eps", 1e-6),
        rope=_rope_from_hf(fields, max_position_embeddings),
        tie_word_embeddings=optional("tie_word_embeddings", False),
        max_position_embeddings=max_position_embeddings,
        eos_token_ids=_eos_from_hf(fields.pop("eos_token_id", 2)),
        sliding_windows=() if window is None else (window,) * num_layers,
    )
    if fields:
        raise ValueError(f"config.json: expected only known fields, got {listed(map(str, fields))}")
    return config


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The fields of a ``config.json`` that :func:`config_from_hf` converts back to an equal config.

    Rotary settings are spelled ``rope_theta`` with ``rope_scaling``, which transformers 4 and 5 both read. transformers
    requires ``hidden_size`` to be a multiple of ``num_heads`` even if ``head_dim`` is given.

    Raises:
      ValueError: layers with different sliding windows, which the format cannot represent.
    """
    if len(set(config.sliding_windows)) > 1:
        got = shown(config.sliding_windows)
        raise ValueError(f"sliding_windows: expected the same value for all layers, got {got}")
    window = config.sliding_window(0)
    if window is None:
        family = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
        family |= {"attention_bias": False, "mlp_bias": False}
    else:
        family = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": window}
    eos = list(config.eos_token_ids)
    rope_scaling = {name: getattr(config.rope, name) for name in ROPE_FIELDS[config.rope.type]}
    return family | {
        "bos_token_id": None,
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings,
        "num_attention_heads": config.num_heads,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_kv_heads,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_scaling": {"rope_type": config.rope.type, **rope_scaling} if rope_scaling else None,
        "rope_theta": config.rope.theta,
        "tie_word_embeddings": config.tie_word_embeddings,
        "vocab_size": config.vocab_size,
    }


def _rope_from_hf(fields: dict[str, Any], max_position_embeddings: int) -> RopeConfig:
    """Removes both spellings of the rotary settings from ``fields``; both may be present if they agree."""
    settings: dict[str, Any] = {}

    def add(source: str, name: str, value: Any) -> None:
        name = {"rope_type": "type", "rope_theta": "theta"}.get(name, name)
        if (first := settings.setdefault(name, value)) is not value and first != value:
            raise ValueError(f"{source}: expected {name}={shown(first)} as in another field, got {shown(value)}")

    for source in ("rope_parameters", "rope_scaling"):
        value = fields.pop(source, None)
        if not isinstance(value, Mapping | None):
            raise ValueError(f"{source}: expected an object, got {shown(value)}")
        for name, item in (value or {}).items():
            add(source, name, item)
    if (theta := fields.pop("rope_theta", None)) is not None:
        add("rope_theta", "theta", theta)

    # null means absent, and a factor of 1 rotates the whole head, the only supported case.
    settings = {name: value for name, value in settings.items() if value is not None}
    if isinstance(factor := settings.pop("partial_rotary_factor", 1.0), bool) or factor != 1.0:
        raise ValueError(f"partial_rotary_factor: expected 1.0, got {shown(factor)}")
    kind = settings.pop("type", "default")
    if not isinstance(kind, str) or kind not in ROPE_FIELDS:
        raise ValueError(f"rope type: expected one of {sorted(ROPE_FIELDS)}, got {shown(kind)}")
    theta = settings.pop("theta", 10000.0)
    if kind == "llama3":
        settings.setdefault("original_max_position_embeddings", max_position_embeddings)
    expected = set(ROPE_FIELDS[kind])
    if settings.keys() != expected:
        raise ValueError(
            f"rope type {kind!r}: expected the fields {sorted(expected)}, got [{listed(map(repr, settings))}]"
        )
    return RopeConfig(theta, kind, **settings)


def _eos_from_hf(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (value,)
