"""Attention for JAX that walks lists of live KV blocks. See README.md for the reading order of the code."""

from pallas_attn import caches as caches
from pallas_attn import flax as flax
from pallas_attn import masks as masks
from pallas_attn import scores as scores
from pallas_attn.attention import AttentionOutput as AttentionOutput
from pallas_attn.attention import attention as attention
from pallas_attn.block_mask import BlockLists as BlockLists
from pallas_attn.block_mask import BlockMask as BlockMask
from pallas_attn.dispatch import implementations as implementations
from pallas_attn.picture import save_picture as save_picture
from pallas_attn.quantized import QuantizedArray as QuantizedArray
from pallas_attn.tuning import BlockSizes as BlockSizes

__version__ = "0.1.0"
