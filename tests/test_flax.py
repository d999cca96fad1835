"""Flax's attention modules compute the same function with and without our attention_fn."""

import inspect

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import pallas_attn as pa
from tests import tolerances

B, T, S, E, N, K = 2, 9, 12, 16, 4, 2
rng = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


def some(*shape):
    """A random mask in which every query sees key 0."""
    return jnp.asarray(rng.random(shape) < 0.5).at[..., 0].set(True)


PADDED = jnp.asarray(np.arange(S)[None] < np.array([[S], [7]]))[:, None, None, :]
CAUSAL = np.tri(T, dtype=np.bool_)

# name: (length of the keys, or None for self-attention; options of the call)
CALLS = {
    "self": (None, {}),
    "causal mask": (None, {"mask": nnx.make_causal_mask(jnp.ones((B, T)))}),  # float32
    "random mask": (None, {"mask": some(1, 1, T, T)}),
    "cross": (S, {}),
    "cross, padded keys": (S, {"mask": PADDED}),
    "cross, mask per head": (S, {"mask": some(B, N, T, S)}),
    "cross, one row per head": (S, {"mask": some(B, N, 1, S)}),
    "is_causal": (None, {"is_causal": True}),
    "is_causal, cross, padded keys": (S, {"is_causal": True, "mask": PADDED}),
}


def nnx_layer(**options):
    """The same weights in every layer; Flax's products are as precise as ours."""
    return nnx.MultiHeadAttention(
        N, E, num_kv_heads=K, precision="highest", rngs=nnx.Rngs(0), **({"decode": False} | options)
    )


def inputs(kv_len):
    return (normal(B, T, E),) if kv_len is None else (normal(B, T, E), normal(B, kv_len, E))


def distance(a, b) -> float:
    """The largest difference of two lists of arrays."""
    return max(float(np.abs(np.float64(x) - np.float64(y)).max()) for x, y in zip(a, b, strict=True))


def check_same_function(apply, params, inputs, dtype):
    """``apply(params, inputs, dtype, **attention_fn)`` has the same values and gradients with and without ours.

    In short floats ours is about as accurate as Flax's.
    """

    def run(dtype, **attention):
        def loss(params, inputs):
            out = apply(params, inputs, dtype, **attention)
            return jnp.sum(jnp.sin(out.astype(jnp.float32))), out

        arguments = jax.tree.map(lambda x: x.astype(dtype), (params, inputs))
        gradients, out = jax.grad(loss, argnums=(0, 1), has_aux=True)(*arguments)
        return jax.tree.leaves(out), jax.tree.leaves(gradients)

    ours = run(dtype, attention_fn=pa.flax.attention_fn())
    with jax.numpy_dtype_promotion("standard"):  # jax.nn needs it
        flax, exact = run(dtype), run("float32")
    limits = tolerances.attention_limit, tolerances.gradient_limit
    for a, b, c, limit in zip(ours, flax, exact, limits, strict=True):
        assert [(x.shape, x.dtype) for x in a] == [(x.shape, x.dtype) for x in b]
        largest = max(float(np.abs(x).max()) for x in c)
        if dtype == "float32":
            assert distance(a, c) <= tolerances.ATTENTION_GRADIENT * largest
        else:
            assert distance(a, c) <= limit(distance(b, c), largest, dtype)


def check_close(a, b):
    """Absolute: results of size about 1."""
    np.testing.assert_allclose(np.float32(a), np.float32(b), rtol=0, atol=tolerances.CACHED_LOGITS)


# --- training ---


@pytest.mark.parametrize("call", CALLS)
def test_nnx_gives_the_same(call):
    kv_len, options = CALLS[call]
    x = inputs(kv_len)
    check_close(nnx_layer(attention_fn=pa.flax.attention_fn())(*x, **options), nnx_layer()(*x, **options))


@pytest.mark.parametrize(
    ("call", "dtype"),
    [("cross, mask per head", "float32"), ("is_causal", "bfloat16")],
)
def test_nnx_trains_the_same(call, dtype):
    kv_len, options = CALLS[call]

    def apply(params, inputs, dtype, **attention):
        graph = nnx.graphdef(nnx_layer(dtype=dtype, **attention))
        return nnx.merge(graph, params)(*inputs, **options)

    check_same_function(apply, nnx.state(nnx_layer()), inputs(kv_len), dtype)


