"""Requests that start, end and fail in any order give the same results as alone, and nothing leaks."""

import collections
import contextlib
import dataclasses
import itertools
import re
import sys
from collections.abc import Iterator

import chex
import jax
import numpy as np
import pytest

import pallas_attn as pa
from pallas_attn_models import Generator, QueueFull, Sampling
from pallas_attn_models.generation import steps
from pallas_attn_models.generation.generator import StreamEvent
from pallas_attn_models.generation.requests import Completion, Handle
from pallas_attn_models.generation.state import RUNNING
from tests.models.small_model import CONFIG, ONE_EACH, Ask, make_model, prompt_of, random_ask

ROWS, CAPACITY, CHUNK, QUEUE = 4, 48, 8, 6
PAGE = 16


@pytest.fixture(scope="module")
def generator():
    """Shared by the tests of this file. Tracing one of its functions a second time is an error."""
    chex.clear_trace_counter()  # counts by name, across test modules
    with pytest.MonkeyPatch.context() as patch:
        for name in ("prefill", "decode"):
            patch.setattr(steps, name, chex.assert_max_traces(getattr(steps, name), n=1))
        generator = Generator(
            make_model(), batch_size=ROWS, capacity=CAPACITY, prefill_chunk=CHUNK, max_queue=QUEUE, prefill_rows=2
        )
    generator.warmup()
    yield generator
    assert generator.compile_counts == ONE_EACH


@pytest.fixture(scope="module")
def paged():
    """Seven pages; four full rows would need three each."""
    return paged_generator(7)


@pytest.fixture(scope="module")
def small_pool():
    """Two pages; one full row would need three."""
    return paged_generator(2)


def paged_generator(num_pages: int) -> Generator:
    storage = pa.caches.Paged(PAGE, num_pages)
    return Generator(
        make_model(), batch_size=ROWS, capacity=CAPACITY, prefill_chunk=CHUNK, max_queue=QUEUE, storage=storage
    )


@pytest.fixture(autouse=True)
def _all_is_given_back(request):
    """After every test, rows and pages are free, on the host and on the device."""
    yield
    for name in {"generator", "paged", "small_pool"} & set(request.fixturenames):
        assert_nothing_is_held(request.getfixturevalue(name))


def assert_nothing_is_held(generator: Generator) -> None:
    generator.run()
    scheduler, state = generator._scheduler, generator._engine._state
    assert sorted(scheduler._free_rows) == list(range(generator.batch_size))
    assert not scheduler._active
    if state is None:
        return
    assert not (state.rows.status == RUNNING).any()
    for cache in state.caches:
        assert not cache.lengths.any()
        assert (cache.positions == -1).all()
        if cache.pages is not None:
            assert not cache.pages.users.any()
            assert (cache.pages.table == -1).all()


# --- two executables, independent requests ---


def test_random_programs(generator, compilations):
    """Random operations: nothing compiles, and every request has the same result as alone."""
    rng = np.random.default_rng(5)
    random_ask(rng, 10).generate(generator)
    compilations.clear()
    handles: list[tuple[Ask, Handle]] = []
    streams: list[tuple[Ask, Iterator[StreamEvent], list[StreamEvent]]] = []
    done: list[tuple[Ask, Completion]] = []

    def several() -> Ask:
        return dataclasses.replace(random_ask(rng, CAPACITY), num_samples=int(rng.integers(1, 3)))

    def submit():
        ask = random_ask(rng, CAPACITY)
        try:
            handles.append((ask, ask.submit(generator)))
        except QueueFull:
            generator.step()

    def step():
        generator.step(int(rng.choice([1, 3, 64])))

    def cancel():
        handles[rng.integers(len(handles))][1].cancel()

    def stream():
        ask = several()
        streams.append((ask, ask.stream(generator, int(rng.choice([1, 3, 64]))), []))

    def read_on():
        for _, events, seen in streams:
            seen += itertools.islice(events, int(rng.integers(6)))

    def interrupt():
        streams.pop(int(rng.integers(len(streams))))  # dropping the last reference closes a stream

    def generate():
        ask = several()
        done.extend(zip(ask.samples(), ask.generate(generator), strict=True))

    for begin in (submit, stream, stream):
        begin()
    operations = [submit] * 8 + [step] * 4 + [cancel] * 2 + [stream] * 2 + [read_on] * 2 + [interrupt, generate]
    for _ in range(200):
        operations[rng.integers(len(operations))]()
    generator.run()
    done += [(ask, handle.result()) for ask, handle in handles]
    for ask, events, seen in streams:
        seen += events
        for row, expected in enumerate(ask.generate(generator)):
            assert_told(expected, [event for event in seen if event.row == row])
    for ask, result in done:
        (expected,) = ask.generate(generator)
        if result.finish_reason == "cancelled":
            assert_interrupted(result, expected)
        else:
            assert result == expected
    assert {result.finish_reason for _, result in done} == {"stop", "length", "capacity", "cancelled"}
    assert generator.compile_counts == ONE_EACH
    assert not compilations


