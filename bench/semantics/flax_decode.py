"""Flax's modules decoding token by token with their caches, and the calls that we reject.

The expected result is causal attention over the whole sequence in float64.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import pallas_attn as pa
from bench.semantics.flax import B, E, Function, K, Layer, N, S, T, in_float64, normal, ours
from bench.semantics.judge import Behavior, Compared, assert_rejected, exact_attention, lenient


@dataclasses.dataclass(frozen=True)
class Decode:
    """``layer`` decodes ``x`` in a cache of ``slots``; the first ``starts`` tokens of a row are padding."""

    name: str
    layer: Layer = dataclasses.field(default_factory=lambda: Layer(""))
    slots: int = T
    starts: tuple[int, ...] | None = None
    called: dict[str, Any] = dataclasses.field(default_factory=dict)  # options of our call only

    @property
    def real(self) -> np.ndarray | None:
        """Bool ``[B, T]``: tokens that are not padding."""
        return None if self.starts is None else np.arange(T) >= np.array(self.starts)[:, None]

    def mask(self) -> dict[str, np.ndarray]:
        """The mask of a step, ``[B, 1, 1, slots]``."""
        if self.starts is None:
            return {}
        return {"mask": (np.arange(self.slots) >= np.array(self.starts)[:, None])[:, None, None]}

    def compare_nnx(self, options: dict[str, Any]) -> list[Compared]:
        return self._compare(self._nnx_steps, self._nnx_whole, options)

    def compare_linen(self, options: dict[str, Any]) -> list[Compared]:
        return self._compare(self._linen_steps, self._linen_whole, options)

    def _compare(self, steps: Callable, whole: Callable, options: dict[str, Any]) -> list[Compared]:
        (x,) = self.layer.inputs()
        mine = steps(x, ours(options), jax.jit, self.called)
        with lenient():
            theirs = steps(x, None, lambda f: f, {})
            with jax.enable_x64(True):
                seen = np.tri(T, dtype=bool) if self.real is None else np.tri(T, dtype=bool) & self.real[:, None, None]
                exact = np.asarray(whole(x, jnp.asarray(np.broadcast_to(seen, (*self.layer.batch, 1, T, T)))))
        rows = slice(None) if self.real is None else self.real
        return [Compared.at(rows, "tokens", mine, theirs, exact)]

    def _nnx_steps(self, x: np.ndarray, attention: Function | None, jit: Callable, called: dict[str, Any]) -> Any:
        layer = self.layer.nnx(attention, decode=True)
        nnx.update(layer, self.layer.nnx_params())
        layer.init_cache((*self.layer.batch, self.slots, E), x.dtype)
        graph, state = nnx.split(layer)

        @jit
        def step(state, token, mask):
            layer = nnx.merge(graph, state)
            return layer(token, **mask, **called), nnx.state(layer)

        return _each_token(step, state, x, self.mask())

    def _nnx_whole(self, x: np.ndarray, mask: Any) -> Any:
        layer = self.layer.nnx(exact_attention)
        nnx.update(layer, in_float64(self.layer.nnx_params()))
        return layer(in_float64(x), mask=mask)

    def _linen_steps(self, x: np.ndarray, attention: Function | None, jit: Callable, called: dict[str, Any]) -> Any:
        layer = self.layer.linen(attention, decode=True)
        cache = layer.init(jax.random.key(0), jnp.zeros((*self.layer.batch, self.slots, E), x.dtype))["cache"]
        # Initialized with float32 parameters, the cache is float32 whatever the parameters of the call.
        cache = jax.tree.map(lambda c: c.astype(x.dtype) if jnp.issubdtype(c.dtype, jnp.floating) else c, cache)
        params = self.layer.linen_params()

        @jit
        def step(cache, token, mask):
            out, state = layer.apply({"params": params, "cache": cache}, token, **mask, **called, mutable=["cache"])
            return out, state["cache"]

        return _each_token(step, cache, x, self.mask())

    def _linen_whole(self, x: np.ndarray, mask: Any) -> Any:
        layer = self.layer.linen(exact_attention)
        return layer.apply({"params": in_float64(self.layer.linen_params())}, in_float64(x), mask=mask)


def _each_token(step: Callable, state: Any, x: np.ndarray, mask: dict[str, np.ndarray]) -> Any:
    outs = []
    for t in range(T):
        out, state = step(state, x[..., t : t + 1, :], mask)
        outs.append(out)
    return jnp.concatenate(outs, axis=-2)


_COMMON = [
    Decode("decodes"),
    Decode("decodes, bfloat16", Layer("", dtype="bfloat16")),
    Decode("decodes, a partly filled cache", slots=40),
    Decode("decodes, left-padded rows", starts=(0, 4)),
    Decode("decodes, two batch axes", Layer("", batch=(2, 3))),
    Decode("decodes, normalized queries and keys", Layer("", {"normalize_qk": True})),
]
_GROUPED = Layer("", {"num_kv_heads": K})
_NNX = [
    Decode("decodes, grouped heads", Layer("", {"num_kv_heads": K})),
    Decode(
        "decodes, grouped heads, left-padded rows, bfloat16",
        Layer("", {"num_kv_heads": K}, dtype="bfloat16"),
        16,
        (3, 0),
    ),
]
# Some versions of Flax then attend to key 0 only (google/flax, issue 5591), so theirs is called without it.
_IS_CAUSAL = Decode("decodes, is_causal changes nothing", called={"is_causal": True})


# --- different on purpose ---


def _sees_nothing(options: dict[str, Any]) -> list[Compared]:
    """A query without keys: ours is 0, theirs the mean of all values."""
    query, key, value = normal(B, T, N, 16), normal(B, S, N, 16, seed=1), normal(B, S, N, 16, seed=2)
    mask = np.arange(T)[:, None] + np.zeros((1, 1, 1, S)) != 4
    mine = ours(options)(query, key, value, mask=jnp.asarray(mask))[:, 4]
    mean = value.mean(1)
    found = []
    with lenient():
        for name, function in {"nnx": nnx.dot_product_attention, "linen": nn.dot_product_attention}.items():
            theirs = function(query, key, value, mask=jnp.asarray(mask))[:, 4]
            found.append(Compared(name, mine, theirs, np.zeros_like(mean), mean))
    return found


# --- calls that we reject ---


def _layer_refusal(mentions: str, kind: str, made: dict[str, Any], called: dict[str, Any]) -> Behavior:
    """An option of a module that must not be ignored silently."""

    def compare(options: dict[str, Any]) -> list[Compared]:
        layer, attention = Layer("", made), ours(options)
        x: Any = layer.inputs()[0]

        def call():
            if kind == "nnx":
                return layer.nnx(attention)(x, **called)
            keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
            return layer.linen(attention).init(keys, x, **called)

        assert_rejected("ours", NotImplementedError, call, f"attention_fn: {mentions}")
        return []

    return Behavior(f"{kind}: ours rejects {mentions}", compare)


def _refusals() -> list[Behavior]:
    dropout, active = {"dropout_rate": 0.5}, {"deterministic": False}
    einsums = {f"{name}_einsum_cls": lambda: jnp.einsum for name in ("qk_attn_weights", "attn_weights_value")}
    algorithm = {"precision": jax.lax.DotAlgorithmPreset.F32_F32_F32}
    found = [
        *(_layer_refusal("dropout_rate", kind, dropout, active) for kind in ("nnx", "linen")),
        *(_layer_refusal("module", kind, {}, {"sow_weights": True}) for kind in ("nnx", "linen")),
        *(_layer_refusal("precision", kind, algorithm, {}) for kind in ("nnx", "linen")),
        _layer_refusal("qk_attn_weights_einsum", "linen", einsums | {"precision": None}, {}),
    ]
    x = normal(B, T, N, 16)
    for name, option in {"input_positions": np.arange(T), "einsum_dot_general": jax.lax.dot_general}.items():
        found.append(_function_refusal(name, NotImplementedError, lambda: (x, x, x), {name: option}))
    wrong = {"mask": np.ones((B, 1, T, T + 1), bool), "bias": normal(B, N, T + 1, T)}
    found += [_function_refusal(name, ValueError, lambda: (x, x, x), {name: array}) for name, array in wrong.items()]
    return [*found, Behavior("ours rejects a BlockMask", _block_mask_refusal)]


def _block_mask_refusal(options: dict[str, Any]) -> list[Compared]:
    block_mask: Any = pa.BlockMask.from_mask(pa.masks.causal(), T, T)
    assert_rejected("ours", TypeError, lambda: pa.flax.attention_fn(block_mask, **options), "mask")
    return []


def _function_refusal(name: str, error: type[Exception], arrays: Callable, called: dict[str, Any]) -> Behavior:
    def compare(options: dict[str, Any]) -> list[Compared]:
        assert_rejected("ours", error, lambda: ours(options)(*arrays(), **called), name)
        return []

    return Behavior(f"function: ours rejects {name}", compare)


def behaviors() -> list[Behavior]:
    return [
        *(Behavior(f"nnx: {case.name}", case.compare_nnx) for case in (*_COMMON, *_NNX, _IS_CAUSAL)),
        *(Behavior(f"linen: {case.name}", case.compare_linen) for case in _COMMON),
        Behavior("differs: a mask that leaves a query nothing", _sees_nothing),
        *_refusals(),
    ]
