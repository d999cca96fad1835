"""What changes a logit before the softmax: soft caps, linear biases, any bias, or a function of your own.

A score is elementwise: it maps a scaled logit, its query's and its key's position, and its head to another logit. The
kernels trace it into their loops and differentiate it there, so the logits are never written to memory.

Arrays of a score come in two kinds. An *operand* is stored with rank 4, aligned with ``[B, N, T, S]``, with size 1
along every axis on which it does not depend; a kernel that works on a tile replaces it by its tile. *Tables* have any
shape, and a kernel sees them whole: they are what the function of :func:`custom` looks up, among its parameters and
what it closes over (:mod:`pallas_attn.pointwise`).
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
    """A change of logits. Pass one, or a sequence that is applied in order, as ``attention(scores=...)``."""

    def apply(self, logits: Array, q_positions: Array, kv_positions: Array, head: Array, row: Array) -> Array:
        """Elementwise, float32; all arguments, and the operands in the fields, broadcast to ``logits``.

        ``head`` is the query head and ``row`` the row of the batch, int32.
        """
        raise NotImplementedError(type(self).__name__)


Scores = tuple[Score, ...]

_LARGEST_CAP = 1e30


def apply(scores: Scores, logits: Array, *where: Array) -> Array:
    """All scores, in order; ``where`` is the rest of the arguments of :meth:`Score.apply`."""
    for score in scores:
        logits = score.apply(logits, *where)
    return logits


@dataclass_transform(frozen_default=True)
def _score(*, data: tuple[str, ...] = (), static: tuple[str, ...] = ()):
    """Makes a frozen dataclass a pytree: ``data`` fields are traced, ``static`` fields are part of the structure."""

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
        """With what the function closes over now."""
        program, tables = self._trace()
        return Traced(tables(), program)

    def check(self) -> None:
        """Raises what is wrong with the function."""
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
    """A custom score as kernels evaluate it."""

    tables: pointwise.Tables
    program: pointwise.Program

    @property
    def reads_row(self) -> bool:
        """Whether it differs between the rows of a batch."""
        return self.program.reads(4)

    def apply(self, logits, q_positions, kv_positions, head, row):
        changed = self.program.evaluate(self.tables, logits, q_positions, kv_positions, head, row)
        return jnp.broadcast_to(changed, logits.shape).astype(jnp.float32)


def traced(scores: Scores) -> Scores:
    """The same with custom scores ready for kernels."""
    return tuple(score.traced() if isinstance(score, Custom) else score for score in scores)


def softcap(cap: float) -> Score:
    """``cap * tanh(logit / cap)``: bounded logits (Gemma 2, arXiv:2408.00118, section 2).

    Args:
      cap: a positive number, at most 1e30: float32 would take a logit divided by more for 0.
    """
    cap = checks.number("softcap: cap", cap, most=_LARGEST_CAP)
    if cap <= 0:
        raise ValueError(f"softcap: cap: expected a positive number, got {cap}")
    return Softcap(cap)


def alibi(slopes: Array) -> Score:
    """``logit - slope * |q - k|``, one slope per query head (ALiBi, arXiv:2108.12409, section 3).

    Args:
      slopes: floating-point ``[N]``. Gradients reach them.
    """
    return Alibi(_floating("alibi: slopes", slopes, rank=1)[None, :, None, None])


def bias(array: Array) -> Score:
    """``logit + array``.

    Args:
      array: floating-point ``[B|1, N|1, T|1, S|1]``. Its gradient is summed over the axes of size 1.
    """
    return Bias(_floating("bias: array", array, rank=4))


def custom(function: Callable[..., Any], params: Any = None) -> Score:
    """Any elementwise function: ``function(logit, q_position, kv_position, head, params) -> logit``.

    It is written in JAX for a single query and key, as numbers: the logit float32, positions and head int32. A function
    that names a parameter ``batch`` after these gets the row of the batch too, int32: within ``jax.vmap`` the row of
    one element, within ``jax.shard_map`` the row of one shard.

    Arrays that it closes over serve as those of ``params`` do, and what they hold when :func:`attention` is called
    counts; gradients reach both. They have any shape, and are indexed down to a number (``slope[head]``,
    ``params["table"][head, bucket[kv_position]]``, also by ``jnp.take``, slices and ``.at[...].get``). What depends on
    arrays alone may be computed in any way, and is computed once (``jax.nn.softmax(table)[head]``). What depends on the
    query, the key, the head or the row is a number, of elementwise operations, ``jnp.where``, ``lax.cond``, and
    ``lax.fori_loop`` of up to 64 known turns; rows of a table may be compared, multiplied and summed
    (``jnp.dot(a[q_position], b[kv_position])``), up to 128 numbers.

    A few operations (``erf``, ``lgamma``, ``round``; functions with a ``jax.custom_vjp``) have no lowering to Triton:
    the other implementations serve them. Where an index is out of bounds, JAX's rules hold. A position of -1 (padding)
    reaches the function, and its result does not count.

    Args:
      function: its result is a floating-point number. To compile once, pass the same function in every call, or one of
        the same operations.
      params: a pytree of arrays and numbers: floating-point ones, which come as float32, integers or bool. Gradients
        reach the floating-point ones.

    Raises:
      TypeError: not a function; a result that is no floating-point number; a NumPy array in its closure that it indexes
        by an argument. What the function itself raises passes through.
      ValueError: a result that is an array.
      NotImplementedError: a function that kernels cannot evaluate, on every implementation.
    """
    if not callable(function):
        raise TypeError(f"custom: function: expected a callable, got {type(function).__name__}")
    score = Custom(function, jax.tree.map(_parameter, params))
    score.check()
    return score


def _names_batch(function: Callable) -> bool:
    """Whether a function takes the row of the batch."""
    try:
        names = list(inspect.signature(function).parameters)
    except ValueError:  # a built-in function does not tell
        return False
    if "batch" in names[:5]:
        raise TypeError(
            "custom: function: expected (logit, q_position, kv_position, head, params), and batch after these if it is"
            f" wanted, got ({', '.join(names)})"
        )
    return "batch" in names


def _parameter(value: Any) -> Array:
    """Floating-point numbers of at most 32 bits, int32, or bool."""
    x = checks.array_or_list("custom: params", value, "floating-point numbers, integers or bool")
    if x.dtype == jnp.bool_:
        return jnp.asarray(x)
    return checks.int32("custom: params", x) if checks.is_integer(x) else checks.floats("custom: params", x)


def as_scores(scores: Score | Sequence[Score] | None) -> Scores:
    """The argument of ``attention`` as a tuple.

    Raises:
      TypeError: something else than scores.
    """
    if scores is None:
        return ()
    listed = (scores,) if isinstance(scores, Score) else scores
    is_listed = isinstance(listed, Sequence) and not isinstance(listed, str)
    strangers = [x for x in listed if not isinstance(x, Score)] if is_listed else [scores]
    if strangers:
        got = checks.describe(strangers[0])
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
