"""Pages of one pool for all rows (PagedAttention, Kwon et al. 2023, arXiv:2309.06180, section 4).

A page is in use while an entry of a row's table points to it. Rows can share a page; a write copies it first. A
reference count per page shows which pages are free, so that none is lost or allocated twice.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_attn import bits
from pallas_attn.caches.row_index import copy as copy_rows
from pallas_attn.caches.row_index import numbers as row_numbers
from pallas_attn.quantized import KVArray

# The most copies per row that are made by one gather and one scatter: one for each of 8 heads with tokens of their own.
AT_ONCE = 8


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

    def reserve(
        self, logical: Array, rows: Array | None = None, copies: int | None = None
    ) -> tuple["Pages", Array, "PageCopies"]:
        """Gives every row exclusive pages for the table entries that it will write.

        Args:
          logical: int32 ``[R, n]``, entries of the row's table, in any order, repeats allowed; L: none.
          rows: int32 ``[R]``, the rows of the cache; None: all.
          copies: how many shared pages a row can write to, if fewer than n; static.

        Returns:
          The pages; bool ``[B]``: refused rows, which get no page because too few are free; and the copies of shared
          pages to make before the rows write.
        """
        batch_size, per_row = self.table.shape
        copies = logical.shape[1] if copies is None else copies
        copies = copies if copies <= min(AT_ONCE, per_row) else per_row
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

            # In row order; a refused row leaves the free pages to the next. Unrolled, as a GPU's host runs loops.
            _, refused = lax.scan(serve, free.sum(dtype=jnp.int32), wanted, unroll=min(batch_size, 64))
            needs = needs & ~refused[:, None]
            # The entry gets free page number `number`.
            number = (jnp.cumsum(needs.reshape(-1), dtype=jnp.int32) - 1).reshape(needs.shape)
            table = jnp.where(needs, _places(free)[number], self.table)
            made = PageCopies.of(needs & (self.table >= 0), self.table, table, copies)
            return self.of_table(table), refused, jnp.stack(made)

        def keep() -> tuple["Pages", Array, Array]:
            return self, jnp.zeros(batch_size, jnp.bool_), jnp.full((2, batch_size, copies), -1, jnp.int32)

        # Most steps need no new page.
        pages, refused, made = lax.cond(ready.all(), keep, take)
        return pages, refused, PageCopies(*made)

    def release(self, held: Array) -> "Pages":
        """Frees the pages without a filled slot; ``held`` is bool ``[B, capacity]``."""
        per_row = self.table.shape[1]
        in_use = held.reshape(held.shape[0], per_row, -1).any(-1)
        return self.of_table(jnp.where(in_use, self.table, -1))


class PageCopies(NamedTuple):
    """Copies of pages, at most n for each row.

    Attributes:
      sources, targets: int32 ``[B, n]``, pages of the pool; -1: no copy.
    """

    sources: Array
    targets: Array

    @staticmethod
    def of(copied: Array, before: Array, after: Array, most: int) -> "PageCopies":
        """``most`` copies per row, from ``before`` to ``after``, int32 ``[B, L]``, at the entries ``copied``."""
        if most == copied.shape[1]:
            return PageCopies(*(jnp.where(copied, table, -1) for table in (before, after)))
        entry, pairs = lax.broadcasted_iota(jnp.int32, copied.shape, 1), []
        for _ in range(most):
            first = lax.argmax(copied, 1, jnp.int32)[:, None]
            found = jnp.take_along_axis(copied, first, axis=1)
            pairs.append([jnp.where(found, jnp.take_along_axis(table, first, axis=1), -1) for table in (before, after)])
            copied = copied & (entry != first)
        return PageCopies(*(jnp.concatenate(pages, axis=1) for pages in zip(*pairs, strict=True)))

    def make(self, pools: tuple[KVArray, KVArray]) -> tuple[KVArray, KVArray]:
        """Makes the copies in both pools, all sources read first; touches no other page.

        Few copies are one gather and one scatter, whether there are any or not: on a GPU the host would run a loop.
        Many would take much memory at once, so they are made one after another.
        """
        sources, targets = self.sources.reshape(-1), self.targets.reshape(-1)
        if self.sources.shape[1] > AT_ONCE:
            order = _places(sources >= 0)
            return copy_rows(pools, sources[order], targets[order], (sources >= 0).sum(dtype=jnp.int32))

        def copy(pool: Array, sources: Array, targets: Array) -> Array:
            return pool.at[targets].set(pool.at[sources].get(mode="clip"), mode="drop", unique_indices=True)

        def copied(pool: Array | bits.BitcastArray) -> Array | bits.BitcastArray:
            beyond = jnp.where(targets < 0, pool.shape[0], targets)
            return bits.move(copy, (pool,), jnp.maximum(sources, 0), beyond)

        return jax.tree.map(copied, pools, is_leaf=bits.is_packed)


def _places(mask: Array) -> Array:
    """int32 ``[n]``: the indices at which bool ``mask`` ``[n]`` is True, in order, then zeros."""
    number = jnp.where(mask, jnp.cumsum(mask, dtype=jnp.int32) - 1, mask.shape[0])
    return jnp.zeros(mask.shape, jnp.int32).at[number].set(lax.iota(jnp.int32, mask.shape[0]), mode="drop")
