"""Models of caches as Python lists, one row each: independent implementations from the papers and docstrings.

Every head has a list of slots. The models share no code with the library; numbers are float64.
"""

import copy
import dataclasses
from collections.abc import Callable

import numpy as np

import pallas_attn as pa
from tests import oracle, tolerances


class NearTieError(Exception):
    """Two scores are so close that rounding decides their order."""


@dataclasses.dataclass
class Token:
    """A token of one head."""

    position: int
    number: int  # in the row, in order of arrival
    key: np.ndarray  # [D]
    value: np.ndarray
    score: float = 0.0


class Row:
    """One row: ``slots[head][slot]`` is a :class:`Token` or None."""

    def __init__(self, capacity: int, kv_heads: int):
        self.capacity = capacity
        self.slots: list[list[Token | None]] = [[None] * capacity for _ in range(kv_heads)]
        self.length = 0
        self.overflowed = False

    def append(self, positions, key, value) -> None:
        """Appends valid tokens: positions ``[n]``, key and value ``[n, K, D]``."""
        raise NotImplementedError

    def truncate(self, length: int) -> None:
        raise NotImplementedError

    def observe(self, key_weights) -> None:
        """``[K, capacity]``; most policies ignore it."""

    def reset(self) -> None:
        self.__init__(self.capacity, len(self.slots))

    def fork(self) -> "Row":
        return copy.deepcopy(self)

    def tokens(self, head: int) -> list[Token]:
        return [token for token in self.slots[head] if token is not None]

    def put(self, slot: int, position, key, value, heads=None) -> None:
        for head in range(len(self.slots)) if heads is None else heads:
            self.slots[head][slot] = Token(int(position), self.length, key[head], value[head])

    def drop_from(self, length: int) -> None:
        for head in self.slots:
            head[:] = [None if token is None or token.number >= length else token for token in head]
        self.length = length


class Dense(Row):
    """Slot n holds token n; tokens without room do not count."""

    def append(self, positions, key, value):
        for i, position in enumerate(positions):
            if self.length == self.capacity:
                self.overflowed = True
            else:
                self.put(self.length, position, key[i], value[i])
                self.length += 1

    def truncate(self, length):
        # Dropped tokens came last, so truncation removes them first.
        self.overflowed &= length > self.length
        self.drop_from(min(max(length, 0), self.length))

    def keep(self, first, path):
        """Keeps only the nodes of ``path`` among the tokens from number ``first`` on, made contiguous."""
        first = min(max(first, 0), self.length)
        there = [first + node for node in path if first + node < self.length]
        self.overflowed &= len(there) < len(path)
        for head in self.slots:
            chosen = [dataclasses.replace(head[number], number=first + n) for n, number in enumerate(there)]
            head[first:] = chosen + [None] * (self.capacity - first - len(chosen))
        self.length = first + len(there)


class Window(Row):
    """The first ``sinks`` tokens stay; all others share a ring buffer of the remaining slots."""

    def __init__(self, capacity, kv_heads, size: int, sinks: int = 0):
        super().__init__(capacity, kv_heads)
        self.size, self.sinks = size, sinks

    def append(self, positions, key, value):
        first = self.length
        for i, position in enumerate(positions):
            ring = self.capacity - self.sinks
            slot = self.length if self.length < self.sinks else self.sinks + (self.length - self.sinks) % ring
            self.put(slot, position, key[i], value[i])
            self.length += 1
        for number in range(first, self.length):
            self.overflowed |= not self._has_what_is_seen_from(number)

    def truncate(self, length):
        if length < self.length:
            self.drop_from(max(length, 0))
            # The next token sees itself.
            self.overflowed |= not self._has_what_is_seen_from(self.length, but=self.length)

    def reset(self):
        self.__init__(self.capacity, len(self.slots), self.size, self.sinks)

    def _has_what_is_seen_from(self, number: int, but: int | None = None) -> bool:
        seen = {n for n in range(number + 1) if number - n < self.size or n < self.sinks} - {but}
        return seen <= {token.number for token in self.tokens(0)}


