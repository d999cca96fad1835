"""Turns, clocks and the reported ratio."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bench.times import timing
from bench.times.timing import Contender, median_ratio, prepare, summary, take_turns


def test_ratio_is_taken_round_by_round():
    """A disturbance that slows a whole round must not change the ratio."""
    assert median_ratio([2.0, 20.0, 2.2], [1.0, 10.0, 1.0]) == 2.0
    with pytest.raises(ValueError, match="longer"):
        median_ratio([1.0], [1.0, 2.0])


def test_summary_in_milliseconds():
    assert summary([0.001, 0.002, 0.003]) == {"median": 2.0, "quartiles": [1.5, 2.5], "rounds": 3}


def test_turns_alternate_and_the_budget_ends_them():
    order = []

    def turn(name):
        order.append(name)
        return 1.0

    turns = {"a": lambda: turn("a"), "b": lambda: turn("b")}
    assert take_turns(turns, rounds=2, budget=60) == {"a": [1.0, 1.0], "b": [1.0, 1.0]}
    assert order == ["a", "b", "a", "b"]
    assert len(take_turns(turns, rounds=10, budget=0)["a"]) == 3, "at least three rounds"


def test_wall_clock_measures_the_length_of_a_call(monkeypatch):
    monkeypatch.setattr(timing, "_TURN_SECONDS", 0.02)
    prepared = prepare(Contender(lambda: time.sleep(0.004), [()], "host"), by_device=False)
    assert 0.004 <= prepared.turn() < 0.02


def test_long_calls_are_not_repeated(monkeypatch):
    monkeypatch.setattr(timing, "_LONG_SECONDS", 0.002)
    calls = []
    prepared = prepare(Contender(lambda: calls.append(time.sleep(0.004)), [()], "host"), by_device=False)
    calls.clear()
    assert prepared.turn() >= 0.004
    assert len(calls) == 1


def test_no_call_of_a_series_is_left_out(monkeypatch):
    """The same arrays as several sets of inputs: XLA must not compute one call and use it for all."""
    monkeypatch.setattr(timing, "_TURN_SECONDS", 1e-4)
    calls = []

    def note(x):
        calls.append(x)
        return x

    x = jnp.arange(4.0)
    function = lambda x: jax.pure_callback(note, jax.ShapeDtypeStruct((4,), jnp.float32), x)  # noqa: E731
    prepared = prepare(Contender(function, [(x,)] * 3), by_device=True)
    np.testing.assert_array_equal(prepared.returned, x)
    jax.effects_barrier()
    assert len(calls) == 3 * 3, "the first launch, and a row of two to see how long one takes"
    assert prepared.turn() > 0


@pytest.mark.parametrize("by_device", [False, True])
def test_a_state_is_carried_on(by_device, monkeypatch):
    monkeypatch.setattr(timing, "_TURN_SECONDS", 1e-4)
    state = jnp.zeros(3)
    sets = [(state, jnp.float32(1)), (state, jnp.float32(10))]
    contender = Contender(lambda state, x: state + x, sets, carries=True, as_result=np.array)
    prepared = prepare(contender, by_device=by_device)
    np.testing.assert_array_equal(prepared.returned, np.full(3, 11 if by_device else 1))
    assert prepared.turn() > 0
    np.testing.assert_array_equal(state, np.zeros(3))  # the caller's array is not donated
