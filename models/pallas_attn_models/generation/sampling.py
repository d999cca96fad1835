"""From logits to the next token, with every setting an array of one value per row: other settings are other data.

Reads downwards: what a user asks for, the same for a batch of rows as arrays, and what becomes of the logits.
"""

import dataclasses
import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from pallas_attn_models.checks import shown

# One token, or tokens and sequences of tokens.
Stop = int | Sequence[int | Sequence[int]]

SEEDS = 2**32  # how many there are
_TINY, _HUGE = (float(x) for x in (np.finfo(np.float32).tiny, np.finfo(np.float32).max))


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the new tokens of a prompt are chosen. :func:`process` says in which order the settings act.

    Attributes:
      max_new_tokens: the budget, at least 1; a token that ends the row counts too.
      temperature: 0 takes the most likely token (greedy); otherwise logits are divided by it.
      top_k: only the k most likely tokens can be drawn (Fan et al. 2018, arXiv:1805.04833); 0 is off.
      top_p: of those, only the most likely that are needed to reach this probability (nucleus sampling, Holtzman et al.
        2019, arXiv:1904.09751), in (0, 1]; 1 is off. Among equal logits the smaller token id counts as more likely.
      min_p: only tokens at least this many times as probable as the most likely one (Nguyen et al. 2024,
        arXiv:2407.01082), in [0, 1]; 0 is off.
      repetition_penalty: positive logits of tokens that the prompt or the row's new tokens have are divided by it,
        negative ones multiplied (Keskar et al. 2019, arXiv:1909.05858), above 0; 1 is off.
      seed: of the row's random stream, in [0, 2**32). A token depends on its logits, the seed and its index among the
        row's new tokens, never on the other rows.
      presence_penalty, frequency_penalty: taken from the logit of a token that is among the row's new tokens, once, and
        as many times as it is there (as OpenAI's API defines them); 0 is off.
      logit_bias: added to the logits of these tokens.
      forbidden_tokens: can never be drawn, whatever their bias. Where nothing else is left to draw, a row ends as
        ``"invalid"``.
      min_new_tokens: how many tokens the result has at least: before, nothing ends the row but its cache.
      stop: one token, or tokens and sequences of tokens, which end the row where its new tokens end with one.
      top_logprobs: how many of the most likely tokens are reported with each new one.

    Raises:
      ValueError: a value out of its range or of another kind; names the setting, what was expected and what came.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    forbidden_tokens: Sequence[int] = ()
    min_new_tokens: int = 0
    stop: Stop = ()
    top_logprobs: int = 0

    def __post_init__(self):
        _require_int("max_new_tokens", self.max_new_tokens, 1)
        _require_int("top_k", self.top_k, 0)
        _require_int("min_new_tokens", self.min_new_tokens, 0)
        _require_int("top_logprobs", self.top_logprobs, 0)
        _require_int("seed", self.seed, 0, SEEDS)
        _require("temperature", self.temperature, lambda x: x >= 0, "a finite number of at least 0")
        # A smaller top_p than float32 holds is 0 on the device, which leaves the likeliest token, as it should.
        top_p = self.top_p if not _is_real(self.top_p) or not 0 < self.top_p < _TINY else _TINY
        _require("top_p", top_p, lambda x: 0 < x <= 1, "a number in (0, 1]")
        _require("min_p", self.min_p, lambda x: 0 <= x <= 1, "a number in [0, 1]")
        # What is smaller may count as 0 on the device, by which nothing can be divided.
        _require("repetition_penalty", self.repetition_penalty, lambda x: x >= _TINY, "a finite number above 0")
        for name in ("presence_penalty", "frequency_penalty"):
            _require(name, getattr(self, name), lambda _: True, "a finite number")
        if self.min_new_tokens > self.max_new_tokens:
            limit = f"at most max_new_tokens={self.max_new_tokens}"
            raise ValueError(f"min_new_tokens: expected {limit}, got {self.min_new_tokens}")
        if not isinstance(self.logit_bias, Mapping | None):
            raise ValueError(f"logit_bias: expected a mapping from tokens to numbers, got {shown(self.logit_bias)}")
        for token, bias in (self.logit_bias or {}).items():
            _require_int("logit_bias", token, 0)
            _require(f"logit_bias[{int(token)}]", bias, lambda _: True, "a finite number (forbidden_tokens says never)")
        _require_tokens("forbidden_tokens", self.forbidden_tokens)
        stop_sequences(self.stop)


@dataclasses.dataclass(frozen=True)
class Limits:
    """How much of some settings a row can have: sizes of arrays, hence fixed for the life of a program.

    Attributes:
      logit_bias: biased and forbidden tokens together.
      stop_sequences: of a row, besides the end tokens of the model.
      stop_length: tokens of a stop sequence, at least 1.
      top_logprobs: most likely tokens that are reported.

    Raises:
      ValueError: a limit out of its range.
    """

    logit_bias: int = 64
    stop_sequences: int = 16
    stop_length: int = 8
    top_logprobs: int = 8

    def __post_init__(self):
        for field in dataclasses.fields(self):
            _require_int(f"limits.{field.name}", getattr(self, field.name), field.name == "stop_length")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class SamplingArrays:
    """The settings of a batch as a pytree; see :class:`Sampling`.

    Attributes:
      temperature, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty: float32 ``[B]``.
      top_k, min_new_tokens, max_new_tokens, top_logprobs: int32 ``[B]``.
      seed: uint32 ``[B]``.
      bias_tokens: int32 ``[B, J]``; unused entries are a token that does not exist.
      bias: float32 ``[B, J]``; ``-inf``: the token is forbidden.
      stop_tokens: int32 ``[B, S, L]``, right-aligned: the last token of a sequence is at the end.
      stop_lengths: int32 ``[B, S]``; 0: unused.
      limits: static; ``J = limits.logit_bias``, ``L = limits.stop_length``, and S is ``limits.stop_sequences`` and the
        number of the model's end tokens together.
    """

    temperature: Array | np.ndarray
    top_k: Array | np.ndarray
    top_p: Array | np.ndarray
    min_p: Array | np.ndarray
    repetition_penalty: Array | np.ndarray
    presence_penalty: Array | np.ndarray
    frequency_penalty: Array | np.ndarray
    bias_tokens: Array | np.ndarray
    bias: Array | np.ndarray
    min_new_tokens: Array | np.ndarray
    max_new_tokens: Array | np.ndarray
    seed: Array | np.ndarray
    top_logprobs: Array | np.ndarray
    stop_tokens: Array | np.ndarray
    stop_lengths: Array | np.ndarray
    limits: Limits = dataclasses.field(metadata={"static": True})

    def cleared(self, rows: Array) -> "SamplingArrays":
        """Settings that ask for nothing in ``rows`` (bool ``[B]``): whoever was there costs the others nothing more."""

        def off(x: Array | np.ndarray, value: float) -> Array:
            return jnp.where(rows.reshape(-1, *[1] * (x.ndim - 1)), jnp.asarray(value, x.dtype), x)

        return dataclasses.replace(
            self,
            temperature=off(self.temperature, 0),
            repetition_penalty=off(self.repetition_penalty, 1),
            presence_penalty=off(self.presence_penalty, 0),
            frequency_penalty=off(self.frequency_penalty, 0),
            bias_tokens=off(self.bias_tokens, np.iinfo(np.int32).max),
            min_new_tokens=off(self.min_new_tokens, 0),
            top_logprobs=off(self.top_logprobs, 0),
        )

    @staticmethod
    def stack(
        samplings: Sequence[Sampling], *, limits: Limits, vocab_size: int, eos_token_ids: Sequence[int] = ()
    ) -> "SamplingArrays":
        """One row for each of ``samplings``, as NumPy arrays. ``eos_token_ids`` become stop sequences of every row.

        Raises:
          ValueError: a token outside the vocabulary, or more of something than ``limits`` have room for.
        """
        batch_size, num_stops = len(samplings), limits.stop_sequences + len(eos_token_ids)
        bias_tokens = np.full((batch_size, limits.logit_bias), vocab_size, np.int32)
        bias = np.zeros((batch_size, limits.logit_bias), np.float32)
        stop_tokens = np.full((batch_size, num_stops, limits.stop_length), -1, np.int32)
        stop_lengths = np.zeros((batch_size, num_stops), np.int32)
        for row, sampling in enumerate(samplings):
            check_limits(sampling, limits=limits, vocab_size=vocab_size)
            biases = _biases(sampling)
            bias_tokens[row, : len(biases)] = list(biases)
            bias[row, : len(biases)] = list(biases.values())
            stops = (*stop_sequences(sampling.stop), *((token,) for token in eos_token_ids))
            for index, stop in enumerate(stops):
                stop_tokens[row, index, limits.stop_length - len(stop) :] = stop
                stop_lengths[row, index] = len(stop)

        def column(name: str, dtype: Any) -> np.ndarray:
            return np.array([getattr(sampling, name) for sampling in samplings], dtype)

        return SamplingArrays(
            temperature=column("temperature", np.float32),
            top_k=column("top_k", np.int32),
            top_p=column("top_p", np.float32),
            min_p=column("min_p", np.float32),
            repetition_penalty=column("repetition_penalty", np.float32),
            presence_penalty=column("presence_penalty", np.float32),
            frequency_penalty=column("frequency_penalty", np.float32),
            bias_tokens=bias_tokens,
            bias=bias,
            min_new_tokens=column("min_new_tokens", np.int32),
            max_new_tokens=column("max_new_tokens", np.int32),
            seed=column("seed", np.uint32),
            top_logprobs=column("top_logprobs", np.int32),
            stop_tokens=stop_tokens,
            stop_lengths=stop_lengths,
            limits=limits,
        )


def stop_sequences(stop: Stop) -> tuple[tuple[int, ...], ...]:
    """``stop`` of :class:`Sampling` as sequences of tokens.

    Raises:
      ValueError: neither a token nor a sequence of tokens and sequences of tokens, or an empty sequence.
    """
    entries: Any = [stop] if _is_int(stop) else stop
    if not _is_sequence(entries):
        raise ValueError(f"stop: expected a token, or a sequence of tokens and sequences of tokens, got {shown(stop)}")
    sequences = []
    for index, entry in enumerate(entries):
        tokens = [entry] if _is_int(entry) else entry
        _require_tokens(f"stop[{index}]", tokens)
        if not len(tokens):
            raise ValueError(f"stop[{index}]: expected at least one token, got none")
        sequences.append(tuple(map(int, tokens)))
    return tuple(sequences)


def check_limits(sampling: Sampling, *, limits: Limits, vocab_size: int) -> None:
    """Raises ValueError for a token outside the vocabulary, or more of something than ``limits`` have room for."""
    stops, biases = stop_sequences(sampling.stop), _biases(sampling)
    for name, tokens in (
        ("logit_bias", sampling.logit_bias or ()),
        ("forbidden_tokens", sampling.forbidden_tokens),
        ("stop", (token for stop in stops for token in stop)),
    ):
        for token in tokens:
            if token >= vocab_size:
                raise ValueError(f"{name}: expected tokens in [0, vocab_size={vocab_size}), got {token}")
    longest = max(map(len, stops), default=0)
    for name, limit, size, what in (
        ("logit_bias", "logit_bias", len(biases), " biased and forbidden tokens together"),
        ("stop", "stop_sequences", len(stops), " sequences"),
        ("stop", "stop_length", longest, " tokens in a sequence"),
        ("top_logprobs", "top_logprobs", sampling.top_logprobs, ""),
    ):
        most = getattr(limits, limit)
        if size > most:
            raise ValueError(f"{name}: expected at most limits.{limit}={most}{what}, got {size}")
    if sampling.top_logprobs > vocab_size:
        raise ValueError(f"top_logprobs: expected at most vocab_size={vocab_size}, got {sampling.top_logprobs}")


def check_leaves_a_token(sampling: Sampling, *, vocab_size: int, eos_token_ids: Sequence[int] = ()) -> None:
    """Raises ValueError where the settings alone exclude every token, or every first one."""
    forbidden = {int(token) for token in sampling.forbidden_tokens}
    if len(forbidden) >= vocab_size:
        raise ValueError(f"forbidden_tokens: expected fewer than vocab_size={vocab_size}, got all")
    ends = {*eos_token_ids, *(stop[0] for stop in stop_sequences(sampling.stop) if len(stop) == 1)}
    if sampling.min_new_tokens and len(forbidden | ends) >= vocab_size:
        wanted = "0 where every token is forbidden or ends the row"
        raise ValueError(f"min_new_tokens: expected {wanted}, got {sampling.min_new_tokens}")


def count_prompt(counts: Array, tokens: Array, real: Array) -> Array:
    """``counts`` after more tokens of the prompts.

    Counts say which tokens a row has had, int32 ``[B, V]``: the lowest bit, whether the token is in the prompt; the
    bits above, how many times it is among the new tokens. So ``counts > 0`` are the tokens that the row has had at all,
    and ``counts >> 1`` is how often it has drawn each. A row begins with zeros.

    Args:
      counts: as above.
      tokens: int32 ``[B, T]``.
      real: bool ``[B, T]``, which of them are tokens of the prompt and not padding.
    """
    row = jnp.arange(counts.shape[0], dtype=jnp.int32)[:, None]
    tokens = jnp.where(real, tokens, counts.shape[1])  # padding: a token that does not exist
    return counts.at[row, tokens].set(counts[row, tokens] | 1, mode="drop")


def count_new(counts: Array, tokens: Array, written: Array) -> Array:
    """``counts`` after a new token, int32 ``[B]``, of each row ``written``, bool ``[B]``; see :func:`count_prompt`."""
    row = jnp.arange(counts.shape[0], dtype=jnp.int32)
    return counts.at[row, jnp.where(written, tokens, counts.shape[1])].add(2, mode="drop")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Drawn:
    """The next tokens of a batch.

    Log-probabilities are those that the model itself gives, from the logits as they came, whatever the settings make
    of them.

    Attributes:
      tokens: int32 ``[B]``.
      valid: bool ``[B]``: whether there is a token to draw. If not, everything else that is said of the row means
        nothing: its logits hold NaN or ``+inf``, or every token is excluded.
      logprobs: float32 ``[B]``.
      top_tokens, top_logprobs: int32 and float32 ``[B, limits.top_logprobs]``, the most likely tokens, best first;
        beyond what a row has asked for, -1 and ``-inf``.
    """

    tokens: Array
    valid: Array
    logprobs: Array
    top_tokens: Array
    top_logprobs: Array


def sample(logits: Array, settings: SamplingArrays, counts: Array, step: Array) -> Drawn:
    """Chooses the next token of every row.

    Args:
      logits: float32 ``[B, V]``.
      settings: of the rows.
      counts: int32 ``[B, V]``, the tokens that the rows have had; see :func:`count_prompt`.
      step: int32 ``[B]``, the index of the token among the row's new tokens.
    """
    processed = process(logits, settings, counts, step)
    greedy = lax.argmax(processed, 1, jnp.int32)
    random = jnp.asarray(settings.temperature) > 0
    # Rows of either kind share a batch, but a batch that is all greedy does not draw.
    tokens = lax.cond(random.any(), lambda: jnp.where(random, _draw(processed, settings, step), greedy), lambda: greedy)
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    top_tokens, top_logprobs = _top(logprobs, settings)
    # Of the row's logits NaN counts as the largest. Some settings hide it, but not from the sum in logprobs.
    largest, logprob = (jnp.take_along_axis(x, tokens[:, None], axis=-1)[:, 0] for x in (processed, logprobs))
    valid = jnp.isfinite(largest) & ~jnp.isnan(logprob)
    return Drawn(tokens, valid, logprob, top_tokens, top_logprobs)


def process(logits: Array, settings: SamplingArrays, counts: Array, step: Array) -> Array:
    """The logits from which tokens are drawn: float32 ``[B, V]``, and ``-inf`` for those that cannot be.

    In the order of Hugging Face's transformers: bias and forbidden tokens, repetition penalty, presence and frequency
    penalty, minimum of new tokens; and where the temperature is not 0, temperature, top-k, top-p, min-p. Of random rows
    the largest logit is 0. Arguments as of :func:`sample`. What no row asks for is not computed. Biases and penalties
    of any size leave finite logits finite.
    """
    vocab_size = logits.shape[-1]
    repeated = jnp.asarray(settings.repetition_penalty) != 1
    counted = (jnp.asarray(settings.presence_penalty) != 0) | (jnp.asarray(settings.frequency_penalty) != 0)
    for asked, act in (
        ((jnp.asarray(settings.bias_tokens) < vocab_size).any(), lambda x: _add_bias(x, settings)),
        ((repeated | counted).any(), lambda x: _penalize(x, settings, counts)),
        ((step < settings.min_new_tokens).any(), lambda x: _put_off_the_end(x, settings, step)),
        ((jnp.asarray(settings.temperature) > 0).any(), lambda x: _warp(x, settings)),
    ):
        logits = lax.cond(asked, act, lambda x: x, logits)
    return logits


def _add_bias(logits: Array, settings: SamplingArrays) -> Array:
    row, bias = jnp.arange(logits.shape[0], dtype=jnp.int32)[:, None], jnp.asarray(settings.bias)
    before = logits.at[row, settings.bias_tokens].get(mode="fill", fill_value=0)
    after = jnp.where(jnp.isfinite(bias), bounded(before + bias, before), before + bias)
    return logits.at[row, settings.bias_tokens].set(after, mode="drop")


def _penalize(logits: Array, settings: SamplingArrays, counts: Array) -> Array:
    repetition = jnp.where(counts > 0, jnp.asarray(settings.repetition_penalty)[:, None], 1)
    penalized = jnp.where(logits < 0, logits * repetition, logits / repetition)
    new = counts >> 1
    often = new.astype(jnp.float32) * jnp.asarray(settings.frequency_penalty)[:, None]
    once = jnp.where(new > 0, jnp.asarray(settings.presence_penalty)[:, None], 0)
    return bounded(penalized - jnp.clip(often, -_HUGE, _HUGE) - once, logits)


def bounded(logits: Array, before: Array) -> Array:
    """``logits``, but the largest finite number in place of infinities where those ``before`` were finite."""
    return jnp.where(jnp.isfinite(before), jnp.clip(logits, -_HUGE, _HUGE), logits)


def _put_off_the_end(logits: Array, settings: SamplingArrays, step: Array) -> Array:
    """Without the tokens that would end a row alone, where it is too early for that."""
    early = (step < settings.min_new_tokens)[:, None] & (settings.stop_lengths == 1)
    row = jnp.arange(logits.shape[0], dtype=jnp.int32)[:, None]
    ends = jnp.where(early, settings.stop_tokens[:, :, -1], logits.shape[1])
    return logits.at[row, ends].set(-jnp.inf, mode="drop")


def _warp(logits: Array, settings: SamplingArrays) -> Array:
    """What temperature, top-k, top-p and min-p leave; greedy rows as they are."""
    random = jnp.asarray(settings.temperature) > 0
    # From the row's largest logit on, so that the smallest temperature cannot divide infinity by infinity.
    warped = logits - logits.max(axis=-1, keepdims=True)
    warped = warped / jnp.maximum(settings.temperature, _TINY)[:, None]
    sorts = random & ((settings.top_k > 0) | (settings.top_p < 1))
    kept = lax.cond(sorts.any(), lambda: _top_k_top_p(warped, settings), lambda: jnp.ones(logits.shape, jnp.bool_))
    # The likeliest token has logit 0. What is not a number (no token was left) compares as false, and is not kept.
    kept &= warped >= jnp.log(settings.min_p)[:, None]
    return jnp.where(random[:, None], jnp.where(kept, warped, -jnp.inf), logits)


def _top_k_top_p(logits: Array, settings: SamplingArrays) -> Array:
    """Which tokens top-k, and top-p after it, leave: bool ``[B, V]``, at least one per row."""
    batch_size, vocab_size = logits.shape
    order = jnp.argsort(logits, axis=-1, descending=True, stable=True, dtype=jnp.int32)
    ranked = jnp.take_along_axis(logits, order, axis=-1)
    rank = lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    kept = rank < jnp.where(settings.top_k == 0, vocab_size, settings.top_k)[:, None]
    probability = jax.nn.softmax(jnp.where(kept, ranked, -jnp.inf), axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    # A sum of float32 can reach 1 before its last term, and a tiny top_p can round to 0: both ends need saying.
    top_p = settings.top_p[:, None]
    kept &= (rank == 0) | (before < top_p) | (top_p == 1)
    row = lax.broadcasted_iota(jnp.int32, (batch_size, 1), 0)
    return jnp.zeros(logits.shape, jnp.bool_).at[row, order].set(kept)


def _draw(logits: Array, settings: SamplingArrays, step: Array) -> Array:
    """One random token per row, int32 ``[B]``; what it gives for a greedy row means nothing."""
    noise = jax.vmap(lambda seed, step: jax.random.gumbel(_key(seed, step), logits.shape[1:], logits.dtype))
    # As jax.random.categorical draws.
    return lax.argmax(noise(settings.seed, step) + logits, 1, jnp.int32)


def _key(seed: Array, step: Array) -> Array:
    # Named, as what other generators draw under vmap depends on the size of the batch.
    return jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), step)


