"""Arguments, checked before anything is compiled: ``name: expected X, got Y``.

A TypeError is about the kind of object, a ValueError about its value, dtype or shape. Kernels compute in int32 and
float32, so wider numbers become these. One that they cannot hold is refused where its value is known: in a Python
number, a NumPy array, or a JAX array that is not being traced.
"""

import numbers
from collections.abc import Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import Array

SMALLEST_INT32, LARGEST_INT32 = -(2**31), 2**31 - 1
# Positions, and the places of tokens in whole blocks, have 32 bits.
LONGEST_AXIS = 2**30
_LARGEST_FLOAT32 = float(np.finfo(np.float32).max)
_SMALLEST_FLOAT32 = float(np.finfo(np.float32).tiny)  # what is smaller may count as 0


def describe(value: Any) -> str:
    """A value, as an error message shows it."""
    kind = type(value).__name__
    if isinstance(value, type):
        return repr(value)
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an int of {value.bit_length()} bits"
    if value is None or isinstance(value, str | numbers.Number):
        text = repr(value)
        return f"{text if len(text) <= 80 else f'{text[:77]}...'} ({kind})"
    dtype, shape = getattr(value, "dtype", None), getattr(value, "shape", None)
    if dtype is not None and shape is not None:
        return f"{dtype} {list(shape)} ({kind})"
    return f"{kind} {value.__name__}" if callable(value) and hasattr(value, "__name__") else kind


def integer(name: str, value: Any, *, least: int, most: int = LARGEST_INT32) -> int:
    """A Python or NumPy integer within the limits; a bool is none."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name}: expected an int, got {describe(value)}")
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {describe(value)}")
    if value > most:
        raise ValueError(f"{name}: expected at most {most}, got {describe(value)}")
    return int(value)


def number(name: str, value: Any, *, most: float = _LARGEST_FLOAT32) -> float:
    """A finite Python or NumPy number that float32 holds, neither as infinity nor, if it is not 0, as 0."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: expected a Python number, known when the call is traced, got {describe(value)}")
    value = value.item() if isinstance(value, np.number) else value
    if not abs(value) <= most or 0 < abs(value) < _SMALLEST_FLOAT32:
        wanted = f"a number that float32 holds, 0 or of magnitude {_SMALLEST_FLOAT32:.3g} to {most:.3g}"
        raise ValueError(f"{name}: expected {wanted}, got {describe(value)}")
    return float(value)


