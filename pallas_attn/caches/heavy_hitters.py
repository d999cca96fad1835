"""Policies that keep the tokens with the most attention."""

import dataclasses

import jax.numpy as jnp
from jax import Array

from pallas_attn import checks
from pallas_attn.caches.policies import Policy, Slots, State, Tokens
from pallas_attn.caches.storage import decode
from pallas_attn.quantized import KVArray


@dataclasses.dataclass(frozen=True)
class H2O(Policy):
    """Heavy hitters: keeps the tokens with the most attention, and always the most recent ones.

    Zhang et al. 2023, arXiv:2306.14048, algorithm 1, independently for every row and KV head. When a token needs a slot
    and none is free, the token with the lowest score is evicted. A token's score is the attention that all queries so
    far paid to it, averaged over the query heads of its KV head; padding queries pay none. An append of t tokens evicts
    for all of them first, so its queries see ``capacity - t`` older tokens.

    ``recent`` and ``normalize`` assume contiguous positions within a row, from any start. Positions are data, so
    nothing checks it. After a gap, fewer tokens are recent, and those before it count as older than they are.

    Attributes:
      recent: tokens at the last ``recent`` positions are not evicted; if no other is left, the row is ``overflowed``.
      normalize: divide a score by the number of queries that could see the token (positions from its own to the
        newest), because older tokens have had more of them.
      value_norm: weight the attention to key j by ``|v_j|``, keeping a call's total attention, so that a token with a
        zero value gets no score.
    """

    recent: int
    normalize: bool = False
    value_norm: bool = False

    per_head = True
    observes = True

    def __post_init__(self):
        object.__setattr__(self, "recent", checks.integer("recent", self.recent, least=1))
        for name in ("normalize", "value_norm"):
            object.__setattr__(self, name, checks.boolean(name, getattr(self, name)))

    def check(self, capacity: int) -> None:
        if capacity <= self.recent:
            raise ValueError(f"capacity: expected more than recent={self.recent}, got {capacity}")

    def longest_append(self, capacity: int) -> int:
        return capacity - self.recent

    def new_state(self, tokens: Tokens) -> State:
        state = {"score": jnp.zeros(tokens.value.shape[:-1], jnp.float32)}
        if self.value_norm:
            state["value_norm"] = jnp.linalg.norm(tokens.value.astype(jnp.float32), axis=-1)
        return state

    def observe(self, slots: Slots, key_weights: Array) -> State:
        filled = slots.positions >= 0
        paid = jnp.where(filled, key_weights, 0.0)
        if self.value_norm:
            weighed = jnp.where(filled, slots.state["value_norm"] * paid, 0.0)
            total = weighed.sum(-1, keepdims=True)
            paid = weighed * paid.sum(-1, keepdims=True) / jnp.where(total > 0, total, 1.0)
        return slots.state | {"score": slots.state["score"] + paid}

    def importance(self, slots: Slots) -> Array:
        newest = slots.positions.max(-1, keepdims=True)
        return jnp.where(slots.positions > newest - self.recent, jnp.inf, self.score(slots))

    def score(self, slots: Slots) -> Array:
        """float32 ``[R, K, capacity]``: the importance of tokens that are not recent."""
        score = slots.state["score"]
        if not self.normalize:
            return score
        newest = slots.positions.max(-1, keepdims=True)
        return score / ((newest - slots.positions).astype(jnp.float32) + 1)


@dataclasses.dataclass(frozen=True)
class QHitter(H2O):
    """H2O, penalizing tokens with a large quantization error.

    Zhang et al. 2024, Q-Hitter (MLSys 6, pages 381-394): ``balance * score - (1 - balance) * error / 2``, with score
    and error ``|k - stored k| + |v - stored v|`` both scaled to [0, 1] over the tokens of the row and head.

    Attributes:
      balance: 1: H2O; 0: quantization errors alone.
    """

    balance: float = 0.5

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "balance", checks.number("balance", self.balance))
        if not 0 <= self.balance <= 1:
            raise ValueError(f"balance: expected a number from 0 to 1, got {self.balance}")

    def new_state(self, tokens: Tokens) -> State:
        error = _distance(tokens.key, tokens.stored_key) + _distance(tokens.value, tokens.stored_value)
        return super().new_state(tokens) | {"error": error}

    def score(self, slots: Slots) -> Array:
        filled = slots.positions >= 0
        score, error = _zero_to_one(super().score(slots), filled), _zero_to_one(slots.state["error"], filled)
        return self.balance * score - (1 - self.balance) / 2 * error


def _distance(x: Array, stored: KVArray) -> Array:
    return jnp.linalg.norm(x.astype(jnp.float32) - decode(stored), axis=-1)


def _zero_to_one(x: Array, filled: Array) -> Array:
    least = jnp.where(filled, x, jnp.inf).min(-1, keepdims=True)
    most = jnp.where(filled, x, -jnp.inf).max(-1, keepdims=True)
    return (x - least) / jnp.where(most > least, most - least, 1.0)