def assert_told(expected: Completion, events: list[StreamEvent]) -> None:
    """The events of a row are its result."""
    assert [event.token for event in events if event.token is not None] == expected.tokens
    assert [event.finish_reason for event in events] == [*[None] * (len(events) - 1), expected.finish_reason]


def assert_interrupted(result: Completion, expected: Completion) -> None:
    """Its tokens are a prefix of the other's, except for the beginning of a stop sequence."""
    size = len(expected.tokens)
    assert len(result.tokens) <= size + 1
    assert result.tokens[:size] == expected.tokens[: len(result.tokens)]
    assert result.logprobs[:size] == expected.logprobs[: len(result.logprobs)]


def test_neighbors_and_order_make_no_difference(generator):
    """The same requests in other orders, with other rows and neighbors."""
    rng = np.random.default_rng(8)
    asks = [random_ask(rng, CAPACITY) for _ in range(24)]
    expected = [ask.generate(generator)[0] for ask in asks]
    for interval in (1, 3, 64):
        handles = {}
        for index in rng.permutation(len(asks)).tolist():
            while generator._scheduler.queue_full:
                generator.step(interval)
            handles[index] = asks[index].submit(generator)
        while generator.step(interval):
            pass
        assert [handles[index].result() for index in range(len(asks))] == expected


def test_decode_copies_no_tokens_and_no_counts(small_pool):
    """Besides the state, which is updated in place, it allocates nothing as large as all tokens or all counts."""
    engine = small_pool._engine
    state = engine.abstract_state()
    compiled = engine._decode.lower(engine._weights(), state, np.int32(1), np.bool_(False)).compile()
    text = compiled.as_text()
    for array in (state.rows.tokens, state.rows.counts):
        shape = f"s32\\[{','.join(map(str, array.shape))}\\]"
        assert re.search(rf"= {shape}\S* (fusion|scatter|while|get-tuple-element)\(", text)
        assert not re.search(rf"= {shape}\S* copy\(", text)
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    assert compiled.memory_analysis().alias_size_in_bytes >= held


# --- load ---


@pytest.mark.parametrize("name", ["generator", "paged"])
def test_nothing_is_lost_under_load(name, request):
    """500 requests, some of them invalid, and cancellations of queued, prefilling and running ones."""
    generator = request.getfixturevalue(name)
    rng = np.random.default_rng(1)
    kinds = [random_ask(rng, CAPACITY, budget=12) for _ in range(25)]
    expected = [ask.generate(generator)[0] for ask in kinds]
    assert "capacity" in {one.finish_reason for one in expected}
    waiting: list[tuple[int, Handle]] = []
    cancelled = collections.Counter()
    refused = most = 0
    for _ in range(500):
        kind = int(rng.integers(len(kinds)))
        try:
            waiting.append((kind, kinds[kind].submit(generator)))
        except QueueFull:
            refused += 1
            generator.step(int(rng.choice([1, 4, 64])))
        most = max(most, len(generator._scheduler._active))
        if rng.random() < 0.3:
            _, handle = waiting[-int(rng.integers(1, min(12, len(waiting)) + 1))]
            cancelled[doing(generator, handle)] += not handle.done
            handle.cancel()
        if rng.random() < 0.1:
            with pytest.raises(ValueError, match="prompt"):
                generator.submit([[], prompt_of(CAPACITY), [CONFIG.vocab_size]][rng.integers(3)])
    generator.run()
    assert refused > 50
    assert most >= 3
    assert min(cancelled[what] for what in ("queued", "prefilling", "running")) >= 5
    for kind, handle in waiting:
        result = handle.result()
        if result.finish_reason == "cancelled":
            assert_interrupted(result, expected[kind])
        else:
            assert result == expected[kind]
    assert sum(handle.finish_reason == "cancelled" for _, handle in waiting) == sum(
        cancelled[what] for what in ("queued", "prefilling", "running")
    )


