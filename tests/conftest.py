"""Shared by all tests: JAX at its strictest, and what becomes of tests that need a GPU."""

import jax
import pytest

import pallas_attn as pa

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_collection_modifyitems(items):
    """On a machine without a GPU, says why the tests of compiled kernels are skipped."""
    reason = pa.implementations()["triton"]
    if reason is None:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=f"compiled Triton kernels: {reason}"))


@pytest.fixture
def compilations():
    """A list that grows by one with every module that XLA compiles."""
    events = []

    def listen(event, *_, **__):
        if event == "/jax/core/compile/backend_compile_duration":
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield events
    jax.monitoring.unregister_event_duration_listener(listen)
