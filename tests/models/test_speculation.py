"""Speculation: whatever is drafted, the output is that of plain decoding, and the caches hold what was drawn."""

import dataclasses
import functools
import importlib.resources
import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import Array
from scipy import stats

import pallas_attn as pa
from pallas_attn import caches
from pallas_attn_models import Decoder, Generator, Sampling, load_hf, tasks
from pallas_attn_models.config import DecoderConfig
from pallas_attn_models.requests import Completion, Handle
from pallas_attn_models.rows import State
from pallas_attn_models.sampling import Limits, SamplingArrays, sample
from pallas_attn_models.speculation import DraftModel, Feed, PromptLookup, num_nodes
from tests import tolerances

EOS, VOCAB = 7, 16
BATCH, CAPACITY, CHUNK = 4, 128, 16
CONFIG = DecoderConfig(
    vocab_size=VOCAB,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    eos_token_ids=(EOS,),
)
ONE_EACH = {"prefill": 1, "decode": 1}


def make_model(seed: int = 0, config: DecoderConfig = CONFIG, wide: float = 5.0) -> Decoder:
    """Weights so wide that the likeliest tokens are well ahead of the others, but not certain."""
    model = Decoder(config, rngs=nnx.Rngs(seed), implementation="xla", block_sizes=pa.BlockSizes(CHUNK, 16))
    nnx.update(model, jax.tree.map(lambda x: x * wide if x.ndim == 2 else x, nnx.state(model)))
    return model


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng([seed, length]).integers(8, VOCAB, length).tolist()


@dataclasses.dataclass(frozen=True)
class Asked:
    """What is submitted. Every request has a seed of its own, by which :class:`Hints` know it."""

    prompt: list[int]
    sampling: Sampling
    negative_prompt: list[int] | None = None
    guidance_scale: float = 1.0


