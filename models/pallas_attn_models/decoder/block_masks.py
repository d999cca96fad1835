"""Slot reservations and block masks, built before the layers run and shared by layers that agree."""

import dataclasses
from collections.abc import Sequence

from jax import Array
from jax.typing import DTypeLike

import pallas_attn as pa
from pallas_attn.tuning import default_block_sizes
from pallas_attn_models.decoder.config import DecoderConfig
from pallas_attn_models.decoder.layer_caches import cache_kind

# KV blocks per share of decode. A fixed number makes a row's bits independent of the other rows.
DECODE_CHUNK = 8


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Selects block sizes: the given ones, or those of the tuning table."""

    block_sizes: pa.BlockSizes | None
    implementation: str | None
    dtype: DTypeLike

    def of(self, mask: pa.masks.Mask, q_len: int, kv_len: int, head_dim: int) -> pa.BlockSizes:
        """Block sizes for T queries and S keys."""
        sizes = self.block_sizes or default_block_sizes(
            q_len,
            kv_len,
            implementation=self.implementation,
            head_dim=head_dim,
            dtype=self.dtype,
            fine=mask.has_fine_edges(),
        )
        return sizes if sizes.chunk is not None else dataclasses.replace(sizes, chunk=DECODE_CHUNK)


def reservations(
    positions: Array, rows: Array | None, caches: Sequence[pa.caches.KVCache]
) -> tuple[pa.caches.Reservation, ...]:
    """One per layer; layers with the same kind of cache share one object.

    Args:
      positions: int32 ``[R, T]`` of the new tokens.
      rows: int32 ``[R]``, the cache rows to which they belong, or None.
      caches: one per layer. Caches of equal policy, storage and capacity hold the same tokens, unless the policy
        selects per head (``policy.per_head``).
    """
    made: dict[tuple, pa.caches.Reservation] = {}
    layers = []
    for layer, cache in enumerate(caches):
        key = cache_kind(cache, layer)
        if key not in made:
            made[key] = cache.reserve(positions, rows)
        layers.append(made[key])
    return tuple(layers)


def block_masks(
    config: DecoderConfig,
    positions: Array,
    extra: pa.masks.Mask | None,
    caches: Sequence[pa.caches.KVCache] | None,
    reserved: Sequence[pa.caches.Reservation] | None,
    sizes: Sizes,
) -> tuple[pa.BlockMask, ...]:
    """One per layer; layers with the same window, head size and kind of cache share one object.

    Args:
      positions: int32 ``[B|1, T]`` of the new tokens, which the caches do not hold yet.
      extra: a mask combined with every layer's own, or None.
      caches, reserved: one per layer, and the result of :func:`reservations`; or None.
    """
    made: dict[tuple, pa.BlockMask] = {}
    layers = []
    for layer in range(config.num_layers):
        kind = config.layer(layer)
        cache = None if caches is None else caches[layer]
        key = (kind.window, kind.head_dim, None if cache is None else cache_kind(cache, layer))
        if key not in made:
            mask = pa.masks.causal() if kind.window is None else pa.masks.sliding_window(kind.window)
            if extra is not None:
                mask = mask & extra
            if cache is not None and cache.mask is not None:
                mask = mask & cache.mask
            held = positions if cache is None or reserved is None else cache.positions_with(reserved[layer])
            cut = sizes.of(mask, positions.shape[-1], held.shape[-1], kind.head_dim)
            made[key] = pa.BlockMask.from_mask(mask, positions, held, cut)
        layers.append(made[key])
    return tuple(layers)
