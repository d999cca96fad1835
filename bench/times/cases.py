"""The benchmark cases by name: real shapes, and the project's claims.

Suite ``cpu``: float32, sizes for two cores. Suite ``gpu``: bfloat16, sizes of published benchmarks. ``--toy`` shrinks
them for interpreted kernels. Cases are in order of importance, because a run may stop before the last ones.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jax import Array

import pallas_attn as pa
from bench.times.workloads import Append, Attention, Generation, MaskBuild, Size, Workload

SUITES = ("cpu", "gpu")
BUFFER_OF_2048 = "buffer of 2048"
FLOAT32_KEYS = "float32 keys"
CONTIGUOUS_KEYS = "contiguous keys"
LISTS_AT_HAND = "lists at hand"


@dataclasses.dataclass(frozen=True)
class Case:
    """A workload, and the smallest ratios (peer time / our time) that the project claims.

    Attributes:
      name, about: the name, and a description in a sentence.
      kind: "forward", "backward", "decode", "mask", "append" or "generation".
      build: from a size to the workload.
      sizes: by suite; the case is in these suites only.
      claims: by peer, in suite ``cpu``.
      capacity: whether the case belongs to the comparison of cache capacities.
      variants: in suite ``cpu``, other workloads that we time with it, by the name under which the ratio is reported.
    """

    name: str
    about: str
    kind: str
    build: Callable[[Size], Workload]
    sizes: dict[str, Size]
    claims: dict[str, float] = dataclasses.field(default_factory=dict)
    capacity: bool = False
    variants: dict[str, Callable[[], Workload]] = dataclasses.field(default_factory=dict)

    def size(self, suite: str, toy: bool = False) -> Size:
        """The suite's size, or its toy version."""
        return self.sizes[suite].toy() if toy else self.sizes[suite]


def named(suite: str) -> dict[str, Case]:
    """The cases of a suite, or of all suites for "all", by name, in order."""
    suites = SUITES if suite == "all" else (suite,)
    return {case.name: case for case in CASES if any(one in case.sizes for one in suites)}


def _cpu(batch: int, tokens: int, heads: int = 8, head_dim: int = 64) -> Size:
    return Size(batch, tokens, tokens, heads, heads, head_dim)


def _gpu(batch: int, tokens: int, heads: int = 16, head_dim: int = 128) -> Size:
    return Size(batch, tokens, tokens, heads, heads, head_dim, "bfloat16")


# --- attention over many queries ---


def _attention(mask: pa.masks.Mask, size: Size, starts=(0,), backward: bool = False) -> Attention:
    """Self-attention; row b begins at token ``starts[b]`` and is left-padded before it."""
    positions = np.arange(size.kv_len)[None] - np.asarray(starts)[:, None]
    positions = jnp.asarray(np.maximum(positions, -1), jnp.int32)
    return Attention(size, mask, positions, positions, backward)


def _dense(size: Size) -> Attention:
    return _attention(pa.masks.full(), size)


def _causal(size: Size) -> Attention:
    return _attention(pa.masks.causal(), size)


def _causal_backward(size: Size) -> Attention:
    return _attention(pa.masks.causal(), size, backward=True)


