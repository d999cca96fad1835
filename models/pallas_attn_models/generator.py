"""Batches of prompts in, batches of new tokens out, with two executables for life.

*Prefill* reads the prompts and draws the first token of each row; *decode* draws the others. Both are ``while_loop``s
over fixed shapes. Whatever differs between calls (lengths, rows in use, budgets, sampling, end tokens) is data.

Reads downwards: what a run gives back, the Generator, what a run is asked for, and the two functions that compile.
"""

import dataclasses
import functools
import math
import numbers
import time
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax

import pallas_attn as pa
from pallas_attn_models.decoder import Decoder, DecoderOutput
from pallas_attn_models.sampling import Sampling, SamplingArrays, sample

_GREEDY = Sampling()
_RUNNING, _STOP, _LENGTH, _CAPACITY = range(4)
_FINISH_REASONS = {_STOP: "stop", _LENGTH: "length", _CAPACITY: "capacity"}
# Decode comes back to Python after this many steps, so that a user's interrupt is heard.
_STEPS_PER_CALL = np.int32(256)


@dataclasses.dataclass(frozen=True)
class GenerationStats:
    """What a run took.

    Attributes:
      prompt_tokens, new_tokens: of all rows together; a token that ends its row is in neither.
      compile_seconds: spent compiling in this run; 0 in every run of a Generator but its first.
      prefill_seconds: until every row had its first token.
      decode_seconds: from there to the last token.
      executables: how many the Generator has compiled in its life.
      kv_blocks_visited: KV blocks that attention read, over all layers.
      kv_blocks_total: KV blocks that attention would have read in the same rows and steps without block lists.
    """

    prompt_tokens: int
    new_tokens: int
    compile_seconds: float
    prefill_seconds: float
    decode_seconds: float
    executables: int
    kv_blocks_visited: int
    kv_blocks_total: int

    @property
    def tokens_per_second(self) -> float:
        """New tokens per second of prefill and decode."""
        return self.new_tokens / (self.prefill_seconds + self.decode_seconds)


@dataclasses.dataclass(frozen=True)
class GenerationResult:
    """What :meth:`Generator.generate` gives back, one entry per prompt.

    Attributes:
      tokens: the new tokens, without the one that ended the row.
      logprobs: of each of them, under the model's own distribution; see :func:`~pallas_attn_models.sampling.sample`.
      finish_reasons: ``"stop"``: an end token; ``"length"``: ``max_new_tokens`` spent; ``"capacity"``: prompt and new
        tokens have ``max_length``, or the pool of a paged cache is spent.
      stats: what the run took.
    """

    tokens: list[list[int]]
    logprobs: list[list[float]]
    finish_reasons: list[str]
    stats: GenerationStats


