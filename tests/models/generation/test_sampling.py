"""Sampling: every setting follows its definition in the literature, and rows are independent."""

import dataclasses
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from pallas_attn_models.generation import sampling as sampling_module
from pallas_attn_models.generation.sampling import (
    Limits,
    Sampling,
    SamplingArrays,
    _top_k_top_p,
    count_new,
    count_prompt,
    process,
    sample,
    stop_sequences,
)
from tests import tolerances

DRAWS = 20_000
LOGITS = np.array([1.0, -0.5, 2.0, 0.3, 2.0, -3.0, 0.9, 1.6], np.float32)
# Token 6 occurs twice, once in the prompt.
PROMPT, NEW = [1, 6, 1], [6, 0, 0]
LIMITS = Limits(logit_bias=4, stop_sequences=3, stop_length=4, top_logprobs=3)

run = jax.jit(sample)
run_process = jax.jit(process)


def arrays(samplings: list[Sampling], vocab_size: int = len(LOGITS), eos_token_ids=()) -> SamplingArrays:
    return SamplingArrays.stack(samplings, limits=LIMITS, vocab_size=vocab_size, eos_token_ids=eos_token_ids)


def counted(vocab_size: int, prompts: list[list[int]], new: list[list[int]]) -> np.ndarray:
    """int32 ``[B, V]``, from the definition."""
    counts = np.zeros((len(prompts), vocab_size), np.int32)
    for row, (prompt, tokens) in enumerate(zip(prompts, new, strict=True)):
        counts[row, prompt] = 1
        np.add.at(counts[row], tokens, 2)
    return counts


def draw(logits: np.ndarray, samplings: list[Sampling], steps: list[int] | None = None) -> np.ndarray:
    """One token per sampling, from the same logits ``[V]``."""
    return draw_rows(logits, arrays(samplings), np.array(steps or [0] * len(samplings), np.int32))


def draw_many(logits: np.ndarray, sampling: Sampling, *, varied: str = "seed") -> np.ndarray:
    """Many tokens from the same logits ``[V]``, with different seeds or steps."""
    settings = jax.tree.map(lambda x: np.broadcast_to(x, (DRAWS, *x.shape[1:])), arrays([sampling]))
    numbers, zeros = np.arange(DRAWS), np.zeros(DRAWS, np.int32)
    if varied == "seed":
        return draw_rows(logits, dataclasses.replace(settings, seed=numbers.astype(np.uint32)), zeros)
    return draw_rows(logits, settings, numbers.astype(np.int32))


def draw_rows(logits: np.ndarray, settings: SamplingArrays, steps: np.ndarray) -> np.ndarray:
    rows = np.broadcast_to(logits, (len(steps), len(logits)))
    counts = np.broadcast_to(counted(len(logits), [PROMPT], [NEW]), rows.shape)
    return np.asarray(run(rows, settings, counts, steps).tokens)


def expected_logits(logits: np.ndarray, sampling: Sampling, prompt: list[int], new: list[int], step: int) -> np.ndarray:
    """Everything before the temperature, one token at a time in float64."""
    logits = logits.astype(np.float64)
    for token in range(len(logits)):
        logits[token] += (sampling.logit_bias or {}).get(token, 0.0)
        if token in (*prompt, *new):
            logits[token] *= sampling.repetition_penalty ** (1 if logits[token] < 0 else -1)
        logits[token] -= sampling.frequency_penalty * new.count(token)
        logits[token] -= sampling.presence_penalty * (token in new)
        early = step < sampling.min_new_tokens and (token,) in stop_sequences(sampling.stop)
        if early or token in sampling.forbidden_tokens:
            logits[token] = -np.inf
    return logits