@pytest.mark.parametrize(("call", "dtype"), [("causal mask", "float32"), ("cross, padded keys", "bfloat16")])
def test_linen_trains_the_same(call, dtype):
    kv_len, options = CALLS[call]

    def layer(**options):
        return nn.MultiHeadDotProductAttention(num_heads=N, precision="highest", **options)

    def apply(params, inputs, dtype, **attention):
        return layer(dtype=dtype, **attention).apply(params, *inputs, **options)

    params = layer().init(jax.random.key(1), *inputs(kv_len))
    check_same_function(apply, params, inputs(kv_len), dtype)


def test_the_mask_given_once_is_combined_with_that_of_each_call():
    x, padding = normal(B, T, E), PADDED[..., 3:]
    ours = nnx_layer(attention_fn=pa.flax.attention_fn(pa.masks.causal()))
    check_close(ours(x, mask=padding), nnx_layer()(x, mask=padding & CAUSAL[None, None]))
    ours = nnx_layer(attention_fn=pa.flax.attention_fn(CAUSAL))
    check_close(ours(x, mask=padding), nnx_layer()(x, mask=padding & CAUSAL[None, None]))


def test_in_a_scan_over_layers_under_jit_and_grad():
    """The gradients of a training step through three layers, whose parameters are stacked."""

    def gradients(**attention):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=0, out_axes=0)
        def layers(rngs):
            return nnx.MultiHeadAttention(N, E, precision="highest", decode=False, rngs=rngs, **attention)

        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def through(x, layer):
            return x + layer(x, is_causal=True)

        loss = nnx.grad(lambda layers, x: jnp.sum(jnp.sin(through(x, layers))))
        return jax.tree.leaves(nnx.jit(loss)(layers(nnx.Rngs(0)), x))

    x = normal(B, T, E)
    flax = gradients()
    largest = max(float(jnp.abs(g).max()) for g in flax)
    limit = tolerances.ATTENTION_GRADIENT * largest
    assert distance(gradients(attention_fn=pa.flax.attention_fn()), flax) <= limit


@pytest.mark.parametrize("batch", [(), (2, 3)])
def test_any_number_of_batch_axes(batch):
    query, key, value = normal(*batch, T, N, 8), normal(*batch, S, N, 8), normal(*batch, S, N, 8)
    shape = [1] * len(batch[1:]) + [1, T, S]
    options = {"mask": some(*batch[:1], *shape), "bias": normal(*batch, N, T, S), "deterministic": True}
    check_close(
        pa.flax.attention_fn()(query, key, value, **options), nn.dot_product_attention(query, key, value, **options)
    )


def test_a_mask_may_leave_out_leading_axes():
    query, key, value = normal(B, T, N, 8), normal(B, S, N, 8), normal(B, S, N, 8)
    mask = some(T, S)
    check_close(
        pa.flax.attention_fn()(query, key, value, mask=mask),
        pa.attention(query, key, value, mask[None, None]),
    )


def test_computes_in_the_dtype_it_is_asked_for():
    query, key, value = normal(B, T, N, 8), normal(B, S, N, 8), normal(B, S, N, 8)
    out = pa.flax.attention_fn()(query, key, value, dtype=jnp.bfloat16)
    np.testing.assert_array_equal(out, pa.attention(*(x.astype(jnp.bfloat16) for x in (query, key, value))))
    assert pa.flax.attention_fn()(query, key, value).dtype == jnp.float32


def test_a_query_that_sees_nothing_gets_zero():
    query, key, value = normal(1, T, N, 8), normal(1, S, N, 8), normal(1, S, N, 8)
    out = pa.flax.attention_fn()(query, key, value, mask=some(1, 1, T, S).at[:, :, 4].set(False))
    assert (jnp.any(out != 0, axis=(0, 2, 3)) == (jnp.arange(T) != 4)).all()


