"""Compiles whole functions by XLA for a GPU that is absent.

XLA's CUDA plugin compiles ahead of time from a description of a GPU: with its own Triton, its own fusions, CUDA graphs
and buffer assignment. Nothing runs, but everything that was compiled can be read: machine code (:func:`kernels`) and
the launches of a step (:mod:`bench.machine_code.launches`). Two things differ from a machine with the GPU: matrix
products outside of our kernels are not autotuned, and no time is measured.

The plugin is three wheels of the same version as jaxlib, without CUDA's libraries: ``python -m bench.xla_gpu`` fetches
them (220 MB).
"""

import contextlib
import functools
import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax

from bench.machine_code.compiled import Assembly, assemble, assumed_device
from bench.machine_code.gpus import GPUS
from pallas_attn import tuning
from pallas_attn.kernels import triton as triton_kernels

_JAXLIB = importlib.metadata.version("jaxlib")
# ptxas and libdevice, which the plugin of a CUDA version calls.
TOOLKITS = {12: ("nvidia-cuda-nvcc-cu12==12.9.86",), 13: ("nvidia-cuda-nvcc==13.0.88", "nvidia-nvvm==13.0.88")}


def folder() -> Path:
    """Where the plugin of this jaxlib is kept."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache, "pallas_attn", f"xla-gpu-{_JAXLIB}")


def fetch(cuda: int = 12) -> None:
    """Installs the wheels of the plugin into :func:`folder`, by pip.

    Raises:
      subprocess.CalledProcessError: pip failed, and printed why.
    """
    plugin = [f"jax-cuda{cuda}-{part}=={_JAXLIB}" for part in ("plugin", "pjrt")]
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(folder())]
    subprocess.run([*command, "--upgrade", *plugin, *TOOLKITS[cuda]], check=True)


def version() -> str:
    """The version of the plugin, with its version of CUDA."""
    return f"{str(_plugin()).removeprefix('jax_plugins.')} {_JAXLIB}"


def missing() -> str | None:
    """Why nothing can be compiled here, or None."""
    if _plugin() is None:
        return f"needs XLA's CUDA plugin of version {_JAXLIB}; to fetch it: python -m bench.xla_gpu"
    return None


def _plugin() -> str | None:
    """The module of the plugin."""
    if folder().exists() and str(folder()) not in sys.path:
        jax.devices()  # first, so that the plugin is not among the backends of this process
        sys.path.append(str(folder()))
        importlib.invalidate_caches()
    for cuda in TOOLKITS:
        with contextlib.suppress(ModuleNotFoundError):
            if importlib.util.find_spec(f"jax_plugins.xla_cuda{cuda}"):
                return f"jax_plugins.xla_cuda{cuda}"
    return None


def _toolkit() -> Path:
    """The folder of ptxas and libdevice."""
    for name in ("nvidia.cuda_nvcc", "nvidia.cu13"):
        with contextlib.suppress(ModuleNotFoundError):
            spec = importlib.util.find_spec(name)
            for location in (spec and spec.submodule_search_locations) or ():
                if Path(location, "bin", "ptxas").exists():
                    return Path(location)
    raise ModuleNotFoundError(f"ptxas: expected it in a wheel of {TOOLKITS}, found none; python -m bench.xla_gpu")


@functools.cache
def _initialize() -> None:
    if reason := missing():
        raise ModuleNotFoundError(reason)
    with mock.patch.dict(os.environ, JAX_SKIP_CUDA_CONSTRAINTS_CHECK="1"):  # there is no CUDA to check
        importlib.import_module(str(_plugin())).initialize()


@functools.cache
def _device(gpu: str) -> Any:
    from jax.experimental import topologies

    _initialize()
    topology = topologies.get_topology_desc(platform="cuda", target_config=GPUS[gpu].description, topology="1x1x1")
    return topology.devices[0]


@contextlib.contextmanager
def assumed(gpu: str) -> Iterator[None]:
    """``implementation="triton"`` is traced for an absent GPU, with its block sizes."""
    capability = GPUS[gpu].capability
    changed = capability != tuning.gpu_capability()
    if changed:  # a trace does not know for which GPU it was made
        jax.clear_caches()
    with (
        mock.patch.object(triton_kernels, "unavailable", return_value=None),
        mock.patch.object(triton_kernels, "gpu_capability", return_value=capability),
        mock.patch.object(tuning, "gpu_capability", return_value=capability),
        assumed_device(GPUS[gpu].kind),
    ):
        yield
    if changed:
        jax.clear_caches()


def on(gpu: str, tree: Any) -> Any:
    """Shapes of a tree of arrays or shapes, on the absent GPU."""
    sharding = jax.sharding.SingleDeviceSharding(_device(gpu))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def lower(function, *arguments, gpu: str) -> jax.stages.Lowered:
    """Lowers a function, jitted or not, for an absent GPU.

    Args:
      *arguments: trees of arrays or of ``jax.ShapeDtypeStruct``.
      gpu: a name in :data:`GPUS`.

    Raises:
      ModuleNotFoundError: the plugin is missing.
    """
    jitted = function if hasattr(function, "trace") else jax.jit(function)
    with assumed(gpu):
        return jitted.trace(*on(gpu, arguments)).lower(lowering_platforms=("cuda",))


def compile(lowered: jax.stages.Lowered, *, dump: Path | None = None, **options) -> jax.stages.Compiled:
    """Compiles a function that was lowered for an absent GPU.

    Args:
      dump: a folder for what XLA writes about the compilation, as text.
      **options: of XLA, as ``compiler_options`` of ``jax.jit`` takes them.
    """
    options |= {"xla_gpu_autotune_level": 0, "xla_gpu_cuda_data_dir": str(_toolkit())}
    if dump:
        # Since JAX 0.12 PTX is not written unless its emitter is named.
        options |= {"xla_dump_to": str(dump), "xla_dump_hlo_as_text": True, "xla_dump_emitter_re": ".*ptx.*"}
    with _uncached():
        return lowered.compile(compiler_options=options)


@contextlib.contextmanager
def _uncached() -> Iterator[None]:
    """Keeps what is compiled out of JAX's persistent cache: XLA writes nothing about what comes from there."""
    option = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, option)
    jax.config.update(option, float("inf"))
    try:
        yield
    finally:
        jax.config.update(option, before)


def kernels(lowered: jax.stages.Lowered, name: str) -> list[Assembly]:
    """The machine code of every kernel of this name in a lowered function, as XLA makes it."""
    with tempfile.TemporaryDirectory() as directory:
        compile(lowered, dump=Path(directory))
        return assembled(Path(directory), rf"{name}\b")


def assembled(dump: Path, pattern: str) -> list[Assembly]:
    """The machine code of the kernels whose names begin with ``pattern``, in the ``dump`` of :func:`compile`."""
    sources = [path.read_text() for path in sorted(dump.glob("*.ptx"), key=_order)]
    return [assemble(ptx, _toolkit() / "bin" / "ptxas") for ptx in sources if re.search(rf"\.entry {pattern}", ptx)]


def _order(path: Path) -> int:
    """The number in ``module_0001.jit_f.12.ptx``."""
    return int(path.name.split(".")[-2])
