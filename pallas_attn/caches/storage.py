"""Storages: how a slot's key and value are encoded.

Reads and writes only move numbers, so gradients follow them; overwritten numbers get a gradient of 0. Quantized numbers
have no gradient and raise if one reaches them.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_attn import bits, checks
from pallas_attn.quantized import KVArray, QuantizedArray
from pallas_attn.tuning import PAGE_MULTIPLE


class Storage:
    """Encodes ``[.., K, D]``, each token and head independently. A storage is static; the encoded form is a pytree."""

    def encode(self, x: Array, dtype: jax.typing.DTypeLike) -> KVArray:
        """Encodes ``x`` ``[.., K, D]``; ``dtype`` is the cache's."""
        raise NotImplementedError(f"{type(self).__name__}.encode: a storage has to define how it encodes tokens")


@dataclasses.dataclass(frozen=True)
class Plain(Storage):
    """Unquantized, in the cache's dtype."""

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
        # Values stored as integers cannot carry the refusal of gradients to their readers; the scales carry it.
        return dataclasses.replace(quantized, values=lax.stop_gradient(quantized.values))


@dataclasses.dataclass(frozen=True)
class Int4(Storage):
    """4-bit integers with a float32 scale for every ``group`` columns, a divisor of D / 2."""

    group: int = 32

    def __post_init__(self):
        object.__setattr__(self, "group", checks.integer("group", self.group, least=1, most=checks.LONGEST_AXIS))

    def encode(self, x: Array, dtype: jax.typing.DTypeLike) -> QuantizedArray:
        return QuantizedArray.quantize(x, "int4", self.group)


@dataclasses.dataclass(frozen=True)
class Paged(Storage):
    """Pages of ``page_size`` slots, allocated on demand from a pool of ``num_pages`` that all rows share.

    Attributes:
      page_size: a multiple of 16 (``PAGE_MULTIPLE``) that divides the capacity.
      num_pages: size of the pool. With fewer than ``batch_size * capacity / page_size`` not all rows can be full.
      inner: the storage of the slots in a page.
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

    def encode(self, x: Array, dtype: jax.typing.DTypeLike) -> KVArray:
        return self.inner.encode(x, dtype)


def decode(x: KVArray) -> Array:
    """Decodes stored tokens to float32 ``[.., K, D]``."""
    return x.dequantize() if isinstance(x, QuantizedArray) else x.astype(jnp.float32)


def read(buffer: KVArray, first: Array, second: Array) -> KVArray:
    """Reads ``[R, t, K, D]`` at indices int32 ``[R, 1, t]`` of the first two axes of ``buffer``; see :func:`write`."""

    def get(buffer: Array, first: Array, second: Array) -> Array:
        return buffer.at[first, second].get(mode="clip")

    return _map(lambda buffer: bits.move(get, (buffer,), first[:, 0], second[:, 0]), buffer)


def write(buffer: KVArray, first: Array, second: Array, x: KVArray) -> KVArray:
    """Writes ``x`` to the given indices of ``buffer``; out-of-bounds writes are dropped.

    Args:
      buffer: ``[B, capacity, K, D]``, or the pool ``[P, page, K, D]``; leaves are arrays or BitcastArrays.
      x: ``[R, t, K, D]``, also.
      first, second: int32 ``[R, M, t]``, never negative: indices of the first two axes, for all heads (M = 1) or per
        head (M = K). No element of the buffer is written twice.
    """
    every_head = first.shape[1] == 1
    # With indices per head, the head is the third index.
    places = [index[:, 0] if every_head else index.swapaxes(1, 2) for index in (first, second)]
    if not every_head:
        places.append(lax.broadcasted_iota(jnp.int32, places[0].shape, 2))

    def put(buffer: Array, x: Array, *places: Array) -> Array:
        return buffer.at[places].set(x, mode="drop", unique_indices=True)

    return _map(lambda buffer, x: bits.move(put, (buffer, x), *places), buffer, x)


def take(buffer: KVArray, rows: Array) -> KVArray:
    """Reads ``rows`` int32 ``[R]``, all in bounds, of a buffer ``[B, ...]``: ``[R, ...]``."""

    def get(buffer: Array, rows: Array) -> Array:
        return buffer.at[rows].get(mode="promise_in_bounds")

    return _map(lambda buffer: bits.move(get, (buffer,), rows), buffer)


def _map(function: Callable, buffer: KVArray, *rest: KVArray) -> KVArray:
    """Applies ``function`` to every array of a buffer."""
    return jax.tree.map(function, buffer, *rest, is_leaf=bits.is_packed)
