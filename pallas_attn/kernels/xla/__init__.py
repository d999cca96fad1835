"""Block-skipping attention in plain XLA: what runs without a GPU."""

from typing import Any

from jax import Array

from pallas_attn.block_mask import BlockMask
from pallas_attn.kernels.spec import CallSpec
from pallas_attn.kernels.xla.backward import backward as backward
from pallas_attn.kernels.xla.decode import decode
from pallas_attn.kernels.xla.forward import forward as prefill
from pallas_attn.kernels.xla.key_weights import key_weights
from pallas_attn.kernels.xla.storage import Paged
from pallas_attn.quantized import QuantizedArray
from pallas_attn.scores import Scores

Keys = Array | QuantizedArray


def forward(
    query: Array,
    key: Keys,
    value: Keys,
    block_mask: BlockMask,
    scores: Scores = (),
    sinks: Array | None = None,
    *,
    scale: float,
    page_table: Array | None = None,
    return_key_weights: bool = False,
) -> tuple[Any, ...]:
    """Same contract as :func:`pallas_attn.kernels.reference.forward`."""
    stored = (key, value) if page_table is None else (Paged(key, page_table), Paged(value, page_table))
    if block_mask.schedule is not None:
        return decode(query, *stored, block_mask, scores, sinks, scale=scale, return_key_weights=return_key_weights)
    out, lse = prefill(query, *stored, block_mask, scores, sinks, scale=scale)
    if not return_key_weights:
        return out, lse
    return out, lse, key_weights(query, stored[0], block_mask, scores, lse, scale=scale)


def unavailable() -> None:
    """XLA runs everywhere."""


def unsupported(spec: CallSpec) -> None:
    """Serves every call."""
