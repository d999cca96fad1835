"""Which slot a token takes, and which token goes when there is no free one.

A policy is static: it holds settings, never arrays. What it knows of each slot is the cache's ``state``, arrays
``[B, K, capacity]``, whose entries begin as :meth:`Policy.new_state` says when a token takes the slot. A policy of your
own overrides :meth:`Policy.importance`, and what else it needs (README.md beside this file has an example).

R is the number of rows that a call is about: those of its ``rows``, or all B.
"""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from pallas_attn import checks, masks
from pallas_attn.caches.rows import numbers as row_numbers
from pallas_attn.caches.storage import Stored

State = dict[str, Array]


class Slots(NamedTuple):
    """What a cache holds, as its policy sees it.

    Attributes:
      positions: int32 ``[R, M, capacity]``; -1: the slot is free. M is 1, or K where heads keep tokens of their own.
      lengths: int32 ``[R]``, tokens that came in so far.
      state: float32 ``[R, K, capacity]`` each.
    """

    positions: Array
    lengths: Array
    state: State

    @property
    def capacity(self) -> int:
        """Slots in each row."""
        return self.positions.shape[-1]


class Tokens(NamedTuple):
    """New tokens: as they come ``[R, t, K, D]``, and as the storage holds them."""

    key: Array
    value: Array
    stored_key: Stored
    stored_value: Stored


class Placement(NamedTuple):
    """Where new tokens go.

    Attributes:
      slots: int32 ``[R, M, t]``; a token that is not stored has the slot ``capacity``, which does not exist. No
        other slot of a row comes twice.
      lengths: int32 ``[R]``, tokens that came in, with these.
      lost: bool ``[R]``, rows that had to drop a token which the policy would have kept.
    """

    slots: Array
    lengths: Array
    lost: Array


