"""Rules that compute one entry of an operation's result from entries of its operands, for all pairs at once.

A rule is ``rule(op, operand, index) -> tile``. ``operand(n, index)`` is an entry of operand n: a tile or a number. For
an operation with several results, the first element of the index is the number of the result.
"""

import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from pallas_attn.pointwise.tables import Index

# One entry of the result needs one entry of each operand.
# fmt: off
ELEMENTWISE = frozenset({
    "abs", "acos", "acosh", "add", "add_any", "and", "asin", "asinh", "atan", "atan2", "atanh",
    "bitcast_convert_type", "cbrt", "ceil", "clamp", "clz", "convert_element_type", "cos", "cosh", "digamma", "div",
    "eq", "erf", "erf_inv", "erfc", "exp", "exp2", "expm1", "floor", "ge", "gt", "integer_pow", "is_finite", "le",
    "lgamma", "log", "log1p", "log2", "logistic", "lt", "max", "min", "mul", "ne", "neg", "nextafter", "not",
    "one_minus_square", "or", "population_count", "pow", "reduce_precision", "rem", "round", "rsqrt", "select_n",
    "shift_left", "shift_right_arithmetic", "shift_right_logical", "sign", "sin", "sinh", "sqrt", "square",
    "stop_gradient", "sub", "tan", "tanh", "xor",
})
# fmt: on
# Functions of numbers with user-defined derivative rules.
WITH_DERIVATIVES = frozenset({"custom_jvp_call", "custom_vjp_call"})
# Reductions are unrolled, up to this many terms.
MOST_TERMS = 128

Operand = Callable[[int, Index], Any]


def is_supported(op: Any) -> bool:
    """Whether there is a rule for an operation with pair-dependent operands."""
    if op.has_rule:
        return not any(x.shape for x in (*op.in_avals, *op.out_avals))
    axes = ()
    if op.name in _REDUCTIONS:
        axes = op.params["axes"]
    if op.name == "dot_general":
        (axes, _), _ = op.params["dimension_numbers"]
    if op.name not in RULES:
        return False
    return 1 <= math.prod(op.in_avals[0].shape[axis] for axis in axes) <= MOST_TERMS


def broadcast(values: Sequence[Any]) -> list[Any]:
    """Broadcasts tiles and numbers to tiles of one shape; numbers alone stay numbers."""
    shape = np.broadcast_shapes(*(np.shape(x) for x in values))
    tiles = [x if np.shape(x) == shape else jnp.broadcast_to(x, shape) for x in values]
    # Within jax.shard_map, device-varying and invariant values have different types.
    axes = [jax.typeof(x).manual_axis_type.varying for x in tiles]
    missing = [tuple(frozenset().union(*axes) - of_tile) for of_tile in axes]
    return [lax.pcast(x, more, to="varying") if more else x for x, more in zip(tiles, missing, strict=True)]


def _elementwise(op: Any, operand: Operand, index: Index) -> Any:
    # Some primitives (clamp, select_n) accept a scalar beside an array.
    values = [operand(n, index if aval.shape else ()) for n, aval in enumerate(op.in_avals)]
    return op.bind(*broadcast(values))[0]


def _in_total_order(compare: Callable, op: Any, operand: Operand, index: Index) -> Any:
    # Total order matters only for floats (NaN, -0).
    if jnp.issubdtype(op.in_avals[0].dtype, jnp.floating):
        return _elementwise(op, operand, index)
    return compare(*broadcast([operand(0, index), operand(1, index)]))


def _same(op: Any, operand: Operand, index: Index) -> Any:
    return operand(0, index)


def _broadcast_in_dim(op: Any, operand: Operand, index: Index) -> Any:
    dims = op.params["broadcast_dimensions"]
    sizes = op.in_avals[0].shape
    return operand(0, tuple(0 if size == 1 else index[dim] for dim, size in zip(dims, sizes, strict=True)))


def _reshape(op: Any, operand: Operand, index: Index) -> Any:
    """Handles squeeze and expand_dims too."""
    old, new = op.in_avals[0].shape, op.out_avals[0].shape
    if [size for size in old if size > 1] == [size for size in new if size > 1]:
        rest = iter([i for i, size in zip(index, new, strict=True) if size > 1])
        return operand(0, tuple(next(rest) if size > 1 else 0 for size in old))
    place: Any = 0
    for i, size in zip(index, new, strict=True):
        place = _plus(_times(place, size), i)
    places = []
    for size in reversed(old):
        if isinstance(place, int):
            place, i = divmod(place, size)
        else:
            width = jnp.full_like(place, size)
            place, i = lax.div(place, width), lax.rem(place, width)
        places.append(i)
    return operand(0, tuple(reversed(places)))


def _transpose(op: Any, operand: Operand, index: Index) -> Any:
    of_axis = dict(zip(op.params["permutation"], index, strict=True))
    return operand(0, tuple(of_axis[axis] for axis in range(len(index))))


