"""Validates arguments before anything is compiled: ``name: expected X, got Y``.

A TypeError is about the kind of object, a ValueError about its value, dtype or shape. Kernels compute in int32 and
float32, so wider numbers are converted to these. A number that does not fit raises if its value is known: a Python
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
# Positions, and token indices padded to whole blocks, have 32 bits.
LONGEST_AXIS = 2**30
_LARGEST_FLOAT32 = float(np.finfo(np.float32).max)
_SMALLEST_FLOAT32 = float(np.finfo(np.float32).tiny)  # subnormals may be flushed to 0


def describe(value: Any) -> str:
    """Formats a value for an error message."""
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
    """Returns a Python or NumPy integer, not a bool, from ``least`` to ``most``."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name}: expected an int, got {describe(value)}")
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {describe(value)}")
    if value > most:
        raise ValueError(f"{name}: expected at most {most}, got {describe(value)}")
    return int(value)


def number(name: str, value: Any, *, most: float = _LARGEST_FLOAT32) -> float:
    """Returns a finite Python or NumPy number that float32 represents without overflow or underflow."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: expected a Python number, known when the call is traced, got {describe(value)}")
    value = value.item() if isinstance(value, np.number) else value
    if not abs(value) <= most or 0 < abs(value) < _SMALLEST_FLOAT32:
        wanted = f"a number in the range of float32, 0 or of magnitude {_SMALLEST_FLOAT32:.3g} to {most:.3g}"
        raise ValueError(f"{name}: expected {wanted}, got {describe(value)}")
    return float(value)


def boolean(name: str, value: Any) -> bool:
    """Returns a Python or NumPy bool."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name}: expected a bool, got {describe(value)}")
    return bool(value)


def float_dtype(name: str, value: Any) -> np.dtype:
    """Returns a floating-point dtype of at most 32 bits."""
    wanted = "a floating-point dtype of at most 32 bits"
    try:
        # NumPy accepts more as a dtype: None, for example, as float64.
        dtype = jnp.dtype(value) if isinstance(value, str | type | np.dtype) else None
    except (TypeError, ValueError):
        dtype = None
    if dtype is None:
        raise TypeError(f"{name}: expected {wanted}, got {describe(value)}")
    if not jnp.issubdtype(dtype, jnp.floating) or dtype.itemsize > 4:
        raise ValueError(f"{name}: expected {wanted} (floating point numbers), got {dtype}")
    return dtype


def array(name: str, value: Any, wanted: str = "an array") -> Array:
    """Returns a NumPy or JAX array, or the array of a wrapper such as a Flax variable."""
    if not isinstance(value, Array | type) and hasattr(value, "__jax_array__"):
        value = value.__jax_array__()
    # A masked array would lose its mask.
    if not isinstance(value, np.ndarray | np.generic | Array) or isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{name}: expected {wanted} (NumPy or JAX), got {describe(value)}")
    x: Any = np.asarray(value) if isinstance(value, np.generic) else value
    return x


def array_or_list(name: str, value: Any, wanted: str) -> Array:
    """Like :func:`array`, but also accepts numbers and (nested) lists of them."""
    if not isinstance(value, bool | int | float | Sequence) or isinstance(value, str | bytes | np.generic):
        return array(name, value, wanted)
    is_traced = any(isinstance(x, Array) for x in jax.tree.leaves(value))
    try:
        x: Any = jnp.asarray(value) if is_traced else np.asarray(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise TypeError(f"{name}: expected {wanted}, got a {type(value).__name__} that is not an array") from error
    if x.dtype.kind == "O" and all(isinstance(number, int) for number in x.flat):
        raise ValueError(f"{name}: expected {wanted} of at most 64 bits, got {describe(max(x.flat, key=abs))}")
    if not is_traced and x.dtype.kind not in "biuf":
        raise TypeError(f"{name}: expected {wanted}, got a {type(value).__name__} of {x.dtype}")
    return x


def is_integer(x: Array) -> bool:
    """Whether the elements are integers; bools and time differences are not."""
    return jnp.issubdtype(x.dtype, jnp.integer) and not jnp.issubdtype(x.dtype, np.timedelta64)


def int32(name: str, x: Array) -> Array:
    """Converts integers to int32; traced arrays of wider integers are returned unchanged.

    Raises:
      ValueError: a value does not fit 32 bits.
    """
    if not fits_int32(x):
        values = known(x)
        if values is None:
            return jnp.asarray(x)
        largest = max(values.min(), values.max(), key=lambda value: abs(int(value)))
        raise ValueError(f"{name}: expected integers that fit in 32 bits, got {largest}")
    return jnp.asarray(x.astype(np.int32))


def fits_int32(x: Array) -> bool:
    """Whether every element of an integer array is known to fit 32 bits."""
    if _has_int32_range(x):
        return True
    values = known(x)
    if values is None:
        return False
    return values.size == 0 or (int(values.min()) >= SMALLEST_INT32 and int(values.max()) <= LARGEST_INT32)


def positions(name: str, value: Any, *, ranks: tuple[int, ...]) -> Array:
    """Validates positions and converts them to int32; traced ones that do not fit 32 bits become -1 (padding)."""
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
    """Clips integers to int32, for values that are only compared with int32 values."""
    if _has_int32_range(x):
        return jnp.asarray(x.astype(np.int32))
    least, most = _common_range(x)
    module = np if isinstance(x, np.ndarray) else jnp
    return jnp.asarray(module.clip(x, least, most).astype(np.int32))


def _has_int32_range(x: Array) -> bool:
    limits = jnp.iinfo(x.dtype)
    return int(limits.min) >= SMALLEST_INT32 and int(limits.max) <= LARGEST_INT32


def _common_range(x: Array) -> tuple[int, int]:
    """The intersection of the ranges of its dtype and int32."""
    limits = jnp.iinfo(x.dtype)
    return max(int(limits.min), SMALLEST_INT32), min(int(limits.max), LARGEST_INT32)


def floats(name: str, x: Array) -> Array:
    """Validates floating-point numbers; converts float64 to float32.

    Raises:
      ValueError: another dtype, or a finite value that overflows float32.
    """
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{name}: expected floating-point numbers, got dtype {x.dtype}")
    if x.dtype.itemsize <= 4:
        return jnp.asarray(x)
    values = known(x)
    if values is not None:
        beyond = np.isfinite(values) & (np.abs(values) > _LARGEST_FLOAT32)
        if beyond.any():
            raise ValueError(f"{name}: expected numbers in the range of float32, got {values[beyond].flat[0]}")
    return jnp.asarray(x.astype(np.float32))


def known(x: Array) -> np.ndarray | None:
    """Returns the values on the host, or None if the array is traced or not fully addressable."""
    if isinstance(x, np.ndarray):
        return x
    if isinstance(x, jax.core.Tracer) or not x.is_fully_addressable:
        return None
    return np.asarray(x)