def boolean(name: str, value: Any) -> bool:
    """A Python or NumPy bool."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name}: expected a bool, got {describe(value)}")
    return bool(value)


def float_dtype(name: str, value: Any) -> np.dtype:
    """A dtype of floating point, of at most 32 bits."""
    wanted = "a floating-point dtype of at most 32 bits"
    try:
        # NumPy takes more for a dtype, None for float64.
        dtype = jnp.dtype(value) if isinstance(value, str | type | np.dtype) else None
    except (TypeError, ValueError):
        dtype = None
    if dtype is None:
        raise TypeError(f"{name}: expected {wanted}, got {describe(value)}")
    if not jnp.issubdtype(dtype, jnp.floating) or dtype.itemsize > 4:
        raise ValueError(f"{name}: expected {wanted} (floating point numbers), got {dtype}")
    return dtype


def array(name: str, value: Any, wanted: str = "an array") -> Array:
    """An array of NumPy or JAX, or what has one (a variable of Flax)."""
    if not isinstance(value, Array | type) and hasattr(value, "__jax_array__"):
        value = value.__jax_array__()
    # The mask of a masked array would be lost.
    if not isinstance(value, np.ndarray | np.generic | Array) or isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{name}: expected {wanted} (NumPy or JAX), got {describe(value)}")
    x: Any = np.asarray(value) if isinstance(value, np.generic) else value
    return x


def array_or_list(name: str, value: Any, wanted: str) -> Array:
    """The same, or (nested) lists of numbers as an array."""
    if not isinstance(value, bool | int | float | Sequence) or isinstance(value, str | bytes | np.generic):
        return array(name, value, wanted)
    is_traced = any(isinstance(x, Array) for x in jax.tree.leaves(value))
    try:
        x: Any = jnp.asarray(value) if is_traced else np.asarray(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise TypeError(f"{name}: expected {wanted}, got a {type(value).__name__} that makes no array") from error
    if x.dtype.kind == "O" and all(isinstance(number, int) for number in x.flat):
        raise ValueError(f"{name}: expected {wanted} of at most 64 bits, got {describe(max(x.flat, key=abs))}")
    if not is_traced and x.dtype.kind not in "biuf":
        raise TypeError(f"{name}: expected {wanted}, got a {type(value).__name__} of {x.dtype}")
    return x


def is_integer(x: Array) -> bool:
    """Whether its elements are integers; bools and times are none."""
    return jnp.issubdtype(x.dtype, jnp.integer) and not jnp.issubdtype(x.dtype, np.timedelta64)


def int32(name: str, x: Array) -> Array:
    """Integers as int32; wider ones that are being traced come back as they are.

    Raises:
      ValueError: 32 bits do not hold a value.
    """
    if not fits_int32(x):
        values = known(x)
        if values is None:
            return jnp.asarray(x)
        largest = max(values.min(), values.max(), key=lambda value: abs(int(value)))
        raise ValueError(f"{name}: expected integers that 32 bits hold, got {largest}")
    return jnp.asarray(x.astype(np.int32))


def fits_int32(x: Array) -> bool:
    """Whether 32 bits are known to hold every element of an array of integers."""
    if _has_int32_range(x):
        return True
    values = known(x)
    if values is None:
        return False
    return values.size == 0 or (int(values.min()) >= SMALLEST_INT32 and int(values.max()) <= LARGEST_INT32)


def positions(name: str, value: Any, *, ranks: tuple[int, ...]) -> Array:
    """Positions as int32; one that is being traced, and that 32 bits do not hold, becomes -1: there is no token."""
    x = array(name, value, "an integer array")
    if not is_integer(x):
        raise ValueError(f"{name}: expected integers, got dtype {x.dtype}")
    if x.ndim not in ranks or 0 in x.shape:
        wanted = " or ".join(f"rank {rank}" for rank in ranks)
        raise ValueError(f"{name}: expected {wanted} and no empty axis, got shape {tuple(x.shape)}")
    x = int32(name, x)
    if x.dtype == jnp.int32:
        return x
    least, most = _common_range(x)
    return jnp.where((x >= least) & (x <= most), x.astype(jnp.int32), -1)


def clipped(x: Array) -> Array:
    """The int32 that is nearest to each integer, for those that are compared with nothing beyond."""
    if _has_int32_range(x):
        return jnp.asarray(x.astype(np.int32))
    least, most = _common_range(x)
    module = np if isinstance(x, np.ndarray) else jnp
    return jnp.asarray(module.clip(x, least, most).astype(np.int32))


def _has_int32_range(x: Array) -> bool:
    limits = jnp.iinfo(x.dtype)
    return int(limits.min) >= SMALLEST_INT32 and int(limits.max) <= LARGEST_INT32


def _common_range(x: Array) -> tuple[int, int]:
    """Of its dtype and int32."""
    limits = jnp.iinfo(x.dtype)
    return max(int(limits.min), SMALLEST_INT32), min(int(limits.max), LARGEST_INT32)


def floats(name: str, x: Array) -> Array:
    """Floating-point numbers, those of 64 bits as float32.

    Raises:
      ValueError: other numbers, or float32 does not hold a finite value.
    """
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{name}: expected floating-point numbers, got dtype {x.dtype}")
    if x.dtype.itemsize <= 4:
        return jnp.asarray(x)
    values = known(x)
    if values is not None:
        beyond = np.isfinite(values) & (np.abs(values) > _LARGEST_FLOAT32)
        if beyond.any():
            raise ValueError(f"{name}: expected numbers that float32 holds, got {values[beyond].flat[0]}")
    return jnp.asarray(x.astype(np.float32))


def known(x: Array) -> np.ndarray | None:
    """The values, if they can be had."""
    if isinstance(x, np.ndarray):
        return x
    if isinstance(x, jax.core.Tracer) or not x.is_fully_addressable:
        return None
    return np.asarray(x)
