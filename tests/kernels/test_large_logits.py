"""Logits of any size: probabilities are those of the float32 logits, in both passes and in weights of keys.

Products of random vectors times a large number are a hard maximum: no two largest logits of a row are near each other.
Rows whose every logit has one large bias are the opposite: what float32 keeps of their logits is the bias alone, and
they are the mean of the values.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_attn as pa
from tests import tolerances

LENGTH, HEADS, HEAD_DIM = 40, 2, 24  # one KV head
BLOCKS = pa.BlockSizes(16, 16, chunk=1)
IMPLEMENTATIONS = {
    "reference": {"implementation": "reference"},
    "xla": {"implementation": "xla", "block_sizes": BLOCKS},
    "triton": {"interpret": True, "block_sizes": BLOCKS},
}
MAGNITUDES = (1e2, 1e4, 4e6, 1e10, 1e30)
LOWEST = float(np.finfo(np.float32).min)


def random(*shape: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def no_scores(operand):
    return ()


@dataclasses.dataclass(frozen=True)
class Case:
    """How products become logits.

    Attributes:
      scores: of an operand, the scores.
      logits: of products and the operand, the logits in float64, and their derivative.
      operand: of a magnitude.
      products: of a magnitude, how large products are.
      sink: of a magnitude.
    """

    scale: float = 0.3
    scores: Callable = no_scores
    logits: Callable = lambda x, operand: (x, np.ones_like(x))
    operand: Callable = lambda magnitude: np.float32(0)
    products: Callable = lambda magnitude: magnitude
    sink: Callable | None = None
    magnitudes: tuple[float, ...] = MAGNITUDES


def with_biased_rows(magnitude: float) -> np.ndarray:
    """Every third query's logits are all lowered; so are those of some keys for every other query."""
    bias = np.zeros((1, HEADS, LENGTH, LENGTH))
    bias[:, :, 1::3, ::4], bias[:, :, ::3] = -magnitude, -magnitude
    return bias.astype(np.float32)


def added(x, bias):
    return np.asarray(x + bias[0], np.float32).astype(np.float64), np.ones_like(x)


def multiplied(x, factors):
    factors = np.asarray(factors, np.float64)[:, None, None] * 0.7
    return x * factors, np.broadcast_to(factors, x.shape)


def capped(x, _):
    return 1e30 * np.tanh(x / 1e30), 1 - np.tanh(x / 1e30) ** 2


PLAIN = Case()
CASES = {
    "products": PLAIN,
    "negative scale, sinks": Case(scale=-0.3, sink=lambda magnitude: np.array([magnitude, -magnitude])),
    "scale 1e4": Case(scale=1e4, products=lambda magnitude: magnitude * 1e-4),
    "biased rows, sinks": Case(
        scores=lambda bias: pa.scores.bias(bias),
        logits=added,
        operand=with_biased_rows,
        products=lambda magnitude: 3.0,
        sink=lambda magnitude: np.array([0.3, -2 * min(magnitude, 1e38)]),
        magnitudes=(1e2, 7e8, 5e9, 1e10, 1e30, 3e38, -LOWEST),
    ),
    "biased rows": Case(
        scores=lambda bias: pa.scores.bias(bias),
        logits=added,
        operand=with_biased_rows,
        products=lambda magnitude: 3.0,
        magnitudes=(1e2, 7e8, 5e9, 1e10, 1e30, 3e38, -LOWEST),
    ),
    "a product comes last": Case(
        scores=lambda factors: pa.scores.custom(lambda x, q, k, head, params: x * params[head] * 0.7, factors),
        logits=multiplied,
        operand=lambda magnitude: np.array([magnitude, -magnitude], np.float32),
        products=lambda magnitude: 1.0,
    ),
    "softcap": Case(scores=lambda _: pa.scores.softcap(1e30), logits=capped, magnitudes=(1e2, 1e4, 4e6, 1e10, 1e28)),
}
QUICK = ("negative scale, sinks", "biased rows, sinks", "a product comes last")
EVERY = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in CASES]


def tensors(case: Case, magnitude: float, q_len: int = LENGTH) -> tuple[np.ndarray, ...]:
    """Query, key, value, and gradients of the output and of lse."""
    size = np.float32(np.sqrt(case.products(magnitude)))
    query, key = random(1, q_len, HEADS, HEAD_DIM, seed=0) * size, random(1, LENGTH, 1, HEAD_DIM, seed=1) * size
    value, d_out = random(1, LENGTH, 1, HEAD_DIM, seed=2), random(1, q_len, HEADS, HEAD_DIM, seed=3)
    return query, key, value, d_out, random(1, HEADS, q_len, seed=4)


