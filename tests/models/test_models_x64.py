"""With ``jax_enable_x64``, decoders and Generators still compute in 32 bits: the same programs, dtypes and bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import pallas_attn as pa
import pallas_attn.flax
from pallas_attn_models import CachedDecoder, Decoder, load_hf, save_hf
from pallas_attn_models.cli import doctor
from pallas_attn_models.decoder.config import DecoderConfig
from pallas_attn_models.decoder.rope import RopeConfig
from pallas_attn_models.generation.generator import Generator
from pallas_attn_models.generation.sampling import Sampling
from pallas_attn_models.generation.speculation import DraftModel, PromptLookup
from pallas_attn_models.training import train
from tests import tolerances
from tests.attention_check import assert_same_bits
from tests.x64_check import assert_same_with_the_flag, normal, wide_equations

CONFIG = DecoderConfig(
    vocab_size=50,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    rope=RopeConfig(type="llama3", factor=8.0, original_max_position_embeddings=64),
    eos_token_ids=(7,),
)
TOKENS = np.random.default_rng(0).integers(8, 50, (2, 12)).astype(np.int32)


def make_model() -> Decoder:
    model = Decoder(CONFIG, rngs=nnx.Rngs(3), implementation="xla", block_sizes=pa.BlockSizes(16, 16))
    nnx.update(model, jax.tree.map(lambda x: x * 8.0 if x.ndim == 2 else x, nnx.state(model)))
    return model


def test_weights_are_the_same():
    assert_same_with_the_flag(lambda: nnx.state(make_model()))


def test_a_decoder_has_no_wide_number():
    """Training, packed, and a call with caches of two kinds."""
    graph, weights = nnx.split(make_model())

    def loss(weights, tokens):
        return nnx.merge(graph, weights)(tokens, segment_ids=tokens // 20).logits.sum()

    assert wide_equations(jax.grad(loss), weights, TOKENS) == []

    def cached(weights, tokens, rows):
        model = nnx.merge(graph, weights)
        caches = model.init_caches(
            batch_size=2, capacity=32, policy=(pa.caches.Dense(), pa.caches.H2O(4)), storage=pa.caches.Int8()
        )
        out = model(tokens, caches=caches)
        return out, model(tokens[:1, :1], caches=out.caches, rows=rows)

    assert wide_equations(cached, weights, TOKENS, np.array([1], np.int32)) == []


def test_a_decoder_gives_the_same_for_integers_of_64_bits():
    graph, weights = nnx.split(make_model())
    call = jax.jit(lambda *x: nnx.merge(graph, x[0])(x[1], x[2], segment_ids=x[3]).logits)
    arguments = TOKENS, np.arange(12, dtype=np.int32)[None], TOKENS // 20
    expected = call(weights, *arguments)
    with jax.enable_x64(True):
        wide = [jnp.asarray(x, jnp.int64) for x in arguments]
        assert_same_bits(call(weights, *wide), expected)


SPECULATIONS = {
    "none": lambda: None,
    "lookup": lambda: PromptLookup(4, 3),
    "tree": lambda: PromptLookup(3, 2, num_candidates=2),
    "draft model": lambda: DraftModel(make_model(), 3),
}
PROMPTS = [[9, 10, 11, 12, 9, 10], [20, 21, 22], [*range(10, 45)], [11, 12, 13]]
SAMPLINGS = [
    Sampling(max_new_tokens=9, repetition_penalty=1.2, presence_penalty=0.1, min_new_tokens=2, top_logprobs=2),
    Sampling(max_new_tokens=9, temperature=1.0, top_k=10, seed=1, logit_bias={5: 1.0}),
    Sampling(max_new_tokens=9, temperature=0.7, top_p=0.9, seed=2**32 - 1),
    Sampling(max_new_tokens=9, temperature=1.3, top_k=20, top_p=0.8, min_p=0.01, seed=3),
]


def make_generator(speculation: str = "none") -> Generator:
    return Generator(make_model(), batch_size=3, capacity=64, prefill_chunk=16, speculation=SPECULATIONS[speculation]())


@pytest.mark.parametrize("speculation", SPECULATIONS)
def test_the_executables_of_a_generator_have_no_wide_number(speculation):
    engine = make_generator(speculation)._engine
    arguments = engine._weights(), engine._new_state()
    assert wide_equations(engine._prefill, *arguments, engine.empty_batch()) == []
    assert wide_equations(engine._decode, *arguments, np.int32(3), np.bool_(False)) == []
    assert wide_equations(engine._score, *arguments, engine.empty_batch()) == []


@pytest.mark.parametrize(
    "speculation", [name if name == "lookup" else pytest.param(name, marks=pytest.mark.slow) for name in SPECULATIONS]
)
def test_a_generator_gives_the_same(speculation):
    """Greedy and random tokens, log-probabilities, counters; and two executables under the flag, too."""

    def generate():
        generator = make_generator(speculation)
        result = generator.generate(PROMPTS, SAMPLINGS, negative_prompts=[[9, 30]] * 4, guidance_scale=1.5)
        assert generator.compile_counts == {"prefill": 1, "decode": 1}
        stats = result.stats
        counts = stats.new_tokens, stats.kv_blocks_visited, stats.kv_blocks_total, stats.turns, stats.accepted
        return result.tokens, result.logprobs, result.finish_reasons, counts

    without = generate()
    with jax.enable_x64(True):
        assert generate() == without


def test_a_cached_decoder_gives_the_same():
    step = nnx.jit(lambda decoder, tokens: decoder(tokens).logits)

    def run():
        decoder = CachedDecoder(make_model(), batch_size=2, capacity=32)
        first = step(decoder, TOKENS[:, :5])
        decoder.truncate(np.array([3, 4]))
        decoder.fork(np.array([1, 1]))
        return first, step(decoder, TOKENS[:, 5:10]), decoder.next_positions, nnx.state(decoder.cache)

    assert_same_with_the_flag(run)


def test_a_checkpoint_is_the_same(tmp_path):
    def saved_and_loaded(name: str):
        save_hf(make_model(), tmp_path / name)
        return nnx.state(load_hf(tmp_path / name, dtype=jnp.bfloat16))

    without = saved_and_loaded("without")
    with jax.enable_x64(True):
        assert_same_bits(saved_and_loaded("with"), without)


def test_modules_of_flax_give_the_same():
    x = normal(2, 9, 32)

    def run():
        options = {"num_heads": 4, "in_features": 32, "rngs": nnx.Rngs(0), "dtype": jnp.float32}
        module = nnx.MultiHeadAttention(**options, decode=False, attention_fn=pa.flax.attention_fn(pa.masks.causal()))
        cached = nnx.MultiHeadAttention(**options, decode=True, attention_fn=pa.flax.attention_fn())
        cached.init_cache((2, 9, 32), jnp.float32)
        linens = linen.MultiHeadDotProductAttention(num_heads=4, attention_fn=pa.flax.attention_fn())
        weights = linens.init(jax.random.key(0), x)
        mask = linen.make_causal_mask(jnp.ones((2, 9), jnp.float32))
        return module(x), cached(x[:, :1]), cached(x[:, 1:2]), linens.apply(weights, x, mask=mask)

    # Flax's own decoding compares integers of two widths.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        assert_same_with_the_flag(run)


def test_the_loss_of_training_has_no_float64():
    """An index in optax has 64 bits."""
    graph, weights = nnx.split(train.new_model(0))

    def gradients(weights, batch):
        return nnx.grad(train.loss_and_accuracy, has_aux=True)(nnx.merge(graph, weights), batch)

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        found = wide_equations(gradients, weights, next(train.batches(train.PHASES, 0)))
    assert [equation for equation in found if "f64" in equation] == []


@pytest.mark.slow
def test_training_runs():
    """The loss is the same to the bit; optax computes learning rates and corrections in float64."""
    phases = train.scaled(train.PHASES, 3)

    def run():
        model = train.new_model(0)
        optimizer = nnx.Optimizer(model, train.optimizer(3), wrt=nnx.Param)
        losses = [train.train_step(model, optimizer, batch)[0] for batch in list(train.batches(phases, 0))[:2]]
        assert {x.dtype for x in jax.tree.leaves(nnx.state(model))} == {jnp.dtype("float32")}
        return losses

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        without = run()
        with jax.enable_x64(True):
            with_it = run()
    assert_same_bits(with_it[0], without[0])
    np.testing.assert_allclose(with_it[1], without[1], rtol=0, atol=tolerances.TRAINING_LOSS)


def test_the_self_check_of_the_command_line_is_the_same():
    # A separate jit per run, because the arguments do not depend on the flag.
    assert_same_with_the_flag(lambda: jax.jit(lambda: doctor._small_attention("xla"))())
