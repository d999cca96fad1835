"""``jax.vmap`` of the kernels equals a loop over the axis, gradients included."""

import functools
import math
import re

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
# Arguments shared by the whole axis instead of batched.
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
    if shared in ("nothing", "positions"):  # sinks have no batch axis: such calls are sequential
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


# Keys and values shared by the whole axis, longer than all queries. What is batched beside the query:
LONG = 151
WITH_THE_QUERY = {
    "nothing": (),
    "positions": ("q_positions",),
    "positions of every row": ("q_positions of rows",),
    "a mask and a bias": ("mask", "bias"),
    "all": ("q_positions of rows", "mask", "bias"),
}
MAPPED = {
    "query": array(SIZE, B, T, N, D),
    "q_positions": jnp.asarray(rng.integers(-1, LONG, (SIZE, 1, T)), jnp.int32),
    "q_positions of rows": jnp.asarray(rng.integers(-1, LONG, (SIZE, B, T)), jnp.int32),
    "mask": jnp.asarray(rng.random((SIZE, B, K, T, LONG)) < 0.8),
    "bias": array(SIZE, 1, N, T, LONG),
}
LONG_KEY, LONG_VALUE, SLOPES, SINKS = array(B, LONG, K, D), array(B, LONG, K, D), array(N) / 100, array(N)


def attend_to_long_keys(mapped: dict, key, value, options: dict) -> pa.AttentionOutput:
    mapped = {name.removesuffix(" of rows"): x for name, x in mapped.items()}
    # Beside the batched arguments: operands per query and shared, and a window with short lists.
    window = pa.masks.sliding_window(60) & pa.masks.segments(jnp.arange(T)[None] % 5, jnp.arange(LONG)[None] % 4)
    mask = ~pa.masks.prefix(jnp.array([3, 9])) & pa.masks.causal() & ~window
    mask &= pa.masks.dense(mapped.get("mask", MAPPED["mask"][0]))
    bias = mapped.get("bias", MAPPED["bias"][0])
    return pa.attention(
        mapped["query"],
        key,
        value,
        mask,
        q_positions=mapped.get("q_positions", jnp.arange(LONG - T, LONG, dtype=jnp.int32)[None]),
        kv_positions=jnp.where(jnp.arange(LONG) % 7 == 0, -1, jnp.arange(LONG, dtype=jnp.int32))[None],
        scores=[pa.scores.alibi(SLOPES), pa.scores.bias(bias)],
        sinks=SINKS,
        return_lse=True,
        **options,
    )


@pytest.mark.parametrize(
    ("implementation", "beside"), [*(("xla", name) for name in WITH_THE_QUERY), ("interpreted", "all")]
)
def test_shared_keys_and_values_are_not_copied(implementation, beside):
    mapped = {name: MAPPED[name] for name in ("query", *WITH_THE_QUERY[beside])}

    def attend(mapped, implementation):
        return attend_to_long_keys(mapped, LONG_KEY, LONG_VALUE, OPTIONS[implementation])[:2]

    together = jax.vmap(functools.partial(attend, implementation=implementation))
    actual = jax.jit(together)(mapped)
    alone = jax.jit(functools.partial(attend, implementation="xla"))
    for index in range(SIZE):
        expected = alone(jax.tree.map(lambda x: x[index], mapped))  # noqa: B023
        for a, b in zip(actual, expected, strict=True):
            np.testing.assert_allclose(
                a[index], b, rtol=tolerances.ATTENTION_GRADIENT, atol=tolerances.ATTENTION_GRADIENT
            )
    program = str(jax.make_jaxpr(together)(mapped))
    keys = LONG_KEY.size // B * SIZE * B
    copies = [
        shape for shape in re.findall(r"f32\[([\d,]+)\]", program) if math.prod(map(int, shape.split(","))) == keys
    ]
    assert not copies


