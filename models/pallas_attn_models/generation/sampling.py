"""From logits to the next token. Settings are arrays with one value per row, so new settings never recompile.

Reads downwards: a user's settings, the settings of a batch as arrays, processing of the logits.
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

SEEDS = 2**32  # number of seeds
_TINY, _HUGE = (float(x) for x in (np.finfo(np.float32).tiny, np.finfo(np.float32).max))


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Settings that select the new tokens of a prompt. :func:`process` documents the order in which they apply.

    Attributes:
      max_new_tokens: the token budget, at least 1; tokens of a stop sequence count.
      temperature: divides the logits; 0 selects the most likely token (greedy).
      top_k: keeps the k most likely tokens (Fan et al. 2018, arXiv:1805.04833); 0 is off.
      top_p: keeps the most likely of these tokens whose total probability reaches this value (nucleus sampling,
        Holtzman et al. 2019, arXiv:1904.09751), in (0, 1]; 1 is off. Among equal logits, the smaller token id counts as
        more likely.
      min_p: keeps tokens with at least this fraction of the probability of the most likely one (Nguyen et al. 2024,
        arXiv:2407.01082), in [0, 1]; 0 is off.
      repetition_penalty: divides the positive logits, and multiplies the negative logits, of tokens in the prompt or
        among the row's new tokens (Keskar et al. 2019, arXiv:1909.05858), above 0; 1 is off.
      seed: of the row's random stream, in [0, 2**32). A token depends on its logits, the seed and its index among the
        row's new tokens, never on other rows.
      presence_penalty, frequency_penalty: subtracted from the logits of the row's new tokens, once per token and once
        per occurrence, respectively (as OpenAI's API defines them); 0 is off.
      logit_bias: added to the logits of these tokens.
      forbidden_tokens: never sampled, whatever their bias. If no other token is left, the row ends with ``"invalid"``.
      min_new_tokens: length of the result before any stop condition applies; a full cache ends the row anyway.
      stop: one token, or a sequence of tokens and token sequences; the row ends when its new tokens end with one.
      top_logprobs: number of most likely tokens reported with each new token.

    Raises:
      ValueError: a value out of range or of the wrong kind; names the setting.
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
        # A top_p below the smallest float32 becomes 0 on the device, which correctly keeps only the most likely token.
        top_p = self.top_p if not _is_real(self.top_p) or not 0 < self.top_p < _TINY else _TINY
        _require("top_p", top_p, lambda x: 0 < x <= 1, "a number in (0, 1]")
        _require("min_p", self.min_p, lambda x: 0 <= x <= 1, "a number in [0, 1]")
        # The device may flush smaller values to 0, and the penalty is a divisor.
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
            _require(f"logit_bias[{int(token)}]", bias, lambda _: True, "a finite number (or use forbidden_tokens)")
        _require_tokens("forbidden_tokens", self.forbidden_tokens)
        stop_sequences(self.stop)


@dataclasses.dataclass(frozen=True)
class Limits:
    """Upper bounds on the variable-size settings of a row. They determine array shapes, so a Generator fixes them.

    Attributes:
      logit_bias: biased and forbidden tokens together.
      stop_sequences: stop sequences per row, not counting the model's end tokens.
      stop_length: tokens per stop sequence, at least 1.
      top_logprobs: most likely tokens reported per new token.

    Raises:
      ValueError: a limit out of range.
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
    """The settings of a batch of rows as a pytree; see :class:`Sampling`.

    Attributes:
      temperature, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty: float32 ``[B]``.
      top_k, min_new_tokens, max_new_tokens, top_logprobs: int32 ``[B]``.
      seed: uint32 ``[B]``.
      bias_tokens: int32 ``[B, J]``; unused entries are outside the vocabulary.
      bias: float32 ``[B, J]``; ``-inf``: the token is forbidden.
      stop_tokens: int32 ``[B, S, L]``, right-aligned.
      stop_lengths: int32 ``[B, S]``; 0: unused.
      limits: static; ``J = limits.logit_bias``, ``L = limits.stop_length``, and S is ``limits.stop_sequences`` plus the
        number of the model's end tokens.
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

    def in_use(self, step: Array, vocab_size: int) -> Array:
        """bool ``[B]``: rows with a setting that :func:`most_likely` ignores; ``step`` as in :func:`sample`."""
        return (
            (jnp.asarray(self.bias_tokens) < vocab_size).any(1)
            | (jnp.asarray(self.repetition_penalty) != 1)
            | (jnp.asarray(self.presence_penalty) != 0)
            | (jnp.asarray(self.frequency_penalty) != 0)
            | (step < self.min_new_tokens)
            | (jnp.asarray(self.temperature) > 0)
            | (jnp.asarray(self.top_logprobs) > 0)
        )

    def cleared(self, rows: Array) -> "SamplingArrays":
        """Neutral settings in ``rows`` (bool ``[B]``), so that finished requests cause no work for the other rows."""

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
        """One row per entry of ``samplings``, as NumPy arrays. ``eos_token_ids`` become stop sequences of every row.

        Raises:
          ValueError: a token outside the vocabulary, or a setting beyond ``limits``.
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
    """Normalizes ``stop`` of :class:`Sampling` to token sequences.

    Raises:
      ValueError: neither a token nor a sequence of tokens and token sequences, or an empty sequence.
    """
    entries: Any = [stop] if _is_int(stop) else stop
    if not _is_sequence(entries):
        raise ValueError(f"stop: expected a token, or a sequence of tokens and token sequences, got {shown(stop)}")
    sequences = []
    for index, entry in enumerate(entries):
        tokens = [entry] if _is_int(entry) else entry
        _require_tokens(f"stop[{index}]", tokens)
        if not len(tokens):
            raise ValueError(f"stop[{index}]: expected at least one token, got none")
        sequences.append(tuple(map(int, tokens)))
    return tuple(sequences)


