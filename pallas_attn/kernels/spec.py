"""What an implementation may ask about a call before it says whether it can serve it."""

import dataclasses

import jax.numpy as jnp

from pallas_attn.masks import Mask
from pallas_attn.scores import Scores
from pallas_attn.tuning import BlockSizes


@dataclasses.dataclass(frozen=True)
class CallSpec:
    """The static facts of one call of attention."""

    head_dim: int
    value_dim: int
    dtype: jnp.dtype
    block_sizes: BlockSizes
    mask: Mask
    scores: Scores = ()