def doing(generator: Generator, handle: Handle) -> str:
    scheduler = generator._scheduler
    if any(handle in group.handles for group in scheduler._queue):
        return "queued"
    groups = [group for group in scheduler._active if handle in group.handles]
    return "done" if not groups else "prefilling" if groups[0].prefills else "running"


def test_a_full_queue_refuses_and_keeps_what_it_has(generator):
    handles = [generator.submit(prompt_of(5, seed), Sampling(4)) for seed in range(QUEUE)]
    with pytest.raises(QueueFull, match=f"max_queue: {QUEUE} requests are queued already"):
        generator.submit(prompt_of(5), Sampling(4))
    assert generator.generate([prompt_of(3, seed) for seed in range(10)], Sampling(2)).finish_reasons == ["length"] * 10
    assert [handle.result().tokens for handle in handles] == [
        generator.generate([prompt_of(5, seed)], Sampling(4)).tokens[0] for seed in range(QUEUE)
    ]


# --- pages ---


def test_admission_respects_the_pool(paged):
    """Seven pages and three per request: two requests at a time, despite four rows."""
    handles = [paged.submit(prompt_of(30, seed), Sampling(15)) for seed in range(5)]
    used = []
    while not all(handle.done for handle in handles):
        paged.step(1)
        used.append(int((paged._engine._state.caches[0].pages.users > 0).sum()))
        assert len(paged._scheduler._active) <= 2
    assert max(used) == 6
    assert [handle.finish_reason for handle in handles] == ["length"] * 5


def test_a_prompt_that_the_pool_cannot_hold_leaves_no_pages_behind(small_pool):
    result = small_pool.generate([prompt_of(40)], Sampling(4))
    assert result.finish_reasons == ["capacity"]
    assert result.tokens == [[]]
    expected = small_pool.generate([prompt_of(20)], Sampling(4))
    assert expected.finish_reasons == ["length"]
    # Now with neighbors, which are unaffected.
    many = small_pool.generate([prompt_of(20), prompt_of(40), prompt_of(20)], Sampling(4))
    assert many.finish_reasons == ["length", "capacity", "length"]
    assert many.tokens[0] == many.tokens[2] == expected.tokens[0]


def test_samples_wait_for_the_pages_of_their_copies(paged):
    """Three rows of two pages each, the first one shared; while the second is copied, five pages are in use."""
    long = paged.submit(prompt_of(33), Sampling(12))
    paged.step(1)
    handles = paged.submit_samples(prompt_of(20), 3, Sampling(4, temperature=1.0))
    paged.run()
    assert {handle.finish_reason for handle in (long, *handles)} <= {"length", "stop"}


# --- fairness ---


def test_no_request_starves(generator):
    """Amid endless short requests, a long prompt and a request that needs all rows are served within some rounds."""
    rounds = 0
    short: list[Handle] = []

    def feed():
        while len(generator._scheduler._queue) < 3:
            short.append(generator.submit(prompt_of(3, len(short)), Sampling(3)))

    def finish(handle) -> None:
        start = rounds
        while not handle.done:
            one_round()
            assert rounds - start < 30

    def one_round():
        nonlocal rounds
        feed()
        generator.step()
        rounds += 1

    for _ in range(5):
        one_round()
    long = generator.submit(prompt_of(40), Sampling(5))
    finish(long)
    # Two samples with a negative prompt each: all four rows.
    for handle in generator.submit_samples(prompt_of(30), 2, Sampling(5), (), prompt_of(4), 1.5):
        finish(handle)
    assert len(short) > 20
    generator.run()
    assert {handle.finish_reason for handle in short} <= {"length", "stop"}