def check_limits(sampling: Sampling, *, limits: Limits, vocab_size: int) -> None:
    """Raises ValueError for a token outside the vocabulary, or a setting beyond ``limits``."""
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
    """Raises ValueError if the settings exclude every token, always or for the first new token."""
    forbidden = {int(token) for token in sampling.forbidden_tokens}
    if len(forbidden) >= vocab_size:
        raise ValueError(f"forbidden_tokens: expected fewer than vocab_size={vocab_size}, got all")
    ends = {*eos_token_ids, *(stop[0] for stop in stop_sequences(sampling.stop) if len(stop) == 1)}
    if sampling.min_new_tokens and len(forbidden | ends) >= vocab_size:
        expected = "0 if every token is forbidden or ends the row"
        raise ValueError(f"min_new_tokens: expected {expected}, got {sampling.min_new_tokens}")


def count_prompt(counts: Array, tokens: Array, real: Array) -> Array:
    """Adds prompt tokens to ``counts``.

    Counts are int32 ``[B, V]``: the lowest bit marks tokens of the prompt, and the higher bits count occurrences among
    the new tokens. Hence ``counts > 0`` selects all tokens of the row, and ``counts >> 1`` counts the new ones. A row
    starts with zeros.

    Args:
      counts: as above.
      tokens: int32 ``[B, T]``.
      real: bool ``[B, T]``, False for padding.
    """
    row = jnp.arange(counts.shape[0], dtype=jnp.int32)[:, None]
    tokens = jnp.where(real, tokens, counts.shape[1])  # padding is out of bounds, hence dropped
    return counts.at[row, tokens].set(counts[row, tokens] | 1, mode="drop")


def count_new(counts: Array, tokens: Array, written: Array) -> Array:
    """Adds a new token (int32 ``[B]``) to each row in ``written`` (bool ``[B]``); see :func:`count_prompt`."""
    row = jnp.arange(counts.shape[0], dtype=jnp.int32)
    return counts.at[row, jnp.where(written, tokens, counts.shape[1])].add(2, mode="drop")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class SampledTokens:
    """The next tokens of a batch.

    Log-probabilities are the model's own, from the unprocessed logits.

    Attributes:
      tokens: int32 ``[B]``.
      valid: bool ``[B]``: False if the logits hold NaN or ``+inf`` or every token is excluded; the row's other entries
        are meaningless then.
      logprobs: float32 ``[B]``.
      top_tokens, top_logprobs: int32 and float32 ``[B, limits.top_logprobs]``, the most likely tokens, best first;
        padded with -1 and ``-inf`` beyond the row's own setting.
    """

    tokens: Array
    valid: Array
    logprobs: Array
    top_tokens: Array
    top_logprobs: Array