def _slice(op: Any, operand: Operand, index: Index) -> Any:
    strides = op.params["strides"] or (1,) * len(index)
    starts = op.params["start_indices"]
    places = zip(index, starts, strides, strict=True)
    return operand(0, tuple(_plus(_times(i, stride), start) for i, start, stride in places))


def _rev(op: Any, operand: Operand, index: Index) -> Any:
    sizes, turned = op.in_avals[0].shape, op.params["dimensions"]
    return operand(0, tuple(_plus(_times(i, -1), n - 1) if d in turned else i for d, (i, n) in _axes(index, sizes)))


def _concatenate(op: Any, operand: Operand, index: Index) -> Any:
    axis = op.params["dimension"]
    sizes = [aval.shape[axis] for aval in op.in_avals]
    starts = np.cumsum([0, *sizes]).tolist()

    def part(n: int, i: Any) -> Any:
        i = _clip(_plus(i, -starts[n]), sizes[n] - 1)
        return operand(n, (*index[:axis], i, *index[axis + 1 :]))

    i = index[axis]
    if isinstance(i, int):
        return part(next(n for n in range(len(sizes)) if i < starts[n + 1]), i)
    parts = [part(n, i) for n in range(len(sizes))]
    return functools.reduce(lambda found, n: _select(i >= starts[n], parts[n], found), range(1, len(parts)), parts[0])


def _stack(op: Any, operand: Operand, index: Index) -> Any:
    axis, last = op.params["axis"], len(op.in_avals) - 1
    n, rest = index[axis], (*index[:axis], *index[axis + 1 :])
    if isinstance(n, int):
        return operand(n, rest)
    parts = [operand(part, rest) for part in range(last + 1)]
    return functools.reduce(lambda found, part: _select(n >= part, parts[part], found), range(1, last + 1), parts[0])


def _unstack(op: Any, operand: Operand, index: Index) -> Any:
    axis, rest = op.params["axis"], index[1:]
    return operand(0, (*rest[:axis], index[0], *rest[axis:]))


def _split(op: Any, operand: Operand, index: Index) -> Any:
    (result, *rest), axis = index, op.params["axis"]
    start = int(sum(op.params["sizes"][:result]))
    return operand(0, (*rest[:axis], _plus(rest[axis], start), *rest[axis + 1 :]))


def _iota(op: Any, operand: Operand, index: Index) -> Any:
    i = index[op.params["dimension"]]
    return np.dtype(op.params["dtype"]).type(i) if isinstance(i, int) else i.astype(op.params["dtype"])


def _dynamic_slice(op: Any, operand: Operand, index: Index) -> Any:
    sizes = zip(op.in_avals[0].shape, op.params["slice_sizes"], strict=True)
    starts = [_clip(operand(1 + axis, ()), size - length) for axis, (size, length) in enumerate(sizes)]
    return operand(0, tuple(_plus(start, i) for start, i in zip(starts, index, strict=True)))


def _dynamic_update_slice(op: Any, operand: Operand, index: Index) -> Any:
    lengths = op.in_avals[1].shape
    sizes = zip(op.in_avals[0].shape, lengths, strict=True)
    starts = [_clip(operand(2 + axis, ()), size - length) for axis, (size, length) in enumerate(sizes)]
    inside = [_plus(i, _times(start, -1)) for i, start in zip(index, starts, strict=True)]
    is_new = _all(_within(i, length - 1) for i, length in zip(inside, lengths, strict=True))
    if isinstance(is_new, bool):
        return operand(1, tuple(inside)) if is_new else operand(0, index)
    new = operand(1, tuple(_clip(i, length - 1) for i, length in zip(inside, lengths, strict=True)))
    return _select(is_new, new, operand(0, index))


def _gather(op: Any, operand: Operand, index: Index) -> Any:
    numbers, shape, lengths = op.params["dimension_numbers"], op.in_avals[0].shape, op.params["slice_sizes"]
    batch = [i for axis, i in enumerate(index) if axis not in numbers.offset_dims]
    at: list[Any] = [0] * len(shape)
    for axis, of_indices in zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True):
        at[axis] = batch[of_indices]
    inside = []
    for n, axis in enumerate(numbers.start_index_map):
        start, last = operand(1, (*batch, n)), shape[axis] - lengths[axis]
        inside.append(_within(start, last))
        at[axis] = _clip(start, last)
    absent = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    offsets = iter([index[axis] for axis in numbers.offset_dims])
    at = [i if axis in absent else _plus(i, next(offsets)) for axis, i in enumerate(at)]
    found = operand(0, tuple(at))
    if op.params["mode"] != lax.GatherScatterMode.FILL_OR_DROP:
        return found
    return _select(_all(inside), found, _fill_value(op))


def _fill_value(op: Any) -> np.generic:
    dtype, value = np.dtype(op.out_avals[0].dtype), op.params["fill_value"]
    if value is None:
        if jnp.issubdtype(dtype, jnp.inexact):
            value = np.nan
        elif dtype == np.bool_:
            value = True
        else:
            value = jnp.iinfo(dtype).min if jnp.issubdtype(dtype, jnp.signedinteger) else jnp.iinfo(dtype).max
    return dtype.type(value)


