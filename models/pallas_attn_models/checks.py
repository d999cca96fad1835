"""Argument checks shared by all wings, and formatting of values in messages."""

from collections.abc import Iterable
from typing import Any

import numpy as np

MIN_FLOAT32, MAX_FLOAT32 = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
MAX_INT32 = 2**31 - 1


def is_int(value: Any) -> bool:
    """Whether the value is an int but not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def shown(value: Any, length: int = 80) -> str:
    """``repr(value)`` for a message: truncated if long, with a substitute if it fails, as for an int of 5000 digits."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):
        text = f"{type(value).__name__} too large to show"
    return text if len(text) <= length else f"{text[:length]}..."


def listed(names: Iterable[str], total: int | None = None, most: int = 5) -> str:
    """The first few names in order, and the number of the others; ``total`` counts names beyond those given, too."""
    names = sorted(names)
    more = (len(names) if total is None else total) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def require_positive_int(name: str, value: Any) -> None:
    """Raises ValueError unless the value is an int of at least 1."""
    if not is_int(value) or value < 1:
        raise ValueError(f"{name}: expected an int of at least 1, got {shown(value)}")


def require_size(name: str, value: Any, most: int = MAX_INT32) -> None:
    """Like :func:`require_positive_int`, with an upper bound."""
    require_positive_int(name, value)
    if value > most:
        raise ValueError(f"{name}: expected an int of at most {most}, got {shown(value)}")


def require_positive_float(name: str, value: Any) -> None:
    """Raises ValueError unless the value is positive, and a normal number in float32 (devices may flush subnormals)."""
    if not (is_int(value) or isinstance(value, float)) or not 0 < value < float("inf"):
        raise ValueError(f"{name}: expected a positive number, got {shown(value)}")
    if not MIN_FLOAT32 <= value <= MAX_FLOAT32:
        raise ValueError(f"{name}: expected a positive number that float32 can hold, got {shown(value)}")


def require_bool(name: str, value: Any) -> None:
    """Raises ValueError unless the value is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}: expected a bool, got {shown(value)}")