def expected_distribution(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """All settings in their order, one token at a time in float64."""
    weights = np.exp(expected_logits(logits, sampling, PROMPT, NEW, 0) / sampling.temperature)
    ranked = sorted(range(len(logits)), key=lambda token: (-weights[token], token))
    ranked = ranked[: sampling.top_k or len(ranked)]
    total = sum(weights[token] for token in ranked)
    kept, mass = [], 0.0
    for token in ranked:
        if mass >= sampling.top_p:
            break
        kept.append(token)
        mass += weights[token] / total
    kept = [token for token in kept if weights[token] >= sampling.min_p * weights[kept[0]]]
    distribution = np.where(np.isin(np.arange(len(logits)), kept), weights, 0.0)
    return distribution / distribution.sum()


EVERYTHING = Sampling(
    max_new_tokens=DRAWS,
    temperature=1.4,
    top_k=5,
    top_p=0.9,
    min_p=0.4,
    repetition_penalty=1.3,
    presence_penalty=0.4,
    frequency_penalty=0.3,
    logit_bias={5: 4.5, 2: -0.7, 7: 3.0},
    forbidden_tokens=[7],
    min_new_tokens=DRAWS,
    stop=[4, (2, 3)],
    top_logprobs=3,
)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0),
        Sampling(temperature=0.5),
        Sampling(temperature=2.5, top_k=5),
        Sampling(temperature=1.0, top_p=0.8),
        Sampling(temperature=1.5, top_k=6, top_p=0.7),
        Sampling(temperature=1.0, top_k=10**6, top_p=1.0),
        Sampling(temperature=1.0, min_p=0.3),
        Sampling(temperature=1.3, top_k=7, top_p=0.95, min_p=0.2, logit_bias={5: 5.0, 2: -1.0}),
        EVERYTHING,
    ],
    ids=str,
)
@pytest.mark.parametrize("varied", ["seed", "step"])
def test_samples_follow_the_distribution(sampling, varied):
    counts = np.bincount(draw_many(LOGITS, sampling, varied=varied), minlength=len(LOGITS))
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
        Sampling(temperature=9.0, top_k=1, min_p=1.0),
    ],
    ids=str,
)
def test_the_narrowest_filter_is_greedy(sampling):
    """Including equal logits: of tokens 2 and 4, the smaller id counts as more likely."""
    assert set(draw_many(LOGITS, sampling).tolist()) == {2}


@pytest.mark.parametrize("temperature", [1e-6, 2e-38, 1e-45])
def test_the_smallest_temperatures_are_greedy(temperature):
    logits = np.array([49.9999, 50.0, 49.0, 0.0, -8.0, 1.0, 2.0, 3.0], np.float32)
    assert set(draw_many(logits, Sampling(temperature=temperature)).tolist()) == {1}


def test_a_token_without_probability_is_never_sampled():
    logits = np.where(np.isin(np.arange(8), [0, 5]), LOGITS, -np.inf).astype(np.float32)
    assert set(draw_many(logits, Sampling(temperature=1e30)).tolist()) == {0, 5}


def test_a_filter_that_is_off_keeps_every_token_of_its_row():
    """Including tokens after the running sum rounds to 1; otherwise a row would depend on its neighbor's top-p."""
    logits = np.tile(np.array([0.0, -18.0, -40.0, -80.0], np.float32), (2, 1))
    settings = arrays([Sampling(temperature=1.0), Sampling(temperature=1.0, top_p=0.9)], vocab_size=4)
    assert _top_k_top_p(logits, settings).tolist() == [[True] * 4, [True, False, False, False]]


ROWS = [
    Sampling(),
    Sampling(temperature=0.8, seed=5),
    Sampling(temperature=1.3, top_k=3, seed=6),
    Sampling(temperature=1.0, top_p=0.6, seed=7),
    Sampling(temperature=1.1, min_p=0.1, seed=8, top_logprobs=1),
    Sampling(repetition_penalty=1.7, top_logprobs=2),
    Sampling(presence_penalty=0.7, frequency_penalty=-0.3),
    Sampling(temperature=0.9, seed=9, logit_bias={3: 1.1}, forbidden_tokens=(2,)),
    Sampling(temperature=2.0, seed=10, min_new_tokens=7, stop=[4, 6, (1, 2)]),
    dataclasses.replace(EVERYTHING, seed=11, min_new_tokens=9),
]


