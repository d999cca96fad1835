"""Gradients through caches follow each token through every operation; arrays without a gradient raise."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_attn as pa
from pallas_attn import bits
from pallas_attn.caches import H2O, Dense, Float8, Int4, Int8, KVCache, Paged, Plain, QHitter, Window
from tests import tolerances

B, CAPACITY, K, N, D = 3, 16, 2, 4, 8
FIRST, SECOND = 9, 8  # tokens of the two chunks, more than there are slots


@dataclasses.dataclass(frozen=True)
class Newest(pa.caches.Policy):
    """A user-defined policy."""

    def importance(self, slots):
        return slots.positions.astype(jnp.float32)


POLICIES = {  # and storages
    "dense": (Dense(), Plain()),
    "window": (Window(9), Plain()),
    "window with sinks": (Window(5, 3), Plain()),
    "h2o": (H2O(4), Plain()),
    "h2o, norms": (H2O(4, normalize=True, value_norm=True), Plain()),
    "q-hitter": (QHitter(4), Plain()),
    "custom": (Newest(), Plain()),
    "dense, paged": (Dense(), Paged(16, 7)),
    "h2o, paged": (H2O(4), Paged(16, 7)),
}


def drawn(name: str) -> np.random.Generator:
    return np.random.default_rng([*name.encode()])


def positions(start, length: int) -> jax.Array:
    """int32 ``[B, length]``, with padding in row 1."""
    rows = np.broadcast_to(np.asarray(start)[..., None], (B, 1)) + np.arange(length)
    rows[1] = np.where(np.arange(length) % 4 == 2, -1, rows[1] - (np.arange(length) + 1) // 4)
    return jnp.asarray(rows, jnp.int32)


def some_rows(cache: KVCache, key, value) -> KVCache:
    rows = jnp.array([2, B, 0], jnp.int32)
    new = jnp.asarray([[12, 13], [0, 1], [12, 13]], jnp.int32)
    return cache.append(key[:, :2], value[:, :2], new, rows)


def halves(cache: KVCache, key, value) -> KVCache:
    new = positions(20, 4)
    return cache.write(key[:, :4], value[:, :4], cache.reserve(new))


OPERATIONS = {
    "nothing": lambda cache, key, value: cache,
    "write": halves,
    "rows": some_rows,
    "fork": lambda cache, key, value: cache.fork(jnp.array([1, 1, 0])),
    "copy_rows": lambda cache, key, value: cache.copy_rows(jnp.array([2, 0, 1]), jnp.array([1, 2, 0]), jnp.int32(2)),
    "reset": lambda cache, key, value: cache.reset(jnp.array([False, True, False])),
    "truncate": lambda cache, key, value: cache.truncate(jnp.array([4, 9, 0])),
    "keep": lambda cache, key, value: cache.keep(
        jnp.array([3, 2, 4]), jnp.array([[0, 2, 4], [1, 2, 3], [0, 1, 3]], jnp.int32), jnp.array([3, 2, 3])
    ),
}


def can(policy, operation: str) -> bool:
    return {"truncate": isinstance(policy, Dense | Window), "keep": policy.ordered}.get(operation, True)


def run(cache: KVCache, operation: str, tokens, weights) -> tuple[KVCache, KVCache]:
    """The cache after a chunk and an operation, and after another chunk."""
    key, value = tokens
    cache = cache.append(key[:, :FIRST], value[:, :FIRST], positions(5, FIRST)).observe(weights[0])
    cache = OPERATIONS[operation](cache, key[:, FIRST:], value[:, FIRST:]).observe(weights[1])
    later = cache.append(key[:, -SECOND:], value[:, -SECOND:], positions(30, SECOND))
    return cache, later


def empty(policy, storage=None, dtype="float32") -> KVCache:
    sizes = {"batch_size": B, "capacity": CAPACITY, "kv_heads": K, "head_dim": D}
    return pa.caches.init(policy, storage, **sizes, dtype=dtype)


def old_tokens(policy, storage, dtype) -> KVCache:
    """A cache with some tokens, and with numbers in empty slots too."""
    rng = drawn("old tokens")
    cache = empty(policy, storage, dtype)
    cache = with_buffers(cache, [jnp.asarray(rng.integers(-8, 8, x.shape), dtype) for x in (cache.key, cache.value)])
    key, value = (jnp.asarray(rng.integers(-8, 8, (B, 5, K, D)), dtype) for _ in range(2))
    return cache.append(key, value, positions(0, 5))


def with_buffers(cache: KVCache, buffers) -> KVCache:
    key, value = bits.pack_with_derivatives(buffers)
    return dataclasses.replace(cache, key=key, value=value)


@dataclasses.dataclass(frozen=True)
class Journey:
    """A cache, tokens to append, key weights to observe, and factors for the contents of two views."""

    cache: KVCache
    old: tuple[jax.Array, jax.Array]
    tokens: tuple[jax.Array, jax.Array]
    weights: jax.Array
    factors: jax.Array  # [view, key or value, B, capacity, K, D]

    @staticmethod
    def of(name: str, operation: str, dtype: str) -> "Journey":
        rng = drawn(f"{operation} {dtype}")
        shape = (2, B, FIRST + SECOND, K, D)
        tokens = jnp.asarray(rng.integers(-8, 8, shape), dtype)
        # Small integers, with exact sums and products in every dtype.
        factors = jnp.asarray(rng.integers(-2, 3, (2, 2, B, CAPACITY, K, D)), dtype)
        weights = jnp.asarray(rng.random((2, B, K, CAPACITY)), jnp.float32)
        cache = old_tokens(*POLICIES[name], dtype)
        view = cache.view()
        return Journey(cache, (view.key, view.value), (tokens[0], tokens[1]), weights, factors)

    def views(self, operation: str, old, tokens):
        """The contents of both views: keys and values ``[view, 2, B, capacity, K, D]``, 0 in empty slots."""
        found = []
        for after in run(with_buffers(self.cache, old), operation, tokens, self.weights):
            view = after.view()
            held = (view.positions >= 0).swapaxes(1, 2)[..., None]
            for x in (view.key, view.value):
                x = x if view.page_table is None else x[jnp.maximum(view.page_table[:, 0], 0)]
                found.append(jnp.where(held, x, jnp.zeros_like(x)))
        return jnp.stack(found).reshape(self.factors.shape)

    def origins(self, operation: str) -> np.ndarray:
        """The origin of the keys ``[view, B, capacity, K]`` of the views: the number of an old or new token."""
        old, new = ((x.size // D, x.shape[:-1]) for x in (self.old[0], self.tokens[0]))
        old, new = 1 + np.arange(old[0]).reshape(old[1]), 1 + old[0] + np.arange(new[0]).reshape(new[1])
        old, new = (np.repeat(x[..., None].astype(np.float32), D, axis=-1) for x in (old, new))
        value = self.old[1].astype(jnp.float32), self.tokens[1].astype(jnp.float32)
        shadow = dataclasses.replace(self, cache=dataclasses.replace(self.cache, dtype=jnp.dtype("float32")))
        found = jax.jit(functools.partial(shadow.views, operation))((old, value[0]), (new, value[1]))
        return np.asarray(found)[:, 0, ..., 0].astype(int)

    def expected(self, operation: str):
        """Gradients of old and new tokens: the sums of the factors of their slots."""
        origins = self.origins(operation)
        sizes = [x.size // D for x in (self.old[0], self.tokens[0])]
        gradients = np.zeros((2, 1 + sum(sizes), D))
        for which in range(2):
            np.add.at(gradients[which], origins, np.asarray(self.factors, np.float64)[:, which])
        old, new = np.split(gradients[:, 1:], sizes[:1], axis=1)
        return old.reshape(2, *self.old[0].shape), new.reshape(2, *self.tokens[0].shape)


QUICK = [
    *((policy, "nothing", "float32") for policy in POLICIES),
    *(("dense", operation, "float32") for operation in OPERATIONS),
    *(("dense, paged", operation, "float32") for operation in ("fork", "copy_rows", "keep")),
    *((policy, operation, "bfloat16") for policy in ("dense", "h2o") for operation in ("nothing", "fork", "copy_rows")),
    ("dense", "keep", "bfloat16"),
    ("window with sinks", "rows", "float16"),
    ("h2o", "rows", "float8_e4m3fn"),
]
EVERY_CASE = [
    (policy, operation, dtype)
    for policy in POLICIES
    for operation in OPERATIONS
    for dtype in ("float32", "bfloat16", "float16", "float8_e4m3fn")
    if can(POLICIES[policy][0], operation)
]
every_case = pytest.mark.parametrize(
    ("policy", "operation", "dtype"),
    [case if case in QUICK else pytest.param(*case, marks=pytest.mark.slow) for case in EVERY_CASE],
)


@every_case
def test_the_gradient_of_a_token_is_that_of_the_slots_that_show_it(policy, operation, dtype):
    journey = Journey.of(policy, operation, dtype)

    def loss(old, tokens):
        views = journey.views(operation, old, tokens)
        return (views * journey.factors).astype(jnp.float32).sum()

    actual = jax.jit(jax.grad(loss, (0, 1)))(journey.old, journey.tokens)
    for gradient, expected in zip(actual, journey.expected(operation), strict=True):
        assert np.abs(expected).max() > 0
        np.testing.assert_array_equal(np.asarray(gradient).astype(np.float64), expected)


@pytest.mark.parametrize(
    ("policy", "operation", "dtype"),
    [("h2o", "fork", "float32"), ("dense", "copy_rows", "bfloat16"), ("dense", "keep", "float32")],
)
def test_forward_mode(policy, operation, dtype):
    """Tangents move as the numbers do."""
    journey = Journey.of(policy, operation, dtype)
    primals = journey.old, journey.tokens
    tangents = jax.tree.map(lambda x: jnp.flip(x, -1), primals)  # other numbers of the same tokens
    views = functools.partial(journey.views, operation)
    _, actual = jax.jit(lambda *x: jax.jvp(views, *x))(primals, tangents)
    np.testing.assert_array_equal(*(np.asarray(x, np.float64) for x in (actual, jax.jit(views)(*tangents))))


WRAPS = {"eager": lambda f: f, "jit": jax.jit, "checkpoint": jax.checkpoint}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_under_transformations(dtype):
    """Chunks in sequence, in a scan, vmapped, linearized: the same gradients."""
    keys = jnp.asarray(drawn("transformations").integers(-8, 8, (5, B, 2, K, D)), dtype)
    factors = jnp.asarray(drawn("factors").integers(-2, 3, (5, B, CAPACITY, K, D)), dtype)
    new = jnp.arange(10, dtype=jnp.int32).reshape(5, 1, 2) + jnp.zeros((1, B, 1), jnp.int32)

    def step(cache, x):
        key, new, factor = x
        cache = cache.append(key, key, new)
        view = cache.view()
        held = (view.positions >= 0).swapaxes(1, 2)[..., None]
        return cache, jnp.where(held, view.key * factor, jnp.zeros_like(factor)).astype(jnp.float32).sum()

    def one_by_one(keys):
        cache, total = empty(Window(3, 2), dtype=dtype), jnp.float32(0)
        for x in zip(keys, new, factors, strict=True):
            cache, part = step(cache, x)
            total += part
        return total

    def scanned(keys, wrap=lambda f: f):
        return jax.lax.scan(wrap(step), empty(Window(3, 2), dtype=dtype), (keys, new, factors))[1].sum()

    expected = jax.jit(jax.grad(one_by_one))(keys)
    assert np.abs(np.asarray(expected, np.float32)).max() > 1
    for wrap in WRAPS.values():
        np.testing.assert_array_equal(jax.grad(wrap(functools.partial(scanned, wrap=wrap)))(keys), expected)
    np.testing.assert_array_equal(jax.vmap(jax.grad(scanned))(jnp.stack([keys, -keys])), jnp.stack([expected] * 2))
    _, derivative = jax.linearize(scanned, keys)
    products = keys.astype(jnp.float32) * expected.astype(jnp.float32)
    np.testing.assert_array_equal(derivative(keys), products.sum())


# --- attention through a cache ---

CHUNKS, T = 4, 6
LENGTH = CHUNKS * T
CAUSAL = pa.masks.causal()
ROWS = jnp.array([2, 0, 3], jnp.int32)  # of a cache of more rows


def through_cache(arrays, cache: KVCache, implementation: str, rows=None):
    """Outputs of chunks of T tokens with a cache, and its positions ``[B, K, capacity]`` after each."""
    options = {"interpret": True} if implementation == "interpreted" else {"implementation": implementation}
    outputs, held = [], []
    for start in range(0, arrays[0].shape[1], T):
        query, key, value = (x[:, start : start + T] for x in arrays)
        new = jnp.broadcast_to(jnp.arange(start, start + T, dtype=jnp.int32), (B, T))
        cache = cache.append(key, value, new, rows)
        view = cache.view(rows)
        attended = pa.attention(
            *(query, view.key, view.value, CAUSAL if cache.mask is None else CAUSAL & cache.mask),
            **{"q_positions": new, "kv_positions": view.positions, "page_table": view.page_table},
            return_key_weights=True,
            **options,
        )
        cache = cache.observe(attended.key_weights, rows)
        outputs.append(attended.out)
        held.append(jnp.broadcast_to(view.positions, (B, K, cache.capacity)))
    return jnp.concatenate(outputs, 1), jnp.stack(held)


def seen(held, policy) -> np.ndarray:
    """bool ``[B, N, LENGTH, LENGTH]``: the visible tokens, from cache positions ``[CHUNKS, B, K, capacity]``."""
    kept = (np.asarray(held)[..., None] == np.arange(LENGTH)).any(3)  # [CHUNKS, B, K, LENGTH]
    visible = np.repeat(np.moveaxis(kept, 0, 2), T, axis=2)
    token = np.arange(LENGTH, dtype=np.int32)[None]
    mask = CAUSAL if policy.mask is None else CAUSAL & policy.mask
    return np.repeat(visible & np.asarray(mask.dense_array(jnp.asarray(token), jnp.asarray(token[:, None]))), N // K, 1)


def numbers(name: str, dtype: str):
    """Query, key, value, and a cotangent."""
    rng = drawn(name)
    shapes = [(B, LENGTH, heads, D) for heads in (N, K, K, N)]
    return tuple(jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)


ATTENTION_QUICK = [
    *((name, "xla", "float32", False) for name in ("dense", "window with sinks", "h2o", "dense, paged")),
    ("dense", "xla", "float32", True),
    ("h2o", "xla", "bfloat16", True),
    ("h2o", "reference", "float32", False),
    ("dense, paged", "interpreted", "float32", False),
]
ATTENTION_CASES = [
    (name, implementation, dtype, of_rows)
    for name in POLICIES
    for implementation in ("xla", "reference", "interpreted")
    for dtype in ("float32", "bfloat16", "float16")
    for of_rows in (False, True)
]


@pytest.mark.parametrize(
    ("name", "implementation", "dtype", "of_rows"),
    [x if x in ATTENTION_QUICK else pytest.param(*x, marks=pytest.mark.slow) for x in ATTENTION_CASES],
)
def test_attention_through_a_cache_has_the_gradients_of_what_is_kept(name, implementation, dtype, of_rows):
    """Against the reference over the original tokens, with a mask of those in the cache."""
    policy, storage = POLICIES[name]
    capacity = CAPACITY if policy.bounded else 32
    *arrays, cotangent = numbers(name, dtype)
    sizes = {"batch_size": 5 if of_rows else B, "capacity": capacity, "kv_heads": K, "head_dim": D}
    cache = pa.caches.init(policy, storage, **sizes, dtype=dtype)
    rows = ROWS if of_rows else None

    @jax.jit
    def cached(*arrays):
        out, pull, held = jax.vjp(lambda *x: through_cache(x, cache, implementation, rows), *arrays, has_aux=True)
        return out, pull(cotangent), held

    _, gradients, held = cached(*arrays)
    exact = [x.astype(jnp.float32) for x in (*arrays, cotangent)]
    mask = jnp.asarray(seen(held, policy))
    assert policy.bounded == (np.asarray(mask).sum() < B * N * LENGTH * (LENGTH + 1) // 2), "some tokens went"

    @jax.jit
    def uncached(*arrays):
        return jax.vjp(lambda *x: pa.attention(*x, mask, implementation="reference"), *arrays)[1](exact[-1])

    limit = tolerances.CACHE_GRADIENT[dtype]
    for actual, expected in zip(gradients, uncached(*exact[:3]), strict=True):
        expected = np.asarray(expected)
        assert np.abs(expected).max() > 0.1
        np.testing.assert_allclose(
            np.asarray(actual, np.float32), expected, rtol=0, atol=limit * np.abs(expected).max()
        )


def test_what_empty_slots_hold_reaches_no_gradient():
    *arrays, cotangent = (x[:, : 2 * T] for x in numbers("empty slots", "float32"))
    for storage in (Plain(), Paged(16, 8)):
        empty_cache = pa.caches.init(
            storage=storage, batch_size=B, capacity=32, kv_heads=K, head_dim=D, dtype="float32"
        )
        poisoned = dataclasses.replace(
            empty_cache, **{n: jnp.full_like(empty_cache.key, jnp.nan) for n in ("key", "value")}
        )

        @jax.jit
        def gradients(cache, buffers, *arrays):
            def run(buffers, *arrays):
                cache_ = dataclasses.replace(cache, key=buffers[0], value=buffers[1])
                return through_cache(arrays, cache_, "xla")[0]

            return jax.vjp(run, buffers, *arrays)[1](cotangent)

        results = [gradients(empty_cache, (c.key, c.value), *arrays) for c in (empty_cache, poisoned)]
        for clean, actual in zip(*map(jax.tree.leaves, results), strict=True):
            np.testing.assert_array_equal(actual, clean)
        assert not any(x.any() for x in results[1][0]), "nothing of an empty slot is seen"


# --- arrays without a gradient ---

QUANTIZED = {
    "int8": Int8(),
    "int4": Int4(2),
    "float8": Float8(),
    "paged int8": Paged(16, 6, Int8()),
    "paged int4": Paged(16, 6, Int4(2)),
    "paged float8": Paged(16, 6, Float8()),
}
NO_GRADIENT = r"have no gradient|has no gradient"


def attended(cache: KVCache, key, value, query, implementation="xla"):
    new = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    cache = cache.append(key, value, new)
    view = cache.view()
    where = {"q_positions": new, "kv_positions": view.positions, "page_table": view.page_table}
    return pa.attention(query, view.key, view.value, CAUSAL, **where, implementation=implementation).sum()


@pytest.mark.parametrize("argument", ["key", "value", "query"])
@pytest.mark.parametrize("name", QUANTIZED)
def test_a_quantized_cache_has_no_gradient_and_raises(name, argument):
    cache = empty(H2O(4), QUANTIZED[name])
    query, key, value, _ = (x[:, :T] for x in numbers(name, "float32"))
    arrays = {"key": key, "value": value, "query": query}

    def loss(x):
        return attended(cache, **{**arrays, argument: x})

    x = arrays[argument]
    for wrap in WRAPS.values():
        with pytest.raises(NotImplementedError, match=NO_GRADIENT):
            jax.make_jaxpr(jax.grad(wrap(loss)))(x)
    with pytest.raises(NotImplementedError, match=NO_GRADIENT):
        jax.jit(jax.jacfwd(loss)).lower(x)
    # Without a gradient nothing raises: stopped gradients, and an evaluation step.
    stop = jax.lax.stop_gradient
    for allowed in (
        lambda x: (x + stop(loss(x))).sum(),
        lambda x: x.sum() + loss(stop(x)),
        lambda y: (y * loss(x)).sum(),
    ):
        jax.make_jaxpr(jax.grad(allowed))(x)


@pytest.mark.parametrize("name", QUANTIZED)
def test_a_gradient_that_only_the_cache_carries_is_refused(name):
    """New tokens are constants, and the cache's own float arrays are differentiated."""
    query, key, value, _ = (x[:, :T] for x in numbers(name, "float32"))
    cache = empty(Dense(), QUANTIZED[name])

    def loss(scales, field):
        held = dataclasses.replace(getattr(cache, field), scales=scales)
        return attended(dataclasses.replace(cache, **{field: held}), key, value, query)

    for field in ("key", "value"):
        with pytest.raises(NotImplementedError, match=NO_GRADIENT):
            jax.make_jaxpr(jax.grad(lambda scales, field=field: loss(scales, field)))(getattr(cache, field).scales)


