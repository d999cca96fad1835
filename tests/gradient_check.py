"""Checks a call of attention and its derivatives against the oracle, for every implementation."""

import contextlib
import dataclasses
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_attn as pa
from pallas_attn import tuning
from pallas_attn.kernels import triton
from tests import attention_check, oracle, tolerances
from tests.attention_check import assert_error, options, seeded


def normal(*shape: int, dtype=np.float32) -> np.ndarray:
    return seeded("normal", shape).standard_normal(shape).astype(dtype)


class Arrays(NamedTuple):
    """The differentiable arguments; ``scores`` has an array for every score with one."""

    query: Any
    key: Any
    value: Any
    scores: list[Any]
    sinks: Any


@dataclasses.dataclass(frozen=True)
class Case(attention_check.Case):
    """A call with scores and sinks. Missing queries and keys hold NaN, and so do the gradients of missing outputs."""

    scores: tuple[oracle.Score, ...] = ()
    sinks: np.ndarray | None = None

    @property
    def factor(self) -> float:
        """The scale of the logits."""
        return self.head_dim**-0.5 if self.scale is None else self.scale

    @property
    def visible(self) -> np.ndarray:
        return oracle.visible(self.mask, *self.geometry, self.batch, self.q_heads)

    @property
    def pairs(self) -> oracle.Pairs:
        return oracle.Pairs.of(self.batch, self.q_heads, *self.geometry)

    @property
    def largest_logit(self) -> float:
        query, key, *_ = self.complete()[0]
        key = np.repeat(key.astype(np.float64), self.q_heads // self.kv_heads, 2)
        logits = np.abs(np.einsum("btnd,bsnd->bnts", query.astype(np.float64), key))
        return abs(self.factor) * logits[self.visible].max(initial=0.0)  # padding may be NaN

    @property
    def missing_queries(self) -> np.ndarray:
        """Bool ``[B, T]``."""
        return np.broadcast_to(self.geometry[0] < 0, (self.batch, self.q_len))

    @property
    def missing_keys(self) -> np.ndarray:
        """Bool ``[B, S, K]``."""
        slots = self.geometry[1]
        slots = slots[:, None] if slots.ndim == 2 else slots
        return np.broadcast_to((slots < 0).swapaxes(1, 2), (self.batch, self.kv_len, self.kv_heads))

    def complete(self, seed: int = 0) -> tuple[Arrays, np.ndarray, np.ndarray]:
        """Arrays and gradients of the output and of lse, without NaN."""
        return jax.tree.map(lambda x: np.nan_to_num(x, nan=0.5), (self.all_arrays(seed), *self.cotangents(seed)))

    def all_arrays(self, seed: int = 0) -> Arrays:
        return Arrays(*self.arrays(seed), [x.argument for x in self.scores if x.has_array], self.sinks)

    def cotangents(self, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Gradients of the output, in the call's dtype, and of lse."""
        generator = np.random.default_rng([seed, 1])
        d_out = generator.standard_normal((self.batch, self.q_len, self.q_heads, self.value_dim or self.head_dim))
        d_lse = generator.standard_normal((self.batch, self.q_heads, self.q_len))
        d_out[self.missing_queries] = np.nan
        d_lse.swapaxes(1, 2)[self.missing_queries] = np.nan
        return d_out.astype(jnp.dtype(self.dtype)), d_lse.astype(np.float32)

    def call(self, arrays: Arrays, mask, q_positions, kv_positions, implementation: str) -> pa.AttentionOutput:
        """The library's attention with lse, to trace."""
        given = iter(arrays.scores)
        return pa.attention(
            *arrays[:3],
            mask,
            q_positions=q_positions,
            kv_positions=kv_positions,
            scores=[score.build(pa.scores, next(given) if score.has_array else None) for score in self.scores],
            sinks=arrays.sinks,
            scale=self.scale,
            return_lse=True,
            block_sizes=self.block_sizes and pa.BlockSizes(*self.block_sizes),
            **options(implementation),
        )

    def both_passes(self, implementation: str):
        """A compiled function of arrays and of the cotangents of output and lse: ``(outputs, gradients)``."""

        @jax.jit
        def run(arrays, d_out, d_lse, *rest):
            (out, lse), back = jax.vjp(lambda x: self.call(x, *rest, implementation)[:2], arrays)
            return (out, lse), back((d_out, d_lse))[0]

        rest = self.mask.build(pa.masks), self.q_positions, self.kv_positions
        return lambda arrays, d_out, d_lse: run(arrays, d_out, d_lse, *rest)


@contextlib.contextmanager
def backward_blocks(block_sizes: tuple[int, int] | None):
    """Sets the block sizes of the Triton backward kernels, which have their own tables."""
    if block_sizes is None:
        yield
        return
    kernels = ("d_query", "d_key_value")
    tables = {kernel: dict.fromkeys(tuning._TABLES[kernel], pa.BlockSizes(*block_sizes)) for kernel in kernels}
    with mock.patch.dict(tuning._TABLES, tables):
        triton.backward.clear_cache()  # may hold programs of other sizes
        yield
    triton.backward.clear_cache()


def check(case: Case, implementation: str, seed: int = 0, *, few_pairs: bool = False) -> None:
    """Checks output, lse and every gradient; arrays without influence on the output have a gradient of exactly 0.

    Plain attention's error is a poor yardstick for a sum that cancels or has few terms: it may be 0 by luck. For such
    gradients (always those of scores' arrays; the others if they have ``few_pairs``), the limit is the worse of two
    ways to write plain attention, plus the rounding errors of the terms.
    """
    arrays, (d_out, d_lse) = case.all_arrays(seed), case.cotangents(seed)
    seen = case.visible
    common = (*arrays[:3], seen, case.factor)
    extras = (case.scores, case.sinks, case.pairs)
    expected = oracle.attention(*common, *extras)
    plain = oracle.plain_attention(*common, *extras)
    with backward_blocks(case.block_sizes):
        (out, lse), actual = case.both_passes(implementation)(arrays, d_out, d_lse)

    assert_outputs(case, out, lse, expected, plain)
    right = oracle.gradients(*common, d_out, d_lse, *extras)
    ways = (False, True) if few_pairs or case.scores else (False,)
    yardsticks = [oracle.gradients(*common, d_out, d_lse, *extras, plain=True, from_output=way) for way in ways]
    assert_zero_where_nothing_is_seen(case, actual)
    with_sizes = ["query", "key", "value", *(f"scores[{i}]" for i in range(len(right.scores)))]
    sizes = dict(zip(with_sizes, right.summed, strict=True))
    arrays, *gradients = (_named(x) for x in (arrays, actual, right, *yardsticks))
    for name, array in arrays.items():
        gradient, *others = (x[name] for x in gradients)
        assert gradient.shape == array.shape, name
        assert gradient.dtype == array.dtype, name
        dtype = max(case.dtype, gradient.dtype, key=lambda x: float(jnp.finfo(x).eps))
        recomputed = tolerances.recomputed_limit(case.largest_logit)
        numbers = [np.asarray(x, np.float64) for x in (gradient, *others)]
        summed = sizes.get(name, 0.0) if few_pairs or name.startswith("scores") else 0.0
        assert_gradient(*numbers, dtype=dtype, name=name, recomputed=recomputed, summed=summed)


def assert_outputs(case: Case, out, lse, expected: tuple, plain: tuple) -> None:
    """Checks output and lse against those of the oracle and of plain attention."""
    seen = case.visible
    has_part = seen.any(-1)
    if case.sinks is not None:
        has_part = np.broadcast_to(~case.missing_queries[:, None], has_part.shape)
    out, lse = (np.asarray(x, np.float64) for x in (out, lse))
    assert (out.swapaxes(1, 2)[~seen.any(-1)] == 0).all(), "a query that sees no key gets 0"
    assert (lse[~has_part] == -np.inf).all(), "a query that sees neither key nor sink gets -inf"
    assert_error(out, expected[0], plain[0], case.dtype, "out")
    assert_error(lse[has_part], expected[1][has_part], plain[1][has_part], "float32", "lse")


def _named(gradients: Arrays | oracle.Gradients) -> dict[str, Any]:
    named = dict(zip(("query", "key", "value"), gradients[:3], strict=True))
    named |= {f"scores[{i}]": x for i, x in enumerate(gradients[3])}
    return named if gradients[4] is None else named | {"sinks": gradients[4]}


def assert_gradient(
    actual: np.ndarray,
    expected: np.ndarray,
    *plain: np.ndarray,
    dtype,
    name: str,
    recomputed: float = 0.0,
    summed: float = 0.0,
) -> None:
    assert np.isfinite(actual).all(), f"the gradient of {name} is not finite"
    error, plain_error = np.abs(actual - expected).max(), max(np.abs(x - expected).max() for x in plain)
    largest = np.abs(expected).max()
    limit = tolerances.gradient_limit(plain_error, largest, dtype)
    limit += recomputed * max(largest, summed) + tolerances.summed_limit(summed, dtype)
    message = f"gradient of {name}: error {error:.3g}, plain attention {plain_error:.3g}, limit {limit:.3g}"
    assert error <= limit, message


def assert_zero_where_nothing_is_seen(case: Case, gradients: Arrays) -> None:
    """Includes elements that no kernel writes, where uninitialized memory would show."""
    seen = case.visible
    blind = ~seen.any(3).swapaxes(1, 2)  # [B, T, N]
    unseen = ~seen.reshape(case.batch, case.kv_heads, -1, case.kv_len).any(2).swapaxes(1, 2)  # [B, S, K]
    for name, x, where in (
        ("query", gradients.query, blind),
        ("key", gradients.key, unseen),
        ("value", gradients.value, unseen),
    ):
        assert (np.asarray(x, np.float32)[where] == 0).all(), f"{name} where nothing is seen"
    for score, gradient in zip((x for x in case.scores if x.has_array), gradients.scores, strict=True):
        unused = np.setdiff1d(np.arange(gradient.size), score.element(case.pairs)[seen])
        assert (np.asarray(gradient, np.float32).reshape(-1)[unused] == 0).all(), f"{score} where nothing is seen"


def implementations(*names: str, slow: tuple[str, ...] = ()) -> list:
    """Parameters of a test: the interpreted kernels replace the compiled ones without a GPU."""
    marked = []
    for name in (*names, *slow):
        marks = [pytest.mark.slow] if name in slow else []
        if name == "interpreted":
            marks.append(pytest.mark.skipif(attention_check.NO_GPU is None, reason="the compiled kernels are tested"))
            marked.append(pytest.param("triton", marks=[pytest.mark.gpu]))
        marked.append(pytest.param(name, marks=marks))
    return marked
