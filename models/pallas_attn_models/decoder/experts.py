"""A mixture of experts in place of the MLP: routing, and products with the chosen experts only."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from pallas_attn_models.decoder.activations import ACTIVATIONS
from pallas_attn_models.decoder.config import DecoderConfig, ExpertsConfig
from pallas_attn_models.decoder.layers import MLP, linear


class Experts(nnx.Module):
    """Sends every token to a few of many gated MLPs and adds their outputs up; see :class:`ExpertsConfig`."""

    def __init__(
        self,
        config: DecoderConfig,
        experts: ExpertsConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
    ) -> None:
        options = {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
        hidden, width, number = config.hidden_size, experts.intermediate_size, experts.num_experts
        self.config = experts
        self.activation = ACTIVATIONS[config.activation]
        self.router = linear(hidden, number, bias=experts.router_bias, **options)
        if experts.correction:
            self.correction = nnx.Param(jnp.zeros((number,), jnp.float32))
        biased = {"bias": experts.bias, **options}
        self.expert_gate = LinearPerExpert(number, hidden, width, **biased)
        self.expert_up = LinearPerExpert(number, hidden, width, **biased)
        self.expert_down = LinearPerExpert(number, width, hidden, **biased)
        mlp = {"activation": config.activation, "gated": True, "bias": False, **options}
        self.shared = None if experts.shared_size is None else MLP(hidden, experts.shared_size, **mlp)
        self.shared_gate = linear(hidden, 1, **options) if experts.shared_gate else None

    def __call__(self, x: Array) -> Array:
        """``[B, T, E] -> [B, T, E]``."""
        tokens = x.reshape(-1, x.shape[-1])
        with jax.named_scope("router"):
            weights, chosen = self._route(tokens)
        out = self._few(tokens, chosen) if chosen.size <= self.config.num_experts else self._many(tokens, chosen)
        out = jnp.einsum("mke,mk->me", out, weights, preferred_element_type=jnp.float32).astype(x.dtype)
        out = out.reshape(x.shape)
        if self.shared is None:
            return out
        shared = self.shared(x)
        return out + (shared if self.shared_gate is None else jax.nn.sigmoid(self.shared_gate(x)) * shared)

    def _route(self, tokens: Array) -> tuple[Array, Array]:
        """``[M, E]`` -> weights, float32 ``[M, k]``, and indices of the experts, int32 ``[M, k]``."""
        config = self.config
        logits = self.router(tokens).astype(jnp.float32)
        scores = jax.nn.softmax(logits, axis=-1) if config.score == "softmax" else jax.nn.sigmoid(logits)
        ranks = scores + self.correction[...][None] if config.correction else scores
        if config.num_groups > 1:
            ranks = _only_best_groups(ranks, config)
        _, chosen = jax.lax.top_k(ranks, config.experts_per_token)
        weights = jnp.take_along_axis(scores, chosen, axis=-1)
        if config.normalize:
            total = weights.sum(-1, keepdims=True)
            weights = weights / (total if config.score == "softmax" else total + 1e-20)
        return (weights * config.scale if config.scale != 1 else weights), chosen

    def _few(self, tokens: Array, chosen: Array) -> Array:
        """``[M, k, E]``: reads the weights of the chosen experts only, once per token."""
        repeated = jnp.broadcast_to(tokens[:, None], (*chosen.shape, tokens.shape[-1]))
        return self._mlp(repeated, lambda linear, x: linear.of_tokens(x, chosen))

    def _many(self, tokens: Array, chosen: Array) -> Array:
        """``[M, k, E]``: sorts the tokens by expert, so that each expert's weights are read once."""
        expert = chosen.reshape(-1)
        order = jnp.argsort(expert)
        sizes = jnp.bincount(expert, length=self.config.num_experts).astype(jnp.int32)
        gathered, expert = tokens[order // chosen.shape[-1]], expert[order]
        out = self._mlp(gathered, lambda linear, x: linear.of_groups(x, sizes, expert))
        return jnp.zeros_like(out).at[order].set(out, unique_indices=True).reshape(*chosen.shape, -1)

    def _mlp(self, x: Array, apply: Callable[["LinearPerExpert", Array], Array]) -> Array:
        gate, up = apply(self.expert_gate, x), apply(self.expert_up, x)
        if (clamp := self.config.clamp) is not None:
            gate, up = jnp.minimum(gate, clamp), jnp.clip(up, -clamp, clamp)
            return apply(self.expert_down, (up + 1) * gate * jax.nn.sigmoid(gate * self.config.alpha))
        return apply(self.expert_down, self.activation(gate) * up)


class LinearPerExpert(nnx.Module):
    """A linear map for each expert; kernels are ``[X, in, out]``, biases ``[X, out]``."""

    def __init__(
        self,
        number: int,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        rngs: nnx.Rngs,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
    ) -> None:
        initializer = nnx.initializers.normal(0.02)
        self.kernel = nnx.Param(initializer(rngs.params(), (number, in_features, out_features), param_dtype))
        self.bias = nnx.Param(jnp.zeros((number, out_features), param_dtype)) if bias else None
        self.dtype = dtype

    def of_tokens(self, x: Array, expert: Array) -> Array:
        """``[M, k, in] -> [M, k, out]`` for the experts ``[M, k]``."""
        out = jnp.einsum("mki,mkio->mko", x, self.kernel[...][expert].astype(self.dtype))
        return out if self.bias is None else out + self.bias[...][expert].astype(self.dtype)

    def of_groups(self, x: Array, sizes: Array, expert: Array) -> Array:
        """``[M, in] -> [M, out]`` for tokens sorted by expert: ``sizes`` ``[X]`` of each, ``expert`` ``[M]``."""
        out = jax.lax.ragged_dot(x, self.kernel[...].astype(self.dtype), sizes)
        return out if self.bias is None else out + self.bias[...][expert].astype(self.dtype)


def _only_best_groups(ranks: Array, config: ExpertsConfig) -> Array:
    """Experts outside the best groups rank below all others."""
    grouped = ranks.reshape(ranks.shape[0], config.num_groups, -1)
    best, _ = jax.lax.top_k(grouped, 1 if config.score == "softmax" else 2)
    _, groups = jax.lax.top_k(best.sum(-1), config.groups_per_token)
    kept = jax.nn.one_hot(groups, config.num_groups, dtype=jnp.bool_).any(1)
    return jnp.where(kept[..., None], grouped, -jnp.inf).reshape(ranks.shape)
