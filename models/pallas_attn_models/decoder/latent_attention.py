"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1)."""

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from pallas_attn_models.decoder.attention import Attention
from pallas_attn_models.decoder.config import LatentConfig
from pallas_attn_models.decoder.layers import linear
from pallas_attn_models.decoder.norms import Norm
from pallas_attn_models.decoder.rope import RotaryTables, rotate

_EPSILON = 1e-6  # of the norms of latent vectors, whatever that of the others


class LatentAttention(Attention):
    """Attention whose queries, keys and values are projected through narrow vectors; see :class:`LatentConfig`."""

    def _init_projections(self, rngs: nnx.Rngs, dtype: DTypeLike, param_dtype: DTypeLike) -> None:
        config, heads, latent = self.config, self.layer.num_heads, self._latent
        dtypes = {"dtype": dtype, "param_dtype": param_dtype}
        options = {"rngs": rngs, **dtypes}
        hidden, queries = config.hidden_size, heads * self.layer.head_dim
        if latent.query_rank is None:
            self.query = linear(hidden, queries, **options)
        else:
            self.query_down = linear(hidden, latent.query_rank, bias=config.qkv_bias, **options)
            self.query_down_norm = Norm((latent.query_rank,), config.norm, _EPSILON, **dtypes)
            self.query = linear(latent.query_rank, queries, **options)
        narrow = latent.key_value_rank + latent.rope_dim
        self.key_value_down = linear(hidden, narrow, bias=config.qkv_bias, **options)
        self.key_value_down_norm = Norm((latent.key_value_rank,), config.norm, _EPSILON, **dtypes)
        wide = heads * (self.layer.head_dim - latent.rope_dim + latent.value_dim)
        self.key_value = linear(latent.key_value_rank, wide, **options)
        self.output = linear(heads * latent.value_dim, hidden, bias=config.output_bias, **options)

    @property
    def _latent(self) -> LatentConfig:
        assert self.config.latent is not None
        return self.config.latent

    def _heads(self, x: Array, rotary: RotaryTables | None) -> tuple[Array, Array, Array]:
        """Queries, keys, and values padded with zeros, all ``[B, T, N, D]``."""
        latent, (*batch, _) = self._latent, x.shape
        own = self.layer.head_dim - latent.rope_dim
        narrow = x if latent.query_rank is None else self.query_down_norm(self.query_down(x))
        query = self.query(narrow).reshape(*batch, self.layer.num_heads, -1)
        narrow, shared = jnp.split(self.key_value_down(x), [latent.key_value_rank], axis=-1)
        wide = self.key_value(self.key_value_down_norm(narrow)).reshape(*batch, self.layer.num_heads, -1)
        key, value = jnp.split(wide, [own], axis=-1)
        query_own, query_rotated = jnp.split(query, [own], axis=-1)
        shared = shared[:, :, None]
        if rotary is not None:
            query_rotated, shared = rotate(query_rotated, rotary), rotate(shared, rotary)
        query = jnp.concatenate([query_own, query_rotated], axis=-1)
        key = jnp.concatenate([key, jnp.broadcast_to(shared, (*key.shape[:-1], latent.rope_dim))], axis=-1)
        padding = [(0, 0)] * 3 + [(0, self.layer.head_dim - latent.value_dim)]
        return query, key, jnp.pad(value, padding)

    def _project(self, out: Array) -> Array:
        """``[B, T, N, D] -> [B, T, E]``, without the padding of values."""
        return super()._project(out[..., : self._latent.value_dim])
