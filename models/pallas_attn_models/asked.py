"""What a Generator is asked for, checked before anything is compiled: one entry for each prompt."""

import dataclasses
import numbers
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from pallas_attn_models.sampling import Limits, Sampling, Stop, check_limits, stop_sequences

Tokens = Sequence[int]


class Asked(NamedTuple):
    """One prompt, and what is asked for it; see :meth:`~pallas_attn_models.generator.Generator.generate`."""

    prompt: list[int]
    sampling: Sampling
    negative_prompt: list[int] | None
    guidance_scale: float


def check_asked(
    prompts: Sequence[Tokens],
    sampling: Sampling | Sequence[Sampling],
    stop: Stop,
    negative_prompts: Sequence[Tokens] | None,
    guidance_scale: float | Sequence[float],
    *,
    max_length: int,
    vocab_size: int,
    limits: Limits,
) -> list[Asked]:
    """One entry for each prompt, with ``stop`` in its sampling; arguments and errors as of ``Generator.generate``."""
    checked = check_prompts(prompts, max_length=max_length, vocab_size=vocab_size)
    negatives: list[list[int] | None] = [None] * len(checked)
    if negative_prompts is not None:
        name = "negative_prompts"
        negatives = [*check_prompts(negative_prompts, max_length=max_length, vocab_size=vocab_size, name=name)]
        _check_number(name, negatives, len(checked))
    scales = _one_each("guidance_scale", guidance_scale, len(checked), numbers.Real)
    for scale, negative in zip(scales, negatives, strict=True):
        if isinstance(scale, bool) or not np.isfinite(scale) or scale < 0:
            raise ValueError(f"guidance_scale: expected a finite number of at least 0, got {scale!r}")
        if scale != 1 and negative is None:
            raise ValueError(f"guidance_scale: expected 1 without negative_prompts, got {scale!r}")
    samplings = _one_each("sampling", sampling, len(checked), Sampling)
    stop = stop_sequences(stop)
    samplings = [dataclasses.replace(one, stop=(*stop_sequences(one.stop), *stop)) for one in samplings]
    for one in samplings:
        check_limits(one, limits=limits, vocab_size=vocab_size)
    return [Asked(*one) for one in zip(checked, samplings, negatives, map(float, scales), strict=True)]


def check_prompts(
    prompts: Sequence[Tokens], *, max_length: int, vocab_size: int, name: str = "prompts", room: int = 1
) -> list[list[int]]:
    """The prompts as lists, after checking that each has 1 to ``max_length - room`` tokens of the vocabulary.

    Raises:
      ValueError: no prompt, one that is empty or too long, or a token outside the vocabulary; names row and index.
      TypeError: a prompt that is no sequence, or a token that is no int.
    """
    if not isinstance(prompts, Sequence | np.ndarray | jax.Array) or isinstance(prompts, str | bytes):
        raise TypeError(f"{name}: expected a sequence of prompts, got {type(prompts).__name__}")
    checked = [_as_tokens(f"{name}[{row}]", prompt, vocab_size) for row, prompt in enumerate(prompts)]
    if not checked:
        raise ValueError(f"{name}: expected at least one prompt, got none")
    for row, prompt in enumerate(checked):
        if not prompt:
            raise ValueError(f"{name}[{row}]: expected at least one token, got none")
        if len(prompt) > max_length - room:
            most = f"max_length={max_length} (by default the capacity)"
            wanted = f"fewer tokens than {most}, to leave room for a new one" if room else f"at most {most} tokens"
            raise ValueError(f"{name}[{row}]: expected {wanted}, got {len(prompt)}")
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


def _one_each(name: str, value: Any, number: int, kind: Any) -> list:
    """``value`` for every prompt, or its entries if it is a sequence, all of a kind."""
    values = list(value) if isinstance(value, Sequence) else [value] * number
    for one in values:
        if not isinstance(one, kind):
            raise TypeError(f"{name}: expected a {kind.__name__} or one per prompt, got {type(one).__name__}")
    _check_number(name, values, number)
    return values


def _check_number(name: str, values: Sequence, number: int) -> None:
    if len(values) != number:
        raise ValueError(f"{name}: expected one, or one for each of {number} prompts, got {len(values)}")