class Generator:
    """Generates for up to ``batch_size`` prompts at a time, and never compiles more than two executables.

    Holds the KV caches; the weights are those that the model has when a run starts. Not for use from several threads.

    Args:
      model: the decoder.
      batch_size: rows.
      capacity: how many tokens the cache of a row holds; for all layers, or one for each.
      prefill_chunk: prompts are read in pieces of this many tokens.
      policy, storage: of the caches; default ``pa.caches.Dense()`` and ``pa.caches.Plain()``; or one for each layer.
        Layers with a sliding window hold no more than that takes, in any case.
      max_length: how many tokens a row can have, prompt and new ones together; default: capacity. It may be larger if
        the policy lets old tokens go.

    Raises:
      ValueError: a size below 1, or one that the policy cannot work with.
      TypeError: another kind of model, policy or storage.
    """

    def __init__(
        self,
        model: Decoder,
        *,
        batch_size: int,
        capacity: int | Sequence[int],
        prefill_chunk: int = 128,
        policy: pa.caches.Policy | Sequence[pa.caches.Policy] | None = None,
        storage: pa.caches.Storage | Sequence[pa.caches.Storage] | None = None,
        max_length: int | None = None,
    ) -> None:
        if not isinstance(model, Decoder):
            raise TypeError(f"model: expected a Decoder, got {type(model).__name__}")
        capacities = [*capacity] if isinstance(capacity, Sequence) else [capacity]
        sizes = [("batch_size", batch_size), ("prefill_chunk", prefill_chunk)]
        sizes += [("capacity", size) for size in capacities]
        sizes += [] if max_length is None else [("max_length", max_length)]
        for name, size in sizes:
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(f"{name}: expected an int of at least 1, got {size!r}")
        self.model = model
        self.batch_size = batch_size
        self.capacity = capacity
        self.max_length = max_length = max(capacities) if max_length is None else max_length
        self.prefill_chunk = min(prefill_chunk, max(capacities))
        self.policy = policy
        self.storage = storage
        self._caches: tuple[pa.caches.KVCache, ...] | None = self._new_caches()
        for layer, cache in enumerate(self._caches):
            if max_length > cache.capacity and not cache.policy.bounded:
                wanted = f"at most capacity={cache.capacity}, as layer {layer} keeps every token"
                raise ValueError(f"max_length: expected {wanted}, got {max_length}")
            longest = cache.policy.longest_append(cache.capacity)
            if max_length > cache.capacity and self.prefill_chunk > longest:
                wanted = f"at most {longest}, for {cache.policy} of capacity={cache.capacity} in layer {layer}"
                raise ValueError(f"prefill_chunk: expected {wanted}, got {self.prefill_chunk}")
        graph = nnx.graphdef(model)
        # The caches are donated: updated in place, and never held twice.
        self._prefill = jax.jit(functools.partial(_prefill, graph, self.prefill_chunk), donate_argnums=1)
        self._decode = jax.jit(functools.partial(_decode, graph), donate_argnums=1)

    @property
    def compile_counts(self) -> dict[str, int]:
        """How many executables each of the two functions has: 0 before the first run, 1 ever after."""
        return {"prefill": _num_executables(self._prefill), "decode": _num_executables(self._decode)}

    @property
    def cache_nbytes(self) -> int:
        """Bytes of the caches of all layers."""
        return sum(cache.nbytes for cache in jax.eval_shape(self._new_caches))

    def compile(self) -> float:
        """Compiles both executables, unless that is done, and returns the seconds it took. A first run does it, too."""
        if all(self.compile_counts.values()):
            return 0.0
        start = time.perf_counter()
        weights, request = nnx.state(self.model), self._request([], [], ())  # no rows: nothing is computed
        state = self._prefill(weights, self._take_caches(), request)
        state = self._decode(weights, state, request, _STEPS_PER_CALL)
        self._caches = jax.block_until_ready(state.caches)
        return time.perf_counter() - start

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling | Sequence[Sampling] = _GREEDY,
        stop: int | Sequence[int] = (),
        negative_prompts: Sequence[Sequence[int]] | None = None,
        guidance_scale: float = 1.0,
    ) -> GenerationResult:
        """Continues every prompt until it ends, its budget is spent, or its row is full.

        A row's tokens do not depend on what the other rows hold, or whether they hold anything.

        Args:
          prompts: token ids, 1 to ``batch_size`` prompts of 1 to ``max_length - 1`` tokens each, of any lengths.
          sampling: one for all prompts, or one for each.
          stop: tokens that end a row, besides the ``eos_token_ids`` of the model's config.
          negative_prompts, guidance_scale: part of the contract, not available yet.

        Raises:
          ValueError: a prompt, a token or a number of samplings that does not fit, before anything is compiled.
          TypeError: the wrong kind of object.
          NotImplementedError: an option that is not available yet is used.
        """
        if negative_prompts is not None or guidance_scale != 1:
            raise NotImplementedError("negative_prompts, guidance_scale: not available yet; leave them out")
        vocab_size = self.model.config.vocab_size
        prompts = check_prompts(prompts, max_length=self.max_length, vocab_size=vocab_size)
        if len(prompts) > self.batch_size:
            raise ValueError(f"prompts: expected at most batch_size={self.batch_size}, got {len(prompts)}")
        samplings = _check_samplings(sampling, len(prompts))
        request = self._request(prompts, samplings, _check_stop(stop, vocab_size))

        compile_seconds = self.compile()
        state, prefill_seconds, decode_seconds = self._run(request)
        tokens, logprobs, count, finish = (
            np.asarray(x)[: len(prompts)] for x in (state.tokens, state.logprobs, state.count, state.finish)
        )
        return GenerationResult(
            tokens=[row[:n].tolist() for row, n in zip(tokens, count, strict=True)],
            logprobs=[row[:n].tolist() for row, n in zip(logprobs, count, strict=True)],
            finish_reasons=[_FINISH_REASONS[reason] for reason in finish.tolist()],
            stats=GenerationStats(
                prompt_tokens=sum(map(len, prompts)),
                new_tokens=int(count.sum()),
                compile_seconds=compile_seconds,
                prefill_seconds=prefill_seconds,
                decode_seconds=decode_seconds,
                executables=sum(self.compile_counts.values()),
                kv_blocks_visited=state.visited.value(),
                kv_blocks_total=state.total.value(),
            ),
        )

    def _run(self, request: "_Request") -> tuple["_State", float, float]:
        """The state in which every row is done, and the seconds that prefill and decode took."""
        weights = nnx.state(self.model)
        start = time.perf_counter()
        state = jax.block_until_ready(self._prefill(weights, self._take_caches(), request))
        prefilled = time.perf_counter()
        while (np.asarray(state.finish) == _RUNNING).any():
            state = self._decode(weights, state, request, _STEPS_PER_CALL)
        finished = time.perf_counter()
        self._caches = state.caches
        return state, prefilled - start, finished - prefilled

    def _take_caches(self) -> tuple[pa.caches.KVCache, ...]:
        """Hands the caches to a run, which gives them back when it ends; one that was broken off has lost them."""
        caches, self._caches = self._caches, None
        return self._new_caches() if caches is None else caches

    def _new_caches(self) -> tuple[pa.caches.KVCache, ...]:
        caches = self.model.init_caches(
            batch_size=self.batch_size,
            capacity=self.capacity,
            policy=self.policy,
            storage=self.storage,
            chunk=self.prefill_chunk,
        )
        # Bound to the weights' device, as the caches that a run gives back are: if only some were, jit would recompile.
        return jax.device_put(caches, self.model.embedding.table.sharding)

    def _request(self, prompts: list[list[int]], samplings: list[Sampling], stop: Iterable[int]) -> "_Request":
        chunks = -(-self.max_length // self.prefill_chunk)
        buffer = np.zeros((self.batch_size, chunks * self.prefill_chunk), np.int32)
        lengths, budgets = np.zeros((2, self.batch_size), np.int32)
        for row, prompt in enumerate(prompts):
            buffer[row, : len(prompt)] = prompt
            lengths[row] = len(prompt)
            budgets[row] = samplings[row].max_new_tokens
        ends = np.zeros(self.model.config.vocab_size, np.bool_)
        ends[[*self.model.config.eos_token_ids, *stop]] = True
        unused = [_GREEDY] * (self.batch_size - len(prompts))
        sampling = SamplingArrays.stack([*samplings, *unused])
        return _Request(buffer, lengths, budgets, np.int32(self.max_length), ends, sampling)


def _num_executables(jitted: Any) -> int:
    return jitted._cache_size()


def check_prompts(prompts: Sequence[Sequence[int]], *, max_length: int, vocab_size: int) -> list[list[int]]:
    """The prompts as lists, after checking that each has 1 to ``max_length - 1`` tokens of the vocabulary.

    Raises:
      ValueError: no prompt, one that is empty or too long, or a token outside the vocabulary; names row and index.
      TypeError: a prompt that is no sequence, or a token that is no int.
    """
    if not isinstance(prompts, Sequence | np.ndarray | jax.Array) or isinstance(prompts, str | bytes):
        raise TypeError(f"prompts: expected a sequence of prompts, got {type(prompts).__name__}")
    checked = [_as_tokens(f"prompts[{row}]", prompt, vocab_size) for row, prompt in enumerate(prompts)]
    if not checked:
        raise ValueError("prompts: expected at least one prompt, got none")
    for row, prompt in enumerate(checked):
        if not prompt:
            raise ValueError(f"prompts[{row}]: expected at least one token, got none")
        if len(prompt) >= max_length:
            raise ValueError(
                f"prompts[{row}]: expected fewer tokens than max_length={max_length} (by default the capacity), "
                f"to leave room for a new one, got {len(prompt)}"
            )
    return checked


def _as_tokens(name: str, tokens: Any, vocab_size: int) -> list[int]:
    if isinstance(tokens, np.ndarray | jax.Array):
        tokens = tokens.tolist()
    if not isinstance(tokens, Sequence) or isinstance(tokens, str | bytes):
        raise TypeError(f"{name}: expected a sequence of token ids, got {type(tokens).__name__}")
    for index, token in enumerate(tokens):
        if not isinstance(token, numbers.Integral) or isinstance(token, bool):
            raise TypeError(f"{name}[{index}]: expected a token id, an int, got {token!r}")
        if not 0 <= int(token) < vocab_size:
            raise ValueError(f"{name}[{index}]: expected a token in [0, vocab_size={vocab_size}), got {token}")
    return [int(token) for token in tokens]


def _check_samplings(sampling: Sampling | Sequence[Sampling], num_prompts: int) -> list[Sampling]:
    samplings = list(sampling) if isinstance(sampling, Sequence) else [sampling] * num_prompts
    for one in samplings:
        if not isinstance(one, Sampling):
            raise TypeError(f"sampling: expected a Sampling or one per prompt, got {type(one).__name__}")
    if len(samplings) != num_prompts:
        raise ValueError(f"sampling: expected one, or one for each of {num_prompts} prompts, got {len(samplings)}")
    return samplings


def _check_stop(stop: int | Sequence[int], vocab_size: int) -> list[int]:
    stop = [int(stop)] if isinstance(stop, numbers.Integral) else stop
    if isinstance(stop, Sequence) and any(isinstance(one, Sequence) and not isinstance(one, str) for one in stop):
        raise NotImplementedError("stop: a sequence of several tokens is not available yet; give single tokens")
    return _as_tokens("stop", stop, vocab_size)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class _Request:
    """What a run is asked for. Its shapes follow from the Generator alone, so that no request recompiles.

    Attributes:
      prompts: int32 ``[B, P]``, left-aligned; P is ``max_length`` in whole chunks.
      lengths: int32 ``[B]``; 0: the row has no prompt.
      budgets: int32 ``[B]``, new tokens at most.
      max_length: int32 scalar, tokens of a row at most.
      ends: bool ``[V]``, the tokens that end a row.
      sampling: how tokens are chosen.
    """

    prompts: Array | np.ndarray
    lengths: Array | np.ndarray
    budgets: Array | np.ndarray
    max_length: Array | np.integer
    ends: Array | np.ndarray
    sampling: SamplingArrays


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class _Count:
    """An integer in two digits to base 2**30, as JAX has 64-bit integers only behind a flag."""

    high: Array
    low: Array

    @staticmethod
    def zero() -> "_Count":
        return _Count(jnp.int32(0), jnp.int32(0))

    def __add__(self, number: Array) -> "_Count":
        low = self.low + number.astype(jnp.int32)
        return _Count(self.high + (low >> 30), low & (2**30 - 1))

    def value(self) -> int:
        return (int(self.high) << 30) + int(self.low)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class _State:
    """What a run carries from token to token.

    Attributes:
      caches: one per layer; they hold the prompts and the new tokens but the newest.
      token: int32 ``[B]``, the newest token.
      count: int32 ``[B]``, new tokens so far.
      finish: int32 ``[B]``, why the row is done, or that it is running.
      tokens, logprobs: int32 and float32 ``[B, P]``, the first ``count`` of each row are set.
      visited, total: KV blocks that the layers visited, of how many.
    """

    caches: tuple[pa.caches.KVCache, ...]
    token: Array
    count: Array
    finish: Array
    tokens: Array
    logprobs: Array
    visited: _Count
    total: _Count


def _start(caches: tuple[pa.caches.KVCache, ...], lengths: Array, max_length: int) -> _State:
    """Nothing read yet. A row without a prompt is done."""
    batch_size = lengths.shape[0]
    return _State(
        caches=tuple(cache.reset(jnp.ones(batch_size, jnp.bool_)) for cache in caches),
        token=jnp.zeros(batch_size, jnp.int32),
        count=jnp.zeros(batch_size, jnp.int32),
        finish=jnp.where(lengths > 0, _RUNNING, _LENGTH).astype(jnp.int32),
        tokens=jnp.zeros((batch_size, max_length), jnp.int32),
        logprobs=jnp.zeros((batch_size, max_length), jnp.float32),
        visited=_Count.zero(),
        total=_Count.zero(),
    )


def _prefill(graph: Any, chunk: int, weights: Any, caches: tuple[pa.caches.KVCache, ...], request: _Request) -> _State:
    """Reads the prompts, ``chunk`` tokens of every row at a time, and draws the first new token of each row."""
    model: Decoder = nnx.merge(graph, weights)
    lengths = jnp.asarray(request.lengths)

    def read_chunk(carry: tuple[Array, Array, _State]) -> tuple[Array, Array, _State]:
        start, hidden, state = carry
        tokens = lax.dynamic_slice_in_dim(request.prompts, start, chunk, axis=1)
        index = start + jnp.arange(chunk, dtype=jnp.int32)[None]
        running = (state.finish == _RUNNING)[:, None]
        positions = jnp.where(running & (index < lengths[:, None]), index, -1)
        out = model(tokens, positions, state.caches, apply_head=False)
        last = (lengths - 1 - start)[:, None, None]  # the row's last token, counted from this chunk's first
        found = jnp.take_along_axis(out.hidden, jnp.clip(last, 0, chunk - 1), axis=1)
        hidden = jnp.where((last >= 0) & (last < chunk), found, hidden)
        return start + chunk, hidden, _with_output(state, out)

    hidden = jnp.zeros((lengths.shape[0], 1, model.config.hidden_size), model.dtype)
    carry = (jnp.int32(0), hidden, _start(caches, lengths, request.prompts.shape[1]))
    _, hidden, state = lax.while_loop(lambda carry: carry[0] < lengths.max(), read_chunk, carry)
    return _extend(state, request, model.logits(hidden)[:, 0])


def _decode(graph: Any, weights: Any, state: _State, request: _Request, steps: Array) -> _State:
    """Draws up to ``steps`` more tokens (int32 scalar) for every row that is running, until none is."""
    model: Decoder = nnx.merge(graph, weights)

    def step(carry: tuple[Array, _State]) -> tuple[Array, _State]:
        number, state = carry
        # A row that is done feeds padding, so its cache stays as it is and its list of blocks is empty.
        position = jnp.where(state.finish == _RUNNING, request.lengths + state.count - 1, -1)
        out = model(state.token[:, None], position[:, None], state.caches, apply_head=False)
        return number + 1, _extend(_with_output(state, out), request, model.logits(out.hidden)[:, 0])

    def unfinished(carry: tuple[Array, _State]) -> Array:
        number, state = carry
        return (number < steps) & (state.finish == _RUNNING).any()

    return lax.while_loop(unfinished, step, (jnp.int32(0), state))[1]


def _with_output(state: _State, out: DecoderOutput) -> _State:
    """The state after a call of the model: its caches, and the KV blocks of its layers counted.

    A row for which a cache had no room is done: what it would see from now on is not what it should.
    """
    visited, total = state.visited, state.total
    for mask in out.block_masks:
        rows = (mask.q_positions >= 0).any(-1).sum(dtype=jnp.int32)
        visited = visited + mask.num_active.sum(dtype=jnp.int32)
        total = total + rows * (mask.num_active.shape[1] * math.prod(mask.grid))
    overflowed = functools.reduce(jnp.logical_or, (cache.overflowed for cache in out.caches or ()))
    finish = jnp.where((state.finish == _RUNNING) & overflowed, _CAPACITY, state.finish)
    return dataclasses.replace(state, caches=out.caches, finish=finish, visited=visited, total=total)


def _extend(state: _State, request: _Request, logits: Array) -> _State:
    """Draws the next token of every running row from ``logits`` ``[B, V]``, and sees whether it is the row's last."""
    token, logprob = sample(logits, request.sampling, state.count)
    running = state.finish == _RUNNING
    ended = jnp.asarray(request.ends)[token]
    written = running & ~ended
    row = jnp.arange(token.shape[0], dtype=jnp.int32)
    slot = jnp.where(written, state.count, state.tokens.shape[1])  # a slot that does not exist
    count = state.count + written.astype(jnp.int32)
    finish = jnp.select(
        [~running, ended, count >= request.budgets, request.lengths + count >= request.max_length],
        [state.finish, jnp.int32(_STOP), jnp.int32(_LENGTH), jnp.int32(_CAPACITY)],
        jnp.int32(_RUNNING),
    )
    return dataclasses.replace(
        state,
        token=token,
        count=count,
        finish=finish,
        tokens=state.tokens.at[row, slot].set(token, mode="drop"),
        logprobs=state.logprobs.at[row, slot].set(logprob, mode="drop"),
    )
