"""Registers dataclasses as pytrees whose structures differ between classes with the same fields.

``jax.tree_util.register_dataclass`` is not enough: it treats the structures of two classes with equal fields, such as
Causal and Full, as equal. If their hashes also collide in a table, ``jax.jit`` runs the program of one for the other.
"""

from collections.abc import Iterable
from typing import Any

import jax
from jax.tree_util import GetAttrKey


def register(cls: type, *, data: tuple[str, ...], static: tuple[str, ...]) -> type:
    """Registers a dataclass as a pytree whose structure includes its class; returns the class.

    Args:
      cls: a dataclass whose constructor takes its fields by keyword.
      data: traced fields.
      static: fields in the structure; they need ``==`` and a hash.
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
