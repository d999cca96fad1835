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

    m: Array  # [...]
    l: Array  # [...]
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
        nothing = SoftmaxState.empty(self.m.shape, self.acc.shape[-1])
        return SoftmaxState(
            jnp.where(kept, self.m, nothing.m),
            jnp.where(kept, self.l, nothing.l),
            jnp.where(kept[..., None], self.acc, nothing.acc),
        )

    def weigh(self, logits: Array) -> tuple[Array, Array, Array]:
        """``(m, decay, weights)`` when keys of ``logits`` ``[..., keys]`` come in; what came before decays."""
        m = jnp.maximum(self.m, logits.max(-1))
        return m, jnp.exp(self.m - m), jnp.exp(logits - m[..., None])

    def attend(self, logits: Array, value: Array, precision: lax.Precision) -> "SoftmaxState":
        """What came before, and keys of logits ``[heads, group, T, keys]`` and halved values ``[heads, keys, Dv]``."""
        m, decay, weights = self.weigh(logits)
        l = self.l * decay + weights.sum(-1)
        heads, *_, keys = weights.shape
        update = jnp.einsum("hrk,hkd->hrd", weights.reshape(heads, -1, keys), value, precision=precision)
        return SoftmaxState(m, l, self.acc * decay[..., None] + update.reshape(self.acc.shape))

    def merge(self, other: "SoftmaxState") -> "SoftmaxState":
        """The state after the keys of both."""
        m = jnp.maximum(self.m, other.m)
        mine, theirs = jnp.exp(self.m - m), jnp.exp(other.m - m)
        l = self.l * mine + other.l * theirs
        return SoftmaxState(m, l, self.acc * mine[..., None] + other.acc * theirs[..., None])

    def finish(self, is_token: Array, sink: Array | None) -> tuple[Array, Lse]:
        """``(out, lse)``, normalized. A query that is padding, or that sees nothing, gets 0 and -inf.

        Args:
          is_token: bool; False: padding.
          sink: a logit that takes weight and gives no value, or None.
        """
        m, l, acc = self
        if sink is not None:
            m = jnp.maximum(self.m, sink)
            decay = jnp.exp(self.m - m)
            l, acc = l * decay + jnp.exp(sink - m), acc * decay[..., None]
        seen = (l != 0) & is_token  # !=, not >, so that NaN propagates
        l = jnp.where(seen, l, 1.0)
        out = jnp.where(seen[..., None], 2.0 * acc / l[..., None], 0.0)
        return out, Lse(jnp.where(seen, m, -jnp.inf), jnp.log(l))
