"""Generator: exactly two executables, independent rows, and the tokens of a plain loop."""

import dataclasses
import math
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerances
from flax import nnx

import pallas_attn as pa
from pallas_attn_models.decoder.config import DecoderConfig
from pallas_attn_models.decoder.decoder import Decoder
from pallas_attn_models.generation import steps
from pallas_attn_models.generation.generator import Generator
from pallas_attn_models.generation.sampling import Limits, Sampling, SamplingArrays, sample
from pallas_attn_models.generation.state import Counters

EOS = 7
BATCH, CAPACITY, CHUNK, KV_BLOCK = 3, 48, 16, 8
CONFIG = DecoderConfig(
    vocab_size=50,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    eos_token_ids=(EOS,),
)
ONE_EACH = {"prefill": 1, "decode": 1}


def make_model() -> Decoder:
    """Wide weights: uneven attention and a clear most likely token."""
    model = Decoder(CONFIG, rngs=nnx.Rngs(3), implementation="xla", block_sizes=pa.BlockSizes(CHUNK, KV_BLOCK))
    nnx.update(model, jax.tree.map(lambda x: x * 8.0 if x.ndim == 2 else x, nnx.state(model)))
    return model


@pytest.fixture(scope="module")
def generator():
    """Shared by the tests of this file. Tracing one of its functions a second time is an error."""
    chex.clear_trace_counter()  # counts by name, across test modules
    with pytest.MonkeyPatch.context() as patch:
        for name in ("prefill", "decode"):
            patch.setattr(steps, name, chex.assert_max_traces(getattr(steps, name), n=1))
        generator = Generator(make_model(), batch_size=BATCH, capacity=CAPACITY, prefill_chunk=CHUNK)
    assert generator.compile_counts == {"prefill": 0, "decode": 0}
    assert generator.warmup() > 0
    yield generator
    assert generator.compile_counts == ONE_EACH


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng([seed, length]).integers(10, CONFIG.vocab_size, length).tolist()


@pytest.fixture(scope="module")
def plain_loop(generator):
    """Greedy continuation that recomputes the whole sequence for every token, without caches or Generator."""
    graph, weights = nnx.split(generator.model)

    @jax.jit
    def last_logprobs(tokens, length):
        positions = jnp.arange(CAPACITY, dtype=jnp.int32)[None]
        logits = nnx.merge(graph, weights)(tokens, jnp.where(positions < length, positions, -1)).logits
        return jax.nn.log_softmax(logits[0, length - 1])

    def run(prompt: list[int], count: int) -> tuple[list[int], list[float]]:
        tokens, logprobs = list(prompt), []
        for _ in range(count):
            padded = np.zeros((1, CAPACITY), np.int32)
            padded[0, : len(tokens)] = tokens
            row = np.asarray(last_logprobs(padded, np.int32(len(tokens))))
            tokens.append(int(row.argmax()))
            logprobs.append(float(row.max()))
        return tokens[len(prompt) :], logprobs

    return run


# --- the tokens ---


def test_unequal_prompts_together_and_alone_give_the_tokens_of_a_plain_loop(generator, plain_loop):
    prompts = [prompt_of(length) for length in (1, 15, 16, 17, 31, 40)]
    sampling = Sampling(max_new_tokens=8)
    for first in range(0, len(prompts), BATCH):
        together = generator.generate(prompts[first : first + BATCH], sampling)
        for row, prompt in enumerate(prompts[first : first + BATCH]):
            alone = generator.generate([prompt], sampling)
            tokens, logprobs = plain_loop(prompt, 8)
            assert EOS not in tokens, "chosen so that no row ends early"
            assert together.tokens[row] == alone.tokens[0] == tokens
            np.testing.assert_allclose(together.logprobs[row], logprobs, rtol=0, atol=tolerances.LOGPROBS)


@pytest.mark.parametrize(
    "sampling", [Sampling(max_new_tokens=12), Sampling(12, temperature=1.3, top_k=20, seed=4)], ids=str
)
@pytest.mark.parametrize("row", range(BATCH))
def test_a_row_is_bitwise_the_same_whatever_the_other_rows_hold(generator, sampling, row):
    prompt, results = prompt_of(13), []
    for seed, others in ((1, (1, 1)), (2, (47, 30)), (3, (14, 2))):
        prompts = [prompt_of(length, seed) for length in others]
        samplings = [Sampling(30), Sampling(5, temperature=2.0, top_p=0.5, seed=seed)]
        prompts.insert(row, prompt)
        samplings.insert(row, sampling)
        results.append((generator.generate(prompts, samplings), row))
    results.append((generator.generate([prompt], sampling), 0))
    tokens = {tuple(result.tokens[at]) for result, at in results}
    logprobs = {tuple(result.logprobs[at]) for result, at in results}
    assert len(tokens) == len(logprobs) == 1
    assert len(*tokens) >= 8


