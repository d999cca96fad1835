"""Rotary position embedding: its configuration, its angles and the rotation."""

import dataclasses
import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from pallas_attn_models.checks import (
    MAX_FLOAT32,
    MAX_INT32,
    require_bool,
    require_positive_float,
    require_size,
    shown,
)


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864) and its extensions to longer contexts.

    Attributes:
      theta: base of the geometric progression of wavelengths.
      type: how the frequencies are stretched. P stands for ``original_max_position_embeddings``, the context of
        pretraining.

        - ``"default"``: not at all.
        - ``"linear"``: divided by ``factor`` (Chen et al. 2023, arXiv:2306.15595).
        - ``"llama3"``: divided for wavelengths above P / ``low_freq_factor``, kept for those below P /
          ``high_freq_factor``, interpolated between (Llama 3.1, arXiv:2407.21783).
        - ``"yarn"``: divided for pairs that rotate less than ``beta_slow`` times in P positions, kept for those that
          rotate more than ``beta_fast`` times, interpolated between (Peng et al. 2023, arXiv:2309.00071).
        - ``"dynamic"``: NTK scaling (the same, section 3.3) of ``theta`` for as many positions as the caches hold.
        - ``"longrope"``: divided by ``long_factor`` if the caches hold more than P positions, else by ``short_factor``
          (Ding et al. 2024, arXiv:2402.13753).
        - ``"proportional"``: default, but the ``partial_rotary_factor`` chooses among the pairs of the whole head.

        Keys are cached rotated, so the capacity of the caches (without caches, the number of tokens of the call)
        decides for dynamic and longrope, once and for all.
      factor: by how much the context is stretched; 1 for default.
      low_freq_factor, high_freq_factor: used by llama3.
      original_max_position_embeddings: P.
      partial_rotary_factor: the part of a head that is rotated, from its start.
      interleaved: whether pairs are neighbors (2 i, 2 i + 1) instead of halves (i, i + D / 2).
      beta_fast, beta_slow: used by yarn.
      truncate: whether yarn rounds the borders of its ramp to whole pairs.
      attention_factor: multiplies cosines and sines (yarn and longrope). None: 0.1 ln(factor) + 1 for yarn,
        sqrt(1 + ln(factor) / ln(P)) for longrope.
      short_factor, long_factor: one number per rotated pair, used by longrope.

    Raises:
      ValueError: a value that the type does not use, or that float32 or int32 cannot represent.
    """

    theta: float = 10000.0
    type: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    partial_rotary_factor: float = 1.0
    interleaved: bool = False
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()

    def __post_init__(self):
        if not isinstance(self.type, str) or self.type not in ROPE_FIELDS:
            raise ValueError(f"rope type: expected one of {sorted(ROPE_FIELDS)}, got {shown(self.type)}")
        for name in ("theta", "factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"):
            require_positive_float(f"rope {name}", getattr(self, name))
        if self.attention_factor is not None:
            require_positive_float("rope attention_factor", self.attention_factor)
        require_size("rope original_max_position_embeddings", self.original_max_position_embeddings)
        require_positive_float("rope partial_rotary_factor", self.partial_rotary_factor)
        if self.partial_rotary_factor > 1:
            got = shown(self.partial_rotary_factor)
            raise ValueError(f"rope partial_rotary_factor: expected a number in (0, 1], got {got}")
        require_bool("rope interleaved", self.interleaved)
        require_bool("rope truncate", self.truncate)
        for name in ("short_factor", "long_factor"):
            self._check_factors(name)
        for field in dataclasses.fields(self)[2:]:
            value = getattr(self, field.name)
            used = ROPE_FIELDS[self.type] + ROPE_COMMON
            if field.name not in used and value != field.default:
                expected = f"no value, because type {self.type!r} does not use it"
                raise ValueError(f"rope {field.name}: expected {expected}, got {value!r}")
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"rope high_freq_factor: expected more than low_freq_factor={self.low_freq_factor}, "
                f"got {self.high_freq_factor}"
            )
        if self.type == "yarn" and self.theta <= 1:
            raise ValueError(f"rope theta: expected more than 1 for yarn, got {self.theta!r}")
        if self.type == "longrope" and self.original_max_position_embeddings == 1:
            raise ValueError("rope original_max_position_embeddings: expected more than 1 for longrope, got 1")
        # The highest frequency of a head; theta or factor below 1 raise it above 1.
        fastest = max(1.0, 1 / self.theta) * max(1.0, 1 / min(self.factor, *self.short_factor, *self.long_factor, 1))
        if fastest * MAX_INT32 > MAX_FLOAT32:
            got = f"theta={self.theta!r}, factor={self.factor!r}"
            raise ValueError(f"rope theta, factor: expected angles within float32 at every position, got {got}")

    def rotary_dim(self, head_dim: int) -> int:
        """How many numbers of a head are rotated."""
        return head_dim if self.type == "proportional" else int(head_dim * self.partial_rotary_factor)

    def check_head_dim(self, head_dim: int) -> None:
        """Raises ValueError unless heads of this size can be rotated in pairs."""
        rotated = self.rotary_dim(head_dim)
        if rotated % 2 or rotated == 0:
            part = "" if rotated == head_dim else f", of which {self.partial_rotary_factor} is {rotated}"
            expected = "an even number (rotary embedding rotates pairs)"
            raise ValueError(f"head_dim: expected {expected}, got {head_dim}{part}")
        for name in ("short_factor", "long_factor"):
            if self.type == "longrope" and len(getattr(self, name)) != rotated // 2:
                got = len(getattr(self, name))
                raise ValueError(f"rope {name}: expected one number per rotated pair, {rotated // 2}, got {got}")

    def _check_factors(self, name: str) -> None:
        factors = getattr(self, name)
        if not isinstance(factors, tuple):
            raise ValueError(f"rope {name}: expected a tuple of numbers, got {shown(factors)}")
        for factor in factors:
            require_positive_float(f"rope {name}", factor)


# Rope type -> fields that it uses besides theta and ROPE_COMMON.
ROPE_COMMON = ("partial_rotary_factor", "interleaved")
ROPE_FIELDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "beta_fast",
        "beta_slow",
        "truncate",
        "attention_factor",
    ),
    "dynamic": ("factor", "original_max_position_embeddings"),
    "longrope": (
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "short_factor",
        "long_factor",
    ),
    "proportional": ("factor",),
}


class RotaryTables(NamedTuple):
    """Cosines and sines, float32 ``[B|1, T, 1, R / 2]`` for R rotated numbers of a head; see :class:`RopeConfig`."""

    cos: Array
    sin: Array
    interleaved: bool


def inverse_frequencies(head_dim: int, rope: RopeConfig, length: int = 0) -> np.ndarray:
    """The rotation angle per position of each rotated pair of a head, float64; see :class:`RopeConfig`.

    Args:
      head_dim: D.
      rope: the settings.
      length: positions that the caches hold; dynamic and longrope depend on it.
    """
    rotated = rope.rotary_dim(head_dim)
    pairs = np.arange(0, rotated, 2) / rotated
    theta, original = rope.theta, rope.original_max_position_embeddings
    frequency = theta**-pairs
    match rope.type:
        case "linear":
            return frequency / rope.factor
        case "llama3":
            rotations = original * frequency / (2 * np.pi)  # over the original context
            keep = (rotations - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
            keep = np.clip(keep, 0.0, 1.0)
            return keep * frequency + (1 - keep) * frequency / rope.factor
        case "yarn":
            keep = 1 - _yarn_ramp(rotated, rope)
            return keep * frequency + (1 - keep) * frequency / rope.factor
        case "dynamic":
            stretch = rope.factor * max(length, original) / original - (rope.factor - 1)
            return (theta * stretch ** (rotated / (rotated - 2))) ** -pairs if rotated > 2 else frequency
        case "longrope":
            return frequency / np.array(rope.long_factor if length > original else rope.short_factor)
        case "proportional":
            kept = int(rope.partial_rotary_factor * head_dim // 2)
            return np.where(np.arange(rotated // 2) < kept, frequency, 0.0) / rope.factor
    return frequency


def attention_factor(rope: RopeConfig) -> float:
    """The factor of cosines and sines; its square multiplies the logits."""
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.factor <= 1:
        return 1.0
    if rope.type == "yarn":
        return 0.1 * math.log(rope.factor) + 1.0
    if rope.type == "longrope":
        return math.sqrt(1 + math.log(rope.factor) / math.log(rope.original_max_position_embeddings))
    return 1.0


def rotary_tables(positions: Array, head_dim: int, rope: RopeConfig, length: int = 0) -> RotaryTables:
    """The tables for int32 ``[B|1, T]`` positions, shared by all layers with these settings."""
    frequency = jnp.asarray(inverse_frequencies(head_dim, rope, length), jnp.float32)
    angle = positions.astype(jnp.float32)[..., None, None] * frequency[None, None, None]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    if (factor := attention_factor(rope)) != 1:
        cos, sin = cos * jnp.float32(factor), sin * jnp.float32(factor)
    return RotaryTables(cos, sin, rope.interleaved)


def rotate(x: Array, tables: RotaryTables) -> Array:
    """Rotates ``[B, T, heads, D]`` by the angles of :func:`rotary_tables`, in float32; keeps the dtype of ``x``.

    The pairs of most checkpoints are (i, i + R / 2); RoFormer (arXiv:2104.09864, equation 34) pairs neighbors, which is
    equivalent up to a permutation of the rows of the query and key projections.
    """
    rotated = 2 * tables.cos.shape[-1]
    whole, rest = x[..., :rotated].astype(jnp.float32), x[..., rotated:]
    if tables.interleaved:
        first, second = whole[..., 0::2], whole[..., 1::2]
    else:
        first, second = jnp.split(whole, 2, axis=-1)
    turned = first * tables.cos - second * tables.sin, second * tables.cos + first * tables.sin
    if tables.interleaved:
        out = jnp.stack(turned, axis=-1).reshape(whole.shape)
    else:
        out = jnp.concatenate(turned, axis=-1)
    out = out.astype(x.dtype)
    return jnp.concatenate([out, rest], axis=-1) if rest.shape[-1] else out


def _yarn_ramp(rotated: int, rope: RopeConfig) -> np.ndarray:
    """How far each pair is interpolated, from 0 to 1."""

    def pair(rotations: float) -> float:
        """The pair that rotates this often in the original context."""
        wavelength = rope.original_max_position_embeddings / (rotations * 2 * math.pi)
        return rotated * math.log(wavelength) / (2 * math.log(rope.theta))

    low, high = pair(rope.beta_fast), pair(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotated - 1)
    if low == high:
        high += 0.001  # no division by zero
    return np.clip((np.arange(rotated // 2) - low) / (high - low), 0.0, 1.0)
