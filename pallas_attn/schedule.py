"""Decode's work in shares: the live KV blocks of the whole batch, cut into pieces of at most ``chunk`` blocks.

A row (a batch row and a head of the lists) with ``n`` live blocks gets ``ceil(n / chunk)`` programs, each of which
visits a stretch of the row's list. With ``chunk = ceil(total / shares)`` one long row among short ones is spread over
the whole chip (compare FlashInfer, arXiv:2501.01005, section 3.3); with a fixed chunk, how a row is cut does not depend
on the other rows, so neither do its bits. How many programs there are is static: those to spare have nothing to visit.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
    """Which stretch of which row each of G programs visits. Rows are numbered ``b * M + m``.

    Attributes:
      row: int32 ``[G]``; 0 for a spare program.
      first, last: int32 ``[G]``: the slots ``first .. last - 1`` of the row's list; equal for a spare program.
      begin, count: int32 ``[R]``: the programs of a row are ``begin .. begin + count - 1``.
    """

    row: Array
    first: Array
    last: Array
    begin: Array
    count: Array

    @staticmethod
    def balanced(num_active: Array, width: int, shares: int) -> "Schedule":
        """Shares of equal size over all rows, but for the last one of each row. G is ``shares`` and one more per row.

        Args:
          num_active: int32 ``[R]``, live blocks of each row, at most ``width``.
          width: of the lists, static.
          shares: how many programs are to be busy, static.
        """
        chunk = jnp.maximum(-(-num_active.sum(dtype=jnp.int32) // shares), 1)
        rows = num_active.shape[0]
        return Schedule._cut(num_active, chunk, min(shares + rows, rows * width))

    @staticmethod
    def fixed(num_active: Array, width: int, chunk: int) -> "Schedule":
        """Shares of ``chunk`` blocks, whatever the other rows hold. G is what full rows would need."""
        return Schedule._cut(num_active, jnp.int32(chunk), num_active.shape[0] * -(-width // chunk))

    @staticmethod
    def _cut(num_active: Array, chunk: Array, programs: int) -> "Schedule":
        count = -(-num_active // chunk)
        end = jnp.cumsum(count, dtype=jnp.int32)
        begin = end - count
        program = jnp.arange(programs, dtype=jnp.int32)
        row = jnp.searchsorted(end, program, side="right").astype(jnp.int32)
        busy = row < num_active.shape[0]
        row = jnp.where(busy, row, 0)
        first = jnp.where(busy, (program - begin[row]) * chunk, 0)
        last = jnp.where(busy, jnp.minimum(first + chunk, num_active[row]), 0)
        return Schedule(row, first, last, begin, count)

    @property
    def total(self) -> Array:
        """int32: how many programs are not spare."""
        return self.count.sum(dtype=jnp.int32)
