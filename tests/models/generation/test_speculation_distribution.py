"""Speculation: common random numbers preserve the distribution; the acceptance rate matches theory."""

import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from scipy import stats

from pallas_attn_models import Decoder, Generator, Sampling
from pallas_attn_models.generation.sampling import Limits, SamplingArrays, sample
from pallas_attn_models.generation.speculation import DraftModel
from tests import tolerances
from tests.models.speculations import SMALLER, make_model


def agreement(p: np.ndarray, q: np.ndarray) -> float:
    """The probability that log p + g and log q + g have the same argmax (arXiv:1809.04052, definition 1)."""
    with np.errstate(divide="ignore", invalid="ignore"):
        largest = np.fmax(p[None] / p[:, None], q[None] / q[:, None]).sum(1)
    return float(np.where((p > 0) & (q > 0), 1 / largest, 0).sum())


def distance(p: np.ndarray, q: np.ndarray) -> float:
    return float(np.abs(p - q).sum() / 2)


@example(1138, 3, 2.5)  # almost disjoint
@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.floats(0.1, 5))
def test_the_bounds_of_the_agreement(seed, size, spread):
    rng = np.random.default_rng(seed)
    p, q = (np.exp(spread * rng.standard_normal(size)) * (rng.random(size) < 0.8) + 1e-9 for _ in "pq")
    p, q = p / p.sum(), q / q.sum()
    d = distance(p, q)
    found = agreement(p, q) * (1 + 1e-12)
    assert found >= (p * q).sum()
    overlap = np.minimum(p, q).sum()  # 1 - d, without its cancellation
    assert found >= overlap / (1 + d)
    assert found <= overlap * (1 + 1e-9)


PAIRS = {
    "near": ([0.5, 0.25, 0.15, 0.1], [0.4, 0.3, 0.2, 0.1]),
    "far": ([0.7, 0.1, 0.1, 0.1, 0.0], [0.1, 0.2, 0.3, 0.3, 0.1]),
}


@pytest.mark.parametrize("name", PAIRS)
def test_common_random_numbers_agree_more_often_than_independent_ones(name):
    number = 40_000
    p, q = (np.array(x) for x in PAIRS[name])
    limits = Limits(logit_bias=0, stop_sequences=0, top_logprobs=0)

    def drawn(probabilities: np.ndarray, first_seed: int) -> np.ndarray:
        settings = [Sampling(temperature=1.0)] * number
        arrays = SamplingArrays.stack(settings, limits=limits, vocab_size=len(p))
        arrays = dataclasses.replace(arrays, seed=np.arange(first_seed, first_seed + number, dtype=np.uint32))
        with np.errstate(divide="ignore"):
            logits = np.tile(np.log(probabilities).astype(np.float32), (number, 1))
        counts, step = np.zeros((number, len(p)), np.int32), np.full(number, 5, np.int32)
        return np.asarray(jax.jit(sample)(logits, arrays, counts, step).tokens)

    mine = drawn(p, 0)
    common, independent = int((mine == drawn(q, 0)).sum()), int((mine == drawn(q, number)).sum())
    for found, probability in ((common, agreement(p, q)), (independent, float((p * q).sum()))):
        assert stats.binomtest(found, number, probability).pvalue > tolerances.CHI_SQUARE_LEVEL
    assert independent < common
    assert stats.binomtest(common, number, 1 - distance(p, q), "less").pvalue < tolerances.CHI_SQUARE_LEVEL


def test_the_distribution_of_the_output_and_of_the_acceptance():
    """20,000 seeds: two tokens; the acceptance rate of the first draft matches theory."""
    number, batch_size, temperature = 20_000, 500, 0.8
    config = dataclasses.replace(SMALLER, vocab_size=6, eos_token_ids=())
    models = [make_model(seed, config, wide=4.0) for seed in (3, 4)]
    prompt, sampling = [1, 4, 2, 5], Sampling(2, temperature=temperature)
    limits = Limits(logit_bias=0, stop_sequences=0, top_logprobs=0, stop_length=1)
    tokens, accepted = {}, 0
    for speculation in (None, DraftModel(models[1], 2)):
        sizes = {"batch_size": batch_size, "capacity": 16, "prefill_chunk": 16, "limits": limits}
        generator_ = Generator(models[0], speculation=speculation, **sizes)
        tokens[speculation is None] = []
        for first in range(0, number, batch_size):
            seeded = dataclasses.replace(sampling, seed=first)
            result = generator_.generate([prompt], seeded, num_samples=batch_size)
            tokens[speculation is None] += result.tokens
            accepted += result.stats.accepted
    assert tokens[True] == tokens[False]

    def probabilities(model: Decoder) -> np.ndarray:
        """The joint distribution of both tokens, [6, 6]."""
        after = np.array([[*prompt, token] for token in range(6)], np.int32)
        logits = np.asarray(model(after).logits, np.float64)[:, -2:] / temperature
        both = np.exp(logits - logits.max(-1, keepdims=True))
        both /= both.sum(-1, keepdims=True)
        return both[:, 0, :][np.arange(6), np.arange(6)][:, None] * both[:, 1]

    p, q = (probabilities(model) for model in models)
    counts = np.zeros((6, 6))
    np.add.at(counts, tuple(np.array(tokens[False]).T), 1)
    assert (p * number).min() >= 5
    assert stats.chisquare(counts.ravel(), number * p.ravel()).pvalue > tolerances.CHI_SQUARE_LEVEL
    p, q = p.sum(1), q.sum(1)
    assert stats.binomtest(accepted, number, agreement(p, q)).pvalue > tolerances.CHI_SQUARE_LEVEL
    assert (p * q).sum() < accepted / number < 1 - distance(p, q)
