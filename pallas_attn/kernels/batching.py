"""``jax.vmap`` of a kernel: the new axis joins the batch, since a grid has no room for another one."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_attn.block_mask import BlockMask
from pallas_attn.scores import Scores


def batched_forward(forward: Callable) -> Callable:
    """``forward(query, key, value, block_mask, scores, sinks) -> (out, lse)``, made ready for ``jax.vmap``."""

    @jax.custom_batching.custom_vmap
    def call(query, key, value, block_mask, scores, sinks):
        return forward(query, key, value, block_mask, scores, sinks)

    @call.def_vmap
    def rule(size: int, batched, query, key, value, block_mask, scores, sinks):
        arguments = (query, key, value, block_mask, scores, sinks)
        if any(jax.tree.leaves(batched[5])) or not _can_fold(scores):
            return _one_by_one(call, batched, arguments), (True, True)
        batch = query.shape[0 + batched[0]]
        tensors = [_join(x, b, size, batch) for x, b in zip(arguments[:3], batched[:3], strict=True)]
        block_mask, scores = _join_shared((block_mask, scores), (batched[3], batched[4]), size, batch)
        out, lse = call(*tensors, block_mask, scores, sinks)
        return (_split(out, size), _split(lse, size)), (True, True)

    return call


def batched_backward(backward: Callable) -> Callable:
    """``backward`` of an implementation, made ready for ``jax.vmap``."""

    @jax.custom_batching.custom_vmap
    def call(query, key, value, block_mask, scores, lse, delta, d_out):
        return backward(query, key, value, block_mask, scores, lse, delta, d_out)

    @call.def_vmap
    def rule(size: int, batched, query, key, value, block_mask, scores, lse, delta, d_out):
        arguments = (query, key, value, block_mask, scores, lse, delta, d_out)
        everything = (True, True, True, jax.tree.map(lambda _: True, scores))
        if not _can_fold(scores):
            return _one_by_one(call, batched, arguments), everything
        batch = query.shape[0 + batched[0]]
        tensors = [_join(x, b, size, batch) for x, b in zip(arguments, batched, strict=True) if isinstance(x, Array)]
        block_mask = _join_shared(block_mask, batched[3], size, batch)
        # Every element of the new axis gets its own gradient, so here no operand stays shared.
        rows = jax.tree.map(lambda x, b: x.shape[0 + b], scores, batched[4])
        whole = jax.tree.map(lambda x, b: _join(x, b, size, batch), scores, batched[4])
        *d_tensors, d_scores = call(*tensors[:3], block_mask, whole, *tensors[3:])
        d_scores = jax.tree.map(lambda x, n: _sum_rows(_split(x, size), n), d_scores, rows)
        return (*(_split(x, size) for x in d_tensors), d_scores), everything

    return call


def _can_fold(scores: Scores) -> bool:
    """Operands have an axis for the batch; parameters have none."""
    return not any(jax.tree.leaves(score) for score in scores if not score.aligned)


def _join(x: Array, is_batched: bool, size: int, batch: int) -> Array:
    """``[size, B|1, ...]``, or ``[B|1, ...]`` for all, to ``[size * B, ...]``."""
    x = x if is_batched else jnp.broadcast_to(x[None], (size, *x.shape))
    return jnp.broadcast_to(x, (size, batch, *x.shape[2:])).reshape(size * batch, *x.shape[2:])


def _join_shared(tree: BlockMask | tuple, batched, size: int, batch: int):
    """The same for arrays ``[B|1, ...]`` of a pytree; what is shared by all stays so."""

    def join(x: Array, is_batched: bool) -> Array:
        return x if not is_batched and x.shape[0] == 1 else _join(x, is_batched, size, batch)

    return jax.tree.map(join, tree, batched)


def _split(x: Array, size: int) -> Array:
    return x.reshape(size, -1, *x.shape[1:])


def _sum_rows(x: Array, rows: int) -> Array:
    """``[size, B, ...]`` to ``[size, rows, ...]``, where an operand has one row for all."""
    return x if x.shape[1] == rows else x.sum(1, keepdims=True)


def _one_by_one(function: Callable, batched: tuple, arguments: tuple):
    leaves, structure = jax.tree.flatten(arguments)
    flags = jax.tree.leaves(batched)

    def step(mapped: list[Array]):
        remaining = iter(mapped)
        mixed = [next(remaining) if flag else x for x, flag in zip(leaves, flags, strict=True)]
        return function(*jax.tree.unflatten(structure, mixed))

    return lax.map(step, [x for x, flag in zip(leaves, flags, strict=True) if flag])
