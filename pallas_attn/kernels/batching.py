"""``jax.vmap`` of a kernel: the new axis joins the batch, since a grid has at most three axes.

That would copy keys and values that all elements share. So in the forward pass, if queries are the smaller part, the
new axis joins the axis of queries instead.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_attn import pointwise
from pallas_attn.block_mask import BlockMask
from pallas_attn.kernels.call import Call
from pallas_attn.scores import Scores, Traced


def batched_forward(forward: Callable, *, paged: bool, return_key_weights: bool = False) -> Callable:
    """``forward(call) -> (out, lse)``, made ready for ``jax.vmap``; with ``return_key_weights`` a third result.

    With a page table (``paged``) elements run one after another.
    """
    if paged:
        return jax.custom_batching.sequential_vmap(forward)
    run = jax.custom_batching.custom_vmap(forward)

    @run.def_vmap
    def rule(size: int, batched_arguments: Sequence[Call], call: Call):
        (batched,) = batched_arguments
        _check_size(size)
        can_fold = _can_fold(call.scores, batched.block_mask) and not any(jax.tree.leaves(batched.sinks))
        into_queries = can_fold and _shares_keys(batched, call)
        if not can_fold or (into_queries and return_key_weights):  # key weights sum over all queries of a row
            return _all_batched(_sequential(run, batched_arguments, (call,)))
        if into_queries:
            return _all_batched(_fold_into_queries(run, size, batched, call))
        batch = call.query.shape[0 + batched.query]
        query, key, value = (_join(x, b, size, batch) for x, b in zip(call[:3], batched[:3], strict=True))
        block_mask = _join_block_mask(call.block_mask, batched.block_mask, size, batch)
        scores = _join_shared(call.scores, batched.scores, size, batch)
        results = run(Call(query, key, value, block_mask, scores, call.sinks))
        return _all_batched(jax.tree.map(lambda x: _split(x, size), results))

    return run


def batched_backward(backward: Callable) -> Callable:
    """``backward(call, lse, delta, d_out)`` of an implementation, made ready for ``jax.vmap``."""

    run = jax.custom_batching.custom_vmap(backward)

    @run.def_vmap
    def rule(size: int, batched: Sequence, call: Call, *residuals):
        _check_size(size)
        flags, *residual_flags = batched
        if not _can_fold(call.scores, flags.block_mask):
            return _all_batched(_sequential(run, batched, (call, *residuals)))
        batch = call.query.shape[0 + flags.query]

        def join(x: Any, is_batched: Any) -> Any:
            return jax.tree.map(lambda x, b: _join(x, b, size, batch), x, is_batched)

        query, key, value = join(tuple(call[:3]), tuple(flags[:3]))
        block_mask = _join_block_mask(call.block_mask, flags.block_mask, size, batch)
        # Every element gets its own gradient, so no operand stays shared.
        rows = jax.tree.map(lambda x, b: x.shape[0 + b], call.scores, flags.scores)
        whole = join(call.scores, flags.scores)
        *d_tensors, d_scores = run(
            Call(query, key, value, block_mask, whole), *join(tuple(residuals), tuple(residual_flags))
        )
        d_scores = jax.tree.map(lambda x, n: _sum_rows(_split(x, size), n), d_scores, rows)
        return _all_batched((*(_split(x, size) for x in d_tensors), d_scores))

    return run


def _all_batched(results: tuple) -> tuple:
    """The return value of a batching rule whose results all have the new axis."""
    return results, jax.tree.map(lambda _: True, results)


def _can_fold(scores: Scores, batched: BlockMask) -> bool:
    """Whether the axis can join the batch: tables have no batch axis, and scores may read the row of their element."""
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
    """The same for arrays ``[B|1, ...]`` of a pytree; arrays that all rows share stay shared."""

    def join(x: Array, is_batched: bool) -> Array:
        return x if not is_batched and x.shape[0] == 1 else _join(x, is_batched, size, batch)

    return pointwise.map_operands(join, tree, batched)


def _join_block_mask(block_mask: BlockMask, batched: BlockMask, size: int, batch: int) -> BlockMask:
    """Joins the batches; the schedule is rebuilt, since it depends on the rows of the whole batch."""
    bare, batched = (dataclasses.replace(x, schedule=None) for x in (block_mask, batched))
    return _join_shared(bare, batched, size, batch).with_schedule()


def _split(x: Array, size: int) -> Array:
    return x.reshape(size, -1, *x.shape[1:])


def _sum_rows(x: Array, rows: int) -> Array:
    """``[size, B, ...]`` to ``[size, rows, ...]``, for an operand whose single row all rows share."""
    return x if x.shape[1] == rows else x.sum(1, keepdims=True)


def _shares_keys(batched: Call, call: Call) -> bool:
    """Whether only queries and per-query operands are batched, and padded queries are no more than the keys."""
    if not batched.query or batched.key or batched.value or batched.block_mask.kv_positions:
        return False
    flags = pointwise.operands((batched.block_mask.mask, batched.scores))
    operands = zip(pointwise.operands((call.block_mask.mask, call.scores)), flags, strict=True)
    query, key, block_mask = call.query, call.key, call.block_mask
    per_query = all(x.shape[3] == query.shape[2] for x, is_batched in operands if is_batched)
    return per_query and block_mask.grid[0] * block_mask.q_block * query.shape[3] <= key.shape[1] * key.shape[2]


def _fold_into_queries(function: Callable, size: int, batched: Call, call: Call):
    """Runs the forward pass on the queries of all elements, each padded to whole blocks."""
    flags: Any = batched.block_mask
    query, block_mask = call.query, call.block_mask
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

    lists = jax.tree.map(lambda x, is_batched: join(x, is_batched, 2), block_mask.lists, flags.lists)
    first_block = jnp.arange(size * q_blocks, dtype=jnp.int32) // q_blocks * q_blocks
    block_mask = dataclasses.replace(
        block_mask,
        mask=pointwise.map_operands(operand, block_mask.mask, flags.mask),
        q_positions=join_tokens(block_mask.q_positions, flags.q_positions, 1, -1),
        lists=dataclasses.replace(lists, order=lists.order + first_block[None, None]),
        schedule=None,
    )
    scores = jax.tree.map(operand, call.scores, batched.scores)
    call = call._replace(query=join_tokens(query, True, 1, 0), block_mask=block_mask, scores=scores)
    out, lse = function(call)
    return split(out, 1), jax.tree.map(lambda x: split(x, 2), lse)


def _sequential(function: Callable, batched: Sequence, arguments: tuple):
    leaves, structure = jax.tree.flatten(arguments)
    flags = jax.tree.leaves(batched)

    def step(mapped: list[Array]):
        remaining = iter(mapped)
        mixed = [next(remaining) if flag else x for x, flag in zip(leaves, flags, strict=True)]
        return function(*jax.tree.unflatten(structure, mixed))

    return lax.map(step, [x for x, flag in zip(leaves, flags, strict=True) if flag])
