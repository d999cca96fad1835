"""Keys and values quantized to 8 or 4 bits, symmetrically: a number times a float32 scale.

An 8-bit array has one scale per token and head. Four bits are too few for that, so an int4 array has one per group of
neighboring columns of each token and head (compare KIVI, arXiv:2402.02750, and FlexGen, arXiv:2303.06865).
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_attn import checks
from pallas_attn.refusal import without_derivative

Kind = Literal["int8", "float8_e4m3fn", "int4"]

# The quantized value of the largest magnitude in a vector (int4: in a group).
_LARGEST: dict[Kind, float] = {"int8": 127.0, "float8_e4m3fn": 448.0, "int4": 7.0}
_NO_GRADIENT = (
    "QuantizedArray.quantize has no gradient, because it rounds: stop the gradient with jax.lax.stop_gradient, or do"
    " not quantize (in a cache: Plain storage)"
)
_KIND_OF_DTYPE: dict[str, Kind] = {"int8": "int8", "float8_e4m3fn": "float8_e4m3fn", "uint8": "int4"}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class QuantizedArray:
    """``x = values * scales``, for the keys and values of :func:`~pallas_attn.attention`; see :meth:`quantize`.

    Two columns of int4 share a byte: its low four bits hold column ``c`` of the first half, its high four bits column
    ``c`` of the second half, each in two's complement, -7 to 7. Kernels read both halves without interleaving them.

    Attributes:
      values: int8 or float8_e4m3fn ``[.., K, D]``; int4: uint8 ``[.., K, D // 2]``.
      scales: float32 ``[.., K]``; int4: ``[.., K, D // group]``.
    """

    values: Array
    scales: Array

    @staticmethod
    def quantize(x: Array, kind: Kind, group: int = 32) -> "QuantizedArray":
        """Rounds to the nearest representable values. A non-finite element makes its vector (or group) NaN.

        Rounding has no gradient, so differentiating this function raises. The gradient of :meth:`dequantize` is with
        respect to values and scales.

        Args:
          x: floating-point ``[.., K, D]``.
          kind: "int8", "float8_e4m3fn" or "int4".
          group: int4 only: columns per scale, a divisor of D / 2.

        Raises:
          TypeError: x is not an array, kind not a string, or group not an int.
          ValueError: an unknown kind, x is empty, of rank 0 or not floating-point, or group does not divide D / 2.
          NotImplementedError: a gradient reaches it; the message says how to stop it.
        """
        x = checks.array("x", x)
        if not isinstance(kind, str):
            raise TypeError(f"kind: expected one of {list(_LARGEST)}, got {checks.describe(kind)}")
        if kind not in _LARGEST:
            raise ValueError(f"kind: expected one of {list(_LARGEST)}, got {kind!r}")
        if not jnp.issubdtype(x.dtype, jnp.floating) or x.ndim == 0:
            raise ValueError(f"x: expected floating-point [.., K, D], got {x.dtype} {list(x.shape)}")
        if 0 in x.shape:
            raise ValueError(f"x: expected no empty axis, got shape {tuple(x.shape)}")
        group = checks.integer("group", group, least=1)
        x = checks.floats("x", x)
        head_dim = x.shape[-1]
        columns = group if kind == "int4" else head_dim
        if kind == "int4" and head_dim % (2 * group):
            raise ValueError(f"group: expected a divisor of D / 2 = {head_dim / 2:g} for int4, got {group}")
        quantized = functools.partial(_quantize, kind=kind, columns=columns)
        return without_derivative(quantized, _NO_GRADIENT)(x)

    def dequantize(self) -> Array:
        """Returns float32 ``[.., K, D]``."""
        if self.kind != "int4":
            return self.values.astype(jnp.float32) * self.scales[..., None]
        # Shifts extend the sign. XLA decode on a CPU takes half the time when this concatenates the bytes first
        # instead of the two unpacked halves later.
        head_dim = self.shape[-1]
        twice = jnp.concatenate([self.values, self.values], axis=-1).astype(jnp.int32)
        in_first_half = lax.broadcasted_iota(jnp.int32, twice.shape, twice.ndim - 1) < head_dim // 2
        shifts = jnp.where(in_first_half, jnp.int32(28), jnp.int32(24))
        groups = (twice << shifts >> 28).astype(jnp.float32).reshape(*self.scales.shape, self.group)
        return (groups * self.scales[..., None]).reshape(self.shape)

    def check(self, name: str) -> None:
        """Validates values and scales; ``name`` is the argument's name in messages.

        Raises:
          TypeError: values or scales are not arrays.
          ValueError: their dtypes or shapes do not match.
        """
        for part, x in (("values", self.values), ("scales", self.scales)):
            if not checks.array(f"{name}.{part}", x).ndim:
                raise ValueError(f"{name}.{part}: expected rank 1 or more, got {checks.describe(x)}")
        if str(self.values.dtype) not in _KIND_OF_DTYPE:
            wanted = "int8, float8_e4m3fn or uint8 (two columns of int4)"
            raise ValueError(f"{name}.values: expected dtype {wanted}, got {self.values.dtype}")
        leading, shape = self.shape[:-1], tuple(self.scales.shape)
        fits = shape == leading
        wanted = f"{list(leading)}"
        if self.kind == "int4":
            half = self.values.shape[-1]
            # No group crosses the middle.
            fits = shape[:-1] == leading and shape[-1] % 2 == 0 and shape[-1] > 0 and half % (shape[-1] // 2) == 0
            wanted = f"{[*leading, 'groups']} with an even number of groups that divides {2 * half}"
        if self.scales.dtype != jnp.float32 or not fits:
            raise ValueError(f"{name}.scales: expected float32 {wanted}, got {self.scales.dtype} {list(shape)}")

    @property
    def kind(self) -> Kind:
        """ "int8", "float8_e4m3fn" or "int4"."""
        return _KIND_OF_DTYPE[str(self.values.dtype)]

    @property
    def shape(self) -> tuple[int, ...]:
        """``[.., K, D]``, the shape of the dequantized array."""
        *leading, columns = self.values.shape
        return (*leading, 2 * columns if self.kind == "int4" else columns)

    @property
    def ndim(self) -> int:
        """Rank of :attr:`shape`."""
        return self.values.ndim

    @property
    def group(self) -> int:
        """Columns that share a scale: D, except for int4."""
        return self.shape[-1] // self.scales.shape[-1] if self.kind == "int4" else self.shape[-1]

    @property
    def nbytes(self) -> int:
        """Bytes of values and scales."""
        return sum(x.size * x.dtype.itemsize for x in (self.values, self.scales))


KVArray = Array | QuantizedArray


def _quantize(x: Array, *, kind: Kind, columns: int) -> QuantizedArray:
    """Quantizes ``x`` ``[.., K, D]`` with one scale for every ``columns`` columns."""
    groups = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, columns)
    largest = jnp.abs(groups).max(-1) / _LARGEST[kind]
    # At least the smallest normal number, so that zeros stay zeros and flushing subnormals loses no scale.
    scales = jnp.maximum(largest, jnp.finfo(jnp.float32).tiny)
    # Explicitly, since XLA on a CPU drops NaN in some maxima.
    scales = jnp.where(jnp.isfinite(groups).all(-1), scales, jnp.nan)
    values = (groups / scales[..., None]).reshape(x.shape)
    if kind == "float8_e4m3fn":
        return QuantizedArray(values.astype(jnp.float8_e4m3fn), scales[..., 0])
    values = jnp.round(values).astype(jnp.int8)
    if kind == "int8":
        return QuantizedArray(values, scales[..., 0])
    first, second = jnp.split(values.astype(jnp.uint8), 2, axis=-1)
    return QuantizedArray(first & 15 | second << 4, scales)