def asked() -> list[Asked]:
    """Every setting, in rows that share a batch; more requests than rows."""
    random, endless = {"temperature": 1.0}, {"logit_bias": {EOS: -50.0}}
    settings = [
        (1, {}),
        (17, {"top_logprobs": 4}),
        (5, random | {"top_logprobs": 2}),
        (9, {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.02}),
        (12, {"temperature": 1.4, "repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.2}),
        (3, {"repetition_penalty": 1.2, "frequency_penalty": 0.5}),
        (7, random | {"logit_bias": {9: 2.5, 3: -4.0}, "forbidden_tokens": (11, 12)}),
        (2, random | {"min_new_tokens": 11, "stop": (8, 9, 10)}),
        (20, {"temperature": 0.4, "stop": (13, [10, 10])}),
        *((15 + last, random | endless | {"stop": [[first, last] for first in range(VOCAB)]}) for last in (2, 3, 4)),
        *((length, random | endless) for length in (3, CAPACITY - 14, CAPACITY - 3)),
        *((4, random | {"max_new_tokens": budget}) for budget in (1, 2, 3)),
        *((6, endless | {"max_new_tokens": budget}) for budget in (5, 6, 7)),
    ]
    requests = [
        Asked(prompt_of(length), Sampling(**({"max_new_tokens": 30, "seed": seed} | fields)))
        for seed, (length, fields) in enumerate(settings)
    ]
    first = len(requests)
    guided = [(6, 11, {"temperature": 0.9}, 1.7), (19, 2, {}, 0.6), (3, CAPACITY - 9, {"stop": (12, [9, 9])}, 1.2)]
    for index, (length, other, fields, scale) in enumerate(guided):
        sampling = Sampling(max_new_tokens=20, seed=first + index, **fields)
        requests.insert(4 * index, Asked(prompt_of(length), sampling, prompt_of(other, seed=1), scale))
    return requests


REQUESTS = asked()


@dataclasses.dataclass(frozen=True, eq=False)
class Hints:
    """Drafts what is known to come, with so many of four tokens replaced by others; sometimes drafts nothing.

    Attributes:
      known: int32 ``[seeds, n]``, the new tokens of each request.
      wrong: of four tokens.
    """

    known: np.ndarray
    length: int
    num_candidates: int
    wrong: int
    draft_model: None = None

    def draft(self, state: State, may: Array, feed: Feed) -> tuple[State, Array, Array]:
        drafts, found = self.of(state.rows.request.sampling.seed, state.rows.num_new)
        return state, drafts, found & may

    def of(self, seed: Array, number: Array) -> tuple[Array, Array]:
        """For rows of these seeds with so many new tokens."""
        candidate = jnp.arange(self.num_candidates, dtype=jnp.int32)[None, :, None]
        ahead = jnp.arange(self.length, dtype=jnp.int32)[None, None]
        row, number = jnp.asarray(seed).astype(jnp.int32)[:, None, None], jnp.asarray(number)[:, None, None]
        noise = _noise(((row * 71 + number) * 71 + ahead) * 71 + candidate)
        known = jnp.asarray(self.known).at[row, number + ahead + 0 * candidate].get(mode="fill", fill_value=0)
        drafts = jnp.where(noise % 4 < self.wrong, noise // 4 % VOCAB, known)
        return drafts, (_noise(row * 1009 + number) % 6 > 0)[:, 0, 0]


def _noise(x: Array) -> Array:
    """int32 of at least 0 that look random."""
    x = x.astype(jnp.uint32) * jnp.uint32(2654435761)
    x = (x ^ (x >> 15)) * jnp.uint32(2246822519)
    return ((x ^ (x >> 13)) >> 2).astype(jnp.int32)


# --- what runs, each compiled once ---


SLIDING = dataclasses.replace(CONFIG, sliding_windows=(8, None))
SMALLER = dataclasses.replace(CONFIG, hidden_size=8, num_layers=1)
SMALLER_SLIDING = dataclasses.replace(SMALLER, sliding_windows=(8,))
CHAIN, TREE = PromptLookup(length=5), PromptLookup(length=4, ngram=2, num_candidates=3)
# By name: the plain Generator that it has to equal, and its own options.
VARIANTS: dict[str, tuple[str, Callable[[], dict]]] = {
    "chain": ("plain", lambda: {"speculation": CHAIN}),
    "tree": ("plain", lambda: {"speculation": TREE}),
    "same model": ("plain", lambda: {"speculation": DraftModel(model_of("plain"), length=4)}),
    "other model": ("plain", lambda: {"speculation": DraftModel(make_model(1, SMALLER_SLIDING), length=3)}),
    "hints": ("plain", lambda: {"speculation": Hints(known_tokens(), 5, 3, wrong=1)}),
    "garbage": ("plain", lambda: {"speculation": Hints(known_tokens(), 4, 1, wrong=4)}),
    "tree, paged int8": ("int8", lambda: {"speculation": TREE, "storage": caches.Paged(16, 24, caches.Int8())}),
    "hints, window": ("window", lambda: {"speculation": Hints(known_tokens("window"), 7, 1, 1)} | OPTIONS["window"]),
    "same model, sliding": ("sliding", lambda: {"speculation": DraftModel(model_of("sliding"), length=4)}),
}
OPTIONS = {"int8": {"storage": caches.Int8()}, "window": {"policy": caches.Window(20, sinks=2), "capacity": 48}}
CONFIGS = {"sliding": SLIDING}
SLOW = {"same model, sliding"}


def marked(names: Iterable[str]) -> list:
    return [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in names]


@functools.cache
def model_of(plain: str) -> Decoder:
    return make_model(config=CONFIGS.get(plain, CONFIG))


@functools.cache
def generator(name: str) -> Generator:
    plain, options = VARIANTS.get(name, (name, lambda: OPTIONS.get(name, {})))
    sizes = {"batch_size": BATCH, "capacity": CAPACITY, "max_length": CAPACITY, "prefill_chunk": CHUNK}
    return Generator(model_of(plain), **(sizes | options()))


@dataclasses.dataclass
class Ran:
    """What came of ``REQUESTS``.

    Attributes:
      completions: one for each.
      drawn: all new tokens of each, with those that ended it.
      counted: turns, drafted and accepted, of all together.
    """

    completions: list[Completion]
    drawn: list[list[int]]
    counted: tuple[int, int, int]


@functools.cache
def ran(name: str) -> Ran:
    generator_ = generator(name)
    generator_.warmup()
    before, drawn = generator_.spent, [[] for _ in REQUESTS]
    handles = []
    for tokens, request in zip(drawn, REQUESTS, strict=True):
        handle = generator_.submit(**{field.name: getattr(request, field.name) for field in dataclasses.fields(Asked)})

        def extend(new, *rest, tokens=tokens, extend=handle.extend):
            tokens += new
            extend(new, *rest)

        handle.extend = extend
        handles.append(handle)
    generator_.run()
    spent = generator_.spent.since(before)
    return Ran([handle.result() for handle in handles], drawn, (spent.turns, spent.drafted, spent.accepted))


def known_tokens(plain: str = "plain") -> np.ndarray:
    known = np.zeros((len(REQUESTS), CAPACITY), np.int32)
    for request, tokens in zip(REQUESTS, ran(plain).drawn, strict=True):
        known[request.sampling.seed, : len(tokens)] = tokens
    return known


@pytest.fixture(autouse=True, scope="module")
def _forgotten_generators():
    yield
    for cached in (generator, model_of, ran):
        cached.cache_clear()


# --- the output is that of plain decoding ---


def test_the_requests_end_in_every_way():
    plain = ran("plain")
    reasons = [one.finish_reason for one in plain.completions]
    assert min(map(reasons.count, ("stop", "length", "capacity"))) >= 2
    ending = {len(drawn) - len(one.tokens) for drawn, one in zip(plain.drawn, plain.completions, strict=True)}
    assert ending == {0, 1, 2}, "some by a stop sequence of more than one token"
    assert plain.counted == (fed(plain, 1, lambda *_: None)[0], 0, 0)


@pytest.mark.parametrize("name", marked(VARIANTS))
def test_the_output_is_that_of_plain_decoding(name):
    expected, actual = ran(VARIANTS[name][0]), ran(name)
    assert actual.drawn == expected.drawn
    for one, plain in zip(actual.completions, expected.completions, strict=True):
        assert (one.tokens, one.finish_reason) == (plain.tokens, plain.finish_reason)
        np.testing.assert_allclose(one.logprobs, plain.logprobs, rtol=0, atol=tolerances.LOGPROBS)
        for top, plain_top in zip(one.top_logprobs, plain.top_logprobs, strict=True):
            assert [token for token, _ in top] == [token for token, _ in plain_top]
            values, plain_values = ([logprob for _, logprob in x] for x in (top, plain_top))
            np.testing.assert_allclose(values, plain_values, rtol=0, atol=tolerances.LOGPROBS)
    assert generator(name).compile_counts == ONE_EACH


@pytest.mark.parametrize("name", ["tree", "same model", "hints"])
def test_samples_of_one_prompt_are_those_of_plain_decoding(name):
    samples = Sampling(12, temperature=1.0, seed=1), 3
    prompts, negatives = [prompt_of(18), prompt_of(5)], [prompt_of(3), prompt_of(21)]
    for options in ({"num_samples": 4}, {"num_samples": 2, "negative_prompts": negatives, "guidance_scale": 1.5}):
        plain, actual = (generator(one).generate(prompts, samples[0], samples[1], **options) for one in ("plain", name))
        assert actual.tokens == plain.tokens
        assert actual.finish_reasons == plain.finish_reasons
    assert generator(name).compile_counts == ONE_EACH


@pytest.mark.parametrize("name", ["chain", "tree", "same model"])
def test_random_programs_compile_once_and_change_nothing(name):
    rng = np.random.default_rng(5)
    for call in range(8):
        lengths = rng.integers(1, CAPACITY, rng.integers(1, 2 * BATCH))
        settings = [
            Sampling(
                max_new_tokens=int(rng.integers(1, 40)),
                temperature=float(rng.choice([0.0, 0.5, 1.0])),
                top_k=int(rng.choice([0, 3])),
                frequency_penalty=float(rng.choice([0, 0.3])),
                seed=int(rng.integers(2**32)),
            )
            for _ in lengths
        ]
        prompts, stop = [prompt_of(int(length), call) for length in lengths], ((), 3, [[1, 3], [9]])[call % 3]
        plain, actual = (generator(one).generate(prompts, settings, stop) for one in ("plain", name))
        assert (actual.tokens, actual.finish_reasons) == (plain.tokens, plain.finish_reasons)
        assert actual.stats.turns + actual.stats.accepted == plain.stats.turns
    assert generator(name).compile_counts == ONE_EACH


# --- what is counted ---


def fed(plain: Ran, nodes: int, drafts_of: Callable[[Asked, list[int], int], list[list[int]] | None]) -> tuple:
    """Turns, drafted and accepted, when every request is replayed alone.

    Args:
      plain: what was drawn.
      nodes: of a step.
      drafts_of: what is drafted, given the request, all of its tokens, and how many of them are new.
    """
    turns = drafted = accepted = 0
    for request, drawn in zip(REQUESTS, plain.drawn, strict=True):
        rows = 1 if request.negative_prompt is None else 2
        longest = max(len(request.prompt), len(request.negative_prompt or ()))
        done = 0
        while done < len(drawn):
            drafts = None
            if longest + done - 1 + nodes <= CAPACITY:
                drafts = drafts_of(request, request.prompt + drawn[:done], done)
            right = 0
            for draft in drafts or ():
                same = np.array(draft) == np.array([*drawn, *[-1] * len(draft)])[done : done + len(draft)]
                right = max(right, int(np.cumprod(same).sum()))
            new = min(right + 1, len(drawn) - done)
            turns, accepted, done = turns + rows, accepted + rows * (new - 1), done + new
            drafted += rows * len(drafts[0]) if drafts else 0
    return turns, drafted, accepted


def looked_up(tokens: list[int], speculation: PromptLookup) -> list[list[int]]:
    """What PromptLookup drafts, place by place."""
    places = []
    for place in range(len(tokens) - 1):
        agree = 0
        while agree < min(speculation.ngram, place + 1) and tokens[place - agree] == tokens[len(tokens) - 1 - agree]:
            agree += 1
        if agree:
            places.append((agree, place))
    drafts: dict[int, list[int]] = {}
    for _, place in sorted(places, reverse=True):
        following = list(tokens)
        while len(following) < len(tokens) + speculation.length:
            following.append(following[place + 1 + len(following) - len(tokens)])
        drafts.setdefault(tokens[place + 1], following[len(tokens) :])
    return list(drafts.values())[: speculation.num_candidates]


@pytest.mark.parametrize("name", ["chain", "tree", "hints", "garbage"])
def test_counts_are_those_of_a_replay(name):
    speculation = generator(name).speculation
    hints = jax.jit(speculation.of) if isinstance(speculation, Hints) else None

    def drafts_of(request: Asked, tokens: list[int], done: int) -> list[list[int]] | None:
        if hints is None:
            return looked_up(tokens, speculation) or None
        drafts, found = hints(np.array([request.sampling.seed]), np.array([done], np.int32))
        return np.asarray(drafts)[0].tolist() if found[0] else None

    assert ran(name).counted == fed(ran("plain"), num_nodes(speculation), drafts_of)
    assert ran(name).counted[2] > 0


@pytest.mark.parametrize("name", marked(["same model", "same model, sliding"]))
def test_a_draft_model_that_is_the_model_is_always_right(name):
    plain = ran(VARIANTS[name][0])
    drawn = {request.sampling.seed: tokens for request, tokens in zip(REQUESTS, plain.drawn, strict=True)}

    def drafts_of(request: Asked, _: list[int], done: int) -> list[list[int]]:
        following = [*drawn[request.sampling.seed], *[-1] * 4]
        return [following[done : done + 4]]

    assert ran(name).counted == fed(plain, 5, drafts_of)


def test_another_draft_model_is_often_wrong():
    turns, drafted, accepted = ran("other model").counted
    assert 0 < accepted < drafted / 2
    assert turns + accepted == ran("plain").counted[0]


def test_what_repeats_itself_comes_many_tokens_at_a_time():
    prompt = [9, 13, 10] * 4
    result = generator("chain").generate([prompt], Sampling(100, logit_bias={9: 50.0}))
    assert result.tokens[0] == [9] * 100  # more than one report holds
    assert result.stats.turns + result.stats.accepted == 100
    assert 100 / result.stats.turns > 5


# --- the caches ---


Snapshot = tuple[list[np.ndarray], list[np.ndarray], list[int]]


def snapshots(generator_: Generator, handles: list[Handle]) -> dict[tuple[int, int], Snapshot]:
    """By handle and how many tokens it has: of its row in every layer, positions, keys and values, and length."""
    found = {}
    for job in generator_._scheduler._active:
        row, index = job.rows[0], handles.index(job.handles[0])
        if not job.readings:
            of_row = [(cache.positions[row, 0], cache.key[row], cache.value[row]) for cache in _caches(generator_)]
            positions, keys, values = ([np.asarray(x) for x in xs] for xs in zip(*of_row, strict=True))
            held = [np.stack(pair) for pair in zip(keys, values, strict=True)]
            lengths = [int(cache.lengths[row]) for cache in _caches(generator_)]
            found[index, len(job.prompt) + len(job.handles[0].tokens)] = positions, held, lengths
    return found


def _caches(generator_: Generator) -> tuple[caches.KVCache, ...]:
    return generator_._engine._state.caches


def run_in_steps(name: str) -> dict[tuple[int, int], Snapshot]:
    """Snapshots after every step of three requests that do not end before they are cancelled."""
    generator_, found = generator(name), {}
    requests = [(21, 0.0), (2, 0.5), (33, 1.0)]
    handles = [
        generator_.submit(prompt_of(length), Sampling(60, temperature=temperature, logit_bias={EOS: -50.0}, seed=seed))
        for seed, (length, temperature) in enumerate(requests)
    ]
    while (name not in VARIANTS or any(len(handle.tokens) < 16 for handle in handles)) and generator_.step(1):
        found |= snapshots(generator_, handles)
    for handle in handles:
        handle.cancel()
    generator_.run()
    assert all((cache.positions == -1).all() for cache in _caches(generator_))
    return found


@pytest.mark.parametrize("name", ["chain", "tree", "hints", "same model", "other model", "hints, window"])
def test_caches_hold_what_was_accepted(name):
    plain, actual = run_in_steps(VARIANTS[name][0]), run_in_steps(name)
    assert len(actual) > 10
    if name not in ("chain", "tree"):
        assert len({length for _, length in actual}) < len({length for _, length in plain})
    for at, (positions, held, lengths) in actual.items():
        length = at[1] - 1  # the newest token is in no cache
        expected_positions, expected, _ = plain[at]
        layers = CONFIG.num_layers
        assert lengths[:layers] == [length] * layers
        assert all(length - 1 <= one <= length for one in lengths[layers:])
        for layer, position in enumerate(positions):
            real = position >= 0
            if layer < layers and name != "hints, window":
                np.testing.assert_array_equal(position, expected_positions[layer])
            elif layer < layers:  # what lies before the window may be gone for tokens that were taken back
                kept = expected_positions[layer]
                np.testing.assert_array_equal(real, real & (position == kept))
                needed = (kept >= 0) & ((kept >= length - 20) | (kept < 2))
                assert (real >= needed).all()
            else:
                newest = np.sort(position[real])[-7:]  # what a query in a window of 8 sees
                np.testing.assert_array_equal(newest, np.arange(lengths[layer])[-len(newest) :])
                assert len(newest) == min(7, lengths[layer])
            if layer < layers or name == "same model":
                error = np.abs(held[layer] - expected[layer % layers])[:, real].max()
                assert error <= tolerances.CACHED_LOGITS


@pytest.mark.parametrize("speculation", ["tree", "draft model"])
def test_caches_are_updated_in_place(speculation):
    capacity = 9984  # a number that no other array has
    model = make_model(config=dataclasses.replace(SMALLER, head_dim=32))
    drafts = TREE if speculation == "tree" else DraftModel(model, 2)
    generator_ = Generator(model, batch_size=3, capacity=capacity, prefill_chunk=CHUNK, speculation=drafts)
    engine = generator_._engine
    state = engine.abstract_state()
    compiled = engine._decode.lower(engine._weights(), state, np.int32(1), np.bool_(False)).compile()
    text = compiled.as_text()
    shape = rf"\w+\[3,{capacity},1,32\]"
    assert all(re.fullmatch(shape, f"f32[{','.join(map(str, cache.key.shape))}]") for cache in state.caches)
    assert re.search(shape, text)
    assert "input_output_alias=" in text.partition("\n")[0]
    assert not re.search(rf"= {shape}\S* copy\(", text)
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= sum(cache.nbytes for cache in state.caches)
    assert memory.temp_size_in_bytes < math.prod(state.caches[0].key.shape) * 4


# --- PromptLookup ---


look_up = {
    speculation: jax.jit(speculation.look_up)
    for speculation in (PromptLookup(5, 1), PromptLookup(7, 3), PromptLookup(3, 2, 4), PromptLookup(2, 4, 7))
}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=17), min_size=3, max_size=3))
def test_look_up_finds_the_longest_agreement_then_the_latest(rows):
    tokens = np.full((3, 17), 2, np.int32)  # what a row held before means nothing
    for row, known in enumerate(rows):
        tokens[row, : len(known)] = known
    for speculation, run in look_up.items():
        drafts, found = run(tokens, np.array([len(known) for known in rows], np.int32))
        assert drafts.dtype == jnp.int32
        for row, known in enumerate(rows):
            expected = looked_up(known, speculation)
            assert bool(found[row]) == bool(expected)
            expected += [[-1] * speculation.length] * (speculation.num_candidates - len(expected))
            assert drafts[row].tolist() == expected


