"""What the machine code of a Triton kernel says, on a machine without a GPU.

JAX lowers a Pallas kernel to Triton IR inside a custom call. PyPI's `triton` compiles that IR for any NVIDIA target,
and its `cuobjdump` reads the result. XLA carries its own version of Triton, so this is evidence, not proof.
"""

import contextlib
import dataclasses
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
from jax._src.lib.triton import dialect as triton_dialect
from jaxlib.mlir import ir

# One GPU that JAX knows for each compute capability.
_DEVICE_KINDS = {80: "NVIDIA A100-SXM4-40GB", 90: "NVIDIA H100"}


@dataclasses.dataclass(frozen=True)
class MachineCode:
    """Resources of one compiled kernel; ``stack_bytes`` and spills are per thread, ``shared_bytes`` per program."""

    name: str
    registers: int
    stack_bytes: int
    spill_stores: int
    shared_bytes: int
    ptx: str
    sass: str


def lower_for_cuda(function: Callable, *arguments, capability: int = 90):
    """Lowers ``function`` for a GPU of compute capability 80 or 90 that need not be there.

    Args:
      function: what to lower; it calls the Triton kernels directly, since ``attention`` finds no GPU to choose.
      *arguments: arrays or ``jax.ShapeDtypeStruct``.
      capability: ten times the compute capability.
    """
    if capability not in _DEVICE_KINDS:
        raise ValueError(f"capability: expected one of {sorted(_DEVICE_KINDS)}, got {capability}")
    with _assumed_device(_DEVICE_KINDS[capability]):
        return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",))


@contextlib.contextmanager
def _assumed_device(kind: str) -> Iterator[None]:
    if jax.__version_info__ < (0, 11):  # needs no device, and takes compute capability 9.0 for granted
        yield
        return
    from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

    device = AbstractDevice(device_kind=kind, num_cores=None, platform="gpu")
    # No axes: with one, differentiation inside a kernel fails.
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        yield


def compile_kernels(lowered, capability: int = 90) -> list[MachineCode]:
    """Compiles every Triton kernel of a lowered function, in order of appearance.

    Raises:
      ModuleNotFoundError: PyPI's `triton` is not installed (extra [bench]).
    """
    import triton
    from triton.backends.compiler import GPUTarget

    kernels = []
    for config in _triton_calls(lowered.compiler_ir("stablehlo").operation):
        options = {
            "num_warps": config["num_warps"].value,
            "num_stages": config["num_stages"].value,
            "enable_fp_fusion": True,  # as XLA compiles it
        }
        with tempfile.TemporaryDirectory() as directory:
            source = Path(directory, "kernel.ttir")
            source.write_text(_as_text(config["ir"].value_bytes))
            compiled = triton.compile(str(source), target=GPUTarget("cuda", capability, 32), options=options)
            cubin = Path(directory, "kernel.cubin")
            cubin.write_bytes(compiled.asm["cubin"])
            usage = _run(_tool("cuobjdump"), "-res-usage", str(cubin))
            sass = _run(_tool("cuobjdump"), "-sass", str(cubin))
        found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
        if found is None:
            raise RuntimeError(f"cuobjdump printed no resource usage:\n{usage}")
        kernels.append(
            MachineCode(
                name=config["name"].value,
                registers=int(found[1]),
                stack_bytes=int(found[2]),
                spill_stores=len(re.findall(r"\bSTL\b", sass)),
                shared_bytes=compiled.metadata.shared,
                ptx=compiled.asm["ptx"],
                sass=sass,
            )
        )
    return kernels


def _triton_calls(operation) -> Iterator[dict]:
    for region in operation.regions:
        for block in region.blocks:
            for child in block.operations:
                child = child.operation
                if child.name == "stablehlo.custom_call" and "triton" in str(child.attributes["call_target_name"]):
                    yield {attribute.name: attribute.attr for attribute in child.attributes["mhlo.backend_config"]}
                yield from _triton_calls(child)


def _as_text(bytecode: bytes) -> str:
    with ir.Context() as context:
        triton_dialect.register_dialect(context)
        # An attribute that a newer Triton does not know must not stop the parser.
        context.allow_unregistered_dialects = True
        return str(ir.Module.parse(bytecode))


def _tool(name: str) -> str:
    from triton.backends import nvidia

    return str(Path(nvidia.__file__).parent / "bin" / name)


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
