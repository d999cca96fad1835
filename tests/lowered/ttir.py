"""Triton IR as plain data: functions of operations whose values have numbers. Only this file knows MLIR."""

import dataclasses
import functools
import re
import sys
from collections.abc import Iterable
from typing import Any

import ml_dtypes
import numpy as np
from jax._src.lib.triton import dialect as triton_dialect
from jaxlib.mlir import ir

FLOATS: dict[str, Any] = {
    "f64": np.float64,
    "f32": np.float32,
    "f16": np.float16,
    "bf16": ml_dtypes.bfloat16,
    "f8E4M3FN": ml_dtypes.float8_e4m3fn,
    "f8E5M2": ml_dtypes.float8_e5m2,
}


class Unsupported(NotImplementedError):
    """The interpreter does not know an operation, or a variant of it."""


@dataclasses.dataclass(frozen=True)
class Type:
    """The type of a value.

    Attributes:
      shape: of a tensor; None: a scalar.
      element: "f32", "i1", ...; of a pointer, that of what it points to.
      is_pointer: whether elements are pointers.
    """

    shape: tuple[int, ...] | None
    element: str
    is_pointer: bool = False

    @staticmethod
    @functools.cache
    def of(text: str) -> "Type":
        """From MLIR's text, such as ``tensor<16x32x!tt.ptr<f32>>``."""
        shape = None
        if found := re.fullmatch(r"tensor<((?:\d+x)+)(.*)>", text):
            shape, text = tuple(map(int, found[1].rstrip("x").split("x"))), found[2]
        if found := re.fullmatch(r"!tt\.ptr<(\w+)(?:, \d+)?>", text):
            return Type(shape, found[1], is_pointer=True)
        return Type(shape, text)

    @property
    def dtype(self) -> Any:
        """NumPy's type of floats; None for integers and booleans."""
        return FLOATS.get(self.element)

    @property
    def bits(self) -> int:
        found = re.fullmatch(r"\D+(\d+)\w*", self.element)
        if found is None:
            raise Unsupported(f"values of type {self.element}")
        return int(found[1])

    def full(self, x: Any) -> np.ndarray:
        """All elements of a tensor; values have size 1 along axes that they do not depend on."""
        return np.broadcast_to(x, self.shape or ())


@dataclasses.dataclass(frozen=True)
class Operation:
    """One operation; ``operands`` and ``results`` are numbers of values."""

    name: str
    operands: tuple[int, ...]
    results: tuple[int, ...]
    operand_types: tuple[Type, ...]
    result_types: tuple[Type, ...]
    attributes: dict[str, Any]
    regions: tuple["Block", ...]
    where: str

    @property
    def type(self) -> Type:
        """Of its only result."""
        (only,) = self.result_types
        return only


@dataclasses.dataclass(frozen=True)
class Block:
    """Operations in order. ``yields`` are the operands of the terminator."""

    arguments: tuple[int, ...]
    operations: list[Operation]
    yields: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Function:
    """A kernel; its arguments are pointers to the operands and results of the call."""

    body: Block
    num_values: int


_TERMINATORS = ("scf.yield", "scf.condition", "tt.return", "tt.reduce.return")


def as_text(bytecode: bytes) -> str:
    """The text of a module, with locations in Python."""
    with _context():
        return ir.Module.parse(bytecode).operation.get_asm(enable_debug_info=True)


def read(text: str) -> Function:
    """The only function of a module."""
    with _context():
        module = ir.Module.parse(text)
        (function,) = [x.operation for x in module.body.operations if x.operation.name == "tt.func"]
        reader = _Reader()
        return Function(reader.block(function.regions[0].blocks), len(reader.numbers))


# MLIR looks for Python classes of a dialect whenever it meets an operation, until an import succeeds; the search takes
# most of the time of reading.
sys.modules.setdefault("jaxlib.mlir.dialects.tt", triton_dialect)


def _context() -> ir.Context:
    context = ir.Context()
    triton_dialect.register_dialect(context)
    context.allow_unregistered_dialects = True
    return context


class _Reader:
    """Numbers values in the order of their first appearance."""

    def __init__(self) -> None:
        self.numbers: dict[Any, int] = {}

    def _number_all(self, values: Iterable[Any]) -> tuple[int, ...]:
        return tuple(self.numbers.setdefault(x, len(self.numbers)) for x in values)

    def block(self, blocks: Any) -> Block:
        if len(blocks) > 1:
            raise Unsupported("regions of several blocks")
        if not len(blocks):
            return Block((), [], ())
        arguments, operations = self._number_all(blocks[0].arguments), []
        for child in blocks[0].operations:
            operation = child.operation
            if operation.name in _TERMINATORS:
                return Block(arguments, operations, self._number_all(operation.operands))
            operations.append(self._operation(operation))
        raise Unsupported(f"blocks that end with {operations[-1].name}")

    def _operation(self, operation: Any) -> Operation:
        operands, results = self._number_all(operation.operands), self._number_all(operation.results)
        return Operation(
            operation.name,
            operands,
            results,
            tuple(Type.of(str(x.type)) for x in operation.operands),
            tuple(Type.of(str(x.type)) for x in operation.results),
            _attributes(operation.attributes),
            tuple(self.block(region.blocks) for region in operation.regions),
            _where(operation),
        )


def _where(operation: Any) -> str:
    places = re.findall(r"([\w.]+\.py)\"?:(\d+)", str(operation.location))
    return f"{operation.name} from {' < '.join(':'.join(x) for x in places[:4]) or 'an index map'}"


def _attributes(attributes: Any) -> dict[str, Any]:
    names = [x if isinstance(x, str) else x.name for x in attributes]
    return {name: _python_value(attributes[name]) for name in names}


def _python_value(attribute: Any) -> Any:
    if isinstance(attribute, ir.DenseElementsAttr):
        if not attribute.is_splat:
            raise Unsupported("constants of different elements")
        return _python_value(attribute.get_splat_value())
    if isinstance(attribute, ir.DenseI32ArrayAttr):
        return tuple(attribute)
    if isinstance(attribute, ir.BoolAttr | ir.IntegerAttr | ir.FloatAttr | ir.StringAttr):
        return attribute.value
    return str(attribute)
