"""The backward kernels in Pallas, through the Triton lowering: one for dQ, one for dK and dV.

FlashAttention-2 (arXiv:2307.08691, algorithm 2), with probabilities recomputed from ``lse``:

    p = exp(s - lse),    dv += p' do,    ds = p * (do v' - delta),    dq += ds k,    dk += ds' q

dQ walks the lists of the forward pass, one program per query block. dK and dV walk the transposed lists, one program
per KV block, which sums over the query heads of its group itself. Nothing is added to memory by two programs, so the
same call gives the same bits. As in the forward pass, the loop over full blocks holds no mask code.
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
from pallas_attn.kernels.triton.specs import Cut, Inputs, Residuals
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

    Every kernel has blocks of its own, from the tuning table, and lists cut to them; ``block_sizes`` sets those of all.
    """
    query, key, value, block_mask, scores, *_ = call
    head_dim = max(query.shape[-1], value.shape[-1])

    def cut_anew(kernel: tuning.Kernel) -> BlockMask:
        sizes = block_sizes or tuning.default_block_sizes(
            query.shape[1], key.shape[1], implementation="triton", kernel=kernel, head_dim=head_dim, dtype=query.dtype
        )
        if (sizes.q, sizes.kv) == (block_mask.q_block, block_mask.kv_block):
            return dataclasses.replace(block_mask, block_sizes=sizes)
        return BlockMask.from_mask(block_mask.mask, block_mask.q_positions, block_mask.kv_positions, sizes)

    def prepared(block_mask: BlockMask) -> tuple[Cut, Inputs]:
        cut_call = call._replace(block_mask=block_mask)
        return Cut.of(cut_call, scale, interpret), Inputs.of(cut_call)

    residuals = Residuals.of(lse, delta, d_out.astype(query.dtype))

    per_query = cut_anew("d_query")
    cut, inputs = prepared(per_query)
    part = specs.PerQueryHead(cut)
    d_query = specs.call(
        functools.partial(_d_query_kernel, cut=cut),
        "pallas_attn_d_query",
        per_query.block_sizes,
        cut,
        grid=(cut.q_blocks, cut.q_heads, cut.batch),
        in_specs=[inputs.specs(cut, part), residuals.specs(cut, part)],
        out_specs=part.queries(cut.head_dim),
        out_shape=jax.ShapeDtypeStruct(query.shape, query.dtype),
    )(inputs, residuals)

    d_scores: Scores = ()
    if scores:
        per_score = cut_anew("d_score")
        cut, inputs = prepared(per_score)
        d_scores = score_gradients(cut, scores, inputs, residuals, per_score)

    has_tiles = any(min(x.shape[2:]) > 1 for x in pointwise.operands(scores))
    per_key = cut_anew("d_key_value_bias" if has_tiles else "d_key_value")
    cut, inputs = prepared(per_key)
    part = specs.PerKVHead(cut)
    inputs = inputs._replace(lists=per_key.transposed)
    d_key, d_value = specs.call(
        functools.partial(_d_key_value_kernel, cut=cut),
        "pallas_attn_d_key_value",
        per_key.block_sizes,
        cut,
        grid=(cut.kv_blocks, cut.kv_heads, cut.batch),
        in_specs=[inputs.specs(cut, part), residuals.specs(cut, part)],
        out_specs=[part.keys(cut.head_dim), part.keys(cut.value_dim)],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (key, value)],
    )(inputs, residuals)
    return d_query, d_key, d_value, d_scores


def _probabilities(
    products: Array, lse: tuple[Array, Array], allowed: Array | None, scores: Scores, where: tuple, cut: Cut
):
    """``(p, back)`` of a tile of products ``q . k``: ``back`` takes the gradient of logits to that of scaled products.

    ``lse`` is the peak and the rest of :class:`Residuals`, which broadcast to the tile; where the peak is inf, p is 0.
    """
    logits = cut.logits(products)
    if not scores:
        p = cut.probabilities(logits, *lse)
        return p if allowed is None else jnp.where(allowed, p, 0.0), lambda ds: ds
    scores = look_up(scores, logits, *where)
    logits, derivative = jax.vjp(lambda x: score_algebra.apply(scores, x, *where), logits)
    p = cut.probabilities(logits, *lse)
    if allowed is None:
        return p, lambda ds: derivative(ds)[0]
    # Chosen, not multiplied by 0: where nothing is seen, an operand may hold anything, NaN included.
    return jnp.where(allowed, p, 0.0), lambda ds: jnp.where(allowed, derivative(ds)[0], 0.0)