def random_batch(seed: int, batch_size: int, vocab_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits, counts and steps."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(scale=3, size=(batch_size, vocab_size)).astype(np.float32)
    counts = rng.integers(0, 6, size=(batch_size, vocab_size), dtype=np.int32)
    return logits, counts, rng.integers(0, 9, size=batch_size, dtype=np.int32)


@pytest.mark.parametrize("compute", [run, run_process], ids=["sample", "process"])
@pytest.mark.parametrize("others", ["none", "plain", "any"])
def test_every_row_has_its_own_settings(compute, others):
    """The same bits in any batch, whatever the settings of the other rows."""
    logits, counts, steps = random_batch(0, len(ROWS), 37)
    together = compute(logits, arrays(ROWS, 37), counts, steps)
    for row, sampling in enumerate(ROWS):
        if others == "none":
            rows, index = [row], 0
            settings = arrays([sampling], 37)
        else:
            rows = list(range(len(ROWS)))
            index = (row + 3) % len(ROWS)
            rows[index] = row
            samplings = [Sampling()] * len(ROWS) if others == "plain" else ROWS[::-1]
            settings = arrays([*samplings[:index], sampling, *samplings[index + 1 :]], 37)
        alone = compute(logits[rows], settings, counts[rows], steps[rows])
        jax.tree.map(lambda x, y: np.testing.assert_array_equal(x[row], y[index]), together, alone)  # noqa: B023


def test_one_executable_for_all_settings():
    chex.clear_trace_counter()
    compute = jax.jit(chex.assert_max_traces(sample, n=1))
    for seed, sampling in enumerate(ROWS):
        logits, counts, steps = random_batch(seed, 2, 8)
        compute(logits, arrays([sampling, Sampling()], 8, eos_token_ids=(0,)), counts, steps)
    assert compute._cache_size() == 1


def test_a_seed_gives_the_same_tokens_in_any_row_and_batch_and_under_any_default_generator():
    sampling = Sampling(temperature=1.0, top_k=6, seed=123)
    steps = list(range(32))
    alone = [draw(LOGITS, [sampling], [step])[0] for step in steps]
    others = [Sampling(temperature=2.0, seed=seed) for seed in range(3)]
    for row in range(4):
        rows = [*others[:row], sampling, *others[row:]]
        assert [draw(LOGITS, rows, [9, 9, 9, 9][:row] + [step] + [9] * (3 - row))[row] for step in steps] == alone
    with jax.default_prng_impl("unsafe_rbg"):
        rows = np.broadcast_to(LOGITS, (len(steps), len(LOGITS)))
        counts = np.zeros(rows.shape, np.int32)
        settings = arrays([sampling] * len(steps))
        drawn = jax.jit(lambda *args: sample(*args))(rows, settings, counts, np.array(steps, np.int32))
        assert drawn.tokens.tolist() == alone
    assert len(set(alone)) > 1
    assert [draw(LOGITS, [dataclasses.replace(sampling, seed=124)], [step])[0] for step in steps] != alone


def test_logprobs_are_the_models_own():
    samplings = [Sampling(), *(dataclasses.replace(EVERYTHING, seed=seed) for seed in range(7))]
    logits, counts, steps = random_batch(0, 8, 20)
    drawn = run(logits, arrays(samplings, 20), counts, steps)
    assert (drawn.tokens.dtype, drawn.logprobs.dtype) == (jnp.int32, jnp.float32)
    expected = np.asarray(jax.nn.log_softmax(logits))[np.arange(8), np.asarray(drawn.tokens)]
    np.testing.assert_array_max_ulp(np.asarray(drawn.logprobs), expected, maxulp=4)


def test_the_most_likely_tokens():
    """The requested number per row, best first, under the model's own distribution; smaller ids first among equals."""
    logits, counts, steps = random_batch(1, 4, 20)
    logits[:, 4] = logits[:, 17] = 50
    samplings = [dataclasses.replace(EVERYTHING, top_logprobs=n, forbidden_tokens=(4,)) for n in range(4)]
    drawn = run(logits, arrays(samplings, 20), counts, steps)
    assert (drawn.top_tokens.dtype, drawn.top_logprobs.dtype) == (jnp.int32, jnp.float32)
    logprobs = np.asarray(jax.nn.log_softmax(logits))
    for row in range(4):
        best = sorted(range(20), key=lambda token: (-logits[row, token], token))[:row]
        assert drawn.top_tokens[row].tolist() == best + [-1] * (3 - row)
        expected = [*logprobs[row, best], *[-np.inf] * (3 - row)]
        np.testing.assert_array_max_ulp(np.asarray(drawn.top_logprobs[row]), np.array(expected, np.float32), maxulp=4)


@pytest.mark.parametrize(("limit", "vocab_size"), [(0, 8), (8, 2)])
def test_the_number_of_most_likely_tokens_is_the_limit(limit, vocab_size):
    """None, and more than the vocabulary."""
    sampling = Sampling(top_logprobs=min(limit, vocab_size))
    settings = SamplingArrays.stack([sampling], limits=Limits(top_logprobs=limit), vocab_size=vocab_size)
    logits = np.arange(vocab_size, dtype=np.float32)[None]
    drawn = run(logits, settings, np.zeros(logits.shape, np.int32), np.zeros(1, np.int32))
    assert drawn.top_tokens.tolist() == [[1, 0, *[-1] * 6]] if limit else [[]]
    assert drawn.top_logprobs.shape == (1, limit)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(repetition_penalty=1.4),
        Sampling(repetition_penalty=0.7),
        Sampling(presence_penalty=0.8),
        Sampling(frequency_penalty=0.6),
        Sampling(presence_penalty=-0.5, frequency_penalty=-0.25),
        Sampling(logit_bias={0: 2.5, 6: -3.0, 3: 1.0}, forbidden_tokens=(3, 1)),
        Sampling(forbidden_tokens=np.array([2])),
        Sampling(min_new_tokens=4, stop=5),
        dataclasses.replace(EVERYTHING, temperature=0.0, min_new_tokens=4),
    ],
    ids=str,
)
def test_processed_logits(sampling):
    rng = np.random.default_rng(0)
    logits = rng.normal(scale=2, size=(6, 8)).astype(np.float32)
    prompts = [rng.integers(0, 8, 4).tolist() for _ in range(6)]
    new = [rng.integers(0, 8, 5).tolist() for _ in range(6)]
    actual = run_process(logits, arrays([sampling] * 6), counted(8, prompts, new), np.arange(6, dtype=np.int32))
    expected = [expected_logits(logits[row], sampling, prompts[row], new[row], row) for row in range(6)]
    np.testing.assert_allclose(actual, np.array(expected), rtol=0, atol=tolerances.PROCESSED_LOGITS)


