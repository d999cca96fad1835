"""The online softmax of a tile of queries.

Every exponent is a difference to the largest logit, taken first: it is at most 0, and exact among the logits that
matter, however large they are. What is folded into base 2 multiplies the difference.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from pallas_attn.kernels.triton.specs import Tiling
from pallas_attn.kernels.triton.stored import Tile
from pallas_attn.kernels.triton.tiles import Columns

_LOWEST = float(jnp.finfo(jnp.float32).min)


class SoftmaxState(NamedTuple):
    """The partial online-softmax state of a tile of queries, float32."""

    m: Array  # [rows]: the largest logit, in units of Tiling.unit
    l: Array  # [rows]: the sum of weights
    acc: tuple[Array, ...]  # [rows, Dv]: the weighted sum of values, or its halves, in tiles

    @staticmethod
    def empty(rows: int, columns: tuple[Columns, ...]) -> "SoftmaxState":
        """The state before the first key."""
        acc = tuple(jnp.zeros((rows, part.tile), jnp.float32) for part in columns)
        return SoftmaxState(jnp.full((rows,), _LOWEST, jnp.float32), jnp.zeros((rows,), jnp.float32), acc)

    def update(self, tiling: Tiling, logits: Array, values: Tile) -> "SoftmaxState":
        """The state after one more block (FlashAttention-2, algorithm 1, lines 8 to 10)."""
        m = jnp.maximum(self.m, jnp.max(logits, axis=1))
        decay = tiling.exp(tiling.minus(self.m, m), tiling.unit)
        weights = tiling.exp(tiling.minus(logits, m[:, None]), tiling.unit)
        l = self.l * decay + jnp.sum(weights, axis=1)
        sums = values.sums(tiling, weights)
        acc = tuple(x * decay[:, None] + y for x, y in zip(self.acc, sums, strict=True))
        return SoftmaxState(m, l, acc)

    def with_sink(self, tiling: Tiling, sink: Array) -> tuple["SoftmaxState", Array]:
        """``(state, above)``: with one more logit, in natural units, that takes weight and has no value.

        In units of m, a sink is rounded, so where it is the largest m is put a little lower. Weights are relative to
        ``unit * m + above``.
        """
        sink = sink.astype(jnp.float32)
        in_units = sink / tiling.unit
        lower = jnp.clip(in_units - jnp.abs(in_units) * 2.0**-22, _LOWEST, -_LOWEST)
        m = jnp.maximum(self.m, lower)
        difference = tiling.minus(sink, tiling.rounded(m * tiling.unit))
        above = jnp.maximum(difference, 0.0)
        decay = tiling.exp(tiling.minus(self.m, m), tiling.unit) * tiling.exp(-above)
        l = self.l * decay + tiling.exp(jnp.minimum(difference, 0.0))
        return SoftmaxState(m, l, tuple(x * decay[:, None] for x in self.acc)), above

    def finish(self, valid: Array, above: Array | float = 0.0) -> tuple[tuple[Array, ...], Array, Array]:
        """``(out, peak, log_total)``: normalized sums, and the arrays of :class:`Lse`.

        A query that is not ``valid``, or that saw no key, gets 0, -inf and 0.
        """
        seen = (self.l != 0) & valid  # !=, not >, so that NaN propagates
        l = jnp.where(seen, self.l, 1.0)
        out = tuple(jnp.where(seen[:, None], x / l[:, None], 0.0) for x in self.acc)
        return out, jnp.where(seen, self.m, -jnp.inf), jnp.where(seen, above + jnp.log(l), 0.0)
