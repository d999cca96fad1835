"""``jax.vmap`` of a kernel: the new axis joins the batch, since a grid has no room for another one.

Keys and values that are the same for the whole axis would have to be copied for that. So in the forward pass, where
queries are the smaller part, the axis joins theirs: the queries of one element after those of another.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_attn import pointwise
from pallas_attn.block_mask import BlockMask
from pallas_attn.scores import Scores, Traced


def batched_forward(forward: Callable, *, return_key_weights: bool = False) -> Callable:
    """``forward(query, key, value, block_mask, scores, sinks) -> (out, lse)``, made ready for ``jax.vmap``.

    With ``return_key_weights`` these are a third result.
    """

    @jax.custom_batching.custom_vmap
    def call(query, key, value, block_mask, scores, sinks):
        return forward(query, key, value, block_mask, scores, sinks)

    @call.def_vmap
    def rule(size: int, batched, query, key, value, block_mask, scores, sinks):
        _check_size(size)
        arguments = (query, key, value, block_mask, scores, sinks)
        can_fold = _can_fold(scores, batched[3]) and not any(jax.tree.leaves(batched[5]))
        in_a_row = can_fold and _shares_keys(batched, query, key, block_mask, scores)
        if not can_fold or (in_a_row and return_key_weights):  # which are summed over all queries in the row
            return _all_batched(_one_by_one(call, batched, arguments))
        if in_a_row:
            return _all_batched(_in_a_row(call, size, batched, *arguments))
        batch = query.shape[0 + batched[0]]
        tensors = [_join(x, b, size, batch) for x, b in zip(arguments[:3], batched[:3], strict=True)]
        block_mask = _join_block_mask(block_mask, batched[3], size, batch)
        scores = _join_shared(scores, batched[4], size, batch)
        results = call(*tensors, block_mask, scores, sinks)
        return _all_batched(jax.tree.map(lambda x: _split(x, size), results))

    return call


def paged_forward(forward: Callable) -> Callable:
    """``forward`` with its keyword ``page_table`` as its first argument; ``jax.vmap`` runs it one by one."""
    return jax.custom_batching.sequential_vmap(
        lambda page_table, *arguments: forward(*arguments, page_table=page_table)
    )


def batched_backward(backward: Callable) -> Callable:
    """``backward`` of an implementation, made ready for ``jax.vmap``."""

    @jax.custom_batching.custom_vmap
    def call(query, key, value, block_mask, scores, lse, delta, d_out):
        return backward(query, key, value, block_mask, scores, lse, delta, d_out)

    @call.def_vmap
    def rule(size: int, batched, query, key, value, block_mask, scores, lse, delta, d_out):
        _check_size(size)
        arguments = (query, key, value, block_mask, scores, lse, delta, d_out)
        if not _can_fold(scores, batched[3]):
            return _all_batched(_one_by_one(call, batched, arguments))
        batch = query.shape[0 + batched[0]]
        operands = (query, key, value, lse, delta, d_out), (*batched[:3], *batched[5:])
        tensors = jax.tree.map(lambda x, b: _join(x, b, size, batch), *operands)
        block_mask = _join_block_mask(block_mask, batched[3], size, batch)
        # Every element of the new axis gets its own gradient, so here no operand stays shared.
        rows = jax.tree.map(lambda x, b: x.shape[0 + b], scores, batched[4])
        whole = jax.tree.map(lambda x, b: _join(x, b, size, batch), scores, batched[4])
        *d_tensors, d_scores = call(*tensors[:3], block_mask, whole, *tensors[3:])
        d_scores = jax.tree.map(lambda x, n: _sum_rows(_split(x, size), n), d_scores, rows)
        return _all_batched((*(_split(x, size) for x in d_tensors), d_scores))

    return call


def _all_batched(results: tuple) -> tuple:
    """What a rule returns: results that all have the new axis."""
    return results, jax.tree.map(lambda _: True, results)


def _can_fold(scores: Scores, batched: BlockMask) -> bool:
    """Operands have an axis for the batch; tables have none. Scores that ask for the row mean that of one element."""
    asks_for_row = any(isinstance(score, Traced) and score.reads_row for score in scores)
    return not asks_for_row and not pointwise.table_arrays(scores) and not any(pointwise.table_arrays(batched.mask))


def _check_size(size: int) -> None:
    if size == 0:
        raise ValueError("jax.vmap: expected an axis of at least 1, got one of size 0")


def _join(x: Array, is_batched: bool, size: int, batch: int) -> Array:
    """``[size, B|1, ...]``, or ``[B|1, ...]`` for all, to ``[size * B, ...]``."""
    x = x if is_batched else jnp.broadcast_to(x[None], (size, *x.shape))
    return jnp.broadcast_to(x, (size, batch, *x.shape[2:])).reshape(size * batch, *x.shape[2:])


def _join_shared(tree: Any, batched: Any, size: int, batch: int) -> Any:
    """The same for arrays ``[B|1, ...]`` of a pytree; what is shared by all stays so."""

    def join(x: Array, is_batched: bool) -> Array:
        return x if not is_batched and x.shape[0] == 1 else _join(x, is_batched, size, batch)

    return pointwise.map_operands(join, tree, batched)


def _join_block_mask(block_mask: BlockMask, batched: BlockMask, size: int, batch: int) -> BlockMask:
    """A schedule counts the rows of the whole batch, so it is made anew."""
    bare, batched = (dataclasses.replace(x, schedule=None) for x in (block_mask, batched))
    return _join_shared(bare, batched, size, batch).with_schedule()


def _split(x: Array, size: int) -> Array:
    return x.reshape(size, -1, *x.shape[1:])


def _sum_rows(x: Array, rows: int) -> Array:
    """``[size, B, ...]`` to ``[size, rows, ...]``, where an operand has one row for all."""
    return x if x.shape[1] == rows else x.sum(1, keepdims=True)


def _shares_keys(batched: tuple, query: Array, key: Array, block_mask: BlockMask, scores: Scores) -> bool:
    """Only queries, and what has an axis for them, have the new axis; in whole blocks they are no more than keys."""
    if not batched[0] or batched[1] or batched[2] or batched[3].kv_positions:
        return False
    flags = pointwise.operands((batched[3].mask, batched[4]))
    operands = zip(pointwise.operands((block_mask.mask, scores)), flags, strict=True)
    per_query = all(x.shape[3] == query.shape[2] for x, is_batched in operands if is_batched)
    return per_query and block_mask.grid[0] * block_mask.q_block * query.shape[3] <= key.shape[1] * key.shape[2]


def _in_a_row(function: Callable, size: int, batched, query, key, value, block_mask, scores, sinks):
    """The forward pass over the queries of all elements, each element's filled up to whole blocks."""
    q_len, q_blocks = query.shape[2], block_mask.grid[0]
    rows = q_blocks * block_mask.q_block

    def join(x: Array, is_batched: bool, axis: int) -> Array:
        """``[size, .., n, ..]``, or ``[.., n, ..]`` for all, to ``[.., size * n, ..]``, with n at ``axis``."""
        x = jnp.moveaxis(x if is_batched else jnp.broadcast_to(x[None], (size, *x.shape)), 0, axis)
        return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])

    def join_tokens(x: Array, is_batched: bool, axis: int, fill: int) -> Array:
        padding = [(0, rows - q_len if i == axis + is_batched else 0, 0) for i in range(x.ndim)]
        return join(lax.pad(x, jnp.asarray(fill, x.dtype), padding), is_batched, axis)

    def split(x: Array, axis: int) -> Array:
        x = x.reshape(*x.shape[:axis], size, rows, *x.shape[axis + 1 :])
        return jnp.moveaxis(lax.slice_in_dim(x, 0, q_len, axis=axis + 1), axis, 0)

    def operand(x: Array, is_batched: bool) -> Array:
        return join_tokens(x, is_batched, 2, 0) if is_batched or x.shape[2] > 1 else x

    lists = jax.tree.map(lambda x, is_batched: join(x, is_batched, 2), block_mask.lists, batched[3].lists)
    first_block = jnp.arange(size * q_blocks, dtype=jnp.int32) // q_blocks * q_blocks
    block_mask = dataclasses.replace(
        block_mask,
        mask=pointwise.map_operands(operand, block_mask.mask, batched[3].mask),
        q_positions=join_tokens(block_mask.q_positions, batched[3].q_positions, 1, -1),
        lists=dataclasses.replace(lists, order=lists.order + first_block[None, None]),
        schedule=None,
    )
    scores = jax.tree.map(operand, scores, batched[4])
    out, lse = function(join_tokens(query, True, 1, 0), key, value, block_mask, scores, sinks)
    return split(out, 1), jax.tree.map(lambda x: split(x, 2), lse)


def _one_by_one(function: Callable, batched: tuple, arguments: tuple):
    leaves, structure = jax.tree.flatten(arguments)
    flags = jax.tree.leaves(batched)

    def step(mapped: list[Array]):
        remaining = iter(mapped)
        mixed = [next(remaining) if flag else x for x, flag in zip(leaves, flags, strict=True)]
        return function(*jax.tree.unflatten(structure, mixed))

    return lax.map(step, [x for x, flag in zip(leaves, flags, strict=True) if flag])
