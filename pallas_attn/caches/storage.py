"""How the contents of a slot are held.

Writing and reading move numbers and change none, so gradients go with them: that of what is overwritten is 0. Quantised
numbers have no gradient, and say so.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_attn import bits, checks
from pallas_attn.quantized import QuantizedArray
from pallas_attn.tuning import PAGE_MULTIPLE

Stored = Array | QuantizedArray


class Storage:
    """Holds ``[.., K, D]`` in some form, a token and head by itself. A storage is static; the form is a pytree."""

    def encode(self, x: Array, dtype: jax.typing.DTypeLike) -> Stored:
        """What is held of ``x`` ``[.., K, D]``; ``dtype`` is the cache's."""
        raise NotImplementedError(f"{type(self).__name__}.encode: a storage says how it holds a token")


@dataclasses.dataclass(frozen=True)
class Plain(Storage):
    """As it comes, in the cache's dtype."""

    def encode(self, x: Array, dtype: jax.typing.DTypeLike) -> Array:
        return x.astype(dtype)


@dataclasses.dataclass(frozen=True)
class Int8(Storage):
    """8-bit integers with a float32 scale per token and head."""

    def encode(self, x: Array, dtype: jax.typing.DTypeLike) -> QuantizedArray:
        return QuantizedArray.quantize(x, "int8")


@dataclasses.dataclass(frozen=True)
class Float8(Storage):
    """float8_e4m3fn with a float32 scale per token and head."""

    def encode(self, x: Array, dtype: jax.typing.DTypeLike) -> QuantizedArray:
        quantized = QuantizedArray.quantize(x, "float8_e4m3fn")
        # Held as integers, they could not hand on to whoever reads them that they have no gradient; the scales can.
        return dataclasses.replace(quantized, values=lax.stop_gradient(quantized.values))


@dataclasses.dataclass(frozen=True)
class Int4(Storage):
    """4-bit integers with a float32 scale for every ``group`` columns, which divides D / 2."""

    group: int = 32

    def __post_init__(self):
        object.__setattr__(self, "group", checks.integer("group", self.group, least=1, most=checks.LONGEST_AXIS))

    def encode(self, x: Array, dtype: jax.typing.DTypeLike) -> QuantizedArray:
        return QuantizedArray.quantize(x, "int4", self.group)


@dataclasses.dataclass(frozen=True)
class Paged(Storage):
    """Pages of ``page_size`` slots from a pool of ``num_pages`` that all rows share, taken when a token needs one.

    Attributes:
      page_size: a multiple of 16 (``PAGE_MULTIPLE``) that divides the capacity.
      num_pages: of the pool. With fewer than ``batch_size * capacity / page_size`` not every row can be full at once.
      inner: how the slots of a page are held.
    """

    page_size: int
    num_pages: int
    inner: Storage = Plain()

    def __post_init__(self):
        for name, least in (("page_size", 0), ("num_pages", 1)):
            value = checks.integer(name, getattr(self, name), least=least, most=checks.LONGEST_AXIS)
            object.__setattr__(self, name, value)
        if self.page_size < 1 or self.page_size % PAGE_MULTIPLE:
            raise ValueError(f"page_size: expected a multiple of {PAGE_MULTIPLE}, got {self.page_size}")
        if not isinstance(self.inner, Storage) or isinstance(self.inner, Paged):
            wanted = "a pallas_attn.caches.Storage that is not paged"
            raise TypeError(f"inner: expected {wanted}, got {checks.describe(self.inner)}")

    def encode(self, x: Array, dtype: jax.typing.DTypeLike) -> Stored:
        return self.inner.encode(x, dtype)


def decode(x: Stored) -> Array:
    """float32 ``[.., K, D]``: what the storage holds."""
    return x.dequantize() if isinstance(x, QuantizedArray) else x.astype(jnp.float32)


def read(buffer: Stored, first: Array, second: Array) -> Stored:
    """``[R, t, K, D]`` of ``buffer``, at places int32 ``[R, 1, t]`` along its first two axes; see :func:`write`."""

    def get(buffer: Array, first: Array, second: Array) -> Array:
        return buffer.at[first, second].get(mode="clip")

    return _map(lambda buffer: bits.move(get, (buffer,), first[:, 0], second[:, 0]), buffer)


def write(buffer: Stored, first: Array, second: Array, x: Stored) -> Stored:
    """``buffer`` with ``x`` at the given places; what is beyond the buffer is dropped.

    Args:
      buffer: ``[B, capacity, K, D]``, or the pool ``[P, page, K, D]``; arrays, or :class:`~pallas_attn.bits.Bits`.
      x: ``[R, t, K, D]``, so too.
      first, second: int32 ``[R, M, t]``, never negative: the places along the first two axes, for all heads (M is 1)
        or each (K). No place of the buffer is named twice.
    """
    every_head = first.shape[1] == 1
    # Not [:, 0] in the other case: a head is then part of the place.
    places = [index[:, 0] if every_head else index.swapaxes(1, 2) for index in (first, second)]
    if not every_head:
        places.append(lax.broadcasted_iota(jnp.int32, places[0].shape, 2))

    def put(buffer: Array, x: Array, *places: Array) -> Array:
        return buffer.at[places].set(x, mode="drop", unique_indices=True)

    return _map(lambda buffer, x: bits.move(put, (buffer, x), *places), buffer, x)


def take(buffer: Stored, rows: Array) -> Stored:
    """``[R, ...]`` of a buffer ``[B, ...]``: its ``rows`` int32 ``[R]``, all of which exist."""

    def get(buffer: Array, rows: Array) -> Array:
        return buffer.at[rows].get(mode="promise_in_bounds")

    return _map(lambda buffer: bits.move(get, (buffer,), rows), buffer)


def _map(function: Callable, buffer: Stored, *rest: Stored) -> Stored:
    """``function`` of every array that a buffer is made of."""
    return jax.tree.map(function, buffer, *rest, is_leaf=bits.is_held)
