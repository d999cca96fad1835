"""Tables of custom masks and scores inside a kernel.

A kernel cannot index a tile that it holds, but it can load from any address. So a table is a flat ref there, from which
the entries are loaded that a program asks for. No load can be differentiated in a kernel; so where derivatives are
taken, entries are looked up first (:func:`look_up`), and the gradient of a table is that of its entries, summed by
place (:func:`place_sums`).
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental.pallas import triton as plgpu

from pallas_attn import masks, pointwise, scores
from pallas_attn.pointwise.tables import Index

# Operations of programs that this lowering does not have.
_NOT_LOWERED = frozenset({"custom_vjp_call", "digamma", "erf", "erfc", "lgamma", "reduce_precision", "round"})


@dataclasses.dataclass(frozen=True)
class Lookup:
    """Entries of a flat table, from places ``start + offsets``, with offsets below ``size``."""

    entries: Array
    start: Any
    offsets: Any
    size: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class TablesInKernel(pointwise.Tables):
    """Flat tables, and in a kernel refs to them."""

    shapes: tuple[tuple[int, ...], ...] = dataclasses.field(metadata={"static": True})

    def load(self, which: int, index: Index) -> Array:
        return self.look_up(which, index).entries

    def look_up(self, which: int, index: Index) -> Lookup:
        """Loads entries of one table; the index broadcasts."""
        # Leading numbers (the head, most often) say where the entries begin; what follows differs from entry to entry.
        start, offsets, reach = np.int32(0), np.int32(0), 1
        for i, size in zip(index, self.shapes[which], strict=True):
            i = np.int32(i) if isinstance(i, int) else i
            start = start * np.int32(size)
            if np.ndim(i) == 0 and reach == 1:
                start = start + i
            else:
                offsets, reach = offsets * np.int32(size) + i, reach * size
        return Lookup(plgpu.load(self.arrays[which].at[start + offsets]), start, offsets, reach)


@dataclasses.dataclass(frozen=True, eq=False)
class _Recording(TablesInKernel):
    """Records the entries that are requested."""

    lookups: list[list[Lookup]]  # of every table

    def load(self, which: int, index: Index) -> Array:
        self.lookups[which].append(self.look_up(which, index))
        return self.lookups[which][-1].entries


@dataclasses.dataclass(frozen=True, eq=False)
class LookedUp(pointwise.Tables):
    """Replays entries that were looked up before, in the same order, without loads."""

    lookups: list[list[Lookup]]

    def reader(self) -> Callable[[int, Index], Array]:
        entries = [iter([lookup.entries for lookup in lookups]) for lookups in self.lookups]
        return lambda which, index: next(entries[which])

    def with_entries(self, which: int, entries: list[Array]) -> "LookedUp":
        """The same with other entries of one table."""
        changed = [dataclasses.replace(x, entries=e) for x, e in zip(self.lookups[which], entries, strict=True)]
        return LookedUp((), [*self.lookups[:which], changed, *self.lookups[which + 1 :]])


def not_lowered(tree: Any) -> list[str]:
    """The operations in masks or scores for which there is no lowering."""
    is_custom = lambda x: isinstance(x, masks.Traced | scores.Traced)  # noqa: E731
    custom = filter(is_custom, jax.tree.leaves(tree, is_leaf=is_custom))
    return sorted(_NOT_LOWERED & {name for x in custom for name in x.program.primitives})


def with_tables(tree: Any) -> Any:
    """Prepares masks or scores for a kernel."""

    def prepare(tables: pointwise.Tables) -> TablesInKernel:
        shapes = tuple(x.shape for x in tables.arrays)
        return TablesInKernel(tuple(x.reshape(-1) for x in tables.arrays), shapes)

    return pointwise.map_tables(prepare, tree)


def look_up(scores_: scores.Scores, logits: Array, *where: Array) -> scores.Scores:
    """Loads what custom scores ask for, so that they can be differentiated."""
    ready = []
    for score in scores_:
        if isinstance(score, scores.Traced):
            tables = cast(TablesInKernel, score.tables)
            recording = _Recording(tables.arrays, tables.shapes, [[] for _ in tables.arrays])
            logits = dataclasses.replace(score, tables=recording).apply(logits, *where)
            score = dataclasses.replace(score, tables=LookedUp((), recording.lookups))
        else:
            logits = score.apply(logits, *where)
        ready.append(score)
    return tuple(ready)


def place_sums(lookup: Lookup, gradients: Array, live: Array, width: int) -> Array:
    """Float32 ``[width]``: at every place of a flat table, the sum of the gradients of the entries from there.

    ``live``, a tile of pairs, tells which of them have gradients.
    """
    gradients = gradients.astype(jnp.float32)
    index = jnp.arange(width, dtype=jnp.int32)
    if gradients.ndim == 0:
        return jnp.where(index == lookup.start, gradients, 0.0)

    def add(offset: Array, sums: Array) -> Array:
        of_place = jnp.sum(jnp.where(lookup.offsets == offset, gradients, 0.0))
        return sums + jnp.where(index == lookup.start + offset, of_place, 0.0)

    first = jnp.min(jnp.where(live, lookup.offsets, lookup.size - 1))
    last = jnp.max(jnp.where(live, lookup.offsets, 0))
    return lax.fori_loop(first, last + 1, add, jnp.zeros(width, jnp.float32))


def width_of(shape: tuple[int, ...]) -> int:
    """The power of two that holds a table."""
    return 1 << max(math.prod(shape) - 1, 1).bit_length()
