"""The new tokens of a decode call."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_attn_models.generation.sampling import SampledTokens


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class TokenLog:
    """New tokens and what is known of them, in one array, so that a step writes all of it at once.

    Attributes:
      first: int32 ``[B]``, new tokens of each row before the call.
      entries: int32 ``[B, W, 2 + 2 n]``, entries of :func:`entry`; the first is that of new token number ``first``.
    """

    first: Array
    entries: Array

    @staticmethod
    def empty(first: Array, width: int, top: int) -> "TokenLog":
        """A log with room for ``width`` tokens per row, each with the ``top`` most likely ones."""
        return TokenLog(first, jnp.zeros((first.shape[0], width, 2 + 2 * top), jnp.int32))

    def plus(self, entries: Array, written: Array, number: Array) -> "TokenLog":
        """Appends entries ``[B, 2 + 2 n]``, as new token ``number`` (int32 ``[B]``), to the rows in ``written``."""
        batch_size, width, _ = self.entries.shape
        column = jnp.where(written, number - self.first, width)
        row = jnp.arange(batch_size, dtype=jnp.int32)
        return dataclasses.replace(self, entries=self.entries.at[row, column].set(entries, mode="drop"))

    def fields(self) -> dict[str, Array]:
        """The log as arrays ``[B, W]`` and ``[B, W, n]``: tokens, logprobs, top_tokens and top_logprobs."""
        top = 2 + (self.entries.shape[2] - 2) // 2
        return {
            "tokens": self.entries[:, :, 0],
            "logprobs": _floats(self.entries[:, :, 1]),
            "top_tokens": self.entries[:, :, 2:top],
            "top_logprobs": _floats(self.entries[:, :, top:]),
        }


def entry(sampled: SampledTokens) -> Array:
    """int32 ``[B, 2 + 2 n]``: token, log-probability, most likely tokens, their log-probabilities; floats as bits.

    The token is -1 where there is no valid one.
    """
    token = jnp.where(sampled.valid, sampled.tokens, -1)
    columns = token[:, None], _bits(sampled.logprobs[:, None]), sampled.top_tokens, _bits(sampled.top_logprobs)
    return jnp.concatenate(columns, axis=1)


def _bits(x: Array) -> Array:
    return lax.bitcast_convert_type(x, jnp.int32)


def _floats(x: Array) -> Array:
    return lax.bitcast_convert_type(x, jnp.float32)
