"""The watch over executed kernels."""

from collections.abc import Iterator

import pytest

from tests.lowered.execution import executed
from tests.lowered.faults import Watch


@pytest.fixture(scope="module")
def _module_watch() -> Iterator[Watch]:
    with executed() as watch:
        yield watch


@pytest.fixture
def watch(_module_watch: Watch) -> Iterator[Watch]:
    """Kernels of a test run in the interpreter; the test fails if none ran, or if one has a fault."""
    _module_watch.programs.clear()
    yield _module_watch
    _module_watch.assert_clean()
    assert _module_watch.programs, "no kernel ran"
