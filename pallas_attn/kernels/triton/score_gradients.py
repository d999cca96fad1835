"""The gradients of the operands of scores: biases, slopes.

One kernel per operand. A program owns one tile of the result and visits, in a fixed order, every live block that the
tile has a part in; so nothing is added to memory by two programs, and no T x S array is made but the operand's own.
An operand that does not depend on the key has few tiles, so there every (batch row, head, query block) owns a partial
sum, and these are added up afterwards.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_attn import scores as score_algebra
from pallas_attn.block_mask import BlockMask
from pallas_attn.kernels.triton import specs, tiles
from pallas_attn.kernels.triton.specs import Cut, Inputs, Residuals
from pallas_attn.kernels.triton.tiles import LOG2_E
from pallas_attn.scores import Scores


def score_gradients(cut: Cut, inputs: Inputs, residuals: Residuals, block_mask: BlockMask) -> Scores:
    """The gradient of every operand ``[B|1, N|1, T|1, S|1]`` of the scores, in its dtype."""
    operands, structure = jax.tree.flatten(inputs.scores)
    bitmap = block_mask.bitmap()
    gradients = [
        _gradient(cut, which, operand, inputs, residuals, bitmap, block_mask) for which, operand in enumerate(operands)
    ]
    return jax.tree.unflatten(structure, gradients)


def _gradient(cut: Cut, which: int, operand: Array, inputs, residuals, bitmap: Array, block_mask: BlockMask) -> Array:
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
    whole = specs.Whole(cut)
    gradient = specs.call(
        functools.partial(_kernel, cut=cut, which=which, shape=operand.shape),
        "pallas_attn_d_score",
        block_mask.block_sizes,
        cut,
        grid=grid,
        in_specs=[inputs.specs(cut, whole), residuals.specs(cut, whole), whole.all(*bitmap.shape)],
        out_specs=whole.all(*padded),
        out_shape=jax.ShapeDtypeStruct(shape, jnp.float32),
    )(inputs, residuals, bitmap)
    if keys == 1:
        sizes = zip(gradient.shape, operand.shape[:3], strict=True)
        summed = tuple(axis for axis, (size, wanted) in enumerate(sizes) if size != wanted)
        gradient = gradient.sum(summed, keepdims=True)[..., None]
    return gradient.astype(operand.dtype)


def _kernel(refs: Inputs, residuals: Residuals, bitmap_ref, out_ref, *, cut: Cut, which: int, shape: tuple[int, ...]):
    rows, heads, queries, keys = shape
    first, second, third = (pl.program_id(axis) for axis in range(3))
    # How many batch rows, query heads and query blocks share a tile of the operand.
    free = (1 if rows > 1 else cut.batch, 1 if heads > 1 else cut.q_heads, 1 if queries > 1 else cut.q_blocks)
    visits = cut.kv_blocks if keys == 1 else math.prod(free)

    def block_of(visit: Array) -> tuple[Array, Array, Array, Array]:
        """``(batch row, query head, query block, KV block)``."""
        if keys == 1:
            return third, second, first, visit
        b, n, i = visit // (free[1] * free[2]), visit // free[2] % free[1], visit % free[2]
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
        row_exists = i * cut.q_block + jnp.arange(cut.q_block) < cut.q_len
        key_exists = j * cut.kv_block + jnp.arange(cut.kv_block) < cut.kv_len
        head_columns, value_columns = tiles.columns(cut.head_dim), tiles.columns(cut.value_dim)
        q_positions = tiles.load(refs.q_positions.at[tiles.of_head(refs.q_positions, b), at_q], row_exists, -1)
        kv_at = _shared(refs.kv_positions, b, n, cut)
        kv_positions = tiles.load(refs.kv_positions.at[*kv_at, at_k], key_exists, -1)
        lse = tiles.load(residuals.lse.at[b, n, at_q], row_exists, -jnp.inf)
        counts, real = (q_positions >= 0) & (lse != -jnp.inf), kv_positions >= 0
        lse = jnp.where(counts, lse * LOG2_E, jnp.inf)[:, None]
        delta = tiles.load(residuals.delta.at[b, n, at_q], counts)[:, None]

        def tokens(ref, at: pl.Slice, head: Array, mask: Array, columns: Array | None) -> Array:
            return tiles.load(ref.at[b, at, head, :], tiles.outer(mask, columns, (mask.size, ref.shape[-1])))

        q = tokens(refs.query, at_q, n, counts, head_columns)
        do = tokens(residuals.d_out, at_q, n, counts, value_columns)
        k = tokens(refs.key, at_k, n // cut.group, real, head_columns)
        v = tokens(refs.value, at_k, n // cut.group, real, value_columns)

        def operand(ref) -> Array:
            at = _shared(ref, b, n, cut)
            return tiles.load_operand(ref, at_q, row_exists, at_k, key_exists, *at)

        mask = jax.tree.map(operand, refs.mask)
        allowed = mask.allowed(q_positions[:, None], kv_positions[None, :]) & real[None, :] & counts[:, None]
        operands, structure = jax.tree.flatten(jax.tree.map(operand, refs.scores))
        logits = jnp.where(allowed, cut.dot(q, k, (1, 1)) * cut.scale, 0.0)

        def score(x: Array) -> Array:
            scores = jax.tree.unflatten(structure, [*operands[:which], x, *operands[which + 1 :]])
            scores = tiles.where_live(scores, allowed)
            return score_algebra.apply(scores, logits, q_positions[:, None], kv_positions[None, :], n)

        logits, derivative = jax.vjp(score, operands[which].astype(jnp.float32))
        p = jnp.where(allowed, cut.exp2(logits * LOG2_E - lse), 0.0)
        return derivative(p * (cut.dot(do, v, (1, 1)) - delta))[0]

    tile = (cut.q_block if queries > 1 else 1, cut.kv_block if keys > 1 else 1)
    acc = lax.fori_loop(0, visits, visit_block, jnp.zeros(tile, jnp.float32))
    at_q, at_k = pl.Slice(first * cut.q_block, cut.q_block), pl.Slice(first * cut.kv_block, cut.kv_block)
    if keys == 1:
        exists = first * cut.q_block + jnp.arange(cut.q_block) < cut.q_len
        at, mask = (at_q, exists) if queries > 1 else (pl.Slice(first, 1), None)
        plgpu.store(out_ref.at[third, second, at], acc.reshape(tile[0]), mask=mask)
    else:
        at_q = pl.Slice(second * cut.q_block, cut.q_block) if queries > 1 else pl.Slice(0, 1)
        row_exists = second * cut.q_block + jnp.arange(cut.q_block) < cut.q_len if queries > 1 else None
        key_exists = first * cut.kv_block + jnp.arange(cut.kv_block) < cut.kv_len
        mask = tiles.outer(row_exists, key_exists, tile)
        plgpu.store(out_ref.at[third // heads, third % heads, at_q, at_k], acc, mask=mask)


def _shared(ref, b: Array, n: Array, cut: Cut) -> tuple[Any, Any]:
    """The index of a batch row and a query head in ``[B|1, 1|K|N, ...]``."""
    rows, heads = ref.shape[:2]
    zero = np.int32(0)  # a plain int fails in the interpreter
    return b if rows > 1 else zero, n * heads // cut.q_heads if heads > 1 else zero
