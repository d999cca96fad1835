"""A Generator shared by threads: every request has the same result as alone, and no call waits forever."""

import collections
import gc
import threading
import time
from collections.abc import Callable, Iterable

import numpy as np
import pytest

from pallas_attn_models import Generator, QueueFull, Sampling
from pallas_attn_models.generation.fair_lock import FairLock
from pallas_attn_models.generation.requests import Completion
from tests.models.generation.test_serving import Broken, assert_interrupted, assert_nothing_is_held
from tests.models.small_model import ONE_EACH, make_model, prompt_of, random_ask

ROWS, CAPACITY, CHUNK, QUEUE, THREADS = 3, 48, 8, 6, 4
PATIENCE = 120  # seconds after which a thread counts as hung, on a busy machine too


def together(functions: Iterable[Callable[[], object]]) -> None:
    """Runs each function in its own thread; raises the first error, or if one does not end."""
    errors: list[BaseException] = []

    def caught(function: Callable[[], object]) -> None:
        try:
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=caught, args=(function,), daemon=True) for function in functions]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + PATIENCE
    while any(thread.is_alive() for thread in threads) and not errors and time.monotonic() < deadline:
        time.sleep(0.005)
    for thread in threads:
        thread.join(max(0.0, min(deadline - time.monotonic(), PATIENCE if not errors else 5)))
    if errors:
        raise errors[0]
    assert not [thread for thread in threads if thread.is_alive()], "somebody waits for ever"


@pytest.fixture(scope="module")
def hook() -> Broken:
    return Broken()


@pytest.fixture(scope="module")
def generator(hook):
    """Shared by the tests of this file."""
    one = Generator(
        make_model(), batch_size=ROWS, capacity=CAPACITY, prefill_chunk=CHUNK, max_queue=QUEUE, layer_hook=hook
    )
    compiled = collections.Counter()
    together([lambda: one.warmup(lambda name: compiled.update([name]))] * THREADS)
    assert compiled == {"prefill": 1, "decode": 1}
    yield one
    assert one.compile_counts["decode"] == one.compile_counts["prefill"] == 1


@pytest.fixture(autouse=True)
def _all_is_given_back(request):
    yield
    if "generator" in request.fixturenames:
        assert_nothing_is_held(request.getfixturevalue("generator"))


def test_many_threads_and_every_method(generator, hook):
    """200 requests of 4 threads: cancelled, abandoned and invalid ones, and occasional errors in a step."""
    rng = np.random.default_rng(0)
    asks = [random_ask(rng, CAPACITY - 12, budget=10) for _ in range(25)]
    expected = [ask.generate(generator)[0] for ask in asks]
    outcomes = collections.Counter()
    broken = threading.Lock()

    def check(kind: int, result: Completion) -> None:
        outcomes[result.finish_reason] += 1
        if result.finish_reason == "cancelled":
            assert_interrupted(result, expected[kind])
        else:
            assert result == expected[kind]

    def submit(kind: int):
        while True:
            try:
                return asks[kind].submit(generator)
            except QueueFull:
                outcomes["refused"] += 1
                generator.step()

    def wait(kind: int, rng) -> None:
        check(kind, submit(kind).result())

    def iterate(kind: int, rng) -> None:
        handle = submit(kind)
        assert list(handle) == handle.result().tokens
        check(kind, handle.result())

    def cancel(kind: int, rng) -> None:
        handle = submit(kind)
        if rng.random() < 0.5:
            generator.step(1)
        handle.cancel()
        check(kind, handle.result())

    def generate(kind: int, rng) -> None:
        (result,) = asks[kind].generate(generator)
        check(kind, result)

    def stream(kind: int, rng) -> None:
        tokens = []
        for event in asks[kind].stream(generator, int(rng.choice([1, 64]))):
            tokens += [] if event.token is None else [event.token]
            if rng.random() < 0.1:
                outcomes["left"] += 1
                break
        assert tokens == expected[kind].tokens[: len(tokens)]

    def score(kind: int, rng) -> None:
        (result,) = generator.score([asks[kind].prompt])
        assert len(result.logprobs) == len(asks[kind].prompt) - 1

    def refuse(kind: int, rng) -> None:
        with pytest.raises(ValueError, match="prompt"):
            generator.submit([])

    def interrupt(kind: int, rng) -> None:
        with broken:
            handle = submit(kind)
            hook.at_run = True
            try:
                handle.result()
            finally:
                hook.at_run = False

    ways = [wait] * 6 + [iterate] * 3 + [cancel] * 3 + [generate] * 3 + [stream] * 3 + [score, refuse, interrupt]

    def work(number: int) -> None:
        rng = np.random.default_rng([1, number])
        for _ in range(50):
            way = ways[rng.integers(len(ways))]
            try:
                way(int(rng.integers(len(asks))), rng)
            except Exception as error:
                if "no such direction" not in str(error.__cause__ or error):
                    raise
                outcomes["interrupted"] += 1

    together(lambda number=number: work(number) for number in range(THREADS))
    assert min(outcomes[one] for one in ("stop", "length", "cancelled", "left", "interrupted")) > 3
    for ask, one in zip(asks, expected, strict=True):
        assert ask.generate(generator) == [one]


