"""Finds the loops over blocks and the mask operations in the Triton IR of a kernel."""

import dataclasses
import math
import re
from collections.abc import Iterator

from jax._src.lib.triton import dialect as triton_dialect
from jaxlib.mlir import ir


@dataclasses.dataclass(frozen=True)
class Loop:
    """A loop over blocks.

    Attributes:
      lines: its lines, without those of nested loops.
      multiply_adds: multiply-adds of its 16-bit products, per trip.
      tiles: bytes of the tiles of numbers that it loads per trip, by line; a compared tile holds booleans.
    """

    lines: frozenset[int]
    multiply_adds: int
    tiles: dict[int, int]


@dataclasses.dataclass(frozen=True)
class MaskLines:
    """Lines with mask operations on tensors; scalar ones control loops and addresses.

    Attributes:
      logic: compares, selects and logic of booleans.
      loads: masked loads.
    """

    logic: frozenset[int]
    loads: frozenset[int]


def read(text: str) -> tuple[list[Loop], MaskLines]:
    """The loops over blocks, in text order, and the lines of masks.

    Loops over blocks have matrix products; in a kernel without products, they have loads.
    """
    with ir.Context() as context:
        triton_dialect.register_dialect(context)
        context.allow_unregistered_dialects = True
        module = ir.Module.parse(text)
        bodies = [(x, list(_walk(x, into_loops=False))) for x in _walk(module.operation) if x.name == "scf.for"]
        loops = _loops(bodies, "tt.dot") or _loops(bodies, "tt.load")
        logic, loads = set(), set()
        for operation in _walk(module.operation):
            types = [str(value.type) for value in (*operation.operands, *operation.results)]
            if not any(x.startswith("tensor<") for x in types):
                continue
            of_booleans = operation.name in ("arith.andi", "arith.ori", "arith.xori") and types[-1].endswith("xi1>")
            if of_booleans or operation.name in ("arith.cmpi", "arith.cmpf", "arith.select"):
                logic.add(_line(operation))
            elif operation.name == "tt.load" and len(operation.operands) > 1:
                loads.add(_line(operation))
    return loops, MaskLines(frozenset(logic), frozenset(loads))


def _walk(operation, *, into_loops: bool = True) -> Iterator:
    for region in operation.regions:
        for block in region.blocks:
            for child in block.operations:
                child = child.operation
                yield child
                if into_loops or child.name != "scf.for":
                    yield from _walk(child, into_loops=into_loops)


def _loops(bodies: list[tuple], name: str) -> list[Loop]:
    """The loops with an operation of that name."""
    return [_loop(operation, body) for operation, body in bodies if any(x.name == name for x in body)]


def _loop(operation, body: list) -> Loop:
    products = [x for x in body if x.name == "tt.dot"]
    return Loop(
        lines=frozenset({_line(operation)} | {_line(x) for x in body if x.name != "scf.for"}),
        multiply_adds=sum(map(_multiply_adds, products)),
        tiles={_line(x): size for x in body if (size := _tile_bytes(x))},
    )


def _multiply_adds(product) -> int:
    m, k, bits = _tile(product.operands[0])
    _, n, _ = _tile(product.operands[1])
    return m * n * k if bits == 16 else 0


def _tile_bytes(operation) -> int:
    users = [use.owner.name for use in operation.results[0].uses] if operation.name == "tt.load" else []
    # Pallas lowers a store to a swap, whose unused load the compiler removes.
    if not users or "arith.cmpi" in users:
        return 0
    return math.prod(_tile(operation.results[0])) // 8


def _tile(value) -> tuple[int, int, int]:
    """Rows, columns and bits per element of a tile of numbers; zeros for anything else."""
    found = re.fullmatch(r"tensor<(\d+)x(\d+)x(?:b?f|i)(\d+)>", str(value.type))
    return (int(found[1]), int(found[2]), int(found[3])) if found else (0, 0, 0)


def _line(operation) -> int:
    found = re.search(r":(\d+):\d+", str(operation.location))
    if found is None:
        raise ValueError(f"{operation.name}: expected a location with a line, got {operation.location}")
    return int(found[1])
