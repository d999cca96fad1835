"""The decode and prefill steps of a Generator, compiled for an absent GPU."""

import dataclasses
import tempfile
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

import pallas_attn as pa
from bench.machine_code import launches, xla_gpu
from pallas_attn_models import Decoder, DecoderConfig, Generator

BATCH_SIZE, CAPACITY, _PAGE = 8, 4096, 64
_PAGES = BATCH_SIZE * CAPACITY // _PAGE
STORAGES = {
    "Plain": pa.caches.Plain(),
    "Int8": pa.caches.Int8(),
    "Paged": pa.caches.Paged(_PAGE, _PAGES),
    "Paged Int8": pa.caches.Paged(_PAGE, _PAGES, pa.caches.Int8()),
}


@dataclasses.dataclass(frozen=True)
class StepGraph:
    """A compiled step.

    Attributes:
      call: what the whole call launches, each loop's body once.
      step: what one iteration of its largest loop launches: a decode step, or a prefill chunk.
      temporary_bytes: memory beside arguments and results.
      aliased_bytes: memory of arguments that results take over.
      cache_bytes: of the caches of all layers.
    """

    call: launches.Launches
    step: launches.Launches
    temporary_bytes: int
    aliased_bytes: int
    cache_bytes: int


def generator(storage: pa.caches.Storage, num_layers: int, **options: Any) -> Generator:
    """A Generator of a decoder of 12 heads of size 64 in bfloat16, of which nothing is allocated."""
    config = DecoderConfig(
        vocab_size=32000,
        hidden_size=768,
        intermediate_size=2048,
        num_layers=num_layers,
        num_heads=12,
        num_kv_heads=4,
        head_dim=64,
    )
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16, implementation="triton"))
    return Generator(model, batch_size=BATCH_SIZE, capacity=CAPACITY, storage=storage, **options)


def lower_step(generator: Generator, which: Literal["decode", "prefill"], *, gpu: str) -> jax.stages.Lowered:
    """Lowers a step of the generator for an absent GPU."""
    engine = generator._engine

    def shapes(tree: Any) -> Any:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), x.dtype), tree)

    weights, state = shapes(engine._weights()), engine.abstract_state()
    if which == "decode":
        scalars = (jax.ShapeDtypeStruct((), dtype) for dtype in (jnp.int32, jnp.bool_))
        return xla_gpu.lower(engine._decode, weights, state, *scalars, gpu=gpu)
    return xla_gpu.lower(engine._prefill, weights, state, shapes(engine.empty_batch()), gpu=gpu)


def compile_step(
    generator: Generator, which: Literal["decode", "prefill"], *, gpu: str = "H100", **options: Any
) -> StepGraph:
    """Compiles a step of the generator.

    Args:
      gpu, options: as in :mod:`bench.machine_code.xla_gpu`.

    Raises:
      ModuleNotFoundError: the plugin is missing.
    """
    lowered = lower_step(generator, which, gpu=gpu)
    with tempfile.TemporaryDirectory() as directory:
        compiled = xla_gpu.compile(lowered, dump=Path(directory), **options)
        thunks = launches.read(Path(directory))
    memory: Any = compiled.memory_analysis()
    return StepGraph(
        call=launches.Launches.of(thunks),
        step=launches.Launches.of(launches.step(thunks)),
        temporary_bytes=memory.temp_size_in_bytes,
        aliased_bytes=memory.alias_size_in_bytes,
        cache_bytes=generator.cache_nbytes,
    )