def test_end_tokens_wait_for_the_minimum():
    """Including the model's; longer sequences may begin."""
    settings = arrays([Sampling(min_new_tokens=3, stop=[2, (4, 5)])] * 2, eos_token_ids=(7,))
    logits = np.tile(LOGITS, (2, 1))
    processed = run_process(logits, settings, np.zeros(logits.shape, np.int32), np.array([2, 3], np.int32))
    assert np.isneginf(processed).tolist() == [[token in (2, 7) for token in range(8)], [False] * 8]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_without_possible_tokens_is_invalid(temperature):
    """The model excludes the tokens that the settings leave; the neighbor row is unaffected."""
    narrow = Sampling(temperature=temperature, top_k=2, top_p=0.5, min_p=0.1, forbidden_tokens=(0, 1, 2))
    other = Sampling(temperature=temperature, seed=3)
    logits, counts, steps = random_batch(0, 2, 4)
    expected = run(logits, arrays([other, other], 4), counts, steps)
    logits[0, 3] = -np.inf
    drawn = run(logits, arrays([narrow, other], 4), counts, steps)
    assert drawn.valid.tolist() == [False, True]
    assert expected.valid.all()
    assert drawn.tokens[1] == expected.tokens[1]


def test_counts_of_a_rows_tokens():
    rng = np.random.default_rng(0)
    prompts: list[list[int]] = [[] for _ in range(3)]
    new: list[list[int]] = [[] for _ in range(3)]
    counts = jnp.zeros((3, 11), jnp.int32)
    for _ in range(6):
        tokens, real = rng.integers(-2, 13, (3, 5), dtype=np.int32), rng.random((3, 5)) < 0.5
        tokens = np.where(real, tokens.clip(0, 10), tokens)  # padding may have any value
        counts = count_prompt(counts, tokens, real)
        for row in range(3):
            prompts[row] += tokens[row][real[row]].tolist()
        tokens, written = rng.integers(-2, 13, 3, dtype=np.int32), rng.random(3) < 0.7
        tokens = np.where(written, tokens.clip(0, 10), tokens)
        counts = count_new(counts, tokens, written)
        for row in np.flatnonzero(written):
            new[row].append(int(tokens[row]))
        np.testing.assert_array_equal(counts, counted(11, prompts, new))
    assert counts.dtype == jnp.int32


