"""The online softmax of a tile of queries.

Every exponent is a difference to the largest logit, taken first: it is at most 0, and exact among the logits that
matter, however large they are. What is folded into base 2 multiplies the difference.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from pallas_attn import scores as score_algebra
from pallas_attn.kernels.triton.key_blocks import KeyBlock, KeyBlocks
from pallas_attn.kernels.triton.specs import Tiling
from pallas_attn.kernels.triton.tiles import Columns

_LOWEST = float(jnp.finfo(jnp.float32).min)


class SoftmaxState(NamedTuple):
    """The partial online-softmax state of a tile of queries, float32."""

    peak: Array  # [rows]: the largest logit, in units of Tiling.unit
    total: Array  # [rows]: the sum of weights
    acc: tuple[Array, ...]  # [rows, Dv]: the weighted sum of values, or its halves, in tiles

    @staticmethod
    def empty(rows: int, columns: tuple[Columns, ...]) -> "SoftmaxState":
        """The state before the first key."""
        acc = tuple(jnp.zeros((rows, part.tile), jnp.float32) for part in columns)
        return SoftmaxState(jnp.full((rows,), _LOWEST, jnp.float32), jnp.zeros((rows,), jnp.float32), acc)

    def with_sink(self, tiling: Tiling, sink: Array) -> tuple["SoftmaxState", Array]:
        """``(softmax, above)``: with one more logit, in natural units, that takes weight and has no value.

        In units of the peak, a sink is rounded, so where it is the largest the peak is put a little lower. Weights are
        relative to ``unit * peak + above``.
        """
        sink = sink.astype(jnp.float32)
        in_units = sink / tiling.unit
        lower = jnp.clip(in_units - jnp.abs(in_units) * 2.0**-22, _LOWEST, -_LOWEST)
        peak = jnp.maximum(self.peak, lower)
        difference = tiling.minus(sink, tiling.rounded(peak * tiling.unit))
        above = jnp.maximum(difference, 0.0)
        decay = tiling.exp(tiling.minus(self.peak, peak), tiling.unit) * tiling.exp(-above)
        total = self.total * decay + tiling.exp(jnp.minimum(difference, 0.0))
        return SoftmaxState(peak, total, tuple(x * decay[:, None] for x in self.acc)), above

    def finish(self, valid: Array, above: Array | float = 0.0) -> tuple[tuple[Array, ...], Array, Array]:
        """``(out, peak, log_total)``: normalised sums, and the arrays of :class:`Lse`.

        A query that is not ``valid``, or that saw no key, gets 0, -inf and 0.
        """
        seen = (self.total != 0) & valid  # !=, not >, so that NaN propagates
        total = jnp.where(seen, self.total, 1.0)
        out = tuple(jnp.where(seen[:, None], x / total[:, None], 0.0) for x in self.acc)
        return out, jnp.where(seen, self.peak, -jnp.inf), jnp.where(seen, above + jnp.log(total), 0.0)


class OnlineSoftmaxStep:
    """One step of the online softmax: ``attend(state, block) -> state``.

    Args:
      q: the tile of queries, its columns cut like those of keys.
      head: the query head of the tile, or of each of its rows, ``[rows, 1]``.
      row: the row of the batch.
      keep: called with every block and its logits, which are -inf where a key is not seen.
    """

    def __init__(
        self,
        tiling: Tiling,
        blocks: KeyBlocks,
        q: tuple[Array, ...],
        head: Array,
        row: Array,
        keep: Callable | None = None,
    ):
        self._tiling, self._blocks, self._q, self._head, self._row, self._keep = tiling, blocks, q, head, row, keep

    def walk(self, row: tuple, columns: tuple[Columns, ...], slots: tuple[Array, Array] | None = None) -> SoftmaxState:
        """The state after the blocks in a row of the lists; see :func:`tiles.walk`."""
        empty = SoftmaxState.empty(self._blocks.q_positions.size, columns)
        return SoftmaxState(*self._blocks.walk(row, self, empty, slots))

    def __call__(self, state: tuple, block: KeyBlock) -> SoftmaxState:
        peak, total, acc = state
        tiling, blocks = self._tiling, self._blocks
        logits = tiling.logits(block.k.products(tiling, self._q))
        if blocks.stored.refs.scores:
            positions = blocks.q_positions[:, None], block.positions[None, :]
            operands = blocks.scores(block.keys, block.in_bounds)
            logits = score_algebra.apply(operands, logits, *positions, self._head, self._row)
        if block.allowed is not None:
            logits = jnp.where(block.allowed, logits, -jnp.inf)
        logits = tiling.rounded(logits)
        if self._keep is not None:
            self._keep(block, logits)
        new_peak = jnp.maximum(peak, jnp.max(logits, axis=1))
        decay = tiling.exp(tiling.minus(peak, new_peak), tiling.unit)
        weights = tiling.exp(tiling.minus(logits, new_peak[:, None]), tiling.unit)
        total = total * decay + jnp.sum(weights, axis=1)
        sums = block.v.sums(tiling, weights)
        acc = tuple(x * decay[:, None] + y for x, y in zip(acc, sums, strict=True))
        return SoftmaxState(new_peak, total, acc)
