"""Small floats stored as integers, because XLA on a CPU cannot read or write a part of an array of them.

XLA's CPU backend has no slice, gather or scatter of 8-bit floats, and before JAX 0.11 none of bfloat16: it converts the
whole array to larger floats and back. A bitcast to integers is also a pass over the array, but a bitcast there and back
is elided. So buffers are stored as integers; to read a part, code takes the integers of the whole array, slices them,
and converts the slice to floats.

Integers have no derivative. Where one is needed, an array of floats (the *carrier*) accompanies them: its tangent is
that of the floats that the integers encode, and its values are never read.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax

Tree = TypeVar("Tree")

_CONVERTED = {jnp.dtype(jnp.float8_e4m3fn)}
if jax.__version_info__ < (0, 11):
    _CONVERTED.add(jnp.dtype(jnp.bfloat16))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class BitcastArray:
    """An array of small floats, stored as integers.

    Attributes:
      integers: unsigned, as wide as the floats.
      carrier: zeros of :attr:`dtype` and :attr:`shape` that carry the derivative of the floats; None: no derivative.
      dtype: of the floats; static.
    """

    integers: Array
    carrier: Array | None
    dtype: jnp.dtype = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the integers and of the floats."""
        return self.integers.shape

    @property
    def ndim(self) -> int:
        """Rank of :attr:`shape`."""
        return self.integers.ndim


def integers(x: Array) -> Array:
    """Bitcasts ``x`` to unsigned integers if XLA cannot read and write parts of it; otherwise returns ``x``.

    Raises:
      NotImplementedError: differentiation, because the derivative would be lost.
    """
    return _to_integers(x) if _is_converted(x) else x


def pack(x: Tree) -> Tree:
    """Replaces every array that :func:`integers` changes by a :class:`BitcastArray` without a carrier.

    Raises as :func:`integers` does.
    """

    def packed(x: Array | BitcastArray) -> Array | BitcastArray:
        if isinstance(x, BitcastArray):
            return x if x.carrier is None else BitcastArray(_without_carrier(x.integers, x.carrier), None, x.dtype)
        return BitcastArray(integers(x), None, x.dtype) if _is_converted(x) else x

    return jax.tree.map(packed, x, is_leaf=is_packed)


def pack_with_derivatives(x: Tree) -> Tree:
    """Replaces every array that :func:`integers` changes by a :class:`BitcastArray` with a carrier."""
    return jax.tree.map(lambda x: _packed(x) if _is_converted(x) else x, x)


def unpack(x: Tree) -> Tree:
    """Converts every :class:`BitcastArray` in a tree back to floats."""

    def array(x: Array | BitcastArray) -> Array:
        if not isinstance(x, BitcastArray):
            return x
        as_floats = lax.bitcast_convert_type(x.integers, x.dtype)
        return as_floats if x.carrier is None else _with_derivative_of(as_floats, x.carrier)

    return jax.tree.map(array, x, is_leaf=is_packed)


def repack(x: Tree, moved: Tree) -> Tree:
    """Returns ``moved``, computed from ``pack(x)``, with each leaf in the form it has in ``x``, carriers included."""

    def restored(x: Array | BitcastArray, moved: Any) -> Array | BitcastArray:
        return BitcastArray(moved.integers, x.carrier, x.dtype) if isinstance(x, BitcastArray) else unpack(moved)

    return jax.tree.map(restored, x, moved, is_leaf=is_packed)


def move(
    function: Callable[..., Array], arrays: tuple[Array | BitcastArray, ...], *indices: Array
) -> Array | BitcastArray:
    """Returns ``function(*arrays, *indices)`` of a function that only moves elements, on integers where that is faster.

    Args:
      function: linear in its arrays, so that it is its own derivative, and transposable by JAX.
      arrays: of one dtype; the result has the form of the first.
      indices: integers.

    Raises:
      NotImplementedError: differentiation, if the first array is packed without a carrier.
    """
    first = arrays[0]
    if not isinstance(first, BitcastArray):
        if not _is_converted(first):
            return function(*arrays, *indices)
        return unpack(move(function, pack_with_derivatives(arrays), *indices))
    if first.carrier is None:
        return BitcastArray(function(*jax.tree.leaves(pack(arrays)), *indices), None, first.dtype)

    @jax.custom_jvp
    def carry(carriers: tuple[Array, ...], indices: tuple[Array, ...]) -> Array:
        shape = jax.eval_shape(function, *carriers, *indices).shape
        return carriers[0] if shape == first.shape else jnp.zeros(shape, first.dtype)

    @carry.defjvp
    def derivative(primals, tangents):
        return carry(*primals), function(*tangents[0], *primals[1])

    packed = [x if isinstance(x, BitcastArray) else _packed(x) for x in arrays]
    carrier = carry(tuple(x.carrier for x in packed), indices)
    return BitcastArray(function(*(x.integers for x in packed), *indices), carrier, first.dtype)


def is_packed(x: object) -> bool:
    """Whether ``x`` is a :class:`BitcastArray`, which this module treats as a leaf."""
    return isinstance(x, BitcastArray)


def _packed(x: Array) -> BitcastArray:
    return BitcastArray(integers(lax.stop_gradient(x)), _to_carrier(x), x.dtype)


def _is_converted(x: Array) -> bool:
    return x.dtype in _CONVERTED and jax.default_backend() == "cpu"


def _refuse(*_):
    raise NotImplementedError(
        "a packed array (pallas_attn.bits.pack) has no gradient: stop the gradient with jax.lax.stop_gradient, or pack"
        " with bits.pack_with_derivatives"
    )


@jax.custom_jvp
def _to_integers(x: Array) -> Array:
    return lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")


@jax.custom_jvp
def _without_carrier(integers: Array, carrier: Array) -> Array:
    return integers


_to_integers.defjvp(_refuse)
_without_carrier.defjvp(_refuse)


@jax.custom_jvp
def _to_carrier(x: Array) -> Array:
    return jnp.zeros_like(x)


@jax.custom_jvp
def _with_derivative_of(x: Array, carrier: Array) -> Array:
    return x


_to_carrier.defjvp(lambda primals, tangents: (_to_carrier(*primals), tangents[0]))
_with_derivative_of.defjvp(lambda primals, tangents: (_with_derivative_of(*primals), tangents[1]))