def test_counts_are_updated_in_place():
    """A loop that copied them would move 4 BV bytes per token."""

    def decode(counts, logits, settings):
        def step(carry):
            number, counts, logits = carry
            tokens = sample(logits, settings, counts, number).tokens
            counts = count_prompt(count_new(counts, tokens, tokens > 3), tokens[:, None], tokens[:, None] > 9)
            return number + 1, counts, logits * 0.9

        return jax.lax.while_loop(lambda carry: carry[0][0] < 9, step, (jnp.zeros(3, jnp.int32), counts, logits))

    logits, counts, _ = random_batch(0, 3, 1009)
    compiled = jax.jit(decode, donate_argnums=(0, 1)).lower(counts, logits, arrays([EVERYTHING] * 3, 1009)).compile()
    text = compiled.as_text()
    assert text is not None
    assert "s32[3,1009]" in text
    assert not re.findall(r"s32\[3,1009\]\S* copy\(", text)
    for count, tokens in ((count_prompt, np.zeros((3, 2), np.int32)), (count_new, np.zeros(3, np.int32))):
        equations = jax.make_jaxpr(count)(counts, tokens, tokens > 0).jaxpr.eqns
        whole = {one.primitive.name for one in equations if one.outvars[0].aval.shape == counts.shape}
        assert whole <= {"scatter", "scatter-add"}


def primitives(jaxpr, *, branch: int | None) -> set[str]:
    """The operations of a jaxpr and its sub-jaxprs; of a cond, only the given branch, or all."""
    names = set()
    for equation in jaxpr.eqns:
        names.add(equation.primitive.name)
        inner = [*equation.params.get("branches", ()), *filter(None, [equation.params.get("jaxpr")])]
        if equation.primitive.name == "cond" and branch is not None:
            inner = [inner[branch]]
        for one in inner:
            names |= primitives(one.jaxpr, branch=branch)
    return names


def test_a_batch_that_is_all_greedy_takes_one_argmax():
    """The branch neither sorts nor samples, and reads no counts."""
    logits, counts, steps = random_batch(0, 2, 8)
    jaxpr = jax.make_jaxpr(sample)(logits, arrays([Sampling()] * 2), counts, steps).jaxpr
    costly = {"sort", "random_bits", "top_k", "scatter", "shift_right_arithmetic"}
    assert primitives(jaxpr, branch=None) >= costly
    assert not primitives(jaxpr, branch=0) & costly


