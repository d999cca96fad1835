"""The gradients of the arrays of scores: biases, slopes, parameters.

One call per array. A program owns one tile of the result and visits, in a fixed order, every live block that the
tile has a part in; so nothing is added to memory by two programs, and no T x S array is made but the operand's own.
An operand that does not depend on the key has few tiles, and parameters have none; so there every (batch row, head,
query block) owns a partial sum, and these are added up afterwards.
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
from pallas_attn.kernels.triton.specs import Cut, Inputs, Residuals
from pallas_attn.kernels.triton.tables import LookedUp, look_up, place_sums, width_of
from pallas_attn.kernels.triton.tiles import Columns
from pallas_attn.scores import Score, Scores, Traced
from pallas_attn.tuning import BlockSizes


def score_gradients(cut: Cut, scores: Scores, inputs: Inputs, residuals: Residuals, block_mask: BlockMask) -> Scores:
    """The gradient of every array of the scores, in its shape and dtype; None for tables of integers."""
    bitmap = block_mask.bitmap().astype(jnp.int32)  # offsets into bytes have 32 bits

    def gradient(at: int, which: int, x: Array) -> Array | None:
        if not pointwise.is_floating(x):
            return None
        call = _table_gradient if isinstance(scores[at], Traced) else _operand_gradient
        kernel = functools.partial(_kernel, cut=cut, at=at, which=which)
        return call(kernel, cut, x, inputs, residuals, bitmap, block_mask.block_sizes).astype(x.dtype)

    gradients = []
    for at, score in enumerate(scores):
        leaves, structure = jax.tree.flatten(score)
        gradients.append(jax.tree.unflatten(structure, [gradient(at, n, x) for n, x in enumerate(leaves)]))
    return tuple(gradients)


def _operand_gradient(kernel, cut: Cut, operand: Array, inputs, residuals, bitmap: Array, sizes: BlockSizes) -> Array:
    """Of ``[B|1, N|1, T|1, S|1]``."""
    rows, heads, queries, keys = operand.shape
    if keys == 1:
        # [B, N, T], or a number for every query block
        shape = (cut.batch, cut.q_heads, cut.q_len if queries > 1 else cut.q_blocks)
        padded = (cut.batch, cut.q_heads, cut.q_rows if queries > 1 else cut.q_blocks)
        grid = (cut.q_blocks, cut.q_heads, cut.batch)
    else:
        shape = operand.shape
        padded = (rows, heads, cut.q_rows if queries > 1 else 1, cut.kv_rows)
        grid = (cut.kv_blocks, cut.q_blocks if queries > 1 else 1, rows * heads)
    kernel = functools.partial(kernel, shape=operand.shape)
    gradient = _call(kernel, cut, inputs, residuals, bitmap, sizes, grid, padded, shape)
    if keys == 1:
        summed = zip(gradient.shape, operand.shape[:3], strict=True)
        axes = tuple(axis for axis, (size, wanted) in enumerate(summed) if size != wanted)
        gradient = gradient.sum(axes, keepdims=True)[..., None]
    return gradient


def _table_gradient(kernel, cut: Cut, params: Array, inputs, residuals, bitmap: Array, sizes: BlockSizes) -> Array:
    """Of an array of parameters, of any shape: every (batch row, head, query block) has sums for the whole table."""
    width = width_of(params.shape)
    shape = (cut.batch, cut.q_heads, cut.q_blocks, width)
    kernel = functools.partial(kernel, shape=(cut.batch, cut.q_heads, cut.q_blocks, 1), width=width)
    grid = (cut.q_blocks, cut.q_heads, cut.batch)
    sums = _call(kernel, cut, inputs, residuals, bitmap, sizes, grid, shape, shape)
    return sums.sum((0, 1, 2))[: params.size].reshape(params.shape)


def _call(kernel, cut: Cut, inputs, residuals, bitmap, sizes: BlockSizes, grid, padded, shape) -> Array:
    whole = specs.Whole(cut)
    return specs.call(
        kernel,
        "pallas_attn_d_score",
        sizes,
        cut,
        grid=grid,
        in_specs=[inputs.specs(cut, whole), residuals.specs(cut, whole), whole.all(*bitmap.shape)],
        out_specs=whole.all(*padded),
        out_shape=jax.ShapeDtypeStruct(shape, jnp.float32),
    )(inputs, residuals, bitmap)


def _kernel(
    refs: Inputs,
    residuals: Residuals,
    bitmap_ref,
    out_ref,
    *,
    cut: Cut,
    at: int,
    which: int,
    shape: tuple[int, ...],
    width: int | None = None,
):
    """The gradient of array ``which`` of score ``at``: an operand's of that shape, or a table's of that width."""
    rows, heads, queries, keys = shape
    first, second, third = (pl.program_id(axis) for axis in range(3))
    # How many batch rows, query heads and query blocks share a tile of the operand.
    free = (1 if rows > 1 else cut.batch, 1 if heads > 1 else cut.q_heads, 1 if queries > 1 else cut.q_blocks)
    visits = cut.kv_blocks if keys == 1 else math.prod(free)

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
        live = bitmap_ref[*_shared(bitmap_ref, b, n, cut), i, j] > 0
        # A loop of one turn or none.
        return lax.fori_loop(0, live.astype(jnp.int32), lambda _, acc: acc + _block(refs, residuals, b, n, i, j), acc)

    def _block(refs: Inputs, residuals: Residuals, b: Array, n: Array, i: Array, j: Array) -> Array:
        """The gradient of one block's tile, ``[q_block|1, kv_block|1]``."""
        at_q, at_k = pl.Slice(i * cut.q_block, cut.q_block), pl.Slice(j * cut.kv_block, cut.kv_block)
        row_exists = i * cut.q_block + jnp.arange(cut.q_block, dtype=jnp.int32) < cut.q_len
        key_exists = j * cut.kv_block + jnp.arange(cut.kv_block, dtype=jnp.int32) < cut.kv_len
        (head_columns,), (value_columns,) = tiles.columns(cut.head_dim), tiles.columns(cut.value_dim)
        q_positions = tiles.load(refs.q_positions.at[tiles.of_head(refs.q_positions, b), at_q], row_exists, -1)
        kv_at = _shared(refs.kv_positions, b, n, cut)
        kv_positions = tiles.load(refs.kv_positions.at[*kv_at, at_k], key_exists, -1)
        peak = tiles.load(residuals.lse.peak.at[b, n, at_q], row_exists, jnp.inf)
        log_total = tiles.load(residuals.lse.log_total.at[b, n, at_q], row_exists)
        counts, real = (q_positions >= 0) & (peak != jnp.inf), kv_positions >= 0
        delta = tiles.load(residuals.delta.at[b, n, at_q], counts)[:, None]

        def tokens(ref, at: pl.Slice, head: Array, mask: Array, columns: Columns) -> Array:
            return tiles.load(ref.at[b, at, head, :], tiles.outer(mask, columns.exist, (mask.size, ref.shape[-1])))

        q = tokens(refs.query, at_q, n, counts, head_columns)
        do = tokens(residuals.d_out, at_q, n, counts, value_columns)
        k = tokens(refs.key, at_k, n // cut.group, real, head_columns)
        v = tokens(refs.value, at_k, n // cut.group, real, value_columns)

        def operand(ref) -> Array:
            at = _shared(ref, b, n, cut)
            return tiles.load_operand(ref, at_q, row_exists, at_k, key_exists, *at)

        mask = pointwise.map_operands(operand, refs.mask)
        allowed = mask.allowed(q_positions[:, None], kv_positions[None, :]) & real[None, :] & counts[:, None]
        scores = pointwise.map_operands(operand, refs.scores)
        raw = jnp.where(allowed, cut.logits(cut.dot(q, k, (1, 1))), 0.0)
        where = (q_positions[:, None], kv_positions[None, :], n, b)

        ready = look_up(_where_live(scores, allowed), raw, *where)
        changed = ready[at]
        if isinstance(changed, Traced) and isinstance(changed.tables, LookedUp):
            tables = changed.tables
            lookups = tables.lookups[which]
            inputs = [lookup.entries for lookup in lookups]

            def with_inputs(x: Any) -> Score:
                # Chosen, not multiplied by 0: where nobody looks, the derivative may be no number.
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
        p = jnp.where(allowed, cut.probabilities(logits, peak[:, None], log_total[:, None]), 0.0)
        (gradient,) = derivative(p * (cut.dot(do, v, (1, 1)) - delta))
        if width is None:
            return gradient
        pairs = zip(lookups, gradient, strict=True)
        return sum((place_sums(lookup, x, allowed, width) for lookup, x in pairs), jnp.zeros(width, jnp.float32))

    tile = (cut.q_block if queries > 1 else 1, cut.kv_block if keys > 1 else 1)
    acc = tiles.loop(0, visits, visit_block, jnp.zeros(tile if width is None else width, jnp.float32))
    if width is not None:
        plgpu.store(out_ref.at[third, second, first, tiles.known_slice(0, width)], acc)
    elif keys == 1:
        exists = first * cut.q_block + jnp.arange(cut.q_block, dtype=jnp.int32) < cut.q_len
        rows_at = pl.Slice(first * cut.q_block, cut.q_block) if queries > 1 else pl.Slice(first, 1)
        plgpu.store(out_ref.at[third, second, rows_at], acc.reshape(tile[0]), mask=exists if queries > 1 else None)
    else:
        row_exists = (
            second * cut.q_block + jnp.arange(cut.q_block, dtype=jnp.int32) < cut.q_len if queries > 1 else None
        )
        key_exists = first * cut.kv_block + jnp.arange(cut.kv_block, dtype=jnp.int32) < cut.kv_len
        rows_at = pl.Slice(second * cut.q_block, cut.q_block) if queries > 1 else tiles.known_slice(0, 1)
        keys_at = pl.Slice(first * cut.kv_block, cut.kv_block)
        mask = tiles.outer(row_exists, key_exists, tile)
        plgpu.store(out_ref.at[third // heads, third % heads, rows_at, keys_at], acc, mask=mask)


def _where_live(operands: Scores, live: Array) -> Scores:
    """Float32 tiles. Where nothing is seen an operand may hold anything, NaN included, and 0 * NaN is NaN."""
    return pointwise.map_operands(lambda x: jnp.where(live, x.astype(jnp.float32), 0.0), operands)


def _shared(ref, b: Array, n: Array, cut: Cut) -> tuple[Any, Any]:
    """The index of a batch row and a query head in ``[B|1, 1|K|N, ...]``."""
    rows, heads = ref.shape[:2]
    zero = np.int32(0)  # a plain int fails in the interpreter
    return b if rows > 1 else zero, n * heads // cut.q_heads if heads > 1 else zero
