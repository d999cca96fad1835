"""What a Generator holds on the device: for every row of its batch, one request's tokens, settings and progress."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import pallas_attn as pa
from pallas_attn_models.generation.sampling import SamplingArrays

# What a row is doing. Beyond RUNNING it is done, and this is why.
FREE, READING, RUNNING, STOP, LENGTH, CAPACITY, INVALID = range(7)
FINISH_REASONS = {STOP: "stop", LENGTH: "length", CAPACITY: "capacity", INVALID: "invalid"}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Count:
    """An integer in two digits to base 2**30, as JAX has 64-bit integers only behind a flag."""

    high: Array
    low: Array

    @staticmethod
    def zero() -> "Count":
        return Count(jnp.int32(0), jnp.int32(0))

    def __add__(self, number: Array) -> "Count":
        low = self.low + number.astype(jnp.int32)
        return Count(self.high + (low >> 30), low & (2**30 - 1))

    def value(self) -> int:
        return (int(self.high) << 30) + int(self.low)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """What the rows are asked for, by whoever is in them.

    Attributes:
      prompt_length: int32 ``[B]``.
      leader: int32 ``[B]``, the row whose tokens a row takes: its own, but for one that reads a negative prompt.
      partner: int32 ``[B]``, the row that reads this one's negative prompt; its own if there is none.
      guidance: float32 ``[B]``, how far from what the partner says (classifier-free guidance, arXiv:2306.17806, eq. 7).
      sampling: how tokens are chosen, and what ends a row.
    """

    prompt_length: Array | np.ndarray
    leader: Array | np.ndarray
    partner: Array | np.ndarray
    guidance: Array | np.ndarray
    sampling: SamplingArrays


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """The rows.

    Attributes:
      status: int32 ``[B]``, one of the constants above.
      tokens: int32 ``[B, P]``, the prompt as far as it is read, and the new tokens after it; P is ``max_length``.
      length: int32 ``[B]``, how many these are. The last of a row that is running is not in its caches yet.
      counts: int32 ``[B, V]``, which tokens a row has had; see
        :func:`~pallas_attn_models.generation.sampling.count_prompt`.
      matched: int32 ``[B]``, the new tokens at the end which are the stop sequence that ended the row.
      alone: bool ``[B]``: with speculation, the row takes its next step without drafts.
      request: what they are asked for.
    """

    status: Array
    tokens: Array
    length: Array
    counts: Array
    matched: Array
    alone: Array
    request: Request

    @property
    def num_new(self) -> Array:
        """int32 ``[B]``, new tokens of the rows that are past their prompts."""
        return self.length - self.request.prompt_length


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Tally:
    """What has been counted.

    Attributes:
      kv_blocks_visited, kv_blocks_total: KV blocks that the layers visited, of how many.
      turns: how often a row was fed by decode.
      drafted, accepted: tokens that were drafted, and that turned out right.
    """

    kv_blocks_visited: Count
    kv_blocks_total: Count
    turns: Count
    drafted: Count
    accepted: Count

    @staticmethod
    def zero() -> "Tally":
        return Tally(*(Count.zero() for _ in dataclasses.fields(Tally)))

    def plus(self, **numbers: Array) -> "Tally":
        """With int32 scalars added to what they name."""
        return dataclasses.replace(self, **{name: getattr(self, name) + number for name, number in numbers.items()})

    def digits(self) -> Array:
        """All of it in one array, int32 ``[n, 2]``, as each array that Python reads costs it time."""
        counts = (getattr(self, field.name) for field in dataclasses.fields(self))
        return jnp.stack([jnp.stack([count.high, count.low]) for count in counts])

    @staticmethod
    def values(digits: np.ndarray) -> dict[str, int]:
        """What :meth:`digits` says, as Python's integers."""
        names = (field.name for field in dataclasses.fields(Tally))
        return {name: Count(high, low).value() for name, (high, low) in zip(names, digits.tolist(), strict=True)}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class State:
    """Everything that a Generator's executables hand on, donated from each to the next.

    Attributes:
      caches: one per layer, those of a draft model after the model's own.
      rows: the requests.
      tally: what has been counted.
    """

    caches: tuple[pa.caches.KVCache, ...]
    rows: Rows
    tally: Tally


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Work:
    """What one call of prefill does, in this order: admit, read, copy, start. Its shapes are those of the Generator.

    Attributes:
      released: bool ``[B]``: the row is given back, whatever it was doing.
      admitted: bool ``[B]``: the row begins anew, with what ``request`` says of it.
      request: of the admitted rows; of the others it means nothing.
      rows: int32 ``[R]``, whose prompts are read; B: nobody's.
      tokens: int32 ``[R, C]``, the next tokens of these prompts.
      count: int32 ``[R]``, how many they are.
      following: int32 ``[R]``, the token of the prompt that comes after them; -1: none.
      sources, targets: int32 ``[B]``: what is read becomes that of a second row, for the first ``num_copies``.
      num_copies: int32 scalar.
      started: bool ``[B]``: the row has its prompt, but for the last token, and draws from now on.
    """

    released: Array | np.ndarray
    admitted: Array | np.ndarray
    request: Request
    rows: Array | np.ndarray
    tokens: Array | np.ndarray
    count: Array | np.ndarray
    following: Array | np.ndarray
    sources: Array | np.ndarray
    targets: Array | np.ndarray
    num_copies: Array | np.ndarray
    started: Array | np.ndarray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Report:
    """What one call of decode did, small enough to be read after every token.

    Attributes:
      status, num_new, matched: int32 ``[B]``, as they are now in :class:`Rows`.
      first: int32 ``[B]``, ``num_new`` before.
      tokens, logprobs: int32 and float32 ``[B, W]``, the new ones from ``first`` on, with that which ended the row.
      top_tokens, top_logprobs: ``[B, W, n]``, the likeliest tokens in the place of each.
      tally: the :meth:`Tally.digits` of the state.
    """

    status: Array
    num_new: Array
    matched: Array
    first: Array
    tokens: Array
    logprobs: Array
    top_tokens: Array
    top_logprobs: Array
    tally: Array


def empty_rows(request: Request, max_length: int, vocab_size: int) -> Rows:
    """All of them free."""
    batch_size = request.prompt_length.shape[0]

    def zeros() -> Array:  # each its own, as a buffer can be donated but once
        return jnp.zeros(batch_size, jnp.int32)

    return Rows(
        status=jnp.full(batch_size, FREE, jnp.int32),
        tokens=jnp.zeros((batch_size, max_length), jnp.int32),
        length=zeros(),
        counts=jnp.zeros((batch_size, vocab_size), jnp.int32),
        matched=zeros(),
        alone=jnp.zeros(batch_size, jnp.bool_),
        request=jax.tree.map(jnp.asarray, request),
    )
