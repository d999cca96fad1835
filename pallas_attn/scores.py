"""Functions of logits, applied before the softmax: soft caps, linear biases, dense biases, or your own function.

A score is elementwise: it maps a scaled logit, its query and key positions, and its head to another logit. The kernels
trace it into their loops and differentiate it there, so the logits are never written to memory.

Arrays of a score come in two kinds. An *operand* is stored with rank 4, aligned with ``[B, N, T, S]``, with size 1
along every axis on which it does not depend; a kernel that works on a tile replaces it by its tile. *Tables* have any
shape, and a kernel sees them whole: a :func:`custom` function looks numbers up in them. They come from its parameters
and its closure (:mod:`pallas_attn.pointwise`).
"""

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Any, dataclass_transform

import jax
import jax.numpy as jnp
from jax import Array

from pallas_attn import checks, pointwise, pytrees


class Score:
    """A function of logits. Pass one, or a sequence to apply in order, as ``attention(scores=...)``."""

    def apply(self, logits: Array, q_positions: Array, kv_positions: Array, head: Array, row: Array) -> Array:
        """Elementwise, float32; all arguments, and the operands in the fields, broadcast to ``logits``.

        ``head`` is the query head and ``row`` the batch row, int32.
        """
        raise NotImplementedError(type(self).__name__)


Scores = tuple[Score, ...]

_LARGEST_CAP = 1e30


def apply(scores: Scores, logits: Array, *where: Array) -> Array:
    """Applies all scores in order; ``where`` holds the remaining arguments of :meth:`Score.apply`."""
    for score in scores:
        logits = score.apply(logits, *where)
    return logits


@dataclass_transform(frozen_default=True)
def _score(*, data: tuple[str, ...] = (), static: tuple[str, ...] = ()):
    """Makes a class a frozen dataclass and pytree: ``data`` fields are traced, ``static`` ones are in the structure."""

    def register(cls):
        cls = dataclasses.dataclass(frozen=True, eq=False)(cls)
        return pytrees.register(cls, data=data, static=static)

    return register


@_score(static=("cap",))
class Softcap(Score):
    cap: float

    def apply(self, logits, q_positions, kv_positions, head, row):
        return self.cap * jnp.tanh(logits / self.cap)


@_score(data=("slopes",))
class Alibi(Score):
    slopes: Array  # [1, N, 1, 1]

    def apply(self, logits, q_positions, kv_positions, head, row):
        distance = jnp.abs(q_positions - kv_positions).astype(jnp.float32)
        return logits - self.slopes.astype(jnp.float32) * distance


@_score(data=("array",))
class Bias(Score):
    array: Array  # [B|1, N|1, T|1, S|1]

    def apply(self, logits, q_positions, kv_positions, head, row):
        return logits + self.array.astype(jnp.float32)


@_score(data=("params",), static=("function",))
class Custom(Score):
    function: Callable[..., Any]
    params: Any

    def apply(self, logits, q_positions, kv_positions, head, row):
        return self.traced().apply(logits, q_positions, kv_positions, head, row)

    def traced(self) -> "Traced":
        """Traces the function with the current values of its closure."""
        program, tables = self._trace()
        return Traced(tables(), program)

    def check(self) -> None:
        """Traces the function, which raises if kernels cannot evaluate it."""
        self._trace()

    def _trace(self) -> pointwise.Trace:
        takes_row = _names_batch(self.function)

        def change(logit, q_position, kv_position, head, row):
            params = jax.tree.map(lambda x: x.astype(jnp.float32) if pointwise.is_floating(x) else x, self.params)
            named = {"batch": row} if takes_row else {}
            changed = self.function(logit, q_position, kv_position, head, params, **named)
            dtype = pointwise.check_number("custom: function", changed, "a floating-point logit")
            if not jnp.issubdtype(dtype, jnp.floating):
                raise TypeError(f"custom: function: expected a floating-point logit, got {dtype}")
            return changed

        return pointwise.trace("custom: function", self.function, change, (jnp.float32, *(jnp.int32,) * 4))


@_score(data=("tables",), static=("program",))
class Traced(Score):
    """A traced custom score, which kernels evaluate."""

    tables: pointwise.Tables
    program: pointwise.Program

    @property
    def reads_row(self) -> bool:
        """Whether the result depends on the batch row."""
        return self.program.reads(4)

    def apply(self, logits, q_positions, kv_positions, head, row):
        changed = self.program.evaluate(self.tables, logits, q_positions, kv_positions, head, row)
        return jnp.broadcast_to(changed, logits.shape).astype(jnp.float32)


def traced(scores: Scores) -> Scores:
    """Replaces custom scores by their traced programs, for kernels."""
    return tuple(score.traced() if isinstance(score, Custom) else score for score in scores)


def softcap(cap: float) -> Score:
    """``cap * tanh(logit / cap)``: bounded logits (Gemma 2, arXiv:2408.00118, section 2).

    Args:
      cap: a positive number, at most 1e30, since a logit divided by more may underflow in float32.
    """
    cap = checks.number("softcap: cap", cap, most=_LARGEST_CAP)
    if cap <= 0:
        raise ValueError(f"softcap: cap: expected a positive number, got {cap}")
    return Softcap(cap)