@pytest.mark.parametrize("kind", ["int8", "int4", "float8_e4m3fn"])
def test_rounding_has_no_gradient_and_raises(kind):
    x = numbers(kind, "float32")[1]

    def quantize(x):
        return pa.QuantizedArray.quantize(x, kind, 2)

    for loss in (
        lambda x: quantize(x).dequantize().sum(),
        lambda x: quantize(x).scales.sum(),
        lambda x: x.sum() + quantize(x).scales.sum(),
    ):
        with pytest.raises(NotImplementedError, match=r"^QuantizedArray\.quantize has no gradient, because it rounds"):
            jax.make_jaxpr(jax.grad(loss))(x)
        assert not jax.grad(lambda x: loss(jax.lax.stop_gradient(x)))(x).any()  # noqa: B023
    quantized = quantize(x)
    of_scales = jax.grad(lambda scales: dataclasses.replace(quantized, scales=scales).dequantize().sum())
    assert np.abs(of_scales(quantized.scales)).max() > 1, "a product of what is given"


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
def test_a_packed_array_refuses_gradients(dtype):
    cache = empty(Dense(), dtype=dtype)
    if not bits.is_packed(cache.key):
        pytest.skip(f"{dtype} is held as it is here")
    held = bits.pack(cache)
    key = numbers(dtype, dtype)[1][:, :T]
    new = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))

    def loss(cache, key):
        return cache.append(key, key, new).view().key.astype(jnp.float32).sum()

    assert jax.grad(loss, 1)(cache, key).any()
    with pytest.raises(NotImplementedError, match=r"^a packed array .* has no gradient"):
        jax.grad(loss, 1)(held, key)
    with pytest.raises(NotImplementedError, match=r"^a packed array .* has no gradient"):
        jax.grad(lambda key: loss(bits.pack(cache.append(key, key, new)), jax.lax.stop_gradient(key)))(key)
    assert not jax.grad(lambda key: loss(held, jax.lax.stop_gradient(key)))(key).astype(jnp.float32).any()
