"""The forward kernel in Pallas, through the Triton lowering.

One program computes one query block of one query head: FlashAttention-2 (arXiv:2307.08691, algorithm 1) over the list
of live KV blocks. Loop one runs over full blocks and holds no mask code; loop two runs over partial blocks, evaluates
the mask on positions, and reads only keys that exist. Each iteration reads the index of the *next* block while its own
block is computed, so that an address is never waited for.

Inside the kernel logits are in base 2: ``log2(e)`` is folded into the scale, and ``exp2`` is one instruction.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_attn.block_mask import BlockMask

_LOWEST = float(jnp.finfo(jnp.float32).min)
_LOG2_E = math.log2(math.e)


# jit: outside of jit, too, a call with known shapes compiles nothing.
@functools.partial(jax.jit, static_argnames=("scale", "interpret"))
def forward(
    query: Array, key: Array, value: Array, block_mask: BlockMask, *, scale: float, interpret: bool = False
) -> tuple[Array, Array]:
    """Same contract as :func:`pallas_attn.kernels.reference.forward`.

    Blocks are powers of two, at least 16, and D and Dv at most 256. ``interpret`` runs Pallas' interpreter.
    """
    batch, q_len, q_heads, head_dim = query.shape
    _, kv_len, kv_heads, value_dim = value.shape
    sizes = block_mask.block_sizes
    q_blocks, kv_blocks = block_mask.grid
    q_rows, kv_rows = q_blocks * sizes.q, kv_blocks * sizes.kv
    head_tile, value_tile = _tile_width(head_dim), _tile_width(value_dim)
    operands, mask_structure = jax.tree.flatten(block_mask.mask)

    # In the index maps: i query block, n query head, b batch row. An axis of size 1 is shared.
    def shared(b, size):
        return b if size > 1 else 0

    def per_query(*block):
        return pl.BlockSpec((None, q_rows, None, *block), lambda i, n, b: (b, 0, n, 0))

    def per_key(*block):
        return pl.BlockSpec((None, kv_rows, None, *block), lambda i, n, b: (b, 0, n * kv_heads // q_heads, 0))

    def per_list(x, *block):
        zeros = (0,) * len(block)
        heads = x.shape[1]
        return pl.BlockSpec((None, None, *block), lambda i, n, b: (shared(b, x.shape[0]), n * heads // q_heads, *zeros))

    lists = block_mask.lists
    in_specs = [
        per_query(head_tile),
        per_key(head_tile),
        per_key(value_tile),
        per_list(lists.order, q_blocks),
        per_list(lists.num_full, q_blocks),
        per_list(lists.num_active, q_blocks),
        per_list(lists.indices, q_blocks, lists.indices.shape[-1]),
        pl.BlockSpec((None, q_rows), lambda i, n, b: (shared(b, block_mask.q_positions.shape[0]), 0)),
        per_list(block_mask.kv_positions, kv_rows),
        *(per_list(x, q_rows if x.shape[2] > 1 else 1, kv_rows if x.shape[3] > 1 else 1) for x in operands),
    ]
    kernel = functools.partial(
        _kernel,
        mask_structure=mask_structure,
        operand_shapes=[x.shape for x in operands],
        scale=scale,
        q_block=sizes.q,
        kv_block=sizes.kv,
        q_len=q_len,
        kv_len=kv_len,
        head_dim=head_dim,
        value_dim=value_dim,
    )
    out, lse = pl.pallas_call(
        kernel,
        grid=(q_blocks, q_heads, batch),
        in_specs=in_specs,
        out_specs=[
            per_query(value_tile),
            pl.BlockSpec((None, None, q_rows), lambda i, n, b: (b, n, 0)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((batch, q_len, q_heads, value_dim), query.dtype),
            jax.ShapeDtypeStruct((batch, q_heads, q_len), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=sizes.num_warps, num_stages=sizes.num_stages),
        interpret=interpret,
        name="pallas_attn_forward",
    )(
        query,
        key,
        value,
        lists.order,
        lists.num_full,
        lists.num_active,
        lists.indices,
        block_mask.q_positions,
        block_mask.kv_positions,
        *operands,
    )
    return out, lse


def _kernel(
    query_ref,
    key_ref,
    value_ref,
    order_ref,
    num_full_ref,
    num_active_ref,
    indices_ref,
    q_positions_ref,
    kv_positions_ref,
    *refs,
    mask_structure,
    operand_shapes,
    scale: float,
    q_block: int,
    kv_block: int,
    q_len: int,
    kv_len: int,
    head_dim: int,
    value_dim: int,
):
    *operand_refs, out_ref, lse_ref = refs
    head_tile, value_tile = query_ref.shape[-1], value_ref.shape[-1]
    head_columns = None if head_dim == head_tile else jnp.arange(head_tile) < head_dim
    value_columns = None if value_dim == value_tile else jnp.arange(value_tile) < value_dim
    precision = lax.Precision.HIGHEST if query_ref.dtype == jnp.float32 else None

    i = order_ref[pl.program_id(0)]
    rows = pl.Slice(i * q_block, q_block)
    row_exists = i * q_block + jnp.arange(q_block) < q_len
    q = _load(query_ref, rows, row_exists, head_columns)
    q_positions = plgpu.load(q_positions_ref.at[rows], mask=row_exists, other=-1)
    # Only |scale| is folded into exp2, so that the largest logit times it is the largest scaled logit.
    if scale <= 0:
        q = q * jnp.sign(jnp.asarray(scale, q.dtype))
    to_base_2 = (abs(scale) or 1.0) * _LOG2_E

    def attend(state, k, v, allowed):
        peak, total, acc = state
        logits = _dot(q, k, ((1,), (1,)), precision)
        if allowed is not None:
            logits = jnp.where(allowed, logits, -jnp.inf)
        new_peak = jnp.maximum(peak, jnp.max(logits, axis=1) * to_base_2)
        decay = jnp.exp2(peak - new_peak)
        weights = jnp.exp2(logits * to_base_2 - new_peak[:, None])
        total = total * decay + jnp.sum(weights, axis=1)
        acc = acc * decay[:, None] + _dot(weights.astype(v.dtype), v, ((1,), (0,)), precision)
        return new_peak, total, acc

    def next_block(slot):
        return indices_ref[i, jnp.minimum(slot + 1, indices_ref.shape[1] - 1)]

    def full_block(slot, carry):
        block, *state = carry
        following = next_block(slot)
        keys = pl.Slice(block * kv_block, kv_block)
        k = _load(key_ref, keys, None, head_columns)
        v = _load(value_ref, keys, None, value_columns)
        return following, *attend(state, k, v, None)

    def partial_block(slot, carry):
        block, *state = carry
        following = next_block(slot)
        keys = pl.Slice(block * kv_block, kv_block)
        key_exists = block * kv_block + jnp.arange(kv_block) < kv_len
        kv_positions = plgpu.load(kv_positions_ref.at[keys], mask=key_exists, other=-1)
        real = kv_positions >= 0
        tiles = [
            _load_operand(ref, shape, rows, row_exists, keys, key_exists)
            for ref, shape in zip(operand_refs, operand_shapes, strict=True)
        ]
        mask = jax.tree.unflatten(mask_structure, tiles)
        allowed = mask.allowed(q_positions[:, None], kv_positions[None, :]) & real[None, :]
        # An empty slot is not read: it may hold anything, NaN included, and 0 * NaN is NaN.
        k = _load(key_ref, keys, real, head_columns)
        v = _load(value_ref, keys, real, value_columns)
        return following, *attend(state, k, v, allowed)

    num_full = num_full_ref[i]
    carry = (
        indices_ref[i, 0],
        jnp.full((q_block,), _LOWEST, jnp.float32),
        jnp.zeros((q_block,), jnp.float32),
        jnp.zeros((q_block, value_tile), jnp.float32),
    )
    carry = lax.fori_loop(0, num_full, full_block, carry)
    _, peak, total, acc = lax.fori_loop(num_full, num_active_ref[i], partial_block, carry)

    # A query that is padding, or that saw no key, gets 0 and -inf. Not > 0: what is not a number shows.
    seen = (total != 0) & (q_positions >= 0)
    total = jnp.where(seen, total, 1.0)
    out = jnp.where(seen[:, None], acc / total[:, None], 0.0)
    lse = jnp.where(seen, (peak + jnp.log2(total)) / _LOG2_E, -jnp.inf)
    out_mask = _outer(row_exists, value_columns, out.shape)
    plgpu.store(out_ref.at[rows, :], out.astype(out_ref.dtype), mask=out_mask)
    plgpu.store(lse_ref.at[rows], lse, mask=row_exists)


def _dot(a: Array, b: Array, contract: tuple, precision) -> Array:
    return lax.dot_general(a, b, (contract, ((), ())), precision=precision, preferred_element_type=jnp.float32)


def _outer(rows: Array | None, columns: Array | None, shape: tuple) -> Array | None:
    """The mask of a 2-D tile from masks of its rows and columns; None means all."""
    masks = [rows[:, None]] if rows is not None else []
    masks += [columns[None, :]] if columns is not None else []
    return functools.reduce(jnp.logical_and, [jnp.broadcast_to(m, shape) for m in masks]) if masks else None


def _load(ref, rows, row_mask: Array | None, column_mask: Array | None) -> Array:
    """Rows of a 2-D ref; what a mask excludes is not read and comes as 0."""
    return _masked_load(ref.at[rows, :], _outer(row_mask, column_mask, (rows.size, ref.shape[-1])))


def _load_operand(ref, shape, rows, row_exists, keys, key_exists) -> Array:
    """The tile ``[q_block|1, kv_block|1]`` of a mask's operand; an axis of size 1 is shared."""
    at_rows, row_mask = (rows, row_exists) if shape[2] > 1 else (pl.Slice(0, 1), None)
    at_keys, key_mask = (keys, key_exists) if shape[3] > 1 else (pl.Slice(0, 1), None)
    return _masked_load(ref.at[at_rows, at_keys], _outer(row_mask, key_mask, (at_rows.size, at_keys.size)))


def _masked_load(ref, mask: Array | None) -> Array:
    return plgpu.load(ref) if mask is None else plgpu.load(ref, mask=mask, other=jnp.zeros((), ref.dtype))


def _tile_width(head_dim: int) -> int:
    """Columns of a tile: the next power of two, and at least 16, the smallest operand of a matrix instruction."""
    return max(16, 1 << (head_dim - 1).bit_length())
