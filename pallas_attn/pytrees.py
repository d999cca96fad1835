"""Dataclasses as pytrees, where classes with the same fields stand in the same place.

``jax.tree_util.register_dataclass`` is not enough there: it calls two structures equal whose classes differ and whose
fields do not. Causal and Full are such a pair. Where, by chance, their hashes meet in a table as well, ``jax.jit`` runs
the program of the one for the other.
"""

from collections.abc import Iterable
from typing import Any

import jax
from jax.tree_util import GetAttrKey


def register(cls: type, *, data: tuple[str, ...], static: tuple[str, ...]) -> type:
    """Makes a dataclass a pytree whose structure knows its class; returns the class.

    Args:
      cls: a dataclass that is made from its fields by keyword.
      data: fields that are traced.
      static: fields that are part of the structure, with ``==`` and a hash.
    """

    def flatten(x: Any) -> tuple[tuple, tuple]:
        return tuple(getattr(x, name) for name in data), tuple(getattr(x, name) for name in static)

    def flatten_with_keys(x: Any) -> tuple[tuple, tuple]:
        children, rest = flatten(x)
        return tuple(zip(map(GetAttrKey, data), children, strict=True)), rest

    def unflatten(rest: tuple, children: Iterable) -> Any:
        return cls(**dict(zip(data, children, strict=True)), **dict(zip(static, rest, strict=True)))

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls
