"""Eviction policies: the slot of each new token, and the token to evict when no slot is free.

A policy is static: it holds settings, never arrays. Its data per slot is the cache's ``state``, arrays
``[B, K, capacity]``; :meth:`Policy.new_state` initializes a slot's entries when a token takes the slot. Your own policy
overrides :meth:`Policy.importance`, and more if needed (README.md beside this file has an example).

R is the number of rows in a call: those of its ``rows``, or all B.
"""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from pallas_attn import checks, masks
from pallas_attn.caches.row_index import numbers as row_numbers
from pallas_attn.quantized import KVArray

State = dict[str, Array]


class Slots(NamedTuple):
    """The contents of a cache that its policy reads.

    Attributes:
      positions: int32 ``[R, M, capacity]``; -1: the slot is free. M is 1, or K if each KV head keeps its own tokens.
      lengths: int32 ``[R]``, tokens appended so far.
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
    """New tokens ``[R, t, K, D]``: unencoded, and as the storage encodes them."""

    key: Array
    value: Array
    stored_key: KVArray
    stored_value: KVArray


class Placement(NamedTuple):
    """The slots of new tokens.

    Attributes:
      slots: int32 ``[R, M, t]``, distinct within a row, except that tokens which are not stored have the out-of-bounds
        slot ``capacity``.
      lengths: int32 ``[R]``, tokens appended so far, including these.
      lost: bool ``[R]``, rows that lose a token which the policy should keep.
    """

    slots: Array
    lengths: Array
    lost: Array


class Policy:
    """Chooses, per row, the slot of each new token."""

    bounded = True  # rows may be longer than the cache: old tokens are evicted for new ones
    per_head = False  # every KV head keeps its own tokens
    observes = False  # reads key weights, so attention has to return them
    ordered = False  # slot n holds the row's token number n

    @property
    def mask(self) -> masks.Mask | None:
        """The part of the cache that queries may see, to combine with the model's mask; None: all of it."""
        return None

    def check(self, capacity: int) -> None:
        """Raises a ValueError if the capacity is too small for the policy."""

    def longest_append(self, capacity: int) -> int:
        """The most tokens that one append to a row of any length can take without losing one that should stay."""
        return capacity

    def new_state(self, tokens: Tokens) -> State:
        """Initial state of new tokens: float32 ``[R, t, K]`` each."""
        del tokens
        return {}

    def importance(self, slots: Slots) -> Array:
        """float32 ``[R, M, capacity]``: the least is evicted first, ``inf`` should stay. Free slots may be anything."""
        raise NotImplementedError(f"{type(self).__name__}.importance: a policy has to define which tokens to evict")

    def place(self, slots: Slots, real: Array) -> Placement:
        """Assigns free slots first, then those of the least important tokens.

        If there are more tokens than slots, only the last are stored.

        Args:
          slots: the contents of the cache.
          real: bool ``[R, t]``; False: padding, which is never stored.
        """
        capacity = slots.capacity
        importance = jnp.where(slots.positions >= 0, self.importance(slots), -jnp.inf)
        count = real.sum(1, dtype=jnp.int32)
        rank = jnp.cumsum(real, axis=1, dtype=jnp.int32) - 1 - jnp.maximum(count - capacity, 0)[:, None]
        stored = real & (rank >= 0)
        # In ascending order; ties go to the lower slot.
        negative, order = lax.top_k(-importance, min(real.shape[1], capacity))
        at = jnp.clip(rank, 0, order.shape[-1] - 1)[:, None]
        evicted = jnp.take_along_axis(negative, jnp.broadcast_to(at, (*order.shape[:2], at.shape[-1])), axis=-1)
        taken = jnp.take_along_axis(order, jnp.broadcast_to(at, evicted.shape), axis=-1)
        evicts_needed = (evicted == -jnp.inf).any(1) & stored
        return Placement(
            slots=jnp.where(stored[:, None], taken.astype(jnp.int32), capacity),
            lengths=slots.lengths + count,
            lost=((real & ~stored) | evicts_needed).any(1),
        )

    def observe(self, slots: Slots, key_weights: Array) -> State:
        """The state after queries paid the slots attention ``key_weights``, float32 ``[R, K, capacity]``."""
        del key_weights
        return slots.state

    def truncate(self, slots: Slots, lengths: Array) -> tuple[Array, Array]:
        """Truncates each row to its first ``lengths`` tokens, int32 ``[R]``, at most the row's length.

        Returns:
          bool ``[R, M, capacity]``: slots to keep; and bool ``[R]``: rows that need an evicted token again.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot truncate: it has evicted other tokens for those")


@dataclasses.dataclass(frozen=True)
class Dense(Policy):
    """Keeps every token, in order of arrival. A full row drops new tokens and sets ``overflowed``."""

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
    """Keeps the last ``size`` tokens, and always the first ``sinks`` (StreamingLLM, arXiv:2309.17453, section 3.2).

    A query sees the same keys however tokens are split into appends: its own and the ``size - 1`` before it, and those
    at positions below ``sinks``. So while a row appends t tokens at once it holds more than ``size``, and the capacity
    needs slack: ``sinks + size + t - 1`` slots, or at least the row's length. Truncating t tokens needs the same slack.
    Without enough slack the row sets ``overflowed``.

    The cache keeps tokens by their number in the row, and queries see them by position; the two agree if a row's
    positions are 0, 1, 2, ... Positions are data, so nothing checks it. If they begin at ``sinks`` or above, the first
    tokens occupy the sink slots, but no query beyond the window sees them; with gaps, a query sees fewer than ``size``
    tokens; with duplicates, possibly not its whole window.
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
        number = slots.lengths[:, None] + jnp.cumsum(real, axis=1, dtype=jnp.int32) - 1  # in the row
        lengths = slots.lengths + real.sum(1, dtype=jnp.int32)
        at = jnp.where(number < self.sinks, number, self.sinks + (number - self.sinks) % ring)
        # If there are more tokens than slots in the ring, the last are stored.
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
        # The next query sees tokens from this number on.
        first = jnp.maximum(lengths - self.size + 1, 0)
        seen = kept & (slots.positions >= 0) & (number >= first[:, None, None])
        return kept, seen.sum((1, 2), dtype=jnp.int32) < lengths - first

    def _numbers(self, slots: Slots) -> Array:
        """The number in the row of each slot's token, int32 ``[R, 1, capacity]``; -1: none yet."""
        slot = lax.broadcasted_iota(jnp.int32, slots.positions.shape, 2)
        ring, lengths = slots.capacity - self.sinks, slots.lengths[:, None, None]
        newest = slot + ring * ((lengths - 1 - slot) // ring)
        number = jnp.where(slot < self.sinks, slot, newest)
        return jnp.where(slot < lengths, number, -1)


def at_slots(target: Array, slots: Array, x: Array, rows: Array | None = None) -> Array:
    """Writes ``x`` ``[R, M, t]`` to ``slots`` int32 ``[R, M, t]`` of ``rows`` of ``target`` ``[B, M, capacity]``."""
    head = lax.broadcasted_iota(jnp.int32, slots.shape, 1)
    return target.at[row_numbers(rows, slots.shape), head, slots].set(x, mode="drop")