def test_a_seed_decides_and_nothing_else(generator):
    def tokens(seed: int, **settings) -> list[int]:
        return generator.generate([prompt_of(5)], Sampling(20, temperature=1.5, seed=seed, **settings)).tokens[0]

    assert tokens(1) == tokens(1)
    assert len({tuple(tokens(seed)) for seed in range(8)}) == 8
    assert tokens(1, top_k=1) == generator.generate([prompt_of(5)], Sampling(20)).tokens[0]


def test_the_random_stream_counts_the_new_tokens(generator):
    """So hot that only the noise matters, which depends on seed and index alone."""
    hot = Sampling(16, temperature=1e30, seed=10)
    logits = jnp.zeros((16, CONFIG.vocab_size), jnp.float32)
    settings = SamplingArrays.stack([hot] * 16, limits=Limits(), vocab_size=CONFIG.vocab_size)
    counts = jnp.zeros((16, CONFIG.vocab_size), jnp.int32)
    expected = sample(logits, settings, counts, jnp.arange(16, dtype=jnp.int32)).tokens
    assert EOS not in expected
    for length in (3, 20):
        assert generator.generate([prompt_of(1), prompt_of(length)], [Sampling(2), hot]).tokens[1] == expected.tolist()


def test_weights_are_read_when_a_run_starts(generator):
    sampling = Sampling(10)
    before = generator.generate([prompt_of(6)], sampling)
    table = generator.model.embedding.table
    old = table[...]
    table.set_value(jnp.flip(old, 0))
    try:
        assert generator.generate([prompt_of(6)], sampling).tokens != before.tokens
    finally:
        table.set_value(old)
    assert generator.generate([prompt_of(6)], sampling).tokens == before.tokens


# --- two executables ---


def test_no_call_compiles_again(generator, compilations):
    rng = np.random.default_rng(0)
    generator.generate([prompt_of(4)], Sampling(2))
    compilations.clear()
    for call in range(24):
        lengths = rng.integers(1, CAPACITY, rng.integers(1, BATCH + 1)).tolist()
        lengths[0] = {0: 1, 1: CAPACITY - 1}.get(call, lengths[0])
        samplings = [
            Sampling(
                max_new_tokens=int(rng.integers(1, 40)),
                temperature=float(rng.choice([0.0, 0.7, 1.0, 2])),
                top_k=int(rng.choice([0, 1, 5, 1000])),
                top_p=float(rng.choice([0.2, 0.9, 1])),
                seed=int(rng.integers(2**32)),
            )
            for _ in lengths
        ]
        prompts = [(list, tuple, np.array)[call % 3](prompt_of(length, call)) for length in lengths]
        stop = ((), 11, [12, 13], np.array([14]), range(20, 30))[call % 5]
        result = generator.generate(prompts, samplings if call % 4 else samplings[0], stop)
        assert len(result.tokens) == len(result.logprobs) == len(result.finish_reasons) == len(lengths)
        assert [len(row) for row in result.tokens] == [len(row) for row in result.logprobs]
        assert result.stats.prompt_tokens == sum(lengths)
        assert result.stats.new_tokens == sum(map(len, result.tokens))
        assert result.stats.executables == 2
        assert result.stats.compile_seconds == 0
        assert generator.compile_counts == ONE_EACH
    assert not compilations


class Interrupted:
    """Runs a jitted function, which consumes the donated state, and is interrupted before returning the new one."""

    def __init__(self, jitted):
        self.jitted = jitted
        self._cache_size = jitted._cache_size

    def __call__(self, *arguments):
        self.jitted(*arguments)
        raise KeyboardInterrupt


