"""From JAX to the interpreter: inside :func:`executed`, ``pl.pallas_call`` lowers its kernel and runs it here.

Calls run inside ``jax.pure_callback``, so that jit, vjp, vmap and scan work around them.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import numpy as np
from jax.experimental import pallas as pl

from bench.machine_code.compiled import lower_for_cuda, triton_calls
from pallas_attn import tuning
from pallas_attn.kernels import triton
from tests.lowered import ttir
from tests.lowered.faults import Watch
from tests.lowered.interpreter import Grid, Kernel


@dataclasses.dataclass(frozen=True)
class Lowered:
    """What a GPU would run: a kernel's name, its Triton IR with locations in Python, and its grid."""

    name: str
    text: str
    grid: Grid

    def compiled(self) -> Kernel:
        """The kernel for the interpreter."""
        return Kernel(self.name, self.text, self.grid)


def lower(function: Callable, *operands: Any, capability: int = 90) -> list[Lowered]:
    """The Triton kernels of a function, lowered for a GPU that may be absent.

    Args:
      *operands: arrays or ``jax.ShapeDtypeStruct``.
      capability: 80 or 90, ten times the compute capability.
    """
    lowered = lower_for_cuda(function, *operands, capability=capability)
    return [
        Lowered(
            config["name"].value,
            ttir.as_text(config["ir"].value_bytes),
            tuple(config[f"grid_{axis}"].value for axis in "xyz"),
        )
        for config in triton_calls(lowered.compiler_ir("stablehlo").operation)
    ]


def lower_call(call: Callable, operands: tuple, *, capability: int = 90) -> Lowered:
    """The only kernel of a function of arrays, tracers or ``jax.ShapeDtypeStruct``."""
    flat, structure = jax.tree.flatten(operands)
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in flat]
    (lowered,) = lower(lambda *x: call(*structure.unflatten(x)), *shapes, capability=capability)
    return lowered


_original = pl.pallas_call
# Programs of these kernels that have no work leave their results unwritten; later kernels must not read those.
_PARTLY_WRITTEN = {"pallas_attn_decode"}
# A function of what pl.pallas_call returned, its options and the operands of the kernel, instead of that call.
Handler = Callable[[Callable, dict[str, Any], tuple], Any]


@contextlib.contextmanager
def intercepted(handle: Handler, *, capability: int = 90) -> Iterator[None]:
    """Lets ``handle`` run every kernel of ``implementation="triton"``, as if this machine had a GPU.

    Programs that JAX traced before or inside are forgotten on entry and on exit.

    Args:
      capability: 80 or 90, ten times the compute capability of that GPU.
    """

    def pallas_call(*arguments: Any, **options: Any) -> Callable:
        call = _original(*arguments, **options)
        return call if options.get("interpret") else lambda *operands: handle(call, options, operands)

    with contextlib.ExitStack() as stack:
        stack.callback(jax.clear_caches)
        stack.enter_context(mock.patch.object(pl, "pallas_call", pallas_call))
        stack.enter_context(mock.patch.object(triton, "unavailable", return_value=None))
        for module in (tuning, triton):
            stack.enter_context(mock.patch.object(module, "gpu_capability", return_value=capability / 10))
        jax.clear_caches()
        yield


@contextlib.contextmanager
def executed(*, capability: int = 90, edit: Callable[[Lowered], Lowered] = lambda x: x) -> Iterator[Watch]:
    """Runs every kernel of ``implementation="triton"`` in the interpreter.

    Args:
      capability: as for :func:`intercepted`.
      edit: changes kernels before they run.

    Yields:
      the watch, which collects faults.
    """
    watch = Watch()

    def handle(call: Callable, options: dict[str, Any], operands: tuple) -> Any:
        lowered = edit(lower_call(call, operands, capability=capability))
        kernel, is_complete = lowered.compiled(), lowered.name not in _PARTLY_WRITTEN
        expected, structure = jax.tree.flatten(jax.eval_shape(call, *operands))
        results = [(x.shape, x.dtype) for x in expected]
        aliases = dict(options.get("input_output_aliases", {}))

        def on_host(*arrays: Any) -> tuple[np.ndarray, ...]:
            arrays = tuple(np.asarray(x) for x in arrays)
            return tuple(kernel.run(arrays, results, watch, aliases=aliases, is_complete=is_complete))

        flat = jax.tree.leaves(operands)
        return structure.unflatten(jax.pure_callback(on_host, tuple(expected), *flat, vmap_method="sequential"))

    with intercepted(handle, capability=capability):
        yield watch