def _reduce(combine: Callable, op: Any, operand: Operand, index: Index) -> Any:
    axes, shape = op.params["axes"], op.in_avals[0].shape
    terms = []
    for places in np.ndindex(*(shape[axis] for axis in axes)):
        summed, kept = dict(zip(axes, places, strict=True)), iter(index)
        terms.append(operand(0, tuple(summed[d] if d in summed else next(kept) for d in range(len(shape)))))
    return _fold(combine, terms)


def _dot_general(op: Any, operand: Operand, index: Index) -> Any:
    contracted, batched = op.params["dimension_numbers"]
    shapes = [aval.shape for aval in op.in_avals]
    n_batch = len(batched[0])
    n_left = len(shapes[0]) - n_batch - len(contracted[0])
    free = index[n_batch : n_batch + n_left], index[n_batch + n_left :]
    dtype = op.out_avals[0].dtype

    def factor(n: int, places: tuple[int, ...]) -> Any:
        at = dict(zip((*batched[n], *contracted[n]), (*index[:n_batch], *places), strict=True))
        rest = iter(free[n])
        found = operand(n, tuple(at[d] if d in at else next(rest) for d in range(len(shapes[n]))))
        return lax.convert_element_type(found, dtype)

    places = np.ndindex(*(shapes[0][axis] for axis in contracted[0]))
    return _fold(lax.add, [lax.mul(*broadcast([factor(0, at), factor(1, at)])) for at in places])


def _fold(combine: Callable, terms: list[Any]) -> Any:
    return functools.reduce(lambda a, b: combine(*broadcast([a, b])), terms)


def _axes(index: Index, sizes: tuple[int, ...]):
    return enumerate(zip(index, sizes, strict=True))


def _plus(a: Any, b: Any) -> Any:
    """The sum of two index components."""
    if isinstance(a, int) and isinstance(b, int):
        return a + b
    if isinstance(a, int) or isinstance(b, int):
        number, tile = (a, b) if isinstance(a, int) else (b, a)
        return tile if number == 0 else tile + jnp.full_like(tile, number)
    return operator.add(*broadcast([a, b]))


def _times(a: Any, factor: int) -> Any:
    return a * factor if isinstance(a, int) else a * jnp.full_like(a, factor)


def _clip(i: Any, last: int) -> Any:
    """Clamps an index to ``[0, last]``: a Python int if it is static, else int32."""
    if last == 0:
        return 0
    if isinstance(i, int | np.integer):
        return min(max(int(i), 0), last)
    if i.dtype.itemsize < 4:
        i = lax.convert_element_type(i, jnp.int32)
    number = i.dtype.type
    return lax.convert_element_type(lax.clamp(number(0), i, number(last)), jnp.int32)


def _within(i: Any, last: int) -> Any:
    if isinstance(i, int | np.integer):
        return 0 <= int(i) <= last
    if i.dtype.itemsize < 4:
        i = lax.convert_element_type(i, jnp.int32)
    return (i >= jnp.full_like(i, 0)) & (i <= jnp.full_like(i, last))


def _all(conditions: Any) -> Any:
    """The conjunction: a Python bool if static conditions decide it, else a tile."""
    conditions = list(conditions)
    unknown = [x for x in conditions if not isinstance(x, bool)]
    if any(x is False for x in conditions):
        return False
    return _fold(lax.bitwise_and, unknown) if unknown else True


def _select(condition: Any, yes: Any, no: Any) -> Any:
    if isinstance(condition, bool):
        return yes if condition else no
    condition, yes, no = broadcast([condition, yes, no])
    return lax.select_n(condition, no, yes)


_REDUCTIONS = {
    "reduce_sum": lax.add,
    "reduce_prod": lax.mul,
    "reduce_max": lax.max,
    "reduce_min": lax.min,
    "reduce_and": lax.bitwise_and,
    "reduce_or": lax.bitwise_or,
    "reduce_xor": lax.bitwise_xor,
}
RULES: dict[str, Callable[[Any, Operand, Index], Array]] = {
    **dict.fromkeys(ELEMENTWISE, _elementwise),
    **dict.fromkeys(("copy", "copy_p", "name", "pvary", "pcast"), _same),
    **dict.fromkeys(("reshape", "squeeze", "expand_dims"), _reshape),
    **{name: functools.partial(_reduce, combine) for name, combine in _REDUCTIONS.items()},
    "broadcast_in_dim": _broadcast_in_dim,
    "concatenate": _concatenate,
    "dot_general": _dot_general,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update_slice,
    "gather": _gather,
    "iota": _iota,
    "le_to": functools.partial(_in_total_order, lax.le),
    "lt_to": functools.partial(_in_total_order, lax.lt),
    "rev": _rev,
    "slice": _slice,
    "split": _split,
    "stack": _stack,
    "transpose": _transpose,
    "unstack": _unstack,
}
