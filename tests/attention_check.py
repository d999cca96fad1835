"""Calls of attention at odd sizes, checked against the oracle; shared by many tests."""

import dataclasses
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_attn as pa
from tests import oracle, tolerances
from tests.oracle import positions

NO_GPU = pa.implementations()["triton"]
# Tests run the compiled kernels on a GPU, and the interpreted ones elsewhere.
INTERPRETED = pytest.param(
    "interpreted", marks=pytest.mark.skipif(NO_GPU is None, reason="the compiled kernels are tested instead")
)
TRITON = pytest.param("triton", marks=pytest.mark.gpu)
KERNELS = pytest.mark.parametrize("implementation", ["xla", INTERPRETED, TRITON])
EVERY_IMPLEMENTATION = pytest.mark.parametrize("implementation", ["reference", "xla", INTERPRETED, TRITON])

B, T, S, N, K = 2, 21, 37, 4, 2


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of attention; positions default to 0, 1, 2, ..."""

    mask: oracle.Mask = dataclasses.field(default_factory=oracle.full)
    q_positions: np.ndarray | None = None
    kv_positions: np.ndarray | None = None
    batch: int = B
    q_len: int = T
    kv_len: int = S
    q_heads: int = N
    kv_heads: int = K
    head_dim: int = 32
    value_dim: int | None = None
    dtype: str = "float32"
    scale: float | None = None
    query_size: float = 1.0
    block_sizes: tuple[int, int] | None = (16, 16)

    @property
    def geometry(self) -> tuple[np.ndarray, np.ndarray]:
        """Positions of queries and of keys."""
        q = positions(self.q_len)[None] if self.q_positions is None else self.q_positions
        return q, positions(self.kv_len)[None] if self.kv_positions is None else self.kv_positions

    def arrays(self, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Query, key and value; padding is NaN."""
        generator = np.random.default_rng(seed)

        def normal(*shape):
            return generator.standard_normal(shape)

        value_dim = self.value_dim or self.head_dim
        query = self.query_size * normal(self.batch, self.q_len, self.q_heads, self.head_dim)
        key = normal(self.batch, self.kv_len, self.kv_heads, self.head_dim)
        value = normal(self.batch, self.kv_len, self.kv_heads, value_dim)
        q_positions, kv_positions = self.geometry
        slots = kv_positions[:, None] if kv_positions.ndim == 2 else kv_positions
        query[np.broadcast_to(q_positions < 0, query.shape[:2])] = np.nan
        missing = np.broadcast_to((slots < 0).swapaxes(1, 2), key.shape[:3])
        key[missing] = value[missing] = np.nan
        return tuple(x.astype(jnp.dtype(self.dtype)) for x in (query, key, value))

    def program(self, implementation: str):
        """Compiled attention of query, key and value; default positions are omitted from the call."""

        @jax.jit
        def call(query, key, value, mask, q_positions, kv_positions):
            return pa.attention(
                query,
                key,
                value,
                mask,
                q_positions=q_positions,
                kv_positions=kv_positions,
                scale=self.scale,
                return_lse=True,
                block_sizes=self.block_sizes and pa.BlockSizes(*self.block_sizes),
                **options(implementation),
            )

        mask = self.mask.build(pa.masks)
        return lambda query, key, value: call(query, key, value, mask, self.q_positions, self.kv_positions)


def options(implementation: str) -> dict:
    return {"interpret": True} if implementation == "interpreted" else {"implementation": implementation}


def seeded(*name) -> np.random.Generator:
    """A generator for one array, independent of everything else that a test or module draws."""
    return np.random.default_rng(zlib.crc32(repr(name).encode()))


def dense(*shape: int, density: float = 0.5) -> oracle.Mask:
    return oracle.dense(seeded("dense", shape, density).random(shape) < density)


def segments(batch: int, longest: int = 9) -> oracle.Mask:
    """Sorted document numbers; queries are the last T of the S tokens."""
    ids = np.sort(seeded("segments", batch, longest).integers(0, S // longest, (batch, S)), -1)
    return oracle.segments(ids[:, S - T :], ids)


LAST = positions(T, start=S - T)[None]  # queries at the end of the keys
LEFT = np.stack([positions(S, left=9), positions(S, left=20)])
RIGHT = np.stack([positions(S, right=9), positions(S, right=30)])
BOTH = np.stack([positions(S, left=9, right=9), positions(S, left=3, right=17)])
EMPTY_ROW = np.stack([positions(S), positions(S, left=S)])
Q_BOTH = np.stack([positions(T, left=3, right=4), positions(T, right=13)])
PERMUTED = seeded("permuted").permutation(S).astype(np.int32)[None]
HOLES = np.stack([seeded("holes", row).permutation(S) for row in range(B * K)]).reshape(B, K, S).astype(np.int32)
HOLES[seeded("holes").random(HOLES.shape) < 0.3] = -1

SMALL = Case(oracle.causal(), LAST, LEFT)


def numbers(case: Case, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Query, key and value without NaN."""
    return tuple(np.nan_to_num(x, nan=0.5) for x in case.arrays(seed))


def assert_same_bits(actual, expected, message: str = "") -> None:
    """Equal as integers: NaN equals itself, 0 and -0 differ."""
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, b = (np.asarray(x) for x in (a, b))
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a.view(f"u{a.itemsize}"), b.view(f"u{b.itemsize}"), message)


def check(case: Case, implementation: str, seed: int = 0) -> None:
    """Compares output and lse with the oracle, with limits from the error of plain attention."""
    query, key, value = case.arrays(seed)
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    seen = oracle.visible(case.mask, *case.geometry, case.batch, case.q_heads)
    expected = oracle.attention(query, key, value, seen, scale)
    plain = oracle.plain_attention(query, key, value, seen, scale)
    actual = case.program(implementation)(query, key, value)

    assert actual.out.shape == (case.batch, case.q_len, case.q_heads, case.value_dim or case.head_dim)
    assert actual.out.dtype == case.dtype
    assert actual.lse.shape == (case.batch, case.q_heads, case.q_len)
    assert actual.lse.dtype == jnp.float32
    blind = ~seen.any(-1)
    out, lse = (np.asarray(x, np.float64) for x in actual[:2])
    assert (out.swapaxes(1, 2)[blind] == 0).all(), "a query that sees no key gets 0"
    assert (lse[blind] == -np.inf).all(), "a query that sees no key gets -inf"
    assert_error(out, expected[0], plain[0], case.dtype, "out")
    assert_error(lse[~blind], expected[1][~blind], plain[1][~blind], "float32", "lse")


def assert_error(actual: np.ndarray, expected: np.ndarray, plain: np.ndarray, dtype, name: str) -> None:
    assert np.isfinite(actual).all(), f"{name} is not finite"
    if expected.size == 0:
        return
    error, plain_error = np.abs(actual - expected).max(), np.abs(plain - expected).max()
    limit = tolerances.attention_limit(plain_error, np.abs(expected).max(), dtype)
    assert error <= limit, f"{name}: error {error:.3g}, plain attention {plain_error:.3g}, limit {limit:.3g}"