@pytest.mark.parametrize("name", ["_prefill", "_decode"])
def test_an_interrupt_compiles_nothing(generator, monkeypatch, name):
    expected = generator.generate([prompt_of(9)], Sampling(10)).tokens
    with monkeypatch.context() as patch:
        patch.setattr(generator._engine, name, Interrupted(getattr(generator._engine, name)))
        with pytest.raises(KeyboardInterrupt):
            generator.generate([prompt_of(9)], Sampling(10))
    assert generator.generate([prompt_of(9)], Sampling(10)).tokens == expected
    assert generator.compile_counts == ONE_EACH


def test_returning_to_python_often_compiles_nothing(generator):
    prompts, samplings = [prompt_of(3), prompt_of(20)], [Sampling(17), Sampling(9, temperature=1.0, seed=2)]
    expected = generator.generate(prompts, samplings)
    handles = [generator.submit(prompt, sampling) for prompt, sampling in zip(prompts, samplings, strict=True)]
    while generator.step(4):
        pass
    assert [handle.result().tokens for handle in handles] == expected.tokens
    assert generator.compile_counts == ONE_EACH


def test_caches_are_updated_in_place():
    """A model with committed weights, as after ``jax.device_put``, compiles equally often."""
    capacity = 9984  # a size that no other array has
    model = Decoder(dataclasses.replace(CONFIG, num_layers=1), rngs=nnx.Rngs(0), implementation="xla")
    nnx.update(model, jax.device_put(nnx.state(model), jax.devices()[0]))
    generator = Generator(model, batch_size=4, capacity=capacity, prefill_chunk=CHUNK)
    for length in (3, 30):
        generator.generate([prompt_of(length)], Sampling(3))
    assert generator.compile_counts == ONE_EACH

    engine = generator._engine
    weights, state = engine._weights(), engine.abstract_state()
    for lowered in (
        engine._prefill.lower(weights, state, engine.empty_batch()),
        engine._decode.lower(weights, state, np.int32(1), np.bool_(False)),
    ):
        compiled = lowered.compile()
        text = compiled.as_text()
        assert state.caches[0].key.shape == (4, capacity, 2, 8)
        assert f"f32[4,{capacity},2,8]" in text
        assert "input_output_alias=" in text.partition("\n")[0]
        assert not re.search(rf"= \w+\[4,{capacity},2,8\]\S* copy\(", text)
        memory = compiled.memory_analysis()
        assert memory.alias_size_in_bytes >= sum(cache.nbytes for cache in state.caches)
        # Prefill copies rows for samples that share a prompt, one at a time.
        assert memory.temp_size_in_bytes < math.prod(state.caches[0].key.shape) * 4


# --- when a row ends ---


def test_rows_end_for_their_own_reason(generator):
    prompts = [prompt_of(5), prompt_of(CAPACITY - 6), prompt_of(20)]
    free = generator.generate(prompts, Sampling(40))
    assert free.finish_reasons[1] == "capacity"
    assert len(free.tokens[1]) == 6
    last = next(index for index in range(3, 40) if free.tokens[0][index] not in free.tokens[0][:index])
    stop = free.tokens[0][last]
    assert stop not in free.tokens[2][:4]

    result = generator.generate(prompts, [Sampling(40), Sampling(40), Sampling(4)], stop)
    assert result.finish_reasons[0] == "stop"
    assert result.tokens[0] == free.tokens[0][:last]
    assert (result.finish_reasons[2], result.tokens[2]) == ("length", free.tokens[2][:4])


def test_the_models_own_end_token_ends_a_row(generator):
    seeds = (generator.generate([prompt_of(5)], Sampling(40, temperature=4.0, seed=seed)) for seed in range(50))
    ended = next(result for result in seeds if result.finish_reasons == ["stop"])
    assert EOS not in ended.tokens[0]
    assert len(ended.tokens[0]) < 40


def test_an_end_token_spends_budget_and_room_like_any_other(generator):
    prompt = prompt_of(CAPACITY - 2)
    first, second = generator.generate([prompt], Sampling(2)).tokens[0]
    assert first != second
    for budget, stop, count, reason in (
        (1, (), 1, "length"),
        (2, (), 2, "length"),
        (3, (), 2, "capacity"),
        (1, first, 0, "stop"),
        (2, second, 1, "stop"),
        (3, [second], 1, "stop"),
    ):
        result = generator.generate([prompt], Sampling(budget), stop)
        assert (result.tokens[0], result.finish_reasons) == ([first, second][:count], [reason])
        assert result.stats.new_tokens == count


