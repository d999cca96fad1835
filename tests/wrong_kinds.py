"""Calls functions with every argument replaced by objects of every kind; shared by the tests of core and models."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

# A function, arguments that fit, and by argument the other kinds that fit too.
Case = tuple[Callable, dict[str, Any], dict[str, set[str]]]


class Tensor:
    """Looks like a tensor of another library."""

    dtype, ndim = "torch.int64", 2

    def __init__(self, *shape: int):
        self.shape, self.size = shape, int(np.prod(shape))

    def __array__(self, dtype=None, copy=None):
        return np.zeros(self.shape, np.int64)


class NeverEqual:
    """Has neither a truth value nor a hash."""

    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def __eq__(self, other):
        raise RuntimeError("not comparable")

    def __bool__(self):
        raise RuntimeError("no truth value")


def every_argument(cases: Mapping[str, Case]) -> pytest.MarkDecorator:
    """Parametrizes a test by ``name`` and ``argument``: every argument of every function."""
    variadic = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    arguments = [
        (name, argument)
        for name, (function, _, _) in cases.items()
        for argument, parameter in inspect.signature(function).parameters.items()
        if parameter.kind not in variadic
    ]
    ids = [f"{name}: {argument}" for name, argument in arguments]
    return pytest.mark.parametrize(("name", "argument"), arguments, ids=ids)


def complaints(
    case: Case, argument: str, kinds: Mapping[str, Any], is_named: Callable[[Exception, str], bool]
) -> dict[str, str]:
    """Passes every unsuitable kind as the argument; returns the kinds whose errors are missing or not clear.

    Args:
      is_named: whether an error names the argument, what was expected and what came.
    """
    function, fitting, also = case
    default = inspect.signature(function).parameters[argument].default
    found = {}
    for kind in sorted(set(kinds) - also.get(argument, set()) - ({"None"} if default is None else set())):
        try:
            function(**{**fitting, argument: kinds[kind]})
        except Exception as error:
            if not is_named(error, argument):
                found[kind] = f"{type(error).__name__}: {str(error)[:200]}"
        else:
            found[kind] = "no error"
    return found
