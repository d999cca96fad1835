"""Custom masks and scores as users write them, and attention from its definition with such functions."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

B, T, S, N, K, D = 2, 19, 37, 4, 2, 16
BUCKETS = 17


class Closed(NamedTuple):
    """Arrays that the functions close over."""

    number: Array  # float32 []
    slopes: Array  # float32 [N]
    table: Array  # float32 [N, BUCKETS]
    short: Array  # bfloat16 [N, BUCKETS]
    of_rows: Array  # float32 [B]
    of_keys: Array  # float32 [S]
    buckets: Array  # int32 [S]
    documents: Array  # int32 [S]
    pages: Array  # int8 [S, 3]
    flags: Array  # bool [S]


def closed(seed: int = 0) -> Closed:
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> Array:
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    return Closed(
        normal(),
        *(normal(N), normal(N, BUCKETS), normal(N, BUCKETS).astype(jnp.bfloat16)),
        *(normal(B), normal(S)),
        jnp.asarray(rng.integers(0, BUCKETS, S), jnp.int32),
        jnp.asarray(np.sort(rng.integers(0, 4, S)), jnp.int32),
        jnp.asarray(rng.integers(0, 2, (S, 3)), jnp.int8),
        jnp.asarray(rng.integers(0, 2, S), jnp.bool_),
    )


def split(c: Closed) -> tuple[Closed, Closed]:
    """The arrays with gradients, and the others, each with None in the other's place."""
    is_float = [jnp.issubdtype(x.dtype, jnp.floating) for x in c]
    floats, rest = ([x if y == wanted else None for x, y in zip(c, is_float, strict=True)] for wanted in (True, False))
    return Closed(*floats), Closed(*rest)


def join(floats: Closed, rest: Closed) -> Closed:
    return Closed(*(y if x is None else x for x, y in zip(floats, rest, strict=True)))


class Layer:
    """A module whose method reads its own arrays."""

    def __init__(self, c: Closed):
        self.slopes = c.slopes

    def change(self, s, q, k, h, p):
        return s * self.slopes[h]


def nested(c: Closed):
    def inner(h):
        return c.slopes[h]

    return lambda s, q, k, h, p: s + inner(h) * c.number


def first_of_two(x, y, s, q, k, h, p):
    return s * x[h] + y


def unpacked(s, factor, bias):
    return s * factor + bias


def f32(x) -> np.float32:
    return np.float32(x)


