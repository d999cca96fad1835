"""Sampling: every setting does what the literature says, and a row's token is its own affair."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from pallas_attn_models.sampling import Sampling, SamplingArrays, _top_k_top_p, sample
from tests import tolerances

DRAWS = 4096
LOGITS = np.array([1.0, -0.5, 2.0, 0.3, 2.0, -3.0, 0.9, 1.6], np.float32)

run = jax.jit(sample)


def draw(logits: np.ndarray, samplings: list[Sampling], steps: list[int] | None = None) -> np.ndarray:
    """One token for each sampling, from the same logits ``[V]``."""
    rows = jnp.broadcast_to(logits, (len(samplings), len(logits)))
    tokens, _ = run(rows, SamplingArrays.stack(samplings), np.array(steps or [0] * len(samplings), np.int32))
    return np.asarray(tokens)


def draw_many(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    return draw(logits, [dataclasses.replace(sampling, seed=seed) for seed in range(DRAWS)])


def expected_distribution(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Temperature, top-k, top-p, one token at a time in float64."""
    weights = np.exp(logits.astype(np.float64) / sampling.temperature)
    ranked = sorted(range(len(logits)), key=lambda token: (-weights[token], token))
    ranked = ranked[: sampling.top_k or len(ranked)]
    total = sum(weights[token] for token in ranked)
    kept, mass = [], 0.0
    for token in ranked:
        if mass >= sampling.top_p:
            break
        kept.append(token)
        mass += weights[token] / total
    distribution = np.where(np.isin(np.arange(len(logits)), kept), weights, 0.0)
    return distribution / distribution.sum()


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0),
        Sampling(temperature=0.5),
        Sampling(temperature=2.5, top_k=5),
        Sampling(temperature=1.0, top_p=0.8),
        Sampling(temperature=1.5, top_k=6, top_p=0.7),
        Sampling(temperature=1.0, top_k=10**6, top_p=1.0),
    ],
    ids=str,
)
@pytest.mark.parametrize("varied", ["seed", "step"])
def test_draws_follow_the_distribution(sampling, varied):
    if varied == "seed":
        tokens = draw_many(LOGITS, sampling)
    else:
        tokens = draw(LOGITS, [sampling] * DRAWS, list(range(DRAWS)))
    counts = np.bincount(tokens, minlength=len(LOGITS))
    expected = expected_distribution(LOGITS, sampling) * DRAWS
    possible = expected > 0
    assert counts[~possible].sum() == 0
    assert stats.chisquare(counts[possible], expected[possible]).pvalue > tolerances.CHI_SQUARE_LEVEL


def test_temperature_zero_takes_the_first_of_the_largest():
    assert set(draw_many(LOGITS, Sampling()).tolist()) == {2}


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0, top_k=1),
        Sampling(temperature=1.0, top_p=1e-6),
        Sampling(temperature=1.0, top_p=1e-60),
        Sampling(temperature=9.0, top_k=1, top_p=0.5),
    ],
    ids=str,
)
def test_the_narrowest_filter_is_greedy(sampling):
    """Equal logits included: tokens 2 and 4 are, and the smaller id counts as more likely."""
    assert set(draw_many(LOGITS, sampling).tolist()) == {2}


@pytest.mark.parametrize("temperature", [1e-6, 2e-38, 1e-45])
def test_the_smallest_temperatures_are_greedy(temperature):
    logits = np.array([49.9999, 50.0, 49.0, 0.0, -8.0, 1.0, 2.0, 3.0], np.float32)
    assert set(draw_many(logits, Sampling(temperature=temperature)).tolist()) == {1}


def test_a_token_without_probability_is_never_drawn():
    logits = np.where(np.isin(np.arange(8), [0, 5]), LOGITS, -np.inf).astype(np.float32)
    assert set(draw_many(logits, Sampling(temperature=1e30)).tolist()) == {0, 5}


def test_a_filter_that_is_off_keeps_every_token_of_its_row():
    """Also one after the running sum has rounded to 1: or a row's tokens would depend on its neighbour's top-p."""
    logits = np.tile(np.array([0.0, -18.0, -40.0, -80.0], np.float32), (2, 1))
    settings = SamplingArrays.stack([Sampling(temperature=1.0), Sampling(temperature=1.0, top_p=0.9)])
    assert _top_k_top_p(logits, settings).tolist() == [[True] * 4, [True, False, False, False]]


def test_every_row_has_its_own_settings():
    rows = [
        Sampling(),
        Sampling(temperature=0.8, seed=5),
        Sampling(temperature=1.3, top_k=3, seed=6),
        Sampling(temperature=1.0, top_p=0.6, seed=7),
    ]
    together = draw(LOGITS, rows, [3, 4, 5, 6])
    alone = [draw(LOGITS, [row], [step])[0] for row, step in zip(rows, [3, 4, 5, 6], strict=True)]
    assert together.tolist() == alone


