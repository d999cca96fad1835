"""Functions of one query and one key on tiles of pairs, against the functions themselves pair by pair."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_attn as pa
from tests import idioms, tolerances
from tests.idioms import B, N, S, T

# Positions as kernels see them, padding included.
Q = jnp.concatenate([jnp.full(2, -1, jnp.int32), jnp.arange(T - 2, dtype=jnp.int32)])
KV = jnp.concatenate([jnp.arange(S - 3, dtype=jnp.int32), jnp.full(3, -1, jnp.int32)])
HEADS, ROWS = jnp.arange(N, dtype=jnp.int32), jnp.arange(B, dtype=jnp.int32)
TILES = Q[:, None], KV[None], HEADS[:, None, None], ROWS[:, None, None, None]


def close(actual, expected):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        limit = tolerances.gradient_limit(0, max(np.abs(b).max(), 1), a.dtype)
        np.testing.assert_allclose(np.float64(a), np.float64(b), rtol=0, atol=limit)


def of_pairs(function, logits):
    """The result of a score's function for every pair."""

    def one(b, n, t, s):
        named = {"batch": ROWS[b]} if pa.scores._names_batch(function) else {}
        return jnp.float32(function(logits[b, n, t, s], Q[t], KV[s], HEADS[n], None, **named))

    return idioms.pairs(one, *(jnp.arange(size, dtype=jnp.int32) for size in logits.shape))


@pytest.mark.parametrize("name", idioms.SCORES)
def test_a_score_of_tiles_is_that_of_every_pair(name):
    logits = idioms.normal(name, B, N, T, S)
    weights = idioms.normal(name + "'", B, N, T, S)
    floats, rest = idioms.split(idioms.closed())

    def of_tiles(floats, logits):
        score = pa.scores.custom(idioms.SCORES[name](idioms.join(floats, rest)))
        return score.apply(logits, *(jnp.broadcast_to(x, (1,) * (4 - x.ndim) + x.shape) for x in TILES))

    def one_by_one(floats, logits):
        return of_pairs(idioms.SCORES[name](idioms.join(floats, rest)), logits)

    results = []
    # JAX sums the gradients of bfloat16 in bfloat16.
    for function, x in ((of_tiles, floats), (one_by_one, floats._replace(short=floats.short.astype(jnp.float32)))):
        out, back = jax.vjp(jax.jit(function), x, logits)
        results.append((out, back(weights)))
    close(*results)
