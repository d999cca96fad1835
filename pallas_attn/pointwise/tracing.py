"""Traces a user's Python function into a program and its tables.

The function is traced for a single pair of scalars. Arrays and tracers in its closure become constants of the trace.
Operations on these alone are the same for all pairs: they run before any kernel, and their results, with the remaining
constants, are the tables. So every trace reads the closure, its values are data and not part of the program, and JAX
differentiates the path from them to the tables.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.extend.core import ClosedJaxpr, Literal

from pallas_attn.pointwise import rules
from pallas_attn.pointwise.program import Atom, Number, Op, Program
from pallas_attn.pointwise.tables import Tables, is_floating

_INLINED = frozenset({"jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint"})
# Loops of at most this many iterations are unrolled.
_MOST_ITERATIONS = 64


class Trace(NamedTuple):
    """A program, and a function that computes its tables."""

    program: Program
    tables: Callable[[], Tables]


def trace(name: str, function: Callable[..., Any], wrapped: Callable[..., Array], dtypes: tuple[Any, ...]) -> Trace:
    """Traces a function of one pair.

    Args:
      name: the function's name in messages.
      function: the user's.
      wrapped: the function to trace: calls ``function`` and checks its result, a number.
      dtypes: of the arguments, which are numbers.

    Raises:
      NotImplementedError: kernels cannot evaluate the function.
      TypeError: it indexes a NumPy array by a traced value, or passes one to NumPy.
    """
    try:
        jaxpr = jax.make_jaxpr(wrapped)(*(jax.ShapeDtypeStruct((), dtype) for dtype in dtypes))
    except jax.errors.TracerArrayConversionError as error:
        raise TypeError(
            f"{name}: expected jax.numpy for everything that depends on the arguments, got a NumPy array indexed by one"
            " (convert it with jax.numpy.asarray), or a NumPy function"
        ) from error
    if jaxpr.effects:
        raise NotImplementedError(f"{name}: expected a function without side effects, got {set(jaxpr.effects)}")
    flat = _Flat(len(dtypes))
    (result,) = flat.inline(jaxpr.jaxpr, jaxpr.consts, list(range(len(dtypes))))
    return flat.split(name, function, result)


def check_number(name: str, result: Any, wanted: str) -> np.dtype:
    """Checks that a function's result is a number; returns its dtype.

    Raises:
      TypeError: neither a number nor an array.
      ValueError: an array.
    """
    if isinstance(result, bool | int | float):
        return jnp.result_type(result)
    if not hasattr(result, "dtype") or not hasattr(result, "shape"):
        raise TypeError(f"{name}: expected {wanted}, got {type(result).__name__}")
    if result.shape:
        raise ValueError(f"{name}: expected {wanted} per pair, got an array of shape {tuple(result.shape)}")
    return result.dtype


def _unsupported(name: str, op: Op) -> str:
    got = f"{op.params.get('_prim', op.name)} of shapes {[x.shape for x in op.in_avals]}"
    return (
        f"{name}: expected elementwise operations, and arrays indexed down to numbers, got {got} (only expressions that"
        " do not depend on the pair may use any operation)"
    )


def _is_short_loop(eqn: Any) -> bool:
    """Whether a scan is a loop of few iterations that neither slices its inputs nor stacks its outputs."""
    body = eqn.params["jaxpr"]
    pairs = zip((*eqn.invars, *eqn.outvars), (*body.in_avals, *body.out_avals), strict=True)
    return eqn.params["length"] <= _MOST_ITERATIONS and all(x.aval.shape == inner.shape for x, inner in pairs)


class _Flat:
    """The equations of a jaxpr and of all its callees, inlined, with uniquely numbered variables."""

    def __init__(self, num_args: int):
        self._num_args, self._count = num_args, num_args
        self._ops: list[Op] = []
        self._constants: dict[int, Any] = {}
        self._avals: dict[int, Any] = {}
        self._varies = set(range(num_args))  # depends on the pair
        self._is_plain: set[int] = set()  # a number computed from literals alone

    def inline(self, jaxpr: Any, constants: Any, inputs: list[Atom]) -> list[Atom]:
        """Appends the equations of a jaxpr; returns its results."""
        atoms = dict(zip(jaxpr.invars, inputs, strict=True))
        atoms.update(zip(jaxpr.constvars, map(self._constant, constants), strict=True))

        def read(x: Any) -> Atom:
            if not isinstance(x, Literal):
                return atoms[x]
            aval: Any = x.aval
            if aval.shape or isinstance(x.val, Array):
                return self._constant(x.val)
            return Number(np.dtype(aval.dtype).type(x.val))

        for eqn in jaxpr.eqns:
            results = self._add(eqn, [read(x) for x in eqn.invars])
            atoms.update(zip(eqn.outvars, results, strict=True))
        return [read(x) for x in jaxpr.outvars]

    def split(self, name: str, function: Callable, result: Atom) -> Trace:
        """Splits the operations into the kernels' program and the precomputation of its tables."""
        live, ops = {result}, []
        for op in reversed(self._ops):
            if live.intersection(op.outputs) and (self._varies | self._is_plain).intersection(op.outputs):
                if not rules.is_supported(op):
                    raise NotImplementedError(_unsupported(name, op))
                ops.append(op)
                live.update(op.inputs)
        known = [x for x in self._avals if x in live and x not in self._varies and x not in self._is_plain]
        numbers = {x: n for n, x in enumerate([*range(self._num_args), *known])}
        for out in (out for op in reversed(ops) for out in op.outputs):
            numbers[out] = len(numbers)

        def renumber(x: Atom) -> Atom:
            return numbers[x] if isinstance(x, int) else x

        ops = tuple(
            Op(
                op.primitive,
                op.params,
                tuple(map(renumber, op.inputs)),
                tuple(numbers[x] for x in op.outputs),
                op.in_avals,
                op.out_avals,
            )
            for op in reversed(ops)
        )
        dtypes = tuple(np.dtype(self._avals[x].dtype) for x in known)
        text = "\n".join([*map(str, ops), str(renumber(result)), *(str(self._avals[x].shape) for x in known)])
        program = Program(
            self._num_args,
            dtypes,
            ops,
            renumber(result),
            text,
            function if any(op.has_rule for op in ops) else None,
        )
        return Trace(program, functools.partial(self._tables, known))

    def _tables(self, known: list[int]) -> Tables:
        """Computes the pair-independent values."""
        live, ops = set(known), []
        for op in reversed(self._ops):
            if live.intersection(op.outputs) and not self._varies.intersection(op.outputs):
                ops.append(op)
                live.update(x for x in op.inputs if isinstance(x, int))
        values = dict(self._constants)
        for op in reversed(ops):
            results = op.bind(*(x.value if isinstance(x, Number) else values[x] for x in op.inputs))
            values.update(zip(op.outputs, results, strict=True))

        def table(x: Array) -> Array:
            # Gradients accumulate in float32. The conversion also makes weak types strong.
            return lax.convert_element_type(x, jnp.float32 if x.dtype in (jnp.bfloat16, jnp.float16) else x.dtype)

        return Tables(tuple(table(values[x]) for x in known))

    def _add(self, eqn: Any, inputs: list[Atom]) -> list[Atom]:
        if eqn.primitive.name in _INLINED:
            inner = next(eqn.params[key] for key in ("jaxpr", "call_jaxpr") if key in eqn.params)
            if isinstance(inner, ClosedJaxpr):
                return self.inline(inner.jaxpr, inner.consts, inputs)
            return self.inline(inner, (), inputs)
        if eqn.primitive.name == "cond" and self._varies.intersection(inputs):
            return self._cond(eqn, *inputs)
        if eqn.primitive.name == "scan" and self._varies.intersection(inputs) and _is_short_loop(eqn):
            return self._loop(eqn, inputs)
        if eqn.primitive.name == "call_hi_primitive" and not any(is_floating(x.aval) for x in eqn.outvars):
            # jnp.searchsorted in newer JAX. Integers have no derivative to lose.
            steps = functools.partial(eqn.primitive.to_lojax, **eqn.params)
            jaxpr = jax.make_jaxpr(steps)(*(jax.ShapeDtypeStruct(x.aval.shape, x.aval.dtype) for x in eqn.invars))
            return self.inline(jaxpr.jaxpr, jaxpr.consts, inputs)
        outputs = [self._variable(x.aval) for x in eqn.outvars]
        avals = tuple(x.aval for x in eqn.invars), tuple(x.aval for x in eqn.outvars)
        op = Op(eqn.primitive, dict(eqn.params), tuple(inputs), tuple(outputs), *avals)
        self._ops.append(op)
        variables = {x for x in inputs if isinstance(x, int)}
        if self._varies & variables:
            self._varies.update(outputs)
        elif variables <= self._is_plain and not any(x.shape for x in avals[1]) and rules.is_supported(op):
            self._is_plain.update(outputs)
        return list(outputs)

    def _cond(self, eqn: Any, which: Atom, *operands: Atom) -> list[Atom]:
        """Evaluates all branches and selects a result, as ``jax.vmap`` does."""
        branches = [self.inline(x.jaxpr, x.consts, list(operands)) for x in eqn.params["branches"]]
        is_bool = eqn.invars[0].aval.dtype == jnp.bool_

        def choose(which: Array, *results: Array) -> Array:
            if is_bool:
                return lax.select_n(which, *results)
            chosen = results[0]
            for n, result in enumerate(results[1:], 1):
                chosen = lax.select_n(which == jnp.full_like(which, n), chosen, result)
            return chosen

        outputs = []
        for results, out in zip(zip(*branches, strict=True), eqn.outvars, strict=True):
            shape = jax.ShapeDtypeStruct(out.aval.shape, out.aval.dtype)
            choice = jax.make_jaxpr(choose)(eqn.invars[0].aval, *(shape for _ in results))
            outputs += self.inline(choice.jaxpr, choice.consts, [which, *results])
        return outputs

    def _loop(self, eqn: Any, inputs: list[Atom]) -> list[Atom]:
        """Unrolls a loop."""
        body = eqn.params["jaxpr"]
        count = len(inputs) - len(eqn.outvars)
        constants, state = inputs[:count], inputs[count:]
        for _ in range(eqn.params["length"]):
            state = self.inline(body.jaxpr, body.consts, [*constants, *state])
        return state

    def _constant(self, value: Any) -> Atom:
        if not isinstance(value, Array):
            value = jnp.asarray(value)
        variable = self._variable(jax.typeof(value))
        self._constants[variable] = value
        return variable

    def _variable(self, aval: Any) -> int:
        self._count += 1
        self._avals[self._count - 1] = aval
        return self._count - 1
