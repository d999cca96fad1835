"""Block-skipping attention in plain XLA: what runs without a GPU."""

from jax import Array

from pallas_attn.block_mask import BlockMask
from pallas_attn.kernels.spec import CallSpec
from pallas_attn.kernels.xla.backward import backward as backward
from pallas_attn.kernels.xla.decode import decode
from pallas_attn.kernels.xla.forward import forward as prefill
from pallas_attn.kernels.xla.key_weights import key_weights as weigh_keys
from pallas_attn.kernels.xla.storage import Paged
from pallas_attn.quantized import QuantizedArray

Keys = Array | QuantizedArray


def forward(
    query: Array,
    key: Keys,
    value: Keys,
    block_mask: BlockMask,
    *rest,
    page_table: Array | None = None,
    **options,
) -> tuple[Array, Array]:
    """Same contract as :func:`pallas_attn.kernels.reference.forward`."""
    run = prefill if block_mask.schedule is None else decode
    stored = (key, value) if page_table is None else (Paged(key, page_table), Paged(value, page_table))
    return run(query, *stored, block_mask, *rest, **options)


def key_weights(
    query: Array, key: Keys, block_mask: BlockMask, *rest, page_table: Array | None = None, **options
) -> Array:
    """Same contract as :func:`pallas_attn.kernels.reference.key_weights`."""
    stored = key if page_table is None else Paged(key, page_table)
    return weigh_keys(query, stored, block_mask, *rest, **options)


def unavailable() -> None:
    """XLA runs everywhere."""


def unsupported(spec: CallSpec) -> None:
    """Serves every call."""
