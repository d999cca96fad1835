"""Compiles Triton kernels to machine code on a machine without a GPU.

JAX lowers a Pallas kernel to Triton IR inside a custom call. PyPI's `triton` compiles that IR for any NVIDIA target,
and the tools in its wheel disassemble the result. The passes are those of XLA, but XLA carries its own version of
Triton, so this is evidence, not proof.
"""

import contextlib
import dataclasses
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from jax._src.lib.triton import dialect as triton_dialect
from jaxlib.mlir import ir

# One GPU that JAX knows for each compute capability.
DEVICE_KINDS = {80: "NVIDIA A100-SXM4-40GB", 90: "NVIDIA H100"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Assembly:
    """A kernel as ptxas assembles it.

    Attributes:
      name: the kernel's name.
      num_warps: warps per program.
      registers: registers per thread.
      stack_bytes: stack per thread, which holds spilled registers.
      spill_stores, spill_loads: instructions that write and read the stack.
      ptx, sass: assembly.
    """

    name: str
    num_warps: int
    registers: int
    stack_bytes: int
    spill_stores: int
    spill_loads: int
    ptx: str
    sass: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class MachineCode(Assembly):
    """A kernel as PyPI's Triton compiles it.

    Attributes:
      shared_bytes: shared memory per program.
      ir: the Triton IR, as text, whose lines ``sass`` refers to.
      sass: nvdisasm's text, with a comment of the line of ``ir`` before each change of line.
    """

    shared_bytes: int
    ir: str


def lower_for_cuda(function: Callable, *arguments, capability: int = 90):
    """Lowers ``function`` for a GPU of compute capability 80 or 90, which may be absent.

    Args:
      function: calls the Triton kernels directly, because ``attention`` finds no GPU to choose them for.
      *arguments: arrays or ``jax.ShapeDtypeStruct``.
      capability: ten times the compute capability.
    """
    if capability not in DEVICE_KINDS:
        raise ValueError(f"capability: expected one of {sorted(DEVICE_KINDS)}, got {capability}")
    with assumed_device(DEVICE_KINDS[capability]):
        return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",))


@contextlib.contextmanager
def assumed_device(kind: str) -> Iterator[None]:
    """JAX lowers Triton kernels for a GPU of this kind."""
    if jax.__version_info__ < (0, 11):  # needs no device and assumes compute capability 9.0
        yield
        return
    from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

    device = AbstractDevice(device_kind=kind, num_cores=None, platform="gpu")
    # No axes: differentiation inside a kernel fails with one.
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        yield


def compile_kernels(lowered, capability: int = 90, *, name: str | None = None) -> list[MachineCode]:
    """Compiles every Triton kernel of a lowered function, or those of one name, in order of appearance.

    Triton caches results under a key of the IR, the options and its version (``TRITON_CACHE_DIR``).

    Raises:
      ModuleNotFoundError: PyPI's `triton` is not installed (extra [bench]).
      FileNotFoundError: the wheel of `triton` lacks one of its tools.
    """
    calls = triton_calls(lowered.compiler_ir("stablehlo").operation)
    return [_compile(config, capability) for config in calls if name in (None, config["name"].value)]


def kernel_irs(lowered) -> list[tuple[str, str]]:
    """``(name, Triton IR)`` of every Triton kernel of a lowered function, in order of appearance."""
    calls = triton_calls(lowered.compiler_ir("stablehlo").operation)
    return [(config["name"].value, _as_text(config["ir"].value_bytes)) for config in calls]


def _compile(config: dict, capability: int) -> MachineCode:
    import triton
    from triton.backends.compiler import GPUTarget

    target = GPUTarget("cuda", capability, 32)
    options = {
        "num_warps": config["num_warps"].value,
        "num_stages": config["num_stages"].value,
        # As XLA does: fused multiply-adds, and denormals in libdevice (`xla_gpu_ftz` is off).
        "enable_fp_fusion": True,
        "enable_reflect_ftz": False,
    }
    text = _as_text(config["ir"].value_bytes)
    with tempfile.TemporaryDirectory() as directory:
        source, simplified = Path(directory, "kernel.ttir"), Path(directory, "simplified.ttir")
        source.write_text(text)
        simplified.write_text(_simplified(source, target, options))
        compiled = triton.compile(str(simplified), target=target, options=options)
        cubin = Path(directory, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        return MachineCode(
            **_disassembled(cubin),
            name=config["name"].value,
            num_warps=options["num_warps"],
            shared_bytes=compiled.metadata.shared,
            ir=text,
            ptx=compiled.asm["ptx"],
        )


def assemble(ptx: str, ptxas: Path) -> Assembly:
    """Assembles the PTX of one kernel."""
    name, target, threads = (
        re.search(pattern, ptx) for pattern in (r"\.entry (\w+)", r"\.target (\w+)", r"\.(?:req|max)ntid (\d+)")
    )
    if not (name and target and threads):
        raise ValueError("ptx: expected a kernel with .target and .reqntid, got none")
    with tempfile.TemporaryDirectory() as directory:
        source, cubin = Path(directory, "kernel.ptx"), Path(directory, "kernel.cubin")
        source.write_text(ptx)
        _run(str(ptxas), f"-arch={target[1]}", str(source), "-o", str(cubin))
        return Assembly(**_disassembled(cubin), name=name[1], num_warps=int(threads[1]) // 32, ptx=ptx)


def _disassembled(cubin: Path) -> dict[str, Any]:
    """Resources and assembly of a binary of one kernel."""
    usage = _run(_tool("cuobjdump"), "-res-usage", str(cubin))
    sass = _run(_tool("nvdisasm"), "--print-code", "--print-line-info-inline", str(cubin))
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage:\n{usage}")
    return {
        "registers": int(found[1]),
        "stack_bytes": int(found[2]),
        "spill_stores": len(re.findall(r"\bSTL\b", sass)),
        "spill_loads": len(re.findall(r"\bLDL\b", sass)),
        "sass": sass,
    }


def triton_calls(operation) -> Iterator[dict]:
    for region in operation.regions:
        for block in region.blocks:
            for child in block.operations:
                child = child.operation
                if child.name == "stablehlo.custom_call" and "triton" in str(child.attributes["call_target_name"]):
                    yield {attribute.name: attribute.attr for attribute in child.attributes["mhlo.backend_config"]}
                yield from triton_calls(child)


def _as_text(bytecode: bytes) -> str:
    """The module without JAX's locations, so that lines of the text become the locations."""
    with ir.Context() as context:
        triton_dialect.register_dialect(context)
        # The parser must accept attributes of other Triton versions.
        context.allow_unregistered_dialects = True
        return str(ir.Module.parse(bytecode))


def _simplified(source: Path, target, options: dict) -> str:
    """The IR after Triton's first passes, which XLA runs and `triton.compile` skips for a file.

    One of them turns ``acc * decay + dot(p, v)`` into a product that accumulates in place; without it the kernel would
    need registers for a second accumulator.
    """
    from triton._C.libtriton import ir as triton_ir
    from triton.backends.nvidia.compiler import CUDABackend

    backend = CUDABackend(target)
    context = triton_ir.context()
    triton_ir.load_dialects(context)
    backend.load_dialects(context)
    module = triton_ir.parse_mlir_module(str(source), context)
    module.context = context
    simplified = backend.make_ttir(module, {}, backend.parse_options(dict(options)), target.arch)
    # A temporary directory in the locations would defeat Triton's cache.
    return str(simplified).replace(str(source), source.name)


def _tool(name: str) -> str:
    from triton.backends import nvidia

    path = Path(nvidia.__file__).parent / "bin" / name
    if not path.exists():
        raise FileNotFoundError(f"{name}: expected it in the wheel of triton at {path}, found none")
    return str(path)


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