# --- common random numbers ---


def agreement(p: np.ndarray, q: np.ndarray) -> float:
    """How often the two largest of log p + g and log q + g are the same (arXiv:1809.04052, definition 1)."""
    with np.errstate(divide="ignore", invalid="ignore"):
        largest = np.fmax(p[None] / p[:, None], q[None] / q[:, None]).sum(1)
    return float(np.where((p > 0) & (q > 0), 1 / largest, 0).sum())


def distance(p: np.ndarray, q: np.ndarray) -> float:
    return float(np.abs(p - q).sum() / 2)


@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.floats(0.1, 5))
def test_the_bounds_of_the_agreement(seed, size, spread):
    rng = np.random.default_rng(seed)
    p, q = (np.exp(spread * rng.standard_normal(size)) * (rng.random(size) < 0.8) + 1e-9 for _ in "pq")
    p, q = p / p.sum(), q / q.sum()
    d = distance(p, q)
    found = agreement(p, q) * (1 + 1e-12)
    assert found >= (p * q).sum()
    assert found >= (1 - d) / (1 + d)
    assert found <= (1 - d) * (1 + 1e-9)


PAIRS = {
    "near": ([0.5, 0.25, 0.15, 0.1], [0.4, 0.3, 0.2, 0.1]),
    "far": ([0.7, 0.1, 0.1, 0.1, 0.0], [0.1, 0.2, 0.3, 0.3, 0.1]),
}


