"""Runs programs of kernels whose arrays are too large for any memory, on buffers without memory.

Lists, schedules and page tables hold values that lead a program to the end of the arrays.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from tests.lowered.execution import intercepted, lower_call
from tests.lowered.faults import Watch
from tests.lowered.memory import VirtualBuffer


@dataclasses.dataclass(frozen=True)
class Corner:
    """What a program visits.

    Attributes:
      block: its only block.
      is_full: whether all pairs of that block are visible.
      row: its row of the schedule, in decode.
      page: of all blocks.
    """

    block: int
    is_full: bool
    row: int = 0
    page: int = 0

    def value(self, path: str, shape: tuple[int, ...]) -> Callable | int:
        """The elements of an int32 operand, by the end of its path in the arguments of the kernel."""
        programs = shape[0] - 1
        values: dict[str, Callable | int] = {
            ".q_positions": 2**30,
            ".kv_positions": 0,
            ".num_full": int(self.is_full),
            ".num_active": 1,
            ".indices": self.block,
            ".order": lambda offset: offset % shape[-1],
            ".row": self.row,
            ".first": 0,
            ".last": 1,
            ".begin": programs,
            ".count": 1,
            ".page_table": self.page,
        }
        name = path[path.rfind(".") :] if "." in path else ""
        # Operands without a name: positions of queries, numbers of visible blocks, and the lists of decode.
        return values[name] if name else (self.block if len(shape) == 4 and shape[-1] > 1 else 1)


@dataclasses.dataclass(frozen=True)
class Visit:
    """What the programs of one kernel did: its Triton IR, and its buffers."""

    kernel: str
    text: str
    buffers: list[VirtualBuffer]


def at_corners(function: Callable, operands: Sequence[Any], corners: Sequence[Corner], watch: Watch) -> list[Visit]:
    """Runs the programs in the corners of the grid of every kernel that a function calls.

    Args:
      operands: trees of ``jax.ShapeDtypeStruct``.
      watch: gets the faults.
    """
    visits = []

    def handle(call: Callable, options: dict[str, Any], arguments: tuple) -> Any:
        lowered = lower_call(call, arguments)
        kernel, results = lowered.compiled(), jax.eval_shape(call, *arguments)
        for corner in corners:
            buffers = [
                VirtualBuffer(path, x.shape, x.dtype, _value(corner, path, x), is_output=False)
                for path, x in _named(arguments)
            ]
            buffers += [
                VirtualBuffer(f"result{path}", x.shape, x.dtype, 0, is_output=True) for path, x in _named(results)
            ]
            kernel.run_on(buffers, watch, itertools.product(*_ends(kernel.name, kernel.grid, corner)))
            visits.append(Visit(kernel.name, lowered.text, buffers))
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), results)

    with intercepted(handle):
        jax.eval_shape(function, *operands)
    return visits


def _ends(kernel: str, grid: tuple[int, ...], corner: Corner) -> list[set[int]]:
    """The first and the last program along each axis of the grid."""
    ends = [{0, size - 1} for size in grid]
    if kernel == "pallas_attn_key_weights" and corner.is_full:
        # A program owns a block of keys. If some are beyond S, no block of queries is full for it.
        ends[0] = {0, corner.block}
    return ends


def _named(tree: Any) -> list[tuple[str, Any]]:
    return [(jax.tree_util.keystr(path), x) for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]]


def _value(corner: Corner, path: str, x: Any) -> Callable | float:
    if x.dtype == jnp.int32:
        return corner.value(path, x.shape)
    return 1 if x.dtype.kind in "iub" else 0.5
