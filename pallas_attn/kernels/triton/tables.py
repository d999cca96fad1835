"""The parameters of custom scores inside a kernel: numbers, and tables that are only indexed.

A kernel cannot index a tile that it holds, but it can load from any address. So an array of parameters is a
:class:`_Table` there, which loads the entries that it is asked for. No load can be differentiated in a kernel; so
where derivatives are taken, entries are looked up first (:func:`look_up`), and the gradient of a table is that of its
entries, summed by place (:func:`place_sums`).
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental.pallas import triton as plgpu

from pallas_attn.kernels.triton import tiles
from pallas_attn.scores import Custom, Score, Scores


@dataclasses.dataclass(frozen=True)
class Lookup:
    """Entries of a flat table, from places ``start + offsets``, with offsets below ``size``."""

    entries: Array  # float32
    start: Any
    offsets: Any
    size: int


class _Table:
    """An array of parameters, of which a custom score may ask for entries by index. Keeps what it was asked for."""

    def __init__(self, ref: Any, shape: tuple[int, ...]):
        self.lookups: list[Lookup] = []
        self._ref, self.shape = ref, shape

    def __getitem__(self, index: Any) -> Array:
        index = index if isinstance(index, tuple) else (index,)
        if len(index) != len(self.shape):
            raise TypeError(
                f"custom: params: expected an index down to a number of shape {self.shape}, got {len(index)} axes"
            )
        # Leading numbers (the head, most often) say where the entries begin; what follows differs from entry to entry.
        start, offsets, reach = np.int32(0), np.int32(0), 1
        for i, size in zip(index, self.shape, strict=True):
            i = np.int32(i) if isinstance(i, int) else i.astype(jnp.int32)
            i = jnp.clip(jnp.where(i < 0, i + size, i), 0, size - 1)
            start = start * size
            if i.ndim == 0 and reach == 1:
                start = start + i
            else:
                offsets, reach = offsets * size + i, reach * size
        entries = plgpu.load(self._ref.at[start + offsets]).astype(jnp.float32)
        self.lookups.append(Lookup(entries, start, offsets, reach))
        return entries


class _Replayed:
    """Gives the entries that were looked up before, in the same order."""

    def __init__(self, entries: Iterator[Array], shape: tuple[int, ...]):
        self._entries, self.shape = entries, shape

    def __getitem__(self, index: Any) -> Array:
        return next(self._entries)


@dataclasses.dataclass(frozen=True)
class _Function:
    """A custom score's function, and how its parameters hang together."""

    function: Callable[..., Array]
    structure: Any
    shapes: tuple[tuple[int, ...], ...]

    def __call__(self, tables: list, logits: Array, *where: Array) -> Array:
        params = [table if shape else table[()] for table, shape in zip(tables, self.shapes, strict=True)]
        changed = self.function(logits, *where, jax.tree.unflatten(self.structure, params))
        return jnp.broadcast_to(changed, logits.shape)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class CustomInKernel(Score):
    """A custom score whose parameters are flat arrays, and in a kernel refs to them."""

    params: list[Any]
    function: _Function = dataclasses.field(metadata={"static": True})

    aligned = False

    def apply(self, logits, q_positions, kv_positions, head):
        return self._run(logits, q_positions, kv_positions, head)[0]

    def look_up(self, logits: Array, *where: Array) -> "LookedUp":
        """The same score with its entries at hand."""
        return LookedUp(self.function, self._run(logits, *where)[1])

    def _run(self, logits: Array, *where: Array) -> tuple[Array, list[list[Lookup]]]:
        tables = [_Table(ref, shape) for ref, shape in zip(self.params, self.function.shapes, strict=True)]
        return self.function(tables, logits, *where), [table.lookups for table in tables]


@dataclasses.dataclass(frozen=True, eq=False)
class LookedUp(Score):
    """A custom score that loads nothing."""

    function: _Function
    lookups: list[list[Lookup]]  # of every parameter

    aligned = False

    def apply(self, logits, q_positions, kv_positions, head):
        pairs = zip(self.lookups, self.function.shapes, strict=True)
        tables = [_Replayed(iter([lookup.entries for lookup in lookups]), shape) for lookups, shape in pairs]
        return self.function(tables, logits, q_positions, kv_positions, head)

    def with_entries(self, which: int, entries: list[Array]) -> "LookedUp":
        """The same with other entries of one parameter."""
        changed = [dataclasses.replace(x, entries=e) for x, e in zip(self.lookups[which], entries, strict=True)]
        return LookedUp(self.function, [*self.lookups[:which], changed, *self.lookups[which + 1 :]])


def with_tables(scores: Scores) -> Scores:
    """Prepares custom scores for a kernel."""

    def prepare(score: Score) -> Score:
        if not isinstance(score, Custom):
            return score
        leaves, structure = jax.tree.flatten(score.params)
        function = _Function(score.function, structure, tuple(x.shape for x in leaves))
        return CustomInKernel([x.reshape(-1) for x in leaves], function)

    return tuple(prepare(score) for score in scores)


def look_up(scores: Scores, logits: Array, *where: Array) -> Scores:
    """Loads what custom scores ask for, so that they can be differentiated."""
    ready = []
    for score in scores:
        ready.append(score.look_up(logits, *where) if isinstance(score, CustomInKernel) else score)
        logits = ready[-1].apply(logits, *where)
    return tuple(ready)


def place_sums(lookup: Lookup, gradients: Array, width: int) -> Array:
    """Float32 ``[width]``: at every place of a flat table, the sum of the gradients of the entries from there."""
    index = jnp.arange(width, dtype=jnp.int32)
    if gradients.ndim == 0:
        return jnp.where(index == lookup.start, gradients, 0.0)

    def add(offset: Array, sums: Array) -> Array:
        of_place = jnp.sum(jnp.where(lookup.offsets == offset, gradients, 0.0))
        return sums + jnp.where(index == lookup.start + offset, of_place, 0.0)

    return tiles.loop(0, lookup.size, add, jnp.zeros(width, jnp.float32))


def width_of(shape: tuple[int, ...]) -> int:
    """The power of two that holds a table."""
    return 1 << max(math.prod(shape) - 1, 1).bit_length()
