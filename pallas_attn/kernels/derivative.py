"""The derivative of attention from a kernel's forward and backward pass."""

import functools
from collections.abc import Callable
from types import ModuleType

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from pallas_attn.block_mask import BlockMask
from pallas_attn.kernels.batching import batched_backward, batched_forward
from pallas_attn.kernels.call import Call
from pallas_attn.kernels.lse import Lse


def differentiable(
    implementation: ModuleType, name: str, *, paged: bool, return_key_weights: bool = False, **options
) -> Callable:
    """``implementation.forward`` with ``implementation.backward`` as its derivative, of first order and in reverse.

    It takes a :class:`Call` and returns ``(out, lse)``, the lse rounded to one number. With a page table the backward
    pass copies every row's pages.

    Args:
      implementation: a module with ``forward`` and ``backward``.
      name: its name in messages.
      paged: whether calls have a page table.
      return_key_weights: return them too, without a derivative.
      **options: keywords of both passes.
    """
    run = functools.partial(implementation.forward, return_key_weights=return_key_weights, **options)
    forward = batched_forward(run, paged=paged, return_key_weights=return_key_weights)
    forward_once = _once_only(forward, name)  # a second derivative would begin here
    backward = _once_only(batched_backward(functools.partial(implementation.backward, **options)), name)

    @jax.custom_vjp
    def attend(call: Call):
        out, lse, *weights = forward(call)
        return out, lse.value, *weights

    def attend_forward(call: Call):
        out, lse, *weights = jax.tree.map(lambda x: checkpoint_name(x, "pallas_attn"), forward_once(call))
        return (out, lse.value, *weights), (call, out, lse)

    def attend_backward(residuals, cotangents):
        call, out, lse = residuals
        d_out, d_lse, *_ = cotangents
        delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), -1).swapaxes(1, 2) - d_lse
        d_sinks = None if call.sinks is None else _sinks_gradient(call.sinks, call.block_mask, lse, delta)
        (key, value), d_pools = jax.vjp(
            lambda *pools: tuple(_contiguous(x, call.page_table) for x in pools), call.key, call.value
        )
        call = call._replace(key=key, value=value, sinks=None, page_table=None)
        d_query, d_key, d_value, d_scores = backward(call, lse, delta, d_out)
        return (Call(d_query, *d_pools((d_key, d_value)), None, d_scores, d_sinks, None),)  # type: ignore[arg-type]

    attend.defvjp(attend_forward, attend_backward)

    return attend


def _contiguous(x: Array, page_table: Array | None) -> Array:
    """``[B, S, K, D]`` of a pool ``[P, page, K, D]``; without a table it is that already."""
    if page_table is None:
        return x
    pages = x[jnp.clip(page_table, 0, x.shape[0] - 1)]
    return pages.reshape(pages.shape[0], -1, *x.shape[2:])


def _sinks_gradient(sinks: Array, block_mask: BlockMask, lse: Lse, delta: Array) -> Array:
    """A sink is a key without a value, so its ``dp`` is 0: ``d_sink = sum(p_sink * (0 - delta))``."""
    valid = (block_mask.q_positions >= 0)[:, None] & (lse.peak != -jnp.inf)  # !=, not >, so that NaN propagates
    below_largest = sinks.astype(jnp.float32)[None, :, None] - jnp.where(valid, lse.largest, jnp.inf)
    probability = jnp.exp(below_largest - lse.log_total)
    return -jnp.sum(probability * jnp.where(valid, delta, 0.0), axis=(0, 2)).astype(sinks.dtype)


def _once_only(function, name: str):
    """A second derivative would have to differentiate kernels: refuse it here and name the implementation that can."""
    kernel = jax.custom_vjp(function)

    def refuse(*_):
        raise NotImplementedError(
            f"implementation={name!r} has first derivatives only; for higher ones pass implementation='reference'"
        )

    kernel.defvjp(refuse, refuse)
    return kernel
