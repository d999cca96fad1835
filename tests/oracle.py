"""The oracle: an independent implementation from the definitions, in NumPy and float64.

A mask is described as data (``causal() & ~sliding_window(3, 0)``): the oracle evaluates it on positions, and
:meth:`Mask.build` makes the library's mask of the same name. Attention is a loop over queries that reads only the
visible keys from the arrays. Gradients are the formulas of the chain rule over whole [T, S] matrices; finite
differences of that loop check them.

A score is data too (``softcap(3.0)``): a function of the logit, and of one element of its array for each pair of a
query and a key.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

EMPTY, PARTIAL, FULL = 0, 1, 2
BUCKETS = 6


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class Mask:
    """The name of a primitive or of an operator (``and``, ``or``, ``not``), and its arguments."""

    kind: str
    args: tuple = ()

    def __and__(self, other: "Mask") -> "Mask":
        return Mask("and", (self, other))

    def __or__(self, other: "Mask") -> "Mask":
        return Mask("or", (self, other))

    def __invert__(self) -> "Mask":
        return Mask("not", (self,))

    def __repr__(self) -> str:
        args = [f"array{list(x.shape)}" if isinstance(x, np.ndarray) else repr(x) for x in self.args]
        return f"{self.kind}({', '.join(args)})"

    def build(self, masks: Any) -> Any:
        """The library's mask; ``masks`` is ``pallas_attn.masks``."""
        match self.kind, self.args:
            case "and", (a, b):
                return a.build(masks) & b.build(masks)
            case "or", (a, b):
                return a.build(masks) | b.build(masks)
            case "not", (a,):
                return ~a.build(masks)
        return getattr(masks, self.kind)(*self.args)

    def allowed(self, q: np.ndarray, k: np.ndarray) -> np.ndarray:
        """Bool ``[B, heads, T, S]``, the shape of the positions ``q`` and ``k``."""
        match self.kind, self.args:
            case "and", (a, b):
                return np.logical_and(a.allowed(q, k), b.allowed(q, k))
            case "or", (a, b):
                return np.logical_or(a.allowed(q, k), b.allowed(q, k))
            case "not", (a,):
                return np.logical_not(a.allowed(q, k))
            case "full", ():
                return np.full(q.shape, True)
            case "causal", ():
                return q >= k
            case "sliding_window", (left, right):
                return np.isin(k - q, np.arange(1 - left, right + 1))
            case "prefix", (lengths,):
                return k < lengths.reshape(-1, 1, 1, 1)
            case "sink", (n,):
                return np.isin(k, np.arange(n))
            case "chunked", (size,):
                return np.floor(q / size) == np.floor(k / size)
            case "segments", (q_ids, kv_ids):
                return np.broadcast_to(q_ids[:, None, :, None] == kv_ids[:, None, None, :], q.shape)
            case "dense", (array,):
                heads = q.shape[1] // array.shape[1]
                return np.broadcast_to(np.concatenate([array[:, [m // heads]] for m in range(q.shape[1])], 1), q.shape)
        raise ValueError(f"no such mask: {self}")


def full() -> Mask:
    return Mask("full")


def causal() -> Mask:
    return Mask("causal")


def sliding_window(left: int, right: int = 0) -> Mask:
    return Mask("sliding_window", (left, right))


def prefix(lengths: np.ndarray) -> Mask:
    return Mask("prefix", (np.asarray(lengths),))


def sink(n: int) -> Mask:
    return Mask("sink", (n,))


def chunked(size: int) -> Mask:
    return Mask("chunked", (size,))


def segments(q_ids: np.ndarray, kv_ids: np.ndarray) -> Mask:
    return Mask("segments", (np.asarray(q_ids), np.asarray(kv_ids)))


def dense(array: np.ndarray) -> Mask:
    return Mask("dense", (np.asarray(array),))


def positions(length: int, start: int = 0, left: int = 0, right: int = 0) -> np.ndarray:
    """``start, start + 1, ...`` with some padding on either side, int32 ``[length]``."""
    row = np.arange(start, start + length, dtype=np.int32) - left
    row[:left] = -1
    row[length - right :] = -1
    return row


def visible(mask: Mask, q_positions: np.ndarray, kv_positions: np.ndarray, batch: int, heads: int) -> np.ndarray:
    """The visible pairs, padding included: bool ``[B, heads, T, S]``.

    Args:
      q_positions: ints ``[B|1, T]``; a negative one is padding.
      kv_positions: ints ``[B|1, S]`` or ``[B|1, K|1, S]``; a negative one is an empty slot.
    """
    if kv_positions.ndim == 2:
        kv_positions = kv_positions[:, None]
    shape = (batch, heads, q_positions.shape[-1], kv_positions.shape[-1])
    q = np.broadcast_to(q_positions[:, None, :, None], shape)
    k = np.broadcast_to(np.repeat(kv_positions, heads // kv_positions.shape[1], 1)[:, :, None, :], shape)
    return mask.allowed(q, k) & (q >= 0) & (k >= 0)


class Pairs(NamedTuple):
    """Pairs of a query and a key: their indices along [B, N, T, S], and their positions. All of one shape."""

    b: np.ndarray
    n: np.ndarray
    t: np.ndarray
    s: np.ndarray
    q: np.ndarray
    k: np.ndarray

    @staticmethod
    def of(batch: int, heads: int, q_positions: np.ndarray, kv_positions: np.ndarray) -> "Pairs":
        """All pairs, ``[B, N, T, S]``; positions are as in :func:`visible`."""
        if kv_positions.ndim == 2:
            kv_positions = kv_positions[:, None]
        shape = (batch, heads, q_positions.shape[-1], kv_positions.shape[-1])
        kv_positions = np.repeat(kv_positions, heads // kv_positions.shape[1], 1)[:, :, None, :]
        q, k = (np.broadcast_to(x.astype(np.int64), shape) for x in (q_positions[:, None, :, None], kv_positions))
        return Pairs(*np.indices(shape), q, k)

    def at(self, index: Any) -> "Pairs":
        return Pairs(*(x[index] for x in self))


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class Score:
    """The name of a score, and a number (``softcap``) or a differentiable array (all others)."""

    kind: str
    argument: Any

    def __repr__(self) -> str:
        is_array = isinstance(self.argument, np.ndarray)
        return f"{self.kind}({f'array{list(self.argument.shape)}' if is_array else self.argument})"

    @property
    def has_array(self) -> bool:
        return self.kind != "softcap"

    @property
    def is_custom(self) -> bool:
        return self.kind in _CUSTOM

    def build(self, scores: Any, array: Any = None) -> Any:
        """The library's score; ``scores`` is ``pallas_attn.scores``. ``array`` may replace the argument."""
        argument = self.argument if array is None else array
        if self.is_custom:
            return scores.custom(_CUSTOM[self.kind], {"array": argument})
        return getattr(scores, self.kind)(argument)

    def element(self, pairs: Pairs) -> np.ndarray:
        """The index into the flat array that each pair reads."""
        match self.kind:
            case "bias":
                at = [pairs.b, pairs.n, pairs.t, pairs.s]
            case "buckets":
                at = [pairs.n, np.minimum(np.abs(pairs.q - pairs.k), BUCKETS - 1)]
            case "saturated":
                return np.zeros_like(pairs.n)
            case _:
                at = [pairs.n]
        at = tuple(i * (size > 1) for i, size in zip(at, self.argument.shape, strict=True))
        return np.ravel_multi_index(at, self.argument.shape)

    def _read(self, x: np.ndarray, pairs: Pairs) -> np.ndarray:
        return self.argument.reshape(-1)[self.element(pairs)].astype(x.dtype)

    def apply(self, x: np.ndarray, pairs: Pairs) -> np.ndarray:
        """The changed logits, in the dtype of ``x``."""
        if self.kind == "softcap":
            return self.argument * np.tanh(x / x.dtype.type(self.argument))
        element = self._read(x, pairs)
        match self.kind:
            case "alibi":
                return x - element * np.abs(pairs.q - pairs.k).astype(x.dtype)
            case "bias" | "buckets":
                return x + element
            case "factor":
                return x * element
            case "saturated":
                return element * x / (1 + np.abs(x))
        raise ValueError(f"no such score: {self}")

    def slope(self, x: np.ndarray, pairs: Pairs) -> np.ndarray:
        """The derivative by the logit."""
        match self.kind:
            case "softcap":
                return 1 - np.tanh(x / x.dtype.type(self.argument)) ** 2
            case "factor":
                return self._read(x, pairs)
            case "saturated":
                return self._read(x, pairs) / (1 + np.abs(x)) ** 2
        return np.ones_like(x)

    def slope_summed(self, slope: np.ndarray) -> np.ndarray:
        """The sum of the magnitudes of the slope's terms: softcap's ``1 - tanh^2`` cancels where it is flat."""
        return 2 - slope if self.kind == "softcap" else np.abs(slope)

    def slope_of_element(self, x: np.ndarray, pairs: Pairs) -> np.ndarray:
        """The derivative by the element that the pair reads."""
        match self.kind:
            case "alibi":
                return -np.abs(pairs.q - pairs.k).astype(x.dtype)
            case "factor":
                return x
            case "saturated":
                return x / (1 + np.abs(x))
        return np.ones_like(x)


def softcap(cap: float) -> Score:
    return Score("softcap", cap)


def alibi(slopes: np.ndarray) -> Score:
    return Score("alibi", np.asarray(slopes))


def bias(array: np.ndarray) -> Score:
    return Score("bias", np.asarray(array))


def factor(array: np.ndarray) -> Score:
    """``logit * array[head]``: a number per head."""
    return Score("factor", np.asarray(array))


def buckets(array: np.ndarray) -> Score:
    """``logit + array[head, distance]``, as T5's table; larger distances share the last of ``BUCKETS``."""
    return Score("buckets", np.asarray(array))


def saturated(array: np.ndarray) -> Score:
    """``array * logit / (1 + |logit|)``: one number."""
    return Score("saturated", np.asarray(array))


# As a user writes them: with operators alone, so that they need no library.
_CUSTOM = {
    "factor": lambda logit, q, k, head, params: logit * params["array"][head],
    "buckets": lambda logit, q, k, head, params: logit + params["array"][head, abs(q - k).clip(0, BUCKETS - 1)],
    "saturated": lambda logit, q, k, head, params: params["array"] * logit / (1 + abs(logit)),
}


class Gradients(NamedTuple):
    """Gradients of all differentiable arguments; ``scores`` has an array for every score with one.

    ``summed`` has, for query, key, value and each of these arrays, the largest sum over an element's terms of their
    magnitudes: terms may cancel, but their rounding errors do not.
    """

    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    scores: list[np.ndarray]
    sinks: np.ndarray | None
    summed: list[float]


def attention(
    query: np.ndarray,
    key: np.ndarray,
    value: np.ndarray,
    visible: np.ndarray,
    scale: float,
    scores: Sequence[Score] = (),
    sinks: np.ndarray | None = None,
    pairs: Pairs | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """``out [B, T, N, Dv]`` and ``lse [B, N, T]`` in float64; a query that sees nothing gets 0 and -inf.

    With sinks ``[N]``, a valid query sees at least its head's sink, which has no value; ``pairs`` has the positions.
    """
    batch, q_len, q_heads, _ = query.shape
    group = q_heads // key.shape[2]
    out = np.zeros((batch, q_len, q_heads, value.shape[-1]))
    lse = np.full((batch, q_heads, q_len), -np.inf)
    for b, n, t in np.ndindex(batch, q_heads, q_len):
        seen = visible[b, n, t]
        has_sink = sinks is not None and pairs.q[b, n, t, 0] >= 0
        if not seen.any() and not has_sink:
            continue
        logits = scale * key[b, seen, n // group].astype(np.float64) @ query[b, t, n].astype(np.float64)
        for score in scores:
            logits = score.apply(logits, pairs.at((b, n, t, seen)))
        sink = [float(sinks[n])] if has_sink else []
        peak = max([*logits, *sink])
        weights = np.exp(logits - peak)
        total = weights.sum() + sum(np.exp(x - peak) for x in sink)
        out[b, t, n] = weights @ value[b, seen, n // group].astype(np.float64) / total
        lse[b, n, t] = peak + np.log(total)
    return out, lse


def key_weights(
    query: np.ndarray,
    key: np.ndarray,
    visible: np.ndarray,
    scale: float,
    lse: np.ndarray,
    scores: Sequence[Score] = (),
    pairs: Pairs | None = None,
) -> np.ndarray:
    """Each key's probabilities, summed over queries and averaged over the heads of its group: ``[B, K, S]``.

    ``lse`` is that of :func:`attention`, including sinks.
    """
    batch, kv_len, kv_heads, _ = key.shape
    group = query.shape[2] // kv_heads
    total = np.zeros((batch, kv_heads, kv_len))
    for b, n, t, s in np.argwhere(visible):
        logit = np.array(scale * (key[b, s, n // group].astype(np.float64) @ query[b, t, n].astype(np.float64)))
        for score in scores:
            logit = score.apply(logit, pairs.at((b, n, t, s)))
        total[b, n // group, s] += np.exp(logit - lse[b, n, t]) / group
    return total


def dequantize(quantized: Any) -> np.ndarray:
    """The exact values of a quantized array: products of 8 and 24 bits."""
    values, scales = np.asarray(quantized.values), np.asarray(quantized.scales).astype(np.float64)
    if values.dtype == np.uint8:
        columns = np.concatenate([values % 16, values // 16], -1).astype(np.int64)
        values = np.where(columns > 7, columns - 16, columns)
        scales = np.repeat(scales, values.shape[-1] // scales.shape[-1], -1)
    else:
        scales = scales[..., None]
    return values.astype(np.float64) * scales


def gather(pool: np.ndarray, page_table: np.ndarray) -> np.ndarray:
    """``[P, page, ...]`` to ``[B, S, ...]``; NaN for out-of-range pages."""
    nothing = np.full_like(pool[0], np.nan)
    rows = [[pool[page] if 0 <= page < len(pool) else nothing for page in row] for row in page_table]
    return np.stack([np.concatenate(row) for row in rows])


class _Forward(NamedTuple):
    """Whole matrices by query head, ``[B, N, T|S, D]`` and ``[B, N, T, S]``; 0 outside the visible pairs."""

    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    logits: list[np.ndarray]  # before each score, and after the last
    peak: np.ndarray
    total: np.ndarray
    weights: np.ndarray
    sink_weights: np.ndarray


def _forward(query, key, value, visible, scale, scores, sinks, pairs, dtype) -> _Forward:
    group = query.shape[2] // key.shape[2]
    zero = dtype(0)
    query = np.where(visible.any(3)[..., None], query.swapaxes(1, 2).astype(dtype), zero)
    key, value = (
        np.where(visible.any(2)[..., None], np.repeat(x.swapaxes(1, 2).astype(dtype), group, 1), zero)
        for x in (key, value)
    )
    logits = [np.matmul(query, key.swapaxes(2, 3)) * dtype(scale)]
    for score in scores:
        # Arrays of scores may hold NaN in masked pairs.
        logits.append(np.where(visible, score.apply(logits[-1], pairs), zero).astype(dtype))
    real = np.zeros(query.shape[:3], bool) if pairs is None else pairs.q[..., 0] >= 0
    none = dtype(-1e30)
    sink = np.where(real, none if sinks is None else sinks.astype(dtype)[None, :, None], none)[..., None]
    peak = np.maximum(np.where(visible, logits[-1], none).max(-1, keepdims=True), sink)
    weights = np.where(visible, np.exp(np.where(visible, logits[-1], none) - peak), zero)
    sink_weights = np.where(sink == none, zero, np.exp(sink - peak))
    total = weights.sum(-1, keepdims=True) + sink_weights
    return _Forward(query, key, value, logits, peak, total, weights, sink_weights)


def plain_attention(
    query: np.ndarray,
    key: np.ndarray,
    value: np.ndarray,
    visible: np.ndarray,
    scale: float,
    scores: Sequence[Score] = (),
    sinks: np.ndarray | None = None,
    pairs: Pairs | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The usual attention in the inputs' dtype: the yardstick of rounding errors.

    Products of that dtype are summed in float32, the softmax is float32, and its probabilities are rounded to the dtype
    before the product with the values.
    """
    dtype = query.dtype
    f = _forward(query, key, value, visible, scale, scores, sinks, pairs, np.float32)
    seen = f.total > 0
    probabilities = (f.weights / np.where(seen, f.total, 1)).astype(dtype).astype(np.float32)
    out = np.matmul(probabilities, f.value).swapaxes(1, 2).astype(dtype)
    with np.errstate(divide="ignore"):
        lse = np.where(seen, f.peak + np.log(f.total), -np.inf)[..., 0]
    return out.astype(np.float64), lse.astype(np.float64)


def gradients(
    query: np.ndarray,
    key: np.ndarray,
    value: np.ndarray,
    visible: np.ndarray,
    scale: float,
    d_out: np.ndarray,
    d_lse: np.ndarray,
    scores: Sequence[Score] = (),
    sinks: np.ndarray | None = None,
    pairs: Pairs | None = None,
    *,
    plain: bool = False,
    from_output: bool = False,
) -> Gradients:
    """Gradients of ``sum(out * d_out) + sum(lse * d_lse)``, float64; with ``plain`` in the inputs' dtype.

    Softmax: ``dp = d_out v'``, ``ds = p (dp - sum_j p_j dp_j + d_lse)``, where a sink is a key without a value. The
    chain rule then goes through the scores from last to first. With ``from_output`` the sum is ``d_out . out``, which
    differs by the rounding of ``out``.
    """
    dtype = np.float32 if plain else np.float64

    def rounded(x: np.ndarray) -> np.ndarray:
        return x.astype(query.dtype).astype(dtype) if plain else x

    f = _forward(query, key, value, visible, scale, scores, sinks, pairs, dtype)
    seen = f.total > 0
    total = np.where(seen, f.total, 1)
    p, p_sink = f.weights / total, f.sink_weights / total
    d_out = np.where(seen, rounded(d_out.astype(dtype)).swapaxes(1, 2), dtype(0))
    d_lse = np.where(seen, d_lse.astype(dtype)[..., None], dtype(0))
    d_p = rounded(np.matmul(d_out, f.value.swapaxes(2, 3)))
    summands = d_out * rounded(np.matmul(rounded(p), f.value)) if from_output else p * d_p
    mean = summands.sum(-1, keepdims=True)
    d_logits = p * (d_p - mean + d_lse)
    d_sinks = None if sinks is None else (p_sink * (d_lse - mean)).sum((0, 2, 3))
    size = p * (np.abs(d_p) + np.abs(mean) + np.abs(d_lse))
    d_arrays, summed = [], []
    for score, before in zip(reversed(scores), reversed(f.logits[:-1]), strict=True):
        if score.has_array:
            slope = score.slope_of_element(before, pairs)
            for sums, each in ((d_arrays, d_logits * slope), (summed, size * np.abs(slope))):
                d_array = np.zeros(score.argument.size, dtype)
                np.add.at(d_array, score.element(pairs)[visible], each[visible])
                sums.insert(0, d_array.reshape(score.argument.shape))
        slope = score.slope(before, pairs)
        d_logits = np.where(visible, d_logits * slope, dtype(0))
        size = np.where(visible, size * score.slope_summed(slope), dtype(0))
    d_logits = rounded(d_logits)
    kv_heads = key.shape[2]

    def of_group(x: np.ndarray) -> np.ndarray:
        return x.reshape(x.shape[0], kv_heads, -1, *x.shape[2:]).sum(2).swapaxes(1, 2)

    terms = np.matmul(size, np.abs(f.key)), np.matmul(size.swapaxes(2, 3), np.abs(f.query))
    terms = *(abs(scale) * x for x in terms), np.matmul(p.swapaxes(2, 3), np.abs(d_out))
    summed = [float(x.max()) for x in (*terms, *summed)]
    d_query = np.matmul(d_logits, f.key).swapaxes(1, 2) * dtype(scale)
    d_key = of_group(np.matmul(d_logits.swapaxes(2, 3), f.query)) * dtype(scale)
    d_value = of_group(np.matmul(rounded(p).swapaxes(2, 3), d_out))
    return Gradients(*(rounded(x) for x in (d_query, d_key, d_value)), d_arrays, d_sinks, summed)


def block_classes(
    visible: np.ndarray, q_positions: np.ndarray, kv_positions: np.ndarray, q_block: int, kv_block: int
) -> np.ndarray:
    """The class of every block, ``[B, heads, nq, nk]``, from all pairs of ``visible`` ``[B, heads, T, S]``.

    A block is empty if no pair in it is visible. It is full if no slot is out of bounds and every valid query sees
    every key; kernels may then skip the mask.
    """
    batch, heads, q_len, kv_len = visible.shape
    q_real = np.broadcast_to(q_positions >= 0, (batch, q_len))
    classes = np.zeros((batch, heads, -(-q_len // q_block), -(-kv_len // kv_block)), np.uint8)
    for b, h, i, j in np.ndindex(classes.shape):
        rows = slice(i * q_block, (i + 1) * q_block)
        block = visible[b, h, rows, j * kv_block : (j + 1) * kv_block]
        if block.any():
            whole = block.shape[1] == kv_block and block[q_real[b, rows]].all()
            classes[b, h, i, j] = FULL if whole else PARTIAL
    return classes


def lists(classes: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[list[int]]]:
    """``num_full``, ``num_active`` (of the shape of classes' leading axes) and, flat, each row's blocks in order."""
    num_full, num_active = (classes == FULL).sum(-1), (classes != EMPTY).sum(-1)
    rows = classes.reshape(-1, classes.shape[-1])
    return num_full, num_active, [[*np.flatnonzero(r == FULL), *np.flatnonzero(r == PARTIAL)] for r in rows]
