"""Custom scores and masks that close over arrays, through attention, on every implementation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_attn as pa
from tests import idioms, tolerances
from tests.attention_check import options
from tests.gradient_check import implementations
from tests.idioms import B, D, K, N, S, T

EVERY_IMPLEMENTATION = pytest.mark.parametrize("implementation", implementations("reference", "xla", "interpreted"))
XLA = {"implementation": "xla"}
SMALL = pa.BlockSizes(16, 16)
# Functions with similar programs form one group, so that few programs are compiled.
GROUPS = [list(idioms.SCORES)[n::6] for n in range(6)]
QUICK = ["a slope per head", "relative positions", "the row of the batch", "a choice of rows"]


def tokens(q_len: int = T):
    query = idioms.normal("query", B, q_len, N, D)
    return query, idioms.normal("key", B, S, K, D), idioms.normal("value", B, S, K, D)


def last(q_len: int):
    """Positions of queries at the end of the keys."""
    return jnp.arange(S - q_len, S, dtype=jnp.int32)


def close(actual, expected, message: str = ""):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        limit = tolerances.gradient_limit(0, max(np.abs(b).max(), 1), a.dtype)
        np.testing.assert_allclose(np.float64(a), np.float64(b), rtol=0, atol=8 * limit, err_msg=message)


def attend(arrays, scores, mask, implementation, **more):
    query, key, value = arrays
    return pa.attention(
        *(query, key, value, mask),
        q_positions=last(query.shape[1])[None],
        scores=scores,
        block_sizes=SMALL,
        **options(implementation),
        **more,
    )


def by_the_definition(arrays, functions, visible):
    def score(logit, q, k, head, batch):
        for function in functions:
            named = {"batch": batch} if pa.scores._names_batch(function) else {}
            logit = jnp.float32(function(logit, q, k, head, None, **named))
        return logit

    return idioms.attention(*arrays, score, visible, last(arrays[0].shape[1]))


def causal(q, k):
    return k <= q


def functions_of(names, floats):
    return [idioms.SCORES[name](idioms.join(floats, idioms.split(idioms.closed())[1])) for name in names]


@pytest.mark.parametrize(
    ("names", "implementation"),
    [
        pytest.param(names, *parameter.values, marks=parameter.marks)
        for names in GROUPS
        for parameter in implementations("xla", slow=("reference", "interpreted"))
    ]
    + [pytest.param(QUICK, *parameter.values, marks=parameter.marks) for parameter in implementations("interpreted")],
)
def test_scores_and_their_gradients(names, implementation):
    """Applied in sequence; gradients reach everything in their closures."""
    arrays, weights = tokens(), idioms.normal("weights", B, T, N, D)
    floats, _ = idioms.split(idioms.closed())

    def of_kernels(arrays, floats):
        scores = [pa.scores.custom(function) for function in functions_of(names, floats)]
        return attend(arrays, scores, pa.masks.causal(), implementation)

    def of_pairs(arrays, floats):
        return by_the_definition(arrays, functions_of(names, floats), causal)

    results = []
    for function, x in ((of_kernels, floats), (of_pairs, floats._replace(short=floats.short.astype(jnp.float32)))):
        out, back = jax.vjp(jax.jit(function), arrays, x)
        results.append((out, back(weights)))
    close(*results)


@pytest.mark.parametrize(
    ("names", "implementation"),
    [
        pytest.param(names, *parameter.values, marks=parameter.marks)
        for names, quick in ((GROUPS[0], ("xla",)), (GROUPS[3], ("xla",)), (QUICK, ("interpreted",)))
        for parameter in implementations(*quick)
    ]
    + [
        pytest.param(names, *parameter.values, marks=parameter.marks)
        for names in GROUPS
        for parameter in implementations(slow=("reference", "interpreted"))
    ],
)
def test_scores_in_decode(names, implementation):
    arrays, (floats, _) = tokens(3), idioms.split(idioms.closed())
    functions = functions_of(names, floats)
    scores = [pa.scores.custom(function) for function in functions]
    expected = by_the_definition(arrays, functions, causal)
    close(attend(arrays, scores, pa.masks.causal(), implementation), expected)


@pytest.mark.parametrize(
    ("name", "implementation"),
    [
        pytest.param(name, *parameter.values, marks=parameter.marks)
        for name in idioms.MASKS
        for parameter in implementations("reference", "xla", "interpreted")
    ],
)
def test_masks(name, implementation):
    arrays, function = tokens(), idioms.MASKS[name](idioms.closed())
    out = attend(arrays, None, pa.masks.custom(function), implementation)
    close(out, by_the_definition(arrays, [], function))


@pytest.mark.parametrize("q_len", [T, 3])
@EVERY_IMPLEMENTATION
def test_masks_in_the_algebra(implementation, q_len):
    """With operands, in forward and backward passes, decode and key weights; ``array`` differs by row and head."""
    c, arrays, weights = idioms.closed(), tokens(q_len), idioms.normal("weights", B, q_len, N, D)
    array = jnp.asarray(np.random.default_rng(0).integers(0, 3, (B, N, 1, S)), jnp.int32)
    same, flagged = idioms.MASKS["documents"](c), idioms.MASKS["flags"](c)
    mask = pa.masks.custom(lambda q, k, x: x > c.documents[k] % 2, array) & pa.masks.causal()
    mask = mask & ~pa.masks.custom(lambda q, k: ~(same(q, k) | flagged(q, k))) | pa.masks.custom(causal)
    q, k = last(q_len), jnp.arange(S, dtype=jnp.int32)
    written = {x: idioms.pairs(x, q, k)[None, None] for x in (same, flagged, causal)}
    dense = (array > c.documents[None, None, None] % 2) & written[causal] & (
        written[same] | written[flagged]
    ) | written[causal]
    np.testing.assert_array_equal(mask.dense_array(q[None], k[None]), dense)

    def run(mask, implementation):
        out, key_weights = attend(arrays, None, mask, implementation, return_key_weights=True)[::2]
        gradient = jax.jit(jax.grad(lambda x: (attend(x, None, mask, implementation) * weights).sum()))(arrays)
        return out, key_weights, gradient

    close(run(mask, implementation), run(dense, "reference"))


# Parameters.


@EVERY_IMPLEMENTATION
def test_parameters_and_what_is_closed_over_are_alike(implementation):
    """Integers, bool and short floats too; gradients have the dtypes of their parameters."""
    c, arrays, weights = idioms.closed(), tokens(), idioms.normal("weights", B, T, N, D)

    def change(s, q, k, h, p):
        table, (buckets, flags) = p["table"], p["where"]
        return jnp.where(flags[k], s + p["number"] * table[h, buckets[k]], s)

    def closing(params):
        params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32 if x.dtype == jnp.bfloat16 else None), params)
        return pa.scores.custom(lambda s, q, k, h, p: change(s, q, k, h, params))

    floats = {"table": c.short, "number": np.float32(0.5)}

    def gradient(make):
        def loss(floats):
            params = {**floats, "where": (c.buckets, np.asarray(c.flags))}
            return (attend(arrays, make(params), pa.masks.causal(), implementation) * weights).sum()

        return jax.jit(jax.value_and_grad(loss))(floats)

    (a, given), (b, closed) = gradient(lambda params: pa.scores.custom(change, params)), gradient(closing)
    assert given["table"].dtype == jnp.bfloat16
    close((a, given), (b, closed))
    assert all(np.abs(np.float32(x)).max() > 0 for x in jax.tree.leaves(given))


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_parameters_of_integers_have_no_gradient(implementation):
    arrays, c = tokens(), idioms.closed()

    def loss(params):
        score = pa.scores.custom(lambda s, q, k, h, p: s + p["table"][h, p["buckets"][k]], params)
        return attend(arrays, score, pa.masks.causal(), implementation).sum()

    gradient = jax.grad(loss, allow_int=True)({"table": c.table, "buckets": c.buckets})
    assert gradient["buckets"].dtype == jax.dtypes.float0
    assert np.abs(gradient["table"]).max() > 0


def test_numbers_as_parameters():
    def change(s, q, k, h, p):
        assert (p["a"].dtype, p["b"].dtype, p["c"].dtype) == (jnp.float32, jnp.int32, jnp.bool_)
        return jnp.where(p["c"] & (k % p["b"] == 0), s * p["a"], s)

    arrays = tokens()
    outputs = [
        attend(arrays, pa.scores.custom(change, params), None, "xla")
        for params in ({"a": 0.5, "b": 3, "c": True}, {"a": np.float64(0.5), "b": np.int64(3), "c": np.bool_(True)})
    ]
    np.testing.assert_array_equal(*outputs)
    close(
        outputs[0], attend(arrays, pa.scores.custom(lambda s, q, k, h, p: jnp.where(k % 3 == 0, s / 2, s)), None, "xla")
    )


# Each call of attention reads the closure, which is not part of the program.


@EVERY_IMPLEMENTATION
@pytest.mark.parametrize("q_len", [T, 3])
def test_a_function_compiles_once_whatever_it_closes_over(compilations, implementation, q_len):
    arrays, state = tokens(q_len), {}

    def score(s, q, k, h, p):
        return s * state["slopes"][h] + jax.nn.relu(state["number"])

    def mask(q, k):
        return state["ids"][q] == state["ids"][k]

    def call(seed):
        c = idioms.closed(seed)
        state.update(slopes=c.slopes, number=c.number, ids=c.documents)
        out = attend(arrays, pa.scores.custom(score), pa.masks.custom(mask), implementation)
        by_definition = by_the_definition(arrays, [score], mask)
        return out, by_definition

    close(*call(0))
    count = len(compilations)
    close(*call(1))
    assert compilations[count:] == []


def test_functions_of_the_same_operations_are_compiled_once(compilations):
    arrays = tokens()

    def call(slopes, factor):
        scores = pa.scores.custom(lambda s, q, k, h, p: s * slopes[h] * factor)
        return attend(arrays, scores, pa.masks.custom(lambda q, k: k <= q), "xla")

    ones, halves = jnp.ones(N), jnp.full(N, 0.5, jnp.float32)
    first = call(ones, 0.5)
    count = len(compilations)
    close(call(halves, 1.0), first)
    assert compilations[count:], "another number in its text is another program"
    count = len(compilations)
    call(ones, 1.0)
    assert compilations[count:] == []


def test_derivatives_of_functions_of_the_same_operations_are_not_mistaken():
    """Functions with user-defined derivatives are compared by identity, since operations do not show derivatives."""
    arrays = tokens()

    def through(factor):
        @jax.custom_jvp
        def identity(x):
            return x

        identity.defjvp(lambda primals, tangents: (primals[0], factor * tangents[0]))
        scores = pa.scores.custom(lambda s, q, k, h, p: identity(s))
        return jax.grad(lambda query: attend((query, *arrays[1:]), scores, None, "xla").sum())(arrays[0])

    close(through(np.float32(3)), 3 * through(np.float32(1)))


def test_a_score_made_once_sees_what_is_there_when_attention_is_called():
    arrays, state = tokens(), {"slopes": jnp.ones(N)}
    score = pa.scores.custom(lambda s, q, k, h, p: s * state["slopes"][h])
    for slopes in (jnp.ones(N), jnp.arange(N, dtype=jnp.float32)):
        state["slopes"] = slopes
        expected = attend(arrays, pa.scores.custom(lambda s, q, k, h, p: s * p[h], slopes), None, "xla")
        np.testing.assert_array_equal(attend(arrays, score, None, "xla"), expected)


@EVERY_IMPLEMENTATION
def test_arrays_of_64_bits(implementation):
    """Arrays in the closure keep their dtype, and the result is rounded; parameters become float32."""
    arrays = tokens()
    slopes, ids = np.linspace(0.5, 2, N), np.arange(S) // 9

    def outputs(slopes, ids):
        def loss(slopes):
            closing = pa.scores.custom(lambda s, q, k, h, p: s * slopes[h])
            given = pa.scores.custom(lambda s, q, k, h, p: s * p[h], slopes)
            mask = pa.masks.custom(lambda q, k: ids[q] == ids[k])
            out = attend(arrays, (closing, given), mask, implementation)
            return (out**2).sum(), out

        return jax.grad(loss, has_aux=True)(slopes)

    expected = outputs(jnp.asarray(slopes, jnp.float32), jnp.asarray(ids, jnp.int32))
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        gradient, out = outputs(jnp.asarray(slopes), jnp.asarray(ids + 2**40))
    assert (gradient.dtype, out.dtype) == (jnp.float64, jnp.float32)
    close((gradient.astype(np.float32), out), expected)


# Transformations, all of which make the closure contain tracers.


def one(x, implementation="xla"):
    """Attention with a score and a mask that close over functions of x, float32 [N]."""
    score = pa.scores.custom(lambda s, q, k, h, p: s * jnp.tanh(x)[h])
    mask = pa.masks.custom(lambda q, k: (k <= q) & (x[k % N] * 3 < q.astype(jnp.float32)))
    return attend(tokens(), score, mask, implementation)


XS = idioms.normal("xs", 3, N)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_vmap_of_what_is_closed_over(implementation):
    function = functools.partial(one, implementation=implementation)
    close(jax.jit(jax.vmap(function))(XS), jnp.stack([function(x) for x in XS]))
    loss = lambda x: (function(x) ** 2).sum()  # noqa: E731
    close(jax.vmap(jax.grad(loss))(XS), jnp.stack([jax.grad(loss)(x) for x in XS]))


def test_scan_checkpoint_and_grad_of_grad():
    expected = jnp.stack([one(x) for x in XS])
    _, found = jax.jit(lambda xs: jax.lax.scan(lambda _, x: (None, one(x)), None, xs))(XS)
    close(found, expected)
    loss = lambda x: (one(x) ** 2).sum()  # noqa: E731
    close(jax.grad(jax.checkpoint(loss))(XS[0]), jax.grad(loss)(XS[0]))
    second = jax.jit(jax.hessian(lambda x: (one(x, "reference") ** 2).sum()))(XS[0])
    step = jnp.float32(tolerances.CHECK_GRADS_STEP)
    moved = [jax.grad(loss)(XS[0] + x) for x in (step, -step)]
    np.testing.assert_allclose(second.sum(1), (moved[0] - moved[1]) / (2 * step), rtol=0.1, atol=0.1)


def test_a_block_mask_keeps_what_its_mask_closes_over():
    """Built once, then passed through jit and a loop over layers."""
    c, arrays = idioms.closed(), tokens()
    mask = pa.masks.custom(idioms.MASKS["documents"](c)) & pa.masks.causal()

    @jax.jit
    def layers(arrays, block_mask):
        def layer(query, _):
            return pa.attention(query, *arrays[1:], block_mask, implementation="xla"), None

        return jax.lax.scan(layer, arrays[0], None, length=2)[0]

    block_mask = pa.BlockMask.from_mask(mask, last(T)[None], S, SMALL)
    expected = attend(arrays, None, mask, "reference")
    expected = attend((expected, *arrays[1:]), None, mask, "reference")
    close(layers(arrays, block_mask), expected)


@EVERY_IMPLEMENTATION
def test_vmap_keeps_the_row_of_an_element(implementation):
    """Although the axis joins the batch, rows count within one element, with tables and without."""
    query, key, value = (jnp.stack([x, -x]) for x in tokens(3))
    factors = jnp.arange(1, B + 1, dtype=jnp.float32)
    for function in (
        lambda s, q, k, h, p, batch: s * (batch + 1).astype(jnp.float32),
        lambda s, q, k, h, p, batch: s * factors[batch],
    ):
        call = functools.partial(attend, scores=pa.scores.custom(function), mask=None, implementation=implementation)
        expected = jnp.stack([call(x) for x in zip(query, key, value, strict=True)])
        close(jax.vmap(call)((query, key, value)), expected)


def test_vmap_of_a_mask_that_closes_over_what_is_shared():
    mask = pa.masks.custom(idioms.MASKS["documents"](idioms.closed()))
    query, *rest = (jnp.stack([x, -x]) for x in tokens())

    def call(query, key, value):
        return attend((query, key, value), None, mask, "xla")

    expected = jnp.stack([call(*x) for x in zip(query, *rest, strict=True)])
    close(jax.vmap(call)(query, *rest), expected)
    expected = jnp.stack([call(x, *(x[0] for x in rest)) for x in query])
    close(jax.vmap(call, (0, None, None))(query, *(x[0] for x in rest)), expected)


def test_entries_of_pairs_that_nobody_looks_at_have_no_gradient():
    """Whatever their derivative is: that of log(0) times 0 is NaN."""
    arrays = tokens()
    weights = jnp.where(jnp.arange(S) < S - 5, 1.0, 0.0)

    def loss(weights, implementation):
        mask = pa.masks.custom(lambda q, k: k < S - 5)
        score = pa.scores.custom(lambda s, q, k, h, p: s + jnp.log(weights[k]))
        return (attend(arrays, score, mask, implementation) ** 2).sum()

    for implementation in ("reference", "xla"):
        gradient = jax.grad(loss)(weights, implementation)
        assert np.isfinite(gradient).all()
        assert (gradient[S - 5 :] == 0).all()
        assert (gradient[: S - 5] != 0).all()


# Refusals.

TABLE, NUMPY = jnp.ones(N), np.ones(N, np.float32)
REFUSED_SCORES = {
    "None": (lambda s, q, k, h, p: None, TypeError, "expected a floating-point logit, got NoneType"),
    "a tuple": (lambda s, q, k, h, p: (s, s), TypeError, "expected a floating-point logit, got tuple"),
    "a string": (lambda s, q, k, h, p: "s", TypeError, "expected a floating-point logit, got str"),
    "an integer": (lambda s, q, k, h, p: q - k, TypeError, "expected a floating-point logit, got int32"),
    "a Python int": (lambda s, q, k, h, p: 1, TypeError, "expected a floating-point logit, got int"),
    "bool": (lambda s, q, k, h, p: q < k, TypeError, "expected a floating-point logit, got bool"),
    "complex": (
        lambda s, q, k, h, p: s.astype(jnp.complex64),
        TypeError,
        "expected a floating-point logit, got complex64",
    ),
    "a row": (
        *(lambda s, q, k, h, p: s * TABLE, ValueError),
        r"expected a floating-point logit per pair, got an array of shape \(4,\)",
    ),
    "a NumPy array": (lambda s, q, k, h, p: s * NUMPY[h], TypeError, "expected jax.numpy .* got a NumPy array"),
    "sorted rows": (lambda s, q, k, h, p: s + jnp.sort(TABLE + s)[k], NotImplementedError, "elementwise .* got sort"),
    "a loop": (
        *(lambda s, q, k, h, p: jax.lax.while_loop(lambda x: x < 9, lambda x: x * 2, s), NotImplementedError),
        "elementwise operations, .* got while",
    ),
    "a long loop": (
        *(lambda s, q, k, h, p: jax.lax.fori_loop(0, 99, lambda i, x: jnp.sin(x), s), NotImplementedError),
        "elementwise operations, .* got scan",
    ),
    "a long sum": (
        *(lambda s, q, k, h, p: s + (jnp.arange(200) * q).sum().astype(jnp.float32), NotImplementedError),
        "elementwise operations, .* got reduce_sum",
    ),
    "a print": (
        *(lambda s, q, k, h, p: (jax.debug.print("{}", s), s)[1], NotImplementedError),
        "expected a function without side effects",
    ),
    "batch too early": (
        *(lambda s, batch, h, q, k: s, TypeError),
        r"expected \(logit, .*, params\) and optionally batch after these, got \(s, batch, h, q, k\)",
    ),
}
REFUSED_MASKS = {
    "integers": (lambda q, k: q - k, TypeError, "expected a boolean, got int32"),
    "floats": (lambda q, k: 1.0, TypeError, "expected a boolean, got float"),
    "None": (lambda q, k: None, TypeError, "expected a boolean, got NoneType"),
    "a row": (
        lambda q, k: q == jnp.arange(4),
        ValueError,
        r"expected a boolean per pair, got an array of shape \(4,\)",
    ),
    "sorted": (lambda q, k: jnp.sort(TABLE * q.astype(jnp.float32))[k] > 0, NotImplementedError, "got sort"),
}


@pytest.mark.parametrize(
    ("make", "function", "error", "message"),
    [pytest.param(pa.scores.custom, *case, id=f"score, {name}") for name, case in REFUSED_SCORES.items()]
    + [pytest.param(pa.masks.custom, *case, id=f"mask, {name}") for name, case in REFUSED_MASKS.items()],
)
def test_what_is_refused(make, function, error, message):
    """When the score or mask is made, so for every implementation."""
    with pytest.raises(error, match=f"^custom: function: .*{message}"):
        make(function)


def test_what_a_function_raises_itself_passes_through():
    class Own(Exception):
        pass

    def raises(*_):
        raise Own

    for make in (pa.scores.custom, pa.masks.custom):
        with pytest.raises(Own):
            make(raises)
        with pytest.raises(jax.errors.TracerBoolConversionError):
            make(lambda *x: x[0] if x[0] > 0 else x[1])


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ({"a": "b"}, TypeError, "expected floating-point numbers, integers or bool .*, got 'b'"),
        (
            np.ones(2, np.complex64),
            ValueError,
            "expected floating-point numbers, got dtype complex64",
        ),
        (np.array([2**31]), ValueError, "expected integers that fit in 32 bits, got 2147483648"),
        ([1, -(2**40)], ValueError, "expected integers that fit in 32 bits, got -1099511627776"),
    ],
)
def test_parameters_of_another_kind(params, error, message):
    with pytest.raises(error, match=f"^custom: params: {message}"):
        pa.scores.custom(lambda s, *_: s, params)


def test_what_only_triton_cannot_do_is_said_and_served_by_others():
    arrays = tokens()
    score = pa.scores.custom(lambda s, q, k, h, p: jax.lax.erf(s))
    with pytest.raises(NotImplementedError, match=r"triton: needs custom functions without erf$"):
        attend(arrays, score, None, "interpreted")
    expected = by_the_definition(arrays, [lambda s, q, k, h, p: jax.lax.erf(s)], lambda q, k: True)
    close(pa.attention(*arrays, scores=score), attend(arrays, score, None, "reference"))
    close(attend(arrays, score, None, "xla"), expected)
