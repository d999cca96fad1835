"""Reads the Triton IR of a kernel: its loops over blocks, and which of its lines belong to a mask."""

import dataclasses
import math
import re
from collections.abc import Iterator

from jax._src.lib.triton import dialect as triton_dialect
from jaxlib.mlir import ir


@dataclasses.dataclass(frozen=True)
class Loop:
    """A loop with matrix products.

    Attributes:
      lines: of its text, without those of loops inside it.
      multiply_adds: of its products of 16-bit tiles, per trip.
      tile_bytes: of the float tiles that it loads, per trip.
    """

    lines: frozenset[int]
    multiply_adds: int
    tile_bytes: int


@dataclasses.dataclass(frozen=True)
class MaskLines:
    """Lines with operations of a mask, which are those on tensors; scalar ones steer loops and addresses.

    Attributes:
      logic: compares, selects and logic of booleans.
      loads: loads of which a mask excludes a part.
    """

    logic: frozenset[int]
    loads: frozenset[int]


def read(text: str) -> tuple[list[Loop], MaskLines]:
    """The loops with matrix products, in the order of the text, and the lines of masks."""
    with ir.Context() as context:
        triton_dialect.register_dialect(context)
        context.allow_unregistered_dialects = True
        module = ir.Module.parse(text)
        loops = [
            loop for operation in _walk(module.operation) if operation.name == "scf.for" and (loop := _loop(operation))
        ]
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


def _loop(operation) -> Loop | None:
    body = list(_walk(operation, into_loops=False))
    products = [x for x in body if x.name == "tt.dot"]
    if not products:
        return None
    lines = {_line(operation)} | {_line(x) for x in body if x.name != "scf.for"}
    return Loop(frozenset(lines), sum(map(_multiply_adds, products)), sum(map(_tile_bytes, body)))


def _multiply_adds(product) -> int:
    m, k, bits = _tile(product.operands[0])
    _, n, _ = _tile(product.operands[1])
    return m * n * k if bits == 16 else 0


def _tile_bytes(operation) -> int:
    return math.prod(_tile(operation.results[0])) // 8 if operation.name == "tt.load" else 0


def _tile(value) -> tuple[int, int, int]:
    """Rows, columns and bits per element of a tile of floats; zeros for anything else."""
    found = re.fullmatch(r"tensor<(\d+)x(\d+)xb?f(\d+)>", str(value.type))
    return (int(found[1]), int(found[2]), int(found[3])) if found else (0, 0, 0)


def _line(operation) -> int:
    found = re.search(r":(\d+):\d+", str(operation.location))
    if found is None:
        raise ValueError(f"{operation.name}: an operation without a line: {operation.location}")
    return int(found[1])
