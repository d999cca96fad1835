"""``pytest --execute-lowered -m gpu``: the tests of compiled kernels, in the interpreter of Triton IR."""

from collections.abc import Iterator
from unittest import mock

import pytest

from pallas_attn.kernels import triton
from tests.lowered.execution import executed

# Tests that pass on a GPU only, by the file's name and the test's.
NEED_A_GPU: dict[str, str] = {}


class ExecuteLowered:
    """Lets tests believe in a GPU while they are collected, and runs those marked ``gpu``."""

    def __init__(self) -> None:
        self._belief = mock.patch.object(triton, "unavailable", return_value=None)
        self._belief.start()

    def pytest_unconfigure(self) -> None:
        self._belief.stop()

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Function) -> None:
        if item.get_closest_marker("gpu"):
            reason = NEED_A_GPU.get(f"{item.path.stem}::{item.originalname}")
            if reason:
                pytest.skip(reason)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Function) -> Iterator[None]:
        if not item.get_closest_marker("gpu"):
            return (yield)
        with executed() as watch:
            result = yield
        watch.assert_clean()
        return result
