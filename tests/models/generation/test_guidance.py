"""Classifier-free guidance: the logits of transformers' processor; other rows are unaffected."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pallas_attn_models import Generator, Limits, Sampling, load_hf
from pallas_attn_models.generation.sampling import SamplingArrays, count_new, count_prompt, sample
from pallas_attn_models.generation.token_step import _guided
from tests import tolerances
from tests.models.small_model import Ask, completions

CAPACITY, VOCAB_SIZE = 48, 96
FIXTURE = Path(__file__).parents[1] / "fixtures" / "gqa"
LIMITS = Limits(top_logprobs=VOCAB_SIZE)
# Shorter and longer than their prompts, of one token and of several chunks.
LENGTHS = [(9, 4), (1, 20), (30, 1), (16, 16), (8, 9)]
SCALES = [1.5, 0.0, 2.0, 0.5, 1.0]

run_sample = jax.jit(sample)


@pytest.fixture(scope="module")
def generator():
    """A Generator that reports the log-probabilities of all tokens."""
    model = load_hf(FIXTURE, dtype=jnp.float32)
    generator = Generator(model, batch_size=4, capacity=CAPACITY, prefill_chunk=8, limits=LIMITS)
    assert generator.model.config.vocab_size == VOCAB_SIZE
    return generator


@pytest.fixture(scope="module")
def last_logits(generator):
    """The model's logits after the last token, without a cache."""
    graph, weights = nnx.split(generator.model)

    @jax.jit
    def run(tokens, length):
        positions = jnp.arange(CAPACITY, dtype=jnp.int32)[None]
        return nnx.merge(graph, weights)(tokens, jnp.where(positions < length, positions, -1)).logits[0, length - 1]

    def last(tokens: list[int]) -> np.ndarray:
        padded = np.zeros((1, CAPACITY), np.int32)
        padded[0, : len(tokens)] = tokens
        return np.asarray(run(padded, np.int32(len(tokens))))

    return last


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng([seed, length]).integers(3, VOCAB_SIZE, length).tolist()


def asks(sampling: Sampling) -> list[Ask]:
    return [
        Ask(prompt_of(length), sampling, prompt_of(negative, 1), scale)
        for (length, negative), scale in zip(LENGTHS, SCALES, strict=True)
    ]


def together(generator: Generator, asks: list[Ask], **options):
    return completions(
        generator.generate(
            [ask.prompt for ask in asks],
            [ask.sampling for ask in asks],
            (),
            [ask.negative or [] for ask in asks],
            [ask.scale for ask in asks],
            **options,
        )
    )


def distributions(completion) -> np.ndarray:
    """Log-probabilities ``[T, V]`` of all tokens, at every step."""
    rows = np.full((len(completion.tokens), VOCAB_SIZE), np.nan, np.float32)
    for row, pairs in zip(rows, completion.top_logprobs, strict=True):
        for token, logprob in pairs:
            row[token] = logprob
    assert np.isfinite(rows).all()
    return rows


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(8, top_logprobs=VOCAB_SIZE),
        Sampling(8, repetition_penalty=1.7, frequency_penalty=0.5, top_logprobs=VOCAB_SIZE),
        Sampling(8, temperature=1.2, top_k=40, top_p=0.9, repetition_penalty=1.3, seed=3, top_logprobs=VOCAB_SIZE),
    ],
    ids=["greedy", "penalties", "random"],
)
def test_a_plain_loop_that_runs_both_prompts(generator, last_logits, sampling):
    """Penalties use the prompt but not the negative one, and both rows append the sampled token."""
    settings = SamplingArrays.stack(
        [sampling], limits=LIMITS, vocab_size=VOCAB_SIZE, eos_token_ids=generator.model.config.eos_token_ids
    )
    for ask, result in zip(asks(sampling), together(generator, asks(sampling)), strict=True):
        assert ask.negative is not None
        counts = jnp.zeros((1, VOCAB_SIZE), jnp.int32)
        counts = count_prompt(counts, jnp.array([ask.prompt], jnp.int32), jnp.ones((1, len(ask.prompt)), jnp.bool_))
        new: list[int] = []
        for step, actual in enumerate(distributions(result)):
            ours, theirs = (log_softmax(last_logits(prompt + new)) for prompt in (ask.prompt, ask.negative))
            guided = theirs + ask.scale * (ours - theirs)
            np.testing.assert_allclose(actual, log_softmax(guided), rtol=0, atol=tolerances.LOGPROBS)
            drawn = run_sample(jnp.float32(guided[None]), settings, counts, jnp.array([step], jnp.int32)).tokens
            new += drawn.tolist()
            counts = count_new(counts, drawn, jnp.ones(1, jnp.bool_))
        assert new == result.tokens
        assert len(new) == 8 or result.finish_reason == "stop"
        chosen = distributions(result)[np.arange(len(new)), new]
        np.testing.assert_array_equal(chosen, np.array(result.logprobs, np.float32))


