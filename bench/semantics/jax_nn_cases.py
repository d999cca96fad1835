"""Calls of ``jax.nn.dot_product_attention``: every option, and the intended differences."""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.semantics.jax_nn import B, Call, K, N, S, T, attend
from bench.semantics.judge import Behavior, Compared, assert_rejected, lenient


def behaviors() -> list[Behavior]:
    found = [Behavior(call.name, call.compare) for call in _calls()]
    found += [Behavior(f"differs: {name}", compare) for name, compare in _DIFFERENCES.items()]
    return found + [Behavior(f"both reject: {name}", _refusal(change)) for name, change in _wrong_calls().items()]


# --- equal ---


def _random(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).random(shape)


def _mask(*shape: int) -> np.ndarray:
    """A random half of the pairs; every query sees key 0."""
    seen = _random(*shape) < 0.5
    seen[..., 0] = True
    return seen


def _bias(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return (2 * _random(*shape) - 1).astype(dtype)


def _lengths(*lengths: int) -> np.ndarray:
    return np.array(lengths, np.int32)


def _broadcasts() -> list[tuple[int, ...]]:
    """All shapes ``[B|1, N|1, T|1, S|1]``, and those without leading axes."""
    extents = (B, N, T, S)
    shared = itertools.product((False, True), repeat=4)
    four = [tuple(1 if one else size for one, size in zip(ones, extents, strict=True)) for ones in shared]
    return [*four, (N, T, S), (1, T, S), (T, S)]


def _calls() -> list[Call]:
    lengths = {"query_seq_lengths": _lengths(T, 9), "key_value_seq_lengths": _lengths(30, S)}
    everything = {"is_causal": True, "local_window_size": (9, 2), "mask": _mask(B, N, T, S), "bias": _bias(1, N, T, S)}
    everything |= lengths | {"scale": 0.7, "return_residual": True}
    minus_infinity = np.where(_mask(1, 1, T, S), 0, -np.inf).astype(np.float32)
    return [
        *(Call(f"{dtype}", dtype=dtype) for dtype in ("float32", "bfloat16", "float16")),
        *(Call(f"{n} query heads, {k} KV heads", q_heads=n, kv_heads=k) for n, k in ((4, 4), (6, 3), (4, 1), (1, 1))),
        Call("no batch axis", flat=True),
        Call("no batch axis, all options", everything | {"mask": _mask(N, T, S)} | _first(lengths), flat=True),
        *(Call(f"mask {list(shape)}", {"mask": _mask(*shape)}) for shape in _broadcasts()),
        *(Call(f"bias {list(shape)}", {"bias": _bias(*shape)}) for shape in _broadcasts()),
        Call("mask and bias, as many heads", {"mask": _mask(1, N, T, S), "bias": _bias(B, 1, 1, S)}, kv_heads=N),
        Call("bfloat16 bias of float32", {"bias": _bias(1, N, T, S, dtype=jnp.bfloat16)}),
        Call("float32 bias of bfloat16", {"bias": _bias(1, N, T, S)}, dtype="bfloat16"),
        Call("a bias of -inf, an additive mask", {"bias": minus_infinity}),
        *(Call(f"causal, T {t}, S {s}", {"is_causal": True}, q_len=t, kv_len=s) for t, s in ((T, S), (T, T), (S, T))),
        *(Call(name, {name: x}) for name, x in lengths.items()),
        Call("both lengths", lengths),
        Call("both lengths, causal", lengths | {"is_causal": True}),
        Call("lengths beyond the axes", {name: x + 40 for name, x in lengths.items()}),
        Call("a query length of 0", {"query_seq_lengths": _lengths(0, T)}),
        *(
            Call(f"window {window}", {"local_window_size": window}, q_len=t)
            for window, t in ((5, T), (0, T), ((7, 0), T), ((0, 3), T), ((2, 9), T), (60, T), ((3, 0), S + 15))
        ),
        Call("window, causal", {"local_window_size": 4, "is_causal": True}),
        *(Call(f"scale {scale}", {"scale": scale}) for scale in (0.3, 1.0, -0.5, 0.0)),
        Call("residual", {"return_residual": True}),
        Call("residual, bfloat16", {"return_residual": True, "is_causal": True}, dtype="bfloat16"),
        *(Call(f"all options, {dtype}", everything, dtype=dtype) for dtype in ("float32", "bfloat16", "float16")),
    ]


def _first(lengths: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: x[:1] for name, x in lengths.items()}


# --- different on purpose ---


def _both(call: Call, options: dict[str, Any]) -> tuple[Any, Any]:
    ours = call.passes(functools.partial(attend, **options), jit=jax.jit)
    with lenient():
        return ours, call.passes(jax.nn.dot_product_attention)


def _sees_nothing(call: Call) -> Callable[[dict[str, Any]], list[Compared]]:
    """Our output is 0 and lse -inf; theirs is the mean of all values, and its residual near the lowest float32."""

    def compare(options: dict[str, Any]) -> list[Compared]:
        ours, theirs = _both(call, options)
        blind, value = ~call.seeing(), call.arrays()[0]["value"]
        mean = np.broadcast_to(np.repeat(value.mean(1, keepdims=True), N // K, 2), ours.out.shape)[blind]
        out, their_out = (np.asarray(x.out)[blind] for x in (ours, theirs))
        absent = np.float32(np.isneginf(np.asarray(ours.residual)[blind]))
        lowest = np.float32(np.asarray(theirs.residual)[blind] < -1e38)
        return [
            Compared("out", out, their_out, np.zeros_like(mean), mean),
            Compared("residual", absent, lowest, np.ones_like(absent)),
        ]

    return compare


def _gradient_of_nothing(options: dict[str, Any]) -> list[Compared]:
    """The gradient that a query without keys gives to values: none in ours, a share per key in theirs."""
    arrays = Call("").arrays()[0]
    mask = np.zeros((1, 1, T, S), bool)

    def loss(value, function):
        return function(arrays["query"], arrays["key"], value, mask=mask).sum()

    ours = jax.grad(functools.partial(loss, function=functools.partial(attend, **options)))(arrays["value"])
    with lenient():
        theirs = jax.grad(functools.partial(loss, function=jax.nn.dot_product_attention))(arrays["value"])
    shape = arrays["value"].shape
    return [Compared("d value", ours, theirs, np.zeros(shape), np.full(shape, T * (N // K) / S))]


def _nan_beyond_length(options: dict[str, Any]) -> list[Compared]:
    """Keys beyond a length hold NaN, which never reaches our output; ``jax.nn`` multiplies it by 0."""
    arrays, length = Call("").arrays()[0], 20
    dirty = {
        name: np.where(np.arange(S)[:, None, None] < length, x, np.nan) for name, x in arrays.items() if x.shape[1] == S
    }
    lengths: dict[str, Any] = {"key_value_seq_lengths": np.full(B, length, np.int32)}
    ours = attend(**arrays | dirty, **lengths, **options)
    with lenient():
        theirs = jax.nn.dot_product_attention(**arrays | dirty, **lengths)
        clean = {name: x[:, :length] for name, x in arrays.items() if name != "query"}
        exact = np.asarray(jax.nn.dot_product_attention(**arrays | clean))
    return [Compared("out", ours, theirs, exact, np.full_like(exact, np.nan))]


def _no_finite_logit(options: dict[str, Any]) -> list[Compared]:
    """A bias of -inf for every key of a query: ours is 0, theirs NaN."""
    bias = jnp.zeros((1, 1, T, S), jnp.float32).at[:, :, 4].set(-jnp.inf)
    arrays = Call("").arrays()[0]
    ours = attend(**arrays, bias=bias, **options)[:, 4]
    with lenient():
        theirs = jax.nn.dot_product_attention(**arrays, bias=bias)[:, 4]
    return [Compared("out", ours, theirs, np.zeros(ours.shape), np.full(ours.shape, np.nan))]


def _residual_has_a_gradient(options: dict[str, Any]) -> list[Compared]:
    """The gradient of our residual by a scalar bias is 1; theirs stops it."""
    arrays = Call("").arrays()[0]

    def total(bias, function):
        return function(**arrays, bias=bias, return_residual=True)[1].mean()

    bias = jnp.zeros((1, 1, 1, 1), jnp.float32)
    ours = jax.grad(functools.partial(total, function=functools.partial(attend, **options)))(bias)
    with lenient():
        theirs = jax.grad(functools.partial(total, function=jax.nn.dot_product_attention))(bias)
    return [Compared("d bias", ours, theirs, np.ones(ours.shape), np.zeros(ours.shape))]


def _traced_scale(options: dict[str, Any]) -> list[Compared]:
    """Our scale must be static; a learned scale multiplies the query."""
    arrays = Call("").arrays()[0]
    with lenient():
        jax.jit(lambda scale: jax.nn.dot_product_attention(**arrays, scale=scale))(0.3)
    assert_rejected(
        "ours", TypeError, lambda: jax.jit(lambda scale: attend(**arrays, scale=scale, **options))(0.3), "scale"
    )
    return []


_MASKED_ROW = Call("", {"mask": np.arange(T)[:, None] + np.zeros(S) != 4, "return_residual": True})
_NO_KEYS = Call("", {"key_value_seq_lengths": np.array([0, 9], np.int32), "return_residual": True})
_BEFORE_ALL_KEYS = Call("", {"local_window_size": (3, 0), "return_residual": True}, q_len=S + 15)

_DIFFERENCES: dict[str, Callable[[dict[str, Any]], list[Compared]]] = {
    "a mask that leaves a query nothing": _sees_nothing(_MASKED_ROW),
    "a key length of 0": _sees_nothing(_NO_KEYS),
    "a window beyond the last key": _sees_nothing(_BEFORE_ALL_KEYS),
    "the gradient of a query that sees nothing": _gradient_of_nothing,
    "NaN beyond a key length": _nan_beyond_length,
    "a bias of -inf for all keys": _no_finite_logit,
    "the residual's gradient": _residual_has_a_gradient,
    "a traced scale": _traced_scale,
}

# --- calls that both reject ---


def _wrong_calls() -> dict[str, dict[str, Any]]:
    """Changes that make a right call wrong."""
    right = Call("").arrays()[0]
    return {
        "value of another length": {"value": right["value"][:, 1:]},
        "key of another batch": {"key": right["key"][:1], "value": right["value"][:1]},
        "another head size": {"query": right["query"][..., 1:]},
        "another dtype": {"query": right["query"].astype(jnp.bfloat16)},
        "KV heads that do not divide the heads": {
            name: np.repeat(right[name], 3, 2)[:, :, :3] for name in ("key", "value")
        },
        "a mask of floats": {"mask": np.ones((1, 1, T, S), np.float32)},
        "a mask of another shape": {"mask": np.ones((1, 1, T, S + 1), bool)},
        "a bias of another shape": {"bias": np.ones((1, 1, T, S + 1), np.float32)},
    }


def _refusal(change: dict[str, Any]) -> Callable[[dict[str, Any]], list[Compared]]:
    def compare(options: dict[str, Any]) -> list[Compared]:
        arguments = Call("").arrays()[0] | change
        with lenient():
            # Shapes that do not broadcast raise a TypeError or a ValueError, by version.
            assert_rejected("jax.nn", (TypeError, ValueError), lambda: jax.nn.dot_product_attention(**arguments))
        assert_rejected("ours", ValueError, lambda: attend(**arguments, **options))
        return []

    return compare
