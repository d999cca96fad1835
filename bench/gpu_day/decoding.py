"""Decode steps of a Generator, by storage of its caches: the time of a step, and the tokens of loops in CUDA graphs."""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

import pallas_attn as pa
from bench.times.watcher import Watcher
from pallas_attn_models import Decoder, DecoderConfig, Generator, Sampling

_PAGE = 64


@dataclasses.dataclass(frozen=True)
class Scale:
    """Sizes of the decoder, of its caches and of the run."""

    config: DecoderConfig
    batch_size: int
    capacity: int
    new_tokens: int
    repeats: int


SCALE = Scale(DecoderConfig(32000, 2048, 5632, 16, 16, 8, 128), batch_size=8, capacity=4096, new_tokens=256, repeats=3)
TOY = Scale(DecoderConfig(256, 64, 96, 2, 4, 2, 32), batch_size=2, capacity=128, new_tokens=4, repeats=1)
STORAGES = ("plain", "int8", "paged", "graph-loops")


def model(config: DecoderConfig) -> Decoder:
    """Random weights in bfloat16."""
    return Decoder(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)


def generator(model: Decoder, name: str, scale: Scale) -> Generator:
    """The Generator with the caches of this name; "graph-loops": plain, with all steps in one CUDA graph."""
    pages = scale.batch_size * scale.capacity // _PAGE
    storage = {"int8": pa.caches.Int8(), "paged": pa.caches.Paged(_PAGE, pages)}.get(name, pa.caches.Plain())
    options: dict[str, Any] = {"storage": storage, "graph_loops": name == "graph-loops"}
    return Generator(model, batch_size=scale.batch_size, capacity=scale.capacity, **options)


def run(name: str, watcher: Watcher, *, toy: bool) -> dict[str, Any]:
    """Generates several times; the result of a step. Loops in graphs must not change the tokens."""
    scale = TOY if toy else SCALE
    tokens, found = _timed(name, scale)
    if name != "graph-loops":
        return {"status": "ok", "found": found}
    watcher.so_far(found)
    plain, _ = _timed("plain", dataclasses.replace(scale, repeats=1))
    if tokens != plain:
        return {"status": "wrong", "why": "other tokens than without loops in graphs", "found": found}
    return {"status": "ok", "found": found}


_shared_model = functools.lru_cache(maxsize=1)(model)


def _timed(name: str, scale: Scale) -> tuple[list[list[int]], dict[str, Any]]:
    """The tokens, and seconds of the fastest run; the lengths of the prompts differ."""
    generating = generator(_shared_model(scale.config), name, scale)
    rng = np.random.default_rng(0)
    lengths = np.linspace(scale.capacity // 16, scale.capacity // 2, scale.batch_size).astype(int)
    prompts = [rng.integers(3, scale.config.vocab_size, length).tolist() for length in lengths]
    sampling = Sampling(max_new_tokens=scale.new_tokens)
    runs = [generating.generate(prompts, sampling) for _ in range(scale.repeats)]
    seconds = min(x.stats.decode_seconds for x in runs)
    found = {
        "ms_per_step": 1e3 * seconds / scale.new_tokens,
        "tokens_per_second": scale.batch_size * scale.new_tokens / seconds,
        "prefill_seconds": min(x.stats.prefill_seconds for x in runs),
        "rows": scale.batch_size,
        "prompt_tokens": int(lengths.sum()),
        "executables": generating.compile_counts,
    }
    return runs[0].tokens, found
