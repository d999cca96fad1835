"""The backward kernels in Pallas, through the Triton lowering: one for dQ, one for dK and dV.

FlashAttention-2 (arXiv:2307.08691, algorithm 2), with probabilities recomputed from ``lse``:

    p = exp(s - lse),    dv += p' do,    ds = p * (do v' - delta),    dq += ds k,    dk += ds' q

dQ walks the lists of the forward pass, one program per query block. dK and dV walk the transposed lists, one program
per KV block, which sums over the query heads of its group itself. No two programs add to the same memory, so
results repeat bit for bit. As in the forward pass, the loop over full blocks holds no mask code.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_attn import pointwise, tuning
from pallas_attn import scores as score_algebra
from pallas_attn.block_mask import BlockMask
from pallas_attn.kernels.call import Call
from pallas_attn.kernels.lse import Lse
from pallas_attn.kernels.triton import specs, tiles
from pallas_attn.kernels.triton.key_blocks import KeyBlocks
from pallas_attn.kernels.triton.score_gradients import score_gradients
from pallas_attn.kernels.triton.specs import KernelArgs, Residuals, Tiling
from pallas_attn.kernels.triton.stored import StoredKeys
from pallas_attn.kernels.triton.tables import look_up
from pallas_attn.scores import Scores
from pallas_attn.tuning import BlockSizes


@functools.partial(jax.jit, static_argnames=("scale", "interpret", "block_sizes"))
def backward(
    call: Call,
    lse: Lse,
    delta: Array,
    d_out: Array,
    *,
    scale: float,
    interpret: bool = False,
    block_sizes: BlockSizes | None = None,
) -> tuple[Array, Array, Array, Scores]:
    """Same contract as :func:`pallas_attn.kernels.xla.flash_backward.backward`.

    Every kernel has its own block sizes, from the tuning table, and lists for them; ``block_sizes`` sets all of them.
    """
    query, key, value, block_mask, scores, *_ = call
    head_dim = max(query.shape[-1], value.shape[-1])

    def with_blocks_of(kernel: tuning.Kernel) -> BlockMask:
        sizes = block_sizes or tuning.default_block_sizes(
            query.shape[1], key.shape[1], implementation="triton", kernel=kernel, head_dim=head_dim, dtype=query.dtype
        )
        if (sizes.q, sizes.kv) == (block_mask.q_block, block_mask.kv_block):
            return dataclasses.replace(block_mask, block_sizes=sizes)
        return BlockMask.from_mask(block_mask.mask, block_mask.q_positions, block_mask.kv_positions, sizes)

    def prepared(block_mask: BlockMask) -> tuple[Tiling, KernelArgs]:
        cut_call = call._replace(block_mask=block_mask)
        return Tiling.of_call(cut_call, scale, interpret), KernelArgs.from_call(cut_call)

    residuals = Residuals.of(lse, delta, d_out.astype(query.dtype))

    per_query = with_blocks_of("d_query")
    tiling, inputs = prepared(per_query)
    layout = specs.PerQueryHead(tiling)
    d_query = specs.call(
        functools.partial(_d_query_kernel, tiling=tiling),
        "pallas_attn_d_query",
        per_query.block_sizes,
        tiling,
        grid=(tiling.q_blocks, tiling.q_heads, tiling.batch),
        in_specs=[inputs.block_specs(tiling, layout), residuals.block_specs(tiling, layout)],
        out_specs=layout.queries(tiling.head_dim),
        out_shape=jax.ShapeDtypeStruct(query.shape, query.dtype),
    )(inputs, residuals)

    d_scores: Scores = ()
    if scores:
        per_score = with_blocks_of("d_score")
        tiling, inputs = prepared(per_score)
        d_scores = score_gradients(tiling, scores, inputs, residuals, per_score)

    has_tiles = any(min(x.shape[2:]) > 1 for x in pointwise.operands(scores))
    per_key = with_blocks_of("d_key_value_bias" if has_tiles else "d_key_value")
    tiling, inputs = prepared(per_key)
    layout = specs.PerKVHead(tiling)
    inputs = inputs._replace(lists=per_key.transposed)
    d_key, d_value = specs.call(
        functools.partial(_d_key_value_kernel, tiling=tiling),
        "pallas_attn_d_key_value",
        per_key.block_sizes,
        tiling,
        grid=(tiling.kv_blocks, tiling.kv_heads, tiling.batch),
        in_specs=[inputs.block_specs(tiling, layout), residuals.block_specs(tiling, layout)],
        out_specs=[layout.keys(tiling.head_dim), layout.keys(tiling.value_dim)],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (key, value)],
    )(inputs, residuals)
    return d_query, d_key, d_value, d_scores


def _probabilities(
    products: Array, lse: tuple[Array, Array], allowed: Array | None, scores: Scores, where: tuple, tiling: Tiling
):
    """``(p, back)`` of a tile of products ``q . k``: ``back`` takes the gradient of logits to that of scaled products.

    ``lse`` holds the two parts of :class:`Residuals`, which broadcast to the tile; where the peak is inf, p is 0.
    """
    logits = tiling.logits(products)
    if not scores:
        p = tiling.probabilities(logits, *lse)
        return p if allowed is None else jnp.where(allowed, p, 0.0), lambda ds: ds
    scores = look_up(scores, logits, *where)
    logits, derivative = jax.vjp(lambda x: score_algebra.apply(scores, x, *where), logits)
    p = tiling.probabilities(logits, *lse)
    if allowed is None:
        return p, lambda ds: derivative(ds)[0]
    # Selected, not multiplied by 0: the operand of a masked pair may be NaN.
    return jnp.where(allowed, p, 0.0), lambda ds: jnp.where(allowed, derivative(ds)[0], 0.0)


def _d_query_kernel(refs: KernelArgs, residuals: Residuals, d_query_ref, *, tiling: Tiling):
    (head_columns,), (value_columns,) = tiles.columns(tiling.head_dim), tiles.columns(tiling.value_dim)
    i, n, b = refs.lists.order[pl.program_id(0)], pl.program_id(1), pl.program_id(2)

    def places(i: Array) -> tuple[pl.Slice, Array, Array, Array, Array]:
        """Of a block of queries: their indices, bool in bounds, positions, peaks, and bool valid."""
        rows = pl.Slice(i * tiling.q_block, tiling.q_block)
        in_bounds = i * tiling.q_block + jnp.arange(tiling.q_block, dtype=jnp.int32) < tiling.q_len
        positions = tiles.load(refs.q_positions.at[rows], in_bounds, -1)
        peak = tiles.load(residuals.lse.peak.at[rows], in_bounds, jnp.inf)
        return rows, in_bounds, positions, peak, (positions >= 0) & (peak != jnp.inf)

    rows, row_in_bounds, q_positions, peak, q_valid = places(i)
    lse = peak[:, None], tiles.load(residuals.lse.log_total.at[rows], row_in_bounds)[:, None]
    delta = tiles.load(residuals.delta.at[rows], q_valid)[:, None]
    q = tiles.load_rows(refs.query, rows, q_valid, head_columns)
    do = tiles.load_rows(residuals.d_out, rows, q_valid, value_columns)

    blocks = KeyBlocks(StoredKeys(refs, tiling), rows, row_in_bounds, q_positions)

    def visit(state, block):
        (acc,) = state
        operands, where = (), ()
        if refs.scores:
            operands = blocks.scores(block.keys, block.in_bounds)
            where = q_positions[:, None], block.positions[None, :], n, b
        (k,), (v,) = block.k.parts, block.v.parts
        p, back = _probabilities(tiling.dot(q, k, (1, 1)), lse, block.allowed, operands, where, tiling)
        ds = back(p * (tiling.dot(do, v, (1, 1)) - delta))
        return (acc + tiling.dot(ds, k, (1, 0)),)

    acc = jnp.zeros((tiling.q_block, q.shape[1]), jnp.float32)
    (acc,) = blocks.walk((i,), visit, (acc,))
    # Recomputed: what the loop does not need must not occupy registers, or the stack, while it runs.
    rows, row_in_bounds, *_, q_valid = places(tiling.opaque(i))
    out = jnp.where(q_valid[:, None], acc * tiling.scale, 0.0).astype(d_query_ref.dtype)
    plgpu.store(
        d_query_ref.at[rows, head_columns.at], out, mask=tiles.outer(row_in_bounds, head_columns.in_bounds, out.shape)
    )


def _d_key_value_kernel(refs: KernelArgs, residuals: Residuals, d_key_ref, d_value_ref, *, tiling: Tiling):
    (head_columns,), (value_columns,) = tiles.columns(tiling.head_dim), tiles.columns(tiling.value_dim)
    j, h, b = refs.lists.order[0, pl.program_id(0)], pl.program_id(1), pl.program_id(2)

    def places(j: Array) -> tuple[pl.Slice, Array, Array]:
        """Of a block of keys: their indices, bool in bounds, and positions."""
        keys = pl.Slice(j * tiling.kv_block, tiling.kv_block)
        in_bounds = j * tiling.kv_block + jnp.arange(tiling.kv_block, dtype=jnp.int32) < tiling.kv_len
        return keys, in_bounds, tiles.load(refs.kv_positions.at[np.int32(0), keys], in_bounds, -1)

    keys, key_in_bounds, kv_positions = places(j)
    valid = kv_positions >= 0
    k = tiles.load_rows(refs.key, keys, valid, head_columns)
    v = tiles.load_rows(refs.value, keys, valid, value_columns)

    def head(g, state):
        n = h * tiling.group + g

        def load_operands(tree, rows, row_in_bounds):
            """The transposed tiles of the operands of a mask or of scores."""

            def load(ref):
                return tiles.load_operand(ref, rows, row_in_bounds, keys, key_in_bounds, tiles.of_head(ref, g)).T

            return pointwise.map_operands(load, tree)

        # Tiles are [kv_block, q_block] here, so that both sums have their probabilities on the left.
        def visit(state, rows, row_in_bounds, q_valid, q_positions, peak, allowed):
            d_key, d_value = state
            q = tiles.load_rows(refs.query, rows, q_valid, head_columns, g)
            do = tiles.load_rows(residuals.d_out, rows, q_valid, value_columns, g)
            delta = tiles.load(residuals.delta.at[g, rows], q_valid)[None, :]
            operands, where = (), ()
            if refs.scores:
                where = q_positions[None, :], kv_positions[:, None], n, b
                operands = pointwise.map_operands(
                    lambda ref: (
                        tiles.load_operand(ref, rows, row_in_bounds, keys, key_in_bounds, tiles.of_head(ref, g)).T
                    ),
                    refs.scores,
                )
            products = tiling.dot(k, q, (1, 1))
            # Loaded here, as registers are scarce while the product is computed.
            lse = peak[None, :], tiles.load(residuals.lse.log_total.at[g, rows], row_in_bounds)[None, :]
            p, back = _probabilities(products, lse, allowed, operands, where, tiling)
            d_value = d_value + tiling.dot(p, do, (1, 0))
            ds = back(p * (tiling.dot(v, do, (1, 1)) - delta))
            return d_key + tiling.dot(ds, q, (1, 0)), d_value

        def full(block, state):
            rows = pl.Slice(block * tiling.q_block, tiling.q_block)
            q_positions = plgpu.load(refs.q_positions.at[rows]) if refs.scores else None
            peak = plgpu.load(residuals.lse.peak.at[g, rows])
            return visit(state, rows, None, None, q_positions, peak, None)

        def partial(block, state):
            rows = pl.Slice(block * tiling.q_block, tiling.q_block)
            row_in_bounds = block * tiling.q_block + jnp.arange(tiling.q_block, dtype=jnp.int32) < tiling.q_len
            q_positions = tiles.load(refs.q_positions.at[rows], row_in_bounds, -1)
            peak = tiles.load(residuals.lse.peak.at[g, rows], row_in_bounds, jnp.inf)
            q_valid = (q_positions >= 0) & (peak != jnp.inf)
            mask = load_operands(refs.mask, rows, row_in_bounds)
            allowed = mask.allowed(q_positions[None, :], kv_positions[:, None]) & valid[:, None] & q_valid[None, :]
            return visit(state, rows, row_in_bounds, q_valid, q_positions, peak, allowed)

        return tiles.walk(refs.lists, (tiles.of_head(refs.lists.indices, g), j), full, partial, state)

    zeros = tuple(jnp.zeros((tiling.kv_block, x.shape[1]), jnp.float32) for x in (k, v))
    # A plain 0 fails in the interpreter.
    d_key, d_value = tiles.loop(0, tiling.group, head, zeros) if tiling.group > 1 else head(np.int32(0), zeros)
    # Recomputed: what the loop does not need must not occupy registers, or the stack, while it runs.
    keys, key_in_bounds, kv_positions = places(tiling.opaque(j))
    valid = kv_positions >= 0
    for ref, x, width in ((d_key_ref, d_key * tiling.scale, head_columns), (d_value_ref, d_value, value_columns)):
        out = jnp.where(valid[:, None], x, 0.0).astype(ref.dtype)
        plgpu.store(ref.at[keys, width.at], out, mask=tiles.outer(key_in_bounds, width.in_bounds, out.shape))