@pytest.mark.parametrize("name", PAIRS)
def test_draws_with_common_random_numbers_agree_more_often_than_independent_ones(name):
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
    """20,000 seeds: two tokens, of which the first is drafted right as often as theory says."""
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
        """[6, 6] of both tokens."""
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


# --- the shipped checkpoint ---


@pytest.mark.parametrize(
    "make",
    [
        lambda model: PromptLookup(8),
        pytest.param(lambda model: PromptLookup(5, 2, 3), marks=pytest.mark.slow),
        pytest.param(lambda model: DraftModel(model), marks=pytest.mark.slow),
    ],
    ids=["chain", "tree", "same model"],
)
def test_a_trained_model_answers_the_same(make):
    directory = Path(str(importlib.resources.files("pallas_attn_models") / "checkpoint"))
    model = load_hf(directory, dtype=jnp.float32)
    prompts = [tasks.encode(one.prompt) for task in tasks.TASKS for one in tasks.held_out_prompts(task, 8, seed=11)]
    sizes = {"batch_size": 8, "capacity": 512, "prefill_rows": 4}
    settings = [Sampling(16, temperature=temperature, seed=7) for temperature in np.linspace(0, 0.8, len(prompts))]
    plain, actual = (
        Generator(model, speculation=one, **sizes).generate(prompts, settings) for one in (None, make(model))
    )
    assert actual.tokens == plain.tokens
    assert actual.finish_reasons == plain.finish_reasons
    assert set(plain.finish_reasons) == {"stop"}
    assert actual.stats.accepted > 0
    assert actual.stats.turns + actual.stats.accepted == plain.stats.turns


