"""Block-skipping attention in plain XLA, the default without a GPU."""

from typing import Any

from pallas_attn.kernels.call import Call, CallSpec
from pallas_attn.kernels.xla.flash_backward import backward as backward
from pallas_attn.kernels.xla.flash_decode import decode
from pallas_attn.kernels.xla.flash_forward import forward as prefill
from pallas_attn.kernels.xla.key_weight_pass import key_weights
from pallas_attn.kernels.xla.storage import PagedArray


def forward(call: Call, *, scale: float, return_key_weights: bool = False) -> tuple[Any, ...]:
    """Same contract as :func:`pallas_attn.kernels.reference.forward`."""
    if call.page_table is not None:
        pools = (PagedArray(x, call.page_table) for x in (call.key, call.value))
        call = call._replace(**dict(zip(("key", "value"), pools, strict=True)), page_table=None)
    if call.block_mask.schedule is not None:
        return decode(call, scale=scale, return_key_weights=return_key_weights)
    out, lse = prefill(call, scale=scale)
    if not return_key_weights:
        return out, lse
    return out, lse, key_weights(call, lse, scale=scale)


def unavailable() -> None:
    """XLA runs everywhere."""


def unsupported(spec: CallSpec) -> None:
    """Serves every call."""