def test_a_seed_gives_the_same_tokens_in_any_row_and_batch_and_under_any_default_generator():
    sampling = Sampling(temperature=1.0, top_k=6, seed=123)
    steps = list(range(32))
    alone = [draw(LOGITS, [sampling], [step])[0] for step in steps]
    others = [Sampling(temperature=2.0, seed=seed) for seed in range(3)]
    for row in range(4):
        rows = [*others[:row], sampling, *others[row:]]
        assert [draw(LOGITS, rows, [9, 9, 9, 9][:row] + [step] + [9] * (3 - row))[row] for step in steps] == alone
    with jax.default_prng_impl("unsafe_rbg"):
        settings = SamplingArrays.stack([sampling] * len(steps))
        rows = np.broadcast_to(LOGITS, (len(steps), len(LOGITS)))
        assert sample(jnp.asarray(rows), settings, np.array(steps, np.int32))[0].tolist() == alone
    assert len(set(alone)) > 1
    assert [draw(LOGITS, [dataclasses.replace(sampling, seed=124)], [step])[0] for step in steps] != alone


def test_logprobs_are_the_models_own():
    samplings = [Sampling(), *(Sampling(temperature=3.0, top_k=4, seed=seed) for seed in range(7))]
    rows = np.random.default_rng(0).normal(size=(8, 20)).astype(np.float32)
    tokens, logprobs = run(rows, SamplingArrays.stack(samplings), np.zeros(8, np.int32))
    assert (tokens.dtype, logprobs.dtype) == (jnp.int32, jnp.float32)
    expected = np.asarray(jax.nn.log_softmax(rows))[np.arange(8), np.asarray(tokens)]
    np.testing.assert_array_max_ulp(np.asarray(logprobs), expected, maxulp=4)


def primitives(jaxpr, *, branch: int | None) -> set[str]:
    """The operations of a jaxpr and all within it; of a cond only this branch, or every one."""
    names = set()
    for equation in jaxpr.eqns:
        names.add(equation.primitive.name)
        inner = [*equation.params.get("branches", ()), *filter(None, [equation.params.get("jaxpr")])]
        if equation.primitive.name == "cond" and branch is not None:
            inner = [inner[branch]]
        for one in inner:
            names |= primitives(one.jaxpr, branch=branch)
    return names


def test_a_batch_that_is_all_greedy_neither_sorts_nor_draws():
    settings = SamplingArrays.stack([Sampling()] * 2)
    jaxpr = jax.make_jaxpr(sample)(np.zeros((2, 8), np.float32), settings, np.zeros(2, np.int32)).jaxpr
    costly = {"sort", "random_bits"}
    assert primitives(jaxpr, branch=None) >= costly
    assert not primitives(jaxpr, branch=0) & costly


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, r"max_new_tokens: expected an int in \[1, 2147483648\), got 0"),
        ({"max_new_tokens": 2.0}, r"max_new_tokens: expected an int .* got 2\.0"),
        ({"temperature": -0.1}, r"temperature: expected a finite number of at least 0, got -0\.1"),
        ({"temperature": float("nan")}, r"temperature: expected a finite number of at least 0, got nan"),
        ({"temperature": float("inf")}, r"temperature: expected a finite number of at least 0, got inf"),
        ({"temperature": "hot"}, r"temperature: expected a finite number of at least 0, got 'hot'"),
        ({"top_k": -1}, r"top_k: expected an int in \[0, 2147483648\), got -1"),
        ({"top_k": True}, r"top_k: expected an int in \[0, 2147483648\), got True"),
        ({"top_p": 0.0}, r"top_p: expected a number in \(0, 1\], got 0\.0"),
        ({"top_p": 1.5}, r"top_p: expected a number in \(0, 1\], got 1\.5"),
        ({"seed": -1}, r"seed: expected an int in \[0, 4294967296\), got -1"),
        ({"seed": 2**32}, r"seed: expected an int in \[0, 4294967296\), got 4294967296"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**settings)


@pytest.mark.parametrize("settings", [{"min_p": 0.1}, {"repetition_penalty": 1.2}])
def test_settings_that_are_not_available_yet(settings):
    with pytest.raises(NotImplementedError, match=f"{next(iter(settings))}: not available yet"):
        Sampling(**settings)


def test_numpy_numbers_are_numbers():
    settings = SamplingArrays.stack(
        [Sampling(np.int64(3), np.float32(0.5), np.int32(4), np.float64(0.9), seed=2**32 - 1)]
    )
    assert [x.dtype for x in jax.tree.leaves(settings)] == [np.float32, np.int32, np.float32, np.uint32]
