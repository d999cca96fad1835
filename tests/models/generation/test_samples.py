"""Several continuations of one prompt equal separate requests; the prompt is prefilled, and its pages stored, once."""

import dataclasses

import numpy as np
import pytest

import pallas_attn as pa
from pallas_attn_models import Generator, Sampling
from tests.models.small_model import ONE_EACH, Ask, completions, make_model, prompt_of, random_ask

ROWS, CAPACITY, CHUNK, PAGE = 4, 48, 8, 16
RANDOM = Sampling(6, temperature=1.0, seed=11)


@pytest.fixture(scope="module")
def plain():
    return Generator(make_model(), batch_size=ROWS, capacity=CAPACITY, prefill_chunk=CHUNK, prefill_rows=2)


@pytest.fixture(scope="module")
def paged():
    storage = pa.caches.Paged(PAGE, ROWS * CAPACITY // PAGE)
    return Generator(make_model(), batch_size=ROWS, capacity=CAPACITY, prefill_chunk=CHUNK, storage=storage)


@pytest.fixture(params=["plain", "paged"])
def generator(request):
    generator = request.getfixturevalue(request.param)
    yield generator
    generator.run()
    assert generator.compile_counts == ONE_EACH
    for cache in generator._engine._state.caches:
        assert not cache.lengths.any()
        assert cache.pages is None or not cache.pages.users.any()


def test_each_sample_equals_a_request_with_its_seed(generator):
    rng = np.random.default_rng(3)
    for _ in range(12):
        ask = random_ask(rng, 30, budget=8)
        ask = dataclasses.replace(ask, num_samples=int(rng.integers(2, ROWS + 1)) if ask.negative is None else 2)
        assert ask.generate(generator) == [one.generate(generator)[0] for one in ask.samples()]


def test_seeds_go_on_from_the_last_to_the_first(generator):
    last = Ask(prompt_of(4), dataclasses.replace(RANDOM, seed=2**32 - 1), num_samples=2)
    first = Ask(prompt_of(4), dataclasses.replace(RANDOM, seed=0))
    assert last.generate(generator)[1] == first.generate(generator)[0]


def test_results_are_grouped_by_prompt(generator):
    prompts = [prompt_of(length) for length in (3, 20, 9)]
    samplings = [dataclasses.replace(RANDOM, seed=seed) for seed in (1, 5, 9)]
    result = generator.generate(prompts, samplings, num_samples=3)
    alone = [
        one
        for prompt, sampling in zip(prompts, samplings, strict=True)
        for one in Ask(prompt, sampling, num_samples=3).generate(generator)
    ]
    assert completions(result) == alone
    assert len(alone) == 9
    assert result.stats.prompt_tokens == 3 + 20 + 9
    assert result.stats.new_tokens == sum(len(one.tokens) for one in alone)


@pytest.mark.parametrize("negative", [None, prompt_of(12, 1)], ids=["plain", "guided"])
def test_the_prompt_is_prefilled_once(generator, monkeypatch, negative):
    generator.warmup()
    read = []
    prefill = generator._engine.prefill

    def count(work):
        read.append((int(work.count.sum()), int(work.num_copies)))
        prefill(work)

    monkeypatch.setattr(generator._engine, "prefill", count)
    Ask(prompt_of(30), RANDOM, negative, 1.0 if negative is None else 1.5, num_samples=2).generate(generator)
    tokens, copies = np.sum(read, axis=0)
    # All but the last, which the first decode step feeds.
    assert tokens == 29 + (0 if negative is None else 11)
    assert copies == (1 if negative is None else 2)


def test_pages_of_the_prompt_are_shared(paged):
    """40 tokens fill two and a half pages: four rows share two, and each has its own copy of the half."""
    handles = paged.submit_samples(prompt_of(40), 3, Sampling(6, temperature=1.0))
    most = 0
    while not all(handle.done for handle in handles):
        paged.step(1)
        cache = paged._engine._state.caches[0]
        most = max(most, int((cache.pages.users > 0).sum()))
        running = [row for row in range(ROWS) if cache.lengths[row] > 40]
        assert all((cache.pages.table[row, :2] == cache.pages.table[running[0], :2]).all() for row in running)
    # Two shared pages, three copies, and temporarily the copied page.
    assert most <= 2 + 3 + 1
    assert all(handle.finish_reason in ("length", "stop") for handle in handles)


@pytest.mark.parametrize("rounds", range(5))
def test_one_that_is_cancelled_leaves_the_others(generator, rounds):
    """Queued; during prefill, which takes three rounds; and running."""
    ask = Ask(prompt_of(22), RANDOM, num_samples=3)
    expected = ask.generate(generator)
    for index in range(3):
        handles = generator.submit_samples(ask.prompt, 3, ask.sampling)
        other = generator.submit(prompt_of(5), Sampling(3))
        for _ in range(rounds):
            generator.step(1)
        handles[index].cancel()
        assert handles[index].finish_reason == "cancelled"
        for row in {0, 1, 2} - {index}:
            assert handles[row].result() == expected[row]
        assert other.result().finish_reason == "length"


@pytest.mark.parametrize("rounds", range(5))
def test_cancelled_samples_leave_nothing(generator, rounds):
    handles = generator.submit_samples(prompt_of(22), 4, RANDOM)
    for _ in range(rounds):
        generator.step(1)
    for handle in handles:
        handle.cancel()
    assert sorted(generator._scheduler._free_rows) == list(range(ROWS))
    assert generator.generate([prompt_of(5)], Sampling(3)).finish_reasons == ["length"]
