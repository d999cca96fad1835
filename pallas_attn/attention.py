"""``attention()``: validate, choose an implementation, run it."""

import functools
from collections.abc import Sequence
from types import ModuleType
from typing import Any, Literal, NamedTuple, overload

import jax
import jax.numpy as jnp
from jax import Array

from pallas_attn import checks, masks, pointwise, tuning
from pallas_attn import scores as score_algebra
from pallas_attn.block_mask import BlockMask
from pallas_attn.kernels import reference, triton, xla
from pallas_attn.kernels.batching import paged_forward
from pallas_attn.kernels.derivative import differentiable
from pallas_attn.kernels.spec import CallSpec
from pallas_attn.quantized import Kind, QuantizedArray
from pallas_attn.refusal import without_derivative
from pallas_attn.scores import Score, Scores

# Best first. Each module has `forward`, `backward` (the reference needs none: JAX differentiates it), `unavailable()`
# (why it cannot run on this machine) and `unsupported(spec)` (why it cannot serve a call).
_IMPLEMENTATIONS: dict[str, ModuleType] = {"triton": triton, "xla": xla, "reference": reference}
_DTYPES = ("float32", "bfloat16", "float16")
_LARGEST_SCALE = 2.0**127  # in base 2, as kernels compute, it is still a float32
_NO_GRADIENT = (
    "quantised keys and values have no gradient: give plain ones (QuantizedArray.dequantize()), or stop the gradient by"
    " jax.lax.stop_gradient"
)
_NO_GRADIENT_OF_KEY_WEIGHTS = (
    "key_weights have no gradient: stop it by jax.lax.stop_gradient, or compute them from query, key and lse"
)

Keys = Array | QuantizedArray


class _Extents(NamedTuple):
    """What an axis of a call holds, however keys are stored."""

    batch: int
    q_len: int
    kv_len: int
    q_heads: int
    kv_heads: int

    @staticmethod
    def of(query: Array, key: Keys, page_table: Array | None) -> "_Extents":
        (batch, q_len, q_heads, _), (_, length, kv_heads, _) = query.shape, key.shape
        pages = 1 if page_table is None else page_table.shape[1]
        return _Extents(batch, q_len, pages * length, q_heads, kv_heads)


class AttentionOutput(NamedTuple):
    """What :func:`attention` returns when more than the output is asked for; what was not asked for is None."""

    out: Array
    lse: Array | None = None
    key_weights: Array | None = None


def implementations() -> dict[str, str | None]:
    """Every implementation's name, best first, with None if it can run on this machine, else the reason in words."""
    return {name: module.unavailable() for name, module in _IMPLEMENTATIONS.items()}


@overload
def attention(
    query: Array,
    key: Keys,
    value: Keys,
    mask: masks.Mask | BlockMask | Array | None = ...,
    *,
    q_positions: Array | None = ...,
    kv_positions: Array | None = ...,
    scores: Score | Sequence[Score] | None = ...,
    sinks: Array | None = ...,
    scale: float | None = ...,
    page_table: Array | None = ...,
    return_lse: Literal[False] = ...,
    return_key_weights: Literal[False] = ...,
    implementation: str | None = ...,
    interpret: bool = ...,
    block_sizes: tuning.BlockSizes | None = ...,
) -> Array: ...


@overload
def attention(
    query: Array,
    key: Keys,
    value: Keys,
    mask: masks.Mask | BlockMask | Array | None = ...,
    *,
    q_positions: Array | None = ...,
    kv_positions: Array | None = ...,
    scores: Score | Sequence[Score] | None = ...,
    sinks: Array | None = ...,
    scale: float | None = ...,
    page_table: Array | None = ...,
    return_lse: Literal[True],
    return_key_weights: bool = ...,
    implementation: str | None = ...,
    interpret: bool = ...,
    block_sizes: tuning.BlockSizes | None = ...,
) -> AttentionOutput: ...


@overload
def attention(
    query: Array,
    key: Keys,
    value: Keys,
    mask: masks.Mask | BlockMask | Array | None = ...,
    *,
    q_positions: Array | None = ...,
    kv_positions: Array | None = ...,
    scores: Score | Sequence[Score] | None = ...,
    sinks: Array | None = ...,
    scale: float | None = ...,
    page_table: Array | None = ...,
    return_lse: bool = ...,
    return_key_weights: Literal[True],
    implementation: str | None = ...,
    interpret: bool = ...,
    block_sizes: tuning.BlockSizes | None = ...,
) -> AttentionOutput: ...