def alibi(slopes: Array) -> Score:
    """``logit - slope * |q - k|``, one slope per query head (ALiBi, arXiv:2108.12409, section 3).

    Args:
      slopes: floating-point ``[N]``, differentiable.
    """
    return Alibi(_floating("alibi: slopes", slopes, rank=1)[None, :, None, None])


def bias(array: Array) -> Score:
    """``logit + array``.

    Args:
      array: floating-point ``[B|1, N|1, T|1, S|1]``; its gradient is summed over the axes of size 1.
    """
    return Bias(_floating("bias: array", array, rank=4))


def custom(function: Callable[..., Any], params: Any = None) -> Score:
    """Any elementwise function: ``function(logit, q_position, kv_position, head, params) -> logit``.

    Write it in JAX for a single query and key, as scalars: the logit is float32, positions and head are int32. If
    another parameter, after these, is named ``batch``, it receives the batch row, int32: within ``jax.vmap`` the row of
    one element, within ``jax.shard_map`` the row of one shard.

    Arrays in the closure work like those of ``params``: :func:`attention` reads their values at each call, and both get
    gradients. They may have any shape and must be indexed down to a number (``slope[head]``,
    ``params["table"][head, bucket[kv_position]]``, also by ``jnp.take``, slices and ``.at[...].get``). Expressions of
    arrays alone may use any operation, and are computed once (``jax.nn.softmax(table)[head]``). Expressions that depend
    on the query, the key, the head or the row must be numbers: elementwise operations, ``jnp.where``, ``lax.cond``, and
    ``lax.fori_loop`` of at most 64 iterations, a static count. Rows of a table may be compared, multiplied and summed
    (``jnp.dot(a[q_position], b[kv_position])``), up to 128 numbers.

    A few operations (``erf``, ``lgamma``, ``round``; functions with a ``jax.custom_vjp``) have no lowering to Triton;
    the other implementations support them. Out-of-bounds indices follow JAX's rules. The function is also evaluated at
    position -1 (padding), where its result is ignored.

    Args:
      function: returns a floating-point number. To compile once, pass the same function, or one with the same
        operations, each time.
      params: a pytree of arrays and numbers: floating-point (passed to the function as float32), integers or bool.
        Gradients reach the floating-point ones.

    Raises:
      TypeError: not a function; a result that is not a floating-point number; a NumPy array in the closure that is
        indexed by an argument. Exceptions of the function itself propagate.
      ValueError: the result is an array.
      NotImplementedError: kernels cannot evaluate the function; raised for every implementation.
    """
    if not callable(function):
        raise TypeError(f"custom: function: expected a callable, got {type(function).__name__}")
    score = Custom(function, jax.tree.map(_parameter, params))
    score.check()
    return score


def _names_batch(function: Callable) -> bool:
    """Whether a function takes the batch row."""
    try:
        names = list(inspect.signature(function).parameters)
    except ValueError:  # some built-in functions have no signature
        return False
    if "batch" in names[:5]:
        raise TypeError(
            "custom: function: expected (logit, q_position, kv_position, head, params) and optionally batch after"
            f" these, got ({', '.join(names)})"
        )
    return "batch" in names


def _parameter(value: Any) -> Array:
    """Converts a parameter to floating point of at most 32 bits, int32, or bool."""
    x = checks.array_or_list("custom: params", value, "floating-point numbers, integers or bool")
    if x.dtype == jnp.bool_:
        return jnp.asarray(x)
    return checks.int32("custom: params", x) if checks.is_integer(x) else checks.floats("custom: params", x)


def as_scores(scores: Score | Sequence[Score] | None) -> Scores:
    """Converts the argument of ``attention`` to a tuple.

    Raises:
      TypeError: not a Score or a sequence of Scores.
    """
    if scores is None:
        return ()
    listed = (scores,) if isinstance(scores, Score) else scores
    is_listed = isinstance(listed, Sequence) and not isinstance(listed, str)
    others = [x for x in listed if not isinstance(x, Score)] if is_listed else [scores]
    if others:
        got = checks.describe(others[0])
        raise TypeError(f"scores: expected a pallas_attn.scores.Score or a sequence of them, got {got}")
    return tuple(listed)


def _floating(name: str, value: Any, *, rank: int | None) -> Array:
    x = checks.array_or_list(name, value, "floating-point numbers")
    if not hasattr(value, "dtype") and checks.is_integer(x):
        x = x.astype(jnp.float32)  # whole numbers in a list
    x = checks.floats(name, x)
    if rank is not None and x.ndim != rank:
        raise ValueError(f"{name}: expected rank {rank}, got shape {tuple(x.shape)}")
    if rank is not None and 0 in x.shape:
        raise ValueError(f"{name}: expected no empty axis, got shape {tuple(x.shape)}")
    return x
