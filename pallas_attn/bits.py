"""Small floats held as integers, for XLA on a CPU cannot read or write a part of an array of them.

It has no slice, gather or scatter of 8-bit floats, and before JAX 0.11 none of bfloat16: it converts the whole array to
larger floats and back. Nor does it see that integers of the same bits lie in memory already: to turn an array into them
is a pass over it, too. But there and back again is nothing. So what is kept is held as integers, and who reads a part
takes the integers of the whole, then the part, then the floats.
"""

import dataclasses
from typing import TypeVar

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
    """``x`` in a dtype of which parts can be read and written: unsigned integers, or as it is."""
    if x.dtype not in _CONVERTED or jax.default_backend() != "cpu":
        return x
    return lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")


def hold(x: Tree) -> Tree:
    """The same tree with :class:`Bits` for every array that :func:`integers` changes."""

    def held(x: Array) -> Array | Bits:
        same = integers(x)
        return x if same is x else Bits(same, x.dtype)

    return jax.tree.map(held, x)


def floats(x: Tree) -> Tree:
    """What :func:`hold` was given."""

    def array(x: Array | Bits) -> Array:
        return lax.bitcast_convert_type(x.integers, x.dtype) if isinstance(x, Bits) else x

    return jax.tree.map(array, x, is_leaf=lambda x: isinstance(x, Bits))
