"""What operations on the shapes of tensors and on pointers mean: for each operation, a function of its operands.

A tensor has size 1 along axes that it does not depend on, so ``tt.broadcast`` returns its operand.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from tests.lowered.arithmetic import Meaning, spread
from tests.lowered.memory import Pointer
from tests.lowered.ttir import Operation, Unsupported


def meaning(operation: Operation) -> Meaning | None:
    """The function of an operation on shapes or pointers, or None for another one."""
    builder = _BUILDERS.get(operation.name)
    return None if builder is None else builder(operation)


def _of_offsets(function: Callable[[Any], Any]) -> Meaning:
    """Rearranges values; of pointers, their offsets."""

    def rearrange(x: Any) -> Any:
        return Pointer(x.buffer, function(x.offset)) if isinstance(x, Pointer) else function(x)

    return rearrange


def _add_offset(operation: Operation) -> Meaning:
    return lambda pointer, offset: Pointer(pointer.buffer, pointer.offset + offset)


def _make_range(operation: Operation) -> Meaning:
    start, end = operation.attributes["start"], operation.attributes["end"]
    return lambda: np.arange(start, end)


def _expand_dims(operation: Operation) -> Meaning:
    axis = operation.attributes["axis"]
    return _of_offsets(lambda x: np.expand_dims(x, axis))


def _transpose(operation: Operation) -> Meaning:
    order = operation.attributes["order"]
    return _of_offsets(lambda x: np.transpose(x, order))


def _reshape(operation: Operation) -> Meaning:
    if operation.attributes.get("allow_reorder") in (True, "unit"):
        raise Unsupported("tt.reshape that may reorder")
    (source,), shape = operation.operand_types, operation.type.shape or ()
    return _of_offsets(lambda x: source.full(x).reshape(shape))


def _join(operation: Operation) -> Meaning:
    first, second = operation.operand_types
    return lambda a, b: np.stack([first.full(a), second.full(b)], -1)


def _concatenate(operation: Operation) -> Meaning:
    first, second = operation.operand_types
    return lambda a, b: np.concatenate([first.full(a), second.full(b)])


def _only_element(x: Any) -> Any:
    x = np.asarray(x).reshape(-1)[0]
    return int(x) if x.dtype.kind == "i" else x


_BUILDERS: dict[str, Callable[[Operation], Meaning]] = {
    "tt.addptr": _add_offset,
    "tt.make_range": _make_range,
    "tt.splat": lambda operation: _of_offsets(lambda x: spread(x, operation.type)),
    "tt.unsplat": lambda operation: _only_element,
    "tt.broadcast": lambda operation: lambda x: x,
    "tt.expand_dims": _expand_dims,
    "tt.trans": _transpose,
    "tt.reshape": _reshape,
    "tt.join": _join,
    "tt.cat": _concatenate,
}
