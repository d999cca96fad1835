"""Pallas kernels through the Triton lowering. Nothing outside this package depends on that lowering."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_attn import pointwise
from pallas_attn.kernels.call import Call, CallSpec
from pallas_attn.kernels.triton.flash_backward import backward as backward
from pallas_attn.kernels.triton.flash_decode import decode
from pallas_attn.kernels.triton.flash_forward import forward as prefill
from pallas_attn.kernels.triton.key_weight_pass import key_weights as key_weights
from pallas_attn.kernels.triton.tables import not_lowered
from pallas_attn.tuning import gpu_capability

_MAX_HEAD_DIM = 256
_MAX_BLOCK = 1024  # Triton's largest tile has 2^20 elements
_MIN_INT4_HEAD_DIM = 32


def forward(call: Call, *, return_key_weights: bool = False, **options) -> tuple[Any, ...]:
    """Same contract as :func:`pallas_attn.kernels.reference.forward`."""
    if call.block_mask.schedule is not None:
        return decode(call, return_key_weights=return_key_weights, **options)
    out, lse = prefill(call, **options)
    if not return_key_weights:
        return out, lse
    return out, lse, key_weights(call, lse, **options)


@functools.cache
def unavailable() -> str | None:
    """Why the compiled kernels cannot run on this machine, or None."""
    try:
        devices = jax.devices("cuda")
    except RuntimeError:
        return "needs an NVIDIA GPU, and JAX sees none (interpret=True runs the kernels anywhere, slowly)"
    if gpu_capability() < 8.0:
        return f"needs compute capability 8.0 or newer, and this {devices[0].device_kind} has {gpu_capability()}"
    try:
        _probe.lower()
    except Exception as error:  # since JAX 0.11 the lowering refuses GPUs that JAX does not list, by several types
        return f"this JAX cannot lower Triton kernels for {devices[0].device_kind}: {error}"
    return None


def unsupported(spec: CallSpec) -> str | None:
    """Why these kernels cannot serve a call, or None."""
    for name, size in {"q": spec.block_sizes.q, "kv": spec.block_sizes.kv}.items():
        if size < 16 or size & (size - 1):
            return f"needs block sizes that are powers of two and at least 16, got {name}={size}"
        if size > _MAX_BLOCK:
            return f"needs block sizes of at most {_MAX_BLOCK}, got {name}={size}"
    if max(spec.shape.head_dim, spec.shape.value_dim) > _MAX_HEAD_DIM:
        return f"needs head sizes up to {_MAX_HEAD_DIM}, got {max(spec.shape.head_dim, spec.shape.value_dim)}"
    for kind, head_dim in ((spec.key_kind, spec.shape.head_dim), (spec.value_kind, spec.shape.value_dim)):
        if kind == "int4" and head_dim < _MIN_INT4_HEAD_DIM:
            return f"needs head sizes of at least {_MIN_INT4_HEAD_DIM} for int4, got {head_dim}"
        if kind == "float8_e4m3fn" and unavailable() is None and gpu_capability() < 8.9:
            return f"needs compute capability 8.9 or newer for float8_e4m3fn, and this GPU has {gpu_capability()}"
    if missing := not_lowered((spec.mask, spec.scores)):
        return f"needs custom functions without {', '.join(missing)}"
    # Offsets are signed, and have 32 bits for arrays of up to 2^32 bytes, else 64. That is too few where an element is
    # one byte. And places in tables always have 32 bits.
    narrow = [x for x in jax.tree.leaves((spec.mask, spec.scores)) if x.dtype.itemsize == 1]
    narrow += pointwise.table_arrays((spec.mask, spec.scores))
    largest = max(spec.largest_quantized, *(x.size for x in narrow), 0)
    if largest >= 2**31:
        what = "arrays of bytes (bool masks, quantized keys) and tables of custom functions of fewer than 2^31 elements"
        return f"needs {what}, whose offsets have 32 bits, got {largest}"
    return None


@jax.jit
def _probe():
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as plgpu

    def kernel(out_ref):
        out_ref[:] = jnp.zeros_like(out_ref)

    shape = jax.ShapeDtypeStruct((16,), jnp.float32)
    return pl.pallas_call(kernel, out_shape=shape, compiler_params=plgpu.CompilerParams(num_warps=1))()
