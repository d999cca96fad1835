"""Policies against models of Python lists: scores and positions, slot by slot, and what queries see."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pallas_attn as pa
from pallas_attn.caches import H2O, Dense, Policy, QHitter, Slots, Window
from tests import cache_models, oracle, tolerances
from tests.cache_models import NearTieError, Row

B, K, D = 3, 2, 4
CHUNKS = (1, 3, 13)  # the last is longer than every cache
FIRST = (0, 5, 40)  # position of each row's first token
PLAIN = pa.caches.Plain()


def as_bfloat16(x: np.ndarray) -> np.ndarray:
    return x.astype(ml_dtypes.bfloat16).astype(np.float64)


def as_int8(x: np.ndarray) -> np.ndarray:
    scale = np.abs(x).max(-1, keepdims=True) / 127
    return np.round(x / scale) * scale


@dataclasses.dataclass(frozen=True)
class Case:
    policy: Policy
    capacity: int
    model: Callable[..., Row]
    arguments: dict = dataclasses.field(default_factory=dict)
    storage: pa.caches.Storage = PLAIN
    dtype: str = "float32"

    def init(self) -> pa.caches.KVCache:
        sizes = {"batch_size": B, "capacity": self.capacity, "kv_heads": K, "head_dim": D}
        return pa.caches.init(self.policy, self.storage, dtype=self.dtype, **sizes)

    def rows(self) -> list[Row]:
        return [self.model(self.capacity, K, **self.arguments) for _ in range(B)]


def heavy(policy: Policy, capacity: int, arguments: dict, **changes) -> Case:
    return Case(policy, capacity, cache_models.HeavyHitters, arguments, **changes)


BOTH = {"normalize": True, "value_norm": True}
CASES = {
    "dense": Case(Dense(), 9, cache_models.Dense),
    "window": Case(Window(3), 7, cache_models.Window, {"size": 3}),
    "window, sinks": Case(Window(4, 2), 12, cache_models.Window, {"size": 4, "sinks": 2}),
    "window without slack": Case(Window(5, 1), 6, cache_models.Window, {"size": 5, "sinks": 1}),
    "h2o": heavy(H2O(3), 8, {"recent": 3}),
    "h2o, one slot for heavy hitters": heavy(H2O(6), 7, {"recent": 6}),
    "h2o, normalised": heavy(H2O(2, normalize=True), 7, {"recent": 2, "normalize": True}),
    "h2o, norms": heavy(H2O(3, value_norm=True), 8, {"recent": 3, "value_norm": True}),
    "h2o, normalised, norms": heavy(H2O(1, **BOTH), 9, {"recent": 1, **BOTH}),
    "q-hitter, bfloat16": heavy(
        *(QHitter(2, balance=0.3), 8, {"recent": 2, "balance": 0.3, "hold": as_bfloat16}), dtype="bfloat16"
    ),
    "q-hitter, int8": heavy(
        QHitter(2, **BOTH), 8, {"recent": 2, **BOTH, "balance": 0.5, "hold": as_int8}, storage=pa.caches.Int8()
    ),
    "q-hitter, errors alone": heavy(
        *(QHitter(1, balance=0), 7, {"recent": 1, "balance": 0, "hold": as_int8}), storage=pa.caches.Int8()
    ),
}
EVERY_CASE = pytest.mark.parametrize("name", CASES)
SCORED = [name for name, case in CASES.items() if case.policy.observes]


@jax.jit
def append(cache, key, value, positions):
    return cache.append(key, value, positions), cache.positions_after(positions)


observe, truncate, reset, fork = (
    jax.jit(getattr(pa.caches.KVCache, name)) for name in ("observe", "truncate", "reset", "fork")
)


def real_tokens(rng: np.random.Generator, length: int) -> np.ndarray:
    """bool ``[B, length]``: all, none, or some of a row's tokens; padding is left, right, or anywhere."""
    rows = []
    for kind in rng.integers(6, size=B):
        start, stop = sorted(rng.integers(0, length + 1, 2))
        at = np.arange(length)
        rows.append([at >= 0, at >= 0, at < 0, at >= start, at < stop, rng.random(length) < 0.6][kind])
    return np.stack(rows)


