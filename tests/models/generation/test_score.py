"""Scores: the log-probabilities of the model without a cache, from their own executable, beside other requests."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pallas_attn_models import Generator, Sampling, load_hf
from tests import tolerances

CAPACITY, CHUNK, VOCAB_SIZE = 48, 8, 96
ALL = {"prefill": 1, "decode": 1, "score": 1}
FIXTURE = Path(__file__).parents[1] / "fixtures" / "gqa"
# One token; one and two chunks, and lengths beside them; a full row.
LENGTHS = (1, 2, 7, 8, 9, 16, 17, 40, 47, 48)


@pytest.fixture(scope="module")
def generator():
    """A Generator whose first use is to score."""
    model = load_hf(FIXTURE, dtype=jnp.float32)
    generator = Generator(model, batch_size=3, capacity=CAPACITY, prefill_chunk=CHUNK, prefill_rows=2)
    generator.score([prompt_of(3)])
    assert generator.compile_counts["score"] == 1
    generator.generate([prompt_of(3)], Sampling(2))
    yield generator
    assert generator.compile_counts == ALL


@pytest.fixture(scope="module")
def logits_of(generator):
    """The model's logits after each token, without a cache."""
    graph, weights = nnx.split(generator.model)

    @jax.jit
    def run(tokens, length):
        positions = jnp.arange(CAPACITY, dtype=jnp.int32)[None]
        return nnx.merge(graph, weights)(tokens, jnp.where(positions < length, positions, -1)).logits[0]

    def logits_of(tokens: list[int]) -> np.ndarray:
        padded = np.zeros((1, CAPACITY), np.int32)
        padded[0, : len(tokens)] = tokens
        return np.asarray(run(padded, np.int32(len(tokens))))[: len(tokens)]

    return logits_of


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng([seed, length]).integers(3, VOCAB_SIZE, length).tolist()


@pytest.mark.parametrize("logits", [False, True])
def test_the_model_without_a_cache(generator, logits_of, logits):
    prompts = [prompt_of(length) for length in LENGTHS]
    scores = generator.score(prompts, logits=logits)
    for prompt, score in zip(prompts, scores, strict=True):
        expected = logits_of(prompt)
        logprobs = np.asarray(jax.nn.log_softmax(expected.astype(np.float64)))[np.arange(len(prompt) - 1), prompt[1:]]
        assert len(score.logprobs) == len(prompt) - 1
        np.testing.assert_allclose(score.logprobs, logprobs, rtol=0, atol=tolerances.CACHED_LOGITS)
        assert score.total == pytest.approx(logprobs.sum(), abs=len(prompt) * tolerances.CACHED_LOGITS)
        assert (score.logits is not None) == logits
        if score.logits is not None:
            assert isinstance(score.logits, np.ndarray)
            assert (score.logits.shape, score.logits.dtype) == ((len(prompt), VOCAB_SIZE), np.float32)
            np.testing.assert_allclose(score.logits, expected, rtol=0, atol=tolerances.CACHED_LOGITS)


def test_scores_equal_the_logprobs_of_generation(generator):
    prompt = prompt_of(12)
    result = generator.generate([prompt], Sampling(20, temperature=1.0, seed=4))
    (score,) = generator.score([prompt + result.tokens[0]])
    assert len(result.tokens[0]) > 5
    np.testing.assert_allclose(score.logprobs[11:], result.logprobs[0], rtol=0, atol=tolerances.CACHED_LOGITS)


def test_running_rows_are_undisturbed(generator, logits_of):
    """Scores occupy a row during prefill, queue for it like other requests, and free it."""
    samplings = [Sampling(20), Sampling(20, temperature=1.0, seed=3), Sampling(20, repetition_penalty=1.5)]
    prompts = [prompt_of(20, seed) for seed in range(3)]
    alone = [generator.generate([prompt], one) for prompt, one in zip(prompts, samplings, strict=True)]
    expected = generator.score([prompt_of(30)])
    for rounds in range(6):  # prefilling, running, with and without free rows
        for busy in (1, 2, 3):
            handles = [
                generator.submit(prompt, one) for prompt, one in zip(prompts[:busy], samplings[:busy], strict=True)
            ]
            for _ in range(rounds):
                generator.step(1)
            assert generator.score([prompt_of(30)] * 4) == expected * 4
            for handle, one in zip(handles, alone[:busy], strict=True):
                assert (handle.result().tokens, handle.logprobs) == (one.tokens[0], one.logprobs[0])
    generator.run()
    for cache in generator._engine._state.caches:
        assert not cache.lengths.any()
    assert sorted(generator._scheduler._free_rows) == [0, 1, 2]


def test_requests_change_no_executable(generator, compilations):
    generator.score([prompt_of(9)])
    compilations.clear()
    for length in LENGTHS:
        generator.score([prompt_of(length)] * 2)
    assert not compilations
    assert generator.compile_counts["score"] == 1


def test_an_interrupt_frees_the_rows(generator, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    expected = generator.score([prompt_of(20)])
    with monkeypatch.context() as patch:
        patch.setattr(generator._engine, "score", interrupted)
        with pytest.raises(KeyboardInterrupt):
            generator.score([prompt_of(20)] * 5)
    assert generator._scheduler.idle
    assert generator.score([prompt_of(20)]) == expected


@pytest.mark.parametrize(
    ("prompts", "error", "message"),
    [
        ([], ValueError, "prompts: expected at least one prompt, got none"),
        ([[3], []], ValueError, r"prompts\[1\]: expected at least one token, got none"),
        ([[3] * (CAPACITY + 1)], ValueError, rf"prompts\[0\]: expected .*{CAPACITY}.* got {CAPACITY + 1}"),
        ([[VOCAB_SIZE]], ValueError, rf"prompts\[0\]\[0\]: expected a token in \[0, vocab_size=96\), got {VOCAB_SIZE}"),
        ([3], TypeError, r"prompts\[0\]: expected a sequence of token ids, got int"),
    ],
)
def test_prompts_that_do_not_fit(generator, prompts, error, message):
    with pytest.raises(error, match=message):
        generator.score(prompts)
