"""The gradients of the arrays of scores: biases, slopes, parameters.

One call per array. A program owns one tile of the result and visits, in a fixed order, every live block that uses the
tile; so no two programs add to the same memory, and no T x S array is allocated except the operand's own. An operand
that does not depend on the key has few tiles, and parameters have none; for these every (batch row, head, query block)
owns a partial sum, and the sums are added afterwards.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_attn import pointwise
from pallas_attn import scores as score_algebra
from pallas_attn.block_mask import BlockMask
from pallas_attn.kernels.triton import specs, tiles
from pallas_attn.kernels.triton.coords import ProgramCoords
from pallas_attn.kernels.triton.query_block import QueryBlock
from pallas_attn.kernels.triton.specs import KernelArgs, Residuals, Tiling
from pallas_attn.kernels.triton.stored import StoredKeys
from pallas_attn.kernels.triton.tables import LookedUp, look_up, place_sums, width_of
from pallas_attn.scores import Score, Scores, Traced
from pallas_attn.tuning import BlockSizes


def score_gradients(
    tiling: Tiling, scores: Scores, inputs: KernelArgs, residuals: Residuals, block_mask: BlockMask
) -> Scores:
    """The gradient of every array of the scores, in its shape and dtype; None for tables of integers."""
    bitmap = block_mask.bitmap().astype(jnp.int32)  # offsets into bytes have 32 bits

    def gradient(at: int, which: int, x: Array) -> Array | None:
        if not pointwise.is_floating(x):
            return None
        call = _table_gradient if isinstance(scores[at], Traced) else _operand_gradient
        kernel = functools.partial(_kernel, tiling=tiling, at=at, which=which)
        return call(kernel, tiling, x, inputs, residuals, bitmap, block_mask.block_sizes).astype(x.dtype)

    gradients = []
    for at, score in enumerate(scores):
        leaves, structure = jax.tree.flatten(score)
        gradients.append(jax.tree.unflatten(structure, [gradient(at, n, x) for n, x in enumerate(leaves)]))
    return tuple(gradients)


def _operand_gradient(
    kernel, tiling: Tiling, operand: Array, inputs, residuals, bitmap: Array, sizes: BlockSizes
) -> Array:
    """Of ``[B|1, N|1, T|1, S|1]``."""
    rows, heads, queries, keys = operand.shape
    if keys == 1:
        # [B, N, T], or a number for every query block
        shape = (tiling.batch, tiling.q_heads, tiling.q_len if queries > 1 else tiling.q_blocks)
        padded = (tiling.batch, tiling.q_heads, tiling.q_rows if queries > 1 else tiling.q_blocks)
        grid = (tiling.q_blocks, tiling.q_heads, tiling.batch)
    else:
        shape = operand.shape
        padded = (rows, heads, tiling.q_rows if queries > 1 else 1, tiling.kv_rows)
        grid = (tiling.kv_blocks, tiling.q_blocks if queries > 1 else 1, rows * heads)
    kernel = functools.partial(kernel, shape=operand.shape)
    gradient = _call(kernel, tiling, inputs, residuals, bitmap, sizes, grid, padded, shape)
    if keys == 1:
        summed = zip(gradient.shape, operand.shape[:3], strict=True)
        axes = tuple(axis for axis, (size, wanted) in enumerate(summed) if size != wanted)
        gradient = gradient.sum(axes, keepdims=True)[..., None]
    return gradient


def _table_gradient(
    kernel, tiling: Tiling, params: Array, inputs, residuals, bitmap: Array, sizes: BlockSizes
) -> Array:
    """Of an array of parameters, of any shape: every (batch row, head, query block) has sums for the whole table."""
    width = width_of(params.shape)
    shape = (tiling.batch, tiling.q_heads, tiling.q_blocks, width)
    kernel = functools.partial(kernel, shape=(tiling.batch, tiling.q_heads, tiling.q_blocks, 1), width=width)
    grid = (tiling.q_blocks, tiling.q_heads, tiling.batch)
    sums = _call(kernel, tiling, inputs, residuals, bitmap, sizes, grid, shape, shape)
    return sums.sum((0, 1, 2))[: params.size].reshape(params.shape)


def _call(kernel, tiling: Tiling, inputs, residuals, bitmap, sizes: BlockSizes, grid, padded, shape) -> Array:
    return specs.call(
        kernel,
        "pallas_attn_d_score",
        sizes,
        tiling,
        grid=grid,
        in_specs=[inputs.block_specs(tiling), residuals.block_specs(tiling), specs.whole(bitmap)],
        out_specs=specs.of_shape(padded),
        out_shape=jax.ShapeDtypeStruct(shape, jnp.float32),
    )(inputs, residuals, bitmap)


def _kernel(
    refs: KernelArgs,
    residuals: Residuals,
    bitmap_ref,
    out_ref,
    *,
    tiling: Tiling,
    at: int,
    which: int,
    shape: tuple[int, ...],
    width: int | None = None,
):
    """The gradient of array ``which`` of score ``at``: an operand's of that shape, or a table's of that width."""
    rows, heads, queries, keys = shape
    first, second, third = (pl.program_id(axis) for axis in range(3))
    # Number of batch rows, query heads and query blocks that share a tile of the operand.
    free = (1 if rows > 1 else tiling.batch, 1 if heads > 1 else tiling.q_heads, 1 if queries > 1 else tiling.q_blocks)
    visits = tiling.kv_blocks if keys == 1 else math.prod(free)

    def block_of(visit: Array) -> tuple[Array, Array, Array, Array]:
        """``(batch row, query head, query block, KV block)``."""
        if keys == 1:
            return third, second, first, visit
        b = visit // (free[1] * free[2])
        # Not %, which does not lower within a loop.
        n, i = lax.rem(visit // free[2], np.int32(free[1])), lax.rem(visit, np.int32(free[2]))
        return (
            third // heads if rows > 1 else b,
            third % heads if heads > 1 else n,
            second if queries > 1 else i,
            first,
        )

    def visit_block(visit: Array, acc: Array) -> Array:
        b, n, i, j = block_of(visit)
        coords = ProgramCoords(b, n // tiling.group, n)
        live = bitmap_ref[*coords.at(bitmap_ref, tiling), i, j] > 0
        # A loop of one iteration or none.
        return lax.fori_loop(0, live.astype(jnp.int32), lambda _, acc: acc + block(coords, i, j), acc)

    def block(coords: ProgramCoords, i: Array, j: Array) -> Array:
        """The gradient of one block's tile, ``[q_block|1, kv_block|1]``."""
        (head_columns,), (value_columns,) = tiles.columns(tiling.head_dim), tiles.columns(tiling.value_dim)
        queries, stored = QueryBlock.ragged(refs, tiling, coords, i), StoredKeys(refs, tiling, coords)
        keys, key_in_bounds = stored.slots(j), stored.in_bounds(j)
        q_positions, kv_positions = queries.positions(), stored.positions(j, key_in_bounds)
        peak = queries.vector(residuals.lse.peak, queries.in_bounds, jnp.inf)
        log_total = queries.vector(residuals.lse.log_total, queries.in_bounds)
        q_valid, valid = (q_positions >= 0) & (peak != jnp.inf), kv_positions >= 0
        delta = queries.vector(residuals.delta, q_valid)[:, None]
        q = queries.tile(refs.query, head_columns, q_valid)
        do = queries.tile(residuals.d_out, value_columns, q_valid)
        (k,), (v,) = (stored.tile(x, stored.locate(j), valid).parts for x in (refs.key, refs.value))

        def operand(ref) -> Array:
            heads = coords.at(ref, tiling)
            return tiles.load_operand(ref, heads, queries.at, queries.in_bounds, keys, key_in_bounds)

        mask = pointwise.map_operands(operand, refs.mask)
        allowed = mask.allowed(q_positions[:, None], kv_positions[None, :]) & valid[None, :] & q_valid[:, None]
        scores = pointwise.map_operands(operand, refs.scores)
        raw = jnp.where(allowed, tiling.logits(tiling.dot(q, k, (1, 1))), 0.0)
        where = q_positions[:, None], kv_positions[None, :], coords.n, coords.b

        ready = look_up(_where_live(scores, allowed), raw, *where)
        changed = ready[at]
        if isinstance(changed, Traced) and isinstance(changed.tables, LookedUp):
            tables = changed.tables
            lookups = tables.lookups[which]
            inputs = [lookup.entries for lookup in lookups]

            def with_inputs(x: Any) -> Score:
                # Selected, not multiplied by 0: the derivative of a masked pair may be NaN.
                entries = [jnp.where(allowed, new, old) for new, old in zip(x, inputs, strict=True)]
                return dataclasses.replace(changed, tables=tables.with_entries(which, entries))

        else:
            leaves, structure = jax.tree.flatten(scores[at])
            lookups, inputs = [], leaves[which].astype(jnp.float32)

            def with_inputs(x: Any) -> Score:
                whole = jax.tree.unflatten(structure, [*leaves[:which], x, *leaves[which + 1 :]])
                return _where_live((whole,), allowed)[0]

        def score(x: Any) -> Array:
            return score_algebra.apply((*ready[:at], with_inputs(x), *ready[at + 1 :]), raw, *where)

        logits, derivative = jax.vjp(score, inputs)
        p = jnp.where(allowed, tiling.probabilities(logits, peak[:, None], log_total[:, None]), 0.0)
        (gradient,) = derivative(p * (tiling.dot(do, v, (1, 1)) - delta))
        if width is None:
            return gradient
        pairs = zip(lookups, gradient, strict=True)
        return sum((place_sums(lookup, x, allowed, width) for lookup, x in pairs), jnp.zeros(width, jnp.float32))

    tile = (tiling.q_block if queries > 1 else 1, tiling.kv_block if keys > 1 else 1)
    acc = tiles.loop(0, visits, visit_block, jnp.zeros(tile if width is None else width, jnp.float32))
    if width is not None:
        plgpu.store(out_ref.at[third, second, first, tiles.known_slice(0, width)], acc)
    elif keys == 1:
        in_bounds = first * tiling.q_block + jnp.arange(tiling.q_block, dtype=jnp.int32) < tiling.q_len
        rows_at = pl.Slice(first * tiling.q_block, tiling.q_block) if queries > 1 else pl.Slice(first, 1)
        plgpu.store(out_ref.at[third, second, rows_at], acc.reshape(tile[0]), mask=in_bounds if queries > 1 else None)
    else:
        row_in_bounds = (
            second * tiling.q_block + jnp.arange(tiling.q_block, dtype=jnp.int32) < tiling.q_len
            if queries > 1
            else None
        )
        key_in_bounds = first * tiling.kv_block + jnp.arange(tiling.kv_block, dtype=jnp.int32) < tiling.kv_len
        rows_at = pl.Slice(second * tiling.q_block, tiling.q_block) if queries > 1 else tiles.known_slice(0, 1)
        keys_at = pl.Slice(first * tiling.kv_block, tiling.kv_block)
        mask = tiles.outer(row_in_bounds, key_in_bounds, tile)
        plgpu.store(out_ref.at[third // heads, third % heads, rows_at, keys_at], acc, mask=mask)


def _where_live(operands: Scores, live: Array) -> Scores:
    """Float32 tiles, 0 for masked pairs: their operands may be NaN, and 0 * NaN is NaN."""
    return pointwise.map_operands(lambda x: jnp.where(live, x.astype(jnp.float32), 0.0), operands)