def test_the_longest_prompt_has_room_for_one_token(generator):
    result = generator.generate([prompt_of(CAPACITY - 1)], Sampling(5))
    assert (len(result.tokens[0]), result.finish_reasons) == (1, ["capacity"])


def test_the_cache_of_a_finished_row_does_not_grow(generator):
    generator.submit(prompt_of(3), Sampling(1))
    running = generator.submit(prompt_of(4), Sampling(12))
    generator.step(6)
    for cache in generator._engine._state.caches:
        # The first row is finished and empty, the third one free. The cache lacks the newest token.
        assert cache.lengths.tolist() == [0, 4 + 5, 0]
        assert (cache.positions[0] == -1).all()
        assert not cache.overflowed.any()
    running.result()
    for cache in generator._engine._state.caches:
        assert cache.lengths.tolist() == [0, 0, 0]


# --- statistics ---


def test_visited_blocks_are_counted(generator):
    lengths, budgets = (5, 33), (9, 4)
    result = generator.generate([prompt_of(length) for length in lengths], [Sampling(budget) for budget in budgets])
    visited = total = 0
    for length, budget in zip(lengths, budgets, strict=True):
        prefill = [min(length - 1, start + CHUNK) for start in range(0, length - 1, CHUNK)]
        decode = range(length, length + budget)
        visited += sum(-(-seen // KV_BLOCK) for seen in (*prefill, *decode))
        total += (len(prefill) + len(decode)) * (CAPACITY // KV_BLOCK)
    assert result.finish_reasons == ["length"] * 2
    assert result.stats.kv_blocks_visited == CONFIG.num_layers * visited
    assert result.stats.kv_blocks_total == CONFIG.num_layers * total


def test_a_count_goes_beyond_32_bits():
    counters = Counters.zero()
    for _ in range(20):
        counters = counters.plus(row_steps=jnp.int32(2**30 - 1), drafted=jnp.int32(3))
    expected = dict.fromkeys(Counters.NAMES, 0) | {"row_steps": 20 * (2**30 - 1), "drafted": 60}
    assert Counters.values(np.asarray(counters.digits)) == expected


def test_a_profile_names_the_parts_of_a_step(generator):
    engine = generator._engine
    text = engine._decode.lower(engine._weights(), engine.abstract_state(), np.int32(1), np.bool_(False)).as_text(
        debug_info=True
    )
    for name in ("layer_1/attention/cache", "layer_0/mlp", "block_masks", "head", "sampler"):
        assert f"{name}/" in text


def test_loops_in_graphs_change_nothing_without_a_gpu(generator):
    options = {"batch_size": BATCH, "capacity": CAPACITY, "prefill_chunk": CHUNK}
    other = Generator(generator.model, **options, graph_loops=True)
    assert other.generate([prompt_of(5)], Sampling(4)).tokens == generator.generate([prompt_of(5)], Sampling(4)).tokens
    with pytest.raises(TypeError, match="graph_loops: expected a bool, got"):
        Generator(generator.model, **options, graph_loops=1)


def test_figures_of_a_run(generator):
    stats = generator.generate([prompt_of(5)], Sampling(8)).stats
    assert stats.prefill_seconds > 0
    assert stats.decode_seconds > 0
    assert stats.tokens_per_second == 8 / (stats.prefill_seconds + stats.decode_seconds)


# --- errors before anything runs ---


@pytest.mark.parametrize(
    ("prompts", "error", "message"),
    [
        ([], ValueError, "prompts: expected at least one prompt, got none"),
        ([[1], []], ValueError, r"prompts\[1\]: expected at least one token, got none"),
        ([[1] * 48], ValueError, r"prompts\[0\]: expected fewer tokens than max_length=48 .*, got 48"),
        ([[1], [2, 50]], ValueError, r"prompts\[1\]\[1\]: expected a token in \[0, vocab_size=50\), got 50"),
        ([[1], [-1]], ValueError, r"prompts\[1\]\[0\]: expected a token in \[0, vocab_size=50\), got -1"),
        ([[1, 2.0]], TypeError, r"prompts\[0\]\[1\]: expected a token id, an int, got 2\.0"),
        ([[True]], TypeError, r"prompts\[0\]\[0\]: expected a token id, an int, got True"),
        (["17+25="], TypeError, r"prompts\[0\]: expected a sequence of token ids, got str"),
        ([1, 2], TypeError, r"prompts\[0\]: expected a sequence of token ids, got int"),
        ([np.ones((2, 2), np.int32)], TypeError, r"prompts\[0\]\[0\]: expected a token id, an int, got \[1, 1\]"),
        (7, TypeError, "prompts: expected a sequence of prompts, got int"),
    ],
)
def test_prompts_that_do_not_fit(generator, prompts, error, message):
    with pytest.raises(error, match=message):
        generator.generate(prompts)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sampling": [Sampling()]}, ValueError, "sampling: expected one, or one for each of 2 prompts, got 1"),
        ({"sampling": [Sampling(), 0.7]}, TypeError, "sampling: expected a Sampling or one per prompt, got float"),
        ({"sampling": 0.7}, TypeError, "sampling: expected a Sampling or one per prompt, got float"),
        ({"stop": 50}, ValueError, r"stop: expected tokens in \[0, vocab_size=50\), got 50"),
        ({"stop": [3, -2]}, ValueError, r"stop.*expected .*, got -2"),
        ({"stop": "\n"}, ValueError, "stop: expected .*, got "),
        ({"stop": [[3] * 9]}, ValueError, "stop: expected at most limits.stop_length=8 tokens in a sequence, got 9"),
        ({"negative_prompts": [[1]]}, ValueError, "negative_prompts: expected one.* 2 prompts, got 1"),
        ({"negative_prompts": [[1], []]}, ValueError, r"negative_prompts\[1\]: expected at least one token, got none"),
        ({"guidance_scale": 1.5}, ValueError, "guidance_scale: expected 1 without negative_prompts, got 1.5"),
        (
            {"negative_prompts": [[1], [2]], "guidance_scale": [2, -1]},
            ValueError,
            "guidance_scale: expected a finite number of at least 0, got -1",
        ),
        *(
            (
                {"negative_prompts": [[1], [2]], "guidance_scale": scale},
                ValueError,
                "guidance_scale: expected a finite number of at least 0, got ",
            )
            for scale in (1e39, 10**400, 10**5000, 1e-50, float("nan"), float("inf"))
        ),
        (
            {"num_samples": 10**400},
            ValueError,
            "num_samples: expected at most batch_size=3 rows for a prompt, got 1000",
        ),
        ({"num_samples": 0}, ValueError, "num_samples: expected an int of at least 1, got 0"),
        ({"num_samples": 4}, ValueError, "num_samples: expected at most batch_size=3 rows for a prompt, got 4"),
        (
            {"num_samples": 2, "negative_prompts": [[1], [2]]},
            ValueError,
            r"num_samples: expected at most batch_size=3 rows for a prompt, got 4 \(two for a guided sample\)",
        ),
    ],
)
def test_options_that_do_not_fit(generator, options, error, message):
    with pytest.raises(error, match=message):
        generator.generate([[1], [2]], **options)


@pytest.mark.parametrize("name", ["batch_size", "capacity", "prefill_chunk", "max_queue", "prefill_rows"])
@pytest.mark.parametrize("size", [0, 1.5, True])
def test_sizes_that_do_not_fit(generator, name, size):
    sizes = {"batch_size": 1, "capacity": 8, "prefill_chunk": 4, name: size}
    with pytest.raises(ValueError, match=f"{name}: expected an int of at least 1, got {size}"):
        Generator(generator.model, **sizes)


@pytest.mark.parametrize("name", ["batch_size", "capacity", "max_length"])
@pytest.mark.parametrize("size", [2**31, 10**400])
def test_sizes_beyond_32_bits(generator, name, size):
    with pytest.raises(ValueError, match=f"{name}: expected an int of at most 1073741824, got {str(size)[:60]}"):
        Generator(generator.model, **{"batch_size": 1, "capacity": 8, name: size})


def test_no_capacity_for_any_layer(generator):
    with pytest.raises(ValueError, match="capacity: expected an int of at least 1, or one per layer, got none"):
        Generator(generator.model, batch_size=1, capacity=[])


def test_a_model_of_another_kind():
    with pytest.raises(TypeError, match="model: expected a Decoder, got str"):
        Generator("path/to/model", batch_size=1, capacity=8)


def test_a_capacity_that_leaves_no_room_for_a_prompt(generator):
    with pytest.raises(ValueError, match=r"max_length=1 \(by default the capacity\), to leave room"):
        Generator(generator.model, batch_size=1, capacity=1).generate([[1]])
