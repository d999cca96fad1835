"""The online softmax of a tile of queries.

It is in base 2: ``log2(e)`` is folded into the scale, and ``exp2`` is one instruction.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from pallas_attn import scores as score_algebra
from pallas_attn.kernels.triton.key_blocks import KeyBlock, KeyBlocks
from pallas_attn.kernels.triton.specs import Cut
from pallas_attn.kernels.triton.tiles import LOG2_E, Columns

_LOWEST = float(jnp.finfo(jnp.float32).min)


class Softmax(NamedTuple):
    """What some keys give to queries: largest logit in base 2, sum of weights, weighted sum of values; float32."""

    peak: Array  # [rows]
    total: Array  # [rows]
    acc: tuple[Array, ...]  # [rows, Dv], or its halves, in tiles

    @staticmethod
    def empty(rows: int, columns: tuple[Columns, ...]) -> "Softmax":
        """What no key gives."""
        acc = tuple(jnp.zeros((rows, part.tile), jnp.float32) for part in columns)
        return Softmax(jnp.full((rows,), _LOWEST, jnp.float32), jnp.zeros((rows,), jnp.float32), acc)

    def with_sink(self, cut: Cut, sink: Array) -> "Softmax":
        """The same with a logit more, in natural units, that takes weight and gives no value."""
        sink = sink.astype(jnp.float32) * LOG2_E
        peak = jnp.maximum(self.peak, sink)
        decay = cut.exp2(self.peak - peak)
        acc = tuple(x * decay[:, None] for x in self.acc)
        return Softmax(peak, self.total * decay + cut.exp2(sink - peak), acc)

    def finish(self, real: Array | None) -> tuple[tuple[Array, ...], Array]:
        """Normalised sums, and lse in base 2. A query that is not ``real``, or that saw nothing, gets 0 and -inf."""
        seen = self.total != 0  # not > 0: what is not a number shows
        seen = seen if real is None else seen & real
        total = jnp.where(seen, self.total, 1.0)
        out = tuple(jnp.where(seen[:, None], x / total[:, None], 0.0) for x in self.acc)
        return out, jnp.where(seen, self.peak + jnp.log2(total), -jnp.inf)


class Attend:
    """One step of the online softmax: ``attend(state, block) -> state``.

    Args:
      q: the tile of queries, its columns cut like those of keys.
      head: the query head of the tile, or of each of its rows, ``[rows, 1]``.
      row: the row of the batch.
      keep: ``keep(block, logits)`` is given the logits of every block in base 2, -inf where a key is not seen.
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
        self._cut, self._blocks, self._head, self._row, self._keep = cut, blocks, head, row, keep
        self._to_base_2 = LOG2_E
        if not blocks.stored.refs.scores:
            # Only |scale| is folded into exp2, so that the largest logit times it is the largest scaled logit.
            self._to_base_2 *= abs(cut.scale) or 1.0
            if cut.scale <= 0:
                q = tuple(x * jnp.sign(jnp.asarray(cut.scale, x.dtype)) for x in q)
        self._q = q

    def __call__(self, state: tuple, block: KeyBlock) -> Softmax:
        peak, total, acc = state
        cut, blocks = self._cut, self._blocks
        logits = block.k.products(cut, self._q)
        if blocks.stored.refs.scores:
            positions = blocks.q_positions[:, None], block.positions[None, :]
            logits = score_algebra.apply(
                blocks.scores(block.keys, block.exist), logits * cut.scale, *positions, self._head, self._row
            )
        if block.allowed is not None:
            logits = jnp.where(block.allowed, logits, -jnp.inf)
        if self._keep is not None:
            self._keep(block, logits * self._to_base_2)
        new_peak = jnp.maximum(peak, jnp.max(logits, axis=1) * self._to_base_2)
        decay = cut.exp2(peak - new_peak)
        weights = cut.exp2(logits * self._to_base_2 - new_peak[:, None])
        total = total * decay + jnp.sum(weights, axis=1)
        sums = block.v.sums(cut, weights)
        acc = tuple(x * decay[:, None] + y for x, y in zip(acc, sums, strict=True))
        return Softmax(new_peak, total, acc)
