"""Creates the caches of a decoder, with a policy and a storage per layer."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.typing import DTypeLike

import pallas_attn as pa
from pallas_attn.tuning import PAGE_MULTIPLE
from pallas_attn_models.checks import require_positive_int
from pallas_attn_models.decoder.config import DecoderConfig


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
    capacities = _per_layer(config, "capacity", capacity, int | np.integer, "an int")
    policies = _per_layer(
        config, "policy", pa.caches.Dense() if policy is None else policy, pa.caches.Policy, "a Policy"
    )
    storages = _per_layer(
        config, "storage", pa.caches.Plain() if storage is None else storage, pa.caches.Storage, "a Storage"
    )
    if chunk is not None:
        require_positive_int("chunk", chunk)
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
    """Rounds ``slots`` up to whole pages: a call with only some rows of a cache reads even an unpaged one as pages."""
    return -(-slots // page_size) * page_size


def _per_layer(config: DecoderConfig, name: str, value: Any, kind: Any, expected: str) -> list:
    values = [value] * config.num_layers
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        values = list(value)
    for one in values:
        if not isinstance(one, kind) or isinstance(one, bool):
            raise TypeError(f"{name}: expected {expected}, or one per layer, got {type(one).__name__}")
    if len(values) != config.num_layers:
        raise ValueError(f"{name}: expected one, or one per layer, {config.num_layers}, got {len(values)}")
    return values


def _of_window(
    window: int, chunk: int, batch_size: int, capacity: int, policy: pa.caches.Policy, storage: pa.caches.Storage
) -> tuple[int, pa.caches.Policy, pa.caches.Storage]:
    """Reduces a sliding-window layer to the slots it needs for calls of ``chunk`` tokens, if that saves any."""
    page_size = storage.page_size if isinstance(storage, pa.caches.Paged) else PAGE_MULTIPLE
    slots = whole_pages(window + chunk - 1, page_size)
    if slots >= capacity:
        return capacity, policy, storage
    if isinstance(storage, pa.caches.Paged):
        storage = dataclasses.replace(storage, num_pages=min(storage.num_pages, batch_size * slots // page_size))
    return slots, pa.caches.Window(window), storage