class Policy:
    """Decides, per row, the slot of each new token."""

    bounded = True  # rows may be longer than the cache: old tokens make room for new ones
    per_head = False  # every KV head keeps tokens of its own
    observes = False  # reads key weights, so attention has to compute them
    ordered = False  # slot n has the row's token number n

    @property
    def mask(self) -> masks.Mask | None:
        """What queries may see of the cache, besides what the model says; None: everything in it."""
        return None

    def check(self, capacity: int) -> None:
        """Raises a ValueError if a cache of this capacity cannot do what the policy says."""

    def longest_append(self, capacity: int) -> int:
        """How many tokens a row of any length takes at once without losing one that should stay."""
        return capacity

    def new_state(self, tokens: Tokens) -> State:
        """What is known of tokens when they come in: float32 ``[R, t, K]`` each."""
        del tokens
        return {}

    def importance(self, slots: Slots) -> Array:
        """float32 ``[R, M, capacity]``: the least goes first, ``inf`` should stay. Free slots may say anything."""
        raise NotImplementedError(f"{type(self).__name__}.importance: a policy says which tokens go first")

    def place(self, slots: Slots, real: Array) -> Placement:
        """Finds slots: those that are free, then those of the tokens that matter least.

        Of more tokens than there are slots, the last are stored.

        Args:
          slots: what is there.
          real: bool ``[R, t]``; False: padding, which is never stored.
        """
        capacity = slots.capacity
        importance = jnp.where(slots.positions >= 0, self.importance(slots), -jnp.inf)
        count = real.sum(1, dtype=jnp.int32)
        rank = jnp.cumsum(real, axis=1, dtype=jnp.int32) - 1 - jnp.maximum(count - capacity, 0)[:, None]
        stored = real & (rank >= 0)
        # Ascending, and of equals the slot with the lower number first.
        negative, order = lax.top_k(-importance, min(real.shape[1], capacity))
        at = jnp.clip(rank, 0, order.shape[-1] - 1)[:, None]
        gone = jnp.take_along_axis(negative, jnp.broadcast_to(at, (*order.shape[:2], at.shape[-1])), axis=-1)
        taken = jnp.take_along_axis(order, jnp.broadcast_to(at, gone.shape), axis=-1)
        evicts_needed = (gone == -jnp.inf).any(1) & stored
        return Placement(
            slots=jnp.where(stored[:, None], taken.astype(jnp.int32), capacity),
            lengths=slots.lengths + count,
            lost=((real & ~stored) | evicts_needed).any(1),
        )

    def observe(self, slots: Slots, key_weights: Array) -> State:
        """The state after queries gave ``key_weights`` float32 ``[R, K, capacity]`` to what is in the slots."""
        del key_weights
        return slots.state

    def truncate(self, slots: Slots, lengths: Array) -> tuple[Array, Array]:
        """Which slots stay when a row keeps its first ``lengths`` int32 ``[R]`` tokens alone, never more than it has.

        Returns:
          bool ``[R, M, capacity]``, and bool ``[R]``: rows in which a token is gone that would be needed again.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot take tokens back: it has dropped others for them")


@dataclasses.dataclass(frozen=True)
class Dense(Policy):
    """Keeps every token, in order of arrival. A row that is full takes no more and says so (``overflowed``)."""

    bounded = False
    ordered = True

    def place(self, slots: Slots, real: Array) -> Placement:
        at = slots.lengths[:, None] + jnp.cumsum(real, axis=1, dtype=jnp.int32) - 1
        stored = real & (at < slots.capacity)
        return Placement(
            slots=jnp.where(stored, at, slots.capacity)[:, None],
            lengths=slots.lengths + stored.sum(1, dtype=jnp.int32),
            lost=(real & ~stored).any(1),
        )

    def truncate(self, slots: Slots, lengths: Array) -> tuple[Array, Array]:
        slot = lax.broadcasted_iota(jnp.int32, slots.positions.shape, 2)
        return slot < lengths[:, None, None], jnp.zeros(lengths.shape, jnp.bool_)


@dataclasses.dataclass(frozen=True)
class Window(Policy):
    """Keeps the last ``size`` tokens, and for good the first ``sinks`` (StreamingLLM, arXiv:2309.17453, section 3.2).

    What a query sees does not depend on how the tokens came in: its own and the ``size - 1`` before it, and those at
    positions below ``sinks``. So a row of a chunk of t tokens holds more than ``size`` for a while, and the capacity
    needs slack: ``sinks + size + t - 1`` slots, or at least as many as the row has tokens. As many slots are needed to
    take t tokens back. What the slack is too small for sets ``overflowed``.

    Tokens are kept by their number in the row and seen by their position, which is the same where a row's positions
    are 0, 1, 2, ... Nothing checks that, as positions are data. Where they begin above ``sinks`` its first tokens take
    their slots, and no query beyond the window sees them; where some are left out, a query sees fewer than ``size``
    tokens, and where one comes twice, perhaps not all that its window has.
    """

    size: int
    sinks: int = 0

    def __post_init__(self):
        for name, least in (("size", 1), ("sinks", 0)):
            object.__setattr__(self, name, checks.integer(name, getattr(self, name), least=least))

    @property
    def mask(self) -> masks.Mask:
        recent = masks.sliding_window(self.size)
        return recent | (masks.sink(self.sinks) & masks.causal()) if self.sinks else recent

    def check(self, capacity: int) -> None:
        if capacity < self.size + self.sinks:
            raise ValueError(f"capacity: expected at least size + sinks = {self.size + self.sinks}, got {capacity}")

    def longest_append(self, capacity: int) -> int:
        return capacity - self.sinks - self.size + 1

    def place(self, slots: Slots, real: Array) -> Placement:
        ring = slots.capacity - self.sinks
        number = slots.lengths[:, None] + jnp.cumsum(real, axis=1, dtype=jnp.int32) - 1  # of the row's tokens
        lengths = slots.lengths + real.sum(1, dtype=jnp.int32)
        at = jnp.where(number < self.sinks, number, self.sinks + (number - self.sinks) % ring)
        # Of more tokens than the ring has slots, the last are stored.
        stored = real & ((number < self.sinks) | (number >= lengths[:, None] - ring))
        oldest_needed = jnp.maximum(self.sinks, slots.lengths - self.size + 1)
        return Placement(
            slots=jnp.where(stored, at, slots.capacity)[:, None],
            lengths=lengths,
            lost=(lengths > slots.lengths) & (lengths - ring > oldest_needed),
        )

    def truncate(self, slots: Slots, lengths: Array) -> tuple[Array, Array]:
        number = self._numbers(slots)
        kept = (number >= 0) & (number < lengths[:, None, None])
        # The next query sees the tokens of these numbers.
        first = jnp.maximum(lengths - self.size + 1, 0)
        seen = kept & (slots.positions >= 0) & (number >= first[:, None, None])
        return kept, seen.sum((1, 2), dtype=jnp.int32) < lengths - first

    def _numbers(self, slots: Slots) -> Array:
        """Which of the row's tokens a slot holds, int32 ``[R, 1, capacity]``; -1: none yet."""
        slot = lax.broadcasted_iota(jnp.int32, slots.positions.shape, 2)
        ring, lengths = slots.capacity - self.sinks, slots.lengths[:, None, None]
        newest = slot + ring * ((lengths - 1 - slot) // ring)
        number = jnp.where(slot < self.sinks, slot, newest)
        return jnp.where(slot < lengths, number, -1)


def at_slots(target: Array, slots: Array, x: Array, rows: Array | None = None) -> Array:
    """``target`` ``[B, M, capacity]`` with ``x`` ``[R, M, t]`` at ``slots`` int32 ``[R, M, t]`` of ``rows``, or all."""
    head = lax.broadcasted_iota(jnp.int32, slots.shape, 1)
    return target.at[row_numbers(rows, slots.shape), head, slots].set(x, mode="drop")
