"""The sizes of a prefill call that a Generator chooses."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from pallas_attn_models import Decoder, DecoderConfig, Generator
from pallas_attn_models.generation import generator as generator_module
from pallas_attn_models.generation.prefill_sizes import default_chunk, default_rows, multiprocessors


@pytest.mark.parametrize(
    ("cores", "heads", "chunk", "rows"),
    [
        (None, 12, 128, 1),
        (132, 12, 512, 2),  # H100: 2 * 4 tiles * 12 heads = 96 programs
        (132, 32, 512, 1),
        (132, 64, 512, 1),
        (132, 132, 128, 1),
        (108, 8, 512, 3),  # A100
        (46, 32, 256, 1),
    ],
)
def test_a_call_has_about_a_program_for_each_multiprocessor(cores, heads, chunk, rows):
    assert default_chunk(heads, cores) == chunk
    assert default_rows(chunk, heads, cores) == rows


def test_short_chunks_leave_room_for_more_prompts():
    assert default_rows(16, 12, 132) == default_rows(128, 12, 132) == 11


def make(**options) -> Generator:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
    config = DecoderConfig(vocab_size=50, num_layers=1, **sizes)
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0), dtype=jnp.float32))
    return Generator(model, batch_size=4, capacity=1024, **options)


def test_a_generator_takes_them_unless_told(monkeypatch):
    assert multiprocessors(jax.devices()[0]) is None
    assert (make().prefill_chunk, make()._engine.chunk_rows) == (128, 1)
    monkeypatch.setattr(generator_module, "multiprocessors", lambda device: 48)
    assert (make().prefill_chunk, make()._engine.chunk_rows) == (512, 3)
    assert make(prefill_chunk=16)._engine.chunk_rows == 4, "at most the rows of the batch"
    chosen = make(prefill_chunk=16, prefill_rows=2)
    assert (chosen.prefill_chunk, chosen._engine.chunk_rows) == (16, 2)
    long = make(policy=generator_module.pa.caches.H2O(recent=800), max_length=4096)
    assert long.prefill_chunk == 128, "what the policy leaves of its capacity"
