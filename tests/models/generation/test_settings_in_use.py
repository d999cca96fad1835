"""The sampler without settings, which a batch takes if no row has one; and the log of its tokens."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_attn_models import Sampling
from pallas_attn_models.generation.sampling import Limits, SamplingArrays, most_likely, sample
from pallas_attn_models.generation.token_log import TokenLog, entry

B, V, LIMITS = 3, 40, Limits(top_logprobs=2)
STEP = jnp.array([0, 3, 9], jnp.int32)


def settings(*samplings: Sampling) -> SamplingArrays:
    return SamplingArrays.stack(samplings, limits=LIMITS, vocab_size=V, eos_token_ids=(1,))


def test_the_most_likely_tokens_are_those_of_the_sampler_without_settings():
    logits = np.random.default_rng(0).standard_normal((B, V)).astype(np.float32)
    logits[0, [5, 9]] = 7.0  # a tie
    logits[1, 3] = np.nan
    logits[2, 4] = np.inf
    plain = settings(*[Sampling(seed=4, max_new_tokens=99)] * B)
    assert not plain.in_use(STEP, V).any()
    expected = jax.jit(sample)(logits, plain, jnp.ones((B, V), jnp.int32), STEP)
    jax.tree.map(np.testing.assert_array_equal, jax.jit(most_likely)(logits, plain), expected)
    assert expected.valid.tolist() == [True, False, False]


@pytest.mark.parametrize(
    "setting",
    [
        {"temperature": 0.5},
        {"repetition_penalty": 1.1},
        {"presence_penalty": -0.5},
        {"frequency_penalty": 0.5},
        {"logit_bias": {3: 1.0}},
        {"forbidden_tokens": [V - 1]},
        {"top_logprobs": 1},
        {"min_new_tokens": 4},
    ],
    ids=lambda setting: next(iter(setting)),
)
def test_each_setting_that_changes_the_result_is_in_use(setting):
    used = settings(Sampling(), Sampling(**setting), Sampling()).in_use(STEP, V)
    assert used.tolist() == [False, True, False]


def test_settings_of_the_other_kind_are_not():
    """Those that need a temperature, and those that apply after the token is chosen."""
    plain = Sampling(top_k=3, top_p=0.5, min_p=0.1, seed=5, max_new_tokens=7, stop=(4, [5, 6]), min_new_tokens=3)
    assert settings(*[plain] * B).in_use(STEP, V).tolist() == [True, False, False], "until 3 new tokens"


def test_a_log_returns_what_was_written():
    rng = np.random.default_rng(1)
    top = settings(*[Sampling(top_logprobs=2)] * B)
    first = jnp.array([5, 0, 2], jnp.int32)
    log, steps = TokenLog.empty(first, width=4, top=2), []
    counts = jnp.zeros((B, V), jnp.int32)
    for number in range(3):
        sampled = sample(jnp.asarray(rng.standard_normal((B, V)), jnp.float32), top, counts, STEP)
        written = np.array([True, number != 1, False])
        log = log.plus(entry(sampled), jnp.asarray(written), first + number)
        steps.append((sampled, written))
    for name, x in log.fields().items():
        expected = np.zeros_like(x)
        for number, (sampled, written) in enumerate(steps):
            expected[written, number] = np.asarray(getattr(sampled, name))[written]
        np.testing.assert_array_equal(x, expected)


def test_no_valid_token_is_minus_one():
    sampled = sample(jnp.full((B, V), jnp.nan), settings(*[Sampling()] * B), jnp.zeros((B, V), jnp.int32), STEP)
    assert entry(sampled)[:, 0].tolist() == [-1] * B
    valid = dataclasses.replace(sampled, valid=jnp.array([True, False, True]))
    assert (entry(valid)[:, 0] >= 0).tolist() == [True, False, True]