class HeavyHitters(Row):
    """H2O; with ``balance`` and ``hold`` (encodes and decodes an array as the storage does), Q-Hitter."""

    def __init__(
        self,
        capacity,
        kv_heads,
        recent: int,
        normalize: bool = False,
        value_norm: bool = False,
        balance: float | None = None,
        hold: Callable[[np.ndarray], np.ndarray] | None = None,
    ):
        super().__init__(capacity, kv_heads)
        self.settings = (recent, normalize, value_norm, balance, hold)
        self.recent, self.normalize, self.value_norm, self.balance, self.hold = self.settings

    def reset(self):
        self.__init__(self.capacity, len(self.slots), *self.settings)

    def append(self, positions, key, value):
        surplus = max(len(positions) - self.capacity, 0)
        self.overflowed |= surplus > 0
        count = len(positions) - surplus
        for head in range(len(self.slots)):
            order = self._first_to_go(head, count)
            # Recency is judged before the first new token is stored.
            going = [slot for slot in order[:count] if self.slots[head][slot] is not None]
            self.overflowed |= any(self._is_recent(head, slot) for slot in going)
            for i, slot in enumerate(order[:count], start=surplus):
                self.put(slot, positions[i], key[i], value[i], heads=[head])
        self.length += len(positions)

    def _newest(self, head: int) -> int:
        return max(token.position for token in self.tokens(head))

    def _is_recent(self, head: int, slot: int) -> bool:
        return self._newest(head) - self.slots[head][slot].position < self.recent

    def _first_to_go(self, head: int, count: int) -> list[int]:
        free = [slot for slot, token in enumerate(self.slots[head]) if token is None]
        taken = [slot for slot, token in enumerate(self.slots[head]) if token is not None]
        recent = [slot for slot in taken if self._is_recent(head, slot)]
        scores = self.scores(head)
        others = sorted((slot for slot in taken if slot not in recent), key=lambda slot: (scores[slot], slot))
        ranked = [scores[slot] for slot in others][: max(count - len(free), 0) + 1]
        if len(ranked) > 1 and count > len(free):
            gaps = np.diff(ranked)
            near = tolerances.CACHE_SCORE * max(scores.values()) if self.hold is None else tolerances.CACHE_NEAR_TIE
            if ((gaps > 0) & (gaps < near)).any():
                raise NearTieError
        return free + others + recent

    def scores(self, head: int) -> dict[int, float]:
        """The score of every filled slot."""
        held = {slot: token for slot, token in enumerate(self.slots[head]) if token is not None}
        score = {slot: token.score for slot, token in held.items()}
        if self.normalize:
            # Queries at the token's position and later could see it.
            score = {slot: x / (self._newest(head) - held[slot].position + 1) for slot, x in score.items()}
        if self.balance is None or self.hold is None:
            return score
        hold = self.hold
        error = {
            slot: sum(np.linalg.norm(x.astype(np.float64) - hold(x)) for x in (token.key, token.value))
            for slot, token in held.items()
        }
        score, error = (_from_0_to_1(x) for x in (score, error))
        return {slot: self.balance * score[slot] - (1 - self.balance) * error[slot] / 2 for slot in held}

    def observe(self, key_weights):
        for head, weights in enumerate(np.asarray(key_weights, np.float64)):
            held = {slot: token for slot, token in enumerate(self.slots[head]) if token is not None}
            paid = {slot: weights[slot] for slot in held}
            if self.value_norm:
                norms = {slot: np.linalg.norm(token.value.astype(np.float64)) for slot, token in held.items()}
                total, weighed = sum(paid.values()), sum(norms[slot] * paid[slot] for slot in held)
                paid = {slot: norms[slot] * paid[slot] * total / weighed if weighed > 0 else 0.0 for slot in held}
            for slot, token in held.items():
                token.score += paid[slot]


def _from_0_to_1(x: dict[int, float]) -> dict[int, float]:
    if not x:
        return x
    least, most = min(x.values()), max(x.values())
    return {slot: (number - least) / (most - least) if most > least else 0.0 for slot, number in x.items()}


def positions_of(rows: list[Row]) -> np.ndarray:
    """int ``[B, K, capacity]``."""
    return np.array([[[-1 if t is None else t.position for t in slots] for slots in row.slots] for row in rows])


def tokens_of(rows: list[Row], head_dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values float32 ``[B, capacity, K, D]``, 0 in empty slots."""
    nothing = np.zeros(head_dim, np.float32)
    arrays = (
        [[[nothing if t is None else getattr(t, name) for t in slots] for slots in row.slots] for row in rows]
        for name in ("key", "value")
    )
    key, value = (np.array(x).swapaxes(1, 2) for x in arrays)
    return key, value


def read(stored, page_table=None) -> np.ndarray:
    """float32 ``[B, capacity, K, D]``: the contents, dequantized, with pages joined."""
    whole = oracle.dequantize(stored) if isinstance(stored, pa.QuantizedArray) else np.asarray(stored, np.float32)
    return (whole if page_table is None else oracle.gather(whole, np.asarray(page_table))).astype(np.float32)


def assert_slots(cache: pa.caches.KVCache, rows: list[Row]) -> None:
    """Compares the positions of all slots, ``lengths`` and ``overflowed``."""
    positions = positions_of(rows)
    assert np.asarray(cache.lengths).tolist() == [row.length for row in rows]
    assert np.asarray(cache.overflowed).tolist() == [row.overflowed for row in rows]
    np.testing.assert_array_equal(np.broadcast_to(cache.positions, positions.shape), positions)


def assert_tokens(cache: pa.caches.KVCache, rows: list[Row], hold: Callable[[np.ndarray], np.ndarray] = np.asarray):
    """Compares filled slots bit for bit; ``hold`` encodes and decodes tokens ``[.., K, D]`` as the storage does."""
    view = cache.view()
    held = (positions_of(rows) >= 0).swapaxes(1, 2)[..., None]
    for stored, expected in zip((view.key, view.value), tokens_of(rows, cache.key.shape[-1]), strict=True):
        actual = np.where(held, read(stored, view.page_table), 0)
        np.testing.assert_array_equal(actual, hold(expected))
