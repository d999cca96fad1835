"""Each kernel once or twice against a reference, on small arrays of several blocks, ragged and padded.

Every check runs twice: other bits in the second run mean that the first one raced.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

import pallas_attn as pa
from bench.times.check import Oracle, Verdict
from bench.times.timing import Contender
from bench.times.workloads import Attention, Size
from tests import tolerances

masks, scores = pa.masks, pa.scores


class Judged(Protocol):
    """A call of our kernels and the judge of its result."""

    def ours(self, *, interpret: bool = False) -> Contender: ...

    def judge(self, result: Any) -> Verdict: ...


@dataclasses.dataclass(frozen=True)
class Check:
    """A check by name.

    Attributes:
      name: such as "forward-d128".
      kernels: names of the kernels that it runs, without "pallas_attn_".
      build: whether at toy size -> the call.
    """

    name: str
    kernels: frozenset[str]
    build: Callable[[bool], Judged]


def run(check: Check, *, toy: bool) -> dict[str, Any]:
    """Runs a check; the result of a step."""
    judged = check.build(toy)
    contender = judged.ours(interpret=toy)
    function = jax.jit(contender.function)
    first, second = (jax.block_until_ready(function(*contender.inputs[0])) for _ in range(2))
    verdict = judged.judge(first)
    pairs = zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    same = all(bool((a == b).all()) for a, b in pairs)
    found = {"error": verdict.error, "allowed_error": verdict.allowed, "same_bits_twice": same}
    if not verdict.correct:
        return {"status": "wrong", "why": f"error {verdict.error:.1e}, allowed {verdict.allowed:.1e}", "found": found}
    return {"status": "ok", "found": found} if same else {"status": "wrong", "why": "two runs differ", "found": found}


# --- attention without scores: float64 is the reference ---


@dataclasses.dataclass(frozen=True)
class _Plain:
    workload: Attention

    def ours(self, *, interpret: bool = False) -> Contender:
        return self.workload.ours(interpret=interpret)

    def judge(self, result: Any) -> Verdict:
        return Oracle(self.workload).judge(result)


def _prefill(head_dim: int, dtype: str = "bfloat16", *, backward: bool = False, boolean: bool = False):
    """Two rows of 1000 tokens, the second left-padded, two query heads per KV head."""

    def build(toy: bool) -> Judged:
        size = Size(2, *((80, 80) if toy else (1000, 1000)), 4, 2, head_dim, dtype)
        starts = np.asarray([0, size.kv_len // 3])
        positions = jnp.asarray(np.maximum(np.arange(size.kv_len)[None] - starts[:, None], -1), jnp.int32)
        mask = masks.causal()
        if boolean:
            allowed = np.random.default_rng(0).random((size.q_len, size.kv_len)) < 0.3
            mask &= masks.dense(jnp.asarray(allowed | np.eye(size.q_len, dtype=bool)))
        return _Plain(Attention(size, mask, positions, positions, backward))

    return build


def _decode(head_dim: int, quantized: Any = None, page: int | None = None):
    """Three rows with a full, a fifth full and a nearly empty buffer, four query heads per KV head."""

    def build(toy: bool) -> Judged:
        capacity = 128 if toy else 4096
        live = np.asarray([[capacity], [capacity // 5], [3]], np.int32)
        slots = np.arange(capacity, dtype=np.int32)[None]
        kv_positions = jnp.asarray(np.where(slots < live, slots, -1))
        size = Size(3, 1, capacity, 8, 2, head_dim, "bfloat16")
        return _Plain(Attention(size, masks.causal(), jnp.asarray(live - 1), kv_positions, False, quantized, page))

    return build


# --- scores, sinks and key weights: our reference implementation in float32 is the reference ---


@dataclasses.dataclass(frozen=True)
class _Formula:
    """A call by each implementation in one program.

    Attributes:
      call: ``(*arrays, **implementation) -> arrays``.
      shapes: of the arrays.
      gradients: whether the gradients of all arrays are compared, too.
    """

    call: Callable[..., Sequence[jax.Array]]
    shapes: tuple[tuple[int, ...], ...]
    gradients: bool = False

    def ours(self, *, interpret: bool = False) -> Contender:
        chosen: dict[str, Any] = {"interpret": True} if interpret else {"implementation": "triton"}

        def compared(*arrays):
            plain = self._results(arrays, implementation="reference")
            with jax.default_matmul_precision("highest"):
                wide = [x.astype(jnp.float32) for x in arrays]
                exact = self._results(wide, implementation="reference")
            return self._results(arrays, **chosen), plain, exact

        keys = jax.random.split(jax.random.key(0), len(self.shapes))
        arrays = [jax.random.normal(key, x, jnp.bfloat16) for key, x in zip(keys, self.shapes, strict=True)]
        return Contender(compared, [tuple(arrays)])

    def judge(self, result: Any) -> Verdict:
        got, plain, exact = ([np.asarray(x, np.float64) for x in one] for one in result)
        verdicts = []
        for index, (g, p, e) in enumerate(zip(got, plain, exact, strict=True)):
            limit = tolerances.gradient_limit if self.gradients and index else tolerances.attention_limit
            allowed = limit(float(np.abs(p - e).max()), float(np.abs(e).max()), jnp.dtype("bfloat16"))
            error = float(np.abs(g - e).max())
            verdicts.append(Verdict(error if np.isfinite(error) else float(np.finfo(np.float32).max), allowed))
        return max(verdicts, key=lambda verdict: verdict.error / verdict.allowed)

    def _results(self, arrays: Sequence[jax.Array], **implementation: Any) -> list[jax.Array]:
        if not self.gradients:
            return [*self.call(*arrays, **implementation)]
        (out,), pull = jax.vjp(lambda *x: self.call(*x, **implementation), *arrays)
        cotangent = jax.random.normal(jax.random.key(1), out.shape, jnp.bfloat16)
        return [out, *pull((cotangent.astype(out.dtype),))]


def _scored(toy: bool) -> Judged:
    """Slopes, a bias, a soft cap and sinks, with the gradients of the bias and of the sinks."""
    tokens, heads = 80 if toy else 500, 4

    def call(query, key, value, bias, sinks, **implementation):
        used = [scores.alibi(0.5 ** jnp.arange(1.0, heads + 1)), scores.bias(bias), scores.softcap(20.0)]
        return (pa.attention(query, key, value, masks.causal(), scores=used, sinks=sinks, **implementation),)

    kv = (2, tokens, 2, 128)
    return _Formula(call, ((2, tokens, heads, 128), kv, kv, (1, heads, tokens, tokens), (heads,)), True)


def _key_weights(q_len: int):
    """The key weights of a prefill, or of a few queries."""

    def build(toy: bool) -> Judged:
        capacity = 128 if toy else 2000
        tokens = min(q_len, capacity)

        def call(query, key, value, **implementation):
            q_positions = jnp.arange(capacity - tokens, capacity, dtype=jnp.int32)[None]
            options = {"q_positions": q_positions, "return_key_weights": True, **implementation}
            found = pa.attention(query, key, value, masks.causal(), **options)
            return found.out, found.key_weights

        kv = (2, capacity, 2, 128)
        return _Formula(call, ((2, tokens, 8, 128), kv, kv))

    return build


_BACKWARD = frozenset({"d_query", "d_key_value"})
_SPLIT = frozenset({"decode", "merge"})
_FORWARD = frozenset({"forward"})

CHECKS = (
    Check("forward-d128", _FORWARD, _prefill(128)),
    Check("backward-d128", _BACKWARD, _prefill(128, backward=True)),
    Check("decode-d128", _SPLIT, _decode(128)),
    Check("decode-int8", _SPLIT, _decode(128, "int8")),
    Check("forward-boolean", _FORWARD, _prefill(128, boolean=True)),
    Check("decode-int4", _SPLIT, _decode(128, "int4")),
    Check("decode-paged", _SPLIT, _decode(128, page=64)),
    Check("forward-d64", _FORWARD, _prefill(64)),
    Check("backward-d64", _BACKWARD, _prefill(64, backward=True)),
    Check("key-weights", _FORWARD | {"key_weights"}, _key_weights(300)),
    Check("decode-weights", _SPLIT | {"decode_weights"}, _key_weights(4)),
    Check("scores", _FORWARD | _BACKWARD | {"d_score"}, _scored),
    Check("forward-float32", _FORWARD, _prefill(128, "float32")),
    Check("decode-float8", _SPLIT, _decode(128, "float8_e4m3fn")),
)
