"""NaN and infinite logits: the row ends and keeps its earlier tokens; other rows are unaffected."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_attn import caches
from pallas_attn_models import Decoder, DraftModel, Generator, Sampling
from pallas_attn_models.generation.requests import Completion
from pallas_attn_models.generation.sampling import Limits, SamplingArrays, process, sample
from pallas_attn_models.generation.speculation import PromptLookup
from tests.marks import quick
from tests.models.generation.test_serving import assert_nothing_is_held
from tests.models.small_model import ONE_EACH, Ask, make_model, prompt_of, random_ask

BATCH, CAPACITY, CHUNK = 3, 48, 8
BAD = 49  # the token with a NaN embedding
ENDLESS = {"logit_bias": {7: -50.0}}


def poisoned(model: Decoder, value: float = math.nan) -> Decoder:
    """The model with a NaN embedding for one token; its output head is intact."""
    table = np.array(model.embedding.table[...])
    table[BAD, 0] = value
    model.embedding.table.set_value(jnp.asarray(table))
    return model


class Nonsense:
    """Drafts values outside the vocabulary."""

    length, num_candidates, draft_model = 3, 1, None

    def draft(self, state, may, feed):
        return state, jnp.full((BATCH, 1, 3), 10**6, jnp.int32), may


GENERATORS = {
    "plain": {},
    "several at a time": {"prefill_rows": 3},
    "int8": {"storage": caches.Int8()},
    "int4": {"storage": caches.Int4(8)},
    "float8": {"storage": caches.Float8()},
    "paged": {"storage": caches.Paged(16, 7)},
    "paged int8": {"storage": caches.Paged(16, 9, caches.Int8())},
    "window": {"policy": caches.Window(10, sinks=2), "capacity": 32, "max_length": CAPACITY},
    "h2o": {"policy": caches.H2O(4, normalize=True, value_norm=True), "capacity": 32, "max_length": CAPACITY},
    "q-hitter, paged int4": {
        "policy": caches.QHitter(4, value_norm=True),
        "storage": caches.Paged(16, 6, caches.Int4(8)),
        "capacity": 32,
        "max_length": CAPACITY,
    },
    "prompt lookup": {"speculation": PromptLookup(5)},
    "a tree": {"speculation": PromptLookup(4, 2, num_candidates=3)},
    "the same model drafts": {"speculation": DraftModel(poisoned(make_model()))},
    "drafts that read NaN": {"speculation": DraftModel(make_model(4))},
    "drafts from NaN": {"speculation": DraftModel(poisoned(make_model(4)), 3)},
    "drafts that are no tokens": {"speculation": Nonsense()},
    "no draft but NaN": {
        "speculation": DraftModel(jax.tree.map(lambda x: x * jnp.float32(math.nan), make_model(4))),
    },
}


@functools.cache
def generator(name: str) -> Generator:
    options = {"batch_size": BATCH, "capacity": CAPACITY, "prefill_chunk": CHUNK} | GENERATORS[name]
    return Generator(poisoned(make_model()), **options)


@pytest.fixture(scope="module", autouse=True)
def _forgotten():
    yield
    generator.cache_clear()


def without_bad(tokens: list[int]) -> list[int]:
    return [token % BAD for token in tokens]


def bad_asks() -> list[Ask]:
    """The NaN token at every position of a prompt, with other requests in the batch."""
    sampling = Sampling(6, temperature=1.0, top_logprobs=2)
    asks = [Ask([BAD], sampling), Ask([3, BAD], Sampling(6, stop=[[1, 2]], repetition_penalty=1.3))]
    asks += [Ask([BAD, *prompt_of(length)], sampling) for length in (1, 7, 20)]
    asks += [Ask([*prompt_of(30), BAD], Sampling(3, top_k=3, temperature=2.0))]
    asks += [Ask([4, BAD, 5], sampling, num_samples=2)]
    guided = {"negative": [5, BAD, 6], "scale": 1.5}, {"negative": [5, 6], "scale": 0.5}
    return [*asks, Ask([3, 4], sampling, **guided[0]), Ask([3, BAD], sampling, **guided[1])]


def good_asks() -> list[Ask]:
    """Requests without the bad token in prompt or output."""

    def without(ask: Ask) -> Ask:
        forbidden = {*ask.sampling.forbidden_tokens, BAD}
        sampling = dataclasses.replace(ask.sampling, forbidden_tokens=tuple(forbidden))
        negative = None if ask.negative is None else without_bad(ask.negative)
        return dataclasses.replace(ask, prompt=without_bad(ask.prompt), sampling=sampling, negative=negative)

    rng = np.random.default_rng(3)
    return [without(random_ask(rng, CAPACITY - 12, budget=12)) for _ in range(9)]


@pytest.mark.parametrize("name", quick(GENERATORS, "plain", "paged int8", "h2o", "drafts that read NaN"))
def test_a_nan_row_ends_and_leaves_nothing_behind(name):
    """Valid requests before, beside and after invalid ones, several times the number of rows."""
    one = generator(name)
    asks = good_asks()
    expected = [ask.generate(one)[0] for ask in asks]
    assert all(result.finish_reason != "invalid" for result in expected)
    for _ in range(2):  # so that valid requests get rows of invalid ones
        good, bad = [], []
        for index, ask in enumerate(asks):
            good.append(ask.submit(one))
            worse = bad_asks()[index % len(bad_asks())]
            bad += one.submit_samples(worse.prompt, worse.num_samples, worse.sampling, (), worse.negative, worse.scale)
        one.run()
        for handle in bad:
            assert handle.result() == Completion([], [], [], "invalid")
        assert [handle.result() for handle in good] == expected
    assert_nothing_is_held(one)
    assert one.compile_counts == ONE_EACH


DENSE = ["plain", *(name for name, options in GENERATORS.items() if "speculation" in options)]


@functools.cache
def as_it_would_go_on() -> list[tuple[Ask, Completion]]:
    """Requests that sometimes sample the bad token, and their results with the intact model."""
    sound = Generator(make_model(), batch_size=BATCH, capacity=CAPACITY, prefill_chunk=CHUNK)
    bias = {BAD: 2.5, 7: -50.0}
    samplings = [Sampling(16, temperature=1.0, seed=seed, logit_bias=bias, top_logprobs=2) for seed in range(16)]
    samplings[1::4] = [dataclasses.replace(one, stop=[[BAD, 11]], frequency_penalty=0.3) for one in samplings[1::4]]
    asks = [Ask(without_bad(prompt_of(9, seed)) * 2, sampling) for seed, sampling in enumerate(samplings)]
    asks[2::4] = [dataclasses.replace(ask, negative=prompt_of(5), scale=1.2) for ask in asks[2::4]]
    return [(ask, ask.generate(sound)[0]) for ask in asks]


@pytest.mark.parametrize("name", quick(DENSE, "plain", "drafts that read NaN"))
def test_the_tokens_before_are_kept(name):
    """The bad token is sampled from finite logits, so it is the last of its row. Drafts change nothing."""
    one = generator(name)
    wanted = as_it_would_go_on()
    handles = [ask.submit(one) for ask, _ in wanted]
    places = []
    for handle, (_, sound) in zip(handles, wanted, strict=True):
        result = handle.result()
        ends = sound.tokens.index(BAD) + 1 if BAD in sound.tokens else len(sound.tokens)
        reason = sound.finish_reason if ends == len(sound.tokens) else "invalid"
        places += [ends] if reason == "invalid" else []
        assert (result.tokens, result.finish_reason) == (sound.tokens[:ends], reason)
        assert len(result.logprobs) == len(result.top_logprobs) == ends
        assert np.isfinite(result.logprobs).all()
        assert all(np.isfinite([logprob for _, logprob in top]).all() for top in result.top_logprobs)
    assert len({*places}) > 4, "the bad token comes early and late"
    assert_nothing_is_held(one)


def test_a_stream_ends_with_the_reason():
    one = generator("plain")
    events = list(one.stream([[BAD, 3], [4, 5]], Sampling(3, logit_bias={7: -50.0, BAD: -50.0})))
    assert [event[1:] for event in events if event.row == 0] == [(None, "invalid")]
    assert [event.finish_reason for event in events if event.row == 1] == [None, None, "length"]
    (first,) = one.generate([[4]], Sampling(1, logit_bias={BAD: 1e6})).tokens
    assert first == [BAD]
    events = list(one.stream([[4]], Sampling(3, logit_bias={BAD: 1e6})))
    assert events == [(0, BAD, None), (0, None, "invalid")]
    assert list(one.submit([4], Sampling(3, logit_bias={BAD: 1e6}))) == [BAD]
    # Withheld tokens are delivered once they cannot become a stop sequence.
    events = list(one.stream([[4]], Sampling(3, logit_bias={BAD: 1e6}, stop=[[BAD, 3]])))
    assert events == [(0, BAD, "invalid")]


def test_scores_are_nan_where_the_logits_are():
    """NaN from the bad token on, and where attention multiplies masked values by 0, but never in another prompt."""
    one = generator("plain")
    sound, bad, after = one.score([[3, 4, 5], [3, 4, BAD, 5, 6], [3, 4, 5]], logits=True)
    assert np.isfinite(sound.logprobs).all()
    assert np.isnan(bad.logprobs[2:]).all()
    assert bad.logits is not None
    assert np.isnan(bad.logits[2:]).all()
    assert math.isnan(bad.total)
    assert after.logprobs == sound.logprobs
    assert len(bad.logprobs) == 4


def test_infinite_weights():
    one = generator("plain")
    for value in (math.inf, -math.inf, math.nan):
        poisoned(one.model, value)
        result = one.generate([[3, BAD], [3, 4]], Sampling(4, forbidden_tokens=[BAD, 7]))
        assert result.finish_reasons == ["invalid", "length"]
        assert result.tokens[0] == []


# --- one sampling step ---

LIMITS = Limits(logit_bias=4, stop_sequences=2, stop_length=2, top_logprobs=2)
VOCAB = 8
SETTINGS = {
    "greedy": {},
    "random": {"temperature": 1.0},
    "everything": {
        "temperature": 0.5,
        "top_k": 3,
        "top_p": 0.9,
        "min_p": 0.01,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.1,
        "frequency_penalty": 0.1,
        "logit_bias": {0: 1.0},
        "forbidden_tokens": (1, 2),
        "min_new_tokens": 2,
        "stop": 3,
        "top_logprobs": 2,
    },
    "forbidden": {"forbidden_tokens": (1, 2, 5)},
}


def stacked(*settings: dict) -> SamplingArrays:
    return SamplingArrays.stack([Sampling(**one) for one in settings], limits=LIMITS, vocab_size=VOCAB)


draw, run_process = jax.jit(sample), jax.jit(process)


def sound_logits() -> np.ndarray:
    return np.random.default_rng(1).standard_normal(VOCAB).astype(np.float32)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("places", [*([n] for n in range(VOCAB)), [1, 4], range(VOCAB)], ids=str)
def test_no_token_is_sampled_from_nan(name, value, places):
    """Anywhere: at a forbidden token, at a withheld end token, at one that top-k excludes."""
    logits = np.stack([sound_logits()] * 3)
    logits[1, list(places)] = value
    counts, steps = np.ones((3, VOCAB), np.int32), np.zeros(3, np.int32)
    drawn = draw(logits, stacked(*[SETTINGS[name]] * 3), counts, steps)
    assert drawn.valid.tolist() == [True, False, True]
    assert drawn.tokens[0] == drawn.tokens[2]
    assert np.isfinite(drawn.logprobs[np.array([0, 2])]).all()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(("left", "forbidden"), [((), ()), ((1, 2), (1, 2)), ((0, 3), (0, 1, 3)), ((5,), ())])
def test_no_token_is_sampled_if_all_are_excluded(temperature, left, forbidden):
    """The model's own -inf excludes a token, and settings exclude others."""
    logits = np.full((2, VOCAB), -np.inf, np.float32)
    logits[0], logits[1, list(left)] = sound_logits(), 1.0
    settings = stacked(*[{"temperature": temperature, "forbidden_tokens": forbidden}] * 2)
    drawn = draw(logits, settings, np.zeros((2, VOCAB), np.int32), np.zeros(2, np.int32))
    remaining = {*left} - {*forbidden}
    assert drawn.valid.tolist() == [True, len(remaining) > 0]
    assert not remaining or int(drawn.tokens[1]) in remaining


