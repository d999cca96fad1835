"""Validates generation requests before compilation; one entry per prompt."""

import dataclasses
import numbers
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_attn_models.checks import shown
from pallas_attn_models.generation.sampling import (
    Limits,
    Sampling,
    Stop,
    check_leaves_a_token,
    check_limits,
    is_float32,
    stop_sequences,
)

Tokens = Sequence[int]


class GenerationRequest(NamedTuple):
    """A prompt with its options; see :meth:`~pallas_attn_models.generation.Generator.generate`."""

    prompt: list[int]
    sampling: Sampling
    negative_prompt: list[int] | None
    guidance_scale: float


@dataclasses.dataclass(frozen=True)
class Bounds:
    """The range of requests that a Generator can serve.

    Attributes:
      max_length: tokens per row.
      vocab_size, eos_token_ids: from the model's config.
      limits: on the sampling settings.
    """

    max_length: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    limits: Limits

    def check(self, request: GenerationRequest, stop: Stop) -> GenerationRequest:
        """Validates a request and merges ``stop`` into its sampling settings.

        Raises:
          ValueError: an invalid guidance scale, or a setting beyond the vocabulary or the limits.
        """
        scale = request.guidance_scale
        if isinstance(scale, bool) or not is_float32(scale) or scale < 0:
            raise ValueError(f"guidance_scale: expected a finite number of at least 0, got {shown(scale)}")
        if scale != 1 and request.negative_prompt is None:
            raise ValueError(f"guidance_scale: expected 1 without negative_prompts, got {shown(scale)}")
        sampling = request.sampling
        sampling = dataclasses.replace(sampling, stop=(*stop_sequences(sampling.stop), *stop_sequences(stop)))
        check_limits(sampling, limits=self.limits, vocab_size=self.vocab_size)
        check_leaves_a_token(sampling, vocab_size=self.vocab_size, eos_token_ids=self.eos_token_ids)
        return request._replace(sampling=sampling, guidance_scale=float(scale))


def validate_requests(
    prompts: Sequence[Tokens],
    sampling: Sampling | Sequence[Sampling],
    stop: Stop,
    negative_prompts: Sequence[Tokens] | None,
    guidance_scale: float | Sequence[float],
    bounds: Bounds,
) -> list[GenerationRequest]:
    """One validated request per prompt; arguments and errors as in ``Generator.generate``."""
    checked = check_prompts(prompts, max_length=bounds.max_length, vocab_size=bounds.vocab_size)
    negatives: list[list[int] | None] = [None] * len(checked)
    if negative_prompts is not None:
        name = "negative_prompts"
        negatives = [
            *check_prompts(negative_prompts, max_length=bounds.max_length, vocab_size=bounds.vocab_size, name=name)
        ]
        _check_number(name, negatives, len(checked))
    scales = _broadcast("guidance_scale", guidance_scale, len(checked), numbers.Real, "a number")
    samplings = _broadcast("sampling", sampling, len(checked), Sampling, "a Sampling")
    requests = map(GenerationRequest, checked, samplings, negatives, scales)
    return [bounds.check(request, stop) for request in requests]


def validate_request(
    prompt: Tokens,
    sampling: Sampling,
    stop: Stop,
    negative_prompt: Tokens | None,
    guidance_scale: float,
    bounds: Bounds,
) -> GenerationRequest:
    """Arguments and errors as in ``Generator.submit``."""
    sizes = {"max_length": bounds.max_length, "vocab_size": bounds.vocab_size}
    prompt = check_prompt("prompt", prompt, **sizes)
    if negative_prompt is not None:
        negative_prompt = check_prompt("negative_prompt", negative_prompt, **sizes)
    _check_kind("guidance_scale", guidance_scale, numbers.Real, "a number")
    _check_kind("sampling", sampling, Sampling, "a Sampling")
    return bounds.check(GenerationRequest(prompt, sampling, negative_prompt, guidance_scale), stop)


def check_prompts(
    prompts: Sequence[Tokens], *, max_length: int, vocab_size: int, name: str = "prompts", room: int = 1
) -> list[list[int]]:
    """The validated prompts as a non-empty list of lists.

    Raises:
      ValueError, TypeError: as in :func:`check_prompt`; names the row.
    """
    if (rows := _entries(prompts)) is None:
        raise TypeError(f"{name}: expected a sequence of prompts, got {type(prompts).__name__}")
    sizes = {"max_length": max_length, "vocab_size": vocab_size, "room": room}
    checked = [check_prompt(f"{name}[{row}]", prompt, **sizes) for row, prompt in enumerate(rows)]
    if not checked:
        raise ValueError(f"{name}: expected at least one prompt, got none")
    return checked


def check_prompt(name: str, prompt: Tokens, *, max_length: int, vocab_size: int, room: int = 1) -> list[int]:
    """The prompt as a list, which has 1 to ``max_length - room`` tokens of the vocabulary.

    Raises:
      ValueError: an empty or too long prompt, or a token outside the vocabulary; names it.
      TypeError: a prompt that is not a sequence, or a token that is not an int.
    """
    if (tokens := _entries(prompt)) is None:
        raise TypeError(f"{name}: expected a sequence of token ids, got {type(prompt).__name__}")
    for index, token in enumerate(tokens):
        if not isinstance(token, numbers.Integral) or isinstance(token, bool):
            raise TypeError(f"{name}[{index}]: expected a token id, an int, got {shown(token)}")
        if not 0 <= int(token) < vocab_size:
            raise ValueError(f"{name}[{index}]: expected a token in [0, vocab_size={vocab_size}), got {shown(token)}")
    if not len(tokens):
        raise ValueError(f"{name}: expected at least one token, got none")
    if len(tokens) > max_length - room:
        most = f"max_length={max_length} (by default the capacity)"
        expected = f"fewer tokens than {most}, to leave room for a new one" if room else f"at most {most} tokens"
        raise ValueError(f"{name}: expected {expected}, got {len(tokens)}")
    return [int(token) for token in tokens]


def _entries(value: Any) -> Sequence | None:
    """The entries of a sequence or an array; None for anything else."""
    if isinstance(value, jax.Array) and not jnp.issubdtype(value.dtype, jax.dtypes.extended):
        value = np.asarray(value)
    if isinstance(value, np.ndarray):
        # tolist() would drop the mask of a masked array.
        return value.tolist() if value.ndim and not isinstance(value, np.ma.MaskedArray) else None
    return value if isinstance(value, Sequence) and not isinstance(value, str | bytes) else None


def _broadcast(name: str, value: Any, number: int, kind: Any, expected: str) -> list:
    """``value`` repeated for every prompt, or its entries if it is a sequence; all must be of ``kind``."""
    values = list(value) if isinstance(value, Sequence) else [value] * number
    for one in values:
        _check_kind(name, one, kind, f"{expected} or one per prompt")
    _check_number(name, values, number)
    return values


def _check_kind(name: str, value: Any, kind: Any, expected: str) -> None:
    if not isinstance(value, kind):
        raise TypeError(f"{name}: expected {expected}, got {type(value).__name__}")


def _check_number(name: str, values: Sequence, number: int) -> None:
    if len(values) != number:
        raise ValueError(f"{name}: expected one, or one for each of {number} prompts, got {len(values)}")
