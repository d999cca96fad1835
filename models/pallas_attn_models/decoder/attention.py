"""Self-attention of a decoder layer: projections, rotary embedding, cache, and a call of ``pallas_attn.attention``."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

import pallas_attn as pa
from pallas_attn_models.decoder.config import DecoderConfig
from pallas_attn_models.decoder.layers import linear, rotate


class Attention(nnx.Module):
    """Causal grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245)."""

    def __init__(
        self,
        config: DecoderConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        implementation: str | None,
    ) -> None:
        options = {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
        self.query = linear(config.hidden_size, config.num_heads * config.head_dim, **options)
        self.key = linear(config.hidden_size, config.num_kv_heads * config.head_dim, **options)
        self.value = linear(config.hidden_size, config.num_kv_heads * config.head_dim, **options)
        self.output = linear(config.num_heads * config.head_dim, config.hidden_size, **options)
        self.head_dim = config.head_dim
        self.implementation = implementation

    def __call__(
        self,
        x: Array,
        rotary: tuple[Array, Array],
        block_mask: pa.BlockMask,
        cache: pa.caches.KVCache | None,
        reservation: pa.caches.Reservation | None,
    ) -> tuple[Array, pa.caches.KVCache | None]:
        """Attends over these tokens or, with a cache, over its content after appending them.

        Args:
          x: ``[B, T, E]``, normalized.
          rotary: cosine and sine from :func:`~pallas_attn_models.decoder.layers.rotary_tables`.
          block_mask: queries x keys: ``[T, T]``, or ``[T, capacity]`` with a cache.
          cache: this layer's cache, without these tokens.
          reservation: with a cache, the slots for these tokens.

        Returns:
          ``[B, T, E]``, and the cache with these tokens.
        """
        query, key, value = (self._heads(projection(x)) for projection in (self.query, self.key, self.value))
        query, key = rotate(query, *rotary), rotate(key, *rotary)
        if cache is None or reservation is None:
            out = pa.attention(query, key, value, block_mask, implementation=self.implementation)
        else:
            with jax.named_scope("cache"):
                cache = cache.write(key, value, reservation)
            out, cache = self._attend(query, cache, block_mask, reservation.rows)
        return self.output(out.reshape(*out.shape[:2], -1)), cache

    def _attend(
        self, query: Array, cache: pa.caches.KVCache, block_mask: pa.BlockMask, rows: Array | None
    ) -> tuple[Array, pa.caches.KVCache]:
        """Attends over the cached tokens of these rows; passes the key weights to policies that observe them."""
        view, observes = cache.view(rows), cache.policy.observes
        out = pa.attention(
            query,
            view.key,
            view.value,
            block_mask,
            page_table=view.page_table,
            return_key_weights=observes,
            implementation=self.implementation,
        )
        if isinstance(out, pa.AttentionOutput):
            assert out.key_weights is not None
            return out.out, cache.observe(out.key_weights, rows)
        return out, cache

    def _heads(self, x: Array) -> Array:
        return jnp.reshape(x, (*x.shape[:2], -1, self.head_dim))
