"""Test parameters, some of which run only with ``-m slow``."""

from collections.abc import Iterable

import pytest


def quick(names: Iterable[str], *always: str) -> list:
    """The names as parameters; those not in ``always`` are slow."""
    names = list(names)
    if unknown := set(always) - set(names):
        raise ValueError(f"always: expected some of {names}, got {sorted(unknown)}")
    return [name if name in always else pytest.param(name, marks=pytest.mark.slow) for name in names]
