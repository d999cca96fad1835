"""The choice of the default suite: every name is a test, every value of a parameter is used."""

import ast
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests import default_suite


def test_every_name_is_a_test():
    found = set()
    for path in Path(__file__).parent.rglob("test_*.py"):
        tree = ast.parse(path.read_text())
        found |= {f"{path.stem}::{x.name}" for x in ast.walk(tree) if isinstance(x, ast.FunctionDef)}
    assert default_suite.DEFAULT.keys() <= found, default_suite.DEFAULT.keys() - found


def matrix(rows: int, columns: int) -> list[Any]:
    parameters = [{"row": r, "column": [c]} for r in range(rows) for c in range(columns)]
    return [SimpleNamespace(callspec=SimpleNamespace(params=x)) for x in parameters]


@pytest.mark.parametrize(("rows", "columns"), [(4, 1), (4, 3), (2, 5)])
def test_a_cover_uses_every_value(rows, columns):
    items = matrix(rows, columns)
    # One list for each column, as the values of a parameter are: they cannot be hashed.
    lists = [[c] for c in range(columns)]
    for item in items:
        item.callspec.params["column"] = lists[item.callspec.params["column"][0]]
    left_out = default_suite._left_out(items, default_suite.COVER)
    kept = [item.callspec.params for item in items if item not in left_out]
    assert {x["row"] for x in kept} == set(range(rows))
    assert {x["column"][0] for x in kept} == set(range(columns))
    assert len(kept) == max(rows, columns)


@pytest.mark.parametrize("wanted", [0, 1, 5, 12, 20])
def test_a_number_of_sets(wanted):
    items = matrix(4, 3)
    assert len(default_suite._left_out(items, wanted)) == 12 - min(wanted, 12)
