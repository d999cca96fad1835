"""Splits decode among programs: the live KV blocks of the whole batch, in pieces of at most ``chunk`` blocks.

A row (a batch row and a head of the lists) with ``n`` live blocks gets ``ceil(n / chunk)`` programs, each of which
visits a contiguous piece of the row's list. With ``chunk = ceil(total / shares)`` a long row among short ones is spread
over the whole GPU (compare FlashInfer, arXiv:2501.01005, section 3.3). With a fixed chunk the split of a row, and thus
every bit of its result, is independent of the other rows. The number of programs is static; spare ones visit nothing.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
    """The row, and the piece of its list, that each of G programs visits. Rows are numbered ``b * M + m``.

    Attributes:
      row: int32 ``[G]``; 0 for a spare program.
      first, last: int32 ``[G]``: entries ``first .. last - 1`` of the row's list; equal for a spare program.
      begin, count: int32 ``[R]``: programs ``begin .. begin + count - 1`` visit the row.
    """

    row: Array
    first: Array
    last: Array
    begin: Array
    count: Array

    @staticmethod
    def balanced(num_active: Array, width: int, shares: int) -> "Schedule":
        """Splits all rows into pieces of one size, except for the last of each row. G is at most ``shares + R``.

        Args:
          num_active: int32 ``[R]``, live blocks of each row, at most ``width``.
          width: length of the lists, static.
          shares: target number of busy programs, static.
        """
        chunk = jnp.maximum(-(-num_active.sum(dtype=jnp.int32) // shares), 1)
        rows = num_active.shape[0]
        return Schedule._split(num_active, chunk, min(shares + rows, rows * width))

    @staticmethod
    def fixed(num_active: Array, width: int, chunk: int) -> "Schedule":
        """Splits every row into pieces of ``chunk`` blocks, independent of the other rows. G suffices for full rows."""
        return Schedule._split(num_active, jnp.int32(chunk), num_active.shape[0] * -(-width // chunk))

    @staticmethod
    def _split(num_active: Array, chunk: Array, programs: int) -> "Schedule":
        count = -(-num_active // chunk)
        end = jnp.cumsum(count, dtype=jnp.int32)
        begin = end - count
        program = jnp.arange(programs, dtype=jnp.int32)
        # By comparisons, R per program: the other methods are loops, which the host runs on a GPU.
        row = jnp.searchsorted(end, program, side="right", method="compare_all").astype(jnp.int32)
        busy = row < num_active.shape[0]
        row = jnp.where(busy, row, 0)
        first = jnp.where(busy, (program - begin[row]) * chunk, 0)
        last = jnp.where(busy, jnp.minimum(first + chunk, num_active[row]), 0)
        return Schedule(row, first, last, begin, count)

    @property
    def total(self) -> Array:
        """Number of programs that are not spare, int32."""
        return self.count.sum(dtype=jnp.int32)
