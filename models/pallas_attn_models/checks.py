"""Checks of numbers that any wing may ask for, and how a message shows a value."""

from collections.abc import Iterable
from typing import Any

import numpy as np

MIN_FLOAT32, MAX_FLOAT32 = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
MAX_INT32 = 2**31 - 1


def is_int(value: Any) -> bool:
    """An int, and no bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def shown(value: Any, length: int = 80) -> str:
    """``repr(value)`` for a message: cut where it is long, and there for what has none, as an int of 5000 digits."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):
        text = f"{type(value).__name__} too large to show"
    return text if len(text) <= length else f"{text[:length]}..."


def listed(names: Iterable[str], total: int | None = None, most: int = 5) -> str:
    """The first few names in their order, and how many more there are; ``total``: of which ``names`` are the first."""
    names = sorted(names)
    more = (len(names) if total is None else total) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def require_positive_int(name: str, value: Any) -> None:
    """Raises a ValueError that names the argument."""
    if not is_int(value) or value < 1:
        raise ValueError(f"{name}: expected an int of at least 1, got {shown(value)}")


def require_size(name: str, value: Any, most: int = MAX_INT32) -> None:
    """Raises a ValueError, too, where 32 bits do not hold it."""
    require_positive_int(name, value)
    if value > most:
        raise ValueError(f"{name}: expected an int of at most {most}, got {shown(value)}")


def require_positive_float(name: str, value: Any) -> None:
    """Raises a ValueError, too, where float32 would make it 0 (subnormals count as 0 on most devices) or infinite."""
    if not (is_int(value) or isinstance(value, float)) or not 0 < value < float("inf"):
        raise ValueError(f"{name}: expected a positive number, got {shown(value)}")
    if not MIN_FLOAT32 <= value <= MAX_FLOAT32:
        raise ValueError(f"{name}: expected a positive number that float32 can hold, got {shown(value)}")