def test_options_are_those_of_attention():
    query, key, value = normal(B, T, N, 8), normal(B, S, K, 8), normal(B, S, K, 8)
    options = {
        "scores": [pa.scores.softcap(2.0), pa.scores.alibi(normal(N))],
        "sinks": normal(N),
        "scale": 0.3,
        "implementation": "triton",
        "interpret": True,
        "block_sizes": pa.BlockSizes(16, 16),
    }
    ours = pa.flax.attention_fn(pa.masks.causal(), **options)(query, key, value)
    np.testing.assert_array_equal(ours, pa.attention(query, key, value, pa.masks.causal(), **options))
    assert distance([ours], [pa.flax.attention_fn(pa.masks.causal())(query, key, value)]) > 0.1


# --- decoding ---


def nnx_decoder(x, **options):
    """``(step, state)`` of a layer whose cache holds NaN in every slot; ``step`` takes state, token and options."""
    layer = nnx_layer(decode=True, dtype=x.dtype, **options)
    layer.init_cache(x.shape, x.dtype)
    for cache in (layer.cached_key, layer.cached_value):
        cache[...] = jnp.full_like(cache[...], jnp.nan)
    graph, state = nnx.split(layer)

    @jax.jit
    def step(state, token, **options):
        layer = nnx.merge(graph, state)
        out = layer(token, **options)
        return out, nnx.state(layer)

    return step, state


def decode(step, state, x, **options):
    outs = []
    for t in range(x.shape[1]):
        out, state = step(state, x[:, t : t + 1], **options)
        outs.append(out)
    return jnp.concatenate(outs, axis=1)


# Only positions matter here.
REFERENCE = {"implementation": "reference"}
WINDOW = pa.masks.sliding_window(3) | pa.masks.sink(1)


@pytest.mark.parametrize(
    ("mask", "seen"),
    [
        (None, CAUSAL),
        (pa.masks.causal(), CAUSAL),
        (WINDOW, CAUSAL & (~np.tri(T, k=-3, dtype=np.bool_) | (np.arange(T) == 0))),
    ],
    ids=["none", "causal", "window"],
)
def test_nnx_decodes_as_it_trains(mask, seen):
    """Empty slots hold NaN, so that reading one would show."""
    x = normal(B, T, E)
    ours = pa.flax.attention_fn(mask)
    steps = decode(*nnx_decoder(x, attention_fn=ours), x)
    check_close(steps, nnx_layer()(x, mask=jnp.asarray(seen)[None, None]))
    check_close(steps, nnx_layer(attention_fn=ours)(x, is_causal=True))


def test_is_causal_while_decoding_sees_all_filled_slots():
    query, key, value = normal(B, 1, N, 8), normal(B, S, N, 8), normal(B, S, N, 8)
    filled = jnp.broadcast_to(jnp.arange(S) <= 5, (B, 1, 1, S)).astype(jnp.float32)
    ours = pa.flax.attention_fn(**REFERENCE)
    with_flag, without = (ours(query, key, value, mask=filled, is_causal=flag) for flag in (True, False))
    np.testing.assert_array_equal(with_flag, without)
    check_close(without, pa.attention(query, key[:, :6], value[:, :6], **REFERENCE))


def test_decodes_left_padded_rows():
    """The mask of a call distinguishes tokens from padding."""
    x, tokens = normal(B, T, E), np.arange(T) >= np.array([[0], [4]])
    real = jnp.asarray(tokens)[:, None, None, :]
    outs = decode(*nnx_decoder(x, attention_fn=pa.flax.attention_fn(pa.masks.sliding_window(5))), x, mask=real)
    window = CAUSAL & ~np.tri(T, k=-5, dtype=np.bool_)
    expected = nnx_layer()(x, mask=real & window[None, None])
    check_close(np.asarray(outs)[tokens], np.asarray(expected)[tokens])
    assert np.isfinite(outs).all()


