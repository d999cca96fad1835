"""The shape of a Llama or Mistral decoder, read from and written to the ``config.json`` of a Hugging Face checkpoint.

Every field of such a file is used, or must have the one value that this decoder computes (:data:`SUPPORTED`), or cannot
change a logit (:data:`IRRELEVANT`). Anything else is refused by name: a model that would run with other weights or
another formula than it was trained with is worse than one that does not run.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

# Field -> the values that mean what this decoder computes.
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
_GENERATION = "a default for sampling; Sampling says what a generation does"
_IDENTITY = "says where the checkpoint comes from"
_KERNEL = "chooses a PyTorch kernel"
_LABELS = "names classes; a language model has none"
_OUTPUT = "chooses what a PyTorch call returns"
_TOKENIZER = "speaks to the tokenizer"
_TRAINING = "speaks to a training run in PyTorch"

# Field -> why no logit depends on it.
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
    "is_decoder": "a Llama is one, whatever this says",
    "is_llama_config": _IDENTITY,
    "label2id": _LABELS,
    "length_penalty": _GENERATION,
    "max_length": _GENERATION,
    "max_sequence_length": "an older name beside max_position_embeddings",
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
    "transformers.js_config": "speaks to another runtime",
    "transformers_version": _IDENTITY,
    "typical_p": _GENERATION,
    "unsloth_fixed": _IDENTITY,
    "unsloth_version": _IDENTITY,
    "use_bfloat16": _DTYPE,
    "use_cache": "whether to cache is said by passing caches",
}


_MIN_FLOAT32, _MAX_FLOAT32 = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
_MAX_INT32 = 2**31 - 1
_MAX_LAYERS = 2**20  # a file that asks for more is broken, and an entry for each of them might not fit in memory


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864) and how it is stretched to longer contexts.

    Attributes:
      theta: the base of the geometric progression of wavelengths.
      type: ``"default"``; ``"linear"``: every frequency divided by ``factor`` (Chen et al. 2023, arXiv:2306.15595); or
        ``"llama3"``: only wavelengths beyond ``original_max_position_embeddings / low_freq_factor`` are, those below
        ``original_max_position_embeddings / high_freq_factor`` are kept, and those between are interpolated
        (Llama 3.1, arXiv:2407.21783).
      factor: used by linear and llama3.
      low_freq_factor, high_freq_factor, original_max_position_embeddings: used by llama3.

    Raises:
      ValueError: a value that its type cannot use, or that float32 or int32 cannot hold.
    """

    theta: float = 10000.0
    type: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def __post_init__(self):
        if not isinstance(self.type, str) or self.type not in _ROPE_FIELDS:
            raise ValueError(f"rope type: expected one of {sorted(_ROPE_FIELDS)}, got {shown(self.type)}")
        for name in ("theta", "factor", "low_freq_factor", "high_freq_factor"):
            _require_positive_float(f"rope {name}", getattr(self, name))
        require_size("rope original_max_position_embeddings", self.original_max_position_embeddings)
        for field in dataclasses.fields(self)[2:]:
            value = getattr(self, field.name)
            if field.name not in _ROPE_FIELDS[self.type] and value != field.default:
                raise ValueError(f"rope {field.name}: expected no value, as type {self.type!r} has none, got {value!r}")
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"rope high_freq_factor: expected more than low_freq_factor={self.low_freq_factor}, "
                f"got {self.high_freq_factor}"
            )
        # The fastest pair of a head, or the one that a theta or a factor below 1 makes the fastest.
        fastest = max(1.0, 1 / self.theta) * max(1.0, 1 / self.factor)
        if fastest * _MAX_INT32 > _MAX_FLOAT32:
            got = f"theta={self.theta!r}, factor={self.factor!r}"
            raise ValueError(f"rope theta, factor: expected angles that float32 can hold at every position, got {got}")


