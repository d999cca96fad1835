"""What arithmetic operations mean: for each operation, a function of its operands.

Integer scalars are ``int``, integer tensors int64 of the range of their type, booleans ``bool``; floats have their own
dtype.
"""

import operator
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.lowered.faults import Report
from tests.lowered.ttir import Operation, Type, Unsupported

Meaning = Callable[..., Any]

_FLOAT_OPERATIONS: dict[str, Meaning] = {
    "arith.addf": np.add,
    "arith.subf": np.subtract,
    "arith.mulf": np.multiply,
    "arith.divf": np.divide,
    "arith.remf": np.fmod,
    "arith.negf": np.negative,
    "arith.maxnumf": np.fmax,  # a number rather than NaN
    "arith.minnumf": np.fmin,
    "arith.maximumf": np.maximum,
    "arith.minimumf": np.minimum,
}
_LOGIC: dict[str, Meaning] = {
    "arith.andi": operator.and_,
    "arith.ori": operator.or_,
    "arith.xori": operator.xor,
    "arith.maxsi": lambda a, b: max(a, b) if _are_numbers(a, b) else np.maximum(a, b),
    "arith.maxui": lambda a, b: _chosen(_unsigned(a) >= _unsigned(b), a, b),
    "arith.minui": lambda a, b: _chosen(_unsigned(a) <= _unsigned(b), a, b),
    "arith.minsi": lambda a, b: min(a, b) if _are_numbers(a, b) else np.minimum(a, b),
}
# By the names of the dialect "math" and of libdevice.
_FUNCTIONS: dict[str, Meaning] = {
    **{name: getattr(np, name) for name in ("exp", "exp2", "log", "log2", "log1p", "expm1", "tanh", "sqrt", "cbrt")},
    **{name: getattr(np, name) for name in ("sin", "cos", "sinh", "cosh", "floor", "ceil")},
    "rsqrt": lambda x: (1 / np.sqrt(x)).astype(x.dtype),
    **dict.fromkeys(("abs", "absf", "absi", "fabs"), abs),
    **dict.fromkeys(("pow", "powf"), np.power),
    "fma": lambda a, b, c: a * b + c,
}
_ASSEMBLY: dict[str, Meaning] = {
    "ex2.approx.ftz.f32 $0, $1;": lambda x: _flushed(np.exp2(_flushed(x))),
    "sub.rn.f32 $0, $1, $2;": np.subtract,
    "mov.b32 $0, $1;": lambda x: x,
    "tanh.approx.f32 $0, $1;": np.tanh,
}
_EXACT: dict[str, Meaning] = {"arith.addi": operator.add, "arith.subi": operator.sub, "arith.muli": operator.mul}
# An element of an integer tensor that overflowed. Sums and products of it are as far out of range, except by 0.
OVERFLOWED = -0x2AAAAAAAAAAAAAAB
# Loads and stores report it, and operations whose result would hide it.
_NEED_NUMBERS = {"arith.cmpi", "arith.divsi", "arith.remsi", "arith.divui", "arith.remui", "arith.shli", "arith.shrsi"}
_NEED_NUMBERS |= {"arith.shrui", "arith.trunci", "arith.extui", "arith.sitofp", "arith.uitofp", "arith.bitcast"}
_COMPARISONS = (operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge)  # in MLIR's order


def meaning(operation: Operation, report: Report) -> Meaning | None:
    """The function of an arithmetic operation, or None for another one.

    Args:
      report: gets divisions by zero, shifts that are too wide, and numbers that overflow; tensors may overflow in
        elements that are of no use later.
    """
    name = operation.name
    for table in (_FLOAT_OPERATIONS, _LOGIC):
        if name in table:
            return table[name]
    if name in _EXACT:
        return _exact(_EXACT[name], operation.type.bits, report)
    if name in _BUILDERS:
        function = _BUILDERS[name](operation, report)
        return _of_numbers(function, report) if name in _NEED_NUMBERS else function
    if name == "tt.elementwise_inline_asm":
        return _known(_ASSEMBLY, operation.attributes["asm_string"], "inline assembly")
    if name == "tt.extern_elementwise":
        symbol = operation.attributes["symbol"].removeprefix("__nv_")
        return _known(_FUNCTIONS, symbol if symbol in _FUNCTIONS else symbol.removesuffix("f"), "libdevice function")
    if name.startswith("math."):
        return _known(_FUNCTIONS, name.removeprefix("math."), "operation of the dialect math")
    return None


def wrapped(x: Any, bits: int) -> Any:
    """Integers in two's complement."""
    if bits == 1:
        return (x & 1) != 0
    if bits >= 64:
        return x
    half = 1 << (bits - 1)
    return ((x + half) & ((1 << bits) - 1)) - half