def sample(logits: Array, settings: SamplingArrays, counts: Array, step: Array) -> SampledTokens:
    """Selects the next token of every row.

    Args:
      logits: float32 ``[B, V]``.
      settings: of the rows.
      counts: int32 ``[B, V]``; see :func:`count_prompt`.
      step: int32 ``[B]``, the index of the token among the row's new tokens.
    """
    processed = process(logits, settings, counts, step)
    greedy = lax.argmax(processed, 1, jnp.int32)
    random = jnp.asarray(settings.temperature) > 0
    # Greedy and random rows share a batch; a batch of greedy rows skips the random draw.
    tokens = lax.cond(random.any(), lambda: jnp.where(random, _draw(processed, settings, step), greedy), lambda: greedy)
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    return _sampled(tokens, processed, logprobs, *_top(logprobs, settings))


def most_likely(logits: Array, settings: SamplingArrays) -> SampledTokens:
    """The result of :func:`sample` if no row has a setting :meth:`in use <SamplingArrays.in_use>`.

    It takes fewer passes over the logits: each setting that is skipped costs a copy of them.
    """
    tokens = lax.argmax(logits, 1, jnp.int32)
    return _sampled(tokens, logits, jax.nn.log_softmax(logits, axis=-1), *_no_top(settings))


def _sampled(tokens: Array, processed: Array, logprobs: Array, top_tokens: Array, top_logprobs: Array) -> SampledTokens:
    # argmax selects a NaN. Some settings mask it, but the sum in logprobs still contains it.
    largest, logprob = (jnp.take_along_axis(x, tokens[:, None], axis=-1)[:, 0] for x in (processed, logprobs))
    valid = jnp.isfinite(largest) & ~jnp.isnan(logprob)
    return SampledTokens(tokens, valid, logprob, top_tokens, top_logprobs)


def process(logits: Array, settings: SamplingArrays, counts: Array, step: Array) -> Array:
    """The logits to sample from, float32 ``[B, V]``; excluded tokens have ``-inf``.

    Settings apply in the order of Hugging Face's transformers: bias and forbidden tokens, repetition penalty, presence
    and frequency penalty, minimum number of new tokens; then, if the temperature is not 0, temperature, top-k, top-p,
    min-p. The largest logit of a random row is 0. Arguments as in :func:`sample`. A setting that no row uses is not
    computed. Finite logits stay finite for biases and penalties of any size.
    """
    vocab_size = logits.shape[-1]
    repeated = jnp.asarray(settings.repetition_penalty) != 1
    counted = (jnp.asarray(settings.presence_penalty) != 0) | (jnp.asarray(settings.frequency_penalty) != 0)
    for used, apply in (
        ((jnp.asarray(settings.bias_tokens) < vocab_size).any(), lambda x: _add_bias(x, settings)),
        ((repeated | counted).any(), lambda x: _penalize(x, settings, counts)),
        ((step < settings.min_new_tokens).any(), lambda x: _exclude_ends(x, settings, step)),
        ((jnp.asarray(settings.temperature) > 0).any(), lambda x: _warp(x, settings)),
    ):
        logits = lax.cond(used, apply, lambda x: x, logits)
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
    """``logits`` with infinities clamped to the largest finite number where ``before`` is finite."""
    return jnp.where(jnp.isfinite(before), jnp.clip(logits, -_HUGE, _HUGE), logits)


def _exclude_ends(logits: Array, settings: SamplingArrays, step: Array) -> Array:
    """Excludes single stop tokens in rows below their minimum number of new tokens."""
    early = (step < settings.min_new_tokens)[:, None] & (settings.stop_lengths == 1)
    row = jnp.arange(logits.shape[0], dtype=jnp.int32)[:, None]
    ends = jnp.where(early, settings.stop_tokens[:, :, -1], logits.shape[1])
    return logits.at[row, ends].set(-jnp.inf, mode="drop")


def _warp(logits: Array, settings: SamplingArrays) -> Array:
    """Applies temperature, top-k, top-p and min-p; greedy rows stay unchanged."""
    random = jnp.asarray(settings.temperature) > 0
    # Relative to the row's largest logit: otherwise a tiny temperature could overflow it, and inf - inf is NaN.
    warped = logits - logits.max(axis=-1, keepdims=True)
    warped = warped / jnp.maximum(settings.temperature, _TINY)[:, None]
    sorts = random & ((settings.top_k > 0) | (settings.top_p < 1))
    kept = lax.cond(sorts.any(), lambda: _top_k_top_p(warped, settings), lambda: jnp.ones(logits.shape, jnp.bool_))
    # The most likely token has logit 0. NaN (no token was left) compares false and is excluded.
    kept &= warped >= jnp.log(settings.min_p)[:, None]
    return jnp.where(random[:, None], jnp.where(kept, warped, -jnp.inf), logits)