def new_tokens(rng: np.random.Generator, rows: list[Row], length: int):
    """Keys, values and positions of each row's next tokens. Padding is NaN."""
    real = real_tokens(rng, length)
    start = np.array([[first + row.length] for first, row in zip(FIRST, rows, strict=True)])
    positions = np.where(real, start + real.cumsum(1) - 1, -rng.integers(1, 4, real.shape)).astype(np.int32)
    # Values differ in norm, so that it matters whether norms count.
    key, value = (rng.standard_normal((B, length, K, D)) * rng.gamma(1, size=(B, length, K, 1)) for _ in "kv")
    key, value = (np.where(real[:, :, None, None], x, np.nan).astype(np.float32) for x in (key, value))
    return key, value, positions


def append_to(rows: list[Row], key, value, positions) -> None:
    for b, row in enumerate(rows):
        real = positions[b] >= 0
        row.append(positions[b, real], key[b, real], value[b, real])


STEPS = ("append", "append", "append and observe", "append and observe", "observe", "truncate", "reset", "fork")


def run(case: Case, program: list[tuple[str, int]]) -> None:
    cache, rows = case.init(), case.rows()
    for step, seed in program:
        rng = np.random.default_rng(seed)
        if "append" in step:
            tokens = new_tokens(rng, rows, int(rng.choice(CHUNKS, p=[0.5, 0.4, 0.1])))
            cache, predicted = append(cache, *tokens)
            append_to(rows, *tokens)
            np.testing.assert_array_equal(cache.view().positions, predicted)
        if "observe" in step:
            weights = rng.random((B, K, case.capacity), np.float32)
            empty = np.broadcast_to(np.asarray(cache.positions) < 0, weights.shape)
            cache = observe(cache, np.where(empty, np.nan, weights))  # empty slots must not count
            for row, w in zip(rows, weights, strict=True):
                row.observe(w)
        if step == "truncate" and not case.policy.observes:
            # Often few tokens, which is what the slack is for.
            lengths = np.array([row.length for row in rows]) - rng.integers(-1, rng.choice([3, 15]), B)
            cache = truncate(cache, lengths.astype(np.int32))
            for row, length in zip(rows, lengths, strict=True):
                row.truncate(length)
        if step == "reset":
            which = rng.random(B) < 0.4
            cache = reset(cache, which)
            for b in np.flatnonzero(which):
                rows[b].reset()
        if step == "fork":
            sources = rng.integers(-2, B + 2, B)
            cache = fork(cache, sources.astype(np.int32))
            rows = [rows[b].fork() for b in np.clip(sources, 0, B - 1)]
        check(case, cache, rows)


def check(case: Case, cache: pa.caches.KVCache, rows: list[Row]) -> None:
    cache_models.assert_slots(cache, rows)
    if case.dtype == "float32" and case.storage == PLAIN:
        cache_models.assert_tokens(cache, rows)
    if case.policy.observes:
        actual = np.asarray(cache.state["score"])
        for b, row in enumerate(rows):
            for head in range(K):
                held = [slot for slot, token in enumerate(row.slots[head]) if token is not None]
                expected = [token.score for token in row.tokens(head)]
                np.testing.assert_allclose(actual[b, head, held], expected, rtol=tolerances.CACHE_SCORE, atol=0)


steps = st.tuples(st.sampled_from(STEPS), st.integers(0, 2**32 - 1))
outcomes = {"ran": 0, "near tie": 0}


@EVERY_CASE
@settings(max_examples=84)  # more than 1,000 in all
@given(program=st.lists(steps, min_size=3, max_size=14))
def test_any_program_leaves_what_lists_would_hold(name, program):
    try:
        run(CASES[name], program)
        outcomes["ran"] += 1
    except NearTieError:
        outcomes["near tie"] += 1