def oracle(case: Case, operand, sink, query, key, value, d_out, d_lse) -> tuple[dict, dict]:
    """What is right, in float64, and how large what each sum adds up is."""
    q, do = (x[0].swapaxes(0, 1).astype(np.float64) for x in (query, d_out))  # [N, T, D]
    k, v = (x[0, :, 0].astype(np.float64) for x in (key, value))
    scale = float(np.float32(case.scale))
    logits, derivative = case.logits(q @ k.T * scale, operand)
    seen = np.arange(LENGTH) <= np.arange(LENGTH - q.shape[1], LENGTH)[:, None]
    logits = np.where(seen, logits, -np.inf)
    sinks = np.full(HEADS, -np.inf) if sink is None else np.asarray(sink, np.float32).astype(np.float64)
    peak = np.maximum(logits.max(-1), sinks[:, None])
    weights, of_sink = np.exp(logits - peak[..., None]), np.exp(sinks[:, None] - peak)
    total = weights.sum(-1) + of_sink
    p, p_sink = weights / total[..., None], of_sink / total
    out, dp = p @ v, do @ v.T
    delta = (do * out).sum(-1) - d_lse[0]
    ds = p * (dp - delta[..., None])
    dx = ds * derivative * scale
    found = {
        "out": out.swapaxes(0, 1)[None],
        "lse": (peak + np.log(total))[None],
        "key weights": p.mean(0).sum(0)[None, None],
        "d_query": (dx @ k).swapaxes(0, 1)[None],
        "d_key": np.einsum("nts,ntd->sd", dx, q)[None, :, None],
        "d_value": np.einsum("nts,ntd->sd", p, do)[None, :, None],
    }
    if np.ndim(operand) == 4:
        found["d_bias"] = ds[None]
    if sink is not None:
        found["d_sinks"] = -(p_sink * delta).sum(-1)
    # How large what is added up is, for sums that cancel.
    size = np.abs(dp).max() + np.abs(delta).max()
    largest = {name: np.abs(x).max() for name, x in found.items()}
    factor = size * np.abs(derivative).max() * scale
    largest |= {"d_query": abs(factor * k).max(), "d_key": abs(factor * q).max(), "d_bias": size, "d_sinks": size}
    return found, largest


def assert_right(actual: dict, expected: dict, largest: dict, magnitude: float, about: str) -> None:
    limit = tolerances.large_logits_limit(magnitude)
    for name, right in expected.items():
        error = np.abs(np.asarray(actual[name], np.float64) - right).max()
        assert error <= limit * largest[name], f"{about}, {magnitude:.0e}: {name} is off by {error:.1e}"


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", EVERY)
def test_both_passes(name, implementation):
    case = CASES[name]

    @jax.jit
    def run(query, key, value, d_out, d_lse, operand, sink):
        def attend(query, key, value, operand, sink):
            return pa.attention(
                query,
                key,
                value,
                pa.masks.causal(),
                scores=case.scores(operand),
                sinks=sink,
                scale=case.scale,
                return_lse=True,
                return_key_weights=True,
                **IMPLEMENTATIONS[implementation],
            )

        results, back = jax.vjp(lambda *x: attend(*x)[:2], query, key, value, operand, sink)
        d_query, d_key, d_value, d_operand, d_sink = back((d_out, d_lse))
        return {
            "out": results[0],
            "lse": results[1],
            "key weights": attend(query, key, value, operand, sink).key_weights,
            "d_query": d_query,
            "d_key": d_key,
            "d_value": d_value,
            "d_bias": d_operand,
            "d_sinks": d_sink,
        }

    for magnitude in case.magnitudes:
        arrays, operand = tensors(case, magnitude), case.operand(magnitude)
        sink = None if case.sink is None else case.sink(magnitude).astype(np.float32)
        expected, largest = oracle(case, operand, sink, *arrays)
        assert_right(run(*arrays, operand, sink), expected, largest, magnitude, name)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", [None, pytest.param("int8", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", EVERY)
def test_decode_in_chunks(name, kind, implementation):
    case = CASES[name]

    @jax.jit
    def run(query, key, value, operand, sink):
        options = {"scores": case.scores(operand), "sinks": sink, "scale": case.scale}
        last = jnp.arange(LENGTH - 3, LENGTH, dtype=jnp.int32)[None]
        asked = {"return_lse": True, "return_key_weights": True, "q_positions": last}
        options |= asked | IMPLEMENTATIONS[implementation]
        out, lse, weights = pa.attention(query, key, value, pa.masks.causal(), **options)
        return {"out": out, "lse": lse, "key weights": weights}

    for magnitude in case.magnitudes:
        query, key, value, d_out, d_lse = tensors(case, magnitude, q_len=3)
        stored = key, value
        if kind:
            stored = tuple(pa.QuantizedArray.quantize(jnp.asarray(x), kind) for x in stored)
            key, value = (np.asarray(x.dequantize()) for x in stored)
        operand = case.operand(magnitude)
        operand = operand[:, :, :3] if np.ndim(operand) == 4 else operand
        sink = None if case.sink is None else case.sink(magnitude).astype(np.float32)
        expected, largest = oracle(case, operand, sink, query, key, value, d_out, d_lse)
        actual = run(query, *stored, operand, sink)
        assert_right(actual, {x: expected[x] for x in actual}, largest, magnitude, name)


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_of_the_lowest_number_are_means_in_short_floats(implementation, dtype):
    """A row of the lowest numbers is the mean of its values; its gradient is shared out."""
    bias = jnp.full((1, 1, LENGTH, LENGTH), jnp.finfo(dtype).min, dtype)
    query, key, value, d_out, _ = (jnp.asarray(x, dtype) for x in tensors(PLAIN, 1.0))

    def attend(value):
        how = IMPLEMENTATIONS[implementation]
        return pa.attention(query * 0, key, value, scores=pa.scores.bias(bias), **how)

    out, back = jax.vjp(jax.jit(attend), value)
    (d_value,) = back(d_out)
    value, d_out = (np.asarray(x, np.float64) for x in (value, d_out))
    eps = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(
        np.asarray(out, np.float64), np.broadcast_to(value.mean(1, keepdims=True), out.shape), atol=eps
    )
    shared = np.broadcast_to(d_out.sum((1, 2), keepdims=True) / LENGTH, d_value.shape)
    np.testing.assert_allclose(
        np.asarray(d_value, np.float64), shared, atol=2 * eps * np.abs(d_out).sum((1, 2)).max() / LENGTH
    )
