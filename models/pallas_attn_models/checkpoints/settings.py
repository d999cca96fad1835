"""How the fields of a ``config.json`` become fields of a :class:`DecoderConfig`, and back.

A *setting* reads some fields and writes them again. Writing may lose something that a family cannot express: the result
is read back and compared (:func:`~pallas_attn_models.checkpoints.hf_config.config_to_hf`).
"""

import dataclasses
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from pallas_attn_models.checks import is_int, require_size, shown
from pallas_attn_models.decoder import MAX_LAYERS, DecoderConfig

REQUIRED: Any = object()  # the default of a field that has none


class Source:
    """The fields of a ``config.json`` that no setting has taken yet.

    Attributes:
      known: the arguments of :class:`DecoderConfig` found so far; those of the experts as ``"experts.NAME"``.
    """

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self.left = dict(fields)
        self.known: dict[str, Any] = {}

    def take(self, *names: str, default: Any = REQUIRED, null: Any = REQUIRED) -> Any:
        """Removes a field and returns its value.

        Args:
          *names: the field's name, and older ones; with several values, all must be equal.
          default: the value of an absent field.
          null: the value of a field that is null; by default ``default``.
        """
        found = [(name, self.left.pop(name)) for name in names if name in self.left]
        for name, value in found[1:]:
            if value != found[0][1]:
                raise ValueError(
                    f"{name}: expected the value of {found[0][0]}, {shown(found[0][1])}, got {shown(value)}"
                )
        value = found[0][1] if found else default
        if found and value is None:
            value = default if null is REQUIRED else null
        if value is REQUIRED:
            raise ValueError(f"{names[0]}: expected a value in config.json, got none")
        return value

    def layers(self) -> int:
        """The number of layers, after a check of its size: lists per layer must fit in memory."""
        require_size("num_hidden_layers", self.known["num_layers"], MAX_LAYERS)
        return self.known["num_layers"]


class Setting(Protocol):
    """Reads some fields of a ``config.json``, and writes them."""

    def read(self, source: Source) -> Mapping[str, Any]:
        """Arguments of :class:`DecoderConfig` from the fields that this setting takes."""
        ...

    def write(self, config: DecoderConfig) -> Mapping[str, Any]:
        """These fields for a configuration; AttributeError if it lacks what they describe."""
        ...


@dataclasses.dataclass(frozen=True)
class Field:
    """A field with the same meaning as one of ours, or as several that have the same value.

    Attributes:
      name: in ``config.json``; with older names after it, separated by spaces.
      ours: fields of :class:`DecoderConfig`, separated by spaces; ``experts.NAME`` for :class:`ExpertsConfig`.
      default: the value of an absent field, as in ``config.json``, or a function of the arguments known so far.
      null: the value that null stands for; by default the default.
      decode, encode: convert a value to ours and back.
    """

    name: str
    ours: str
    default: Any = REQUIRED
    null: Any = REQUIRED
    decode: Callable[[Any], Any] | None = None
    encode: Callable[[Any], Any] | None = None

    def read(self, source: Source) -> Mapping[str, Any]:
        names = self.name.split()
        absent = self.default if not callable(self.default) else None
        value = source.take(*names, default=absent, null=self.null)
        if value is None and callable(self.default):
            value = self.default(source.known)
        elif self.decode is not None:
            value = self.decode(value)
        return dict.fromkeys(self.ours.split(), value)

    def write(self, config: DecoderConfig) -> Mapping[str, Any]:
        value = operator.attrgetter(self.ours.split()[0])(config)
        return {self.name.split()[0]: value if value is None or self.encode is None else self.encode(value)}


@dataclasses.dataclass(frozen=True)
class Choice:
    """A field with names for variants: ``choices`` maps them to values of ours; the first of equal ones is written."""

    name: str
    ours: str
    choices: Mapping[Any, Any]
    default: Any = REQUIRED

    def read(self, source: Source) -> Mapping[str, Any]:
        value = source.take(*self.name.split(), default=self.default)
        for choice, ours in self.choices.items():
            if value == choice and isinstance(value, bool) == isinstance(choice, bool):
                return {self.ours: ours}
        expected = " or ".join(map(repr, self.choices))
        raise ValueError(f"{self.name.split()[0]}: expected {expected}, got {shown(value)}")

    def write(self, config: DecoderConfig) -> Mapping[str, Any]:
        value = operator.attrgetter(self.ours)(config)
        return {self.name.split()[0]: name for name, ours in reversed([*self.choices.items()]) if ours == value}


@dataclasses.dataclass(frozen=True)
class Derived:
    """Arguments that follow from others; no field of its own."""

    ours: str
    value: Callable[[Mapping[str, Any]], Any]

    def read(self, source: Source) -> Mapping[str, Any]:
        return {self.ours: self.value(source.known)}

    def write(self, config: DecoderConfig) -> Mapping[str, Any]:
        return {}


def equal_to(ours: str) -> Callable[[Mapping[str, Any]], Any]:
    """A default: the value of another argument."""
    return operator.itemgetter(ours)


def head_size(known: Mapping[str, Any]) -> int:
    """A default: the hidden size divided by the number of heads."""
    hidden_size, num_heads = known["hidden_size"], known["num_heads"]
    require_size("hidden_size", hidden_size)
    require_size("num_attention_heads", num_heads)
    if hidden_size % num_heads:
        raise ValueError(f"head_dim: expected a value, because {num_heads=} does not divide {hidden_size=}, got none")
    return hidden_size // num_heads


