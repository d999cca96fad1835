"""Which keys the queries of each layer see, as BlockMasks: built before the layers run, and shared where they agree."""

import dataclasses
from collections.abc import Sequence

from jax import Array
from jax.typing import DTypeLike

import pallas_attn as pa
from pallas_attn.tuning import default_block_sizes
from pallas_attn_models.config import DecoderConfig

# KV blocks of one share of decode. As it is fixed, what a row gets is the same, to the bit, whoever shares the batch.
DECODE_CHUNK = 8


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How a BlockMask is cut: as given, or else by the tuning table."""

    block_sizes: pa.BlockSizes | None
    implementation: str | None
    head_dim: int
    dtype: DTypeLike

    def of(self, mask: pa.masks.Mask, q_len: int, kv_len: int) -> pa.BlockSizes:
        """For a call of T and S tokens."""
        sizes = self.block_sizes or default_block_sizes(
            q_len,
            kv_len,
            implementation=self.implementation,
            head_dim=self.head_dim,
            dtype=self.dtype,
            fine=mask.is_fine(),
        )
        return sizes if sizes.chunk is not None else dataclasses.replace(sizes, chunk=DECODE_CHUNK)


def block_masks(
    config: DecoderConfig,
    positions: Array,
    segment_ids: Array | None,
    caches: Sequence[pa.caches.KVCache] | None,
    sizes: Sizes,
) -> tuple[pa.BlockMask, ...]:
    """One for each layer; layers with the same window and the same kind of cache get the same object.

    Args:
      positions: int32 ``[B|1, T]`` of the new tokens, which are not in the caches yet.
      segment_ids: int32 ``[B|1, T]`` or None.
      caches: one per layer, or None. Those of the same policy, storage and capacity hold the same tokens, unless the
        policy lets every head choose (``policy.per_head``).
    """
    made: dict[tuple, pa.BlockMask] = {}
    layers = []
    for layer in range(config.num_layers):
        window = config.sliding_window(layer)
        cache = None if caches is None else caches[layer]
        key = (window,)
        if cache is not None:
            key = (window, cache.policy, cache.storage, cache.capacity, layer if cache.policy.per_head else None)
        if key not in made:
            mask = pa.masks.causal() if window is None else pa.masks.sliding_window(window)
            if segment_ids is not None:
                mask = mask & pa.masks.segments(segment_ids)
            if cache is not None and cache.mask is not None:
                mask = mask & cache.mask
            kv_positions = positions if cache is None else cache.positions_after(positions)
            cut = sizes.of(mask, positions.shape[-1], kv_positions.shape[-1])
            made[key] = pa.BlockMask.from_mask(mask, positions, kv_positions, cut)
        layers.append(made[key])
    return tuple(layers)
