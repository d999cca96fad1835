"""The code of the caches' README runs, its table is correct, and its SnapKV equals a loop over tokens."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_attn as pa
from tests import cache_models, tolerances

README = (Path(pa.caches.__file__).parent / "README.md").read_text()
B, CAPACITY, K, D = 2, 14, 2, 4


@pytest.fixture(scope="module")
def names() -> dict:
    """The names that the code blocks define."""
    names = {"__name__": "README"}
    for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(compile(block, "README.md", "exec"), names)
    return names


def test_a_step(names):
    step = jax.jit(names["step"], donate_argnums=0)
    rng = np.random.default_rng(0)
    cache = names["cache"]
    for start in range(0, 128, 16):
        query, key, value = (rng.standard_normal((2, 16, heads, 32)).astype(np.float32) for heads in (4, 2, 2))
        positions = np.tile(np.arange(start, start + 16, dtype=np.int32), (2, 1))
        cache, out = step(cache, query, key, value, positions)
        assert np.isfinite(out).all()
    assert cache.lengths.tolist() == [128, 128]
    assert not cache.overflowed.any()
    # Every query pays 1 in total, most of it to tokens still in the cache.
    assert (np.asarray(cache.state["score"]).sum(-1) > 64).all()


def test_a_node_sees_its_path_and_keep_keeps_it(names):
    rng, ancestors = np.random.default_rng(0), np.eye(4, dtype=bool)
    ancestors[:, 0] = ancestors[3, 1] = True  # a root, two children, and a child of the first
    path = np.array([0, 1, 3], np.int32)
    key, value = (rng.standard_normal((2, 24, 2, 16)).astype(np.float32) for _ in "kv")
    query = rng.standard_normal((2, 4, 2, 16)).astype(np.float32)
    start = np.array([20, 9], np.int32)
    at = np.arange(20, dtype=np.int32)
    cache = pa.caches.init(batch_size=2, capacity=32, kv_heads=2, head_dim=16, dtype="float32")
    cache = cache.append(key[:, :20], value[:, :20], np.where(at < start[:, None], at, -1))
    nodes = key[:, 20:], value[:, 20:]
    check = jax.jit(names["check"])
    tree, first, out = check(cache, query, *nodes, ancestors)
    chain, _, expected = check(cache, query[:, path], *(x[:, path] for x in nodes), np.tri(len(path), dtype=bool))
    limit = tolerances.attention_limit(0, 4, "float32")
    np.testing.assert_allclose(out[:, path], expected, rtol=0, atol=limit)
    kept = jax.jit(pa.caches.KVCache.keep)(tree, first, np.tile(path, (2, 1)), np.full(2, 3, np.int32))
    np.testing.assert_array_equal(kept.positions, chain.positions)
    for row, length in enumerate(start + 3):
        np.testing.assert_array_equal(kept.key[row, :length], chain.key[row, :length])
        np.testing.assert_array_equal(kept.value[row, :length], chain.value[row, :length])


def test_table_of_bytes():
    header, *rows = (re.findall(r"`([^`]+)`|(\d+)", line) for line in README.splitlines() if line.startswith("| "))
    storages = [eval(code, vars(pa.caches).copy()) for code, _ in header]
    assert len(rows) == 5
    for (code, _), *numbers in rows:
        policy = eval(code, vars(pa.caches).copy())
        for storage, (_, number) in zip(storages, numbers, strict=True):
            one, two = (
                pa.caches.nbytes(policy, storage, batch_size=1, capacity=capacity, kv_heads=8, head_dim=128)
                for capacity in (100, 101)
            )
            assert two - one == int(number), (policy, storage)


class SnapKV(cache_models.HeavyHitters):
    """A token's score is the largest attention that it or a neighbor got from the last valid queries."""

    neighbors = 1

    def observe(self, key_weights):
        for slots, weights in zip(self.slots, key_weights, strict=True):
            in_order = sorted((token.position, slot) for slot, token in enumerate(slots) if token is not None)
            got = [float(weights[slot]) for _, slot in in_order]
            if not any(got):
                continue
            for i, (_, slot) in enumerate(in_order):
                slots[slot].score = max(got[max(i - self.neighbors, 0) : i + self.neighbors + 1])


@pytest.mark.parametrize("normalize", [False, True])
def test_snapkv_keeps_what_a_loop_over_tokens_would_keep(names, normalize):
    policy = names["SnapKV"](3, normalize, neighbors=1)
    sizes = {"batch_size": B, "capacity": CAPACITY, "kv_heads": K, "head_dim": D}
    cache = pa.caches.init(policy, **sizes, dtype="float32")
    rows = [SnapKV(CAPACITY, K, 3, normalize) for _ in range(B)]
    append, observe = jax.jit(pa.caches.KVCache.append), jax.jit(pa.caches.KVCache.observe)
    rng = np.random.default_rng(0)
    for length in [6, 1, 6, 1, 1, 1, 6, 1] * 4:
        real = rng.random((B, length)) < 0.8
        start = np.array([[row.length] for row in rows])
        positions = np.where(real, start + real.cumsum(1) - 1, -1).astype(np.int32)
        key, value = (rng.standard_normal((B, length, K, D)).astype(np.float32) for _ in "kv")
        cache = append(cache, key, value, positions)
        # Padding queries pay nothing.
        weights = rng.random((B, K, CAPACITY), np.float32) * real.any(1)[:, None, None].astype(np.float32)
        cache = observe(cache, jnp.where(cache.positions < 0, 0, weights))
        for b, row in enumerate(rows):
            row.append(positions[b, real[b]], key[b, real[b]], value[b, real[b]])
            row.observe(weights[b])
            for head, slots in enumerate(row.slots):
                held = [slot for slot, token in enumerate(slots) if token is not None]
                expected = [slots[slot].score for slot in held]
                actual = np.asarray(cache.state["score"])[b, head, held]
                np.testing.assert_allclose(actual, expected, rtol=tolerances.CACHE_SCORE)
        cache_models.assert_slots(cache, rows)
        cache_models.assert_tokens(cache, rows)
    assert min(row.length for row in rows) > 3 * CAPACITY
