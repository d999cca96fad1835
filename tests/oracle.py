"""What the library must compute, written a second time from the definitions: NumPy, float64, no code in common.

A mask is described as data (``causal() & ~sliding_window(3, 0)``): it is evaluated here, on positions, and
:meth:`Mask.build` makes the library's mask of the same name. Attention is a loop over queries that takes the visible
keys out of the arrays, so that nothing else in them is ever touched.
"""

import dataclasses
from typing import Any

import numpy as np

EMPTY, PARTIAL, FULL = 0, 1, 2


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
        """The library's own; ``masks`` is ``pallas_attn.masks``."""
        match self.kind, self.args:
            case "and", (a, b):
                return a.build(masks) & b.build(masks)
            case "or", (a, b):
                return a.build(masks) | b.build(masks)
            case "not", (a,):
                return ~a.build(masks)
        return getattr(masks, self.kind)(*self.args)

    def allowed(self, q: np.ndarray, k: np.ndarray) -> np.ndarray:
        """Bool ``[B, heads, T, S]``; the positions ``q`` and ``k`` have that shape too."""
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
    """Who sees whom, padding included: bool ``[B, heads, T, S]``.

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


def attention(
    query: np.ndarray, key: np.ndarray, value: np.ndarray, visible: np.ndarray, scale: float
) -> tuple[np.ndarray, np.ndarray]:
    """``out [B, T, N, Dv]`` and ``lse [B, N, T]`` in float64; a query that sees nothing gets 0 and -inf."""
    batch, q_len, q_heads, _ = query.shape
    group = q_heads // key.shape[2]
    out = np.zeros((batch, q_len, q_heads, value.shape[-1]))
    lse = np.full((batch, q_heads, q_len), -np.inf)
    for b, n, t in np.ndindex(batch, q_heads, q_len):
        seen = visible[b, n, t]
        if not seen.any():
            continue
        logits = scale * key[b, seen, n // group].astype(np.float64) @ query[b, t, n].astype(np.float64)
        weights = np.exp(logits - logits.max())
        out[b, t, n] = weights @ value[b, seen, n // group].astype(np.float64) / weights.sum()
        lse[b, n, t] = logits.max() + np.log(weights.sum())
    return out, lse


def plain_attention(
    query: np.ndarray, key: np.ndarray, value: np.ndarray, visible: np.ndarray, scale: float
) -> tuple[np.ndarray, np.ndarray]:
    """Attention as one writes it in the inputs' own dtype: the yardstick of rounding errors.

    Products of that dtype are summed in float32, the softmax is float32, and its probabilities are rounded to the dtype
    before they meet the values.
    """
    dtype, group = query.dtype, query.shape[2] // key.shape[2]
    zero = np.float32(0)  # for what nobody sees, which may be NaN
    query = np.where(visible.any(3).swapaxes(1, 2)[..., None], query.astype(np.float32), zero)
    used = visible.any(2).swapaxes(1, 2)[..., None]
    key, value = (np.where(used, np.repeat(x.astype(np.float32), group, 2), zero) for x in (key, value))
    logits = np.matmul(query.transpose(0, 2, 1, 3), key.transpose(0, 2, 3, 1)) * np.float32(scale)
    logits = np.where(visible, logits, np.float32(-1e30))
    peak = logits.max(-1, keepdims=True)
    weights = np.where(visible, np.exp(logits - peak), np.float32(0))
    total = weights.sum(-1, keepdims=True)
    seen = total > 0
    probabilities = (weights / np.where(seen, total, 1)).astype(dtype).astype(np.float32)
    out = np.matmul(probabilities, value.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3).astype(dtype)
    with np.errstate(divide="ignore"):
        lse = np.where(seen, peak + np.log(total), -np.inf)[..., 0]
    return out.astype(np.float64), lse.astype(np.float64)


def block_classes(
    visible: np.ndarray, q_positions: np.ndarray, kv_positions: np.ndarray, q_block: int, kv_block: int
) -> np.ndarray:
    """The class of every block, ``[B, heads, nq, nk]``, by looking at every pair.

    A block is empty if no pair in it is visible. It is full if every slot of it exists and every real query sees every
    key; a kernel may then forget the mask. ``visible`` is ``[B, heads, T, S]``.
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