@pytest.mark.parametrize("implementation", ["xla", pytest.param("interpreted", marks=pytest.mark.slow)])
def test_gradients_of_shared_keys_and_values_are_summed(implementation):
    options = OPTIONS[implementation]
    mapped = {"query": MAPPED["query"]}

    def loss(mapped, key, value):
        out = attend_to_long_keys(mapped, key, value, options)
        return jnp.sin(out.out).sum() + jnp.where(out.lse > -jnp.inf, out.lse, 0.0).sum()

    def mapped_loss(key, value):
        return jax.vmap(loss, (0, None, None))(mapped, key, value).sum()

    step = jax.jit(jax.grad(loss, (1, 2)))
    single = [step(jax.tree.map(lambda x: x[index], mapped), LONG_KEY, LONG_VALUE) for index in range(SIZE)]  # noqa: B023
    each = jax.jit(jax.vmap(jax.grad(loss, (1, 2)), (0, None, None)))(mapped, LONG_KEY, LONG_VALUE)
    total = jax.jit(jax.grad(mapped_loss, (0, 1)))(LONG_KEY, LONG_VALUE)
    for a, b, *c in zip(total, each, *single, strict=True):
        expected = jnp.stack(c)
        limit = float(jnp.abs(expected).max()) * tolerances.ATTENTION_GRADIENT
        np.testing.assert_allclose(b, expected, rtol=0, atol=limit)
        np.testing.assert_allclose(a, expected.sum(0), rtol=0, atol=SIZE * limit)


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


@pytest.mark.parametrize("shared", ["nothing", "keys and values", "scores and sinks", "all but the value"])
def test_numpy_operands_are_like_others(shared):
    """Also outside of jit, where they reach a derivative rule unconverted."""
    arguments = {name: x[0] if name in SHARED[shared] else x for name, x in ARGUMENTS.items() if name != "sinks"}
    axes = {name: None if name in SHARED[shared] else 0 for name in arguments}

    def gradients(*values):
        given = dict(zip(arguments, values, strict=True))
        rest = {name: x for name, x in given.items() if name not in DIFFERENTIABLE}
        differentiable = {name: x for name, x in given.items() if name in DIFFERENTIABLE}
        return jax.grad(loss)(differentiable, rest, OPTIONS["xla"])

    mapped = jax.vmap(gradients, tuple(axes.values()))
    actual, expected = mapped(*map(np.asarray, arguments.values())), mapped(*arguments.values())
    for name in expected:
        np.testing.assert_array_equal(actual[name], expected[name], name)


def test_numpy_operands_of_quantised_and_paged_keys():
    query, pool = np.asarray(ARGUMENTS["query"]), np.asarray(array(4, 16, K, D))
    tables = np.array([[[0, 1], [2, 3]], [[3, 2], [1, 1]], [[0, -1], [2, 0]]], np.int32)
    quantized = pa.QuantizedArray.quantize(pool, "int8")
    quantized = jax.tree.map(np.asarray, quantized)

    def attend(query, table, key=quantized, value=pool):
        return pa.attention(query, key, value, page_table=table, implementation="xla")

    for axes in ((0, 0), (0, None), (None, 0)):
        given = [x if axis == 0 else x[0] for x, axis in zip((query, tables), axes, strict=True)]
        actual = jax.vmap(attend, axes)(*given)
        for index in range(SIZE):
            alone = [x if axis is None else x[index] for x, axis in zip(given, axes, strict=True)]
            np.testing.assert_array_equal(actual[index], attend(*alone))


@pytest.mark.parametrize("implementation", OPTIONS)
def test_an_axis_of_size_0_is_refused(implementation):
    def attend(query):
        return pa.attention(query, query, query, **OPTIONS[implementation]).sum()

    nothing = np.ones((0, B, T, N, D), np.float32)
    for function in (attend, jax.grad(attend)):
        with pytest.raises(ValueError, match=r"^jax\.vmap: expected an axis of at least 1, got one of size 0"):
            jax.vmap(function)(nothing)
