"""``jax.vmap`` of the kernels: what a loop over the axis gives, gradients included."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_attn as pa
from tests import tolerances

SIZE, B, T, S, N, K, D = 3, 2, 19, 37, 4, 2, 16
rng = np.random.default_rng(0)
OPTIONS = {
    "xla": {"implementation": "xla", "block_sizes": pa.BlockSizes(16, 16)},
    "interpreted": {"interpret": True, "block_sizes": pa.BlockSizes(16, 16)},
}


def array(*shape: int) -> jax.Array:
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


ARGUMENTS = {
    "query": array(SIZE, B, T, N, D),
    "key": array(SIZE, B, S, K, D),
    "value": array(SIZE, B, S, K, D),
    "q_positions": jnp.asarray(rng.integers(-1, S, (SIZE, B, T)), jnp.int32),
    "kv_positions": jnp.asarray(np.where(rng.random((SIZE, 1, S)) < 0.2, -1, np.arange(S)), jnp.int32),
    "bias": array(SIZE, 1, N, 1, S),
    "slopes": array(SIZE, N),
    "sinks": array(SIZE, N),
}
DIFFERENTIABLE = ("query", "key", "value", "bias", "slopes", "sinks")
# What is shared by the whole axis, instead of having it.
SHARED = {
    "nothing": (),
    "the query": ("query",),
    "keys and values": ("key", "value", "kv_positions"),
    "positions": ("q_positions", "kv_positions"),
    "scores and sinks": ("bias", "slopes", "sinks"),
    "all but the value": tuple(name for name in ARGUMENTS if name != "value"),
}


def attend(arguments: dict, options: dict) -> pa.AttentionOutput:
    return pa.attention(
        arguments["query"],
        arguments["key"],
        arguments["value"],
        pa.masks.causal(),
        q_positions=arguments["q_positions"],
        kv_positions=arguments["kv_positions"],
        scores=[pa.scores.alibi(arguments["slopes"]), pa.scores.bias(arguments["bias"])],
        sinks=arguments.get("sinks"),
        return_lse=True,
        **options,
    )


def loss(differentiable: dict, rest: dict, options: dict) -> jax.Array:
    out = attend({**differentiable, **rest}, options)
    return jnp.sin(out.out).sum() + jnp.where(out.lse > -jnp.inf, out.lse, 0.0).sum()


@pytest.mark.parametrize(
    ("implementation", "shared"), [*(("xla", name) for name in SHARED), ("interpreted", "scores and sinks")]
)
def test_equals_a_loop(implementation, shared):
    options = OPTIONS[implementation]
    arguments = {name: x[0] if name in SHARED[shared] else x for name, x in ARGUMENTS.items()}
    if shared in ("nothing", "positions"):  # sinks have no axis for a batch: that call is made one by one
        arguments.pop("sinks")
    axes = {name: None if name in SHARED[shared] else 0 for name in arguments}
    differentiable = {name: x for name, x in arguments.items() if name in DIFFERENTIABLE}
    rest = {name: x for name, x in arguments.items() if name not in DIFFERENTIABLE}
    gradient = jax.value_and_grad(functools.partial(loss, options=options))
    in_axes = ({name: axes[name] for name in differentiable}, {name: axes[name] for name in rest})
    actual = jax.jit(jax.vmap(gradient, in_axes))(differentiable, rest)
    step = jax.jit(gradient)
    for index in range(SIZE):
        at = jax.tree.map(lambda x, axis: x if axis is None else x[index], (differentiable, rest), in_axes)  # noqa: B023
        expected = step(*at)
        for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
            scale = float(jnp.abs(b).max())
            np.testing.assert_allclose(a[index], b, rtol=0, atol=scale * tolerances.ATTENTION_GRADIENT)


def test_an_axis_that_is_not_the_first():
    moved = {name: jnp.moveaxis(x, 0, -1) for name, x in ARGUMENTS.items()}
    options = OPTIONS["xla"]
    expected = jax.vmap(lambda x: attend(x, options))(ARGUMENTS)
    actual = jax.vmap(lambda x: attend(x, options), in_axes=-1, out_axes=-1)(moved)
    np.testing.assert_array_equal(jnp.moveaxis(actual.out, -1, 0), expected.out)
    np.testing.assert_array_equal(jnp.moveaxis(actual.lse, -1, 0), expected.lse)


def test_custom_parameters_are_served_one_by_one():
    def factor(logit, q_position, kv_position, head, params):
        return logit * params["factor"]

    query, key, value = ARGUMENTS["query"], ARGUMENTS["key"], ARGUMENTS["value"]

    def attend(query, key, value, factors):
        scores = pa.scores.custom(factor, {"factor": factors})
        return pa.attention(query, key, value, scores=scores, implementation="xla")

    factors = jnp.asarray([0.5, 1.0, 2.0])
    actual = jax.vmap(attend)(query, key, value, factors)
    for index in range(SIZE):
        np.testing.assert_array_equal(actual[index], attend(query[index], key[index], value[index], factors[index]))


def test_two_axes_of_a_block_mask():
    """A stack of stacks of models, all with one BlockMask."""
    block_mask = pa.BlockMask.from_mask(pa.masks.causal(), S, S, pa.BlockSizes(16, 16))
    tokens = array(2, 3, B, S, N, D)

    def attend(x):
        return pa.attention(x, x, x, block_mask, implementation="xla")

    actual = jax.vmap(jax.vmap(attend))(tokens)
    np.testing.assert_array_equal(actual[1, 2], attend(tokens[1, 2]))
