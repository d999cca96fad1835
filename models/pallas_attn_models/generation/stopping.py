"""Stop sequences: matching on the device, withholding possible prefixes on the host."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array

from pallas_attn_models.checks import shown
from pallas_attn_models.generation.sampling import SamplingArrays


def match_stop_sequences(tail: Array, settings: SamplingArrays, count: Array) -> Array:
    """The length of the longest stop sequence at the end of each row, int32 ``[B]``; 0: no match.

    A match consists of new tokens only and follows at least ``min_new_tokens`` others.

    Args:
      tail: int32 ``[B, limits.stop_length]``, the last tokens of each row, newest last; entries older than the new
        tokens are ignored.
      settings: of the rows.
      count: int32 ``[B]``, number of new tokens, including the newest.
    """
    lengths = jnp.asarray(settings.stop_lengths)
    length = tail.shape[1]
    outside = jnp.arange(length, dtype=jnp.int32)[None, None] < length - lengths[:, :, None]
    same = (outside | (tail[:, None] == settings.stop_tokens)).all(axis=-1)
    fits = lengths <= (count - settings.min_new_tokens)[:, None]
    return jnp.where(same & fits, lengths, 0).max(axis=-1, initial=0)


def num_withheld(tokens: Sequence[Any], sequences: Sequence[Sequence[Any]]) -> int:
    """The length of the longest suffix of ``tokens`` that is a proper prefix of one of the ``sequences``.

    Args:
      tokens: a tuple or a string.
      sequences: of the same type, none empty.
    """
    longest = max(map(len, sequences), default=1) - 1
    for length in range(min(longest, len(tokens)), 0, -1):
        end = tokens[len(tokens) - length :]
        if any(len(sequence) > length and sequence[:length] == end for sequence in sequences):
            return length
    return 0


class StopStrings:
    """Passes text through, piece by piece, up to the first stop string, wherever the pieces are cut.

    Attributes:
      stopped: whether a stop string was found. It and all text after it are dropped.

    Raises:
      ValueError: an empty stop string, or an entry that is not a string.
    """

    def __init__(self, strings: Sequence[str]):
        is_sequence = isinstance(strings, Sequence) and not isinstance(strings, str)
        if not is_sequence or not all(isinstance(one, str) and one for one in strings):
            raise ValueError(f"strings: expected a sequence of non-empty strings, got {shown(strings)}")
        self.stopped = False
        self._strings = tuple(strings)
        self._held = ""

    def feed(self, piece: str) -> str:
        """The text that has become final with this piece."""
        if self.stopped:
            return ""
        text = self._held + piece
        # The match that ends first wins; among equal ends, the longest.
        found = [(start + len(one), start) for one in self._strings if (start := text.find(one)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        certain = len(text) - num_withheld(text, self._strings)
        self._held = text[certain:]
        return text[:certain]

    def finish(self) -> str:
        """The withheld text, once the input has ended."""
        text, self._held = self._held, ""
        return text
