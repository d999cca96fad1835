"""The caches of a decoder, with a policy and a storage per layer; and the same as one pytree without repetition."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
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
        kind = config.layer(layer)
        if chunk is not None and kind.window is not None:
            slots, kept, held = _of_window(kind.window, chunk, batch_size, slots, kept, held)
        cache = pa.caches.init(
            kept,
            held,
            batch_size=batch_size,
            capacity=slots,
            kv_heads=kind.num_kv_heads,
            head_dim=kind.head_dim,
            dtype=dtype,
        )
        layers.append(cache)
    return tuple(layers)


@jax.tree_util.register_pytree_node_class
class LayerCaches:
    """The caches of all layers, of one model or several.

    Layers of one model with the same kind of cache (:func:`cache_kind`) hold the same tokens in the same slots. As a
    pytree, this class holds the index of these layers once: positions, lengths, overflow and page table. So a step
    updates it once, and a loop does not carry copies of it. Every method of the caches must be called for all layers
    alike.

    Args:
      models: for each model, one cache per layer.
    """

    def __init__(self, *models: Sequence[pa.caches.KVCache]) -> None:
        self._caches = tuple(cache for caches in models for cache in caches)
        kinds = [
            (model, *cache_kind(c, layer)) for model, caches in enumerate(models) for layer, c in enumerate(caches)
        ]
        self._first = tuple(map(kinds.index, kinds))

    def __iter__(self) -> Iterator[pa.caches.KVCache]:
        return iter(self._caches)

    def __len__(self) -> int:
        return len(self._caches)

    def __getitem__(self, layer: Any) -> Any:
        return self._caches[layer]

    @property
    def distinct(self) -> tuple[pa.caches.KVCache, ...]:
        """A cache of each kind, with the index of its layers."""
        return tuple(self._caches[layer] for layer in sorted(set(self._first)))

    def map(self, function: Callable[..., Any], *others: "LayerCaches") -> "LayerCaches":
        """Calls the function with every cache, and those of ``others`` for the same layer."""
        return self._with(tuple(map(function, self._caches, *others)))

    def replaced(self, layers: slice, caches: Sequence[pa.caches.KVCache]) -> "LayerCaches":
        """The same with other caches of these layers, all of a model."""
        own = [*self._caches]
        own[layers] = caches
        return self._with(tuple(own))

    def _with(self, caches: tuple[pa.caches.KVCache, ...]) -> "LayerCaches":
        after = object.__new__(LayerCaches)
        after._caches, after._first = caches, self._first
        return after

    def tree_flatten(self) -> tuple[tuple[pa.caches.KVCache, ...], tuple[int, ...]]:
        """The caches, of which only the first of each kind has an index."""
        nothing: Any = dict.fromkeys(_INDEX)
        caches = tuple(
            cache if layer == first else dataclasses.replace(cache, **nothing)
            for layer, (cache, first) in enumerate(zip(self._caches, self._first, strict=True))
        )
        return caches, self._first

    @classmethod
    def tree_unflatten(cls, first: tuple[int, ...], caches: tuple[pa.caches.KVCache, ...]) -> "LayerCaches":
        """Gives every cache the index of the first of its kind."""
        after = object.__new__(cls)
        after._first = first
        after._caches = tuple(
            dataclasses.replace(cache, **{name: getattr(caches[leader], name) for name in _INDEX})
            for cache, leader in zip(caches, first, strict=True)
        )
        return after


_INDEX = ("positions", "lengths", "overflowed", "pages")


def cache_kind(cache: pa.caches.KVCache, layer: int) -> tuple:
    """A key that is equal for the caches of a model with the same tokens in the same slots."""
    return cache.policy, cache.storage, cache.capacity, layer if cache.policy.per_head else None


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
