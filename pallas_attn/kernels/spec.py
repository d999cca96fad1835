"""What an implementation may ask about a call before it says whether it can serve it."""

import dataclasses

import jax.numpy as jnp

from pallas_attn.masks import Mask
from pallas_attn.quantized import Kind
from pallas_attn.scores import Scores
from pallas_attn.tuning import BlockSizes


@dataclasses.dataclass(frozen=True)
class CallSpec:
    """The static facts of one call of attention.

    Attributes:
      key_kind, value_kind: of a quantised array; None: plain.
      page: keys per page; None: no pages.
      key_weights: they are asked for.
      largest_quantized: numbers in the largest array of quantised values, as stored; 0: none.
    """

    head_dim: int
    value_dim: int
    dtype: jnp.dtype
    block_sizes: BlockSizes
    mask: Mask
    scores: Scores = ()
    key_kind: Kind | None = None
    value_kind: Kind | None = None
    page: int | None = None
    key_weights: bool = False
    largest_quantized: int = 0
