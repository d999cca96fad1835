"""Stop sequences: on the device, whether a row's new tokens end with one; on the host, what may yet become one."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array

from pallas_attn_models.checks import shown
from pallas_attn_models.generation.sampling import SamplingArrays


def matched(tail: Array, settings: SamplingArrays, count: Array) -> Array:
    """The length of the longest stop sequence with which the new tokens of a row end, int32 ``[B]``; 0: none does.

    A sequence counts if it is made of new tokens only and at least ``min_new_tokens`` others come before it.

    Args:
      tail: int32 ``[B, limits.stop_length]``, the last tokens of each row, newest last; what is older than the new
        tokens can be anything.
      settings: of the rows.
      count: int32 ``[B]``, how many new tokens the row has, the newest included.
    """
    lengths = jnp.asarray(settings.stop_lengths)
    length = tail.shape[1]
    outside = jnp.arange(length, dtype=jnp.int32)[None, None] < length - lengths[:, :, None]
    same = (outside | (tail[:, None] == settings.stop_tokens)).all(axis=-1)
    fits = lengths <= (count - settings.min_new_tokens)[:, None]
    return jnp.where(same & fits, lengths, 0).max(axis=-1, initial=0)


def held_back(tokens: Sequence[Any], sequences: Sequence[Sequence[Any]]) -> int:
    """How many of the newest ``tokens`` may become the beginning of one of the ``sequences``.

    The longest end of ``tokens`` that is a beginning of a sequence, but not all of it.

    Args:
      tokens: a tuple, or a string.
      sequences: of the same type, none empty.
    """
    longest = max(map(len, sequences), default=1) - 1
    for length in range(min(longest, len(tokens)), 0, -1):
        end = tokens[len(tokens) - length :]
        if any(len(sequence) > length and sequence[:length] == end for sequence in sequences):
            return length
    return 0


class StopStrings:
    """Text that comes in pieces, up to the first stop string; what comes out does not depend on where the cuts are.

    Attributes:
      stopped: whether a stop string has come. It and all after it is cut.

    Raises:
      ValueError: an empty stop string, or something that is no string.
    """

    def __init__(self, strings: Sequence[str]):
        is_sequence = isinstance(strings, Sequence) and not isinstance(strings, str)
        if not is_sequence or not all(isinstance(one, str) and one for one in strings):
            raise ValueError(f"strings: expected a sequence of strings that are not empty, got {shown(strings)}")
        self.stopped = False
        self._strings = tuple(strings)
        self._held = ""

    def feed(self, piece: str) -> str:
        """The text that is certain by now and was not before."""
        if self.stopped:
            return ""
        text = self._held + piece
        # The first to be complete is the first to stop; of several at once, the longest.
        found = [(start + len(one), start) for one in self._strings if (start := text.find(one)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        certain = len(text) - held_back(text, self._strings)
        self._held = text[certain:]
        return text[:certain]

    def finish(self) -> str:
        """The text that was held back, when no more comes."""
        text, self._held = self._held, ""
        return text
