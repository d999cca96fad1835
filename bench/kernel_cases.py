"""The Triton kernels that the machine-code report covers: one entry each."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

import pallas_attn as pa
from bench.machine_code import lower_for_cuda
from pallas_attn import tuning
from pallas_attn.kernels import triton as kernels

# Two rows of 2048 tokens, eight query heads on two KV heads: their values leave no trace in the loops.
_BATCH, _LENGTH, _Q_HEADS, _KV_HEADS = 2, 2048, 8, 2


@dataclasses.dataclass(frozen=True)
class Setting:
    """What one kernel is compiled for; ``capability`` is ten times the compute capability."""

    capability: int
    head_dim: int
    dtype: str
    sizes: pa.BlockSizes


@dataclasses.dataclass(frozen=True)
class KernelCase:
    """A kernel under one mask.

    Attributes:
      name: of the case.
      kernel: its name in Pallas; cases of one kernel differ in their mask.
      about: the mask, in words.
      loops: names of the kernel's loops with matrix products, in their order; one named "full" must hold no mask.
      lower: a setting -> the lowered function.
      default_sizes: (head_dim, dtype, capability) -> the entry of the tuning table.
    """

    name: str
    kernel: str
    about: str
    loops: tuple[str, ...]
    lower: Callable[[Setting], object]
    default_sizes: Callable[[int, str, int], pa.BlockSizes]


def _forward(mask: pa.masks.Mask) -> Callable[[Setting], object]:
    def lower(setting: Setting):
        def forward(query, key, value, q_positions, kv_positions, mask):
            block_mask = pa.BlockMask.from_mask(mask, q_positions, kv_positions, setting.sizes)
            return kernels.forward(query, key, value, block_mask, scale=setting.head_dim**-0.5)

        def tensor(heads):
            return jax.ShapeDtypeStruct((_BATCH, _LENGTH, heads, setting.head_dim), setting.dtype)

        positions = jax.ShapeDtypeStruct((_BATCH, _LENGTH), jnp.int32)
        arguments = (tensor(_Q_HEADS), tensor(_KV_HEADS), tensor(_KV_HEADS), positions, positions, mask)
        return lower_for_cuda(forward, *arguments, capability=setting.capability)

    return lower


def _forward_sizes(head_dim: int, dtype: str, capability: int) -> pa.BlockSizes:
    return tuning.default_block_sizes(
        *(_LENGTH, _LENGTH),
        implementation="triton",
        head_dim=head_dim,
        dtype=jnp.dtype(dtype),
        compute_capability=capability / 10,
    )


def _forward_case(name: str, about: str, mask: pa.masks.Mask) -> KernelCase:
    return KernelCase(name, "pallas_attn_forward", about, ("full", "partial"), _forward(mask), _forward_sizes)


_CAUSAL = pa.masks.causal()
_ARRAY = pa.masks.dense(jnp.ones((1, 1, _LENGTH, _LENGTH), jnp.bool_))

CASES = [
    _forward_case("forward", "causal", _CAUSAL),
    _forward_case(
        "forward-composed",
        "causal & sliding_window(300) | sink(4)",
        _CAUSAL & pa.masks.sliding_window(300) | pa.masks.sink(4),
    ),
    _forward_case("forward-array", "causal & dense(array)", _CAUSAL & _ARRAY),
]
