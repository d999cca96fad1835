"""How the contents of a slot are held."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array


class Storage:
    """Holds ``[B, capacity, K, D]`` in some form. A storage is static; the form is a pytree of arrays."""

    def allocate(self, batch_size: int, capacity: int, kv_heads: int, head_dim: int, dtype) -> Array:
        """An empty buffer."""
        raise NotImplementedError(type(self).__name__)

    def write(self, buffer: Array, slots: Array, x: Array) -> Array:
        """Writes ``x`` ``[B, t, K, D]`` at ``slots`` int32 ``[B, t]``; slots beyond the capacity are dropped."""
        raise NotImplementedError(type(self).__name__)

    def read(self, buffer: Array) -> Array:
        """The buffer as attention takes it."""
        raise NotImplementedError(type(self).__name__)


@dataclasses.dataclass(frozen=True)
class Plain(Storage):
    """As it comes, in the cache's dtype."""

    def allocate(self, batch_size: int, capacity: int, kv_heads: int, head_dim: int, dtype) -> Array:
        return jnp.zeros((batch_size, capacity, kv_heads, head_dim), dtype)

    def write(self, buffer: Array, slots: Array, x: Array) -> Array:
        row = jax.lax.broadcasted_iota(jnp.int32, slots.shape, 0)
        return buffer.at[row, slots].set(x.astype(buffer.dtype), mode="drop")

    def read(self, buffer: Array) -> Array:
        return buffer