def _d_query_kernel(refs: Inputs, residuals: Residuals, d_query_ref, *, cut: Cut):
    (head_columns,), (value_columns,) = tiles.columns(cut.head_dim), tiles.columns(cut.value_dim)
    i, n, b = refs.lists.order[pl.program_id(0)], pl.program_id(1), pl.program_id(2)

    def places(i: Array) -> tuple[pl.Slice, Array, Array, Array, Array]:
        """The places of a block's queries, which of them exist, their positions and peaks, and which of them count."""
        rows = pl.Slice(i * cut.q_block, cut.q_block)
        exist = i * cut.q_block + jnp.arange(cut.q_block, dtype=jnp.int32) < cut.q_len
        positions = tiles.load(refs.q_positions.at[rows], exist, -1)
        peak = tiles.load(residuals.lse.peak.at[rows], exist, jnp.inf)
        return rows, exist, positions, peak, (positions >= 0) & (peak != jnp.inf)

    rows, row_exists, q_positions, peak, counts = places(i)
    lse = peak[:, None], tiles.load(residuals.lse.log_total.at[rows], row_exists)[:, None]
    delta = tiles.load(residuals.delta.at[rows], counts)[:, None]
    q = tiles.load_rows(refs.query, rows, counts, head_columns)
    do = tiles.load_rows(residuals.d_out, rows, counts, value_columns)

    blocks = KeyBlocks(StoredKeys(refs, cut), rows, row_exists, q_positions)

    def visit(state, block):
        (acc,) = state
        operands, where = (), ()
        if refs.scores:
            operands = blocks.scores(block.keys, block.exist)
            where = q_positions[:, None], block.positions[None, :], n, b
        (k,), (v,) = block.k.parts, block.v.parts
        p, back = _probabilities(cut.dot(q, k, (1, 1)), lse, block.allowed, operands, where, cut)
        ds = back(p * (cut.dot(do, v, (1, 1)) - delta))
        return (acc + cut.dot(ds, k, (1, 0)),)

    acc = jnp.zeros((cut.q_block, q.shape[1]), jnp.float32)
    (acc,) = blocks.walk((i,), visit, (acc,))
    # Worked out again: what a loop does not need is not kept in registers, or on the stack, while it runs.
    rows, row_exists, *_, counts = places(cut.anew(i))
    out = jnp.where(counts[:, None], acc * cut.scale, 0.0).astype(d_query_ref.dtype)
    plgpu.store(d_query_ref.at[rows, head_columns.at], out, mask=tiles.outer(row_exists, head_columns.exist, out.shape))


def _d_key_value_kernel(refs: Inputs, residuals: Residuals, d_key_ref, d_value_ref, *, cut: Cut):
    (head_columns,), (value_columns,) = tiles.columns(cut.head_dim), tiles.columns(cut.value_dim)
    j, h, b = refs.lists.order[0, pl.program_id(0)], pl.program_id(1), pl.program_id(2)

    def places(j: Array) -> tuple[pl.Slice, Array, Array]:
        """The places of a block's keys, which of them exist, and their positions."""
        keys = pl.Slice(j * cut.kv_block, cut.kv_block)
        exist = j * cut.kv_block + jnp.arange(cut.kv_block, dtype=jnp.int32) < cut.kv_len
        return keys, exist, tiles.load(refs.kv_positions.at[np.int32(0), keys], exist, -1)

    keys, key_exists, kv_positions = places(j)
    real = kv_positions >= 0
    k = tiles.load_rows(refs.key, keys, real, head_columns)
    v = tiles.load_rows(refs.value, keys, real, value_columns)

    def head(g, state):
        n = h * cut.group + g

        # Tiles are [kv_block, q_block] here, so that both sums have their probabilities on the left.
        def visit(state, rows, row_exists, counts, q_positions, peak, allowed):
            d_key, d_value = state
            q = tiles.load_rows(refs.query, rows, counts, head_columns, g)
            do = tiles.load_rows(residuals.d_out, rows, counts, value_columns, g)
            delta = tiles.load(residuals.delta.at[g, rows], counts)[None, :]
            operands, where = (), ()
            if refs.scores:
                where = q_positions[None, :], kv_positions[:, None], n, b
                operands = pointwise.map_operands(
                    lambda ref: tiles.load_operand(ref, rows, row_exists, keys, key_exists, tiles.of_head(ref, g)).T,
                    refs.scores,
                )
            products = cut.dot(k, q, (1, 1))
            # Not before: while the product is computed, registers are short.
            lse = peak[None, :], tiles.load(residuals.lse.log_total.at[g, rows], row_exists)[None, :]
            p, back = _probabilities(products, lse, allowed, operands, where, cut)
            d_value = d_value + cut.dot(p, do, (1, 0))
            ds = back(p * (cut.dot(v, do, (1, 1)) - delta))
            return d_key + cut.dot(ds, q, (1, 0)), d_value

        def full(block, state):
            rows = pl.Slice(block * cut.q_block, cut.q_block)
            q_positions = plgpu.load(refs.q_positions.at[rows]) if refs.scores else None
            peak = plgpu.load(residuals.lse.peak.at[g, rows])
            return visit(state, rows, None, None, q_positions, peak, None)

        def partial(block, state):
            rows = pl.Slice(block * cut.q_block, cut.q_block)
            row_exists = block * cut.q_block + jnp.arange(cut.q_block, dtype=jnp.int32) < cut.q_len
            q_positions = tiles.load(refs.q_positions.at[rows], row_exists, -1)
            peak = tiles.load(residuals.lse.peak.at[g, rows], row_exists, jnp.inf)
            counts = (q_positions >= 0) & (peak != jnp.inf)
            mask = pointwise.map_operands(
                lambda ref: tiles.load_operand(ref, rows, row_exists, keys, key_exists, tiles.of_head(ref, g)).T,
                refs.mask,
            )
            allowed = mask.allowed(q_positions[None, :], kv_positions[:, None]) & real[:, None] & counts[None, :]
            return visit(state, rows, row_exists, counts, q_positions, peak, allowed)

        return tiles.walk(refs.lists, (tiles.of_head(refs.lists.indices, g), j), full, partial, state)

    zeros = tuple(jnp.zeros((cut.kv_block, x.shape[1]), jnp.float32) for x in (k, v))
    # A plain 0 fails in the interpreter.
    d_key, d_value = tiles.loop(0, cut.group, head, zeros) if cut.group > 1 else head(np.int32(0), zeros)
    # Worked out again: what a loop does not need is not kept in registers, or on the stack, while it runs.
    keys, key_exists, kv_positions = places(cut.anew(j))
    real = kv_positions >= 0
    for ref, x, width in ((d_key_ref, d_key * cut.scale, head_columns), (d_value_ref, d_value, value_columns)):
        out = jnp.where(real[:, None], x, 0.0).astype(ref.dtype)
        plgpu.store(ref.at[keys, width.at], out, mask=tiles.outer(key_exists, width.exist, out.shape))
