"""A user's function of one query and one key, as a list of operations that a kernel evaluates on tiles of pairs.

A program's variables have their shapes for a single pair. Most are numbers and become tiles. A row of a table
(``table[head]``) would be an array per pair, too large for a kernel, but the function eventually indexes it down to a
number (``table[head][bucket]``). So arrays are never materialized: each entry is evaluated lazily, where it is used.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.extend.core import Primitive

from pallas_attn.pointwise import rules
from pallas_attn.pointwise.tables import Index, Tables


@dataclasses.dataclass(frozen=True, eq=False)
class Number:
    """A literal in the function."""

    value: np.generic

    def __str__(self) -> str:
        return f"{self.value.dtype} {self.value.tobytes().hex()}"


# A variable's index, or a literal.
Atom = int | Number


@dataclasses.dataclass(frozen=True, eq=False)
class Op:
    """One operation: an equation of a jaxpr, with indices for variables."""

    primitive: Primitive
    params: dict[str, Any]
    inputs: tuple[Atom, ...]
    outputs: tuple[int, ...]
    in_avals: tuple[Any, ...]  # shape and dtype for a single pair
    out_avals: tuple[Any, ...]

    @property
    def name(self) -> str:
        return self.primitive.name

    @property
    def has_rule(self) -> bool:
        """Whether it is a function with a user-defined derivative rule."""
        return self.name in rules.WITH_DERIVATIVES

    def bind(self, *values: Any) -> list[Any]:
        """Evaluates it for arrays of the traced shapes or, if it is elementwise, of any common shape."""
        results = self.primitive.bind(*values, **self.primitive.get_bind_params(self.params))
        return list(results) if self.primitive.multiple_results else [results]

    def __str__(self) -> str:
        params = str(self.params["call_jaxpr"]) if self.has_rule else repr(sorted(self.params.items()))
        shapes = [(x.shape, str(x.dtype)) for x in (*self.in_avals, *self.out_avals)]
        return f"{self.outputs} = {self.name} {params} {list(map(str, self.inputs))} {shapes}"


@dataclasses.dataclass(frozen=True)
class Program:
    """The pair-dependent operations of a function; everything else has become a table.

    Variables are numbered: first arguments, then tables, then results of operations. Programs with the same operations
    are equal, so retracing a function does not recompile it.

    Attributes:
      text: the whole program as text; programs are compared by it.
      function: the user's, if the program contains derivative rules that the text does not show, else None.
    """

    num_args: int
    dtypes: tuple[np.dtype, ...]  # of the tables' entries
    ops: tuple[Op, ...] = dataclasses.field(compare=False)
    result: Atom = dataclasses.field(compare=False)
    text: str
    function: Callable | None

    @property
    def primitives(self) -> set[str]:
        """The names of its primitives."""
        return {op.name for op in self.ops}

    def reads(self, arg: int) -> bool:
        """Whether the program uses argument number ``arg``."""
        return self.result == arg or any(arg in op.inputs for op in self.ops)

    def evaluate(self, tables: Tables, *args: Array) -> Array:
        """Evaluates the function for all pairs; the arguments broadcast against each other."""
        return _Evaluation(self, tables, args).result()


class _Evaluation:
    """Evaluates entries of a program's variables, once each."""

    def __init__(self, program: Program, tables: Tables, args: Sequence[Array]):
        self._program, self._load, self._args = program, tables.reader(), args
        self._producer = {out: (op, n) for op in program.ops for n, out in enumerate(op.outputs)}
        self._known: dict[tuple, tuple[Index, Any]] = {}  # holds the index too, so that its id is not reused

    def result(self) -> Any:
        for op in self._program.ops:  # in order, so that long chains of numbers do not recurse
            for out, aval in zip(op.outputs, op.out_avals, strict=True):
                if not aval.shape:
                    self.at(out, ())
        return self.at(self._program.result, ())

    def at(self, atom: Atom, index: Index) -> Any:
        """An entry of a variable for all pairs: a tile, or a number shared by all pairs."""
        if isinstance(atom, Number):
            return atom.value
        key = (atom, *((i, True) if isinstance(i, int) else (id(i), False) for i in index))
        if key not in self._known:
            self._known[key] = index, self._entry(atom, index)
        return self._known[key][1]

    def _entry(self, variable: int, index: Index) -> Any:
        num_args, dtypes = self._program.num_args, self._program.dtypes
        if variable < num_args:
            return self._args[variable]
        if variable < num_args + len(dtypes):
            which = variable - num_args
            return self._load(which, index).astype(dtypes[which])
        op, n = self._producer[variable]

        def operand(which: int, index: Index) -> Any:
            return self.at(op.inputs[which], index)

        if not op.has_rule:
            return rules.RULES[op.name](op, operand, (n, *index) if op.primitive.multiple_results else index)
        function = op.bind
        values = rules.broadcast([operand(which, ()) for which in range(len(op.inputs))])
        for _ in np.shape(values[0]) if values else ():
            function = jax.vmap(function)
        return function(*values)[n]