def _of_numbers(function: Meaning, report: Report) -> Meaning:
    """The function, which reports tensors with elements that overflowed."""

    def checked(*values: Any) -> Any:
        for x in values:
            if isinstance(x, np.ndarray) and x.dtype == np.int64 and (x == OVERFLOWED).any():
                report("overflow", f"{(x == OVERFLOWED).sum()} numbers of {x.size}")
        return function(*values)

    return checked


def _known(table: dict[str, Meaning], name: str, what: str) -> Meaning:
    if name not in table:
        raise Unsupported(f"{what} {name!r}")
    return table[name]


def _are_numbers(*values: Any) -> bool:
    return all(isinstance(x, int | np.generic) for x in values)


def _unsigned(x: Any) -> np.ndarray:
    """Integers of any width in the order of unsigned ones: extended with their sign, negative ones are the largest."""
    return np.asarray(x, np.int64).view(np.uint64)


def _chosen(condition: np.ndarray, a: Any, b: Any) -> Any:
    x = np.where(condition, a, b)
    return int(x) if _are_numbers(a, b) else x


def _flushed(x: Any) -> Any:
    """Zero instead of numbers below the smallest normal one."""
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.float32(0), x)[()]


def _exact(function: Meaning, bits: int, report: Report) -> Meaning:
    """Integer arithmetic that must not overflow."""
    least, most = -(1 << (bits - 1)), (1 << (bits - 1)) - 1

    def exact(a: Any, b: Any) -> Any:
        x = function(a, b)
        if type(x) is int:
            if not least <= x <= most:
                report("overflow", f"{a} and {b} give {x}, which has more than {bits} bits")
                x = wrapped(x, bits)
        elif bits == 64 and not np.min(x, initial=0) < OVERFLOWED // 2:
            around = np.abs(function(np.asarray(a, np.float64), np.asarray(b, np.float64))).max(initial=0)
            if around >= 2.0**63:
                report("overflow", f"{around} has more than 64 bits")
        elif x.min() < least or x.max() > most:
            # Lanes that no load or store will use may overflow.
            x = np.where((x < least) | (x > most), OVERFLOWED, x)
        return x

    return exact


def _divide(operation: Operation, report: Report) -> Meaning:
    name, mask = operation.name, (1 << operation.type.bits) - 1

    def divide(a: Any, b: Any) -> Any:
        if name.endswith("ui"):
            a, b = a & mask, b & mask
        if np.any(np.equal(b, 0)):
            report("division by zero", name)
            b = 1 if type(b) is int else np.where(np.equal(b, 0), 1, b)
        quotient = abs(a) // abs(b)
        is_negative = (a < 0) != (b < 0)
        quotient = (
            (-quotient if is_negative else quotient)
            if _are_numbers(a, b)
            else np.where(is_negative, -quotient, quotient)
        )
        return quotient if "div" in name else a - quotient * b

    return divide


def _shift(operation: Operation, report: Report) -> Meaning:
    name, bits = operation.name, operation.type.bits

    def shift(a: Any, b: Any) -> Any:
        if np.any(np.less(b, 0)) or np.any(np.greater_equal(b, bits)):
            report("shift too wide", f"by {np.max(b)} of {bits} bits")
        if name == "arith.shli":
            return wrapped(a << b, bits)
        return a >> b if name == "arith.shrsi" else wrapped((a & ((1 << bits) - 1)) >> b, bits)

    return shift


def _compare_integers(operation: Operation, report: Report) -> Meaning:
    predicate = operation.attributes["predicate"]
    if predicate < 6:
        return _COMPARISONS[predicate]
    compare = _COMPARISONS[predicate - 4]
    return lambda a, b: compare(_unsigned(a), _unsigned(b))


def _compare_floats(operation: Operation, report: Report) -> Meaning:
    predicate = operation.attributes["predicate"]
    if predicate in (0, 15):  # always False, always True
        return lambda a, b: (np.isnan(a) | True) if predicate else (np.isnan(a) & False)
    if predicate in (7, 14):  # no NaN, any NaN
        return lambda a, b: (np.isnan(a) | np.isnan(b)) == (predicate == 14)
    is_ordered = predicate < 7
    # After "false" or "no NaN", MLIR has ==, >, >=, <, <=, !=.
    compare = _COMPARISONS[(0, 4, 5, 2, 3, 1)[predicate - (1 if is_ordered else 8)]]
    if is_ordered:
        return lambda a, b: compare(a, b) & ~(np.isnan(a) | np.isnan(b))
    return lambda a, b: compare(a, b) | np.isnan(a) | np.isnan(b)