@pytest.mark.parametrize(
    ("samplings", "parts"),
    [
        ([Sampling(top_k=3, top_p=0.5, min_p=0.5, min_new_tokens=2)], set()),  # greedy; and there are 2 new tokens
        ([Sampling(logit_bias={1: 2.0})], {"_add_bias"}),
        ([Sampling(forbidden_tokens=(0,))], {"_add_bias"}),
        ([Sampling(repetition_penalty=1.1)], {"_penalize"}),
        ([Sampling(presence_penalty=0.1)], {"_penalize"}),
        ([Sampling(frequency_penalty=0.1)], {"_penalize"}),
        ([Sampling(min_new_tokens=3)], {"_exclude_ends"}),
        ([Sampling(temperature=0.5), Sampling(top_k=3, top_p=0.5)], {"_warp", "_draw"}),
        ([Sampling(temperature=0.5)], {"_warp", "_draw"}),
        ([Sampling(temperature=0.5, min_p=0.1)], {"_warp", "_draw"}),
        ([Sampling(temperature=0.5, top_k=1)], {"_warp", "_draw", "_top_k_top_p"}),
        ([Sampling(temperature=0.5, top_p=0.9)], {"_warp", "_draw", "_top_k_top_p"}),
    ],
    ids=lambda value: "-".join(sorted(map(str, value))),
)
def test_only_settings_in_use_are_computed(samplings, parts, monkeypatch):
    called = set()
    for name in ("_add_bias", "_penalize", "_exclude_ends", "_warp", "_draw", "_top_k_top_p"):
        function = getattr(sampling_module, name)
        monkeypatch.setattr(
            sampling_module,
            name,
            lambda *args, name=name, function=function: called.add(name) or function(*args),
        )
    with jax.disable_jit():  # otherwise both branches of every cond are traced
        logits, counts, _ = random_batch(0, 3, 8)
        settings = arrays([Sampling(), *samplings, Sampling()][:3])
        sample(jnp.asarray(logits), settings, jnp.asarray(counts), jnp.full(3, 2, jnp.int32))
    assert called == parts


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, r"max_new_tokens: expected an int in \[1, 2147483648\), got 0"),
        ({"max_new_tokens": 2.0}, r"max_new_tokens: expected an int .* got 2\.0"),
        ({"temperature": -0.1}, r"temperature: expected a finite number of at least 0, got -0\.1"),
        ({"temperature": float("nan")}, r"temperature: expected a finite number of at least 0, got nan"),
        ({"temperature": float("inf")}, r"temperature: expected a finite number of at least 0, got inf"),
        ({"temperature": "hot"}, r"temperature: expected a finite number of at least 0, got 'hot'"),
        ({"temperature": 10**400}, "temperature: expected a finite number of at least 0, got 1000"),
        ({"temperature": 1e-50}, r"temperature: expected a finite number of at least 0, got 1e-50"),
        ({"min_p": 1e-50}, r"min_p: expected a number in \[0, 1\], got 1e-50"),
        ({"presence_penalty": -1e39}, r"presence_penalty: expected a finite number, got -1e\+39"),
        ({"frequency_penalty": 10**5000}, r"frequency_penalty: expected a finite number, got int too large to show"),
        (
            {"logit_bias": {3: 1e39}},
            r"logit_bias\[3\]: expected a finite number .*, got 1e\+39",
        ),
        ({"top_k": 10**5000}, r"top_k: expected an int in \[0, 2147483648\), got int too large to show"),
        ({"max_new_tokens": 2**40}, r"max_new_tokens: expected an int in \[1, 2147483648\), got 1099511627776"),
        ({"seed": 10**400}, r"seed: expected an int in \[0, 4294967296\), got 1000"),
        ({"top_k": -1}, r"top_k: expected an int in \[0, 2147483648\), got -1"),
        ({"top_k": True}, r"top_k: expected an int in \[0, 2147483648\), got True"),
        ({"top_p": 0.0}, r"top_p: expected a number in \(0, 1\], got 0\.0"),
        ({"top_p": 1.5}, r"top_p: expected a number in \(0, 1\], got 1\.5"),
        ({"seed": -1}, r"seed: expected an int in \[0, 4294967296\), got -1"),
        ({"seed": 2**32}, r"seed: expected an int in \[0, 4294967296\), got 4294967296"),
        ({"temperature": 1e39}, r"temperature: expected a finite number of at least 0, got 1e\+39"),
        ({"min_p": -0.1}, r"min_p: expected a number in \[0, 1\], got -0\.1"),
        ({"min_p": 1.1}, r"min_p: expected a number in \[0, 1\], got 1\.1"),
        ({"repetition_penalty": 0.0}, r"repetition_penalty: expected a finite number above 0, got 0\.0"),
        ({"repetition_penalty": 1e-39}, r"repetition_penalty: expected a finite number above 0, got 1e-39"),
        ({"repetition_penalty": float("inf")}, r"repetition_penalty: expected a finite number above 0, got inf"),
        ({"presence_penalty": float("nan")}, r"presence_penalty: expected a finite number, got nan"),
        ({"frequency_penalty": None}, r"frequency_penalty: expected a finite number, got None"),
        ({"logit_bias": [1, 2]}, r"logit_bias: expected a mapping from tokens to numbers, got \[1, 2\]"),
        ({"logit_bias": {-1: 0.5}}, r"logit_bias: expected an int in \[0, 2147483648\), got -1"),
        (
            {"logit_bias": {3: -float("inf")}},
            r"logit_bias\[3\]: expected a finite number .*, got -inf",
        ),
        ({"forbidden_tokens": 3}, r"forbidden_tokens: expected a sequence of tokens, got 3"),
        ({"forbidden_tokens": [1.0]}, r"forbidden_tokens: expected an int in .*, got 1\.0"),
        ({"min_new_tokens": -1}, r"min_new_tokens: expected an int in \[0, 2147483648\), got -1"),
        ({"min_new_tokens": 5, "max_new_tokens": 4}, r"min_new_tokens: expected at most max_new_tokens=4, got 5"),
        ({"stop": "end"}, r"stop: expected a token, or a sequence of tokens and token sequences, got 'end'"),
        ({"stop": -1}, r"stop\[0\]: expected an int in \[0, 2147483648\), got -1"),
        ({"stop": [3, ()]}, r"stop\[1\]: expected at least one token, got none"),
        ({"stop": [3, "end"]}, r"stop\[1\]: expected a sequence of tokens, got 'end'"),
        ({"stop": [(3, [4])]}, r"stop\[0\]: expected an int in \[0, 2147483648\), got \[4\]"),
        ({"top_logprobs": -1}, r"top_logprobs: expected an int in \[0, 2147483648\), got -1"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"logit_bias": {8: 1.0}}, r"logit_bias: expected tokens in \[0, vocab_size=8\), got 8"),
        ({"forbidden_tokens": [1, 9]}, r"forbidden_tokens: expected tokens in \[0, vocab_size=8\), got 9"),
        ({"stop": [(1, 8)]}, r"stop: expected tokens in \[0, vocab_size=8\), got 8"),
        (
            {"logit_bias": {0: 1.0, 1: 1.0, 2: 1.0}, "forbidden_tokens": (2, 3, 4)},
            "logit_bias: expected at most limits.logit_bias=4 biased and forbidden tokens together, got 5",
        ),
        ({"stop": [1, 2, 3, 4]}, "stop: expected at most limits.stop_sequences=3 sequences, got 4"),
        ({"stop": [(1, 2, 3, 4, 5)]}, "stop: expected at most limits.stop_length=4 tokens in a sequence, got 5"),
        ({"top_logprobs": 4}, "top_logprobs: expected at most limits.top_logprobs=3, got 4"),
    ],
)
def test_settings_beyond_the_vocabulary_or_the_limits(settings, message):
    with pytest.raises(ValueError, match=message):
        arrays([Sampling(), Sampling(**settings)])


