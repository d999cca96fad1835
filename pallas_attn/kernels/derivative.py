"""The derivative of attention from a kernel's forward and backward pass."""

import functools
from types import ModuleType

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from pallas_attn.block_mask import BlockMask
from pallas_attn.kernels.batching import batched_backward, batched_forward, paged_forward
from pallas_attn.kernels.lse import Lse


def differentiable(implementation: ModuleType, name: str, *, return_key_weights: bool = False, **options):
    """``implementation.forward`` with ``implementation.backward`` as its derivative, of first order and in reverse.

    It takes a page table before the other arguments, or None. With one, the backward pass copies every row's pages. Its
    second result is the lse rounded to one number.

    Args:
      implementation: a module with ``forward`` and ``backward``.
      name: its name in messages.
      return_key_weights: they are a third result, without a derivative.
      **options: keywords of both passes.
    """
    run = functools.partial(implementation.forward, return_key_weights=return_key_weights, **options)
    in_rows, in_pages = batched_forward(run, return_key_weights=return_key_weights), paged_forward(run)

    def forward(page_table, *arguments):
        return in_rows(*arguments) if page_table is None else in_pages(page_table, *arguments)

    forward_once = _once_only(forward, name)  # a second derivative would begin here
    backward = _once_only(batched_backward(functools.partial(implementation.backward, **options)), name)

    @jax.custom_vjp
    def attend(page_table, query, key, value, block_mask, scores, sinks):
        out, lse, *weights = forward(page_table, query, key, value, block_mask, scores, sinks)
        return out, lse.value, *weights

    def attend_forward(page_table, query, key, value, block_mask, scores, sinks):
        results = forward_once(page_table, query, key, value, block_mask, scores, sinks)
        out, lse, *weights = jax.tree.map(lambda x: checkpoint_name(x, "pallas_attn"), results)
        return (out, lse.value, *weights), (page_table, query, key, value, block_mask, scores, sinks, out, lse)

    def attend_backward(residuals, cotangents):
        page_table, query, key, value, block_mask, scores, sinks, out, lse = residuals
        d_out, d_lse, *_ = cotangents
        delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), -1).swapaxes(1, 2) - d_lse
        d_sinks = None if sinks is None else _sinks_gradient(sinks, block_mask, lse, delta)
        (key, value), d_pools = jax.vjp(lambda *pools: tuple(_in_a_row(x, page_table) for x in pools), key, value)
        d_query, d_key, d_value, d_scores = backward(query, key, value, block_mask, scores, lse, delta, d_out)
        return None, d_query, *d_pools((d_key, d_value)), None, d_scores, d_sinks

    attend.defvjp(attend_forward, attend_backward)

    def attend_or_refuse(*arguments):
        try:
            return attend(*arguments)
        except TypeError as error:
            if "forward-mode" not in str(error):
                raise
            # JAX says what is missing; this says what to do.
            message = f"implementation={name!r} has derivatives in reverse mode only; for forward mode (jvp, jacfwd)"
            raise TypeError(f"{message} pass implementation='reference'") from error

    return attend_or_refuse


def _in_a_row(x: Array, page_table: Array | None) -> Array:
    """``[B, S, K, D]`` of a pool ``[P, page, K, D]``; without a table it is that already."""
    if page_table is None:
        return x
    pages = x[jnp.clip(page_table, 0, x.shape[0] - 1)]
    return pages.reshape(pages.shape[0], -1, *x.shape[2:])


def _sinks_gradient(sinks: Array, block_mask: BlockMask, lse: Lse, delta: Array) -> Array:
    """A sink is a key without a value, so its ``dp`` is 0: ``d_sink = sum(p_sink * (0 - delta))``."""
    real = (block_mask.q_positions >= 0)[:, None] & (lse.peak != -jnp.inf)  # not >: what is not a number shows
    below_largest = sinks.astype(jnp.float32)[None, :, None] - jnp.where(real, lse.largest, jnp.inf)
    probability = jnp.exp(below_largest - lse.log_total)
    return -jnp.sum(probability * jnp.where(real, delta, 0.0), axis=(0, 2)).astype(sinks.dtype)


def _once_only(function, name: str):
    """A second derivative would have to differentiate kernels: it says what to do instead of failing inside."""
    kernel = jax.custom_vjp(function)

    def refuse(*_):
        raise NotImplementedError(
            f"implementation={name!r} has first derivatives only; for higher ones pass implementation='reference'"
        )

    kernel.defvjp(refuse, refuse)
    return kernel
