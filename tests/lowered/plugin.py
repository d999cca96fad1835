"""``pytest --execute-lowered -m gpu``: the tests of compiled kernels, in the interpreter of Triton IR."""

from collections.abc import Iterator
from unittest import mock

import pytest

from pallas_attn.kernels import triton
from tests.lowered.execution import executed


class ExecuteLowered:
    """Lets tests believe in a GPU while they are collected, and runs those marked ``gpu``."""

    def __init__(self) -> None:
        self._belief = mock.patch.object(triton, "unavailable", return_value=None)
        self._belief.start()

    def pytest_unconfigure(self) -> None:
        self._belief.stop()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Function) -> Iterator[None]:
        if not item.get_closest_marker("gpu"):
            return (yield)
        with executed() as watch:
            result = yield
        watch.assert_clean()
        return result
