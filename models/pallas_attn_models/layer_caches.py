"""The caches of a decoder, a policy and a storage for each layer."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from jax.typing import DTypeLike

import pallas_attn as pa
from pallas_attn.tuning import PAGE_MULTIPLE
from pallas_attn_models.config import DecoderConfig


def init_caches(
    config: DecoderConfig,
    *,
    batch_size: int,
    capacity: int | Sequence[int],
    policy: pa.caches.Policy | Sequence[pa.caches.Policy] | None = None,
    storage: pa.caches.Storage | Sequence[pa.caches.Storage] | None = None,
    dtype: DTypeLike,
    chunk: int | None = None,
) -> tuple[pa.caches.KVCache, ...]:
    """Empty caches, one per layer; see :meth:`pallas_attn_models.decoder.Decoder.init_caches`."""
    capacities = _per_layer(config, "capacity", capacity)
    policies = _per_layer(config, "policy", pa.caches.Dense() if policy is None else policy)
    storages = _per_layer(config, "storage", pa.caches.Plain() if storage is None else storage)
    layers = []
    for layer, (slots, kept, held) in enumerate(zip(capacities, policies, storages, strict=True)):
        window = config.sliding_window(layer)
        if chunk is not None and window is not None:
            slots, kept, held = _of_window(window, chunk, batch_size, slots, kept, held)
        cache = pa.caches.init(
            kept,
            held,
            batch_size=batch_size,
            capacity=slots,
            kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            dtype=dtype,
        )
        layers.append(cache)
    return tuple(layers)


def whole_pages(slots: int, page_size: int = PAGE_MULTIPLE) -> int:
    """``slots``, and those that fill the last page: some rows of a cache that is not paged are read as pages, too."""
    return -(-slots // page_size) * page_size


def _per_layer(config: DecoderConfig, name: str, value: Any) -> list:
    if not isinstance(value, Sequence):
        return [value] * config.num_layers
    if len(value) != config.num_layers:
        raise ValueError(f"{name}: expected one, or one per layer, {config.num_layers}, got {len(value)}")
    return list(value)


def _of_window(
    window: int, chunk: int, batch_size: int, capacity: int, policy: pa.caches.Policy, storage: pa.caches.Storage
) -> tuple[int, pa.caches.Policy, pa.caches.Storage]:
    """What a layer with a sliding window needs to take ``chunk`` tokens at once, if that is less than it was given."""
    page_size = storage.page_size if isinstance(storage, pa.caches.Paged) else PAGE_MULTIPLE
    slots = whole_pages(window + chunk - 1, page_size)
    if slots >= capacity:
        return capacity, policy, storage
    if isinstance(storage, pa.caches.Paged):
        storage = dataclasses.replace(storage, num_pages=min(storage.num_pages, batch_size * slots // page_size))
    return slots, pa.caches.Window(window), storage
