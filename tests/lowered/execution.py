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


_original = pl.pallas_call
# Programs of these kernels that have no work leave their results unwritten; later kernels must not read those.
_PARTLY_WRITTEN = {"pallas_attn_decode"}


@contextlib.contextmanager
def executed(*, capability: int = 90, edit: Callable[[Lowered], Lowered] = lambda x: x) -> Iterator[Watch]:
    """Runs every kernel of ``implementation="triton"`` in the interpreter, as if this machine had a GPU.

    Programs that JAX traced before or inside are forgotten on entry and on exit.

    Args:
      capability: 80 or 90, ten times the compute capability of the GPU that kernels are lowered for.
      edit: changes kernels before they run.

    Yields:
      the watch, which collects faults.
    """
    watch = Watch()

    def pallas_call(*arguments: Any, **options: Any) -> Callable:
        call = _original(*arguments, **options)
        return call if options.get("interpret") else _runs_here(call, options, watch, capability, edit)

    with contextlib.ExitStack() as stack:
        stack.callback(jax.clear_caches)
        stack.enter_context(mock.patch.object(pl, "pallas_call", pallas_call))
        stack.enter_context(mock.patch.object(triton, "unavailable", return_value=None))
        for module in (tuning, triton):
            stack.enter_context(mock.patch.object(module, "gpu_capability", return_value=capability / 10))
        jax.clear_caches()
        yield watch


def _runs_here(
    call: Callable, options: dict[str, Any], watch: Watch, capability: int, edit: Callable[[Lowered], Lowered]
) -> Callable:
    aliases = dict(options.get("input_output_aliases", {}))

    def run(*operands: Any) -> Any:
        flat, structure = jax.tree.flatten(operands)
        shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in flat]
        expected, of_results = jax.tree.flatten(jax.eval_shape(call, *operands))
        (lowered,) = lower(lambda *x: call(*jax.tree.unflatten(structure, x)), *shapes, capability=capability)
        kernel, results = edit(lowered).compiled(), [(x.shape, x.dtype) for x in expected]
        is_complete = lowered.name not in _PARTLY_WRITTEN

        def on_host(*arrays: Any) -> tuple[np.ndarray, ...]:
            operands = [np.asarray(x) for x in arrays]
            return tuple(kernel.run(operands, results, watch, aliases=aliases, is_complete=is_complete))

        found = jax.pure_callback(on_host, tuple(expected), *flat, vmap_method="sequential")
        return jax.tree.unflatten(of_results, found)

    return run
