"""Flax's attention modules and functions, NNX and linen, with and without ``pallas_attn.flax.attention_fn``.

The expected result is the same call in float64 with :func:`bench.semantics.judge.exact_attention`.
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
from bench.semantics.judge import Behavior, Compared, compare_gradients, exact_attention, lenient

B, T, S, E, N, K = 2, 9, 12, 64, 4, 2
_BLOCKS = pa.BlockSizes(16, 16)

Function = Callable[..., Any]


def ours(options: dict[str, Any]) -> Function:
    return pa.flax.attention_fn(block_sizes=_BLOCKS, **options)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def some(*shape: int) -> np.ndarray:
    """A random mask in which every query sees key 0."""
    seen = np.random.default_rng(2).random(shape) < 0.5
    seen[..., 0] = True
    return seen


def in_float64(tree: Any) -> Any:
    """Floats of a pytree as float64; call it with 64 bits enabled."""
    floating = lambda x: jnp.issubdtype(x.dtype, jnp.floating)  # noqa: E731
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float64) if floating(x) else x, tree)


def _compare(apply: Callable[[Function | None, Any], Any], arrays: Any, options: dict[str, Any]) -> list[Compared]:
    """Output and gradients of ``apply(attention_fn, arrays)`` with ours, with Flax's own (None), and in float64."""

    def passes(attention: Function | None, arrays: Any, jit: Callable = lambda f: f) -> tuple[Any, Any]:
        @jit
        def run(arrays):
            out, back = jax.vjp(lambda x: apply(attention, x), arrays)
            return out, back(jnp.asarray(normal(*out.shape, seed=1), out.dtype))[0]

        return run(arrays)

    mine = passes(ours(options), arrays, jit=jax.jit)
    with lenient():
        theirs = passes(None, arrays)
        with jax.enable_x64(True):
            exact = jax.tree.map(np.asarray, passes(exact_attention, in_float64(arrays)))
    return [
        Compared("out", mine[0], theirs[0], exact[0]),
        compare_gradients(mine[1], theirs[1], exact[1], theirs[0].dtype),
    ]


# --- modules ---


@dataclasses.dataclass(frozen=True)
class Layer:
    """A module built with ``made`` and called with ``called``: self-attention, or over ``kv_len`` other tokens."""

    name: str
    made: dict[str, Any] = dataclasses.field(default_factory=dict)
    called: dict[str, Any] = dataclasses.field(default_factory=dict)
    kv_len: int | None = None
    batch: tuple[int, ...] = (B,)
    dtype: str = "float32"

    def inputs(self) -> list[np.ndarray]:
        lengths = [T] if self.kv_len is None else [T, self.kv_len]
        return [normal(*self.batch, length, E, seed=length).astype(jnp.dtype(self.dtype)) for length in lengths]

    def nnx(self, attention: Function | None = None, **made: Any) -> nnx.MultiHeadAttention:
        """Builds the same weights each time, with products as precise as ours."""
        options: dict[str, Any] = {"decode": False} | self._options(attention) | made
        return nnx.MultiHeadAttention(N, E, rngs=nnx.Rngs(0), **options)

    def linen(self, attention: Function | None = None, **made: Any) -> nn.MultiHeadDotProductAttention:
        return nn.MultiHeadDotProductAttention(num_heads=N, **self._options(attention) | made)

    def _options(self, attention: Function | None) -> dict[str, Any]:
        chosen: dict[str, Any] = {} if attention is None else {"attention_fn": attention}
        if attention is exact_attention:
            chosen["dtype"] = None  # the dtype of the inputs
        return {"precision": "highest"} | self.made | chosen

    def nnx_params(self) -> Any:
        return jax.tree.map(lambda x: x.astype(self.dtype), nnx.state(self.nnx(), nnx.Param))

    def linen_params(self) -> Any:
        inputs = (x.astype(np.float32) for x in self.inputs())
        params = self.linen().init(jax.random.key(1), *inputs, deterministic=True)["params"]
        return jax.tree.map(lambda x: x.astype(self.dtype), params)

    def compare_nnx(self, options: dict[str, Any]) -> list[Compared]:
        def apply(attention, arrays):
            params, inputs = arrays
            layer = self.nnx(attention)
            nnx.update(layer, params)
            return layer(*inputs, **self.called)

        return _compare(apply, (self.nnx_params(), self.inputs()), options)

    def compare_linen(self, options: dict[str, Any]) -> list[Compared]:
        def apply(attention, arrays):
            params, inputs = arrays
            return self.linen(attention).apply({"params": params}, *inputs, **self.called)

        with lenient():
            params = self.linen_params()
        return _compare(apply, (params, self.inputs()), options)


