"""Turns a mask and positions into lists of live KV blocks, once and on the device.

Queries and keys are divided into blocks. For every query block, ``indices`` lists the KV blocks to visit: first the
*full* ones (every query sees every key, so kernels need no mask code), then the *partial* ones. All other blocks are
*empty*, and no kernel reads them. The contents of a list never change a shape, so nothing recompiles.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from pallas_attn import checks, grids, masks, pointwise, tuning
from pallas_attn.masks import Interval, Mask, operands, repeat_heads
from pallas_attn.schedule import Schedule

EMPTY, PARTIAL, FULL = (np.uint8(x) for x in range(3))  # block classes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class BlockLists:
    """The blocks that every row (a query block, or a KV block when transposed) visits on the other side.

    Attributes:
      num_full: int32 ``[B|1, M, rows]``, number of full blocks.
      num_active: int32 ``[B|1, M, rows]``, number of full or partial blocks.
      indices: int32 ``[B|1, M, rows, width]``: full blocks, ascending, then partial blocks, ascending; entries beyond
        ``num_active`` are zero and must not be visited.
      order: int32 ``[B|1, M, rows]``: the rows, most work first.
    """

    num_full: Array
    num_active: Array
    indices: Array
    order: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class BlockMask:
    """A mask bound to positions, with its block lists. Make one with :meth:`from_mask`; it is a pytree.

    M, the number of heads with lists of their own, is 1 (shared by all), K (KV heads) or N (query heads).

    Attributes:
      mask: the :class:`~pallas_attn.masks.Mask`, evaluated in partial blocks.
      q_positions: int32 ``[B|1, T]``; -1 is padding.
      kv_positions: int32 ``[B|1, 1|K, S]``; -1 is an empty slot.
      lists: :class:`BlockLists` of KV blocks for each query block.
      schedule: how decode splits the work; None unless T is small.
      block_sizes: sizes of the blocks in the lists, static.
    """

    mask: Mask
    q_positions: Array
    kv_positions: Array
    lists: BlockLists
    schedule: Schedule | None
    block_sizes: tuning.BlockSizes = dataclasses.field(metadata={"static": True})

    @staticmethod
    def from_mask(
        mask: Mask,
        q_positions: Array | int,
        kv_positions: Array | int,
        block_sizes: tuning.BlockSizes | None = None,
    ) -> "BlockMask":
        """Builds the lists on the device, in O(blocks of T x blocks of S), without a T x S array. Works under jit.

        Args:
          mask: the mask; its operands must broadcast to B, T and S.
          q_positions: int32 ``[B|1, T]``, -1 is padding; or the int T for ``arange(T)``.
          kv_positions: int32 ``[B|1, S]`` or ``[B|1, K, S]``, -1 is an empty slot; or the int S for ``arange(S)``. With
            two ints a sliding window's lists are only as wide as the window.
          block_sizes: default from the tuning table for this machine.

        Raises:
          TypeError: ``mask`` is not a mask, or positions are neither an array nor an int.
          ValueError: positions of another shape or dtype, an operand that does not broadcast, or 2^31 or more pairs of
            blocks.
        """
        if not isinstance(mask, Mask):
            raise TypeError(f"mask: expected a pallas_attn.masks.Mask, got {checks.describe(mask)}")
        if not isinstance(block_sizes, tuning.BlockSizes | None):
            raise TypeError(f"block_sizes: expected pallas_attn.BlockSizes, got {checks.describe(block_sizes)}")
        consecutive = _is_length(q_positions) and _is_length(kv_positions)
        q = _as_positions("q_positions", q_positions, ranks=(2,))
        kv = _as_positions("kv_positions", kv_positions, ranks=(2, 3))
        q_len, kv_len = q.shape[-1], kv.shape[-1]
        mask = masks.with_keys(mask, kv_len)
        batch, heads = _check_operands(mask, q, kv)
        sizes = block_sizes or tuning.default_block_sizes(q_len, kv_len, fine=mask.has_fine_edges())
        _check_pairs(batch, heads, -(-q_len // sizes.q), -(-kv_len // sizes.kv))
        q_positions, kv_positions = _filled(q), _filled(kv)
        if kv_positions.ndim == 2:
            kv_positions = kv_positions[:, None]
        span = mask.span() if consecutive else None
        # A query block sees q_block + span - 1 consecutive keys, which touch at most this many KV blocks.
        width = None if span is None else (sizes.q + span - 3) // sizes.kv + 2
        lists = _build_lists(mask, q_positions, kv_positions, heads, sizes.q, sizes.kv, width)
        return BlockMask(mask, q_positions, kv_positions, lists, None, sizes).with_schedule()

    def with_schedule(self) -> "BlockMask":
        """Returns the BlockMask with the decode schedule of its lists, if T is small enough for decode."""
        sizes = self.block_sizes
        if self.q_positions.shape[-1] > min(sizes.q, tuning.DECODE_QUERIES):
            return self
        num_active, width = self.num_active.reshape(-1), self.indices.shape[-1]
        if sizes.chunk is not None:
            schedule = Schedule.fixed(num_active, width, sizes.chunk)
        else:
            schedule = Schedule.balanced(num_active, width, sizes.shares)
        return dataclasses.replace(self, schedule=schedule)

    def with_block_sizes(self, sizes: tuning.BlockSizes) -> "BlockMask":
        """Returns the BlockMask of the same mask in blocks of other sizes. Equal blocks keep their lists."""
        if (sizes.q, sizes.kv) == (self.q_block, self.kv_block):
            return dataclasses.replace(self, block_sizes=sizes)
        return BlockMask.from_mask(self.mask, self.q_positions, self.kv_positions, sizes)

    @property
    def q_block(self) -> int:
        """Queries per block."""
        return self.block_sizes.q

    @property
    def kv_block(self) -> int:
        """Keys per block."""
        return self.block_sizes.kv

    @property
    def num_full(self) -> Array:
        """int32 ``[B|1, M, nq]``: number of full KV blocks."""
        return self.lists.num_full

    @property
    def num_active(self) -> Array:
        """int32 ``[B|1, M, nq]``: number of KV blocks that the query block visits."""
        return self.lists.num_active

    @property
    def indices(self) -> Array:
        """int32 ``[B|1, M, nq, width]``: the KV blocks to visit, full ones first."""
        return self.lists.indices

    @property
    def order(self) -> Array:
        """int32 ``[B|1, M, nq]``: query blocks, heaviest first (a partial block weighs twice a full one)."""
        return self.lists.order

    @property
    def transposed(self) -> BlockLists:
        """Lists of query blocks for each KV block.

        A block with a padding query is partial here, as a block with an empty key slot is in the query blocks' lists.
        """
        valid = _blocks((self.q_positions >= 0)[:, None, :, None], 2, self.q_block, jnp.array(False)).min(3)
        classes = self.bitmap()
        classes = jnp.where(valid, classes, jnp.minimum(classes, PARTIAL))
        return _lists_from_classes(classes.swapaxes(-1, -2))

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """``(B|1, M, T, S)``."""
        batch = max(self.q_positions.shape[0], self.kv_positions.shape[0], self.num_full.shape[0])
        return batch, self.num_full.shape[1], self.q_positions.shape[-1], self.kv_positions.shape[-1]

    @property
    def grid(self) -> tuple[int, int]:
        """``(nq, nk)``: the number of query blocks and of KV blocks."""
        return self.num_full.shape[-1], -(-self.kv_positions.shape[-1] // self.kv_block)

    def bitmap(self) -> Array:
        """The class of every block, uint8 ``[B|1, M, nq, nk]``: 0 empty, 1 partial, 2 full."""
        place = jax.lax.broadcasted_iota(jnp.int32, self.indices.shape, 3)
        full = place < self.num_full[..., None]
        active = place < self.num_active[..., None]
        kind = jnp.where(full, FULL, PARTIAL)
        empty = jnp.zeros((*self.num_full.shape, self.grid[1]), jnp.uint8)
        return _scatter_last(empty, jnp.where(active, self.indices, self.grid[1]), kind)

    def classes(self, batch: int, head: int) -> np.ndarray:
        """One row and head of :meth:`bitmap`, uint8 ``[nq, nk]``, on the host, without computing the rest."""
        lists = jax.tree.map(lambda x: x[batch : batch + 1, head : head + 1], self.lists)
        return np.asarray(dataclasses.replace(self, lists=lists).bitmap())[0, 0]

    def density(self) -> Array:
        """The fraction of the blocks that are visited, float32 scalar."""
        return jnp.mean(self.num_active.astype(jnp.float32)) / self.grid[1]

    def __str__(self) -> str:
        return grids.as_text(self)


def _is_length(positions: Array | int) -> bool:
    return isinstance(positions, int | np.integer) and not isinstance(positions, bool)


def _as_positions(name: str, value: Array | int, ranks: tuple[int, ...]) -> Array | jax.ShapeDtypeStruct:
    """Validates positions. A length stays a shape for now, so that an invalid call allocates nothing."""
    if _is_length(value):
        length = checks.integer(name, value, least=1, most=checks.LONGEST_AXIS)
        return jax.ShapeDtypeStruct((1, length), jnp.int32)
    return checks.positions(name, value, ranks=ranks)


def _filled(positions: Array | jax.ShapeDtypeStruct) -> Array:
    if isinstance(positions, jax.ShapeDtypeStruct):
        return jnp.arange(positions.shape[-1], dtype=jnp.int32)[None]
    return positions


def _check_operands(
    mask: Mask, q_positions: Array | jax.ShapeDtypeStruct, kv_positions: Array | jax.ShapeDtypeStruct
) -> tuple[int, int]:
    """Checks that every operand broadcasts to ``[B, M, T, S]``; returns B and M."""
    extents = {"T": (2, q_positions.shape[-1]), "S": (3, kv_positions.shape[-1])}
    batches = {x.shape[0] for x in (q_positions, kv_positions, *operands(mask))} - {1}
    if len(batches) > 1:
        raise ValueError(f"mask: expected one batch size (or 1) in positions and operands, got {sorted(batches)}")
    key_heads = kv_positions.shape[1] if len(kv_positions.shape) == 3 else 1
    head_counts = sorted({key_heads, *(x.shape[1] for x in operands(mask))} - {1})
    if len(head_counts) > 2 or (len(head_counts) == 2 and head_counts[1] % head_counts[0]):
        raise ValueError(f"mask: expected 1, K or N heads in positions and operands, got {head_counts}")
    for operand in operands(mask):
        for axis_name, (axis, extent) in extents.items():
            if operand.shape[axis] not in (1, extent):
                raise ValueError(
                    f"mask: expected operands that broadcast to {axis_name}={extent}, got shape {tuple(operand.shape)}"
                    " ([B, heads, T, S])"
                )
    return max(batches, default=1), max(head_counts, default=1)


def _check_pairs(*extents: int) -> None:
    if math.prod(extents) > checks.LARGEST_INT32:
        got = " x ".join(map(str, extents))
        what = f"{got} (batch, heads, query blocks, KV blocks)"
        raise ValueError(f"block_sizes: expected fewer than 2^31 pairs of blocks, got {what}: use larger blocks")


@functools.partial(jax.jit, static_argnums=(3, 4, 5, 6))
def _build_lists(mask, q_positions, kv_positions, heads, q_block, kv_block, width) -> BlockLists:
    # Without the barrier XLA would constant-fold the reduction of a mask that is constant in the caller's jit, which
    # takes minutes of compile time.
    mask = jax.lax.optimization_barrier(mask)
    return _lists_from_classes(_classify(mask, q_positions, kv_positions, heads, q_block, kv_block), width)


def _classify(mask: Mask, q_positions: Array, kv_positions: Array, heads: int, q_block: int, kv_block: int) -> Array:
    """The class of every block, uint8 ``[B|1, M, nq, nk]``, from per-block minima and maxima alone."""
    q = q_positions[:, None, :, None]
    kv = kv_positions[:, :, None, :]
    q_valid, kv_valid = q >= 0, kv >= 0

    def interval(x: Array) -> Interval:
        valid = jnp.ones((1, 1, 1, 1), jnp.bool_)
        if x.shape[2] > 1:
            valid = valid & q_valid
        if x.shape[3] > 1:
            valid = valid & _repeat_to(kv_valid, x)
        return _interval(x, valid, q_block, kv_block)

    intervals, q_tokens, kv_tokens = pointwise.map_operands(
        lambda x: repeat_heads(x, heads),
        (pointwise.map_operands(interval, mask), _tokens(q, 2, q_block), _tokens(kv, 3, kv_block)),
    )
    some, every = intervals.bounds(q_tokens.span, kv_tokens.span)
    # A block with an empty key slot is never full, so the loop over full blocks needs no mask code. Padding *queries*
    # do not matter there: kernels clear their rows at the end.
    active = some & q_tokens.some & kv_tokens.some
    full = active & every & kv_tokens.every
    classes = jnp.where(full, FULL, jnp.where(active, PARTIAL, EMPTY))
    # The bounds may ignore operands that differ by head.
    return jnp.broadcast_to(classes, (classes.shape[0], heads, *classes.shape[2:]))


def _repeat_to(kv_valid: Array, x: Array) -> Array:
    """Aligns per-head key validity with an operand that has fewer or more heads."""
    if kv_valid.shape[1] > x.shape[1]:
        # Heads with different empty slots share the operand: a key counts if any of those heads has it.
        return kv_valid.reshape(kv_valid.shape[0], x.shape[1], -1, *kv_valid.shape[2:]).any(2)
    return repeat_heads(kv_valid, x.shape[1])


class _Tokens(NamedTuple):
    """Summary of the tokens in every block, ``[B, M, nq, 1]`` or ``[B, M, 1, nk]``."""

    span: Interval  # of their positions; min > max in a block without tokens
    every: Array  # bool: the block has no padding
    some: Array  # bool: the block has a token


def _tokens(positions: Array, axis: int, block: int) -> _Tokens:
    """Summarizes the positions along an axis, padded to whole blocks."""
    limits = jnp.iinfo(positions.dtype)
    lowest, highest = jnp.array(limits.min, positions.dtype), jnp.array(limits.max, positions.dtype)
    x = _blocks(positions, axis, block, jnp.array(-1, positions.dtype))
    # One pass for all three reductions: in decode it is all the work on most of a long buffer.
    first, least, last = jax.lax.reduce(
        (jnp.where(x >= 0, x, highest), x, x),
        (highest, highest, lowest),
        lambda a, b: (jax.lax.min(a[0], b[0]), jax.lax.min(a[1], b[1]), jax.lax.max(a[2], b[2])),
        (axis + 1,),
    )
    some = last >= 0
    return _Tokens(Interval(first, jnp.where(some, last, lowest)), least >= 0, some)


def _interval(x: Array, valid: Array, q_block: int, kv_block: int) -> Interval:
    """The smallest and the largest valid value in every block.

    From ``[B, M, T|1, S|1]`` to ``[B, M, nq|1, nk|1]``; an axis of size 1 stays shared. In a block without valid
    values, min > max.
    """
    if x.dtype == jnp.bool_:
        return _interval_of_bools(x, valid, q_block, kv_block)
    limits = jnp.iinfo(x.dtype)
    lowest, highest = jnp.array(limits.min, x.dtype), jnp.array(limits.max, x.dtype)
    low, high = jnp.where(valid, x, highest), jnp.where(valid, x, lowest)
    for axis, block in _blocked_axes(x, q_block, kv_block):
        # One pass for both: XLA on a CPU takes several for min and max along the last axis.
        blocks = [_blocks(low, axis, block, highest), _blocks(high, axis, block, lowest)]
        low, high = jax.lax.reduce(blocks, [highest, lowest], _wider, (axis + 1,))
    return Interval(low, high)


def _interval_of_bools(x: Array, valid: Array, q_block: int, kv_block: int) -> Interval:
    """:func:`_interval` of bools, by bit flags: XLA on a CPU reads an explicit mask seven times as fast this way."""
    true, false, nothing = jnp.uint8(1), jnp.uint8(2), jnp.uint8(0)
    occurring = jnp.where(valid, jnp.where(x, true, false), nothing)
    for axis, block in _blocked_axes(x, q_block, kv_block):
        blocks = _blocks(occurring, axis, block, nothing)
        occurring = jax.lax.reduce(blocks, nothing, jax.lax.bitwise_or, (axis + 1,))
    return Interval(occurring & false == 0, occurring & true != 0)


def _blocked_axes(x: Array, q_block: int, kv_block: int) -> list[tuple[int, int]]:
    """The axes that are not shared, with their block sizes."""
    return [(axis, block) for axis, block in ((2, q_block), (3, kv_block)) if x.shape[axis] > 1]


def _wider(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
    return jax.lax.min(a[0], b[0]), jax.lax.max(a[1], b[1])


def _blocks(x: Array, axis: int, block: int, fill: Array) -> Array:
    """Splits an axis into ``[..., blocks, block, ...]``, after padding it with ``fill``.

    For a block longer than the axis, one padding element is equivalent to all of them.
    """
    block = min(block, x.shape[axis] + 1)
    padding = [(0, 0, 0)] * x.ndim
    padding[axis] = (0, -x.shape[axis] % block, 0)
    x = jax.lax.pad(x, fill, padding)
    return x.reshape(*x.shape[:axis], -1, block, *x.shape[axis + 1 :])


def _lists_from_classes(classes: Array, width: int | None = None) -> BlockLists:
    """Turns block classes ``[..., rows, columns]`` into lists, by cumulative sums and one scatter."""
    columns = classes.shape[-1]
    width = columns if width is None else min(width, columns)
    full, partial = classes == FULL, classes == PARTIAL
    num_full = full.sum(-1, dtype=jnp.int32)
    num_partial = partial.sum(-1, dtype=jnp.int32)
    place = jnp.where(
        full,
        jnp.cumsum(full, -1, dtype=jnp.int32) - 1,
        jnp.where(partial, num_full[..., None] + jnp.cumsum(partial, -1, dtype=jnp.int32) - 1, width),
    )
    column = jax.lax.broadcasted_iota(jnp.int32, classes.shape, classes.ndim - 1)
    indices = _scatter_last(jnp.zeros((*classes.shape[:-1], width), jnp.int32), place, column)
    order = jnp.argsort(-(num_full + 2 * num_partial), axis=-1, stable=True, dtype=jnp.int32)
    return BlockLists(num_full, num_full + num_partial, indices, order)


def _scatter_last(target: Array, place: Array, values: Array) -> Array:
    """``target[..., place] = values`` along the last axis; out-of-bounds places are dropped."""
    rows = target.reshape(-1, target.shape[-1])
    place, values = place.reshape(rows.shape[0], -1), values.reshape(rows.shape[0], -1)
    row = jax.lax.broadcasted_iota(jnp.int32, place.shape, 0)
    return rows.at[row, place].set(values, mode="drop").reshape(target.shape)
