"""Removes operations without effect: those that nobody uses, and repetitions.

Pallas lowers every index map to a hundred scalar operations, most of them alike or unused, and every store to a swap,
whose load is unused. Triton's compiler removes them too.
"""

import dataclasses
from collections.abc import Hashable

from tests.lowered.ttir import Block, Function, Operation

_HAS_EFFECTS = {"tt.store", "scf.for", "scf.while", "scf.if"}


def simplified(function: Function) -> Function:
    """The same function with fewer operations."""
    body = _without_repetitions(function.body, {}, {})
    return dataclasses.replace(function, body=_without_unused(body, set()))


def _without_repetitions(block: Block, known: dict[Hashable, tuple[int, ...]], same: dict[int, int]) -> Block:
    """Replaces an operation by an equal one before it, in this block or around it.

    Args:
      known: results by what determines them.
      same: the value to use instead of another one; extended in place.
    """
    operations = []
    for operation in block.operations:
        operands = tuple(same.get(x, x) for x in operation.operands)
        regions = tuple(_without_repetitions(x, dict(known), same) for x in operation.regions)
        operation = dataclasses.replace(operation, operands=operands, regions=regions)
        if not regions and operation.name not in _HAS_EFFECTS | {"tt.load"}:
            key = _key(operation)
            if key in known:
                same |= dict(zip(operation.results, known[key], strict=True))
                continue
            known[key] = operation.results
        operations.append(operation)
    return Block(block.arguments, operations, tuple(same.get(x, x) for x in block.yields))


def _key(operation: Operation) -> Hashable:
    attributes = tuple(sorted((name, repr(x)) for name, x in operation.attributes.items()))
    return operation.name, operation.operands, operation.result_types, attributes


def _without_unused(block: Block, used: set[int]) -> Block:
    """``used`` has the values that later operations need, and is extended in place."""
    used |= set(block.yields)
    operations: list[Operation] = []
    for operation in reversed(block.operations):
        is_needed = operation.name in _HAS_EFFECTS or operation.attributes.get("isVolatile")
        if not is_needed and used.isdisjoint(operation.results):
            continue
        used |= set(operation.operands)
        regions = tuple(_without_unused(x, used) for x in operation.regions)
        operations.append(dataclasses.replace(operation, regions=regions))
    return Block(block.arguments, operations[::-1], block.yields)
