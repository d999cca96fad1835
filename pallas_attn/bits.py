"""Small floats held as integers, for XLA on a CPU cannot read or write a part of an array of them.

It has no slice, gather or scatter of 8-bit floats, and before JAX 0.11 none of bfloat16: it converts the whole array to
larger floats and back. Nor does it see that integers of the same bits lie in memory already: to turn an array into them
is a pass over it, too. But there and back again is nothing. So who reads or writes a part takes the integers of the
whole, then the part, then the floats; and what is kept from program to program may be held as integers.

Integers carry no derivative. What turns floats into them either says what the derivative is, or refuses it.
"""

import dataclasses
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax

Tree = TypeVar("Tree")

_CONVERTED = {jnp.dtype(jnp.float8_e4m3fn)}
if jax.__version_info__ < (0, 11):
    _CONVERTED.add(jnp.dtype(jnp.bfloat16))

_NO_GRADIENT = (
    "what is held as integers (pallas_attn.bits.hold) has no gradient: stop it by jax.lax.stop_gradient, or"
    " differentiate by floats, as pallas_attn.bits.floats gives them"
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Bits:
    """An array of small floats, held as integers.

    Attributes:
      integers: unsigned, as wide as the floats.
      dtype: of the floats; static.
    """

    integers: Array
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
      NotImplementedError: it is differentiated, and turned into integers.
    """
    return _to_integers(x) if _is_converted(x) else x


def hold(x: Tree) -> Tree:
    """The same tree with :class:`Bits` for every array that :func:`integers` changes; raises as it does."""

    def held(x: Array) -> Array | Bits:
        return Bits(integers(x), x.dtype) if _is_converted(x) else x

    return jax.tree.map(held, x)


def floats(x: Tree) -> Tree:
    """What :func:`hold` was given."""

    def array(x: Array | Bits) -> Array:
        return lax.bitcast_convert_type(x.integers, x.dtype) if isinstance(x, Bits) else x

    return jax.tree.map(array, x, is_leaf=_is_held)


def like(x: Tree, held: Tree) -> Tree:
    """``held``, what :func:`hold` makes of a tree like ``x``, with floats again where ``x`` has them."""
    return jax.tree.map(lambda x, held: held if _is_held(x) else floats(held), x, held, is_leaf=_is_held)


def move(function: Callable[..., Array], arrays: tuple[Array | Bits, ...], *indices: Array) -> Array | Bits:
    """``function(*arrays, *indices)``, which moves numbers and changes none, by integers where that is faster.

    Args:
      function: linear in its arrays, in a form that JAX can transpose. So it is its own derivative.
      arrays: of one dtype; the result is held as the first of them is.
      indices: integers.

    Raises:
      NotImplementedError: a derivative with a first array that is held as integers.
    """
    first = arrays[0]
    if not _is_held(first) and not _is_converted(first):
        return function(*arrays, *indices)

    def by_integers(arrays: tuple[Array | Bits, ...], indices: tuple[Array, ...]) -> Array | Bits:
        moved = Bits(function(*jax.tree.leaves(hold(arrays)), *indices), first.dtype)
        return like(arrays[0], moved)

    if _is_held(first):
        return by_integers(arrays, indices)
    call = jax.custom_jvp(by_integers)

    @call.defjvp
    def derivative(primals, tangents):
        return call(*primals), function(*tangents[0], *primals[1])

    return call(arrays, indices)


@jax.custom_jvp
def _to_integers(x: Array) -> Array:
    return lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")


@_to_integers.defjvp
def _refuse(primals, tangents):
    raise NotImplementedError(_NO_GRADIENT)


def _is_converted(x: Array) -> bool:
    return x.dtype in _CONVERTED and jax.default_backend() == "cpu"


def _is_held(x: object) -> bool:
    return isinstance(x, Bits)
