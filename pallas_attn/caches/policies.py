"""Which slot a token takes, and what happens when there is none left."""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array


class Placement(NamedTuple):
    """Where new tokens go.

    Attributes:
      slots: int32 ``[B, t]``; a token that is not stored has the slot ``capacity``, which does not exist.
      lengths: int32 ``[B]``, tokens stored afterwards.
      lost: bool ``[B]``, rows with a token that found no room.
    """

    slots: Array
    lengths: Array
    lost: Array


class Policy:
    """Decides, per row, the slot of each new token. A policy is static: it holds settings, never arrays."""

    def place(self, lengths: Array, real: Array, capacity: int) -> Placement:
        """Args: int32 ``lengths`` ``[B]`` before, bool ``real`` ``[B, t]`` (False: padding, which is never stored)."""
        raise NotImplementedError(type(self).__name__)


@dataclasses.dataclass(frozen=True)
class Dense(Policy):
    """Keeps every token, in order of arrival. A row that is full takes no more and says so (``overflowed``)."""

    def place(self, lengths: Array, real: Array, capacity: int) -> Placement:
        slots = lengths[:, None] + jnp.cumsum(real, axis=1, dtype=jnp.int32) - 1
        stored = real & (slots < capacity)
        return Placement(
            slots=jnp.where(stored, slots, capacity),
            lengths=lengths + stored.sum(1, dtype=jnp.int32),
            lost=(real & ~stored).any(1),
        )