def test_a_busy_thread_lets_the_others_in(generator):
    """Between two rounds of a thread, others submit, cancel and run rounds; they wait for a round or two."""
    rounds, waited = 0, []
    busy = threading.Event()

    def work_on():
        nonlocal rounds
        for _ in generator.stream([prompt_of(3)], Sampling(40, min_new_tokens=40)):
            rounds += 1
            if rounds == 3:
                busy.set()

    def timed(function):
        before = rounds
        result = function()
        waited.append(rounds - before)
        return result

    def come_in():
        busy.wait(PATIENCE)
        tokens = iter(timed(lambda: generator.submit(prompt_of(4), Sampling(2, min_new_tokens=2))))
        assert len([*tokens]) == 2
        handle = timed(lambda: generator.submit(prompt_of(5), Sampling(9)))
        timed(handle.cancel)

    together([work_on, come_in, come_in])
    assert rounds == 40
    assert len(waited) == 6
    assert max(waited) <= 4, waited


def test_a_finished_request_does_not_wait_for_another_thread(generator):
    """A short request that another thread finishes returns at once."""
    ends = []

    def ask(budget: int):
        generator.submit(prompt_of(4), Sampling(budget, min_new_tokens=budget)).result()
        ends.append(budget)

    with pytest.MonkeyPatch.context() as patch:
        decode = generator._engine.decode
        patch.setattr(generator._engine, "decode", lambda steps, eager: decode(min(steps, 2), eager))
        together([lambda budget=budget: ask(budget) for budget in (40, 1)])
    assert ends == [1, 40]


def test_an_error_in_one_thread_reaches_all(generator, hook):
    handles = [generator.submit(prompt_of(4, seed), Sampling(8)) for seed in range(5)]
    told: list[str] = []

    def wait(handle):
        try:
            told.append(handle.result().finish_reason)
        except Exception as error:
            told.append(f"{error.__cause__ or error}")

    expected = generator.generate([prompt_of(4, 4)], Sampling(8)).tokens
    handles = [generator.submit(prompt_of(4, seed), Sampling(8)) for seed in range(ROWS)]
    hook.at_run = True
    together(lambda handle=handle: wait(handle) for handle in handles)
    hook.at_run = False
    assert len(told) == ROWS
    assert all("no such direction" in one for one in told)
    assert generator.generate([prompt_of(4, 4)], Sampling(8)).tokens == expected


def test_scores_interrupted_by_another_thread_raise(generator, monkeypatch):
    """Partial scores are not returned."""
    generator.score([[3, 4]])
    started = threading.Event()
    score = generator._engine.score

    def slow(work):
        started.set()
        time.sleep(0.01)
        return score(work)

    monkeypatch.setattr(generator._engine, "score", slow)

    def interrupted():
        raise KeyboardInterrupt

    def interrupt():
        started.wait(PATIENCE)
        with generator._lock.hold(), monkeypatch.context() as patch:
            patch.setattr(generator._scheduler, "_admit", interrupted)
            with pytest.raises(KeyboardInterrupt):
                generator.step()

    def ask():
        with pytest.raises(RuntimeError, match="interrupted") as raised:
            generator.score([prompt_of(CAPACITY, seed) for seed in range(40)])
        assert isinstance(raised.value.__cause__, KeyboardInterrupt)

    together([ask, interrupt])


def test_an_iterator_closed_by_another_thread_frees_its_row(generator):
    events = generator.stream([prompt_of(3), prompt_of(20)], Sampling(20))
    next(events)
    together([events.close, lambda: generator.generate([prompt_of(5)], Sampling(4))])


