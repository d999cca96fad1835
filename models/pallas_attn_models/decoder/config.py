"""The configuration of a decoder."""

import dataclasses

from pallas_attn_models.checks import (
    MAX_FLOAT32,
    MAX_INT32,
    is_int,
    require_positive_float,
    require_size,
    shown,
)

MAX_LAYERS = 2**20  # a larger number is an error in the file, and per-layer lists might not fit in memory


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864) and its extension to longer contexts.

    Attributes:
      theta: base of the geometric progression of wavelengths.
      type: ``"default"``; ``"linear"``: divides every frequency by ``factor`` (Chen et al. 2023, arXiv:2306.15595); or
        ``"llama3"``: divides the frequencies of wavelengths above ``original_max_position_embeddings /
        low_freq_factor``, keeps those below ``original_max_position_embeddings / high_freq_factor``, and interpolates
        between (Llama 3.1, arXiv:2407.21783).
      factor: used by linear and llama3.
      low_freq_factor, high_freq_factor, original_max_position_embeddings: used by llama3.

    Raises:
      ValueError: a value that the type does not use, or that float32 or int32 cannot represent.
    """

    theta: float = 10000.0
    type: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def __post_init__(self):
        if not isinstance(self.type, str) or self.type not in ROPE_FIELDS:
            raise ValueError(f"rope type: expected one of {sorted(ROPE_FIELDS)}, got {shown(self.type)}")
        for name in ("theta", "factor", "low_freq_factor", "high_freq_factor"):
            require_positive_float(f"rope {name}", getattr(self, name))
        require_size("rope original_max_position_embeddings", self.original_max_position_embeddings)
        for field in dataclasses.fields(self)[2:]:
            value = getattr(self, field.name)
            if field.name not in ROPE_FIELDS[self.type] and value != field.default:
                expected = f"no value, because type {self.type!r} does not use it"
                raise ValueError(f"rope {field.name}: expected {expected}, got {value!r}")
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"rope high_freq_factor: expected more than low_freq_factor={self.low_freq_factor}, "
                f"got {self.high_freq_factor}"
            )
        # The highest frequency of a head; theta or factor below 1 raise it above 1.
        fastest = max(1.0, 1 / self.theta) * max(1.0, 1 / self.factor)
        if fastest * MAX_INT32 > MAX_FLOAT32:
            got = f"theta={self.theta!r}, factor={self.factor!r}"
            raise ValueError(f"rope theta, factor: expected angles within float32 at every position, got {got}")


# Rope type -> fields that it uses besides theta.
ROPE_FIELDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The configuration of a decoder. Hashable, and independent of the dtype of the weights.

    Attributes:
      vocab_size: V.
      hidden_size: E, the width of the residual stream.
      intermediate_size: the width of the gated MLP.
      num_layers: number of decoder layers.
      num_heads: N query heads.
      num_kv_heads: K key and value heads; divides N. K = N is multi-head, K = 1 multi-query attention.
      head_dim: D, even; may differ from E / N.
      rms_norm_eps: added to the mean square in RMSNorm.
      rope: rotary settings.
      tie_word_embeddings: whether the output head is the embedding table.
      max_position_embeddings: the context length of training. Longer inputs are not truncated.
      eos_token_ids: the tokens that end a text.
      sliding_windows: one per layer: how many tokens a query sees, including its own (Mistral, arXiv:2310.06825,
        section 2), or None for full attention. Empty: None for all layers.

    Raises:
      ValueError: an invalid field, or a number that float32 or int32 cannot represent; names the field.
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
        require_size("num_layers", self.num_layers, MAX_LAYERS)
        require_size("num_heads * head_dim", self.num_heads * self.head_dim)
        require_positive_float("rms_norm_eps", self.rms_norm_eps)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads: expected a divisor of num_heads={self.num_heads}, got {self.num_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim: expected an even number (rotary embedding rotates pairs), got {self.head_dim}")
        if not isinstance(self.rope, RopeConfig):
            raise ValueError(f"rope: expected a RopeConfig, got {shown(self.rope)}")
        if not isinstance(self.tie_word_embeddings, bool):
            raise ValueError(f"tie_word_embeddings: expected a bool, got {shown(self.tie_word_embeddings)}")
        if not isinstance(self.eos_token_ids, tuple):
            raise ValueError(f"eos_token_ids: expected a tuple of token ids, got {shown(self.eos_token_ids)}")
        for token in self.eos_token_ids:
            if not is_int(token) or not 0 <= token < self.vocab_size:
                expected = f"ids in [0, vocab_size={self.vocab_size})"
                raise ValueError(f"eos_token_ids: expected {expected}, got {shown(token)}")
        if not isinstance(self.sliding_windows, tuple) or len(self.sliding_windows) not in (0, self.num_layers):
            expected = f"an empty tuple, or one entry for each of {self.num_layers} layers"
            raise ValueError(f"sliding_windows: expected {expected}, got {shown(self.sliding_windows)}")
        for window in self.sliding_windows:
            if window is not None:
                require_size("sliding_windows", window)

    def sliding_window(self, layer: int) -> int | None:
        """The number of tokens that a query of this layer sees; None: all."""
        return self.sliding_windows[layer] if self.sliding_windows else None