def _select(operation: Operation, report: Report) -> Meaning:
    if operation.type.is_pointer:
        raise Unsupported("arith.select of pointers")

    def select(condition: Any, a: Any, b: Any) -> Any:
        if isinstance(condition, bool | np.bool_):
            return a if condition else b
        return np.where(condition, a, b)

    return select


def _resize(operation: Operation, report: Report) -> Meaning:
    name, bits, source_bits = operation.name, operation.type.bits, operation.operand_types[0].bits

    def resize(x: Any) -> Any:
        if source_bits == 1:
            x = int(x) if _are_numbers(x) else x.astype(np.int64)
            return -x if name == "arith.extsi" else x
        if name == "arith.extui":
            return x & ((1 << source_bits) - 1)
        return x if name == "arith.extsi" else wrapped(x, bits)

    return resize


def _to_float(operation: Operation, report: Report) -> Meaning:
    dtype, source = operation.type.dtype, operation.operand_types[0]
    mask = (1 << source.bits) - 1 if operation.name == "arith.uitofp" else None

    def convert(x: Any) -> Any:
        x = x if mask is None else x & mask
        return dtype(x) if _are_numbers(x) else x.astype(dtype)

    return convert


def _to_integer(operation: Operation, report: Report) -> Meaning:
    limit = 2.0 ** (operation.type.bits - 1)

    def convert(x: Any) -> Any:
        whole = np.trunc(np.asarray(x, np.float64))
        if not (np.abs(whole) <= limit).all():
            report("overflow", f"a float becomes {operation.type.element}")
            whole = np.where(np.abs(whole) <= limit, whole, 0)
        return int(whole) if whole.ndim == 0 else whole.astype(np.int64)

    return convert


def _bitcast(operation: Operation, report: Report) -> Meaning:
    kind, source = operation.type, operation.operand_types[0]
    if kind.is_pointer:
        if kind.bits != source.bits and {kind.bits, source.bits} != {1, 8}:  # booleans are bytes
            raise Unsupported(f"pointers cast from {source.element} to {kind.element}")
        return lambda pointer: pointer

    def cast(x: Any) -> Any:
        bits = np.asarray(x) if source.dtype else np.asarray(x).astype(f"i{source.bits // 8}")
        if kind.dtype:
            return bits.view(kind.dtype)[()]
        x = bits.view(f"i{bits.itemsize}").astype(np.int64)
        return int(x) if x.ndim == 0 else x

    return cast


def _constant(operation: Operation, report: Report) -> Meaning:
    kind, value = operation.type, operation.attributes["value"]
    number = bool(value) if kind.element == "i1" else (kind.dtype or int)(value)
    return lambda: spread(number, kind)


def spread(x: Any, kind: Type) -> Any:
    """A number as a value of that type; a tensor has size 1 along each axis."""
    if kind.shape is None:
        return x
    x = np.asarray(x)
    return (x.astype(np.int64) if x.dtype.kind == "i" else x).reshape((1,) * len(kind.shape))


def _product(operation: Operation, report: Report) -> Meaning:
    """Matrix products of float32 round to TF32 unless they say otherwise; sums are float32."""
    kinds = operation.operand_types
    if any(kind.dtype is None for kind in kinds):
        raise Unsupported(f"tt.dot of {[kind.element for kind in kinds]}")
    precision = operation.attributes.get("inputPrecision", 0)
    rounds = kinds[0].element == "f32" and precision == 0
    if kinds[0].element == "f32" and precision not in (0, 2):
        raise Unsupported(f"tt.dot of inputPrecision {precision}")

    def product(a: Any, b: Any, c: Any) -> np.ndarray:
        a, b = (kind.full(x).astype(np.float32) for kind, x in zip(kinds, (a, b), strict=False))
        if rounds:
            a, b = _tf32(a), _tf32(b)
        return c + a @ b

    return product


def _tf32(x: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(x).view(np.uint32)
    return ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)


_BUILDERS: dict[str, Callable[[Operation, Report], Meaning]] = {
    "arith.constant": _constant,
    **dict.fromkeys(("arith.divsi", "arith.remsi", "arith.divui", "arith.remui"), _divide),
    **dict.fromkeys(("arith.shli", "arith.shrsi", "arith.shrui"), _shift),
    "arith.cmpi": _compare_integers,
    "arith.cmpf": _compare_floats,
    "arith.select": _select,
    **dict.fromkeys(("arith.extui", "arith.extsi", "arith.trunci"), _resize),
    **dict.fromkeys(("arith.sitofp", "arith.uitofp", "arith.extf", "arith.truncf", "tt.fp_to_fp"), _to_float),
    **dict.fromkeys(("arith.fptosi", "arith.fptoui"), _to_integer),
    **dict.fromkeys(("arith.bitcast", "tt.bitcast"), _bitcast),
    "tt.dot": _product,
}
