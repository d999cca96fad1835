"""``jax.nn.dot_product_attention`` in terms of ``pallas_attn.attention``.

:func:`attend` is the translation, and the only place that knows both conventions. The oracle has its own version
(:meth:`Call.visible`), written from the documentation of ``jax.nn``.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import pallas_attn as pa
from bench.semantics.judge import Compared, compare_gradients, lenient
from tests import oracle

B, T, S, N, K, D = 2, 21, 37, 4, 2, 16
_BLOCKS = pa.BlockSizes(16, 16)  # several, at these sizes


def attend(
    query: Array,  # [B, T, N, D] or [T, N, D]
    key: Array,
    value: Array,
    bias: Array | None = None,
    mask: Array | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: Array | None = None,
    key_value_seq_lengths: Array | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    return_residual: bool = False,
    **options: Any,
) -> Any:
    """Takes the arguments of ``jax.nn.dot_product_attention`` and returns its result.

    Both put query ``t`` at position ``t`` and key ``s`` at ``s`` for any T and S: causal means ``s <= t``. A window
    ``(l, r)`` has the keys ``t - l <= s <= t + r``; ours counts the query's own position on the left. Tokens beyond a
    length are padding. The residual is ``[B, T, N]`` in key's dtype; ours is float32 ``[B, N, T]``.
    """
    flat = query.ndim == 3
    query, key, value = (x[None] if flat else x for x in (query, key, value))
    relations = [pa.masks.causal()] if is_causal else []
    if mask is not None:
        relations.append(pa.masks.dense(four_axes(mask)))
    if local_window_size is not None:
        left, right = (local_window_size,) * 2 if isinstance(local_window_size, int) else local_window_size
        relations.append(pa.masks.sliding_window(left + 1, right))
    result: Any = pa.attention(
        query,
        key,
        value,
        functools.reduce(operator.and_, relations) if relations else None,
        q_positions=_positions(query.shape[1], query_seq_lengths),
        kv_positions=_positions(key.shape[1], key_value_seq_lengths),
        scores=None if bias is None else pa.scores.bias(four_axes(bias)),
        scale=scale,
        return_lse=True,
        block_sizes=_BLOCKS,
        **options,
    )
    out, residual = result.out, result.lse.swapaxes(1, 2).astype(key.dtype)
    out, residual = (out[0], residual[0]) if flat else (out, residual)
    return (out, residual) if return_residual else out


def four_axes(x: Array) -> Array:
    return x.reshape((1,) * (4 - x.ndim) + x.shape)


def _positions(length: int, real: Array | None) -> Array | None:
    if real is None:
        return None
    places = jnp.arange(length, dtype=jnp.int32)[None]
    return jnp.where(places < real[:, None], places, -1)


class Passes(NamedTuple):
    """Results of a call and its gradients; the residual may be None."""

    out: Any
    residual: Any
    gradients: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of ``jax.nn.dot_product_attention``; ``options`` may hold NumPy arrays."""

    name: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    dtype: str = "float32"
    q_len: int = T
    kv_len: int = S
    q_heads: int = N
    kv_heads: int = K
    flat: bool = False  # without the batch axis

    @property
    def extents(self) -> tuple[int, int, int, int]:
        return 1 if self.flat else B, self.q_heads, self.q_len, self.kv_len

    def arrays(self) -> tuple[dict[str, Any], np.ndarray]:
        """Differentiable arrays, always with a batch axis, and the gradient of the output."""
        batch, generator = self.extents[0], np.random.default_rng(0)
        shapes = {"query": (self.q_len, self.q_heads), "key": (self.kv_len, self.kv_heads)}
        shapes |= {"value": shapes["key"], "d_out": shapes["query"]}
        made: dict[str, Any] = {name: generator.standard_normal((batch, *shape, D)) for name, shape in shapes.items()}
        made = {name: x.astype(jnp.dtype(self.dtype)) for name, x in made.items()}
        # Queries without keys differ on purpose; `jax_nn_cases` compares their gradients separately.
        d_out = np.where(self.seeing()[..., None], made.pop("d_out"), 0).astype(jnp.dtype(self.dtype))
        return made | ({"bias": self.options["bias"]} if "bias" in self.options else {}), d_out

    def visible(self) -> np.ndarray:
        """Bool ``[B, N, T, S]``."""
        t, s = np.arange(self.q_len)[:, None], np.arange(self.kv_len)
        option: dict[str, Any] = {"mask": True, "is_causal": False, "local_window_size": None} | self.options
        seen: Any = np.broadcast_to(option["mask"], self.extents) & ((s <= t) | (not option["is_causal"]))
        if (window := option["local_window_size"]) is not None:
            left, right = (window, window) if isinstance(window, int) else window
            seen = seen & (s >= t - left) & (s <= t + right)
        for name, place in (("query_seq_lengths", t), ("key_value_seq_lengths", s)):
            if name in option:
                seen = seen & (place < option[name].reshape(-1, 1, 1, 1))
        return seen

    def seeing(self) -> np.ndarray:
        """Bool ``[B, T, N]``: queries that see a key or are padding."""
        there = self.options.get("query_seq_lengths", np.full(self.extents[0], self.q_len)).reshape(-1, 1, 1)
        return np.asarray(np.any(self.visible(), axis=-1)).swapaxes(1, 2) | (np.arange(self.q_len)[:, None] >= there)

    def passes(self, function: Callable, jit: Callable[[Callable], Callable] = lambda f: f) -> Passes:
        """Output, residual and gradients of ``function``, which takes the arguments of ``jax.nn``'s.

        Theirs is not compiled: repeated operations of the same shapes run quickly, and float16 on CPUs does not
        compile, because ``jax.nn`` requests a precision that does not exist there.
        """
        arrays, d_out = self.arrays()
        others = {name: x for name, x in self.options.items() if name != "bias"}
        traced = {name: x for name, x in others.items() if isinstance(x, np.ndarray)}
        static = {name: x for name, x in others.items() if name not in traced}
        bare, whole = (lambda x: x[0], lambda x: x[None]) if self.flat else (lambda x: x, lambda x: x)

        @jit
        def run(arrays, traced, d_out):
            def call(arrays):
                three: dict[str, Any] = {name: bare(arrays[name]) for name in ("query", "key", "value")}
                result = function(**arrays | three, **traced, **static)
                out, residual = result if self.options.get("return_residual") else (result, None)
                return whole(out), None if residual is None else whole(residual)

            out, back, residual = jax.vjp(call, arrays, has_aux=True)
            return Passes(out, residual, back(d_out)[0])

        return run(arrays, traced, d_out)

    def exact(self) -> Passes:
        arrays, d_out = self.arrays()
        batch, heads, q_len, kv_len = self.extents
        bias = arrays.get("bias")
        scores = () if bias is None else (oracle.bias(np.asarray(four_axes(bias))),)
        pairs = oracle.Pairs.of(batch, heads, np.arange(q_len)[None], np.arange(kv_len)[None])
        scale = self.options.get("scale", D**-0.5)
        common = (arrays["query"], arrays["key"], arrays["value"], self.visible(), scale)
        out, lse = oracle.attention(*common, scores, None, pairs)
        right = oracle.gradients(*common, d_out, np.zeros((batch, heads, q_len)), scores, None, pairs)
        gradients: dict[str, Any] = dict(zip(("query", "key", "value"), right[:3], strict=True))
        gradients |= {} if bias is None else {"bias": right.scores[0].reshape(bias.shape)}
        return Passes(out, lse.swapaxes(1, 2), gradients)

    def compare(self, options: dict[str, Any]) -> list[Compared]:
        """Compares queries that see a key or are padding; the residual only for queries that see a key."""
        ours = self.passes(functools.partial(attend, **options), jit=jax.jit)
        with lenient():
            theirs = self.passes(jax.nn.dot_product_attention)
        exact, rows = self.exact(), self.seeing()
        found = [Compared.at(rows, "out", ours.out, theirs.out, exact.out)]
        if exact.residual is not None and ours.residual is not None:
            rows = np.asarray(np.any(self.visible(), axis=-1)).swapaxes(1, 2)
            found.append(Compared.at(rows, "residual", ours.residual, theirs.residual, exact.residual))
        return [*found, compare_gradients(ours.gradients, theirs.gradients, exact.gradients, self.dtype)]
