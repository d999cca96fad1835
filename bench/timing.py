"""Timing on a noisy machine: contenders take turns, and what counts is the median ratio of a turn."""

import statistics
import time
from collections.abc import Callable

import jax

_TURN_SECONDS = 0.05


def seconds(function: Callable, *arguments) -> float:
    """Wall-clock seconds of one call, until its results are there."""
    start = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    return time.perf_counter() - start


def take_turns(contenders: dict[str, Callable], *, rounds: int, budget: float) -> dict[str, list[float]]:
    """Seconds per call of every contender in every round. All are called once before, so no compilation is timed.

    Args:
      contenders: functions of no argument.
      rounds: at most so many, and at least three.
      budget: seconds after which no further round starts.
    """
    for function in contenders.values():
        jax.block_until_ready(function())
    times = {name: [] for name in contenders}
    start = time.perf_counter()
    for turn in range(rounds):
        if turn >= 3 and time.perf_counter() - start > budget:
            break
        for name, function in contenders.items():
            times[name].append(_turn(function))
    return times


def _turn(function: Callable) -> float:
    """Median of the calls of one turn, which lasts at least ``_TURN_SECONDS``."""
    # Untimed: the other's turn gave memory back to the system, and getting it anew is no contender's work.
    jax.block_until_ready(function())
    calls = []
    while sum(calls) < _TURN_SECONDS:
        calls.append(seconds(function))
    return statistics.median(calls)


def median_ratio(slow: list[float], fast: list[float]) -> float:
    """Median over the rounds of ``slow / fast``: a disturbance that lasts a round hits both."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))
