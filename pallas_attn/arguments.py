"""The arguments of ``attention()``, checked before anything is compiled."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from pallas_attn import checks, masks, pointwise, tuning
from pallas_attn import scores as score_algebra
from pallas_attn.block_mask import BlockMask
from pallas_attn.kernels.call import Call, CallShape, CallSpec
from pallas_attn.quantized import Kind, KVArray, QuantizedArray
from pallas_attn.scores import Score, Scores
from pallas_attn.tuning import BlockSizes

_DTYPES = ("float32", "bfloat16", "float16")
_LARGEST_SCALE = 2.0**127  # in base 2, as kernels compute, it is still a float32


class Arguments(NamedTuple):
    """The arguments of one call, checked and in one form.

    Attributes:
      mask: without its positions, where a BlockMask carries them.
      block_mask: the caller's; None: to be built from mask and positions, for the block sizes of the implementation.
      q_positions, kv_positions: None: ``arange``.
    """

    query: Array
    key: KVArray
    value: KVArray
    mask: masks.Mask
    block_mask: BlockMask | None
    q_positions: Array | None
    kv_positions: Array | None
    scores: Scores
    sinks: Array | None
    scale: float
    page_table: Array | None
    shape: CallShape

    def spec(self, block_sizes: BlockSizes, *, key_weights: bool) -> CallSpec:
        """What an implementation must know to tell whether it can serve the call with these blocks."""
        quantized = [x.values.size for x in (self.key, self.value) if isinstance(x, QuantizedArray)]
        return CallSpec(
            self.shape,
            self.query.dtype,
            block_sizes,
            self.mask,
            self.scores,
            _kind(self.key),
            _kind(self.value),
            None if self.page_table is None else self.key.shape[1],
            key_weights,
            max(quantized, default=0),
        )

    def call(self, block_sizes: BlockSizes) -> Call:
        """The arrays of the call, with lists of blocks of these sizes unless the caller brought them."""
        block_mask = self.block_mask
        if block_mask is None:
            q_len, kv_len, positions = self.shape.q_len, self.shape.kv_len, self.kv_positions
            if self.page_table is not None:
                positions = _positions_in_pages(positions, self.page_table, self.key)
            block_mask = BlockMask.from_mask(
                self.mask,
                q_len if self.q_positions is None else self.q_positions,
                kv_len if positions is None else positions,
                block_sizes,
            )
        return Call(self.query, self.key, self.value, block_mask, self.scores, self.sinks, self.page_table)


def check(
    query: Any,
    key: Any,
    value: Any,
    mask: Any,
    *,
    q_positions: Any,
    kv_positions: Any,
    scores: Score | Sequence[Score] | None,
    sinks: Any,
    scale: float | None,
    page_table: Any,
    block_sizes: BlockSizes | None,
) -> Arguments:
    """Checks the arguments of :func:`pallas_attn.attention` against each other.

    Raises:
      ValueError, TypeError: as there.
    """
    query, key, value = _check_arrays(query, key, value, page_table)
    page_table = _check_page_table(page_table, query, key)
    shape = CallShape.of(query, key, value, page_table)
    scale = _check_scale(scale, query.shape[-1])
    block_mask = mask if isinstance(mask, BlockMask) else None
    if block_mask is None:
        relation, of = masks.with_keys(_as_mask(mask), shape.kv_len), ""
    else:
        _refuse_beside_block_mask(q_positions=q_positions, kv_positions=kv_positions, block_sizes=block_sizes)
        relation, of = block_mask.mask, "mask."
        q_positions, kv_positions = block_mask.q_positions, block_mask.kv_positions
    _check_mask(relation, shape)
    heads = (1, shape.kv_heads)
    q_positions = _check_positions(f"{of}q_positions", q_positions, shape.batch, shape.q_len, heads=())
    kv_positions = _check_positions(f"{of}kv_positions", kv_positions, shape.batch, shape.kv_len, heads=heads)
    scores = _check_scores(score_algebra.traced(score_algebra.as_scores(scores)), shape)
    sinks = _check_sinks(sinks, query)
    positions = q_positions, kv_positions
    return Arguments(query, key, value, relation, block_mask, *positions, scores, sinks, scale, page_table, shape)


def _kind(x: KVArray) -> Kind | None:
    return x.kind if isinstance(x, QuantizedArray) else None


def _positions_in_pages(positions: Array | None, page_table: Array, key: KVArray) -> Array:
    """Positions of keys: -1 where the pool has no such page."""
    pages, page = key.shape[:2]
    exists = jnp.repeat((page_table >= 0) & (page_table < pages), page, axis=1)  # [B, S]
    if positions is None:
        positions = jnp.arange(exists.shape[1], dtype=jnp.int32)[None]
    return jnp.where(exists if positions.ndim == 2 else exists[:, None], positions, -1)


def _refuse_beside_block_mask(**options) -> None:
    for name, option in options.items():
        if option is not None:
            raise ValueError(f"{name}: expected None beside a BlockMask, which carries its own, got a value")


def _check_arrays(query, key, value, page_table) -> tuple[Array, KVArray, KVArray]:
    query = checks.array("query", query)
    key, value = (_check_keys(name, x) for name, x in (("key", key), ("value", value)))
    for name, x in {"query": query, "key": key, "value": value}.items():
        if len(x.shape) != 4:
            axes = "(batch, tokens, heads, head size)"
            if page_table is not None and name != "query":
                axes = "(pages, tokens of a page, heads, head size)"
            raise ValueError(f"{name}: expected rank 4 {axes}, got shape {tuple(x.shape)}")
        if 0 in x.shape:
            raise ValueError(f"{name}: expected no empty axis, got shape {tuple(x.shape)}")
        if max(x.shape) > checks.LONGEST_AXIS:
            raise ValueError(f"{name}: expected no axis longer than 2^30, got shape {tuple(x.shape)}")
        if isinstance(x, QuantizedArray):
            continue
        if str(x.dtype) not in _DTYPES:
            raise ValueError(f"{name}: expected dtype {', '.join(_DTYPES)} (cast it by astype), got {x.dtype}")
        if x.dtype != query.dtype:
            raise ValueError(f"{name}: expected query's dtype {query.dtype}, got {x.dtype}")
    batch, _, q_heads, head_dim = query.shape
    rows = (batch, "S") if page_table is None else ("P", "page")
    if (page_table is None and key.shape[0] != batch) or key.shape[3] != head_dim:
        wanted = f"[{rows[0]}, {rows[1]}, K, {head_dim}] (query's {'B and ' if page_table is None else ''}D)"
        raise ValueError(f"key: expected shape {wanted}, got {tuple(key.shape)}")
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(f"value: expected shape {[*key.shape[:3], 'Dv']} (key's B, S and K), got {tuple(value.shape)}")
    if q_heads % key.shape[2]:
        raise ValueError(f"key: expected a number of heads K that divides query's N={q_heads}, got K={key.shape[2]}")
    return jax.tree.map(jnp.asarray, (query, key, value))


def _check_keys(name: str, x) -> KVArray:
    if not isinstance(x, QuantizedArray):
        return checks.array(name, x, "an array or a QuantizedArray")
    x.check(name)
    return x


def _check_page_table(page_table: Array | None, query: Array, key: KVArray) -> Array | None:
    if page_table is None:
        return None
    page_table = checks.array("page_table", page_table, "an int32 array")
    batch, page = query.shape[0], key.shape[1]
    shape = tuple(page_table.shape)
    if not checks.is_integer(page_table) or len(shape) != 2 or shape[0] != batch or shape[1] == 0:
        wanted = f"int32 [{batch}, S // {page}] (query's B, and the tokens of a page)"
        raise ValueError(f"page_table: expected {wanted}, got {page_table.dtype} {list(shape)}")
    if page % tuning.PAGE_MULTIPLE:
        raise ValueError(
            f"key: expected pages of a multiple of {tuning.PAGE_MULTIPLE} tokens, got shape {tuple(key.shape)}"
        )
    if shape[1] * page > checks.LONGEST_AXIS:
        raise ValueError(f"page_table: expected at most 2^30 keys in a row, got {shape[1]} pages of {page}")
    return checks.positions("page_table", page_table, ranks=(2,))


def _check_scale(scale: float | None, head_dim: int) -> float:
    if scale is None:
        return head_dim**-0.5
    return checks.number("scale", scale, most=_LARGEST_SCALE)


def _as_mask(mask) -> masks.Mask:
    if mask is None:
        return masks.full()
    if isinstance(mask, masks.Mask):
        return mask
    mask = checks.array("mask", mask, "a Mask, a BlockMask, None or a bool array")
    if mask.dtype != jnp.bool_ or mask.ndim != 4:
        raise ValueError(f"mask: expected bool [B|1, N|K|1, T, S], got {mask.dtype} {list(mask.shape)}")
    return masks.dense(mask)


def _check_mask(mask: masks.Mask, shape: CallShape) -> None:
    batch, q_len, kv_len, q_heads, kv_heads = shape.batch, shape.q_len, shape.kv_len, shape.q_heads, shape.kv_heads
    sizes = ({1, batch}, {1, kv_heads, q_heads}, {1, q_len}, {1, kv_len})
    for x in masks.operands(mask):
        if any(size not in allowed for size, allowed in zip(x.shape, sizes, strict=True)):
            wanted = f"[{batch}|1, {q_heads}|{kv_heads}|1, {q_len}|1, {kv_len}|1]"
            raise ValueError(f"mask: expected operands of shape {wanted} (B, heads, T, S), got {tuple(x.shape)}")


def _check_scores(scores: Scores, shape: CallShape) -> Scores:
    sizes = (shape.batch, shape.q_heads, shape.q_len, shape.kv_len)
    for score in scores:
        for x in pointwise.operands(score):
            if any(size not in (1, extent) for size, extent in zip(x.shape, sizes, strict=True)):
                wanted = "[" + ", ".join(f"{extent}|1" for extent in sizes) + "]"
                name = f"scores: {type(score).__name__.lower()}"
                raise ValueError(f"{name}: expected an array of shape {wanted} (B, N, T, S), got {tuple(x.shape)}")
    return scores


def _check_sinks(sinks: Array | None, query: Array) -> Array | None:
    if sinks is None:
        return None
    sinks = checks.array("sinks", sinks)
    if not jnp.issubdtype(sinks.dtype, jnp.floating) or tuple(sinks.shape) != (query.shape[2],):
        raise ValueError(f"sinks: expected floating-point [{query.shape[2]}], got {sinks.dtype} {list(sinks.shape)}")
    return checks.floats("sinks", sinks)


def _check_positions(
    name: str, positions: Array | None, batch: int, length: int, heads: tuple[int, ...]
) -> Array | None:
    """Integers ``[B|1, length]``, or ``[B|1, heads, length]`` with one of the given numbers of heads, as int32."""
    if positions is None:
        return None
    positions = checks.positions(name, positions, ranks=(2, 3) if heads else (2,))
    fitting = {(rows, *head, length) for rows in (1, batch) for head in ((), *((h,) for h in heads))}
    if tuple(positions.shape) not in fitting:
        wanted = f"[{batch}|1, {length}]" + (f" or [{batch}|1, {max(heads)}|1, {length}]" if heads else "")
        raise ValueError(f"{name}: expected shape {wanted}, got {tuple(positions.shape)}")
    return positions