def _layers() -> list[Layer]:
    """Layers of NNX and linen."""
    left = (np.arange(T) >= np.array([[0], [4]]))[:, None, None]
    keys = (np.arange(S) < np.array([[S], [7]]))[:, None, None]
    causal = np.tri(T, dtype=bool)[None, None]
    named: dict[str, np.ndarray] = {
        "causal": np.asarray(nn.make_causal_mask(jnp.ones((B, T)))),  # float32
        "padded": np.asarray(nn.make_attention_mask(jnp.ones((B, T)), jnp.asarray(left[:, 0, 0], jnp.float32))),
        "causal and padded": (left & causal) | np.eye(T, dtype=bool),
        "per head": some(B, N, T, T),
        "per query": some(1, 1, T, T),
    }
    return [
        *(Layer(f"self-attention, {dtype}", dtype=dtype) for dtype in ("float32", "bfloat16", "float16")),
        *(Layer(f"self-attention, mask {name}", called={"mask": mask}) for name, mask in named.items()),
        Layer("causal mask, bfloat16", called={"mask": named["causal"]}, dtype="bfloat16"),
        Layer("cross-attention", kv_len=S),
        Layer("cross-attention, padded keys", called={"mask": keys}, kv_len=S),
        Layer("cross-attention, padded keys, bfloat16", called={"mask": keys}, kv_len=S, dtype="bfloat16"),
        Layer("cross-attention, keys per head", called={"mask": some(B, N, 1, S)}, kv_len=S),
        Layer("cross-attention, one key", kv_len=1),
        Layer("two batch axes", batch=(2, 3)),
        Layer("two batch axes, mask", called={"mask": some(2, 3, 1, T, T)}, batch=(2, 3)),
        Layer("computes in bfloat16", {"dtype": jnp.bfloat16}),
        Layer("dropout switched off", {"dropout_rate": 0.5}, {"deterministic": True}),
        Layer("normalized queries and keys", {"normalize_qk": True}),
        Layer("more features inside", {"qkv_features": 2 * E}),
        *(Layer(f"precision {p}", {"precision": p}) for p in ("default", "high", jax.lax.Precision.HIGHEST)),
    ]


def _nnx_layers() -> list[Layer]:
    """Layers that linen lacks: grouped heads, and causal as an option."""
    grouped, keys = {"num_kv_heads": K}, (np.arange(S) < np.array([[S], [7]]))[:, None, None]
    return [
        Layer("grouped heads", grouped),
        Layer("grouped heads, mask per head", grouped, {"mask": some(B, N, T, S)}, S),
        Layer("one KV head", {"num_kv_heads": 1}),
        Layer("grouped heads, bfloat16", grouped, dtype="bfloat16"),
        Layer("is_causal", called={"is_causal": True}),
        Layer("is_causal, bfloat16", called={"is_causal": True}, dtype="bfloat16"),
        Layer("is_causal, more keys than queries", called={"is_causal": True}, kv_len=S),
        Layer("is_causal, fewer keys than queries", called={"is_causal": True}, kv_len=5),
        Layer("is_causal, padded keys", grouped, {"is_causal": True, "mask": keys}, S),
    ]


# --- functions ---


def _functions() -> list[Behavior]:
    """The functions with a bias, which no module passes on."""
    both = {"nnx": nnx.dot_product_attention, "linen": nn.dot_product_attention}
    biases = [(B, N, T, S), (B, 1, 1, S), (1, N, T, S), (1, 1, T, S), (N, T, S), (T, S)]
    found = []
    for name, function in both.items():
        found += [_function(f"{name} function, bias {list(shape)}", function, normal(*shape)) for shape in biases]
        found.append(_function(f"{name} function, bias and mask", function, normal(1, N, T, S), mask=some(B, 1, T, S)))
        found.append(_function(f"{name} function, in bfloat16", function, normal(1, N, T, S), dtype=jnp.bfloat16))
        found.append(_function(f"{name} function, no batch axis", function, normal(N, T, S), batch=()))
        whole = normal(2, 3, N, T, S)
        found.append(_function(f"{name} function, two batch axes", function, whole, batch=(2, 3)))
    nnx_only = {"batch": (B,), "kv_heads": K, "is_causal": True}
    return [
        *found,
        _function("nnx function, bias, grouped heads, is_causal", both["nnx"], normal(1, N, T, S), **nnx_only),
    ]


def _function(name, function, bias, *, batch=(B,), kv_heads=N, **called: Any) -> Behavior:
    shapes = [(T, N, 16), (S, kv_heads, 16), (S, kv_heads, 16)]
    arrays = (*(normal(*batch, *shape, seed=seed) for seed, shape in enumerate(shapes)), bias)

    def apply(attention, arrays):
        return (attention or function)(*arrays, deterministic=True, **called)

    return Behavior(name, lambda options: _compare(apply, arrays, options))


def behaviors() -> list[Behavior]:
    nnx_layers = [*_layers(), *_nnx_layers()]
    return [
        *(Behavior(f"nnx: {layer.name}", layer.compare_nnx) for layer in nnx_layers),
        *(Behavior(f"linen: {layer.name}", layer.compare_linen) for layer in _layers()),
        *_functions(),
    ]
