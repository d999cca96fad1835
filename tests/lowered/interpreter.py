"""Runs a lowered kernel, one program of its grid after the other.

Every operation becomes a closure over the numbers of its operands and results in one list of values. What depends on
constants alone is computed once.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from tests.lowered import arithmetic, tensors
from tests.lowered.faults import Report, Watch
from tests.lowered.memory import Access, ArrayBuffer, Buffer, Pointer, undefined, within
from tests.lowered.simplify import simplified
from tests.lowered.ttir import Block, Operation, Unsupported, read

Values = list[Any]
Step = Callable[[Values], None]
Grid = tuple[int, int, int]


class Kernel:
    """A lowered kernel, ready to run."""

    def __init__(self, name: str, text: str, grid: Grid):
        self.name, self.grid = name, grid
        self._watch, self._program, self._index = Watch(), (0, 0, 0), 0
        function = simplified(read(text))
        self._values: Values = [None] * function.num_values  # at the start of a program
        self._constants: set[int] = set()
        self._arguments = function.body.arguments
        with np.errstate(all="ignore"):
            self._run_body = self._block(function.body)

    def run(
        self,
        operands: Sequence[np.ndarray],
        results: Sequence[tuple],
        watch: Watch,
        *,
        aliases: Mapping[int, int] = MappingProxyType({}),
        is_complete: bool = True,
    ) -> list[np.ndarray]:
        """Runs all programs.

        Args:
          results: shapes and dtypes.
          watch: gets the faults.
          aliases: from an operand to the result in the same memory.
          is_complete: whether the programs must write every element of the results.
        """
        buffers = [ArrayBuffer(f"operand {i}", x, is_output=i in aliases) for i, x in enumerate(operands)]
        of_operand = {result: buffers[operand] for operand, result in aliases.items()}
        new = [of_operand.get(i) or ArrayBuffer.result(f"result {i}", *x) for i, x in enumerate(results)]
        self.run_on([*buffers, *new], watch)
        for buffer in new:
            if is_complete and buffer not in of_operand.values() and buffer.unwritten.any():
                places = np.flatnonzero(buffer.unwritten)
                detail = f"{places.size} of {buffer.size} elements, the first {buffer.place(int(places[0]))}"
                watch.report("never written", self.name, buffer.name, None, detail)
        return [buffer.array for buffer in new]

    def run_on(self, buffers: Sequence[Buffer], watch: Watch, programs: Iterable[Grid] | None = None) -> None:
        """Runs some programs of the grid, by default all, on the buffers of operands and results."""
        if len(buffers) != len(self._arguments):
            raise ValueError(f"buffers: expected {len(self._arguments)} for {self.name}, got {len(buffers)}")
        self._watch, initial = watch, list(self._values)
        for number, buffer in zip(self._arguments, buffers, strict=True):
            initial[number] = Pointer(buffer, 0)
        x_size, y_size, z_size = self.grid
        if programs is None:
            programs = ((x, y, z) for z, y, x in itertools.product(range(z_size), range(y_size), range(x_size)))
        with np.errstate(all="ignore"):
            for x, y, z in programs:
                self._program, self._index = (x, y, z), x + x_size * (y + y_size * z)
                self._run_body(list(initial))
                watch.programs[self.name] += 1

    def _report_at(self, where: str) -> Report:
        return lambda kind, detail: self._watch.report(kind, self.name, where, self._program, detail)

    def _block(self, block: Block) -> Callable[[Values], list[Any]]:
        steps = [step for operation in block.operations if (step := self._step(operation)) is not None]
        yields = block.yields

        def run(values: Values) -> list[Any]:
            for step in steps:
                step(values)
            return [values[number] for number in yields]

        return run

    def _step(self, operation: Operation) -> Step | None:
        """None for what is constant."""
        if operation.name in _CONTROL:
            return _CONTROL[operation.name](self, operation)
        faults: list[str] = []
        # A fault counts only where a program meets it.
        early = self._meaning(operation, lambda kind, detail: faults.append(kind))
        if early is not None and self._constants.issuperset(operation.operands):
            value = early(*[self._values[number] for number in operation.operands])
            if not faults:
                self._values[operation.results[0]] = value
                self._constants.update(operation.results)
                return None
        function = self._meaning(operation, self._report_at(operation.where))
        if function is None:
            raise Unsupported(f"{operation.name} of {operation.result_types}, {operation.where}")
        return _call(function, operation)

    def _meaning(self, operation: Operation, report: Report) -> arithmetic.Meaning | None:
        return arithmetic.meaning(operation, report) or tensors.meaning(operation)

    # control

    def _program_id(self, operation: Operation) -> Step:
        (result,), axis = operation.results, operation.attributes["axis"]

        def step(values: Values) -> None:
            values[result] = self._program[axis]

        return step

    def _num_programs(self, operation: Operation) -> Step:
        (result,), axis = operation.results, operation.attributes["axis"]

        def step(values: Values) -> None:
            values[result] = self.grid[axis]

        return step

    def _for(self, operation: Operation) -> Step:
        if "unsignedCmp" in operation.attributes:
            raise Unsupported("scf.for with unsigned bounds")
        first, last, stride, *initial = operation.operands
        (block,) = operation.regions
        (counter, *carried), run = block.arguments, self._block(block)

        def step(values: Values) -> None:
            state = [values[number] for number in initial]
            for i in range(values[first], values[last], values[stride]):
                values[counter] = i
                _put(values, carried, state)
                state = run(values)
            _put(values, operation.results, state)

        return step

    def _while(self, operation: Operation) -> Step:
        before, after = operation.regions
        run_before, run_after = self._block(before), self._block(after)

        def step(values: Values) -> None:
            _put(values, before.arguments, [values[number] for number in operation.operands])
            goes_on, *state = run_before(values)
            while goes_on:
                _put(values, after.arguments, state)
                _put(values, before.arguments, run_after(values))
                goes_on, *state = run_before(values)
            _put(values, operation.results, state)

        return step

    def _if(self, operation: Operation) -> Step:
        (condition,) = operation.operands
        then, otherwise = map(self._block, operation.regions)

        def step(values: Values) -> None:
            _put(values, operation.results, (then if values[condition] else otherwise)(values))

        return step

    def _reduce(self, operation: Operation) -> Step:
        """In halves, as a tree."""
        axis, (block,) = operation.attributes["axis"], operation.regions
        run, is_scalar = self._block(block), operation.result_types[0].shape is None

        def step(values: Values) -> None:
            pairs = zip(operation.operand_types, operation.operands, strict=True)
            state = [np.moveaxis(kind.full(values[number]), axis, 0) for kind, number in pairs]
            while (size := len(state[0])) > 1:
                _put(values, block.arguments, [half for i in (0, size // 2) for half in _part(state, i, size // 2)])
                state = run(values)
            _put(values, operation.results, [_number(x[0]) if is_scalar else x[0] for x in state])

        return step

    def _split(self, operation: Operation) -> Step:
        (source,), (kind,) = operation.operands, operation.operand_types

        def step(values: Values) -> None:
            x = kind.full(values[source])
            _put(values, operation.results, [x[..., 0], x[..., 1]])

        return step

    # memory

    def _load(self, operation: Operation) -> Step:
        kind, report = operation.type, self._report_at(operation.where)
        pointer, *options = operation.operands
        if operation.attributes.get("operandSegmentSizes", (1, len(options), 0))[1] == 0 and options:
            raise Unsupported("tt.load with a default and without a mask")
        mask, other = [*options, None, None][:2]

        def step(values: Values) -> None:
            at, live = values[pointer], None if mask is None else values[mask]
            # Undefined elements of a list could make a loop endless, so lanes out of bounds get an element, too.
            offset, _ = within(at, live, kind, report)
            x = at.buffer.read(offset, live, Access(self._index, report))
            if kind.element == "i1":
                x = x != 0
            if live is not None:
                x = np.where(live, x, undefined(kind) if other is None else values[other])
            values[operation.results[0]] = _number(x) if kind.shape is None else x

        return step

    def _store(self, operation: Operation) -> Step:
        pointer, value, *options = operation.operands
        kind, report = operation.operand_types[1], self._report_at(operation.where)

        def step(values: Values) -> None:
            at, live = values[pointer], values[options[0]] if options else None
            if not at.buffer.is_output:
                report("write to an operand", at.buffer.name)
                return
            offset, live = within(at, live, kind, report)
            offset, x = (kind.full(np.asarray(y)).reshape(-1) for y in (offset, values[value]))
            if live is not None:
                chosen = kind.full(live).reshape(-1)
                offset, x = offset[chosen], x[chosen]
            at.buffer.write(offset, x, Access(self._index, report))

        return step


_CONTROL: dict[str, Callable[[Kernel, Operation], Step]] = {
    "tt.get_program_id": Kernel._program_id,
    "tt.get_num_programs": Kernel._num_programs,
    "scf.for": Kernel._for,
    "scf.while": Kernel._while,
    "scf.if": Kernel._if,
    "tt.reduce": Kernel._reduce,
    "tt.split": Kernel._split,
    "tt.load": Kernel._load,
    "tt.store": Kernel._store,
}


def _call(function: Callable[..., Any], operation: Operation) -> Step:
    (result,) = operation.results
    match operation.operands:
        case (a,):

            def step(values: Values) -> None:
                values[result] = function(values[a])

        case (a, b):

            def step(values: Values) -> None:
                values[result] = function(values[a], values[b])

        case operands:

            def step(values: Values) -> None:
                values[result] = function(*[values[number] for number in operands])

    return step


def _put(values: Values, numbers: Sequence[int], state: Sequence[Any]) -> None:
    for number, x in zip(numbers, state, strict=True):
        values[number] = x


def _part(state: list[np.ndarray], start: int, size: int) -> list[np.ndarray]:
    return [x[start : start + size] for x in state]


def _number(x: Any) -> Any:
    """A scalar; integers as ``int``."""
    x = np.asarray(x)[()]
    return int(x) if isinstance(x, np.integer) else x
