"""Masks and scores of different kinds have different pytree structures, so jit never mixes up their programs."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_attn as pa

IDS = jnp.zeros((1, 3), jnp.int32)
BOOLS = jnp.ones((1, 1, 3, 3), jnp.bool_)
FULL, CAUSAL = pa.masks.full(), pa.masks.causal()


def relation(q, kv, *arrays):
    return kv <= q


def logit(logit, *_):
    return logit


TREES = {
    "full": FULL,
    "causal": CAUSAL,
    "window": pa.masks.sliding_window(3, 0),
    "wider window": pa.masks.sliding_window(4, 0),
    "sink": pa.masks.sink(3),
    "chunked": pa.masks.chunked(3),
    "prefix": pa.masks.prefix(IDS[0]),
    "segments": pa.masks.segments(IDS),
    "tree": pa.masks.tree(BOOLS[0, 0]),
    "dense": pa.masks.dense(BOOLS),
    "custom mask": pa.masks.custom(relation, BOOLS),
    "and": CAUSAL & FULL,
    "or": CAUSAL | FULL,
    "and, turned": FULL & CAUSAL,
    "not": ~CAUSAL,
    "not full": ~FULL,
    "alibi": pa.scores.alibi(jnp.ones(1)),
    "bias": pa.scores.bias(jnp.ones((1, 1, 1, 1))),
    "softcap": pa.scores.softcap(3.0),
    "custom score": pa.scores.custom(logit, jnp.ones(1)),
}


def test_kinds_with_the_same_fields_have_different_structures():
    for a, b in itertools.combinations(TREES, 2):
        assert jax.tree.structure(TREES[a]) != jax.tree.structure(TREES[b]), f"{a} and {b}"


@pytest.mark.parametrize("name", TREES)
def test_a_round_trip_keeps_kind_and_fields(name):
    leaves, structure = jax.tree.flatten(TREES[name])
    again = jax.tree.unflatten(structure, leaves)
    assert type(again) is type(TREES[name])
    assert jax.tree.structure(again) == structure
    assert hash(jax.tree.structure(again)) == hash(structure)
    for path, leaf in jax.tree_util.tree_leaves_with_path(again):
        at = TREES[name]
        for key in path:
            at = at[key.idx] if hasattr(key, "idx") else getattr(at, key.name)
        np.testing.assert_array_equal(leaf, at)
