"""Small floats held as integers, for XLA on a CPU cannot read or write a part of an array of them.

It has no slice, gather or scatter of 8-bit floats, and before JAX 0.11 none of bfloat16: it converts the whole array to
larger floats and back. Nor does it see that integers of the same bits lie in memory already: to turn an array into them
is a pass over it, too. But there and back again is nothing. So what is kept is held as integers, and who reads a part
takes the integers of the whole, then the part, then the floats.

Integers have no derivative. Where one is wanted, an array of floats goes with them: its own derivative is that of the
numbers that the integers stand for, and nobody looks at what it holds.
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
class Bits:
    """An array of small floats, held as integers.

    Attributes:
      integers: unsigned, as wide as the floats.
      carrier: zeros of :attr:`dtype` and :attr:`shape`, whose derivative is that of the floats; None: these have none.
      dtype: of the floats; static.
    """

    integers: Array
    carrier: Array | None
    dtype: jnp.dtype = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Of either."""
        return self.integers.shape

    @property
    def ndim(self) -> int:
        """Of :attr:`shape`."""
        return self.integers.ndim


def integers(x: Array) -> Array:
    """``x`` in a dtype of which parts can be read and written: unsigned integers, or as it is.

    Raises:
      NotImplementedError: a derivative is asked for, and it would be lost.
    """
    return _to_integers(x) if _is_converted(x) else x


def hold(x: Tree) -> Tree:
    """The same tree with :class:`Bits`, without carriers, for every array that :func:`integers` changes.

    It raises as that does.
    """

    def held(x: Array | Bits) -> Array | Bits:
        if isinstance(x, Bits):
            return x if x.carrier is None else Bits(_without_carrier(x.integers, x.carrier), None, x.dtype)
        return Bits(integers(x), None, x.dtype) if _is_converted(x) else x

    return jax.tree.map(held, x, is_leaf=is_held)


def hold_with_derivatives(x: Tree) -> Tree:
    """The same tree with :class:`Bits` and their carriers for every array that :func:`integers` changes."""
    return jax.tree.map(lambda x: _held(x) if _is_converted(x) else x, x)


def floats(x: Tree) -> Tree:
    """What is held, as floats."""

    def array(x: Array | Bits) -> Array:
        if not isinstance(x, Bits):
            return x
        as_floats = lax.bitcast_convert_type(x.integers, x.dtype)
        return as_floats if x.carrier is None else _with_derivative_of(as_floats, x.carrier)

    return jax.tree.map(array, x, is_leaf=is_held)


def like(x: Tree, moved: Tree) -> Tree:
    """``moved``, what became of :func:`hold` of ``x``, in the form of ``x`` and with its carriers."""

    def restored(x: Array | Bits, moved: Any) -> Array | Bits:
        return Bits(moved.integers, x.carrier, x.dtype) if isinstance(x, Bits) else floats(moved)

    return jax.tree.map(restored, x, moved, is_leaf=is_held)


def move(function: Callable[..., Array], arrays: tuple[Array | Bits, ...], *indices: Array) -> Array | Bits:
    """``function(*arrays, *indices)``, which moves numbers and changes none; integers, where that is faster.

    Args:
      function: linear in its arrays, and such that JAX can transpose it. So it is its own derivative.
      arrays: of one dtype; the result is held as the first of them is.
      indices: integers.

    Raises:
      NotImplementedError: a derivative is asked for, and the first array has none.
    """
    first = arrays[0]
    if not isinstance(first, Bits):
        if not _is_converted(first):
            return function(*arrays, *indices)
        return floats(move(function, hold_with_derivatives(arrays), *indices))
    if first.carrier is None:
        return Bits(function(*jax.tree.leaves(hold(arrays)), *indices), None, first.dtype)

    @jax.custom_jvp
    def carry(carriers: tuple[Array, ...], indices: tuple[Array, ...]) -> Array:
        shape = jax.eval_shape(function, *carriers, *indices).shape
        return carriers[0] if shape == first.shape else jnp.zeros(shape, first.dtype)

    @carry.defjvp
    def derivative(primals, tangents):
        return carry(*primals), function(*tangents[0], *primals[1])

    held = [x if isinstance(x, Bits) else _held(x) for x in arrays]
    carrier = carry(tuple(x.carrier for x in held), indices)
    return Bits(function(*(x.integers for x in held), *indices), carrier, first.dtype)


def is_held(x: object) -> bool:
    """Whether it is :class:`Bits`: a leaf of the trees here."""
    return isinstance(x, Bits)


def _held(x: Array) -> Bits:
    return Bits(integers(lax.stop_gradient(x)), _to_carrier(x), x.dtype)


def _is_converted(x: Array) -> bool:
    return x.dtype in _CONVERTED and jax.default_backend() == "cpu"


def _refuse(*_):
    raise NotImplementedError(
        "what is held as integers (pallas_attn.bits.hold) has no gradient: stop it by jax.lax.stop_gradient, or give"
        " what is held with derivatives"
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
