"""Pages of one pool for all rows (PagedAttention, Kwon et al. 2023, arXiv:2309.06180, section 4).

A page is in use while an entry of a row's table points to it. Rows can share a page; a write copies it first. A
reference count per page shows which pages are free, so that none is lost or allocated twice.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_attn.caches.row_index import copy as copy_rows
from pallas_attn.caches.row_index import numbers as row_numbers
from pallas_attn.quantized import KVArray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Pages:
    """The page table and the reference counts.

    Attributes:
      table: int32 ``[B, L]``: the page of every ``page_size`` slots of a row; -1: none yet.
      users: int32 ``[P]``: number of table entries that point to the page; 0: it is free.
    """

    table: Array
    users: Array

    @staticmethod
    def empty(batch_size: int, per_row: int, num_pages: int) -> "Pages":
        """A table without pages: all are free."""
        return Pages(jnp.full((batch_size, per_row), -1, jnp.int32), jnp.zeros(num_pages, jnp.int32))

    def of_table(self, table: Array) -> "Pages":
        """The same pool with another table; pages without an entry in it are free."""
        nowhere = self.users.shape[0]
        users = jnp.zeros_like(self.users).at[jnp.where(table >= 0, table, nowhere)].add(1, mode="drop")
        return Pages(table, users)

    def reserve(self, logical: Array, rows: Array | None = None) -> tuple["Pages", Array, Array]:
        """Gives every row exclusive pages for the table entries that it will write.

        Args:
          logical: int32 ``[R, n]``, entries of the row's table, in any order, repeats allowed; L: none.
          rows: int32 ``[R]``, the rows of the cache; None: all.

        Returns:
          The pages; bool ``[B]``: refused rows, which get no page because too few are free; and int32 ``[B, L]``: the
          page to copy into each new entry's page first, -1: none.
        """
        batch_size, per_row = self.table.shape
        row = row_numbers(rows, logical.shape)
        page = self.table.at[row, logical].get(mode="fill", fill_value=0)
        beyond = logical >= per_row
        ready = beyond | ((page >= 0) & (self.users[page] == 1))

        def take() -> tuple["Pages", Array, Array]:
            needs = jnp.zeros(self.table.shape, jnp.bool_)
            needs = needs.at[row, jnp.where(ready, per_row, logical)].set(True, mode="drop")
            wanted = needs.sum(1, dtype=jnp.int32)
            free = self.users == 0

            def serve(left: Array, wanted: Array) -> tuple[Array, Array]:
                refused = wanted > left
                return left - jnp.where(refused, 0, wanted), refused

            # In row order; a refused row leaves the free pages to the next.
            _, refused = lax.scan(serve, free.sum(dtype=jnp.int32), wanted)
            needs = needs & ~refused[:, None]
            # The entry gets free page number `number`.
            number = (jnp.cumsum(needs.reshape(-1), dtype=jnp.int32) - 1).reshape(needs.shape)
            table = jnp.where(needs, _places(free)[number], self.table)
            return self.of_table(table), refused, jnp.where(needs, self.table, -1)

        def keep() -> tuple["Pages", Array, Array]:
            return self, jnp.zeros(batch_size, jnp.bool_), jnp.full(self.table.shape, -1, jnp.int32)

        # Most steps need no new page.
        return lax.cond(ready.all(), keep, take)

    def copy(self, sources: Array, pools: tuple[KVArray, KVArray]) -> tuple[KVArray, KVArray]:
        """Makes the copies that :meth:`reserve` returned, in both pools; touches no other page."""
        targets, sources = self.table.reshape(-1), sources.reshape(-1)
        wanted = sources >= 0

        def find() -> tuple[Array, Array]:
            entries = _places(wanted)
            return sources[entries], targets[entries]

        # Most steps copy no page.
        read, written = lax.cond(wanted.any(), find, lambda: (sources, targets))
        return copy_rows(pools, read, written, wanted.sum(dtype=jnp.int32))

    def release(self, held: Array) -> "Pages":
        """Frees the pages without a filled slot; ``held`` is bool ``[B, capacity]``."""
        per_row = self.table.shape[1]
        in_use = held.reshape(held.shape[0], per_row, -1).any(-1)
        return self.of_table(jnp.where(in_use, self.table, -1))


def _places(mask: Array) -> Array:
    """int32 ``[n]``: the indices at which bool ``mask`` ``[n]`` is True, in order, then zeros."""
    number = jnp.where(mask, jnp.cumsum(mask, dtype=jnp.int32) - 1, mask.shape[0])
    return jnp.zeros(mask.shape, jnp.int32).at[number].set(lax.iota(jnp.int32, mask.shape[0]), mode="drop")
