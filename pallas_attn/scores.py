"""What changes a logit before the softmax: soft caps, linear biases, any bias, or a function of your own.

A score is elementwise: it maps a scaled logit, its query's and its key's position, and its head to another logit. The
kernels trace it into their loops and differentiate it there, so the logits are never written to memory.

Arrays of a score come in two kinds. An *operand* is stored with rank 4, aligned with ``[B, N, T, S]``, with size 1
along every axis on which it does not depend; a kernel that works on a tile replaces it by its tile. *Parameters* (of
:func:`custom`) have any shape, and a kernel sees them whole.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, dataclass_transform

import jax
import jax.numpy as jnp
from jax import Array

from pallas_attn import checks, pytrees


class Score:
    """A change of logits. Pass one, or a sequence that is applied in order, as ``attention(scores=...)``."""

    # Whether the arrays of this score are operands, or parameters.
    aligned: ClassVar[bool] = True

    def apply(self, logits: Array, q_positions: Array, kv_positions: Array, head: Array) -> Array:
        """Elementwise, float32; all arguments, and the operands in the fields, broadcast to ``logits``."""
        raise NotImplementedError(type(self).__name__)


Scores = tuple[Score, ...]

_LARGEST_CAP = 1e30


def apply(scores: Scores, logits: Array, q_positions: Array, kv_positions: Array, head: Array) -> Array:
    """All scores, in order."""
    for score in scores:
        logits = score.apply(logits, q_positions, kv_positions, head)
    return logits


def map_operands(function: Callable[[Array], Array], scores: Scores) -> Scores:
    """Replaces every operand, and leaves parameters as they are."""
    return tuple(jax.tree.map(function, score) if score.aligned else score for score in scores)


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

    def apply(self, logits, q_positions, kv_positions, head):
        return self.cap * jnp.tanh(logits / self.cap)


@_score(data=("slopes",))
class Alibi(Score):
    slopes: Array  # [1, N, 1, 1]

    def apply(self, logits, q_positions, kv_positions, head):
        distance = jnp.abs(q_positions - kv_positions).astype(jnp.float32)
        return logits - self.slopes.astype(jnp.float32) * distance


@_score(data=("array",))
class Bias(Score):
    array: Array  # [B|1, N|1, T|1, S|1]

    def apply(self, logits, q_positions, kv_positions, head):
        return logits + self.array.astype(jnp.float32)


@_score(data=("params",), static=("function",))
class Custom(Score):
    function: Callable[..., Array]
    params: Any

    aligned = False

    def apply(self, logits, q_positions, kv_positions, head):
        changed = self.function(logits, q_positions, kv_positions, head, self.params)
        return jnp.broadcast_to(changed, logits.shape).astype(jnp.float32)


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


def custom(function: Callable[..., Array], params: Any = None) -> Score:
    """Any elementwise function: ``function(logit, q_position, kv_position, head, params) -> logit``.

    Args:
      function: written in JAX. It gets arrays that broadcast against each other (the logit float32, positions and head
        int32), and must treat every element alone. To compile once, pass the same function object in every call.
      params: a pytree of floating-point arrays of any shape; gradients reach them. An array of rank 1 or more can only
        be asked for its ``shape`` and indexed, down to a number: ``params["slope"][head]``,
        ``params["table"][head, bucket]``.
    """
    if not callable(function):
        raise TypeError(f"custom: function: expected a callable, got {type(function).__name__}")
    params = jax.tree.map(lambda x: _floating("custom: params", x, rank=None), params)
    return Custom(function, params)


def as_scores(scores: Score | Sequence[Score] | None) -> Scores:
    """The argument of ``attention`` as a tuple.

    Raises:
      TypeError: something else than scores.
    """
    if scores is None:
        return ()
    listed = (scores,) if isinstance(scores, Score) else scores
    strangers = [x for x in listed if not isinstance(x, Score)] if isinstance(listed, Sequence) else [scores]
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
