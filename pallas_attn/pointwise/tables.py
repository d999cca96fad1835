"""Lookup tables of pairwise functions, as distinct from operands, which are aligned with the pairs.

In the pytree of a mask or a score, all tables are in one :class:`Tables` node; every other leaf is an operand.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

Tree = TypeVar("Tree")
# The index of an entry: per axis a Python int or a tile of integers, all in bounds.
Index = tuple[int | Array, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Tables:
    """Arrays of any shape; every program of a kernel sees them whole."""

    arrays: tuple[Any, ...]

    def reader(self) -> Callable[[int, Index], Array]:
        """Returns the function with which one evaluation of a program loads entries."""
        return self.load

    def load(self, which: int, index: Index) -> Array:
        """Loads entries of one table; the components of the index broadcast."""
        if not index:
            return self.arrays[which]
        at = jnp.broadcast_arrays(*(np.int32(i) if isinstance(i, int) else i for i in index))
        return self.arrays[which].at[tuple(at)].get(mode="promise_in_bounds")


@dataclasses.dataclass(frozen=True, eq=False)
class LiveTables(Tables):
    """Tables whose derivative is masked in dead pairs, by selection, because 0 * NaN is NaN."""

    live: Array

    def load(self, which: int, index: Index) -> Array:
        entries = super().load(which, index)
        return jnp.where(self.live, entries, lax.stop_gradient(entries))


def where_live(scores: Tree, live: Array) -> Tree:
    """Zeroes the operands of scores, and stops the derivatives of their tables, in dead (masked) pairs."""
    scores = map_operands(lambda x: jnp.where(live, x.astype(jnp.float32), 0.0), scores)
    return map_tables(lambda tables: LiveTables(tables.arrays, live), scores)


def _is_tables(x: Any) -> bool:
    return isinstance(x, Tables)


def map_operands(function: Callable, tree: Tree, *rest: Any) -> Tree:
    """Replaces every operand in masks or scores, but no table."""
    return jax.tree.map(
        lambda x, *others: x if _is_tables(x) else function(x, *others), tree, *rest, is_leaf=_is_tables
    )


def map_arrays(of_operand: Callable, of_table: Callable, tree: Tree, *rest: Any) -> Tree:
    """Maps every operand with one function and every table with the other."""
    return jax.tree.map(
        lambda x, *others: jax.tree.map(of_table, x, *others) if _is_tables(x) else of_operand(x, *others),
        tree,
        *rest,
        is_leaf=_is_tables,
    )


def map_tables(function: Callable[[Tables], Any], tree: Tree) -> Tree:
    """Replaces every :class:`Tables` node, but no operand."""
    return jax.tree.map(lambda x: function(x) if _is_tables(x) else x, tree, is_leaf=_is_tables)


def operands(tree: Any) -> list[Any]:
    """The operands of masks or scores, aligned with ``[B, N, T, S]``, in a fixed order."""
    return [x for x in jax.tree.leaves(tree, is_leaf=_is_tables) if not _is_tables(x)]


def table_arrays(tree: Any) -> list[Any]:
    """The arrays of all tables of masks or scores, in a fixed order."""
    return jax.tree.leaves([x for x in jax.tree.leaves(tree, is_leaf=_is_tables) if _is_tables(x)])


def floating(tree: Tree) -> Tree:
    """Replaces integer tables, which have no gradient, by None."""
    return map_tables(lambda tables: jax.tree.map(lambda x: x if is_floating(x) else None, tables), tree)


def with_floating(tree: Tree, floats: Tree) -> Tree:
    """Puts the arrays of :func:`floating` back into scores."""
    return jax.tree.map(lambda x, new: x if new is None else new, tree, floats, is_leaf=lambda x: x is None)


def is_floating(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)