def test_a_row_that_hides_its_newest_slot_is_at_the_place_of_the_others():
    query, key, value = normal(B, 1, N, 8), normal(B, S, N, 8), normal(B, S, N, 8)
    filled = np.arange(S) <= np.array([[5], [4]])
    seen = filled & (np.arange(S) > 5 - 3)
    ours = pa.flax.attention_fn(pa.masks.sliding_window(3), **REFERENCE)
    out = ours(query, key, value, mask=filled[:, None, None])
    check_close(out, pa.attention(query, key, value, jnp.asarray(seen)[:, None, None], **REFERENCE))


def test_scores_know_the_position_of_the_token_that_is_decoded():
    query, key, value = normal(B, T, N, 8), normal(B, T, N, 8), normal(B, T, N, 8)
    options = {"scores": pa.scores.alibi(jnp.arange(1.0, N + 1)), "sinks": normal(N)} | REFERENCE
    ours = pa.flax.attention_fn(**options)
    whole = pa.attention(query, key, value, pa.masks.causal(), **options)
    for t in (0, 4, T - 1):
        filled = jnp.broadcast_to(jnp.arange(T) <= t, (B, 1, 1, T))
        check_close(ours(query[:, t : t + 1], key, value, mask=filled), whole[:, t : t + 1])


def test_decodes_in_bfloat16():
    x = normal(B, T, E).astype(jnp.bfloat16)
    with jax.numpy_dtype_promotion("standard"):
        exact = nnx_layer()(x.astype(jnp.float32), is_causal=True)
        flax = nnx_layer(dtype=jnp.bfloat16)(x, is_causal=True)
    ours = decode(*nnx_decoder(x, attention_fn=pa.flax.attention_fn()), x)
    largest = float(jnp.abs(exact).max())
    assert distance([ours], [exact]) <= tolerances.attention_limit(distance([flax], [exact]), largest, jnp.bfloat16)


def test_linen_decodes_as_flax_itself():
    x = normal(B, T, E)

    def layer(**attention):
        return nn.MultiHeadDotProductAttention(num_heads=N, precision="highest", decode=True, **attention)

    def run(variables, **attention):
        step = jax.jit(lambda variables, token: layer(**attention).apply(variables, token, mutable=["cache"]))
        outs = []
        for t in range(T):
            out, cache = step(variables, x[:, t : t + 1])
            variables = variables | cache
            outs.append(out)
        return jnp.concatenate(outs, axis=1)

    variables = layer().init(jax.random.key(1), x)
    flax = run(variables)
    check_close(run(variables, attention_fn=pa.flax.attention_fn()), flax)
    window = run(variables, attention_fn=pa.flax.attention_fn(pa.masks.sliding_window(2)))
    assert distance([window], [flax]) > tolerances.CACHED_LOGITS


def test_no_step_compiles_anything_but_the_first(compilations):
    x = normal(B, T, E)
    step, state = nnx_decoder(x, attention_fn=pa.flax.attention_fn(WINDOW))
    tokens = [x[:, t : t + 1] for t in range(T)]
    _, state = step(state, tokens[0])
    compilations.clear()
    for token in tokens[1:]:
        _, state = step(state, token)
    assert compilations == []


# --- what cannot be ---

QUERY, KEY = normal(B, T, N, 8), normal(B, S, N, 8)


def test_dropout_is_refused_unless_it_is_off():
    x = normal(B, T, E)
    layer = nnx_layer(attention_fn=pa.flax.attention_fn(), dropout_rate=0.5)
    with pytest.raises(NotImplementedError, match="dropout_rate"):
        layer(x, deterministic=False)
    check_close(layer(x, deterministic=True), nnx_layer()(x))

    layer = nn.MultiHeadDotProductAttention(num_heads=N, dropout_rate=0.5, attention_fn=pa.flax.attention_fn())
    with pytest.raises(NotImplementedError, match="dropout_rate"):
        layer.init_with_output({"params": jax.random.key(0), "dropout": jax.random.key(1)}, x, deterministic=False)


def test_sown_weights_are_refused():
    with pytest.raises(NotImplementedError, match="module: attention weights"):
        nnx_layer(attention_fn=pa.flax.attention_fn())(normal(B, T, E), sow_weights=True)
    layer = nn.MultiHeadDotProductAttention(num_heads=N, attention_fn=pa.flax.attention_fn())
    with pytest.raises(NotImplementedError, match="module: attention weights"):
        layer.init(jax.random.key(0), normal(B, T, E), sow_weights=True)