def _top(logprobs: Array, settings: SamplingArrays) -> tuple[Array, Array]:
    """``top_tokens`` and ``top_logprobs`` of :class:`Drawn`."""
    batch_size, vocab_size = logprobs.shape
    limit = settings.limits.top_logprobs
    wanted = jnp.asarray(settings.top_logprobs)

    def best() -> tuple[Array, Array]:
        values, tokens = lax.top_k(logprobs, min(limit, vocab_size))
        asked = lax.broadcasted_iota(jnp.int32, tokens.shape, 1) < wanted[:, None]
        room = ((0, 0), (0, limit - tokens.shape[1]))
        tokens = jnp.pad(jnp.where(asked, tokens, -1), room, constant_values=-1)
        return tokens, jnp.pad(jnp.where(asked, values, -jnp.inf), room, constant_values=-jnp.inf)

    def none() -> tuple[Array, Array]:
        shape = (batch_size, limit)
        return jnp.full(shape, -1, jnp.int32), jnp.full(shape, -jnp.inf, jnp.float32)

    return lax.cond((wanted > 0).any(), best, none)


def _biases(sampling: Sampling) -> dict[int, float]:
    """What is added to the logits of which tokens; a forbidden one is forbidden whatever its bias."""
    return {**(sampling.logit_bias or {}), **dict.fromkeys(sampling.forbidden_tokens, -math.inf)}


def is_float32(value: Any) -> bool:
    """Whether it is a number that float32 holds, though perhaps not exactly: neither as infinity nor, wrongly, as 0."""
    return _is_real(value) and abs(value) <= _HUGE and (value == 0 or np.float32(value) != 0)


def _is_real(value: object) -> TypeGuard[float]:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _is_int(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_sequence(value: object) -> bool:
    if isinstance(value, np.ndarray):
        return value.ndim > 0 and not isinstance(value, np.ma.MaskedArray)  # whose mask would be lost
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _require_int(name: str, value: Any, low: int, high: int = 2**31) -> None:
    if not _is_int(value) or not low <= int(value) < high:
        raise ValueError(f"{name}: expected an int in [{int(low)}, {high}), got {shown(value)}")


def _require(name: str, value: Any, holds: Any, expected: str) -> None:
    """A number that is finite, in float32 too, and for which the condition holds."""
    if not is_float32(value) or not holds(value):
        raise ValueError(f"{name}: expected {expected}, got {shown(value)}")


def _require_tokens(name: str, tokens: Any) -> None:
    if not _is_sequence(tokens):
        raise ValueError(f"{name}: expected a sequence of tokens, got {shown(tokens)}")
    for token in tokens:
        _require_int(name, token, 0)