def multiple_of_hidden(factor: int) -> Callable[[Mapping[str, Any]], int]:
    """A default: a multiple of the hidden size."""

    def value(known: Mapping[str, Any]) -> int:
        require_size("hidden_size", known["hidden_size"])
        return factor * known["hidden_size"]

    return value


def root_of_hidden(known: Mapping[str, Any]) -> float:
    """The square root of the hidden size."""
    require_size("hidden_size", known["hidden_size"])
    return known["hidden_size"] ** 0.5


def inverted(name: str, decode: Callable[[float], float], encode: Callable[[float], float]) -> dict[str, Callable]:
    """``decode`` and ``encode`` of a positive number, such that what is written reads back as the same number."""

    def checked(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ValueError(f"{name}: expected a positive number, got {shown(value)}")
        return decode(value)

    def exact(value: float) -> float:
        close = encode(value)
        near = (round(close), close, math.nextafter(close, 0), math.nextafter(close, math.inf))
        return next((one for one in near if one > 0 and decode(one) == value), close)

    return {"decode": checked, "encode": exact}


def _eos_from_hf(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (value,)


def _eos_to_hf(tokens: tuple[int, ...]) -> int | list[int] | None:
    return tokens[0] if len(tokens) == 1 else [*tokens] or None


def eos(default: int | list[int] | None) -> Field:
    """``eos_token_id``: a token, a list of them, or null for none."""
    return Field("eos_token_id", "eos_token_ids", default, null=None, decode=_eos_from_hf, encode=_eos_to_hf)


def activation(name: str = "hidden_act", default: str = "silu") -> Choice:
    """The activation of the MLP, by transformers' names."""
    return Choice(name, "activation", ACTIVATIONS, default)


# transformers' name -> ours.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "relu": "relu",
    "relu2": "relu_squared",
}

# The sizes of most families.
SIZES = (
    Field("vocab_size", "vocab_size"),
    Field("hidden_size", "hidden_size"),
    Field("num_hidden_layers", "num_layers"),
    Field("num_attention_heads", "num_heads"),
)
INTERMEDIATE = Field("intermediate_size", "intermediate_size")
HEAD_DIM = Field("head_dim", "head_dim", head_size)


def kv_heads(default: int | None = None) -> Field:
    """The number of key and value heads; by default one per query head, or ``default``."""
    return Field("num_key_value_heads", "num_kv_heads", equal_to("num_heads") if default is None else default)


def positions(default: int) -> Field:
    """The context length of training."""
    return Field("max_position_embeddings", "max_position_embeddings", default)


def tied(default: bool) -> Field:
    """Whether the output head is the embedding table."""
    return Field("tie_word_embeddings", "tie_word_embeddings", default)


def epsilon(name: str, default: float) -> Field:
    """The epsilon of all norms."""
    return Field(name, "rms_norm_eps", default)


def flag(name: str, ours: str, default: bool) -> Field:
    """A bool."""
    return Field(name, ours, default)


@dataclasses.dataclass(frozen=True)
class DenseLayers:
    """Qwen's layers without experts: ``mlp_only_layers``, and all but every ``decoder_sparse_step``-th."""

    def read(self, source: Source) -> Mapping[str, Any]:
        dense = source.take("mlp_only_layers", default=[])
        step = source.take("decoder_sparse_step", default=1)
        require_size("decoder_sparse_step", step)
        if not isinstance(dense, list) or not all(map(is_int, dense)):
            raise ValueError(f"mlp_only_layers: expected a list of layers, got {shown(dense)}")
        layers = range(source.layers())
        return {"dense_layers": tuple(layer for layer in layers if layer in {*dense} or (layer + 1) % step)}

    def write(self, config: DecoderConfig) -> Mapping[str, Any]:
        return {"mlp_only_layers": [*config.dense_layers], "decoder_sparse_step": 1}


@dataclasses.dataclass(frozen=True)
class FirstDense:
    """DeepSeek's: the first layers have no experts."""

    default: int

    def read(self, source: Source) -> Mapping[str, Any]:
        number = source.take("first_k_dense_replace", default=self.default)
        if not is_int(number) or number < 0:
            raise ValueError(f"first_k_dense_replace: expected an int of at least 0, got {shown(number)}")
        return {"dense_layers": tuple(range(min(number, source.layers())))}

    def write(self, config: DecoderConfig) -> Mapping[str, Any]:
        return {"first_k_dense_replace": len(config.dense_layers)}


@dataclasses.dataclass(frozen=True)
class SharedSize:
    """``n_shared_experts``: as many experts side by side are one wide one."""

    default: int

    def read(self, source: Source) -> Mapping[str, Any]:
        number = source.take("n_shared_experts", default=self.default)
        if not is_int(number) or number < 0:
            raise ValueError(f"n_shared_experts: expected an int of at least 0, got {shown(number)}")
        width = source.known["experts.intermediate_size"]
        require_size("moe_intermediate_size", width)
        return {"experts.shared_size": number * width or None}

    def write(self, config: DecoderConfig) -> Mapping[str, Any]:
        assert config.experts is not None
        return {"n_shared_experts": (config.experts.shared_size or 0) // config.experts.intermediate_size}