HUGE = float(np.finfo(np.float32).max)


@pytest.mark.parametrize("temperature", [0.0, 1e-30, 1.0, HUGE])
@pytest.mark.parametrize(
    "settings",
    [
        {"logit_bias": {2: HUGE, 3: -HUGE}, "presence_penalty": -HUGE, "frequency_penalty": HUGE},
        {"logit_bias": {2: HUGE}, "presence_penalty": HUGE, "frequency_penalty": -HUGE},
        {"logit_bias": {2: -HUGE, 4: -HUGE}, "presence_penalty": HUGE, "frequency_penalty": HUGE},
        {"logit_bias": {2: HUGE}, "repetition_penalty": 1e-37, "frequency_penalty": HUGE},
        {"logit_bias": {2: -HUGE}, "repetition_penalty": HUGE, "frequency_penalty": -HUGE},
        {"repetition_penalty": HUGE, "presence_penalty": -HUGE, "forbidden_tokens": (2, 3)},
    ],
    ids=str,
)
@pytest.mark.parametrize("scale", [1.0, 1e30, HUGE])
def test_settings_that_overflow_together_give_numbers(settings, temperature, scale):
    """Only forbidden tokens lose their finite logits."""
    logits = np.clip(np.stack([sound_logits()] * 2).astype(np.float64) * scale, -HUGE, HUGE).astype(np.float32)
    counts = np.stack([np.arange(VOCAB, dtype=np.int32)] * 2)
    arrays, steps = stacked(settings, {**settings, "temperature": temperature}), np.full(2, 5, np.int32)
    processed = np.array(run_process(logits, arrays, counts, steps))
    forbidden = np.isin(np.arange(VOCAB), settings.get("forbidden_tokens", ()))
    np.testing.assert_array_equal(np.isfinite(processed[0]), ~forbidden)
    assert not np.isnan(processed).any()
    drawn = draw(logits, arrays, counts, steps)
    assert drawn.valid.all()
    assert not forbidden[np.asarray(drawn.tokens)].any()


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1.0, 1e30, HUGE])
def test_guidance_of_any_strength_gives_numbers(scale):
    one = generator("plain")
    ask = Ask(prompt_of(5), Sampling(4, forbidden_tokens=[BAD, 7], top_logprobs=2), prompt_of(3), scale)
    (result,) = ask.generate(one)
    assert result.finish_reason == "length"
    assert not np.isnan(result.logprobs).any()
