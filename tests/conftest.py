"""Settings for all tests: JAX's strictest flags, data seeded by test name, and skips without a GPU."""

import importlib.metadata
import os
import sys
import zlib

# XLA reads its flags when JAX is imported. The older emitters halve the compile time of the tests, and programs in one
# piece take another fifth less than in the pieces that XLA compiles side by side; newer versions lack the first flag,
# and XLA aborts on unknown flags. Workers of xdist do not have the command line: they inherit the flags.
if (
    importlib.metadata.version("jaxlib").startswith("0.10.")
    and "--optimize" not in sys.argv
    and "PYTEST_XDIST_WORKER" not in os.environ
):
    flags = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, settings

import pallas_attn as pa
from tests import default_suite

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# The same examples on every machine, without deadlines.
settings.register_profile(
    "repeatable", deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("repeatable")


def pytest_addoption(parser):
    parser.addoption(
        "--optimize",
        action="store_true",
        help="compile with LLVM's optimizations, as users do; slower",
    )
    parser.addoption(
        "--execute-lowered",
        action="store_true",
        help="run the tests of compiled kernels (-m gpu) without a GPU, in the interpreter of tests/lowered",
    )


def pytest_configure(config):
    if config.getoption("--execute-lowered"):
        from tests.lowered.plugin import ExecuteLowered

        config.pluginmanager.register(ExecuteLowered())
    if not config.getoption("--optimize"):
        _set("jax_disable_most_optimizations", True)
    if hasattr(config, "cache"):  # `-p no:cacheprovider` removes it
        # Workers and later runs share compiled programs; `pytest --cache-clear` removes them.
        _set("jax_compilation_cache_dir", str(config.cache.mkdir(f"xla-{jax.__version__}")))
        _set("jax_persistent_cache_min_compile_time_secs", 0)
        _set("jax_persistent_cache_min_entry_size_bytes", -1)


def _set(flag: str, value: bool | int | str) -> None:
    """Sets a flag of JAX here and in the processes that tests start."""
    jax.config.update(flag, value)
    os.environ[flag.upper()] = str(value)


@pytest.hookimpl(tryfirst=True)  # before `-m` selects by marks
def pytest_collection_modifyitems(items):
    """Marks what the default suite leaves out, and, without a GPU, the tests of compiled kernels as skipped."""
    for item in default_suite.left_out(items):
        item.add_marker(pytest.mark.slow)
        item.add_marker(pytest.mark.matrix)
    reason = pa.implementations()["triton"]
    if reason is None:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=f"compiled Triton kernels: {reason}"))


@pytest.fixture(autouse=True)
def _data_by_name(request):
    """Seeds the module's generator ``rng`` with the test's name, so that data does not depend on earlier tests."""
    rng = getattr(request.module, "rng", None)
    if isinstance(rng, np.random.Generator):
        seed = zlib.crc32(request.node.name.encode())
        rng.bit_generator.state = np.random.default_rng(seed).bit_generator.state


@pytest.fixture(autouse=True, scope="module")
def _forgotten_programs():
    """Drops the compiled programs of a module, which would otherwise grow to several gigabytes."""
    yield
    jax.clear_caches()


@pytest.fixture
def compilations():
    """A list that collects the name of every program that XLA compiles."""
    names = []

    def listen(event, _, *, fun_name="", **__):
        # JAX moves NumPy arrays to the device with the program "stage".
        if event == "/jax/core/compile/backend_compile_duration" and fun_name != "jit(stage)":
            names.append(fun_name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield names
    jax.monitoring.unregister_event_duration_listener(listen)
