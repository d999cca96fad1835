"""Self-attention of a decoder layer: projections, rotary embedding, cache, and a call of ``pallas_attn.attention``."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

import pallas_attn as pa
from pallas_attn_models.decoder.config import DecoderConfig, LayerConfig
from pallas_attn_models.decoder.layers import linear
from pallas_attn_models.decoder.norms import Norm
from pallas_attn_models.decoder.rope import RotaryTables, rotate


class Attention(nnx.Module):
    """Causal grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245)."""

    def __init__(
        self,
        config: DecoderConfig,
        layer: LayerConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        implementation: str | None,
    ) -> None:
        self.config = config
        self.layer = layer
        self.implementation = implementation
        self._init_projections(rngs, dtype, param_dtype)
        if config.attention_sinks:
            self.sinks = nnx.Param(jnp.zeros((layer.num_heads,), param_dtype))

    def _init_projections(self, rngs: nnx.Rngs, dtype: DTypeLike, param_dtype: DTypeLike) -> None:
        config, layer = self.config, self.layer
        options = {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
        hidden = config.hidden_size
        queries, keys = layer.num_heads * layer.head_dim, layer.num_kv_heads * layer.head_dim
        self.query = linear(hidden, queries, bias=config.qkv_bias, **options)
        self.key = linear(hidden, keys, bias=config.qkv_bias, **options)
        self.value = linear(hidden, keys, bias=config.qkv_bias, **options)
        self.output = linear(queries, hidden, bias=config.output_bias, **options)
        self.query_norm = _qk_norm(config, layer, layer.num_heads, dtype, param_dtype)
        self.key_norm = _qk_norm(config, layer, layer.num_kv_heads, dtype, param_dtype)

    def __call__(
        self,
        x: Array,
        positions: Array,
        rotary: RotaryTables | None,
        block_mask: pa.BlockMask,
        cache: pa.caches.KVCache | None,
        reservation: pa.caches.Reservation | None,
    ) -> tuple[Array, pa.caches.KVCache | None]:
        """Attends over these tokens or, with a cache, over its content after appending them.

        Args:
          x: ``[B, T, E]``, normalized.
          positions: int32 ``[B|1, T]``, -1 for padding.
          rotary: from :func:`~pallas_attn_models.decoder.rope.rotary_tables`, or None for a layer without rotation.
          block_mask: queries x keys: ``[T, T]``, or ``[T, capacity]`` with a cache.
          cache: this layer's cache, without these tokens.
          reservation: with a cache, the slots for these tokens.

        Returns:
          ``[B, T, E]``, and the cache with these tokens.
        """
        query, key, value = self._heads(x, rotary)
        if self.config.query_temperature is not None:
            query = query * _temperature(positions, *self.config.query_temperature).astype(query.dtype)
        if cache is None or reservation is None:
            out = self._attend(query, key, value, block_mask)
        else:
            with jax.named_scope("cache"):
                cache = cache.write(key, value, reservation)
            out, cache = self._attend_cache(query, cache, block_mask, reservation.rows)
        return self._project(out), cache

    def _heads(self, x: Array, rotary: RotaryTables | None) -> tuple[Array, Array, Array]:
        """Queries ``[B, T, N, D]``, keys and values ``[B, T, K, D]``."""
        query, key, value = (projection(x) for projection in (self.query, self.key, self.value))
        if self.config.qk_norm == "vector":
            query, key = self._normalized(query, key)
        if (clip := self.config.qkv_clip) is not None:
            query, key, value = (jnp.clip(one, -clip, clip) for one in (query, key, value))
        query, key, value = (jnp.reshape(one, (*x.shape[:2], -1, self.layer.head_dim)) for one in (query, key, value))
        if self.config.qk_norm in ("head", "heads"):
            query, key = self._normalized(query, key)
        if rotary is not None:
            query, key = rotate(query, rotary), rotate(key, rotary)
        return query, key, value

    def _project(self, out: Array) -> Array:
        """``[B, T, N, D] -> [B, T, E]``."""
        return self.output(out.reshape(*out.shape[:2], -1))

    def _normalized(self, query: Array, key: Array) -> tuple[Array, Array]:
        assert self.query_norm is not None
        assert self.key_norm is not None
        return self.query_norm(query), self.key_norm(key)

    def _attend_cache(
        self, query: Array, cache: pa.caches.KVCache, block_mask: pa.BlockMask, rows: Array | None
    ) -> tuple[Array, pa.caches.KVCache]:
        """Attends over the cached tokens of these rows; passes the key weights to policies that observe them."""
        view, observes = cache.view(rows), cache.policy.observes
        out = self._attend(
            query, view.key, view.value, block_mask, page_table=view.page_table, return_key_weights=observes
        )
        if isinstance(out, pa.AttentionOutput):
            assert out.key_weights is not None
            return out.out, cache.observe(out.key_weights, rows)
        return out, cache

    def _attend(self, query: Array, key: Any, value: Any, block_mask: pa.BlockMask, **options: Any) -> Any:
        config, scores = self.config, []
        if config.attention_softcap is not None:
            scores.append(pa.scores.softcap(config.attention_softcap))
        if config.alibi is not None:
            scores.append(pa.scores.alibi(jnp.asarray(_alibi_slopes(self.layer.num_heads) * config.alibi, jnp.float32)))
        return pa.attention(
            query,
            key,
            value,
            block_mask,
            scores=scores or None,
            sinks=self.sinks[...] if config.attention_sinks else None,
            scale=self.layer.scale,
            implementation=self.implementation,
            **options,
        )


def _qk_norm(
    config: DecoderConfig, layer: LayerConfig, heads: int, dtype: DTypeLike, param_dtype: DTypeLike
) -> Norm | None:
    """The norm of queries or keys."""
    shapes = {"head": (layer.head_dim,), "heads": (heads, layer.head_dim), "vector": (heads * layer.head_dim,)}
    if config.qk_norm is None:
        return None
    kind = config.norm if config.qk_norm_kind is None else config.qk_norm_kind
    return Norm(shapes[config.qk_norm], kind, config.rms_norm_eps, dtype=dtype, param_dtype=param_dtype)


def _temperature(positions: Array, beta: float, length: int) -> Array:
    """float32 ``[B|1, T, 1, 1]``: the factor of the query at each position."""
    ratio = jnp.maximum(positions, 0) // length
    return 1 + jnp.float32(beta) * jnp.log1p(ratio.astype(jnp.float32))[..., None, None]


def _alibi_slopes(heads: int) -> np.ndarray:
    """The slope of each head (Press et al. 2021, arXiv:2108.12409, section 3), float64 ``[N]``.

    For N = 2**n, a geometric sequence from 2**(-8 / N); otherwise that of the next smaller power of two, then every
    other slope of the next larger one.
    """
    whole = 2 ** (heads.bit_length() - 1)
    slopes = 2.0 ** (-8 / whole * np.arange(1, whole + 1))
    between = 2.0 ** (-4 / whole * np.arange(1, 2 * (heads - whole), 2))
    return np.concatenate([slopes, between])