def _left_padded(size: Size) -> Attention:
    lengths = np.random.default_rng(0).integers(size.kv_len // 16, size.kv_len + 1, size.batch)
    return _attention(pa.masks.causal(), size, starts=size.kv_len - lengths)


def _left_padded_backward(size: Size) -> Attention:
    return dataclasses.replace(_left_padded(size), backward=True)


def _window(size: Size) -> Attention:
    return _attention(pa.masks.sliding_window(size.kv_len // 32), size)


def _window_backward(size: Size) -> Attention:
    return dataclasses.replace(_window(size), backward=True)


def document_ids(size: Size, documents: int = 12) -> Array:
    """int32 ``[B, T]``: each token's document. Lengths are multinomial, so they are unequal."""
    rng = np.random.default_rng(0)
    lengths = rng.multinomial(size.q_len, np.full(documents, 1 / documents), size.batch)
    return jnp.asarray([np.repeat(np.arange(documents, dtype=np.int32), row) for row in lengths])


def _documents(size: Size) -> Attention:
    return _attention(pa.masks.segments(document_ids(size)) & pa.masks.causal(), size)


def _documents_backward(size: Size) -> Attention:
    return dataclasses.replace(_documents(size), backward=True)


def _prefix(size: Size) -> Attention:
    lengths = np.linspace(size.kv_len // 8, size.kv_len // 2, size.batch).astype(np.int32)
    return _attention(pa.masks.prefix(jnp.asarray(lengths)) | pa.masks.causal(), size)


def _blocks(active: float) -> Callable[[Size], Attention]:
    def build(size: Size) -> Attention:
        block = max(1, size.kv_len // 32)
        rows = -(-size.q_len // block)
        rng = np.random.default_rng(0)
        # Exactly this many, with the diagonal of every row, so that each query sees a key.
        chosen = np.eye(rows, dtype=bool).ravel()
        others = np.flatnonzero(~chosen)
        chosen[rng.choice(others, max(0, round(active * rows * rows) - rows), replace=False)] = True
        allowed = np.kron(chosen.reshape(rows, rows), np.ones((block, block), bool))
        return _attention(pa.masks.dense(jnp.asarray(allowed[: size.q_len, : size.kv_len])), size)

    return build


def _boolean_causal(size: Size) -> Attention:
    return _attention(pa.masks.dense(jnp.tril(jnp.ones((size.q_len, size.kv_len), jnp.bool_))), size)


# --- decode: one query per row of a buffer ---


def _decode_rows(live: np.ndarray, size: Size) -> Attention:
    slots = np.arange(size.kv_len, dtype=np.int32)[None]
    live = live.astype(np.int32)[:, None]
    return Attention(size, pa.masks.causal(), jnp.asarray(live - 1), jnp.asarray(np.where(slots < live, slots, -1)))


def _decode(size: Size) -> Attention:
    longest = min(1024, size.kv_len)
    return _decode_rows(np.linspace(longest // 2, longest, size.batch), size)


def _decode_1024(size: Size) -> Attention:
    return _decode_rows(np.full(size.batch, min(1024, size.kv_len)), size)


def _decode_8192(size: Size) -> Attention:
    return _decode_rows(np.full(size.batch, min(8192, size.kv_len)), size)


def _at_hand(build: Callable[[Size], Attention], size: Size) -> Callable[[], Attention]:
    return lambda: dataclasses.replace(build(size), lists_at_hand=True)


def _quantized(build: Callable[[Size], Attention], kind: Literal["int8", "int4"]) -> Callable[[Size], Attention]:
    return lambda size: dataclasses.replace(build(size), quantized=kind)


def _paged(build: Callable[[Size], Attention], page: int) -> Callable[[Size], Attention]:
    return lambda size: dataclasses.replace(build(size), page=page)


def _decode_full(size: Size) -> Attention:
    return _decode_rows(np.full(size.batch, size.kv_len), size)


def _decode_ragged(size: Size) -> Attention:
    live = np.full(size.batch, max(1, size.kv_len // 128))
    live[0] = size.kv_len
    return _decode_rows(live, size)


# --- masks, caches, generation ---


def _mask_of(build: Callable[[Size], Attention]) -> Callable[[Size], MaskBuild]:
    return lambda size: MaskBuild(build(size))


def _generation(size: Size) -> Generation:
    toy = size.kv_len <= 256
    return Generation(size, layers=2 if toy else 10, vocab_size=256 if toy else 20480, longest_prompt=size.kv_len // 16)


_DECODE = "one token for each of 8 rows, 512-1024 live keys in buffers of {S}"
_DECODE_SIZE = Size(8, 1, 16384, 16, 4, 64)
_LARGE_BUFFER = {"cpu": Size(4, 1, 32768, 16, 4, 64), "gpu": Size(32, 1, 32768, 32, 8, 128, "bfloat16")}


def _decode_of(capacity: int) -> Case:
    size = dataclasses.replace(_DECODE_SIZE, kv_len=capacity)
    return Case(f"decode-{capacity}", _DECODE, "decode", _decode, {"cpu": size}, capacity=True)


def _blocks_of(percent: int, *suites: str) -> Case:
    sizes = {"cpu": _cpu(1, 4096), "gpu": _gpu(1, 8192)}
    return Case(
        f"blocks-{percent:02}",
        f"random blocks of a thirty-second of the tokens, {percent} % of them, given as a boolean mask",
        "forward",
        _blocks(percent / 100),
        {suite: sizes[suite] for suite in suites},
    )


CASES = (
    Case("causal", "plain causal", "forward", _causal, {"cpu": _cpu(1, 2048), "gpu": _gpu(4, 4096)}, {"jax.nn": 3.0}),
    Case(
        "decode",
        _DECODE,
        "decode",
        _decode,
        {"cpu": _DECODE_SIZE},
        {"jax.nn": 40.0, BUFFER_OF_2048: 1 / 1.2},
        capacity=True,
        variants={
            BUFFER_OF_2048: lambda: _decode(dataclasses.replace(_DECODE_SIZE, kv_len=2048)),
            LISTS_AT_HAND: _at_hand(_decode, _DECODE_SIZE),
        },
    ),
    Case(
        "window",
        "sliding window of a thirty-second of the tokens",
        "forward",
        _window,
        {"cpu": _cpu(1, 8192), "gpu": _gpu(1, 16384)},
        {"jax.nn": 20.0},
    ),
    Case(
        "left-padded",
        "causal batch, lengths uniform from a sixteenth of the tokens to all of them, left-padded",
        "forward",
        _left_padded,
        {"cpu": _cpu(8, 2048), "gpu": _gpu(8, 4096)},
        {"jax.nn": 6.0},
    ),
    Case(
        "documents",
        "12 packed documents of unequal lengths, causal",
        "forward",
        _documents,
        {"cpu": _cpu(1, 4096), "gpu": _gpu(1, 8192)},
    ),
    Case(
        "documents-16x8192",
        "16 rows of 12 packed documents each, causal",
        "forward",
        _documents,
        {"gpu": _gpu(16, 8192)},
    ),
    Case(
        "boolean-causal",
        "causal, given as an explicit boolean mask",
        "forward",
        _boolean_causal,
        {"cpu": _cpu(1, 2048), "gpu": _gpu(1, 4096)},
    ),
    Case(
        "decode-131072",
        "one token for one row of 131072 live keys",
        "decode",
        _decode_full,
        {"gpu": Size(1, 1, 131072, 8, 8, 128, "bfloat16")},
    ),
    Case(
        "decode-ragged",
        "one token for each row: the first has all keys live, the others a 128th of them",
        "decode",
        _decode_ragged,
        {"cpu": _DECODE_SIZE, "gpu": Size(32, 1, 65536, 32, 8, 128, "bfloat16")},
        variants={LISTS_AT_HAND: _at_hand(_decode_ragged, _DECODE_SIZE)},
    ),
    Case(
        "decode-llama-8b",
        "one token for each row of 4096 live keys, heads as in Llama 3 8B",
        "decode",
        _decode_full,
        {"cpu": Size(1, 1, 4096, 32, 8, 128), "gpu": Size(16, 1, 4096, 32, 8, 128, "bfloat16")},
    ),
    Case(
        "decode-32768",
        "one token for each row of 1024 live keys in a buffer of 32768",
        "decode",
        _decode_1024,
        _LARGE_BUFFER,
        {BUFFER_OF_2048: 1 / 1.3},
        variants={
            BUFFER_OF_2048: lambda: _decode_1024(dataclasses.replace(_LARGE_BUFFER["cpu"], kv_len=2048)),
            LISTS_AT_HAND: _at_hand(_decode_1024, _LARGE_BUFFER["cpu"]),
        },
    ),
    Case(
        "decode-int8",
        "one token for each row of 8192 live keys in a buffer of 32768, int8 with a scale per token and head",
        "decode",
        _quantized(_decode_8192, "int8"),
        _LARGE_BUFFER,
        {FLOAT32_KEYS: 1.0},
        variants={
            FLOAT32_KEYS: lambda: _decode_8192(_LARGE_BUFFER["cpu"]),
            LISTS_AT_HAND: _at_hand(_quantized(_decode_8192, "int8"), _LARGE_BUFFER["cpu"]),
        },
    ),
    Case(
        "decode-int4",
        "the same, int4 with a scale for every 32 columns",
        "decode",
        _quantized(_decode_8192, "int4"),
        _LARGE_BUFFER,
        variants={FLOAT32_KEYS: lambda: _decode_8192(_LARGE_BUFFER["cpu"])},
    ),
    Case(
        "decode-paged",
        "one token for each row of 8192 live keys, in pages of 64 keys in random order",
        "decode",
        _paged(_decode_8192, 64),
        _LARGE_BUFFER,
        {CONTIGUOUS_KEYS: 1 / 1.25},
        variants={CONTIGUOUS_KEYS: lambda: _decode_8192(_LARGE_BUFFER["cpu"])},
    ),
    Case("dense", "every query sees every key", "forward", _dense, {"cpu": _cpu(1, 2048), "gpu": _gpu(4, 4096)}),
    Case(
        "prefix",
        "prefix-LM: a prefix of an eighth to half of the tokens sees itself whole, the rest is causal",
        "forward",
        _prefix,
        {"cpu": _cpu(2, 2048), "gpu": _gpu(4, 4096)},
    ),
    _blocks_of(10, "cpu", "gpu"),
    _blocks_of(25, "cpu", "gpu"),
    _blocks_of(50, "cpu", "gpu"),
    Case(
        "causal-backward",
        "derivative of plain causal attention",
        "backward",
        _causal_backward,
        {"cpu": _cpu(1, 2048), "gpu": _gpu(4, 4096)},
    ),
    Case(
        "left-padded-backward",
        "derivative of attention over a left-padded causal batch",
        "backward",
        _left_padded_backward,
        {"cpu": _cpu(4, 2048), "gpu": _gpu(8, 4096)},
        {"jax.nn": 3.0},
    ),
    Case(
        "window-backward",
        "derivative of attention in a sliding window of a thirty-second of the tokens",
        "backward",
        _window_backward,
        {"cpu": _cpu(1, 4096), "gpu": _gpu(4, 4096)},
    ),
    Case(
        "documents-backward",
        "derivative of attention over 12 packed documents, causal",
        "backward",
        _documents_backward,
        {"cpu": _cpu(1, 4096), "gpu": _gpu(4, 4096)},
        {"jax.nn": 3.0},
    ),
    Case(
        "mask-documents",
        "block lists of 12 packed documents, causal",
        "mask",
        _mask_of(_documents),
        {"cpu": _cpu(8, 4096), "gpu": _gpu(4, 8192)},
    ),
    Case(
        "mask-boolean",
        "block lists of an explicit boolean mask, causal",
        "mask",
        _mask_of(_boolean_causal),
        {"cpu": _cpu(1, 4096), "gpu": _gpu(1, 4096)},
    ),
    Case(
        "append-token",
        "one new token for each row of a cache, each at its own slot",
        "append",
        Append,
        {"cpu": Size(8, 1, 16384, 16, 4, 64), "gpu": Size(32, 1, 4096, 32, 8, 128, "bfloat16")},
        capacity=True,
    ),
    Case(
        "append-chunk",
        "a chunk of 128 new tokens for each row of a cache",
        "append",
        Append,
        {"cpu": Size(8, 128, 16384, 16, 4, 64, new=128), "gpu": Size(32, 128, 4096, 32, 8, 128, "bfloat16", 128)},
        capacity=True,
    ),
    Case("causal-16k", "plain causal, 16384 tokens", "forward", _causal, {"gpu": _gpu(1, 16384)}),
    Case("causal-d64", "plain causal, head size 64", "forward", _causal, {"gpu": _gpu(4, 4096, 32, 64)}),
    Case("causal-d256", "plain causal, head size 256", "forward", _causal, {"gpu": _gpu(4, 4096, 8, 256)}),
    *(_decode_of(capacity) for capacity in (1024, 2048, 4096, 8192)),
    _blocks_of(5, "cpu"),
    _blocks_of(75, "cpu"),
    Case(
        "generation",
        "prompts of unequal lengths continued greedily, random Llama",
        "generation",
        _generation,
        {"cpu": Size(8, 1, 4096, 8, 4, 64, new=128), "gpu": Size(8, 1, 4096, 8, 4, 64, new=128)},
        capacity=True,
    ),
)

# Names under which our own times on other workloads are reported.
VARIANTS = frozenset(name for case in CASES for name in case.variants)