def test_linen_does_not_drop_what_cannot_be_honoured():
    einsums = {f"{name}_einsum_cls": lambda: jnp.einsum for name in ("qk_attn_weights", "attn_weights_value")}
    layer = nn.MultiHeadDotProductAttention(num_heads=N, attention_fn=pa.flax.attention_fn(), **einsums)
    with pytest.raises(NotImplementedError, match="qk_attn_weights_einsum"):
        layer.init(jax.random.key(0), normal(B, T, E))


@pytest.mark.parametrize("flax", [nnx.dot_product_attention, nn.dot_product_attention], ids=["nnx", "linen"])
def test_every_option_of_this_flax_is_named_in_its_place(flax):
    """Linen drops keywords that a signature does not name; positional arguments must agree."""
    ours = list(inspect.signature(pa.flax.attention_fn()).parameters)
    theirs = list(inspect.signature(flax).parameters)
    assert set(theirs) - set(ours) <= {"promote_dtype"}  # which Flax's modules do not pass
    assert ours[:12] == theirs[:12]


@pytest.mark.parametrize(
    "option",
    [{"einsum_dot_general": jax.lax.dot_general}, {"attn_weights_value_einsum": jnp.einsum}]
    + [{"input_positions": jnp.arange(T)}, {"anything_new": False}]
    + [
        {"precision": p}
        for p in ("F16_F16_F16", jax.lax.DotAlgorithmPreset.TF32_TF32_F32, ("highest", "BF16_BF16_F32"))
    ],
    ids=lambda option: next(iter(option)),
)
def test_what_cannot_be_honoured_is_refused_by_name(option):
    with pytest.raises(NotImplementedError, match=f"attention_fn: {next(iter(option))}: "):
        pa.flax.attention_fn()(QUERY, KEY, KEY, **option)


def test_options_that_change_nothing_are_taken():
    options = {"broadcast_dropout": False, "dropout_rng": jax.random.key(0), "force_fp32_for_softmax": True}
    options |= {"promote_dtype": None, "precision": ("highest", jax.lax.Precision.DEFAULT)}
    ours = pa.flax.attention_fn()
    np.testing.assert_array_equal(ours(QUERY, KEY, KEY, **options), ours(QUERY, KEY, KEY))


@pytest.mark.parametrize(
    "option", ["return_lse", "return_key_weights", "page_table", "q_positions", "kv_positions", "anything"]
)
def test_options_without_a_meaning_here_are_refused_at_once(option):
    with pytest.raises(TypeError, match=option):
        pa.flax.attention_fn(**{option: None})


@pytest.mark.parametrize("mask", [pa.BlockMask.from_mask(pa.masks.causal(), T, S), "causal"], ids=["BlockMask", "str"])
def test_a_mask_of_the_wrong_kind_is_refused_at_once(mask):
    with pytest.raises(TypeError, match=f"mask: expected .* got .*{type(mask).__name__}"):
        pa.flax.attention_fn(mask)


def test_scores_of_the_wrong_kind_are_refused_at_once():
    with pytest.raises(TypeError, match="scores"):
        pa.flax.attention_fn(scores="softcap")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mask": jnp.ones((B, 1, T, S + 1))}, r"mask: expected a shape that broadcasts to \[2, 4, 9, 12\]"),
        ({"mask": jnp.ones((1, B, 1, T, S))}, r"mask: expected a shape that broadcasts to"),
        ({"bias": jnp.ones((B, K, T, S))}, r"bias: expected a shape that broadcasts to"),
        ({"value": KEY[:1]}, r"value: expected the batch axes of query, \[2\], got \[1\]"),
        ({"key": KEY[0]}, r"key: expected the batch axes of query, \[2\], got \[\]"),
    ],
)
def test_wrong_shapes_are_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        pa.flax.attention_fn()(**({"query": QUERY, "key": KEY, "value": KEY} | arguments))