def _top_k_top_p(logits: Array, settings: SamplingArrays) -> Array:
    """Tokens kept by top-k and then top-p: bool ``[B, V]``, at least one per row."""
    batch_size, vocab_size = logits.shape
    order = jnp.argsort(logits, axis=-1, descending=True, stable=True, dtype=jnp.int32)
    ranked = jnp.take_along_axis(logits, order, axis=-1)
    rank = lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    kept = rank < jnp.where(settings.top_k == 0, vocab_size, settings.top_k)[:, None]
    probability = jax.nn.softmax(jnp.where(kept, ranked, -jnp.inf), axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    # The float32 sum can reach 1 before its last term, and a tiny top_p can round to 0: handle both ends explicitly.
    top_p = settings.top_p[:, None]
    kept &= (rank == 0) | (before < top_p) | (top_p == 1)
    row = lax.broadcasted_iota(jnp.int32, (batch_size, 1), 0)
    return jnp.zeros(logits.shape, jnp.bool_).at[row, order].set(kept)


def _draw(logits: Array, settings: SamplingArrays, step: Array) -> Array:
    """One random token per row, int32 ``[B]``; meaningless in greedy rows."""
    noise = jax.vmap(lambda seed, step: jax.random.gumbel(_key(seed, step), logits.shape[1:], logits.dtype))
    # The Gumbel-max trick, as in jax.random.categorical.
    return lax.argmax(noise(settings.seed, step) + logits, 1, jnp.int32)


def _key(seed: Array, step: Array) -> Array:
    # Fix the generator, because the numbers of some others depend on the batch size under vmap.
    return jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), step)


def _top(logprobs: Array, settings: SamplingArrays) -> tuple[Array, Array]:
    """``top_tokens`` and ``top_logprobs`` of :class:`SampledTokens`."""
    vocab_size, limit = logprobs.shape[1], settings.limits.top_logprobs
    requested = jnp.asarray(settings.top_logprobs)

    def best() -> tuple[Array, Array]:
        values, tokens = lax.top_k(logprobs, min(limit, vocab_size))
        used = lax.broadcasted_iota(jnp.int32, tokens.shape, 1) < requested[:, None]
        room = ((0, 0), (0, limit - tokens.shape[1]))
        tokens = jnp.pad(jnp.where(used, tokens, -1), room, constant_values=-1)
        return tokens, jnp.pad(jnp.where(used, values, -jnp.inf), room, constant_values=-jnp.inf)

    return lax.cond((requested > 0).any(), best, lambda: _no_top(settings))


def _no_top(settings: SamplingArrays) -> tuple[Array, Array]:
    shape = (settings.seed.shape[0], settings.limits.top_logprobs)
    return jnp.full(shape, -1, jnp.int32), jnp.full(shape, -jnp.inf, jnp.float32)


def _biases(sampling: Sampling) -> dict[int, float]:
    """Logit biases by token; forbidden tokens have ``-inf``, whatever their bias."""
    return {**(sampling.logit_bias or {}), **dict.fromkeys(sampling.forbidden_tokens, -math.inf)}


def is_float32(value: Any) -> bool:
    """Whether it is a real number that float32 can represent, up to rounding, without overflow or underflow to 0."""
    return _is_real(value) and abs(value) <= _HUGE and (value == 0 or np.float32(value) != 0)


def _is_real(value: object) -> TypeGuard[float]:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _is_int(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_sequence(value: object) -> bool:
    if isinstance(value, np.ndarray):
        return value.ndim > 0 and not isinstance(value, np.ma.MaskedArray)  # its mask would be lost
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _require_int(name: str, value: Any, low: int, high: int = 2**31) -> None:
    if not _is_int(value) or not low <= int(value) < high:
        raise ValueError(f"{name}: expected an int in [{int(low)}, {high}), got {shown(value)}")


def _require(name: str, value: Any, holds: Any, expected: str) -> None:
    """Raises ValueError unless the value is a finite float32 number that satisfies the condition."""
    if not is_float32(value) or not holds(value):
        raise ValueError(f"{name}: expected {expected}, got {shown(value)}")


def _require_tokens(name: str, tokens: Any) -> None:
    if not _is_sequence(tokens):
        raise ValueError(f"{name}: expected a sequence of tokens, got {shown(tokens)}")
    for token in tokens:
        _require_int(name, token, 0)