def test_running_rows_continue_during_a_long_prefill(generator):
    running = [generator.submit(prompt_of(4, seed), Sampling(30)) for seed in range(2)]
    generator.step(3)
    assert [len(handle.tokens) for handle in running] == [3, 3]
    long = generator.submit(prompt_of(CAPACITY - 4), Sampling(4))
    chunks = -(-(CAPACITY - 5) // CHUNK)
    for number in range(1, chunks):
        generator.step()
        assert [len(handle.tokens) for handle in running] == [3 + number] * 2
        assert not long.tokens
    generator.step(1)
    assert len(long.tokens) == 1
    assert [len(handle.tokens) for handle in running] == [3 + chunks] * 2


# --- errors and interrupts ---


class Broken:
    """An identity layer hook that can raise during tracing or execution."""

    def __init__(self):
        self.at_trace = self.at_run = False

    def __call__(self, layer: int, hidden: jax.Array) -> jax.Array:
        if self.at_trace:
            raise LookupError("no such direction")
        return jax.pure_callback(self.run, hidden, hidden)

    def run(self, hidden):
        if self.at_run:
            raise LookupError("no such direction")
        return hidden


@pytest.fixture(scope="module")
def hooked():
    """A Generator with one row, not compiled yet, and its layer hook."""
    hook = Broken()
    return Generator(make_model(), batch_size=1, capacity=CAPACITY, prefill_chunk=CHUNK, layer_hook=hook), hook


def test_a_hook_that_raises_when_it_is_traced(hooked):
    """Before anything is compiled, and after prefill only, in the middle of a prompt."""
    generator, hook = hooked
    handle = generator.submit(prompt_of(30), Sampling(3))
    hook.at_trace = True
    for _ in range(2):
        with pytest.raises(LookupError, match="no such direction"):
            generator.step()
        with pytest.raises(LookupError, match="no such direction"):
            generator.generate([prompt_of(3)])
    assert not handle.done
    hook.at_trace = False
    # Prefill only, as after an interrupt of the compilation of decode.
    generator._scheduler.step()
    assert generator.compile_counts == {"prefill": 1, "decode": 0}
    waiting = generator.submit(prompt_of(9), Sampling(3))
    hook.at_trace = True
    with pytest.raises(LookupError, match="no such direction"):
        generator.generate([prompt_of(3)])
    hook.at_trace = False
    with pytest.raises(RuntimeError, match="interrupted") as raised:
        handle.result()
    assert isinstance(raised.value.__cause__, LookupError)
    assert waiting.result().tokens == generator.generate([prompt_of(9)], Sampling(3)).tokens[0]
    assert generator.compile_counts == ONE_EACH


def test_a_hook_that_raises_when_it_runs(hooked):
    generator, hook = hooked
    expected = [generator.generate([prompt_of(9, seed)], Sampling(5)).tokens[0] for seed in range(2)]
    for rounds in (0, 1, 2):  # of the first request, whose prefill takes two
        lost, waiting = (generator.submit(prompt_of(9, seed), Sampling(5)) for seed in range(2))
        for _ in range(rounds):
            generator.step(1)
        hook.at_run = True
        with pytest.raises(Exception, match="no such direction"):
            generator.step()
        hook.at_run = False
        with pytest.raises(RuntimeError, match="interrupted") as raised:
            lost.result()
        assert "no such direction" in str(raised.value.__cause__)
        with pytest.raises(RuntimeError, match="interrupted"):
            list(lost)
        assert waiting.result().tokens == expected[1]
        assert generator.generate([prompt_of(9)], Sampling(5)).tokens == expected[:1]
    assert_nothing_is_held(generator)
    assert generator.compile_counts == ONE_EACH


def test_an_interrupt_anywhere(paged):
    """Control-C at any line of the host modules: requests with rows may be lost, and report it."""
    asks = [Ask(prompt_of(20, seed), Sampling(4, seed=seed)) for seed in range(6)]
    asks[1] = Ask(prompt_of(20), Sampling(4), prompt_of(9), 1.5)
    expected = [ask.generate(paged)[0] for ask in asks]
    rng = np.random.default_rng(0)
    finished = lost = 0
    for after in [*range(1, 120, 2), *rng.integers(120, 1500, 40).tolist()]:
        handles = [ask.submit(paged) for ask in asks]
        handles[5].cancel()
        try:
            with interrupt(after):
                paged.step(2)
                handles[4].cancel()
                paged.run()
        except KeyboardInterrupt:
            pass
        for handle, one in zip(handles[:4], expected[:4], strict=True):
            try:
                result = handle.result()
            except RuntimeError:
                lost += 1
                assert isinstance(handle.error, KeyboardInterrupt)
            else:
                finished += 1
                assert result == one
        assert_nothing_is_held(paged)
    assert min(finished, lost) > 30


@contextlib.contextmanager
def interrupt(after: int):
    """Raises KeyboardInterrupt at the ``after``-th line executed in the Generator's modules."""
    modules = ("generator.py", "scheduler.py", "engine.py", "requests.py")
    left = after

    def trace(frame, event, _):
        nonlocal left
        if event == "call":
            name = frame.f_code.co_filename
            return trace if "pallas_attn_models" in name and name.endswith(modules) else None
        left -= event == "line"
        if left == 0:
            raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)
