"""Normalization layers: RMSNorm and LayerNorm in the variants of today's checkpoints."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike


class NormKind(NamedTuple):
    """A variant of normalization.

    Attributes:
      centered: whether the mean is subtracted (LayerNorm: Ba et al. 2016, arXiv:1607.06450), or not (RMSNorm: Zhang &
        Sennrich 2019, arXiv:1910.07467, equation 4).
      scale: whether there are weights.
      bias: whether there is a bias.
      offset: added to the weights; with 1, weights of 0 are neutral.
      rounds_first: whether the normalized values are rounded to the dtype of activations before they are scaled.
    """

    centered: bool
    scale: bool = True
    bias: bool = False
    offset: float = 0.0
    rounds_first: bool = False


NORMS: dict[str, NormKind] = {
    "rms": NormKind(centered=False, rounds_first=True),
    "rms_float32": NormKind(centered=False),
    "rms_offset": NormKind(centered=False, offset=1.0),
    "layer": NormKind(centered=True, bias=True),
    "layer_scale": NormKind(centered=True),
    "layer_plain": NormKind(centered=True, scale=False),
    "layer_offset": NormKind(centered=True, bias=True, offset=1.0),
}


class Norm(nnx.Module):
    """Normalizes over the last axis, or the last two if the weights differ by head; computed in float32.

    Args:
      shape: of the weights: ``(size,)``, or ``(heads, size)`` for weights per head.
      kind: a name in :data:`NORMS`.
      epsilon: added to the mean square, or to the variance.
    """

    def __init__(
        self, shape: tuple[int, ...], kind: str, epsilon: float, *, dtype: DTypeLike, param_dtype: DTypeLike
    ) -> None:
        self.kind = NORMS[kind]
        self.epsilon = epsilon
        self.dtype = dtype
        if self.kind.scale:
            self.scale = nnx.Param(jnp.full(shape, 1.0 - self.kind.offset, param_dtype))
        if self.kind.bias:
            self.bias = nnx.Param(jnp.zeros(shape, param_dtype))

    def __call__(self, x: Array) -> Array:
        """``[B, T, size] -> [B, T, size]``, or ``[B, T, heads, size]``."""
        x = x.astype(jnp.float32)
        if self.kind.centered:
            x = x - jnp.mean(x, axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + jnp.float32(self.epsilon))
        if self.kind.rounds_first:
            x = x.astype(self.dtype)
        if self.kind.scale:
            scale = self._parameter(self.scale, x)
            x = x * (scale + self.kind.offset if self.kind.offset else scale)
        if self.kind.bias:
            x = x + self._parameter(self.bias, x)
        return x.astype(self.dtype)

    def _parameter(self, parameter: nnx.Param, x: Array) -> Array:
        value = parameter[...].astype(x.dtype)
        return jnp.expand_dims(value, tuple(range(x.ndim - value.ndim)))
