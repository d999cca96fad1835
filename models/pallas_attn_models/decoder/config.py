"""The configuration of a decoder."""

import dataclasses
from typing import Any, NamedTuple

from pallas_attn_models.checks import (
    is_int,
    require_bool,
    require_positive_float,
    require_size,
    shown,
)
from pallas_attn_models.decoder.activations import ACTIVATIONS
from pallas_attn_models.decoder.norms import NORMS
from pallas_attn_models.decoder.rope import RopeConfig

MAX_LAYERS = 2**20  # a larger number is an error in the file, and per-layer lists might not fit in memory

NORM_POSITIONS = ("pre", "post", "both", "parallel", "parallel_two")
QK_NORMS = ("head", "heads", "vector")


@dataclasses.dataclass(frozen=True)
class ExpertsConfig:
    """A mixture of experts (Shazeer et al. 2017, arXiv:1701.06538) in place of the MLP.

    Attributes:
      num_experts: X.
      experts_per_token: how many experts a token is sent to.
      intermediate_size: the width of an expert.
      shared_size: the width of an MLP that every token passes, too (DeepSeekMoE, arXiv:2401.06066); None: no MLP.
      shared_gate: whether the shared MLP is weighted by the sigmoid of a projection (Qwen2, arXiv:2407.10671).
      score: ``"softmax"`` over all experts, or ``"sigmoid"`` of each (DeepSeek-V3, arXiv:2412.19437, equation 15).
      normalize: whether the weights of a token's experts sum to 1.
      scale: multiplies the weights.
      num_groups, groups_per_token: experts are chosen from the best groups only. A group is as good as its best expert
        or, for sigmoid scores, as the sum of its best two.
      correction: whether the choice, but not the weight, depends on a bias per expert (the same, section 2.1.2).
      router_bias: whether the router has a bias.
      bias: whether the experts have biases.
      clamp: the gate is clipped from above, the other factor on both sides (gpt-oss, arXiv:2508.10925), and the
        activation is ``(up + 1) * gate * sigmoid(alpha * gate)``; None: the activation of the decoder.
      alpha: used with ``clamp``.

    Raises:
      ValueError: an invalid field; named.
    """

    num_experts: int
    experts_per_token: int
    intermediate_size: int
    shared_size: int | None = None
    shared_gate: bool = False
    score: str = "softmax"
    normalize: bool = True
    scale: float = 1.0
    num_groups: int = 1
    groups_per_token: int = 1
    correction: bool = False
    router_bias: bool = False
    bias: bool = False
    clamp: float | None = None
    alpha: float = 1.702

    def __post_init__(self):
        for name in ("num_experts", "experts_per_token", "intermediate_size", "num_groups", "groups_per_token"):
            require_size(f"experts {name}", getattr(self, name))
        if self.shared_size is not None:
            require_size("experts shared_size", self.shared_size)
        for name in ("shared_gate", "normalize", "correction", "router_bias", "bias"):
            require_bool(f"experts {name}", getattr(self, name))
        if self.shared_gate and self.shared_size is None:
            raise ValueError("experts shared_gate: expected False without shared_size, got True")
        _require_one_of("experts score", self.score, ("softmax", "sigmoid"))
        for name in ("scale", "alpha"):
            require_positive_float(f"experts {name}", getattr(self, name))
        if self.clamp is not None:
            require_positive_float("experts clamp", self.clamp)
        if self.num_experts % self.num_groups or self.groups_per_token > self.num_groups:
            expected = f"a divisor of num_experts={self.num_experts}, at least groups_per_token={self.groups_per_token}"
            raise ValueError(f"experts num_groups: expected {expected}, got {self.num_groups}")
        available = self.num_experts // self.num_groups * self.groups_per_token
        if self.experts_per_token > available:
            expected = f"at most the {available} experts of {self.groups_per_token} groups"
            raise ValueError(f"experts experts_per_token: expected {expected}, got {self.experts_per_token}")
        if self.score == "sigmoid" and self.num_groups > 1 and self.num_experts // self.num_groups < 2:
            raise ValueError("experts num_groups: expected groups of at least two experts, because scores are sigmoids")