def test_an_iterator_that_is_collected_in_the_middle_of_a_step(generator, monkeypatch):
    """The garbage collector may finalize it in any thread, with or without the lock."""
    expected = generator.generate([prompt_of(5)], Sampling(4))
    decode, take = generator._engine.decode, generator._scheduler._deliver
    abandoned = []

    def abandon() -> None:
        cycle = [generator.stream([prompt_of(3), prompt_of(20)], Sampling(20), interval=1)]
        next(cycle[0])
        cycle.append(cycle)
        abandoned.append(None)

    def collecting(function):
        def collected(*args, **options):
            gc.collect()
            return function(*args, **options)

        return collected

    gc.disable()
    try:
        for name, function in (("decode", decode), ("empty_batch", generator._engine.empty_batch)):
            abandon()
            with monkeypatch.context() as patch:
                patch.setattr(generator._engine, name, collecting(function))
                assert generator.generate([prompt_of(5)], Sampling(4)).tokens == expected.tokens
        abandon()
        with monkeypatch.context() as patch:
            patch.setattr(generator._scheduler, "_deliver", collecting(take))
            together([lambda: generator.generate([prompt_of(5)], Sampling(4))] * 3)
    finally:
        gc.enable()
    assert len(abandoned) == 3


def test_requests_in_the_middle_of_an_iteration(generator):
    """Calls in the middle of an iteration, in every thread."""

    def read():
        asked = []
        for token in generator.submit(prompt_of(6), Sampling(6, min_new_tokens=6)):
            asked.append(generator.submit([token, 3], Sampling(2)))
            generator.generate([[token]], Sampling(1))
        assert len([handle.result() for handle in asked]) == 6

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generator._scheduler, "_max_queue", 100)
        together([read] * 3)


def test_the_progress_callback_may_submit(hook):
    """The callback runs in the thread that holds the lock, which may take it again."""
    one = Generator(make_model(), batch_size=1, capacity=16, prefill_chunk=8)
    handles = []
    one.warmup(lambda name: handles.append(one.submit([3, 4], Sampling(2))))
    assert [len(handle.result().tokens) for handle in handles] == [2, 2]
    assert one.compile_counts == ONE_EACH


def test_waiting_for_a_lost_request_raises(generator):
    for wait in (lambda handle: handle.result(), list):
        handle = generator.submit(prompt_of(3), Sampling(4))
        generator._scheduler._queue.clear()
        with pytest.raises(RuntimeError, match="interrupted") as raised:
            wait(handle)
        assert "lost" in str(raised.value.__cause__)


# --- the fair lock ---


def test_the_lock_is_exclusive_and_first_come_first_served():
    lock = FairLock()
    inside: list[int] = []
    order: list[int] = []

    def enter(number: int):
        with lock.hold(), lock.hold():
            inside.append(number)
            assert inside == [number]
            time.sleep(0.001)
            order.append(inside.pop())

    threads = [threading.Thread(target=enter, args=(number,), daemon=True) for number in range(6)]
    with lock.hold():
        for number, thread in enumerate(threads):
            thread.start()
            while len(lock._queue) < number + 2:
                time.sleep(0.001)
    for thread in threads:
        thread.join(PATIENCE)
    assert order == [*range(6)]
    assert not lock._queue


def test_a_thread_that_retakes_the_lock_lets_the_others_in():
    lock, over = FairLock(), threading.Event()
    counts = collections.Counter()

    def take(name: str):
        while not over.is_set():
            with lock.hold():
                counts[name] += 1
                if counts[name] > 300:
                    over.set()

    together(lambda name=name: take(name) for name in "abc")
    assert min(counts.values()) > 250, counts


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_errors_release_the_lock(error, monkeypatch):
    lock = FairLock()
    with pytest.raises(error), lock.hold(), lock.hold():
        raise error
    assert not lock._queue

    def interrupted():
        """While it waits for the lock."""
        with monkeypatch.context() as patch:
            patch.setattr(lock._changed, "wait_for", lambda _: (_ for _ in ()).throw(error))
            with pytest.raises(error), lock.hold():
                pass

    with lock.hold():
        together([interrupted])
        assert len(lock._queue) == 1
    with lock.hold():
        pass


def test_the_lock_is_taken_only_if_free():
    lock = FairLock()
    took = []

    def look():
        with lock.hold_if_free() as took_it:
            took.append(took_it)

    look()
    with lock.hold():
        look()
        together([look])
    with lock.hold_if_free():
        look()
    together([look])
    assert took == [True, False, False, False, True]
