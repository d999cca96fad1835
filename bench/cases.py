"""The benchmark cases: real shapes, and what each is compared with."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import pallas_attn as pa


@dataclasses.dataclass(frozen=True)
class Workload:
    """One call of attention. Arrays as in ``pa.attention``; ``kv_positions`` is always ``[B|1, S]`` here."""

    query: Array
    key: Array
    value: Array
    mask: pa.masks.Mask
    q_positions: Array
    kv_positions: Array

    def boolean_mask(self) -> Array:
        """The mask with padding, bool ``[B|1, 1, T, S]``, for peers that take no other."""
        return self.mask.dense_array(self.q_positions, self.kv_positions)


@dataclasses.dataclass(frozen=True)
class Case:
    """A workload, what it stands for, and the smallest ratios (peer's time over ours) that the project claims."""

    name: str
    about: str
    build: Callable[[], Workload]
    claims: dict[str, float]
    smaller: Callable[[], Workload] | None = None  # the same live work in a smaller buffer


def _random(batch, q_len, kv_len, q_heads, kv_heads, head_dim) -> tuple[Array, Array, Array]:
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (
        (batch, q_len, q_heads, head_dim),
        (batch, kv_len, kv_heads, head_dim),
        (batch, kv_len, kv_heads, head_dim),
    )
    query, key, value = (jax.random.normal(k, shape, jnp.float32) for k, shape in zip(keys, shapes, strict=True))
    return query, key, value


def _positions(starts: np.ndarray, length: int) -> Array:
    """``[B, length]``: counting from 0 at each row's start, -1 before it."""
    positions = np.arange(length)[None] - starts[:, None]
    return jnp.asarray(np.where(positions < 0, -1, positions), jnp.int32)


def _square(mask: pa.masks.Mask, length: int, heads: int, head_dim: int = 64, starts=(0,)) -> Workload:
    starts = np.asarray(starts)
    positions = _positions(starts, length)
    return Workload(*_random(len(starts), length, length, heads, heads, head_dim), mask, positions, positions)


def _decode(capacity: int) -> Workload:
    live = np.linspace(512, 1024, 8).astype(np.int32)
    slots = np.arange(capacity, dtype=np.int32)[None]
    return Workload(
        *_random(8, 1, capacity, 16, 4, 64),
        pa.masks.causal(),
        jnp.asarray(live[:, None] - 1),
        jnp.asarray(np.where(slots < live[:, None], slots, -1)),
    )


def _left_padded() -> Workload:
    lengths = np.random.default_rng(0).integers(128, 2049, 8)
    return _square(pa.masks.causal(), 2048, 8, starts=2048 - lengths)


CPU_CASES = (
    Case(
        "decode",
        "one token for each of 8 rows, 512-1024 live keys in buffers of 16384; N 16, K 4, D 64",
        lambda: _decode(16384),
        {"jax.nn": 40.0, "buffer of 2048": 1 / 1.2},
        smaller=lambda: _decode(2048),
    ),
    Case(
        "window",
        "sliding window of 256 over 8192 tokens; N 8, D 64",
        lambda: _square(pa.masks.sliding_window(256), 8192, 8),
        {"jax.nn": 20.0},
    ),
    Case(
        "left-padded",
        "causal batch of 8, lengths uniform in 128-2048, left-padded to 2048; N 8, D 64",
        _left_padded,
        {"jax.nn": 6.0},
    ),
    Case(
        "causal",
        "plain causal over 2048 tokens; N 8, D 64",
        lambda: _square(pa.masks.causal(), 2048, 8),
        {"jax.nn": 3.0},
    ),
)
