"""Streams: the tokens of generate, each as soon as it is final, even if other calls drive the Generator."""

import itertools

import numpy as np
import pytest

from pallas_attn_models import Generator, Sampling, StreamEvent
from tests.models.small_model import CONFIG, ONE_EACH, Ask, make_model, prompt_of, random_ask

CAPACITY = 48


@pytest.fixture(scope="module")
def generator():
    generator = Generator(make_model(), batch_size=3, capacity=CAPACITY, prefill_chunk=8)
    generator.warmup()
    yield generator
    assert generator.compile_counts == ONE_EACH


@pytest.fixture
def greedy(generator) -> list[int]:
    """A greedy continuation of 12 tokens."""
    tokens = generator.generate([prompt_of(9)], Sampling(12)).tokens[0]
    assert len(tokens) == 12
    return tokens


def assert_nothing_is_held(generator: Generator) -> None:
    assert not generator._scheduler._active
    assert not generator._scheduler._queue
    generator.run()
    state = generator._engine._state
    assert state is not None
    for cache in state.caches:
        assert not cache.lengths.any()


@pytest.mark.parametrize("interval", [1, 3, 64, 1000])
def test_events_are_the_result(generator, interval):
    """Five prompts for three rows."""
    rng = np.random.default_rng(interval)
    for num_samples in (1, 2, 3):
        asks = [random_ask(rng, CAPACITY) for _ in range(5)]
        arguments = [ask.prompt for ask in asks], [ask.sampling for ask in asks], [11, (12, 13)]
        expected = generator.generate(*arguments, num_samples=num_samples)
        events = list(generator.stream(*arguments, num_samples=num_samples, interval=interval))
        for row, tokens in enumerate(expected.tokens):
            mine = [event for event in events if event.row == row]
            assert [event.token for event in mine if event.token is not None] == tokens
            assert [event.finish_reason for event in mine[:-1]] == [None] * (len(mine) - 1)
            assert mine[-1].finish_reason == expected.finish_reasons[row]
            assert None not in [event.token for event in mine[:-1]]


def test_a_stream_yields_every_step(generator, greedy):
    before = generator.spent.row_steps
    for index, event in enumerate(generator.stream([prompt_of(9)], Sampling(12))):
        assert event == StreamEvent(0, greedy[index], "length" if index == 11 else None)
        assert generator.spent.row_steps - before == index + 1
    handle = generator.submit(prompt_of(9), Sampling(12))
    before = generator.spent.row_steps
    for index, token in enumerate(handle):
        assert token == greedy[index]
        assert generator.spent.row_steps - before == index + 1


def test_possible_stop_sequences_are_withheld_until_decided(generator, greedy):
    """The third and fourth tokens begin a stop sequence that is not completed; the last two complete one."""
    other = next(token for token in range(10, CONFIG.vocab_size) if token not in greedy)
    stop = [(greedy[2], greedy[3], other), (greedy[10], greedy[11])]
    before = generator.spent.row_steps
    told = [
        (event.token, event.finish_reason, generator.spent.row_steps - before)
        for event in generator.stream([prompt_of(9)], Sampling(20), stop)
    ]
    turns = [1, 2, 5, 5, 5, *range(6, 11)]
    assert told == [
        *((token, None, turn) for token, turn in zip(greedy[:10], turns, strict=True)),
        (None, "stop", 12),
    ]


@pytest.mark.parametrize("taken", [0, 1, 2, 7, 40])
def test_leaving_a_stream_frees_the_rows(generator, taken):
    prompts = [prompt_of(30, seed) for seed in range(5)]
    events = generator.stream(prompts, Sampling(10), num_samples=2)
    other = generator.submit(prompt_of(9), Sampling(4))
    expected = generator.generate([prompt_of(9)], Sampling(4)).tokens[0]
    list(itertools.islice(events, taken))
    events.close()
    assert other.result().tokens == expected
    assert_nothing_is_held(generator)


@pytest.mark.parametrize("error", [LookupError, KeyboardInterrupt])
def test_a_stream_left_by_an_error_frees_its_rows(generator, greedy, error):
    def read():
        for _ in generator.stream([prompt_of(9), prompt_of(30)], Sampling(10)):
            raise error

    with pytest.raises(error):
        read()
    assert_nothing_is_held(generator)
    assert generator.generate([prompt_of(9)], Sampling(12)).tokens == [greedy]


def test_other_calls_advance_a_suspended_stream(generator):
    """Between two of its events, other calls may advance or finish a stream."""
    rng = np.random.default_rng(2)
    asks = [random_ask(rng, CAPACITY) for _ in range(4)]
    expected = [ask.generate(generator)[0] for ask in asks]
    for ask, one in zip(asks, expected, strict=True):
        for others in (
            lambda: generator.generate([prompt_of(3)], Sampling(2)),
            generator.step,
            generator.run,
            lambda: list(generator.stream([prompt_of(20)], Sampling(3))),
        ):
            tokens, reasons = [], []
            for event in ask.stream(generator, 1):
                tokens += [] if event.token is None else [event.token]
                reasons.append(event.finish_reason)
                others()
            assert tokens == one.tokens
            assert reasons == [*[None] * (len(reasons) - 1), one.finish_reason]


def test_streams_side_by_side(generator):
    asks = [Ask(prompt_of(5 + seed, seed), Sampling(12, temperature=1.0, seed=seed)) for seed in range(3)]
    expected = [ask.generate(generator)[0].tokens for ask in asks]
    told = [[], [], []]
    for together in itertools.zip_longest(*(ask.stream(generator, 1) for ask in asks)):
        for tokens, event in zip(told, together, strict=True):
            tokens += [] if event is None or event.token is None else [event.token]
    assert told == expected


def test_an_error_in_another_call_is_raised(generator, greedy, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    events = generator.stream([prompt_of(9)], Sampling(12))
    next(events)
    with monkeypatch.context() as patch:
        patch.setattr(generator._engine, "decode", interrupted)
        with pytest.raises(KeyboardInterrupt):
            generator.step()
    with pytest.raises(RuntimeError, match="interrupted") as raised:
        list(events)
    assert isinstance(raised.value.__cause__, KeyboardInterrupt)
    assert generator.generate([prompt_of(9)], Sampling(12)).tokens == [greedy]


@pytest.mark.parametrize("interval", [0, 1.0, True, None])
def test_an_invalid_interval(generator, interval):
    with pytest.raises(ValueError, match=f"interval: expected an int of at least 1, got {interval}"):
        generator.stream([prompt_of(3)], interval=interval)