def test_no_more_tokens_are_reported_than_there_are():
    with pytest.raises(ValueError, match="top_logprobs: expected at most vocab_size=2, got 3"):
        arrays([Sampling(top_logprobs=3)], vocab_size=2)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"logit_bias": -1}, r"limits.logit_bias: expected an int in \[0, 2147483648\), got -1"),
        ({"stop_sequences": 1.0}, r"limits.stop_sequences: expected an int in .*, got 1\.0"),
        ({"stop_length": 0}, r"limits.stop_length: expected an int in \[1, 2147483648\), got 0"),
        ({"top_logprobs": True}, r"limits.top_logprobs: expected an int in .*, got True"),
    ],
)
def test_limits_out_of_range(limits, message):
    with pytest.raises(ValueError, match=message):
        Limits(**limits)


def test_everything_off_fits_limits_of_zero():
    """No biases, stop sequences or top_logprobs: arrays without elements."""
    limits = Limits(logit_bias=0, stop_sequences=0, stop_length=1, top_logprobs=0)
    settings = SamplingArrays.stack([Sampling(min_new_tokens=2)], limits=limits, vocab_size=8)
    drawn = run(LOGITS[None], settings, np.zeros((1, 8), np.int32), np.zeros(1, np.int32))
    assert drawn.tokens.tolist() == [2]


def test_numpy_numbers_are_numbers():
    sampling = Sampling(
        np.int64(3),
        np.float32(0.5),
        np.int32(4),
        np.float64(0.9),
        seed=2**32 - 1,
        logit_bias={np.int64(3): np.float32(1.0)},
        forbidden_tokens=np.array([1, 3]),
        stop=[np.int64(3), np.array([1, 2])],
    )
    settings = arrays([sampling], eos_token_ids=(5,))
    assert settings.stop_tokens.tolist() == [[[-1, -1, -1, 3], [-1, -1, 1, 2], [-1, -1, -1, 5], [-1] * 4]]
    assert settings.stop_lengths.tolist() == [[1, 2, 1, 0]]
    assert settings.bias_tokens.tolist() == [[3, 1, 8, 8]]
    assert settings.bias.tolist() == [[-np.inf, -np.inf, 0, 0]]
    dtypes = {field.name: getattr(settings, field.name).dtype for field in dataclasses.fields(settings)[:-1]}
    ints = {"top_k", "bias_tokens", "min_new_tokens", "max_new_tokens", "top_logprobs", "stop_tokens", "stop_lengths"}
    assert {name for name, dtype in dtypes.items() if dtype == np.int32} == ints
    assert {name for name, dtype in dtypes.items() if dtype == np.uint32} == {"seed"}
    assert {dtype for name, dtype in dtypes.items() if name not in ints | {"seed"}} == {np.dtype(np.float32)}


@pytest.mark.parametrize("stop", [3, (3,), [[3]], np.int32(3), np.array([3])], ids=repr)
def test_a_stop_token_is_a_sequence_of_one(stop):
    assert stop_sequences(stop) == ((3,),)
