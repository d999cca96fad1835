"""Which implementation serves a call, and how it is run."""

import functools
from types import ModuleType
from typing import Any

import jax
from jax import Array

from pallas_attn import checks, tuning
from pallas_attn.arguments import Arguments
from pallas_attn.kernels import reference, triton, xla
from pallas_attn.kernels.call import Call
from pallas_attn.kernels.derivative import differentiable
from pallas_attn.quantized import QuantizedArray
from pallas_attn.refusal import no_forward_mode, without_derivative
from pallas_attn.tuning import BlockSizes

# Best first. Each module has `forward`, `backward` (the reference needs none: JAX differentiates it), `unavailable()`
# (why it cannot run on this machine) and `unsupported(spec)` (why it cannot serve a call).
IMPLEMENTATIONS: dict[str, ModuleType] = {"triton": triton, "xla": xla, "reference": reference}
_NO_GRADIENT = (
    "quantized keys and values have no gradient: give plain ones (QuantizedArray.dequantize()), or stop the gradient by"
    " jax.lax.stop_gradient"
)


def implementations() -> dict[str, str | None]:
    """Every implementation's name, best first, with None if it can run on this machine, else the reason in words."""
    return {name: module.unavailable() for name, module in IMPLEMENTATIONS.items()}


def choose(
    arguments: Arguments,
    implementation: str | None,
    *,
    interpret: bool,
    key_weights: bool,
    block_sizes: BlockSizes | None,
) -> tuple[str, BlockSizes]:
    """The best implementation that can serve the call, and its block sizes.

    Raises:
      TypeError, ValueError: a wrong ``implementation`` or ``block_sizes``.
      NotImplementedError: none can serve the call; it names every reason.
    """
    if not isinstance(implementation, str | None):
        wanted = f"one of {list(IMPLEMENTATIONS)} or None"
        raise TypeError(f"implementation: expected {wanted}, got {checks.describe(implementation)}")
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation: expected one of {list(IMPLEMENTATIONS)} or None, got {implementation!r}")
    if interpret and implementation not in (None, "triton"):
        raise ValueError(f"interpret: expected implementation='triton' or None with it, got {implementation!r}")
    if block_sizes is not None and not isinstance(block_sizes, BlockSizes):
        raise TypeError(f"block_sizes: expected pallas_attn.BlockSizes, got {checks.describe(block_sizes)}")
    if arguments.block_mask is not None:
        block_sizes = arguments.block_mask.block_sizes
    names = ["triton"] if interpret else [implementation] if implementation else list(IMPLEMENTATIONS)
    shape, reasons = arguments.shape, {}
    for name in names:
        module = IMPLEMENTATIONS[name]
        sizes = block_sizes or tuning.default_block_sizes(
            shape.q_len,
            shape.kv_len,
            implementation=name,
            head_dim=max(shape.head_dim, shape.value_dim),
            dtype=arguments.query.dtype,
            fine=arguments.mask.has_fine_edges(),
        )
        unavailable = None if interpret else module.unavailable()
        reasons[name] = unavailable or module.unsupported(arguments.spec(sizes, key_weights=key_weights))
        if reasons[name] is None:
            return name, sizes
    why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise NotImplementedError(f"no requested implementation supports this call. {why}")


def run(name: str, call: Call, **options: Any) -> tuple[Array, ...]:
    """``(out, lse)`` of an implementation, and key weights if the options say so, with the derivatives that it has.

    Args:
      **options: keywords of its passes.
    """
    module = IMPLEMENTATIONS[name]
    if isinstance(call.key, QuantizedArray) or isinstance(call.value, QuantizedArray):
        forward = jax.custom_batching.sequential_vmap(functools.partial(module.forward, **options))
        out, lse, *rest = without_derivative(forward, _NO_GRADIENT)(call)
    elif module is reference:
        out, lse, *rest = reference.forward(call, **options)
    else:
        attend = differentiable(module, name, paged=call.page_table is not None, **options)
        remedy = f"implementation={name!r} has derivatives in reverse mode only; for forward mode (jvp, jacfwd)"
        with no_forward_mode(TypeError(f"{remedy} pass implementation='reference'")):
            return attend(call)
    return out, lse.value, *rest