def test_the_processor_of_transformers(generator, last_logits):
    """The distribution of transformers' processor with this model, at every step."""
    torch = pytest.importorskip("torch", reason="compares with transformers' own processor")
    transformers = pytest.importorskip("transformers", reason="compares with transformers' own processor")

    class Behind:
        """The model interface of the processor: the logits after the last token."""

        def __init__(self):
            self.tokens: list[int] = []

        def __call__(self, input_ids, attention_mask=None, **cache):
            # transformers 5.24 passes the model's `cache` output back as `cache=`; before, `past_key_values`.
            assert set(cache) <= {"use_cache", "cache", "past_key_values"}
            self.tokens += input_ids[0].tolist()
            logits = torch.tensor(last_logits(self.tokens))[None, None]
            return transformers.modeling_outputs.CausalLMOutputWithPast(logits=logits)

    sampling = Sampling(8, top_logprobs=VOCAB_SIZE)
    for ask, result in zip(asks(sampling), together(generator, asks(sampling)), strict=True):
        if ask.scale == 1:
            continue
        processor = transformers.UnbatchedClassifierFreeGuidanceLogitsProcessor(
            ask.scale, Behind(), unconditional_ids=torch.tensor([ask.negative])
        )
        new: list[int] = []
        for token, actual in zip(result.tokens, distributions(result), strict=True):
            scores = processor(torch.tensor([ask.prompt + new]), torch.tensor(last_logits(ask.prompt + new))[None])
            expected = torch.log_softmax(scores[0], -1).numpy()
            np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerances.LOGPROBS)
            assert expected.argmax() == token
            new.append(token)


def test_the_same_logits_as_the_processor_of_transformers(generator):
    """Rows 0 and 2 have the partners 3 and 1."""
    torch = pytest.importorskip("torch", reason="compares with transformers' own processor")
    transformers = pytest.importorskip("transformers", reason="compares with transformers' own processor")
    logits = np.random.default_rng(0).normal(0, 3, (4, 50)).astype(np.float32)
    request = dataclasses.replace(
        generator._engine.empty_batch().request,
        partner=np.array([3, 1, 1, 3], np.int32),
        guidance=np.array([1.5, 1, 0.25, 1], np.float32),
    )
    guided = jax.jit(_guided)(logits, request)
    for row, partner in ((0, 3), (2, 1)):
        output = transformers.modeling_outputs.CausalLMOutputWithPast(logits=torch.tensor(logits[partner])[None, None])
        processor = transformers.UnbatchedClassifierFreeGuidanceLogitsProcessor(
            float(request.guidance[row]), lambda *_, output=output, **__: output, torch.tensor([[1]])
        )
        expected = processor(torch.tensor([[1]]), torch.tensor(logits[row])[None])[0].numpy()
        np.testing.assert_allclose(guided[row], expected, rtol=0, atol=tolerances.PROCESSED_LOGITS)
    for row in (1, 3):
        np.testing.assert_array_equal(guided[row], logits[row])


def test_generate_of_transformers(generator):
    torch = pytest.importorskip("torch", reason="compares with transformers' own generate()")
    transformers = pytest.importorskip("transformers", reason="compares with transformers' own generate()")
    model = transformers.LlamaForCausalLM.from_pretrained(FIXTURE, dtype=torch.float32).eval()
    for ask, result in zip(asks(Sampling(12)), together(generator, asks(Sampling(12))), strict=True):
        out = model.generate(
            torch.tensor([ask.prompt]),
            attention_mask=torch.ones((1, len(ask.prompt)), dtype=torch.long),
            negative_prompt_ids=torch.tensor([ask.negative]),
            generation_config=transformers.GenerationConfig(
                max_new_tokens=12, guidance_scale=ask.scale, pad_token_id=0, do_sample=False
            ),
        )
        assert out[0, len(ask.prompt) :].tolist()[: len(result.tokens)] == result.tokens
        assert len(result.tokens) == 12


def test_a_scale_of_one_is_no_guidance_and_zero_is_the_negative_prompt(generator):
    for (length, negative), temperature in zip(LENGTHS, (0.0, 1.0, 0.0, 1.0, 2.0), strict=True):
        sampling = Sampling(10, temperature=temperature, seed=5)
        prompt, other = prompt_of(length), prompt_of(negative, 1)
        (one,) = Ask(prompt, sampling, other, 1.0).generate(generator)
        (zero,) = Ask(prompt, sampling, other, 0.0).generate(generator)
        for result, alone in ((one, prompt), (zero, other)):
            (plain,) = Ask(alone, sampling).generate(generator)
            assert result.tokens == plain.tokens
            np.testing.assert_allclose(result.logprobs, plain.logprobs, rtol=0, atol=tolerances.PROCESSED_LOGITS)


def test_neighbors_are_unaffected(generator):
    """Guided and other requests in one batch give the same bits as alone."""
    mixed = [*asks(Sampling(10)), *(Ask(prompt_of(length, 2), Sampling(10, seed=length)) for length in (3, 20, 5, 30))]
    mixed[::2] = [Ask(ask.prompt, Sampling(10, 1.0), ask.negative, ask.scale) for ask in mixed[::2]]
    alone = [ask.generate(generator)[0] for ask in mixed]
    for order in (range(9), (5, 0, 6, 1, 7, 2, 8, 3, 4), range(8, -1, -1)):
        handles = [mixed[index].submit(generator) for index in order]
        assert [handle.result() for handle in handles] == [alone[index] for index in order]


def test_both_rows_are_freed(generator):
    """Requests end, fill the row of their negative prompt, or are cancelled while queued, prefilling or running."""
    long = prompt_of(CAPACITY - 3, 1)
    (result,) = Ask(prompt_of(5), Sampling(20), long, 1.5).generate(generator)
    assert (len(result.tokens), result.finish_reason) == (3, "capacity")
    for rounds in range(4):
        guided = [Ask(prompt_of(20), Sampling(9), prompt_of(12, 1), 1.5).submit(generator) for _ in range(3)]
        for _ in range(rounds):
            generator.step(1)
        for handle in guided:
            handle.cancel()
        assert sorted(generator._scheduler._free_rows) == [0, 1, 2, 3]
    generator.run()
    for cache in generator._engine._state.caches:
        assert not cache.lengths.any()
    assert generator.compile_counts == {"prefill": 1, "decode": 1}