# --- what is refused, before anything is compiled ---


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PromptLookup(0), "length: expected an int of at least 1, got 0"),
        (lambda: PromptLookup(2.0), "length: expected an int of at least 1, got 2.0"),
        (lambda: PromptLookup(True), "length: expected an int of at least 1, got True"),
        (lambda: PromptLookup(ngram=0), "ngram: expected an int of at least 1, got 0"),
        (lambda: PromptLookup(num_candidates=0), "num_candidates: expected an int of at least 1, got 0"),
        (lambda: PromptLookup(16), "length, num_candidates: expected at most 15 drafted tokens together, got 1 of 16"),
        (lambda: PromptLookup(4, num_candidates=4), "at most 15 drafted tokens together, got 4 of 4"),
        (lambda: DraftModel(model_of("plain"), 16), "at most 15 drafted tokens together, got 1 of 16"),
        (lambda: DraftModel(model_of("plain"), 0), "length: expected an int of at least 1, got 0"),
    ],
)
def test_sizes_out_of_range(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


def test_the_largest_sizes():
    assert num_nodes(PromptLookup(15)) == num_nodes(PromptLookup(5, num_candidates=3)) == 16


def test_a_draft_model_of_another_kind():
    with pytest.raises(TypeError, match="model: expected a Decoder, got str"):
        DraftModel("path/to/model")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"speculation": CHAIN, "policy": caches.H2O(recent=8)}, "caches that can take 6 tokens back, got H2O("),
        (
            {"speculation": CHAIN, "policy": [caches.Dense(), caches.QHitter(recent=8)]},
            "caches that can take 6 tokens back, got QHitter(recent=8",
        ),
        (
            {"speculation": CHAIN, "policy": caches.Window(44), "max_length": 200, "prefill_chunk": 4},
            "speculation: expected caches that can take 6 tokens back, got Window(size=44, sinks=0) of capacity=48",
        ),
        (
            {"speculation": TREE, "policy": caches.Window(16)},
            "speculation: expected caches that can take 13 tokens back, from a tree: Dense, got Window(size=16",
        ),
        (
            {"speculation": DraftModel(Decoder(dataclasses.replace(SMALLER, vocab_size=17), rngs=nnx.Rngs(0)))},
            "speculation: expected a draft model with vocab_size=16, got 17",
        ),
    ],
    ids=["H2O", "one layer H2O", "no slack", "a tree in a window", "another vocabulary"],
)
def test_what_cannot_be_taken_back_is_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Generator(model_of("plain"), **({"batch_size": 2, "capacity": 48} | options))


def test_a_tree_in_layers_with_a_window_is_refused():
    with pytest.raises(ValueError, match=r"from a tree: Dense, got Window\(size=8"):
        Generator(model_of("sliding"), batch_size=2, capacity=64, speculation=TREE, prefill_chunk=CHUNK)
