"""Watched memory: a buffer of exactly as many elements as each operand and result of a call has."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from tests.lowered.arithmetic import OVERFLOWED
from tests.lowered.faults import Report
from tests.lowered.ttir import Type

# The bits of elements that nobody wrote: quiet NaNs that no computation produces, and an integer that no list contains.
# Later kernels recognize them. Types of one byte have no bits to spare.
_POISON = {"float32": 0x7FC0DEAD, "bfloat16": 0x7FDE, "float16": 0x7EDE, "int32": 0x5EADBEEF}


class Access(NamedTuple):
    """Who reads or writes: the number of a program in its grid, and its report of faults."""

    program: int
    report: Report


class Buffer:
    """The memory of one operand or result, by offsets in elements."""

    def __init__(self, name: str, shape: tuple[int, ...], dtype: Any, *, is_output: bool):
        self.name, self.shape, self.size, self.is_output = name, shape, math.prod(shape), is_output
        self.dtype = np.dtype(dtype)
        # Kernels see integers as signed and booleans as bytes.
        self.is_integer = self.dtype.kind in "iub"

    def place(self, offset: int) -> str:
        """An element in words."""
        if 0 <= offset < self.size:
            return f"{self.name} at {list(map(int, np.unravel_index(offset, self.shape)))}"
        return f"{self.name} at element {offset} of {self.size}"

    def read(self, offset: Any, live: Any, access: Access) -> Any:
        """Elements at offsets within bounds; where ``live`` is False, they are of no use. Integers become int64."""
        raise NotImplementedError

    def write(self, offset: np.ndarray, values: np.ndarray, access: Access) -> None:
        """Writes a vector of elements to offsets within bounds."""
        raise NotImplementedError


class ArrayBuffer(Buffer):
    """A buffer of NumPy memory that knows who read and who wrote each element."""

    def __init__(self, name: str, array: np.ndarray, *, is_output: bool):
        super().__init__(name, array.shape, array.dtype, is_output=is_output)
        flat = np.array(array).reshape(-1)
        self.unwritten = _is_poison(flat)
        self._any_unwritten = is_output or bool(self.unwritten.any())
        self._data = flat.view(f"i{flat.itemsize}") if self.is_integer else flat
        if is_output:
            self._writer, self._reader = np.full(self.size, -1), np.full(self.size, -1)
            self._lane = np.zeros(self.size, np.int64)

    @staticmethod
    def result(name: str, shape: tuple[int, ...], dtype: Any) -> "ArrayBuffer":
        """A buffer that nobody wrote."""
        return ArrayBuffer(name, poison(math.prod(shape), dtype).reshape(shape), is_output=True)

    @property
    def array(self) -> np.ndarray:
        return self._data.view(self.dtype).reshape(self.shape)

    def read(self, offset: Any, live: Any, access: Access) -> Any:
        if self._any_unwritten:
            self._check_read(offset, live, access)
        x = self._data[offset]
        return x.astype(np.int64) if self.is_integer else x

    def write(self, offset: np.ndarray, values: np.ndarray, access: Access) -> None:
        if not offset.size:
            return
        if not self.is_integer and values.dtype != self._data.dtype:
            raise TypeError(f"{self.name}: {values.dtype} stored as {self._data.dtype}")
        self._check_write(offset, access)
        self._data[offset] = values
        self.unwritten[offset] = False
        self._writer[offset] = access.program

    def _check_read(self, offset: Any, live: Any, access: Access) -> None:
        if live is not None:
            offset, live = np.broadcast_arrays(offset, live)
            offset = offset[live]
        offset = np.atleast_1d(offset).reshape(-1)
        missing = self.unwritten[offset]
        if missing.any():
            access.report("unwritten read", f"{missing.sum()} lanes, the first {self.place(offset[missing][0])}")
        if not self.is_output:
            return
        # There is no barrier between a write and a read, even of one program.
        written = self._writer[offset] >= 0
        if written.any():
            access.report("read after write", f"{self.place(offset[written][0])}, {self._writer_of(offset, access)}")
        seen = self._reader[offset]
        several = -2
        self._reader[offset] = np.where((seen == -1) | (seen == access.program), access.program, several)

    def _check_write(self, offset: np.ndarray, access: Access) -> None:
        lane = np.arange(offset.size)
        self._lane[offset] = lane
        twice = self._lane[offset] != lane
        if twice.any():
            access.report("two lanes", f"{twice.sum()} lanes of one store, the first {self.place(offset[twice][0])}")
        written = self._writer[offset] >= 0
        if written.any():
            where = f"{written.sum()} lanes, the first {self.place(offset[written][0])}"
            access.report("two writes", f"{where}, {self._writer_of(offset, access)}")
        reader = self._reader[offset]
        other = (reader != -1) & (reader != access.program)
        if other.any():
            access.report("write after read", f"{self.place(offset[other][0])}, which another program reads")

    def _writer_of(self, offset: np.ndarray, access: Access) -> str:
        writers = self._writer[offset]
        writer = writers[writers >= 0][0]
        return f"written by {'the same program' if writer == access.program else f'program number {writer}'}"


class VirtualBuffer(Buffer):
    """A buffer of any size without memory. Its elements are a function of their offsets; writes change nothing."""

    def __init__(self, name: str, shape: tuple[int, ...], dtype: Any, value: Callable | float, *, is_output: bool):
        super().__init__(name, shape, dtype, is_output=is_output)
        self._value = value
        self.highest = -1  # offset of a read or write

    def read(self, offset: Any, live: Any, access: Access) -> Any:
        self.highest = max(self.highest, int(np.max(offset, initial=-1)))
        x = self._value(offset) if callable(self._value) else self._value
        return np.broadcast_to(x, np.shape(offset)).astype(np.int64 if self.is_integer else self.dtype)[()]

    def write(self, offset: np.ndarray, values: np.ndarray, access: Access) -> None:
        self.highest = max(self.highest, int(offset.max(initial=-1)))


@dataclasses.dataclass(frozen=True)
class Pointer:
    """One pointer, or a tensor of pointers: elements of a buffer."""

    buffer: Buffer
    offset: Any


def within(pointer: Pointer, live: Any, kind: Type, report: Report) -> tuple[Any, Any]:
    """The offsets of a load or store, and its live lanes (None: all), without those out of bounds, which are reported.

    Offsets of other lanes are within the buffer, too.
    """
    buffer, offset = pointer.buffer, np.asarray(pointer.offset)
    if live is not None:
        offset = np.where(live, offset, 0)
    if offset.size and (offset.min() < 0 or offset.max() >= buffer.size):
        lanes = kind.full(offset).reshape(-1)
        if (lanes < OVERFLOWED // 2).any():
            report("overflow", f"{(lanes < OVERFLOWED // 2).sum()} of {lanes.size} offsets into {buffer.name}")
        wrong = lanes[((lanes < 0) & (lanes >= OVERFLOWED // 2)) | (lanes >= buffer.size)]
        if wrong.size:
            ends = f"{buffer.place(int(wrong.min()))} to {buffer.place(int(wrong.max()))}"
            report("out of bounds", f"{wrong.size} of {lanes.size} lanes, {ends}")
        inside = (offset >= 0) & (offset < buffer.size)
        offset, live = np.where(inside, offset, 0), inside if live is None else live & inside
    return offset[()], live


def poison(size: int, dtype: Any) -> np.ndarray:
    """Elements that nobody wrote; in floats NaN."""
    dtype = np.dtype(dtype)
    if dtype.name not in _POISON:
        return np.full(size * dtype.itemsize, 0x5E, np.uint8).view(dtype)
    return np.full(size, _POISON[dtype.name], f"u{dtype.itemsize}").view(dtype)


def undefined(kind: Type) -> Any:
    """An element of which nothing is known, as excluded lanes of a load without a default."""
    if kind.element == "i1":
        return True
    return poison(1, kind.dtype)[0] if kind.dtype else poison(1, f"i{kind.bits // 8}")[0].astype(np.int64)


def _is_poison(x: np.ndarray) -> np.ndarray:
    if x.dtype.name not in _POISON:
        return np.zeros(x.shape, bool)
    return x.view(f"u{x.dtype.itemsize}") == _POISON[x.dtype.name]
