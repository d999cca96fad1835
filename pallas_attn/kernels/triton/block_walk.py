"""The walk along a row of block lists."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from pallas_attn.block_mask import BlockLists


class BlockWalk(NamedTuple):
    """A row of block lists for two loops: over slots ``[first, num_full)`` of full blocks and ``[num_full, last)``.

    The index of the *next* block is read while its own block is computed, so that no load waits for its address.

    Attributes:
      row: the index of the row in ``lists.num_full``.
      locate: maps the index of a block to the argument of the loads; it runs one block ahead, too.
    """

    lists: BlockLists
    row: tuple
    locate: Callable[[Array], Any]
    first: Any
    num_full: Any
    last: Any

    @classmethod
    def of(
        cls,
        lists: BlockLists,
        row: tuple,
        locate: Callable[[Array], Any] = lambda block: block,
        slots: tuple[Array, Array] | None = None,
    ) -> "BlockWalk":
        """Of all blocks of a row, or of those in the slots ``(first, last)`` alone."""
        num_full = lists.num_full[row]
        if slots is None:
            return cls(lists, row, locate, 0, num_full, lists.num_active[row])
        first, last = slots
        return cls(lists, row, locate, first, jnp.clip(num_full, first, last), last)

    def start(self, state: tuple) -> tuple:
        """What the first loop begins with."""
        return self.locate(self.lists.indices[(*self.row, self.first)]), *state

    def visit(self, load: Callable, step: Callable) -> Callable:
        """The body of a loop: ``state = step(state, load(at))``."""
        width = self.lists.indices.shape[-1]

        def body(slot: Array, carry: tuple) -> tuple:
            at, *state = carry
            following = self.locate(self.lists.indices[(*self.row, jnp.minimum(slot + 1, width - 1))])
            return following, *step(state, load(at))

        return body
