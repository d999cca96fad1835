""":func:`pallas_attn.attention` as the ``attention_fn`` of Flax's attention modules, NNX and linen.

This module does not import Flax: the signature of the returned function lists the arguments that Flax's modules pass.
NNX passes every keyword it knows. Linen passes only keywords named in the signature, so it would silently drop a
missing one.
"""

import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import DTypeLike

from pallas_attn import checks, masks, tuning
from pallas_attn import scores as score_algebra
from pallas_attn.attention import attention
from pallas_attn.scores import Score


def attention_fn(
    mask: masks.Mask | Array | None = None,
    *,
    scores: Score | Sequence[Score] | None = None,
    sinks: Array | None = None,
    scale: float | None = None,
    implementation: str | None = None,
    interpret: bool = False,
    block_sizes: tuning.BlockSizes | None = None,
) -> Callable[..., Array]:
    """Returns an ``attention_fn=`` for ``nnx.MultiHeadAttention`` and linen's ``MultiHeadDotProductAttention``.

    It supports training, prefill and decoding, and does not repeat grouped K/V heads. Make it once and share it: it is
    static to NNX, so each new function compiles again.

    Positions are indices in the sequence: query ``t`` is at ``t``, key ``s`` at ``s``. Flax decodes one token at a
    time, with the whole cache as keys and a mask of the filled slots. So a *single* query with a mask is placed at the
    last key that the mask allows in any row of the batch. Keys that a mask ``[B|1, N|1, 1, S]`` hides from every head,
    such as empty slots, are treated as padding: their contents never reach the output.

    Two things differ from Flax's own function. A query that sees no key gets 0, not the mean of all values. And in
    decoding, ``is_causal`` allows every filled slot, where some versions of Flax attend to key 0 alone (google/flax,
    issue 5591).

    Args:
      mask: combined (``&``) with the mask of each call: a mask, or a bool array ``[B|1, N|K|1, T, S]`` or ``[T, S]``.
        Several batch axes count as one. A :class:`~pallas_attn.BlockMask` raises, because it is bound to the positions
        of one call; pass its ``mask``.
      scores, sinks, scale, implementation, interpret, block_sizes: as in :func:`pallas_attn.attention`.

    Returns:
      a function of query ``[..., T, N, D]``, key ``[..., S, K, D]``, value ``[..., S, K, Dv]`` and Flax's options that
      returns ``[..., T, N, Dv]``. It raises NotImplementedError, naming the option, if it does not support one: active
      dropout, sown attention weights, replaced products (einsums), and unknown options.

    Raises:
      TypeError: ``mask`` or ``scores`` is of the wrong kind, or an option of ``attention`` does not apply here.
    """
    own_mask = _as_mask(mask)
    own_scores = score_algebra.as_scores(scores)
    options: dict[str, Any] = {"sinks": sinks, "scale": scale, "block_sizes": block_sizes}
    options |= {"implementation": implementation, "interpret": interpret}

    def attend(
        query: Array,
        key: Array,
        value: Array,
        bias: Array | None = None,
        mask: Array | None = None,
        broadcast_dropout: bool = True,  # ignored: dropout is off
        dropout_rng: Array | None = None,  # ignored too
        dropout_rate: float = 0.0,
        deterministic: bool = False,
        dtype: DTypeLike | None = None,
        precision: Any = None,
        module: Any = None,
        force_fp32_for_softmax: bool = False,  # the softmax is always float32
        einsum_dot_general: Callable | None = None,
        qk_attn_weights_einsum: Callable | None = None,
        attn_weights_value_einsum: Callable | None = None,
        is_causal: bool = False,
        **unknown: Any,
    ) -> Array:
        _refuse("pallas_attn does not know this option", **unknown)
        is_causal = checks.boolean("is_causal", is_causal)
        if not 0 <= checks.number("dropout_rate", dropout_rate) <= 1:
            raise ValueError(f"dropout_rate: expected a number from 0 to 1, got {dropout_rate}")
        if dropout_rate > 0 and not checks.boolean("deterministic", deterministic):
            why = "dropout of attention probabilities is not supported; pass deterministic=True or dropout_rate=0"
            _refuse(why, dropout_rate=dropout_rate)
        _refuse("attention weights are never in memory, so they cannot be sown (sow_weights=True)", module=module)
        _refuse(
            "the kernels compute their own products",
            einsum_dot_general=einsum_dot_general,
            qk_attn_weights_einsum=qk_attn_weights_einsum,
            attn_weights_value_einsum=attn_weights_value_einsum,
        )
        _check_precision(precision)
        query, key, value = (_check_tokens(*x) for x in (("query", query), ("key", key), ("value", value)))
        dtype = jnp.result_type(query, key, value) if dtype is None else checks.float_dtype("dtype", dtype)
        *batch, q_len, q_heads, _ = query.shape
        extents = (*batch, q_heads, q_len, key.shape[-3])
        _check_batch(query, key, value)
        query, key, value = (x.astype(dtype).reshape(math.prod(batch), *x.shape[-3:]) for x in (query, key, value))

        relations = [own_mask] if own_mask is not None else []
        if is_causal:
            relations.append(masks.causal())
        q_positions = kv_positions = None
        if mask is not None:
            mask = _four_axes("mask", _as_bools(mask), extents)
            one_row, one_head = mask.shape[2] == 1, mask.shape[1] == 1
            if one_row:
                # Masked keys become empty slots, without a T x S array.
                slots = jnp.arange(extents[-1], dtype=jnp.int32)[None]
                kv_positions = jnp.where(mask.any(axis=(1, 2)), slots, -1)
                if q_len == 1:
                    # Flax's cache has one index for all rows, so a mask may hide a row's own newest slot.
                    q_positions = kv_positions.max(keepdims=True)
            if not (one_row and one_head):
                relations.append(masks.dense(mask))
        before = () if bias is None else (score_algebra.bias(_four_axes("bias", checks.array("bias", bias), extents)),)

        out = attention(
            query,
            key,
            value,
            functools.reduce(operator.and_, relations) if relations else None,
            q_positions=q_positions,
            kv_positions=kv_positions,
            scores=(*before, *own_scores),
            **options,
        )
        return out.reshape(*batch, *out.shape[1:])

    return attend


