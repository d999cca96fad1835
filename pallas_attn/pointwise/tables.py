"""Arrays that functions of pairs look numbers up in, apart from operands, which are aligned with the pairs.

In the pytree of a mask or a score, tables stand together in a node of their own, and everything else is an operand.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

Tree = TypeVar("Tree")
# The index of an entry: per axis a number that is known, or a tile of numbers. All are in bounds.
Index = tuple[int | Array, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Tables:
    """Arrays of any shape, seen whole by every program of a kernel."""

    arrays: tuple[Any, ...]

    def reader(self) -> Callable[[int, Index], Array]:
        """What one evaluation of a program loads entries by."""
        return self.load

    def load(self, which: int, index: Index) -> Array:
        """The entries of one table; the index broadcasts."""
        if not index:
            return self.arrays[which]
        at = jnp.broadcast_arrays(*(np.int32(i) if isinstance(i, int) else i for i in index))
        return self.arrays[which].at[tuple(at)].get(mode="promise_in_bounds")


@dataclasses.dataclass(frozen=True, eq=False)
class LiveTables(Tables):
    """Tables whose entries have no derivative in some pairs: chosen, not multiplied by 0, for 0 * NaN is NaN."""

    live: Array

    def load(self, which: int, index: Index) -> Array:
        entries = super().load(which, index)
        return jnp.where(self.live, entries, lax.stop_gradient(entries))


def where_live(scores: Tree, live: Array) -> Tree:
    """Scores whose operands are 0, and whose tables have no derivative, in pairs that nobody looks at."""
    scores = map_operands(lambda x: jnp.where(live, x.astype(jnp.float32), 0.0), scores)
    return map_tables(lambda tables: LiveTables(tables.arrays, live), scores)


def _is_tables(x: Any) -> bool:
    return isinstance(x, Tables)


def map_operands(function: Callable, tree: Tree, *rest: Any) -> Tree:
    """Replaces every operand in masks or scores, and leaves tables as they are."""
    return jax.tree.map(
        lambda x, *others: x if _is_tables(x) else function(x, *others), tree, *rest, is_leaf=_is_tables
    )


def map_arrays(of_operand: Callable, of_table: Callable, tree: Tree, *rest: Any) -> Tree:
    """Replaces every operand by one function and every table by the other."""
    return jax.tree.map(
        lambda x, *others: jax.tree.map(of_table, x, *others) if _is_tables(x) else of_operand(x, *others),
        tree,
        *rest,
        is_leaf=_is_tables,
    )


def map_tables(function: Callable[[Tables], Any], tree: Tree) -> Tree:
    """Replaces every node of tables, and leaves operands as they are."""
    return jax.tree.map(lambda x: function(x) if _is_tables(x) else x, tree, is_leaf=_is_tables)


def operands(tree: Any) -> list[Any]:
    """The arrays of masks or scores that are aligned with ``[B, N, T, S]``, in a fixed order."""
    return [x for x in jax.tree.leaves(tree, is_leaf=_is_tables) if not _is_tables(x)]


def table_arrays(tree: Any) -> list[Any]:
    """The other ones."""
    return jax.tree.leaves([x for x in jax.tree.leaves(tree, is_leaf=_is_tables) if _is_tables(x)])


def floating(tree: Tree) -> Tree:
    """Scores with None for tables of integers, which have no gradient."""
    return map_tables(lambda tables: jax.tree.map(lambda x: x if is_floating(x) else None, tables), tree)


def with_floating(tree: Tree, floats: Tree) -> Tree:
    """Scores with the arrays of :func:`floating` in their place."""
    return jax.tree.map(lambda x, new: x if new is None else new, tree, floats, is_leaf=lambda x: x is None)


def is_floating(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)
