"""The online softmax (Milakov and Gimelshein, arXiv:1805.02867): a sum over keys that can be computed in parts."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_attn.kernels.lse import Lse

_LOWEST = jnp.finfo(jnp.float32).min


def probabilities(logits: Array, lse: Lse) -> Array:
    """Of logits in the rows of ``lse``."""
    # Logits that are computed again may round to more than the largest one did.
    return jnp.exp(jnp.minimum(logits - lse.peak, 0.0) - lse.log_total)


class SoftmaxState(NamedTuple):
    """The partial online-softmax state of queries ``[...]``, float32; ``acc`` is half the weighted sum of values."""

    peak: Array  # [...]
    total: Array  # [...]
    acc: Array  # [..., Dv]

    @staticmethod
    def empty(shape: tuple[int, ...], value_dim: int) -> "SoftmaxState":
        """The state before the first key."""
        acc = jnp.zeros((*shape, value_dim), jnp.float32)
        return SoftmaxState(jnp.full(shape, _LOWEST, jnp.float32), jnp.zeros(shape, jnp.float32), acc)

    def at(self, index: Array | int) -> "SoftmaxState":
        """That of one entry of the first axis."""
        return jax.tree.map(lambda x: x[index], self)

    def where(self, kept: Array) -> "SoftmaxState":
        """Reset to the state before the first key, except where ``kept``, bool ``[...]``."""
        nothing = SoftmaxState.empty(self.peak.shape, self.acc.shape[-1])
        return SoftmaxState(
            jnp.where(kept, self.peak, nothing.peak),
            jnp.where(kept, self.total, nothing.total),
            jnp.where(kept[..., None], self.acc, nothing.acc),
        )

    def weigh(self, logits: Array) -> tuple[Array, Array, Array]:
        """``(peak, decay, weights)`` when keys of ``logits`` ``[..., keys]`` come in; what came before decays."""
        peak = jnp.maximum(self.peak, logits.max(-1))
        return peak, jnp.exp(self.peak - peak), jnp.exp(logits - peak[..., None])

    def attend(self, logits: Array, value: Array, precision: lax.Precision) -> "SoftmaxState":
        """What came before, and keys of logits ``[heads, group, T, keys]`` and halved values ``[heads, keys, Dv]``."""
        peak, decay, weights = self.weigh(logits)
        total = self.total * decay + weights.sum(-1)
        heads, *_, keys = weights.shape
        update = jnp.einsum("hrk,hkd->hrd", weights.reshape(heads, -1, keys), value, precision=precision)
        return SoftmaxState(peak, total, self.acc * decay[..., None] + update.reshape(self.acc.shape))

    def merge(self, other: "SoftmaxState") -> "SoftmaxState":
        """The state after the keys of both."""
        peak = jnp.maximum(self.peak, other.peak)
        mine, theirs = jnp.exp(self.peak - peak), jnp.exp(other.peak - peak)
        total = self.total * mine + other.total * theirs
        return SoftmaxState(peak, total, self.acc * mine[..., None] + other.acc * theirs[..., None])

    def finish(self, is_token: Array, sink: Array | None) -> tuple[Array, Lse]:
        """``(out, lse)``, normalised. A query that is padding, or that sees nothing, gets 0 and -inf.

        Args:
          is_token: bool; False: padding.
          sink: a logit that takes weight and gives no value, or None.
        """
        peak, total, acc = self
        if sink is not None:
            peak = jnp.maximum(self.peak, sink)
            decay = jnp.exp(self.peak - peak)
            total, acc = total * decay + jnp.exp(sink - peak), acc * decay[..., None]
        seen = (total != 0) & is_token  # !=, not >, so that NaN propagates
        total = jnp.where(seen, total, 1.0)
        out = jnp.where(seen[..., None], 2.0 * acc / total[..., None], 0.0)
        return out, Lse(jnp.where(seen, peak, -jnp.inf), jnp.log(total))