# From the arrays to a function of (logit, q_position, kv_position, head, params).
SCORES = {
    "a slope per head": lambda c: lambda s, q, k, h, p: s * c.slopes[h],
    "a number": lambda c: lambda s, q, k, h, p: s * c.number,
    "alibi": lambda c: lambda s, q, k, h, p: s - c.slopes[h] * jnp.abs(q - k).astype(jnp.float32),
    "relative positions": lambda c: lambda s, q, k, h, p: s + c.table[h, jnp.clip(q - k + 8, 0, 16)],
    "an index out of bounds": lambda c: lambda s, q, k, h, p: s + c.table[h, q - k + 5],
    "a row, then an entry": lambda c: lambda s, q, k, h, p: s + c.table[h][c.buckets[k]],
    "a column, then an entry": lambda c: lambda s, q, k, h, p: s + c.table[:, c.buckets[k]][h],
    "transposed": lambda c: lambda s, q, k, h, p: s + c.table.T[c.buckets[k], h],
    "reshaped": lambda c: lambda s, q, k, h, p: s + c.table.reshape(2, -1)[h // 2, c.buckets[k]],
    "a row reshaped": lambda c: lambda s, q, k, h, p: s + c.table[h, :16].reshape(4, 4)[q % 4, k % 4],
    "a part of a row": lambda c: lambda s, q, k, h, p: s + c.table[h, 2::3][k % 5],
    "a row turned": lambda c: lambda s, q, k, h, p: s + c.table[h][::-1][c.buckets[k]],
    "rows joined": lambda c: lambda s, q, k, h, p: s + jnp.concatenate([c.table[h], c.of_keys])[k],
    "indices joined": lambda c: lambda s, q, k, h, p: s + c.table[tuple(jnp.stack([h, c.buckets[k]]))],
    "a row unpacked": lambda c: lambda s, q, k, h, p: unpacked(s, *c.table.reshape(-1, 2)[h]),
    "a row split": lambda c: lambda s, q, k, h, p: s + jnp.split(c.of_keys[:36].reshape(9, 4)[h], 2)[1][k % 2],
    "take": lambda c: lambda s, q, k, h, p: s + jnp.take(c.slopes, h),
    "take along an axis": lambda c: lambda s, q, k, h, p: s + jnp.take(c.table, k % BUCKETS, axis=1)[h],
    "take, wrapped": lambda c: lambda s, q, k, h, p: s + jnp.take(c.of_keys, q - k, mode="wrap"),
    "take, clipped": lambda c: lambda s, q, k, h, p: s + jnp.take(c.of_keys, q - k, mode="clip"),
    "get with a fill value": lambda c: (
        lambda s, q, k, h, p: s + c.of_keys.at[q + k - 9].get(mode="fill", fill_value=0.25, wrap_negative_indices=False)
    ),
    "dynamic slice": lambda c: lambda s, q, k, h, p: s + lax.dynamic_slice(c.table, (h, k - 3), (1, 2))[0, 1],
    "dynamic update": lambda c: (
        lambda s, q, k, h, p: s + lax.dynamic_update_slice(c.of_keys, c.slopes[h][None], (k,))[(q + k) % S]
    ),
    "a choice of numbers": lambda c: lambda s, q, k, h, p: jnp.where(c.flags[k], s * c.slopes[h], s + c.number),
    "a choice of rows": lambda c: lambda s, q, k, h, p: s + jnp.where(h > 1, c.table[h], c.table[0])[c.buckets[k]],
    "cond": lambda c: lambda s, q, k, h, p: lax.cond(q > k + 3, lambda x: x * c.slopes[h], lambda x: x - 1, s),
    "switch": lambda c: (
        lambda s, q, k, h, p: lax.switch(h, [lambda x: x, lambda x: x * c.number, lambda x: x + c.of_keys[k]], s)
    ),
    "a short loop": lambda c: (
        lambda s, q, k, h, p: lax.fori_loop(0, 3, lambda i, x: x * f32(0.5) + c.table[h, (i + k) % BUCKETS], s)
    ),
    "a dot product of rows": lambda c: lambda s, q, k, h, p: s + jnp.dot(c.table[h], c.table[(q + k) % N]),
    "a sum of a row": lambda c: lambda s, q, k, h, p: s + c.table[h].sum(),
    "the largest of a row": lambda c: lambda s, q, k, h, p: s + c.table[h, :5].max(),
    "a sum of all": lambda c: lambda s, q, k, h, p: s * c.table.sum() / c.table.size,
    "softmax of all": lambda c: lambda s, q, k, h, p: s + jax.nn.softmax(c.table)[h, c.buckets[k]],
    "sorted": lambda c: lambda s, q, k, h, p: s + jnp.sort(c.of_keys)[k],
    "bfloat16": lambda c: lambda s, q, k, h, p: s + c.short[h, c.buckets[k]].astype(jnp.float32),
    "its result in bfloat16": lambda c: lambda s, q, k, h, p: (s * c.slopes[h]).astype(jnp.bfloat16),
    "relu": lambda c: lambda s, q, k, h, p: jax.nn.relu(s) - c.slopes[h] * jax.nn.softplus(s),
    "remainders": lambda c: lambda s, q, k, h, p: s + c.slopes[(q - k) % N] * f32(0.5) + c.slopes[k // 16],
    "positions alone": lambda c: lambda s, q, k, h, p: (k - q).astype(jnp.float32) / 8,
    "a constant": lambda c: lambda s, q, k, h, p: c.number,
    "a plain number": lambda c: lambda s, q, k, h, p: 0.5,
    "nested": nested,
    "partial": lambda c: functools.partial(first_of_two, c.slopes, c.number),
    "a method": lambda c: Layer(c).change,
    "jitted": lambda c: jax.jit(lambda s, q, k, h, p: s * c.slopes[h]),
    "vmapped": lambda c: lambda s, q, k, h, p: s + jax.vmap(lambda x: x[k % BUCKETS])(c.table)[h],
    "the row of the batch": lambda c: lambda s, q, k, h, p, batch: s * c.of_rows[batch],
    "the row, by keyword": lambda c: lambda s, q, k, h, p, *, batch: s + c.of_rows[batch] * c.slopes[h],
    "tanh": lambda c: lambda s, q, k, h, p: c.number * jnp.tanh(s / (c.number + 2)),
}
# From the arrays to a function of (q_position, kv_position).
MASKS = {
    "documents": lambda c: lambda q, k: c.documents[q] == c.documents[k],
    "documents and causal": lambda c: lambda q, k: (k <= q) & (c.documents[q] == c.documents[k]),
    "take": lambda c: lambda q, k: jnp.take(c.documents, q) == jnp.take(c.documents, k),
    "flags": lambda c: lambda q, k: c.flags[k] | (q == k),
    "rows compared": lambda c: lambda q, k: (c.pages[q] == c.pages[k]).any(),
    "a threshold": lambda c: lambda q, k: c.of_keys[k] > c.number,
    "searchsorted": lambda c: (
        lambda q, k: jnp.searchsorted(c.documents, q // 9) == jnp.searchsorted(c.documents, k // 9)
    ),
    "ends counted": lambda c: lambda q, k: (jnp.sort(c.buckets)[::5] < q).sum() == (jnp.sort(c.buckets)[::5] < k).sum(),
    "True": lambda c: lambda q, k: True,
}


def normal(name: str, *shape: int) -> Array:
    """Normal numbers, seeded by the name."""
    return jnp.asarray(np.random.default_rng(list(name.encode())).standard_normal(shape), jnp.float32)


def pairs(function, *axes: Array) -> Array:
    """Applies a function of scalars to all combinations of the entries of vectors."""
    for axis in reversed(range(len(axes))):
        function = jax.vmap(function, [0 if n == axis else None for n in range(len(axes))])
    return function(*axes)


def attention(query: Array, key: Array, value: Array, score, visible, q_positions: Array) -> Array:
    """Attention from the definition, with ``score(logit, q, k, head, batch)`` and ``visible(q, k)`` of scalars."""
    key, value = (jnp.repeat(x, N // K, axis=2) for x in (key, value))
    logits = jnp.einsum("btnd,bsnd->bnts", query, key, precision="highest") * f32(D**-0.5)
    keys = jnp.arange(S, dtype=jnp.int32)

    def logit(b, n, t, s):
        return jnp.float32(score(logits[b, n, t, s], q_positions[t], keys[s], n, b))

    logits = pairs(logit, *(jnp.arange(size, dtype=jnp.int32) for size in logits.shape))
    seen = pairs(visible, q_positions, keys)[None, None]
    weights = jnp.where(seen, jax.nn.softmax(jnp.where(seen, logits, -jnp.inf), axis=-1, where=seen), 0.0)
    return jnp.einsum("bnts,bsnd->btnd", weights, value, precision="highest")
