"""A behavior of another library and of ours, and whether they agree.

The expected result is computed in float64. As in FlashAttention's tests, our error is judged against the error of the
other library in the same dtype. The other's must be small, too, or else the two computed different functions.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tests import tolerances

_NAN = float("nan")


class Compared(NamedTuple):
    """One array from both libraries, and the expected one."""

    what: str
    ours: Any
    theirs: Any
    exact: np.ndarray
    theirs_exact: np.ndarray | None = None  # if theirs is known to differ
    limit: Callable[[float, float, Any], float] = tolerances.attention_limit
    dtype: Any = None  # default: theirs

    @staticmethod
    def at(rows: Any, what: str, ours: Any, theirs: Any, exact: Any) -> "Compared":
        """Compares those elements only."""
        return Compared(what, np.asarray(ours)[rows], np.asarray(theirs)[rows], np.asarray(exact)[rows])


class Behavior(NamedTuple):
    """``compare(options)`` runs both; ``options`` (implementation, interpret) are for ours.

    It returns an empty list if both rejected a call that they must reject, and raises if they disagree.
    """

    name: str
    compare: Callable[[dict[str, Any]], list[Compared]]


class Row(NamedTuple):
    """The array of a behavior nearest to its limit, or beyond it."""

    name: str
    what: str
    apart: float  # ours and theirs
    error: float  # ours and float64
    their_error: float
    limit: float  # of `error`
    correct: bool
    note: str = ""


def judge(behavior: Behavior, options: dict[str, Any]) -> Row:
    """Runs both. An exception is a failure, because both claim to support the call."""
    try:
        rows = [_row(behavior.name, one) for one in behavior.compare(options)]
    except Exception as error:
        reason = " ".join(str(error).split())
        return Row(behavior.name, "", _NAN, _NAN, _NAN, _NAN, False, f"{type(error).__name__}: {reason}")
    if not rows:
        return Row(behavior.name, "rejected", _NAN, _NAN, _NAN, _NAN, True)
    return max(rows, key=lambda row: (not row.correct, row.error / max(row.limit, np.finfo(float).tiny)))


def _row(name: str, one: Compared) -> Row:
    theirs_exact = one.exact if one.theirs_exact is None else one.theirs_exact
    dtype = one.theirs.dtype if one.dtype is None else one.dtype
    error, their_error = _distance(one.ours, one.exact), _distance(one.theirs, theirs_exact)
    limit = one.limit(their_error, _largest(one.exact), dtype)
    kinds = [(x.dtype.name, x.shape) for x in (one.ours, one.theirs)]
    if kinds[0] != kinds[1]:
        note = f"ours is {kinds[0]}, theirs {kinds[1]}"
    elif not their_error <= tolerances.BENCH_PEER * one.limit(0.0, _largest(theirs_exact), dtype):
        note = "theirs is not what was expected"
    else:
        note = "" if error <= limit else "ours is wrong"
    apart = _distance(one.ours, one.theirs)
    return Row(name, one.what, apart, error, their_error, limit, not note, note)


def _distance(a: Any, b: Any) -> float:
    """The largest difference; equal infinities and NaN in both count as 0."""
    a, b = (np.asarray(x).astype(np.float64) for x in (a, b))
    with np.errstate(invalid="ignore"):
        apart = np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0.0, np.abs(a - b))
    largest = float(apart.max(initial=0.0))
    return largest if largest == largest else float("inf")


def _largest(x: np.ndarray) -> float:
    return float(np.abs(x[np.isfinite(x)]).max(initial=0.0))


def compare_gradients(ours: Any, theirs: Any, exact: Any, dtype: Any) -> Compared:
    """Compares pytrees of gradients of a call in ``dtype`` as one vector, judged by the largest entry.

    Some gradients are 0 up to rounding, such as that of a bias which is the same for all keys.
    """
    kinds = [[(x.shape, x.dtype) for x in jax.tree.leaves(tree)] for tree in (ours, theirs)]
    assert kinds[0] == kinds[1], f"gradients: ours are {kinds[0]}, theirs {kinds[1]}"
    vectors = [
        np.concatenate([np.asarray(x).astype(np.float64).ravel() for x in jax.tree.leaves(tree)])
        for tree in (ours, theirs, exact)
    ]
    coarsest = max((dtype, *(kind for _, kind in kinds[1])), key=lambda kind: float(jnp.finfo(kind).eps))
    return Compared("gradients", *vectors, limit=tolerances.gradient_limit, dtype=coarsest)


@contextlib.contextmanager
def lenient() -> Iterator[None]:
    """Relaxes JAX's strict modes for code of others, and computes float32 products exactly on GPUs, too."""
    with (
        jax.numpy_rank_promotion("allow"),
        jax.numpy_dtype_promotion("standard"),
        jax.default_matmul_precision("highest"),
    ):
        yield


def assert_rejected(
    by: str, error: type[Exception] | tuple[type[Exception], ...], call: Callable[[], Any], mentions: str = ""
) -> None:
    """Raises AssertionError unless the call raises ``error`` with ``mentions`` in its message."""
    try:
        call()
    except error as found:
        if mentions not in str(found):
            raise AssertionError(f"{by} rejects it without mentioning {mentions}: {found}") from found
        return
    raise AssertionError(f"{by} does not reject it")


def exact_attention(query, key, value, bias=None, mask=None, is_causal=False, **_):
    """Attention in float64 from the formula, with Flax's arguments; trace it with 64 bits enabled.

    A query that sees no key gets 0.
    """
    group = query.shape[-2] // key.shape[-2]
    key, value = (jnp.repeat(x, group, axis=-2) for x in (key, value))
    logits = jnp.einsum("...tnd,...snd->...nts", query, key) * query.shape[-1] ** -0.5
    logits = logits if bias is None else logits + bias
    seen = jnp.tri(*logits.shape[-2:], dtype=bool) if is_causal else jnp.ones(logits.shape[-2:], bool)
    seen = jnp.broadcast_to(seen if mask is None else seen & mask.astype(bool), logits.shape)
    # A total of 1 for a query without keys keeps the quotient finite.
    weights = jnp.where(seen, jnp.exp(logits - logits.max(-1, keepdims=True)), 0)
    total = weights.sum(-1, keepdims=True)
    return jnp.einsum("...nts,...snd->...tnd", weights / jnp.where(total > 0, total, 1), value)