def _as_mask(mask: Any) -> masks.Mask | None:
    if mask is None or isinstance(mask, masks.Mask):
        return mask
    mask = checks.array("mask", mask, "a pallas_attn.masks.Mask, None or a bool array")
    if mask.dtype != jnp.bool_ or mask.ndim not in (2, 4):
        raise ValueError(f"mask: expected bool [B|1, N|K|1, T, S] or [T, S], got {checks.describe(mask)}")
    return masks.dense(mask)


def _as_bools(mask: Any) -> Array:
    """Converts a mask to bool; Flax's masks are often float32."""
    mask = checks.array("mask", mask)
    if mask.dtype != jnp.bool_ and not checks.is_integer(mask) and not jnp.issubdtype(mask.dtype, jnp.floating):
        raise ValueError(f"mask: expected bools or real numbers, got {checks.describe(mask)}")
    return jnp.asarray(mask.astype(np.bool_))


def _refuse(why: str, **options: Any) -> None:
    for name, option in options.items():
        if option is not None:
            raise NotImplementedError(f"attention_fn: {name}: {why}")


def _check_precision(precision: Any) -> None:
    """Accepts any ``lax.Precision``: products of float32 use the highest, those of shorter floats are exact.

    A named dot algorithm raises, since the kernels would have to follow it exactly.
    """
    for one in precision if isinstance(precision, tuple) else (precision,):
        try:
            known = isinstance(one, lax.Precision | str | None) and lax.Precision(one)
        except ValueError:
            known = False
        if not known:
            _refuse(f"expected a jax.lax.Precision, got {checks.describe(one)}", precision=one)


def _check_tokens(name: str, x: Array) -> Array:
    x = checks.array(name, x)
    if x.ndim < 3 or 0 in x.shape or not jnp.issubdtype(x.dtype, jnp.floating):
        wanted = "floating-point [..., tokens, heads, head size] without an empty axis"
        raise ValueError(f"{name}: expected {wanted}, got {checks.describe(x)}")
    return checks.floats(name, x)


def _check_batch(query: Array, key: Array, value: Array) -> None:
    for name, x in {"key": key, "value": value}.items():
        if x.ndim != query.ndim or x.shape[:-3] != query.shape[:-3]:
            raise ValueError(f"{name}: expected the batch axes of query, {[*query.shape[:-3]]}, got {[*x.shape[:-3]]}")


def _four_axes(name: str, x: Array, extents: tuple[int, ...]) -> Array:
    """``[B|1, N|1, T|1, S|1]`` from an array that broadcasts to ``[batch..., N, T, S]``, as Flax's masks do."""
    shape = (1,) * (len(extents) - x.ndim) + x.shape
    if len(shape) != len(extents) or any(size not in (1, extent) for size, extent in zip(shape, extents, strict=True)):
        wanted = f"a shape that broadcasts to {list(extents)} (batch, N, T, S)"
        raise ValueError(f"{name}: expected {wanted}, got {list(x.shape)}")
    *batch, heads, queries, keys = shape
    x = x.reshape(shape)
    if math.prod(batch) > 1:
        batch = extents[:-3]
        x = jnp.broadcast_to(x, (*batch, heads, queries, keys))
    return x.reshape(math.prod(batch), heads, queries, keys)