def test_few_programs_end_at_a_near_tie():
    assert outcomes["near tie"] <= outcomes["ran"] / 20


@jax.jit
def attend(query, cache, positions):
    view, mask = cache.view(), pa.masks.causal() & cache.mask
    options = {"q_positions": positions, "kv_positions": view.positions, "implementation": "reference"}
    return pa.attention(query, view.key, view.value, mask, **options)


def attended(query, history_key, history_value, visible) -> np.ndarray:
    """float64 ``[N, D]``: one query ``[N, D]`` over tokens ``[n, K, D]``, visible where bool ``[n]`` is True."""
    out, _ = oracle.attention(
        *(query[None, None], history_key[None], history_value[None]),
        np.broadcast_to(visible, (1, len(query), 1, len(visible))),
        D**-0.5,
    )
    return out[0, 0]


@pytest.mark.parametrize(("size", "sinks"), [(5, 2), (6, 0), (1, 3)])
@pytest.mark.parametrize("chunks", [(1,), (6,), (6, 1, 1, 6)], ids=str)
def test_a_query_sees_its_window_and_the_sinks_however_tokens_came_in(size, sinks, chunks):
    """A prompt many times as long as the cache, against a loop over all its tokens."""
    rng = np.random.default_rng(0)
    case = Case(Window(size, sinks), sinks + size + max(chunks) - 1, cache_models.Window)
    cache, histories = case.init(), [([], []) for _ in range(B)]
    for i in range(45 // max(chunks) * len(chunks)):
        length = chunks[i % len(chunks)]
        real = rng.random((B, length)) < (0.8, 1, 0.3)[i % 3]
        start = np.array([[len(key)] for key, _ in histories])
        positions = np.where(real, start + real.cumsum(1) - 1, -1).astype(np.int32)
        key, value = (rng.standard_normal((B, length, K, D)).astype(np.float32) for _ in "kv")
        query = rng.standard_normal((B, length, 2 * K, D)).astype(np.float32)
        cache, _ = append(cache, key, value, positions)
        out = np.asarray(attend(query, cache, positions))
        for b, (keys, values) in enumerate(histories):
            keys.extend(key[b, real[b]])
            values.extend(value[b, real[b]])
            at = np.arange(len(keys))
            for t in np.flatnonzero(real[b]):
                distance = positions[b, t] - at
                seen = (distance >= 0) & ((distance < size) | (at < sinks))
                expected = attended(query[b, t], np.array(keys), np.array(values), seen)
                limit = tolerances.attention_limit(0, np.abs(values).max(), "float32")
                np.testing.assert_allclose(out[b, t], expected, rtol=0, atol=limit)
    assert not cache.overflowed.any()
    assert min(len(keys) for keys, _ in histories) > 2 * cache.capacity


def filled(policy: Policy, capacity: int, length: int) -> pa.caches.KVCache:
    """Tokens 0 to ``length`` - 1 in every row, one at a time."""
    cache = Case(policy, capacity, Row).init()
    token = np.zeros((B, 1, K, D), np.float32)
    for position in range(length):
        cache, _ = append(cache, token, token, np.full((B, 1), position, np.int32))
    return cache


def test_a_window_takes_back_as_many_tokens_as_it_has_slack_for():
    cache = filled(Window(4, 1), 8, 30)  # three slots of slack
    assert not cache.overflowed.any()
    after = truncate(cache, np.array([30, 26, 25], np.int32))
    assert after.lengths.tolist() == [30, 26, 25]
    assert after.overflowed.tolist() == [False, False, True], "the next of row 2 would see token 22, which is gone"
    assert sorted(after.positions[1, 0].tolist()) == [-1, -1, -1, -1, 0, 23, 24, 25]
    assert truncate(cache, np.zeros(B, np.int32)).overflowed.tolist() == [False] * B, "of nothing nothing is missing"


def test_a_window_may_be_as_long_as_the_row_without_slack():
    assert not filled(Window(8), 8, 8).overflowed.any()
    cache = Case(Window(5, 3), 8, Row).init()
    chunk = np.zeros((B, 8, K, D), np.float32)
    assert not append(cache, chunk, chunk, np.tile(np.arange(8, dtype=np.int32), (B, 1)))[0].overflowed.any()


@pytest.mark.parametrize("policy", [H2O(3), QHitter(3)])
def test_heavy_hitters_take_nothing_back(policy):
    with pytest.raises(NotImplementedError, match=f"^{type(policy).__name__} cannot truncate: it has evicted"):
        filled(policy, 8, 2).truncate(jnp.ones(B, jnp.int32))


def test_of_a_chunk_longer_than_the_cache_the_last_tokens_stay():
    cache = filled(H2O(3), 8, 5)
    chunk = np.ones((B, 13, K, D), np.float32)
    positions = np.tile(np.arange(5, 18, dtype=np.int32), (B, 1))
    positions[1, 8:] = -1  # there is room for eight
    cache, _ = append(cache, chunk, chunk, positions)
    assert sorted(cache.positions[0, 0].tolist()) == [*range(10, 18)]
    assert sorted(cache.positions[1, 1].tolist()) == [*range(5, 13)]
    assert cache.lengths.tolist() == [18, 13, 18]


def test_a_chunk_makes_room_for_all_of_its_tokens_first():
    """So its queries see the most important older tokens, and the most recent ones."""
    cache = filled(H2O(2), 8, 8)
    weights = np.tile(np.array([5, 1, 4, 2, 3, 6, 0, 0], np.float32), (B, K, 1))
    cache = observe(cache, weights)
    chunk = np.zeros((B, 3, K, D), np.float32)
    cache, _ = append(cache, chunk, chunk, np.tile(np.array([8, 9, 10], np.int32), (B, 1)))
    assert cache.positions[0, 0].tolist() == [0, 8, 2, 9, 10, 5, 6, 7]
    assert not cache.overflowed.any()


def test_a_window_counts_positions():
    """Its sinks are positions below ``sinks``, not the first tokens; gaps count in full."""
    rng = np.random.default_rng(0)
    at = np.array([[0, 1, 2, 3, 4, 5], [7, 8, 9, 10, 11, 12], [0, 1, 2, 6, 7, 8]], np.int32)
    key, value = (rng.standard_normal((B, 6, K, D)).astype(np.float32) for _ in "kv")
    query = rng.standard_normal((B, 6, 2 * K, D)).astype(np.float32)
    cache, _ = append(Case(Window(4, 1), 10, Row).init(), key, value, at)
    out = attend(query, cache, at)
    seen = [[1, 0, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [1, 0, 0, 1, 1, 1]]
    for b in range(B):
        expected = attended(query[b, 5], key[b], value[b], np.array(seen[b], bool))
        limit = tolerances.attention_limit(0, np.abs(value).max(), "float32")
        np.testing.assert_allclose(out[b, 5], expected, rtol=0, atol=limit)


@pytest.mark.parametrize("normalize", [False, True])
def test_heavy_hitters_count_positions(normalize):
    """A gap makes the tokens before it older, wherever a row begins."""
    cache, token = Case(H2O(3, normalize=normalize), 5, Row).init(), np.zeros((B, 5, K, D), np.float32)
    cache, _ = append(cache, token, token, np.array([[0, 1, 2, 3, 4], [7, 8, 9, 10, 11], [0, 1, 2, 3, 9]], np.int32))
    cache = observe(cache, np.tile(np.array([5, 3, 1, 0, 0], np.float32), (B, K, 1)))
    if normalize:
        slots = Slots(cache.positions, cache.lengths, cache.state)
        ages = np.array([[5, 4, 3, 2, 1], [5, 4, 3, 2, 1], [10, 9, 8, 7, 1]], np.float32)[:, None]
        expected = np.tile(np.array([5, 3, 1, 0, 0], np.float32) / ages, (1, K, 1))
        np.testing.assert_array_equal(cache.policy.score(slots), expected)
    cache, _ = append(cache, token[:, :1], token[:, :1], np.array([[5], [12], [10]], np.int32))
    gone = [1, 8, 3]  # of row 2 only 9 and 10 are recent
    for b, position in enumerate(gone):
        assert (cache.positions[b] != position).all()


def test_what_a_policy_does_not_ask_for_it_ignores():
    cache = filled(Dense(), 8, 5)
    after = observe(cache, np.ones((B, K, 8), np.float32))
    for before, now in zip(jax.tree.leaves(cache), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(before, now)


def test_a_policy_of_ones_own_is_a_way_to_rank_tokens():
    class Middle(Policy):
        """Evicts position 3 last."""

        def importance(self, slots: Slots) -> jax.Array:
            return -jnp.abs(slots.positions - 3).astype(jnp.float32)

    cache = filled(Middle(), 4, 9)
    # Each new token replaces the one farthest from position 3; the last is always stored.
    assert sorted(cache.positions[0, 0].tolist()) == [2, 3, 4, 8]
    with pytest.raises(NotImplementedError, match=r"^Policy\.importance: "):
        filled(Policy(), 4, 1)


# (call, exception, message)
BAD = {
    "window of 0": (lambda: Window(0), ValueError, "size: expected at least 1, got 0"),
    "window, a float": (lambda: Window(4.0), TypeError, r"size: expected an int, got 4\.0"),
    "sinks, negative": (lambda: Window(4, -1), ValueError, "sinks: expected at least 0, got -1"),
    "sinks, a bool": (lambda: Window(4, True), TypeError, "sinks: expected an int, got True"),
    "recent, 0": (lambda: H2O(0), ValueError, "recent: expected at least 1, got 0"),
    "recent, a string": (lambda: H2O("4"), TypeError, "recent: expected an int, got '4'"),
    "normalize, 1": (lambda: H2O(4, normalize=1), TypeError, "normalize: expected a bool, got 1"),
    "value_norm, None": (lambda: H2O(4, value_norm=None), TypeError, "value_norm: expected a bool, got None"),
    "balance, 2": (lambda: QHitter(4, balance=2), ValueError, "balance: expected a number from 0 to 1, got 2"),
    "balance, NaN": (lambda: QHitter(4, balance=np.nan), ValueError, "balance: expected a number .*, got nan"),
    "q-hitter, recent": (lambda: QHitter(-1), ValueError, "recent: expected at least 1, got -1"),
    "a window that has no room": (
        lambda: filled(Window(6, 3), 8, 0),
        *(ValueError, r"capacity: expected at least size \+ sinks = 9, got 8"),
    ),
    "no room for heavy hitters": (lambda: filled(H2O(8), 8, 0), ValueError, "capacity: .* more than recent=8, got 8"),
    "key_weights of queries": (
        lambda: filled(H2O(4), 8, 0).observe(jnp.zeros((B, 2 * K, 8))),
        *(ValueError, r"key_weights: expected float32 \[3, 2, 8\], got float32 \[3, 4, 8\]"),
    ),
    "key_weights, bfloat16": (
        lambda: filled(H2O(4), 8, 0).observe(jnp.zeros((B, K, 8), jnp.bfloat16)),
        *(ValueError, r"key_weights: expected float32 \[3, 2, 8\], got bfloat16 \[3, 2, 8\]"),
    ),
    "sources, another batch": (
        lambda: filled(Dense(), 8, 0).fork(jnp.zeros(2, jnp.int32)),
        *(ValueError, r"sources: expected integers of shape \(3,\), got int32 \(2,\)"),
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit(name):
    call, exception, message = BAD[name]
    with pytest.raises(exception, match=f"^{message}"):
        call()
