"""One call of attention: its arrays, which every pass of every implementation takes, and its static facts."""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from pallas_attn.block_mask import BlockMask
from pallas_attn.masks import Mask
from pallas_attn.quantized import Kind, KVArray
from pallas_attn.scores import Scores
from pallas_attn.tuning import BlockSizes


class Call(NamedTuple):
    """The arrays of one call, already checked.

    A gradient of a call, or the flags of ``jax.vmap`` for one, have the same structure.

    Attributes:
      query: ``[B, T, N, D]``.
      key: ``[B, S, K, D]``, or with a page table the pool ``[P, page, K, D]``; quantized or not.
      value: ``[B, S, K, Dv]``, or the pool ``[P, page, K, Dv]``.
      block_mask: which keys a query attends to, with the positions of both.
      scores: functions of the scaled logits.
      sinks: ``[N]``: a logit per head that takes probability and has no value; or None.
      page_table: int32 ``[B, S // page]``; or None.
    """

    query: Any
    key: Any
    value: Any
    block_mask: BlockMask
    scores: Scores = ()
    sinks: Array | None = None
    page_table: Array | None = None


@dataclasses.dataclass(frozen=True)
class CallShape:
    """The axes of a call, however its keys are stored."""

    batch: int
    q_len: int
    kv_len: int
    q_heads: int
    kv_heads: int
    head_dim: int
    value_dim: int

    @staticmethod
    def of(query: Array, key: KVArray, value: KVArray, page_table: Array | None = None) -> "CallShape":
        """Of arrays laid out as in :class:`Call`."""
        (batch, q_len, q_heads, head_dim), (_, length, kv_heads, value_dim) = query.shape, value.shape
        pages = 1 if page_table is None else page_table.shape[1]
        return CallShape(batch, q_len, pages * length, q_heads, kv_heads, head_dim, value_dim)

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.q_heads // self.kv_heads


@dataclasses.dataclass(frozen=True)
class CallSpec:
    """The static facts from which an implementation tells whether it can serve a call.

    Attributes:
      key_kind, value_kind: of a quantized array; None: plain.
      page: keys per page; None: no pages.
      key_weights: whether they are returned.
      largest_quantized: numbers in the largest array of quantized values, as stored; 0: none.
    """

    shape: CallShape
    dtype: jnp.dtype
    block_sizes: BlockSizes
    mask: Mask
    scores: Scores = ()
    key_kind: Kind | None = None
    value_kind: Kind | None = None
    page: int | None = None
    key_weights: bool = False
    largest_quantized: int = 0
