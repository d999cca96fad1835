"""``attention()``: check the arguments, choose an implementation, run it."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypedDict, Unpack, overload

from jax import Array

from pallas_attn import arguments, checks, dispatch, masks, tuning
from pallas_attn.block_mask import BlockMask
from pallas_attn.quantized import KVArray
from pallas_attn.refusal import without_derivative
from pallas_attn.scores import Score

_NO_GRADIENT_OF_KEY_WEIGHTS = (
    "key_weights have no gradient: stop it by jax.lax.stop_gradient, or compute them from query, key and lse"
)


class AttentionOutput(NamedTuple):
    """What :func:`attention` returns with ``return_lse`` or ``return_key_weights``, or both; absent fields are None."""

    out: Array
    lse: Array | None = None
    key_weights: Array | None = None


class _Options(TypedDict, total=False):
    """The keywords of :func:`attention` that do not change the type of its result."""

    q_positions: Array | None
    kv_positions: Array | None
    scores: Score | Sequence[Score] | None
    sinks: Array | None
    scale: float | None
    page_table: Array | None
    implementation: str | None
    interpret: bool
    block_sizes: tuning.BlockSizes | None


_AnyMask = masks.Mask | BlockMask | Array | None


@overload
def attention(
    query: Array,
    key: KVArray,
    value: KVArray,
    mask: _AnyMask = ...,
    *,
    return_lse: Literal[False] = ...,
    return_key_weights: Literal[False] = ...,
    **options: Unpack[_Options],
) -> Array: ...


@overload
def attention(
    query: Array,
    key: KVArray,
    value: KVArray,
    mask: _AnyMask = ...,
    *,
    return_lse: Literal[True],
    return_key_weights: bool = ...,
    **options: Unpack[_Options],
) -> AttentionOutput: ...


@overload
def attention(
    query: Array,
    key: KVArray,
    value: KVArray,
    mask: _AnyMask = ...,
    *,
    return_lse: bool = ...,
    return_key_weights: Literal[True],
    **options: Unpack[_Options],
) -> AttentionOutput: ...


@overload
def attention(
    query: Array,
    key: KVArray,
    value: KVArray,
    mask: _AnyMask = ...,
    *,
    return_lse: bool = ...,
    return_key_weights: bool = ...,
    **options: Unpack[_Options],
) -> Array | AttentionOutput: ...


def attention(
    query: Array,
    key: KVArray,
    value: KVArray,
    mask: masks.Mask | BlockMask | Array | None = None,
    *,
    q_positions: Array | None = None,
    kv_positions: Array | None = None,
    scores: Score | Sequence[Score] | None = None,
    sinks: Array | None = None,
    scale: float | None = None,
    page_table: Array | None = None,
    return_lse: bool = False,
    return_key_weights: bool = False,
    implementation: str | None = None,
    interpret: bool = False,
    block_sizes: tuning.BlockSizes | None = None,
) -> Array | AttentionOutput:
    """Scaled dot-product attention (arXiv:1706.03762, eq. 1) that reads only the KV blocks its mask leaves alive.

    B batch, T queries, S keys, N query heads, K KV heads (query head n reads KV head ``n // (N // K)``), D head size.

    Args:
      query: ``[B, T, N, D]``, float32, bfloat16 or float16.
      key: ``[B, S, K, D]``, of query's dtype or a :class:`QuantizedArray`; with a page table the pool
        ``[P, page, K, D]``.
      value: ``[B, S, K, Dv]``, of query's dtype or a :class:`QuantizedArray`, not always of key's kind; with a page
        table the pool ``[P, page, K, Dv]``.
      mask: a mask, a :class:`BlockMask` (built once for many calls; it carries the positions), a bool array
        ``[B|1, N|K|1, T, S]``, or None for every real key.
      q_positions: int32 ``[B|1, T]``, -1 is padding; default ``arange(T)``. Other integers become int32: those that it
        cannot hold are refused where their values are known, and count as padding where they are being traced. To align
        queries with the last keys (``causal()`` at the bottom right), shift the side that is shorter:
        ``q_positions = arange(T) + S - T``. With T > S that would be negative, and so padding, for the first queries:
        give ``kv_positions = arange(S) + T - S`` then.
      kv_positions: int32 ``[B|1, S]`` or ``[B|1, K|1, S]``, -1 is an empty slot; default ``arange(S)``. Whatever bits
        an empty slot holds, they do not reach the output.
      scale: factor of the logits, a number that float32 holds; default ``D ** -0.5``.
      return_lse: also return the natural logarithm of the sum of exponentials, float32 ``[B, N, T]``.
      implementation: "triton", "xla" or "reference"; default: the best that can serve the call.
      interpret: run the Triton kernels in Pallas' interpreter, on any machine.
      block_sizes: default from the tuning table.
      scores: what changes scaled logits (:mod:`pallas_attn.scores`), one or several in order. Gradients reach their
        arrays.
      sinks: floating-point ``[N]``: a logit more per head, which takes probability and gives no value (gpt-oss,
        arXiv:2508.10925). Gradients reach it.
      page_table: int32 ``[B, S // page]``: key ``s`` of row ``b`` lies in page ``page_table[b, s // page]`` of the
        pools, at ``s % page`` (PagedAttention, arXiv:2309.06180). Rows may share pages; page is a multiple of 16. Where
        the pool has no such page, as at -1, the keys count as empty slots; a BlockMask must have position -1 there
        itself, and nothing outside of the pool is read if it has not. Gradients reach the pools; for them, the pages
        of every row are copied.
      return_key_weights: also return how much probability each key got, float32 ``[B, K, S]``: the sum over real
        queries of the mean over the query heads of its group (what H2O, arXiv:2306.14048, ranks keys by). It has no
        gradient. With more than a few queries it costs a second pass over the keys.

    Rows of the batch do not reach each other, whatever they hold. Within a row, a value that is NaN or infinite also
    reaches queries that do not see it, if they visit its block: a probability of 0 times NaN is NaN, as in every
    attention that masks logits. So it may get from one packed document to another. An empty slot reaches nothing.

    Returns:
      ``[B, T, N, Dv]`` in query's dtype, or :class:`AttentionOutput`. A padded query, and one that sees no key, gets
      output 0 and lse -inf (a query that sees no key but has a sink: lse is the sink).

    Raises:
      ValueError: an argument that does not fit the others, before anything is compiled.
      TypeError: the wrong kind of object; forward-mode differentiation (``jax.jvp``) of another implementation than
        "reference", in JAX's own words.
      NotImplementedError: the named implementation cannot serve the call, with the reason; a derivative with
        quantized keys or values, or of key weights; or a second derivative of another implementation than
        "reference".
    """
    flags = {"return_lse": return_lse, "return_key_weights": return_key_weights, "interpret": interpret}
    return_lse, return_key_weights, interpret = (checks.boolean(name, flag) for name, flag in flags.items())
    checked = arguments.check(
        query,
        key,
        value,
        mask,
        q_positions=q_positions,
        kv_positions=kv_positions,
        scores=scores,
        sinks=sinks,
        scale=scale,
        page_table=page_table,
        block_sizes=block_sizes,
    )
    name, block_sizes = dispatch.choose(
        checked, implementation, interpret=interpret, key_weights=return_key_weights, block_sizes=block_sizes
    )
    options: dict[str, Any] = {"interpret": True} if interpret else {}
    out, lse, *key_weights = dispatch.run(
        name, checked.call(block_sizes), scale=checked.scale, return_key_weights=return_key_weights, **options
    )
    if not return_lse and not return_key_weights:
        return out
    refuse = without_derivative(lambda x: x, _NO_GRADIENT_OF_KEY_WEIGHTS)
    return AttentionOutput(out, lse if return_lse else None, *map(refuse, key_weights))
