"""The parts of a Llama decoder besides attention: embedding, RMSNorm, rotary embedding, gated MLP.

Linear maps are ``nnx.Linear`` without bias; kernels are ``[in, out]``.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from pallas_attn_models.decoder.config import RopeConfig

_INITIALIZER = nnx.initializers.normal(0.02)


class _CountedStream(nnx.RngStream):
    """The keys of another stream, counted by a Python int."""

    def __init__(self, stream: nnx.RngStream) -> None:
        super().__init__(stream.key[...], tag=stream.tag)
        self.first = stream.count[...]
        self.given = 0

    def __call__(self) -> Array:
        key = jax.random.fold_in(self.key[...], self.first + self.given)
        self.given += 1
        return key


@contextmanager
def counted(rngs: nnx.Rngs) -> Iterator[nnx.Rngs]:
    """Yields ``rngs`` with the same keys whose count is updated only once, at the end.

    Under ``nnx.eval_shape``, Flax searches everything traced so far whenever a count is updated, which takes time
    quadratic in the number of parameters.
    """
    stream = rngs.params
    replacement = nnx.Rngs()
    counting = _CountedStream(stream)
    replacement.params = counting  # pyright: ignore[reportAttributeAccessIssue]
    yield replacement
    stream.count[...] = counting.first + counting.given


def linear(
    in_features: int, out_features: int, *, rngs: nnx.Rngs, dtype: DTypeLike, param_dtype: DTypeLike, **options
) -> nnx.Linear:
    """A linear map without bias, ``[.., in] -> [.., out]``."""
    return nnx.Linear(
        in_features,
        out_features,
        use_bias=False,
        dtype=dtype,
        param_dtype=param_dtype,
        kernel_init=_INITIALIZER,
        rngs=rngs,
        **options,
    )


class Embedding(nnx.Module):
    """The embedding table, ``[V, E]``; a tied model also uses it as the output head."""

    def __init__(
        self, vocab_size: int, hidden_size: int, *, rngs: nnx.Rngs, dtype: DTypeLike, param_dtype: DTypeLike
    ) -> None:
        self.table = nnx.Param(_INITIALIZER(rngs.params(), (vocab_size, hidden_size), param_dtype))
        self.dtype = dtype

    def __call__(self, tokens: Array) -> Array:
        """``[B, T] -> [B, T, E]``. A token outside the vocabulary yields NaN instead of a silent error."""
        rows = self.table[...].at[tokens].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
        return rows.astype(self.dtype)

    def logits(self, hidden: Array) -> Array:
        """``[B, T, E] -> float32 [B, T, V]``."""
        table = self.table[...].astype(self.dtype)
        return jnp.einsum("bte,ve->btv", hidden.astype(self.dtype), table, preferred_element_type=jnp.float32)


class RMSNorm(nnx.Module):
    """Root mean square normalization (Zhang & Sennrich 2019, arXiv:1910.07467, equation 4), computed in float32."""

    def __init__(self, size: int, epsilon: float, *, dtype: DTypeLike, param_dtype: DTypeLike) -> None:
        self.scale = nnx.Param(jnp.ones((size,), param_dtype))
        self.epsilon = epsilon
        self.dtype = dtype

    def __call__(self, x: Array) -> Array:
        """``[B, T, E] -> [B, T, E]``."""
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + jnp.float32(self.epsilon))
        # Round before scaling, as in the training of the Llama checkpoints.
        return x.astype(self.dtype) * self.scale[...].astype(self.dtype)[None, None]


class MLP(nnx.Module):
    """The gated MLP, ``down(silu(gate(x)) * up(x))`` (SwiGLU: Shazeer 2020, arXiv:2002.05202, equation 6)."""

    def __init__(
        self, hidden_size: int, intermediate_size: int, *, rngs: nnx.Rngs, dtype: DTypeLike, param_dtype: DTypeLike
    ) -> None:
        options = {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
        self.gate = linear(hidden_size, intermediate_size, **options)
        self.up = linear(hidden_size, intermediate_size, **options)
        self.down = linear(intermediate_size, hidden_size, **options)

    def __call__(self, x: Array) -> Array:
        """``[B, T, E] -> [B, T, E]``."""
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


def inverse_frequencies(head_dim: int, rope: RopeConfig) -> np.ndarray:
    """The rotation angle per position of each pair of a head, float64 ``[D / 2]``; see :class:`RopeConfig`."""
    frequency = rope.theta ** -(np.arange(0, head_dim, 2) / head_dim)
    if rope.type == "linear":
        return frequency / rope.factor
    if rope.type == "llama3":
        rotations = rope.original_max_position_embeddings * frequency / (2 * np.pi)  # over the original context
        keep = (rotations - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        keep = np.clip(keep, 0.0, 1.0)
        return keep * frequency + (1 - keep) * frequency / rope.factor
    return frequency


def rotary_tables(positions: Array, head_dim: int, rope: RopeConfig) -> tuple[Array, Array]:
    """Cosines and sines, shared by all layers: int32 ``[B|1, T]`` -> two float32 ``[B|1, T, 1, D / 2]``."""
    frequency = jnp.asarray(inverse_frequencies(head_dim, rope), jnp.float32)
    angle = positions.astype(jnp.float32)[..., None, None] * frequency[None, None, None]
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Rotates ``[B, T, heads, D]`` by the angles of :func:`rotary_tables`, in float32; keeps the dtype of ``x``.

    The pairs are (i, i + D/2), as in transformers' checkpoints; RoFormer (arXiv:2104.09864, equation 34) pairs
    neighbors, which is equivalent up to a permutation of the rows of the query and key projections.
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
