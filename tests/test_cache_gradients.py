"""Gradients through caches: whatever a cache does with a token, its derivative stays with it; what has none says so."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_attn as pa
from pallas_attn import bits
from pallas_attn.caches import H2O, Dense, Float8, Int4, Int8, KVCache, Paged, Plain, QHitter, Window
from tests import tolerances

B, CAPACITY, K, N, D = 3, 16, 2, 4, 8
FIRST, SECOND = 9, 8  # tokens of the two chunks, more than there are slots


@dataclasses.dataclass(frozen=True)
class Newest(pa.caches.Policy):
    """A policy of one's own."""

    def importance(self, slots):
        return slots.positions.astype(jnp.float32)


POLICIES = {
    "dense": Dense(),
    "window": Window(9),
    "window with sinks": Window(5, 3),
    "h2o": H2O(4),
    "h2o, norms": H2O(4, normalize=True, value_norm=True),
    "q-hitter": QHitter(4),
    "custom": Newest(),
}


def drawn(name: str) -> np.random.Generator:
    return np.random.default_rng([*name.encode()])


def positions(start, length: int) -> jax.Array:
    """int32 ``[B, length]``, of which row 1 has padding."""
    rows = np.broadcast_to(np.asarray(start)[..., None], (B, 1)) + np.arange(length)
    rows[1] = np.where(np.arange(length) % 4 == 2, -1, rows[1] - (np.arange(length) + 1) // 4)
    return jnp.asarray(rows, jnp.int32)


def some_rows(cache: KVCache, key, value) -> KVCache:
    rows = jnp.array([2, B, 0], jnp.int32)
    new = jnp.asarray([[12, 13], [0, 1], [12, 13]], jnp.int32)
    return cache.append(key[:, :2], value[:, :2], new, rows)


def halves(cache: KVCache, key, value) -> KVCache:
    new = positions(20, 4)
    return cache.write(key[:, :4], value[:, :4], cache.reserve(new))


OPERATIONS = {
    "nothing": lambda cache, key, value: cache,
    "write": halves,
    "rows": some_rows,
    "fork": lambda cache, key, value: cache.fork(jnp.array([1, 1, 0])),
    "copy_rows": lambda cache, key, value: cache.copy_rows(jnp.array([2, 0, 1]), jnp.array([1, 2, 0]), jnp.int32(2)),
    "reset": lambda cache, key, value: cache.reset(jnp.array([False, True, False])),
    "truncate": lambda cache, key, value: cache.truncate(jnp.array([4, 9, 0])),
    "keep": lambda cache, key, value: cache.keep(
        jnp.array([3, 2, 4]), jnp.array([[0, 2, 4], [1, 2, 3], [0, 1, 3]], jnp.int32), jnp.array([3, 2, 3])
    ),
}


def can(policy, operation: str) -> bool:
    return {"truncate": isinstance(policy, Dense | Window), "keep": policy.ordered}.get(operation, True)


def run(cache: KVCache, operation: str, tokens, weights) -> tuple[KVCache, KVCache]:
    """The cache after one chunk and an operation, and after another chunk."""
    key, value = tokens
    cache = cache.append(key[:, :FIRST], value[:, :FIRST], positions(5, FIRST)).observe(weights[0])
    cache = OPERATIONS[operation](cache, key[:, FIRST:], value[:, FIRST:]).observe(weights[1])
    later = cache.append(key[:, -SECOND:], value[:, -SECOND:], positions(30, SECOND))
    return cache, later


def empty(policy, storage=None, dtype="float32") -> KVCache:
    sizes = {"batch_size": B, "capacity": CAPACITY, "kv_heads": K, "head_dim": D}
    return pa.caches.init(policy, storage, **sizes, dtype=dtype)


def old_tokens(policy, dtype) -> KVCache:
    """A cache with some tokens in it, and numbers in empty slots, too."""
    rng = drawn("old tokens")
    cache = empty(policy, dtype=dtype)
    key, value = (jnp.asarray(rng.integers(-8, 8, cache.key.shape), dtype) for _ in range(2))
    cache = cache.append(key[:, :5], value[:, :5], positions(0, 5))
    held = (cache.positions >= 0).swapaxes(1, 2)[..., None]
    return dataclasses.replace(cache, key=jnp.where(held, cache.key, key), value=jnp.where(held, cache.value, value))


@dataclasses.dataclass(frozen=True)
class Journey:
    """What a test needs: a cache, tokens for it, what the policy observes, and factors of all that two views show."""

    cache: KVCache
    tokens: tuple[jax.Array, jax.Array]
    weights: jax.Array
    factors: jax.Array  # [view, key or value, B, capacity, K, D]

    @staticmethod
    def of(policy, operation: str, dtype: str) -> "Journey":
        rng = drawn(f"{operation} {dtype}")
        shape = (2, B, FIRST + SECOND, K, D)
        tokens = jnp.asarray(rng.integers(-8, 8, shape), dtype)
        # Small integers, of which every dtype has sums and products as they are.
        factors = jnp.asarray(rng.integers(-2, 3, (2, 2, B, CAPACITY, K, D)), dtype)
        weights = jnp.asarray(rng.random((2, B, K, CAPACITY)), jnp.float32)
        return Journey(old_tokens(policy, dtype), (tokens[0], tokens[1]), weights, factors)

    def views(self, operation: str, old, tokens):
        """What the slots of both views hold: keys and values ``[view, 2, B, capacity, K, D]``, 0 in empty slots."""
        cache = dataclasses.replace(self.cache, key=old[0], value=old[1])
        found = []
        for after in run(cache, operation, tokens, self.weights):
            view = after.view()
            held = (view.positions >= 0).swapaxes(1, 2)[..., None]
            found.append(jnp.stack([jnp.where(held, x, jnp.zeros_like(x)) for x in (view.key, view.value)]))
        return jnp.stack(found)

    def origins(self, operation: str) -> np.ndarray:
        """Where the keys ``[view, B, capacity, K]`` of the views come from: a number for every old and new token."""
        numbers = np.arange(1, 1 + B * K * (CAPACITY + FIRST + SECOND), dtype=np.float32)
        old, new = np.split(numbers, [B * CAPACITY * K])
        old, new = (np.repeat(x.reshape(B, -1, K, 1), D, axis=-1) for x in (old, new))
        value = self.cache.value.astype(jnp.float32), self.tokens[1].astype(jnp.float32)
        shadow = dataclasses.replace(self, cache=dataclasses.replace(self.cache, dtype=jnp.dtype("float32")))
        found = jax.jit(functools.partial(shadow.views, operation))((old, value[0]), (new, value[1]))
        return np.asarray(found)[:, 0, ..., 0].astype(int)

    def expected(self, operation: str):
        """Gradients of old and new tokens: the factors of all slots that show them."""
        origins = self.origins(operation)
        gradients = np.zeros((2, 1 + B * K * (CAPACITY + FIRST + SECOND), D))
        for which in range(2):
            np.add.at(gradients[which], origins, np.asarray(self.factors, np.float64)[:, which])
        old, new = np.split(gradients[:, 1:], [B * CAPACITY * K], axis=1)
        return old.reshape(2, B, CAPACITY, K, D), new.reshape(2, B, -1, K, D)


CASES = [
    *((policy, "nothing", dtype) for policy in POLICIES for dtype in ("float32", "bfloat16")),
    *(("dense", operation, dtype) for operation in OPERATIONS for dtype in ("float32", "bfloat16")),
    *((policy, operation, "float16") for policy in ("h2o", "window with sinks") for operation in ("fork", "copy_rows")),
    ("h2o", "rows", "float8_e4m3fn"),
    ("dense", "keep", "float8_e4m3fn"),
    ("dense", "copy_rows", "float8_e4m3fn"),
]
EVERY_CASE = [
    (policy, operation, dtype)
    for policy in POLICIES
    for operation in OPERATIONS
    for dtype in ("float32", "bfloat16", "float16", "float8_e4m3fn")
    if can(POLICIES[policy], operation)
]
every_case = pytest.mark.parametrize(
    ("policy", "operation", "dtype"),
    [case if case in CASES else pytest.param(*case, marks=pytest.mark.slow) for case in EVERY_CASE],
)


@every_case
def test_the_gradient_of_a_token_is_that_of_the_slots_that_show_it(policy, operation, dtype):
    journey = Journey.of(POLICIES[policy], operation, dtype)

    def loss(old, tokens):
        views = journey.views(operation, old, tokens)
        return (views * journey.factors).astype(jnp.float32).sum()

    old = journey.cache.key, journey.cache.value
    actual = jax.jit(jax.grad(loss, (0, 1)))(old, journey.tokens)
    for gradient, expected in zip(actual, journey.expected(operation), strict=True):
        assert np.abs(expected).max() > 0
        np.testing.assert_array_equal(np.asarray(gradient).astype(np.float64), expected)