# Rope type -> the fields, besides theta, that it reads.
_ROPE_FIELDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The sizes and constants of a decoder. Hashable, and free of any dtype: that belongs to the weights.

    Attributes:
      vocab_size: V.
      hidden_size: E, the width of the residual stream.
      intermediate_size: the width of the gated MLP.
      num_layers: how many decoder layers.
      num_heads: N query heads.
      num_kv_heads: K key and value heads; divides N. K = N is multi-head, K = 1 multi-query attention.
      head_dim: D, even; need not be E / N.
      rms_norm_eps: added to the mean square in RMSNorm.
      rope: rotary settings.
      tie_word_embeddings: whether the output head is the embedding table.
      max_position_embeddings: the context length the model was made for. Nothing is cut off there.
      eos_token_ids: the tokens that end a text.
      sliding_windows: one for each layer: how many tokens a query sees, its own and those before it (Mistral,
        arXiv:2310.06825, section 2), or None: all of them. Empty: None for all layers.

    Raises:
      ValueError: names the field, what was expected and what came. Every number must fit in float32 or int32.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope: RopeConfig = dataclasses.field(default_factory=RopeConfig)
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 2048
    eos_token_ids: tuple[int, ...] = ()
    sliding_windows: tuple[int | None, ...] = ()

    def __post_init__(self):
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "max_position_embeddings",
        ):
            require_size(name, getattr(self, name))
        require_size("num_layers", self.num_layers, _MAX_LAYERS)
        require_size("num_heads * head_dim", self.num_heads * self.head_dim)
        _require_positive_float("rms_norm_eps", self.rms_norm_eps)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads: expected a divisor of num_heads={self.num_heads}, got {self.num_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim: expected an even number (rotary embedding turns pairs), got {self.head_dim}")
        if not isinstance(self.rope, RopeConfig):
            raise ValueError(f"rope: expected a RopeConfig, got {shown(self.rope)}")
        if not isinstance(self.tie_word_embeddings, bool):
            raise ValueError(f"tie_word_embeddings: expected a bool, got {shown(self.tie_word_embeddings)}")
        if not isinstance(self.eos_token_ids, tuple):
            raise ValueError(f"eos_token_ids: expected a tuple of token ids, got {shown(self.eos_token_ids)}")
        for token in self.eos_token_ids:
            if not _is_int(token) or not 0 <= token < self.vocab_size:
                wanted = f"ids in [0, vocab_size={self.vocab_size})"
                raise ValueError(f"eos_token_ids: expected {wanted}, got {shown(token)}")
        if not isinstance(self.sliding_windows, tuple) or len(self.sliding_windows) not in (0, self.num_layers):
            wanted = f"a tuple with one for each of {self.num_layers} layers, or none"
            raise ValueError(f"sliding_windows: expected {wanted}, got {shown(self.sliding_windows)}")
        for window in self.sliding_windows:
            if window is not None:
                require_size("sliding_windows", window)

    def sliding_window(self, layer: int) -> int | None:
        """How many tokens a query of this layer sees; None: all."""
        return self.sliding_windows[layer] if self.sliding_windows else None

    @staticmethod
    def from_hf(fields: Mapping[str, Any]) -> "DecoderConfig":
        """Reads the parsed ``config.json`` of a Llama or Mistral checkpoint.

        An absent field has the default that transformers' configuration gives it, except for the sizes, which must
        be there. Rotary settings may be spelled ``rope_parameters`` or ``rope_theta`` with ``rope_scaling``.

        Raises:
          ValueError: a field that is unknown, missing, or has a value that this decoder does not compute.
          TypeError: ``fields`` is no mapping.
        """
        if not isinstance(fields, Mapping):
            raise TypeError(f"fields: expected the mapping that config.json holds, got {type(fields).__name__}")
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
            raise ValueError(f"head_dim: expected a value, as {hidden_size=} is no multiple of {num_heads=}, got none")
        max_position_embeddings = optional("max_position_embeddings", 131072 if is_mistral else 2048)
        num_layers = required("num_hidden_layers")
        window = fields.pop("sliding_window", 4096 if is_mistral else None)
        if window is not None and not is_mistral:
            raise ValueError(f"sliding_window: expected None for a Llama, got {shown(window)}")
        if window is not None:
            require_size("sliding_window", window)
            require_size("num_hidden_layers", num_layers, _MAX_LAYERS)
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

    def to_hf(self) -> dict[str, Any]:
        """The fields of a ``config.json`` that :meth:`from_hf` reads back to an equal config.

        Rotary settings are spelled ``rope_theta`` with ``rope_scaling``, which transformers 4 and 5 both read.
        transformers itself wants ``hidden_size`` to be a multiple of ``num_heads`` even where ``head_dim`` is given.

        Raises:
          ValueError: layers with sliding windows that differ, which no such file can say.
        """
        if len(set(self.sliding_windows)) > 1:
            got = shown(self.sliding_windows)
            raise ValueError(f"sliding_windows: expected the same for all layers of a file, got {got}")
        window = self.sliding_window(0)
        if window is None:
            family = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
            family |= {"attention_bias": False, "mlp_bias": False}
        else:
            family = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": window}
        eos = list(self.eos_token_ids)
        rope_scaling = {name: getattr(self.rope, name) for name in _ROPE_FIELDS[self.rope.type]}
        return family | {
            "bos_token_id": None,
            "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "max_position_embeddings": self.max_position_embeddings,
            "num_attention_heads": self.num_heads,
            "num_hidden_layers": self.num_layers,
            "num_key_value_heads": self.num_kv_heads,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_scaling": {"rope_type": self.rope.type, **rope_scaling} if rope_scaling else None,
            "rope_theta": self.rope.theta,
            "tie_word_embeddings": self.tie_word_embeddings,
            "vocab_size": self.vocab_size,
        }


def _rope_from_hf(fields: dict[str, Any], max_position_embeddings: int) -> RopeConfig:
    """Takes both spellings of the rotary settings out of ``fields``; they may both be there if they agree."""
    settings: dict[str, Any] = {}

    def add(source: str, name: str, value: Any) -> None:
        name = {"rope_type": "type", "rope_theta": "theta"}.get(name, name)
        if (said := settings.setdefault(name, value)) is not value and said != value:
            raise ValueError(f"{source}: expected {name}={shown(said)} as said elsewhere, got {shown(value)}")

    for source in ("rope_parameters", "rope_scaling"):
        value = fields.pop(source, None)
        if not isinstance(value, Mapping | None):
            raise ValueError(f"{source}: expected an object, got {shown(value)}")
        for name, item in (value or {}).items():
            add(source, name, item)
    if (theta := fields.pop("rope_theta", None)) is not None:
        add("rope_theta", "theta", theta)

    # A null is no value; and to turn all of a head is what happens anyway.
    settings = {name: value for name, value in settings.items() if value is not None}
    if isinstance(factor := settings.pop("partial_rotary_factor", 1.0), bool) or factor != 1.0:
        raise ValueError(f"partial_rotary_factor: expected 1.0, got {shown(factor)}")
    kind = settings.pop("type", "default")
    if not isinstance(kind, str) or kind not in _ROPE_FIELDS:
        raise ValueError(f"rope type: expected one of {sorted(_ROPE_FIELDS)}, got {shown(kind)}")
    theta = settings.pop("theta", 10000.0)
    if kind == "llama3":
        settings.setdefault("original_max_position_embeddings", max_position_embeddings)
    expected = set(_ROPE_FIELDS[kind])
    if settings.keys() != expected:
        raise ValueError(
            f"rope type {kind!r}: expected the fields {sorted(expected)}, got [{listed(map(repr, settings))}]"
        )
    return RopeConfig(theta, kind, **settings)


def _eos_from_hf(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (value,)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def shown(value: Any, length: int = 80) -> str:
    """``repr(value)`` for a message: cut where it is long, and there for what has none, as an int of 5000 digits."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):
        text = f"{type(value).__name__} too large to show"
    return text if len(text) <= length else f"{text[:length]}..."


def listed(names: Iterable[str], total: int | None = None, most: int = 5) -> str:
    """The first few names in their order, and how many more there are; ``total``: of which ``names`` are the first."""
    names = sorted(names)
    more = (len(names) if total is None else total) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def require_positive_int(name: str, value: Any) -> None:
    """Raises a ValueError that names the argument."""
    if not _is_int(value) or value < 1:
        raise ValueError(f"{name}: expected an int of at least 1, got {shown(value)}")


def require_size(name: str, value: Any, most: int = _MAX_INT32) -> None:
    """Raises a ValueError, too, where 32 bits do not hold it."""
    require_positive_int(name, value)
    if value > most:
        raise ValueError(f"{name}: expected an int of at most {most}, got {shown(value)}")


def _require_positive_float(name: str, value: Any) -> None:
    """Raises a ValueError, too, where float32 would make it 0 (subnormals count as 0 on most devices) or infinite."""
    if not (_is_int(value) or isinstance(value, float)) or not 0 < value < float("inf"):
        raise ValueError(f"{name}: expected a positive number, got {shown(value)}")
    if not _MIN_FLOAT32 <= value <= _MAX_FLOAT32:
        raise ValueError(f"{name}: expected a positive number that float32 can hold, got {shown(value)}")