@overload
def attention(
    query: Array,
    key: Keys,
    value: Keys,
    mask: masks.Mask | BlockMask | Array | None = ...,
    *,
    q_positions: Array | None = ...,
    kv_positions: Array | None = ...,
    scores: Score | Sequence[Score] | None = ...,
    sinks: Array | None = ...,
    scale: float | None = ...,
    page_table: Array | None = ...,
    return_lse: bool = ...,
    return_key_weights: bool = ...,
    implementation: str | None = ...,
    interpret: bool = ...,
    block_sizes: tuning.BlockSizes | None = ...,
) -> Array | AttentionOutput: ...


def attention(
    query: Array,
    key: Keys,
    value: Keys,
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
        quantised keys or values, or of key weights; or a second derivative of another implementation than
        "reference".
    """
    flags = {"return_lse": return_lse, "return_key_weights": return_key_weights, "interpret": interpret}
    return_lse, return_key_weights, interpret = (checks.boolean(name, flag) for name, flag in flags.items())
    query, key, value = _check_arrays(query, key, value, page_table)
    page_table = _check_page_table(page_table, query, key)
    extents = _Extents.of(query, key, page_table)
    scale = _check_scale(scale, query.shape[-1])
    if isinstance(mask, BlockMask):
        _refuse_beside_block_mask(q_positions=q_positions, kv_positions=kv_positions, block_sizes=block_sizes)
        relation, block_sizes = mask.mask, mask.block_sizes
        q_positions, kv_positions, of = mask.q_positions, mask.kv_positions, "mask."
    else:
        relation, of = masks.with_keys(_as_mask(mask), extents.kv_len), ""
    _check_mask(relation, extents)
    heads = (1, extents.kv_heads)
    q_positions = _check_positions(f"{of}q_positions", q_positions, extents.batch, extents.q_len, heads=())
    kv_positions = _check_positions(f"{of}kv_positions", kv_positions, extents.batch, extents.kv_len, heads=heads)
    scores = _check_scores(score_algebra.traced(score_algebra.as_scores(scores)), extents)
    sinks = _check_sinks(sinks, query)
    page = None if page_table is None else key.shape[1]
    name, block_sizes = _choose(
        implementation, interpret, extents, query, key, value, relation, scores, page, return_key_weights, block_sizes
    )
    if isinstance(mask, BlockMask):
        block_mask = mask
    else:
        if page_table is not None:
            kv_positions = _positions_in_pages(kv_positions, page_table, key)
        block_mask = BlockMask.from_mask(
            relation,
            extents.q_len if q_positions is None else q_positions,
            extents.kv_len if kv_positions is None else kv_positions,
            block_sizes,
        )
    module = _IMPLEMENTATIONS[name]
    options: dict[str, Any] = {"scale": scale, "return_key_weights": return_key_weights}
    if interpret:
        options["interpret"] = True
    if isinstance(key, QuantizedArray) or isinstance(value, QuantizedArray):
        attend = without_derivative(paged_forward(functools.partial(module.forward, **options)), _NO_GRADIENT)
        out, lse, *rest = attend(page_table, query, key, value, block_mask, scores, sinks)
        results = out, lse.value, *rest
    elif name == "reference":
        forward = functools.partial(reference.forward, page_table=page_table, **options)
        out, lse, *rest = forward(query, key, value, block_mask, scores, sinks)
        results = out, lse.value, *rest
    else:
        results = differentiable(module, name, **options)(page_table, query, key, value, block_mask, scores, sinks)
    out, lse, *rest = results
    if not return_lse and not return_key_weights:
        return out
    refuse = without_derivative(lambda x: x, _NO_GRADIENT_OF_KEY_WEIGHTS)
    return AttentionOutput(out, lse if return_lse else None, *map(refuse, rest))


def _positions_in_pages(positions: Array | None, page_table: Array, key: Keys) -> Array:
    """Positions of keys: -1 where the pool has no such page."""
    pages, page = key.shape[:2]
    exists = jnp.repeat((page_table >= 0) & (page_table < pages), page, axis=1)  # [B, S]
    if positions is None:
        positions = jnp.arange(exists.shape[1], dtype=jnp.int32)[None]
    return jnp.where(exists if positions.ndim == 2 else exists[:, None], positions, -1)


def _choose(
    implementation, interpret, extents, query, key, value, mask, scores, page, key_weights, block_sizes
) -> tuple[str, tuning.BlockSizes]:
    """The implementation that serves the call, and its block sizes. Explains itself when there is none."""
    if not isinstance(implementation, str | None):
        wanted = f"one of {list(_IMPLEMENTATIONS)} or None"
        raise TypeError(f"implementation: expected {wanted}, got {checks.describe(implementation)}")
    if implementation is not None and implementation not in _IMPLEMENTATIONS:
        raise ValueError(f"implementation: expected one of {list(_IMPLEMENTATIONS)} or None, got {implementation!r}")
    if interpret and implementation not in (None, "triton"):
        raise ValueError(f"interpret: expected implementation='triton' or None with it, got {implementation!r}")
    if block_sizes is not None and not isinstance(block_sizes, tuning.BlockSizes):
        raise TypeError(f"block_sizes: expected pallas_attn.BlockSizes, got {checks.describe(block_sizes)}")
    names = ["triton"] if interpret else [implementation] if implementation else list(_IMPLEMENTATIONS)
    head_dim, value_dim = query.shape[-1], value.shape[-1]
    key_kind, value_kind = _kind(key), _kind(value)
    reasons = {}
    for name in names:
        module = _IMPLEMENTATIONS[name]
        sizes = block_sizes or tuning.default_block_sizes(
            extents.q_len,
            extents.kv_len,
            implementation=name,
            head_dim=max(head_dim, value_dim),
            dtype=query.dtype,
            fine=mask.has_fine_edges(),
        )
        spec = CallSpec(
            head_dim,
            value_dim,
            query.dtype,
            sizes,
            mask,
            scores,
            key_kind,
            value_kind,
            page,
            key_weights,
            max((x.values.size for x in (key, value) if isinstance(x, QuantizedArray)), default=0),
        )
        reasons[name] = (None if interpret else module.unavailable()) or module.unsupported(spec)
        if reasons[name] is None:
            return name, sizes
    why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise NotImplementedError(f"no implementation asked for can serve this call. {why}")


def _kind(x: Keys) -> Kind | None:
    return x.kind if isinstance(x, QuantizedArray) else None


def _refuse_beside_block_mask(**options) -> None:
    for name, option in options.items():
        if option is not None:
            raise ValueError(f"{name}: expected None beside a BlockMask, which carries its own, got a value")


def _check_arrays(query, key, value, page_table) -> tuple[Array, Keys, Keys]:
    query = checks.array("query", query)
    key, value = (_check_keys(name, x) for name, x in (("key", key), ("value", value)))
    for name, x in {"query": query, "key": key, "value": value}.items():
        if len(x.shape) != 4:
            axes = "(batch, tokens, heads, head size)"
            if page_table is not None and name != "query":
                axes = "(pages, tokens of a page, heads, head size)"
            raise ValueError(f"{name}: expected rank 4 {axes}, got shape {tuple(x.shape)}")
        if 0 in x.shape:
            raise ValueError(f"{name}: expected no empty axis, got shape {tuple(x.shape)}")
        if max(x.shape) > checks.LONGEST_AXIS:
            raise ValueError(f"{name}: expected no axis longer than 2^30, got shape {tuple(x.shape)}")
        if isinstance(x, QuantizedArray):
            continue
        if str(x.dtype) not in _DTYPES:
            raise ValueError(f"{name}: expected dtype {', '.join(_DTYPES)} (cast it by astype), got {x.dtype}")
        if x.dtype != query.dtype:
            raise ValueError(f"{name}: expected query's dtype {query.dtype}, got {x.dtype}")
    batch, _, q_heads, head_dim = query.shape
    rows = (batch, "S") if page_table is None else ("P", "page")
    if (page_table is None and key.shape[0] != batch) or key.shape[3] != head_dim:
        wanted = f"[{rows[0]}, {rows[1]}, K, {head_dim}] (query's {'B and ' if page_table is None else ''}D)"
        raise ValueError(f"key: expected shape {wanted}, got {tuple(key.shape)}")
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(f"value: expected shape {[*key.shape[:3], 'Dv']} (key's B, S and K), got {tuple(value.shape)}")
    if q_heads % key.shape[2]:
        raise ValueError(f"key: expected a number of heads K that divides query's N={q_heads}, got K={key.shape[2]}")
    return jax.tree.map(jnp.asarray, (query, key, value))


def _check_keys(name: str, x) -> Keys:
    if not isinstance(x, QuantizedArray):
        return checks.array(name, x, "an array or a QuantizedArray")
    x.check(name)
    return x


def _check_page_table(page_table: Array | None, query: Array, key: Keys) -> Array | None:
    if page_table is None:
        return None
    page_table = checks.array("page_table", page_table, "an int32 array")
    batch, page = query.shape[0], key.shape[1]
    shape = tuple(page_table.shape)
    if not checks.is_integer(page_table) or len(shape) != 2 or shape[0] != batch or shape[1] == 0:
        wanted = f"int32 [{batch}, S // {page}] (query's B, and the tokens of a page)"
        raise ValueError(f"page_table: expected {wanted}, got {page_table.dtype} {list(shape)}")
    if page % tuning.PAGE_MULTIPLE:
        raise ValueError(
            f"key: expected pages of a multiple of {tuning.PAGE_MULTIPLE} tokens, got shape {tuple(key.shape)}"
        )
    if shape[1] * page > checks.LONGEST_AXIS:
        raise ValueError(f"page_table: expected at most 2^30 keys in a row, got {shape[1]} pages of {page}")
    return checks.positions("page_table", page_table, ranks=(2,))


def _check_scale(scale: float | None, head_dim: int) -> float:
    if scale is None:
        return head_dim**-0.5
    return checks.number("scale", scale, most=_LARGEST_SCALE)


def _as_mask(mask) -> masks.Mask:
    if mask is None:
        return masks.full()
    if isinstance(mask, masks.Mask):
        return mask
    mask = checks.array("mask", mask, "a Mask, a BlockMask, None or a bool array")
    if mask.dtype != jnp.bool_ or mask.ndim != 4:
        raise ValueError(f"mask: expected bool [B|1, N|K|1, T, S], got {mask.dtype} {list(mask.shape)}")
    return masks.dense(mask)


def _check_mask(mask: masks.Mask, extents: _Extents) -> None:
    batch, q_len, kv_len, q_heads, kv_heads = extents
    sizes = ({1, batch}, {1, kv_heads, q_heads}, {1, q_len}, {1, kv_len})
    for x in masks.operands(mask):
        if any(size not in allowed for size, allowed in zip(x.shape, sizes, strict=True)):
            wanted = f"[{batch}|1, {q_heads}|{kv_heads}|1, {q_len}|1, {kv_len}|1]"
            raise ValueError(f"mask: expected operands of shape {wanted} (B, heads, T, S), got {tuple(x.shape)}")


def _check_scores(scores: Scores, extents: _Extents) -> Scores:
    sizes = (extents.batch, extents.q_heads, extents.q_len, extents.kv_len)
    for score in scores:
        for x in pointwise.operands(score):
            if any(size not in (1, extent) for size, extent in zip(x.shape, sizes, strict=True)):
                wanted = "[" + ", ".join(f"{extent}|1" for extent in sizes) + "]"
                name = f"scores: {type(score).__name__.lower()}"
                raise ValueError(f"{name}: expected an array of shape {wanted} (B, N, T, S), got {tuple(x.shape)}")
    return scores


def _check_sinks(sinks: Array | None, query: Array) -> Array | None:
    if sinks is None:
        return None
    sinks = checks.array("sinks", sinks)
    if not jnp.issubdtype(sinks.dtype, jnp.floating) or tuple(sinks.shape) != (query.shape[2],):
        raise ValueError(f"sinks: expected floating-point [{query.shape[2]}], got {sinks.dtype} {list(sinks.shape)}")
    return checks.floats("sinks", sinks)


def _check_positions(
    name: str, positions: Array | None, batch: int, length: int, heads: tuple[int, ...]
) -> Array | None:
    """Integers ``[B|1, length]``, or ``[B|1, heads, length]`` with one of the given numbers of heads, as int32."""
    if positions is None:
        return None
    positions = checks.positions(name, positions, ranks=(2, 3) if heads else (2,))
    fitting = {(rows, *head, length) for rows in (1, batch) for head in ((), *((h,) for h in heads))}
    if tuple(positions.shape) not in fitting:
        wanted = f"[{batch}|1, {length}]" + (f" or [{batch}|1, {max(heads)}|1, {length}]" if heads else "")
        raise ValueError(f"{name}: expected shape {wanted}, got {tuple(positions.shape)}")
    return positions
