"""Linear maps, embedding and MLP of a decoder. Linear maps are ``nnx.Linear``; kernels are ``[in, out]``."""

from collections.abc import Iterator
from contextlib import contextmanager

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from pallas_attn_models.decoder.activations import ACTIVATIONS

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
    in_features: int,
    out_features: int,
    *,
    rngs: nnx.Rngs,
    dtype: DTypeLike,
    param_dtype: DTypeLike,
    bias: bool = False,
    **options,
) -> nnx.Linear:
    """A linear map, ``[.., in] -> [.., out]``."""
    return nnx.Linear(
        in_features,
        out_features,
        use_bias=bias,
        dtype=dtype,
        param_dtype=param_dtype,
        kernel_init=_INITIALIZER,
        rngs=rngs,
        **options,
    )


class Embedding(nnx.Module):
    """A table of vectors, ``[V, E]``, of tokens or of positions; a tied model also uses it as the output head."""

    def __init__(
        self, vocab_size: int, hidden_size: int, *, rngs: nnx.Rngs, dtype: DTypeLike, param_dtype: DTypeLike
    ) -> None:
        self.table = nnx.Param(_INITIALIZER(rngs.params(), (vocab_size, hidden_size), param_dtype))
        self.dtype = dtype

    def __call__(self, tokens: Array) -> Array:
        """``[B, T] -> [B, T, E]``. An index outside the table yields NaN instead of a silent error."""
        rows = self.table[...].at[tokens].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
        return rows.astype(self.dtype)

    def logits(self, hidden: Array) -> Array:
        """``[B, T, E] -> float32 [B, T, V]``."""
        table = self.table[...].astype(self.dtype)
        return jnp.einsum("bte,ve->btv", hidden.astype(self.dtype), table, preferred_element_type=jnp.float32)


class MLP(nnx.Module):
    """``down(activation(gate(x)) * up(x))`` (GLU variants: Shazeer 2020, arXiv:2002.05202, equation 6), or, without a
    gate, ``down(activation(up(x)))``.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        activation: str,
        gated: bool,
        bias: bool,
        rngs: nnx.Rngs,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
    ) -> None:
        options = {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype, "bias": bias}
        self.activation = ACTIVATIONS[activation]
        self.gate = linear(hidden_size, intermediate_size, **options) if gated else None
        self.up = linear(hidden_size, intermediate_size, **options)
        self.down = linear(intermediate_size, hidden_size, **options)

    def __call__(self, x: Array) -> Array:
        """``[B, T, E] -> [B, T, E]``."""
        if self.gate is None:
            return self.down(self.activation(self.up(x)))
        return self.down(self.activation(self.gate(x)) * self.up(x))