@dataclasses.dataclass(frozen=True)
class LatentConfig:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1): projections through narrow vectors.

    The first ``head_dim - rope_dim`` numbers of a key are its head's own and not rotated; the last ones are rotated and
    the same for all heads. Caches hold whole keys, and values padded to the size of keys.

    Attributes:
      query_rank: the width of the vector that holds all queries of a token; None: a plain projection.
      key_value_rank: the width of the vector that holds all keys and values of a token.
      rope_dim: the size of the rotated part of a head.
      value_dim: the size of a head's values, at most ``head_dim``.

    Raises:
      ValueError: an invalid field; named.
    """

    query_rank: int | None
    key_value_rank: int
    rope_dim: int
    value_dim: int

    def __post_init__(self):
        if self.query_rank is not None:
            require_size("latent query_rank", self.query_rank)
        for name in ("key_value_rank", "rope_dim", "value_dim"):
            require_size(f"latent {name}", getattr(self, name))


class LayerSizes(NamedTuple):
    """The sizes of a layer that differ from those of the decoder: N, K, D, and the width of the MLP."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int


@dataclasses.dataclass(frozen=True)
class LayerConfig:
    """What may differ between the layers of a decoder.

    Attributes:
      num_heads, num_kv_heads, head_dim: N, K and D.
      intermediate_size: the width of the MLP.
      window: how many tokens a query sees, including its own; None: all.
      rope: rotary settings; None: no rotation.
      scale: of the logits of attention.
      experts: a mixture of experts in place of the MLP, or None.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    window: int | None
    rope: RopeConfig | None
    scale: float
    experts: ExpertsConfig | None


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The configuration of a decoder. Hashable, and independent of the dtype of the weights.

    The defaults are those of Llama: RMSNorm before attention and before a gated MLP with SiLU, rotary embedding of
    whole heads, no biases.

    Attributes:
      vocab_size: V.
      hidden_size: E, the width of the residual stream.
      intermediate_size: the width of the MLP.
      num_layers: number of decoder layers.
      num_heads: N query heads.
      num_kv_heads: K key and value heads; divides N. K = N is multi-head, K = 1 multi-query attention.
      head_dim: D; may differ from E / N.
      rms_norm_eps: added to the mean square in RMSNorm, and to the variance in LayerNorm.
      rope: rotary settings; None: no rotary embedding.
      tie_word_embeddings: whether the output head is the embedding table.
      max_position_embeddings: the context length of training. Longer inputs are not truncated.
      eos_token_ids: the tokens that end a text.
      sliding_windows: one per layer: how many tokens a query sees, including its own (Mistral, arXiv:2310.06825,
        section 2), or None for full attention. Empty: None for all layers.
      layer_ropes: rotary settings per layer, or None for layers without rotation. Empty: ``rope`` for all layers.
      layer_sizes: heads, head size and width of the MLP per layer. Empty: those above for all layers.
      norm: the kind of all norms, a name in :data:`~pallas_attn_models.decoder.norms.NORMS`.
      norm_position: ``"pre"``: before attention and before the MLP; ``"post"``: after each instead, before the
        addition to the residual stream; ``"both"``; ``"parallel"``: attention and MLP share one norm and are added
        together (Wang & Komatsuzaki 2021, GPT-J); ``"parallel_two"``: the same with a norm for each.
      qk_norm: normalizes queries and keys (Henry et al. 2020, arXiv:2010.04245): ``"head"``: each head by the same
        weights; ``"heads"``: each head by its own; ``"vector"``: all heads of a token together. None: no norm.
      qk_norm_kind: the kind of these norms; None: ``norm``.
      qkv_bias, output_bias, mlp_bias, head_bias: whether the projections of queries, keys and values, that of the
        output of attention, those of the MLP and the output head have biases.
      qkv_clip: clips queries, keys and values to this magnitude (OLMo, arXiv:2402.00838); None: no clipping.
      attention_scale: of the logits of attention; None: ``head_dim ** -0.5``.
      scale_by_layer: whether layer i divides its ``attention_scale`` by i + 1.
      attention_softcap: a soft bound of the logits of attention (Gemma 2, arXiv:2408.00118); None: no bound.
      attention_sinks: whether every head has a logit more, which takes probability and gives no value (gpt-oss).
      alibi: adds a bias linear in the distance to the logits (Press et al. 2021, arXiv:2108.12409), with the slopes of
        the paper times this number; None: no bias.
      latent: the sizes of multi-head latent attention, with ``num_kv_heads = num_heads``; None: plain projections.
      query_temperature: ``(beta, length)``: multiplies the query at position p by
        ``1 + beta * log(1 + floor(p / length))``; None: no factor.
      activation: of the MLP: a name in :data:`~pallas_attn_models.decoder.activations.ACTIVATIONS`.
      mlp_gated: ``down(activation(gate(x)) * up(x))``, or ``down(activation(up(x)))``.
      experts: a mixture of experts in place of the MLP.
      dense_layers: with experts, the layers that have an MLP nevertheless; increasing.
      learned_positions: length of a table of position embeddings, added to the embedding; None: no table.
      embedding_scale: multiplies the embedding, rounded to the dtype of activations.
      residual_scale: multiplies what attention and MLP add to the residual stream.
      logit_scale: multiplies the logits of the output head.
      logit_softcap: a soft bound of the logits of the output head, after scaling; None: no bound.
      family: the name of the model family, for the format of checkpoints; does not count in comparisons.

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
    rope: RopeConfig | None = dataclasses.field(default_factory=RopeConfig)
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 2048
    eos_token_ids: tuple[int, ...] = ()
    sliding_windows: tuple[int | None, ...] = ()
    layer_ropes: tuple[RopeConfig | None, ...] = ()
    layer_sizes: tuple[LayerSizes, ...] = ()
    norm: str = "rms"
    norm_position: str = "pre"
    qk_norm: str | None = None
    qk_norm_kind: str | None = None
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    qkv_clip: float | None = None
    attention_scale: float | None = None
    scale_by_layer: bool = False
    attention_softcap: float | None = None
    attention_sinks: bool = False
    alibi: float | None = None
    latent: LatentConfig | None = None
    query_temperature: tuple[float, int] | None = None
    activation: str = "silu"
    mlp_gated: bool = True
    experts: ExpertsConfig | None = None
    dense_layers: tuple[int, ...] = ()
    learned_positions: int | None = None
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    family: str = dataclasses.field(default="", compare=False)

    def __post_init__(self):
        for name in ("vocab_size", "hidden_size", "max_position_embeddings"):
            require_size(name, getattr(self, name))
        require_size("num_layers", self.num_layers, MAX_LAYERS)
        self._check_sizes()
        self._check_attention()
        self._check_layers()
        for name in _FLAGS:
            require_bool(name, getattr(self, name))
        for name in _POSITIVE:
            if (value := getattr(self, name)) is not None or name in _REQUIRED:
                require_positive_float(name, value)
        _require_one_of("norm", self.norm, tuple(NORMS))
        _require_one_of("norm_position", self.norm_position, NORM_POSITIONS)
        _require_one_of("qk_norm", self.qk_norm, (*QK_NORMS, None))
        _require_one_of("qk_norm_kind", self.qk_norm_kind, (*NORMS, None))
        _require_one_of("activation", self.activation, tuple(ACTIVATIONS))
        if self.learned_positions is not None:
            require_size("learned_positions", self.learned_positions)
        if self.head_bias and self.tie_word_embeddings:
            raise ValueError("head_bias: expected False with tie_word_embeddings, because the table has none, got True")
        if not isinstance(self.family, str):
            raise ValueError(f"family: expected a string, got {shown(self.family)}")
        if not isinstance(self.eos_token_ids, tuple):
            raise ValueError(f"eos_token_ids: expected a tuple of token ids, got {shown(self.eos_token_ids)}")
        for token in self.eos_token_ids:
            if not is_int(token) or not 0 <= token < self.vocab_size:
                expected = f"ids in [0, vocab_size={self.vocab_size})"
                raise ValueError(f"eos_token_ids: expected {expected}, got {shown(token)}")

    def layer(self, index: int) -> LayerConfig:
        """The configuration of a layer."""
        sizes = self.layer_sizes[index] if self.layer_sizes else self._sizes
        scale = sizes.head_dim**-0.5 if self.attention_scale is None else self.attention_scale
        return LayerConfig(
            **sizes._asdict(),
            window=self.sliding_window(index),
            rope=self.layer_ropes[index] if self.layer_ropes else self.rope,
            scale=scale / (index + 1) if self.scale_by_layer else scale,
            experts=None if index in self.dense_layers else self.experts,
        )

    def sliding_window(self, layer: int) -> int | None:
        """The number of tokens that a query of this layer sees; None: all."""
        return self.sliding_windows[layer] if self.sliding_windows else None

    @property
    def _sizes(self) -> LayerSizes:
        return LayerSizes(self.num_heads, self.num_kv_heads, self.head_dim, self.intermediate_size)

    def _check_sizes(self) -> None:
        self._check_per_layer("layer_sizes", self.layer_sizes)
        for sizes in (self._sizes, *self.layer_sizes):
            if not isinstance(sizes, LayerSizes):
                raise ValueError(f"layer_sizes: expected LayerSizes for each layer, got {shown(sizes)}")
            for name, size in sizes._asdict().items():
                require_size(name, size)
            require_size("num_heads * head_dim", sizes.num_heads * sizes.head_dim)
            if sizes.num_heads % sizes.num_kv_heads:
                expected = f"a divisor of num_heads={sizes.num_heads}"
                raise ValueError(f"num_kv_heads: expected {expected}, got {sizes.num_kv_heads}")

    def _check_attention(self) -> None:
        if not isinstance(self.rope, RopeConfig | None):
            raise ValueError(f"rope: expected a RopeConfig or None, got {shown(self.rope)}")
        self._check_per_layer("layer_ropes", self.layer_ropes)
        for rope in self.layer_ropes:
            if not isinstance(rope, RopeConfig | None):
                raise ValueError(f"layer_ropes: expected a RopeConfig or None per layer, got {shown(rope)}")
        head_dims = [sizes.head_dim for sizes in self.layer_sizes] or [self.head_dim] * (len(self.layer_ropes) or 1)
        if self.latent is not None:
            self._check_latent(self.latent, min(head_dims))
            head_dims = [self.latent.rope_dim] * len(head_dims)
        ropes = self.layer_ropes or (self.rope,) * len(head_dims)
        for rope, head_dim in {*zip(ropes, head_dims, strict=True)}:
            if rope is not None:
                rope.check_head_dim(head_dim)
        if self.query_temperature is not None:
            if not isinstance(self.query_temperature, tuple) or len(self.query_temperature) != 2:
                raise ValueError(f"query_temperature: expected (beta, length), got {shown(self.query_temperature)}")
            require_positive_float("query_temperature beta", self.query_temperature[0])
            require_size("query_temperature length", self.query_temperature[1])

    def _check_latent(self, latent: Any, head_dim: int) -> None:
        if not isinstance(latent, LatentConfig):
            raise ValueError(f"latent: expected a LatentConfig or None, got {shown(latent)}")
        for sizes in (self._sizes, *self.layer_sizes):
            if sizes.num_kv_heads != sizes.num_heads:
                expected = f"num_heads={sizes.num_heads}, because of latent attention"
                raise ValueError(f"num_kv_heads: expected {expected}, got {sizes.num_kv_heads}")
        for name in ("rope_dim", "value_dim"):
            if getattr(latent, name) > head_dim:
                raise ValueError(f"latent {name}: expected at most {head_dim=}, got {getattr(latent, name)}")
        if self.qk_norm is not None:
            raise ValueError(f"qk_norm: expected None with latent attention, got {self.qk_norm!r}")

    def _check_layers(self) -> None:
        self._check_per_layer("sliding_windows", self.sliding_windows)
        for window in self.sliding_windows:
            if window is not None:
                require_size("sliding_windows", window)
        if not isinstance(self.experts, ExpertsConfig | None):
            raise ValueError(f"experts: expected an ExpertsConfig or None, got {shown(self.experts)}")
        dense = self.dense_layers
        is_valid = isinstance(dense, tuple) and all(is_int(layer) and 0 <= layer < self.num_layers for layer in dense)
        if not is_valid or list(dense) != sorted({*dense}) or (dense and self.experts is None):
            expected = f"increasing indices below num_layers={self.num_layers}, and none without experts"
            raise ValueError(f"dense_layers: expected {expected}, got {shown(dense)}")

    def _check_per_layer(self, name: str, value: Any) -> None:
        if not isinstance(value, tuple) or len(value) not in (0, self.num_layers):
            expected = f"an empty tuple, or one entry for each of {self.num_layers} layers"
            raise ValueError(f"{name}: expected {expected}, got {shown(value)}")


# Fields that may be tuples with one entry per layer.
PER_LAYER = ("sliding_windows", "layer_ropes", "layer_sizes")

_FLAGS = (
    "tie_word_embeddings",
    "qkv_bias",
    "output_bias",
    "mlp_bias",
    "head_bias",
    "scale_by_layer",
    "attention_sinks",
    "mlp_gated",
)
_REQUIRED = ("rms_norm_eps", "embedding_scale", "residual_scale", "logit_scale")
_POSITIVE = (*_REQUIRED, "qkv_clip", "attention_scale", "attention_softcap", "alibi", "logit_softcap")


def _require_one_of(name: str, value: Any, choices: tuple) -> None:
    if not isinstance(value, str | None) or value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(str, choices))}, got {shown(value)}")
