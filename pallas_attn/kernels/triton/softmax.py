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
from pallas_attn.kernels.triton.specs import Cut
from pallas_attn.kernels.triton.tiles import Columns

_LOWEST = float(jnp.finfo(jnp.float32).min)


class Softmax(NamedTuple):
    """What some keys give to queries: largest logit, sum of weights, weighted sum of values; float32."""

    peak: Array  # [rows], in units of Cut.unit
    total: Array  # [rows]
    acc: tuple[Array, ...]  # [rows, Dv], or its halves, in tiles

    @staticmethod
    def empty(rows: int, columns: tuple[Columns, ...]) -> "Softmax":
        """What no key gives."""
        acc = tuple(jnp.zeros((rows, part.tile), jnp.float32) for part in columns)
        return Softmax(jnp.full((rows,), _LOWEST, jnp.float32), jnp.zeros((rows,), jnp.float32), acc)

    def with_sink(self, cut: Cut, sink: Array) -> tuple["Softmax", Array]:
        """``(softmax, above)``: the same with a logit more, in natural units, that takes weight and gives no value.

        In units of the peak, a sink is rounded, so where it is the largest the peak is put a little lower. Weights are
        relative to ``unit * peak + above``.
        """
        sink = sink.astype(jnp.float32)
        in_units = sink / cut.unit
        lower = jnp.clip(in_units - jnp.abs(in_units) * 2.0**-22, _LOWEST, -_LOWEST)
        peak = jnp.maximum(self.peak, lower)
        difference = cut.minus(sink, cut.rounded(peak * cut.unit))
        above = jnp.maximum(difference, 0.0)
        decay = cut.exp(cut.minus(self.peak, peak), cut.unit) * cut.exp(-above)
        total = self.total * decay + cut.exp(jnp.minimum(difference, 0.0))
        return Softmax(peak, total, tuple(x * decay[:, None] for x in self.acc)), above

    def finish(self, real: Array, above: Array | float = 0.0) -> tuple[tuple[Array, ...], Array, Array]:
        """``(out, peak, log_total)``: normalised sums, and the arrays of :class:`Lse`.

        A query that is not ``real``, or that saw nothing, gets 0, -inf and 0.
        """
        seen = (self.total != 0) & real  # not > 0: what is not a number shows
        total = jnp.where(seen, self.total, 1.0)
        out = tuple(jnp.where(seen[:, None], x / total[:, None], 0.0) for x in self.acc)
        return out, jnp.where(seen, self.peak, -jnp.inf), jnp.where(seen, above + jnp.log(total), 0.0)


class Attend:
    """One step of the online softmax: ``attend(state, block) -> state``.

    Args:
      q: the tile of queries, its columns cut like those of keys.
      head: the query head of the tile, or of each of its rows, ``[rows, 1]``.
      row: the row of the batch.
      keep: ``keep(block, logits)`` is given the logits of every block, -inf where a key is not seen.
    """

    def __init__(
        self,
        cut: Cut,
        blocks: KeyBlocks,
        q: tuple[Array, ...],
        head: Array,
        row: Array,
        keep: Callable | None = None,
    ):
        self._cut, self._blocks, self._q, self._head, self._row, self._keep = cut, blocks, q, head, row, keep

    def walk(self, row: tuple, columns: tuple[Columns, ...], slots: tuple[Array, Array] | None = None) -> Softmax:
        """What the blocks in a row of the lists give; see :func:`tiles.walk`."""
        empty = Softmax.empty(self._blocks.q_positions.size, columns)
        return Softmax(*self._blocks.walk(row, self, empty, slots))

    def __call__(self, state: tuple, block: KeyBlock) -> Softmax:
        peak, total, acc = state
        cut, blocks = self._cut, self._blocks
        logits = cut.logits(block.k.products(cut, self._q))
        if blocks.stored.refs.scores:
            positions = blocks.q_positions[:, None], block.positions[None, :]
            operands = blocks.scores(block.keys, block.exist)
            logits = score_algebra.apply(operands, logits, *positions, self._head, self._row)
        if block.allowed is not None:
            logits = jnp.where(block.allowed, logits, -jnp.inf)
        logits = cut.rounded(logits)
        if self._keep is not None:
            self._keep(block, logits)
        new_peak = jnp.maximum(peak, jnp.max(logits, axis=1))
        decay = cut.exp(cut.minus(peak, new_peak), cut.unit)
        weights = cut.exp(cut.minus(logits, new_peak[:, None]), cut.unit)
        total = total * decay + jnp.sum(weights, axis=1)
        sums = block.v.sums(cut, weights)
        acc = tuple(x * decay[:, None] + y for x, y in zip(acc, sums, strict=True))
        return Softmax(new_peak, total, acc)
