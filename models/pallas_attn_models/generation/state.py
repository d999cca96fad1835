"""The device state of a Generator: tokens, settings and progress of each row of the batch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from pallas_attn_models.decoder import LayerCaches
from pallas_attn_models.generation.sampling import SamplingArrays

# Status of a row. Values above RUNNING mean finished, and give the reason.
FREE, PREFILLING, RUNNING, STOP, LENGTH, CAPACITY, INVALID = range(7)
FINISH_REASONS = {STOP: "stop", LENGTH: "length", CAPACITY: "capacity", INVALID: "invalid"}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """The request that each row serves.

    Attributes:
      prompt_length: int32 ``[B]``.
      leader: int32 ``[B]``, the row that samples for this one: itself, except in rows that hold a negative prompt.
      partner: int32 ``[B]``, the row that holds this row's negative prompt; itself without one.
      guidance: float32 ``[B]``, the scale of classifier-free guidance (arXiv:2306.17806, eq. 7).
      sampling: sampling settings and stop conditions.
    """

    prompt_length: Array | np.ndarray
    leader: Array | np.ndarray
    partner: Array | np.ndarray
    guidance: Array | np.ndarray
    sampling: SamplingArrays


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class RowState:
    """Tokens and progress of every row.

    Attributes:
      status: int32 ``[B]``, one of the constants above.
      tokens: int32 ``[B, P]``, the prompt as far as it is prefilled, then the new tokens; P is ``max_length``.
      length: int32 ``[B]``, the number of these tokens. The caches of a running row lack the last one.
      counts: int32 ``[B, V]``, occurrences of each token; see
        :func:`~pallas_attn_models.generation.sampling.count_prompt`.
      matched: int32 ``[B]``, the length of the stop sequence that ended the row, the last of its new tokens.
      alone: bool ``[B]``: with speculation, the next step of the row uses no drafts.
      request: the requests that the rows serve.
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
        """int32 ``[B]``, new tokens; valid once the prompt is prefilled."""
        return self.length - self.request.prompt_length


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Counters:
    """Totals since the state was created, in one array: each that a step updates or Python reads costs time.

    Attributes:
      digits: int32 ``[n, 2]``, a total for each of :attr:`NAMES`, as two base-2**30 digits, because JAX enables 64-bit
        integers only behind a flag.
    """

    high: Array
    low: Array

    # KV blocks that the layers visited, and those of a dense pass; decode steps, summed over the running rows; draft
    # tokens, and those of them that were accepted.
    NAMES = ("kv_blocks_visited", "kv_blocks_total", "row_steps", "drafted", "accepted")

    @staticmethod
    def zero() -> "Counters":
        return Counters(*jnp.zeros((2, len(Counters.NAMES)), jnp.int32))

    @property
    def digits(self) -> Array:
        """int32 ``[n, 2]``: all totals in one array."""
        return jnp.stack([self.high, self.low], axis=1)

    def plus(self, **numbers: Array) -> "Counters":
        """The counters after adding int32 scalars to those named."""
        index, more = jnp.arange(len(self.NAMES), dtype=jnp.int32), jnp.zeros(len(self.NAMES), jnp.int32)
        for name, number in numbers.items():
            more = jnp.where(index == self.NAMES.index(name), number, more)
        low = self.low + more
        return Counters(self.high + (low >> 30), low & (2**30 - 1))

    @staticmethod
    def values(digits: np.ndarray) -> dict[str, int]:
        """The totals as Python integers by name."""
        return {name: (high << 30) + low for name, (high, low) in zip(Counters.NAMES, digits.tolist(), strict=True)}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class State:
    """Everything that a Generator's executables pass on; each call donates it to the next.

    Attributes:
      caches: one per layer; the caches of a draft model follow those of the model.
      rows: tokens and progress of the rows.
      counters: totals.
    """

    caches: LayerCaches
    rows: RowState
    counters: Counters


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class PrefillBatch:
    """Input of one prefill call, which admits, prefills, copies and starts rows, in this order. Shapes never change.

    Attributes:
      released: bool ``[B]``: rows to free, whatever their status.
      admitted: bool ``[B]``: rows that start a new request.
      request: the requests of the admitted rows; other entries are ignored.
      rows: int32 ``[R]``, the rows whose prompts are prefilled; B marks an unused entry.
      tokens: int32 ``[R, C]``, the next chunk of each prompt.
      count: int32 ``[R]``, tokens in each chunk.
      next_token: int32 ``[R]``, the prompt token after the chunk; -1: none.
      sources, targets: int32 ``[B]``: the first ``num_copies`` entries copy a prefilled row to another row.
      num_copies: int32 scalar.
      started: bool ``[B]``: rows whose prompts are complete but for the last token, and that start to decode.
    """

    released: Array | np.ndarray
    admitted: Array | np.ndarray
    request: Request
    rows: Array | np.ndarray
    tokens: Array | np.ndarray
    count: Array | np.ndarray
    next_token: Array | np.ndarray
    sources: Array | np.ndarray
    targets: Array | np.ndarray
    num_copies: Array | np.ndarray
    started: Array | np.ndarray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class DecodeOutput:
    """Output of one decode call, small enough to transfer after every token.

    Attributes:
      status, num_new, matched: int32 ``[B]``, as in :class:`RowState` after the call.
      first: int32 ``[B]``, ``num_new`` before the call.
      tokens, logprobs: int32 and float32 ``[B, W]``, new tokens from index ``first`` on, stop tokens included.
      top_tokens, top_logprobs: ``[B, W, n]``, the most likely tokens at each of these indices.
      counters: :attr:`Counters.digits` of the state.
    """

    status: Array
    num_new: Array
    matched: Array
    first: Array
    tokens: Array
    logprobs: Array
    top_tokens: Array
    top_logprobs: Array
    counters: Array


def empty_row_state(request: Request, max_length: int, vocab_size: int) -> RowState:
    """A state whose rows are all free."""
    batch_size = request.prompt_length.shape[0]

    def zeros() -> Array:  # one array for each field, because a buffer can be donated only once
        return jnp.zeros(batch_size, jnp.int32)

    return RowState(
        status=jnp.full(batch_size, FREE, jnp.int32),
        tokens=jnp.zeros((batch_size, max_length), jnp.int32),
        length=zeros(),
        counts=jnp.zeros((batch_size, vocab_size), jnp.int32),
        matched=zeros(),
        alone=jnp.zeros(batch_size, jnp.bool_),
        request=jax.tree.map(jnp.asarray, request),
    )
