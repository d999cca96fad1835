"""The backward kernels in Pallas, through the Triton lowering: one for dQ, one for dK and dV.

FlashAttention-2 (arXiv:2307.08691, algorithm 2), with probabilities recomputed from ``lse``:

    p = exp(s - lse),    dv += p' do,    ds = p * (do v' - delta),    dq += ds k,    dk += ds' q

dQ walks the lists of the forward pass, one program per query block. dK and dV walk the transposed lists, one program
per KV block, which sums over the query heads of its group itself. No two programs add to the same memory, so
results repeat bit for bit. As in the forward pass, the loop over full blocks holds no mask code.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl

from pallas_attn import pointwise, tuning
from pallas_attn import scores as score_algebra
from pallas_attn.block_mask import BlockMask
from pallas_attn.kernels.call import Call
from pallas_attn.kernels.lse import Lse
from pallas_attn.kernels.triton import specs, tiles
from pallas_attn.kernels.triton.block_walk import BlockWalk
from pallas_attn.kernels.triton.coords import ProgramCoords
from pallas_attn.kernels.triton.key_blocks import KeyBlock, KeyBlocks
from pallas_attn.kernels.triton.query_block import QueryBlock
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
        return block_mask.with_block_sizes(sizes)

    def prepared(block_mask: BlockMask) -> tuple[Tiling, KernelArgs]:
        cut_call = call._replace(block_mask=block_mask)
        return Tiling.of_call(cut_call, scale, interpret), KernelArgs.from_call(cut_call)

    residuals = Residuals.of(lse, delta, d_out.astype(query.dtype))

    per_query = with_blocks_of("d_query")
    tiling, inputs = prepared(per_query)
    d_query = specs.call(
        functools.partial(_d_query_kernel, tiling=tiling),
        "pallas_attn_d_query",
        per_query.block_sizes,
        tiling,
        grid=(tiling.q_blocks, tiling.q_heads, tiling.batch),
        in_specs=[inputs.block_specs(tiling), residuals.block_specs(tiling)],
        out_specs=tiling.queries(tiling.head_dim),
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
    inputs = inputs._replace(lists=per_key.transposed)
    d_key, d_value = specs.call(
        functools.partial(_d_key_value_kernel, tiling=tiling),
        "pallas_attn_d_key_value",
        per_key.block_sizes,
        tiling,
        grid=(tiling.kv_blocks, tiling.kv_heads, tiling.batch),
        in_specs=[inputs.block_specs(tiling), residuals.block_specs(tiling)],
        out_specs=[tiling.keys(tiling.head_dim), tiling.keys(tiling.value_dim)],
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
    n, b = pl.program_id(1), pl.program_id(2)
    coords = ProgramCoords(b, n // tiling.group, n)
    heads = coords.at(refs.lists.order, tiling)
    i = refs.lists.order[(*heads, pl.program_id(0))]

    def load(i: Array) -> tuple[QueryBlock, Array, Array, Array]:
        """A block of queries, with their positions, peaks, and bool valid."""
        queries = QueryBlock.ragged(refs, tiling, coords, i)
        positions = queries.positions()
        peak = queries.vector(residuals.lse.peak, queries.in_bounds, jnp.inf)
        return queries, positions, peak, (positions >= 0) & (peak != jnp.inf)

    queries, q_positions, peak, q_valid = load(i)
    lse = peak[:, None], queries.vector(residuals.lse.log_total, queries.in_bounds)[:, None]
    delta = queries.vector(residuals.delta, q_valid)[:, None]
    q = queries.tile(refs.query, head_columns, q_valid)
    do = queries.tile(residuals.d_out, value_columns, q_valid)
    keys = StoredKeys(refs, tiling, coords)
    blocks = KeyBlocks(keys, queries.at, queries.in_bounds, q_positions)

    def step(state: list, block: KeyBlock) -> tuple:
        (acc,) = state
        operands, where = (), ()
        if refs.scores:
            operands = blocks.scores(block.keys, block.in_bounds)
            where = q_positions[:, None], block.positions[None, :], n, b
        (k,), (v,) = block.k.parts, block.v.parts
        p, back = _probabilities(tiling.dot(q, k, (1, 1)), lse, block.allowed, operands, where, tiling)
        ds = back(p * (tiling.dot(do, v, (1, 1)) - delta))
        return (acc + tiling.dot(ds, k, (1, 0)),)

    walk = BlockWalk.of(refs.lists, (*heads, i), keys.locate)
    carry = walk.start((jnp.zeros((tiling.q_block, head_columns.tile), jnp.float32),))
    carry = lax.fori_loop(walk.first, walk.num_full, walk.visit(blocks.full, step), carry)
    _, acc = lax.fori_loop(walk.num_full, walk.last, walk.visit(blocks.partial, step), carry)
    # Recomputed: what the loops do not need must not occupy registers, or the stack, while they run.
    queries, *_, q_valid = load(tiling.opaque(i))
    d_query = jnp.where(q_valid[:, None], acc * tiling.scale, 0.0)
    tiles.store_rows(d_query_ref, (b, queries.at, n), head_columns, queries.in_bounds, d_query)


class _QueriesOfKeys(NamedTuple):
    """A block of queries that a block of keys visits, with the mask, transposed."""

    queries: QueryBlock
    positions: Any  # int32 [q_block]; None if nothing uses them
    peak: Array
    valid: Array | None  # bool [q_block]; None: all of them
    allowed: Array | None  # bool [kv_block, q_block]; None: every query sees every key


def _d_key_value_kernel(refs: KernelArgs, residuals: Residuals, d_key_ref, d_value_ref, *, tiling: Tiling):
    (head_columns,), (value_columns,) = tiles.columns(tiling.head_dim), tiles.columns(tiling.value_dim)
    h, b = pl.program_id(1), pl.program_id(2)
    first_head = ProgramCoords(b, h, h * tiling.group)
    j = refs.lists.order[(*first_head.at(refs.lists.order, tiling), pl.program_id(0))]
    stored = StoredKeys(refs, tiling, first_head)

    def load_keys(j: Array) -> tuple[pl.Slice, Array, Array]:
        """Of a block of keys: their indices, bool in bounds, and positions."""
        in_bounds = stored.in_bounds(j)
        return stored.slots(j), in_bounds, stored.positions(j, in_bounds)

    keys, key_in_bounds, kv_positions = load_keys(j)
    valid = kv_positions >= 0
    (k,), (v,) = (stored.tile(x, stored.locate(j), valid).parts for x in (refs.key, refs.value))

    # Tiles are [kv_block, q_block] here, so that both sums have their probabilities on the left.
    def head(g: Any, state: tuple) -> tuple:
        coords = ProgramCoords(b, h, h * tiling.group + g)

        def operands(tree, queries: QueryBlock):
            """The transposed tiles of the operands of a mask or of scores."""

            def load(ref):
                heads = coords.at(ref, tiling)
                return tiles.load_operand(ref, heads, queries.at, queries.in_bounds, keys, key_in_bounds).T

            return pointwise.map_operands(load, tree)

        def full(block: Array) -> _QueriesOfKeys:
            queries = QueryBlock.full(refs, tiling, coords, block)
            positions = queries.positions() if refs.scores else None
            return _QueriesOfKeys(queries, positions, queries.vector(residuals.lse.peak, None), None, None)

        def partial(block: Array) -> _QueriesOfKeys:
            queries = QueryBlock.ragged(refs, tiling, coords, block)
            positions = queries.positions()
            peak = queries.vector(residuals.lse.peak, queries.in_bounds, jnp.inf)
            q_valid = (positions >= 0) & (peak != jnp.inf)
            mask = operands(refs.mask, queries)
            allowed = mask.allowed(positions[None, :], kv_positions[:, None]) & valid[:, None] & q_valid[None, :]
            return _QueriesOfKeys(queries, positions, peak, q_valid, allowed)

        def step(state: list, block: _QueriesOfKeys) -> tuple:
            d_key, d_value = state
            queries, q_positions, peak, q_valid, allowed = block
            q = queries.tile(refs.query, head_columns, q_valid)
            do = queries.tile(residuals.d_out, value_columns, q_valid)
            delta = queries.vector(residuals.delta, q_valid)[None, :]
            scores, where = (), ()
            if refs.scores:
                scores = operands(refs.scores, queries)
                where = q_positions[None, :], kv_positions[:, None], coords.n, b
            products = tiling.dot(k, q, (1, 1))
            # Loaded here, as registers are scarce while the product is computed.
            lse = peak[None, :], queries.vector(residuals.lse.log_total, queries.in_bounds)[None, :]
            p, back = _probabilities(products, lse, allowed, scores, where, tiling)
            d_value = d_value + tiling.dot(p, do, (1, 0))
            ds = back(p * (tiling.dot(v, do, (1, 1)) - delta))
            return d_key + tiling.dot(ds, q, (1, 0)), d_value

        walk = BlockWalk.of(refs.lists, (*coords.at(refs.lists.num_full, tiling), j))
        carry = lax.fori_loop(walk.first, walk.num_full, walk.visit(full, step), walk.start(state))
        _, d_key, d_value = lax.fori_loop(walk.num_full, walk.last, walk.visit(partial, step), carry)
        return d_key, d_value

    zeros = tuple(jnp.zeros((tiling.kv_block, x.shape[1]), jnp.float32) for x in (k, v))
    # A plain 0 fails in the interpreter.
    d_key, d_value = tiles.loop(0, tiling.group, head, zeros) if tiling.group > 1 else head(np.int32(0), zeros)
    # Recomputed: what the loops do not need must not occupy registers, or the stack, while they run.
    keys, key_in_bounds, kv_positions = load_keys(tiling.opaque(j))
    valid = kv_positions >= 0
    for ref, x, columns in ((d_key_ref, d_key * tiling.scale, head_columns), (d_value_ref, d_value, value_columns)):
        tiles.store_rows(ref, (b, keys, h), columns, key_in_bounds, jnp.where(valid[:, None], x, 0.0))
