"""Marks that several files of tests share."""

import os
from collections.abc import Iterable

import pytest

# For bits that must not depend on the shape of a tile; see conftest.py for who sets the flag.
default_emitters = pytest.mark.skipif(
    "xla_cpu_use_fusion_emitters=false" in os.environ.get("XLA_FLAGS", ""),
    reason="XLA's older emitters round by the shape of an array: run it with --optimize",
)


def quick(names: Iterable[str], *always: str) -> list:
    """The names as parameters; those not in ``always`` are slow."""
    names = list(names)
    if unknown := set(always) - set(names):
        raise ValueError(f"always: expected some of {names}, got {sorted(unknown)}")
    return [name if name in always else pytest.param(name, marks=pytest.mark.slow) for name in names]
