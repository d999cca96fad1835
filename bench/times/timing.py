"""Timing on a noisy machine: contenders take turns, and the median ratio of the rounds counts.

A *turn* gives the seconds of one call. On a CPU that is wall-clock time. On a GPU it is device time: JAX runs many
calls on different inputs in a series, and the difference between a long and a short series cancels the cost of waiting;
PyTorch's calls lie between CUDA events, queued while the device is still busy.
"""
# PyTorch is not a dependency.
# pyright: reportMissingImports=false

import dataclasses
import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

_TURN_SECONDS = 0.05
# The thread pool of another library may still spin.
_REST_SECONDS = 0.005
# The state of the caches does not matter for calls longer than this.
_LONG_SECONDS = 1.0
_SPIN_CYCLES = 10_000_000  # 5 ms at 2 GHz


@dataclasses.dataclass(frozen=True)
class Contender:
    """An implementation of a case.

    Attributes:
      function: takes one set of inputs. JAX compiles it; PyTorch's is ready to be called.
      inputs: sets of inputs, used in turn, so that a GPU's cache holds none of them.
      framework: the framework of the arrays; "host": the function waits for its results, and the wall clock times it.
      carries: whether the result is the first input of the next call, which reuses its buffers.
      as_result: converts the returned value to what the oracle judges.
    """

    function: Callable
    inputs: Sequence[tuple]
    framework: Literal["jax", "torch", "host"] = "jax"
    carries: bool = False
    as_result: Callable[[Any], Any] = lambda returned: returned


class Prepared(NamedTuple):
    """A compiled contender: its result for the first set of inputs, and its turn."""

    returned: Any
    turn: Callable[[], float]


def prepare(contender: Contender, *, by_device: bool) -> Prepared:
    """Compiles a contender and runs it once. ``by_device``: use the device's clock if a device does the work."""
    if by_device and contender.framework == "jax":
        return _on_device(contender)
    if by_device and contender.framework == "torch" and _torch_sees_gpu():
        return _on_torch_device(contender)
    call = _call(contender)
    return Prepared(contender.as_result(call()), _wall_clock(call))


def _call(contender: Contender) -> Callable[[], Any]:
    """A function without arguments that runs the first set of inputs and waits for the results."""
    first = contender.inputs[0]
    if contender.framework == "host" or (contender.framework == "torch" and not _torch_sees_gpu()):
        return lambda: contender.function(*first)
    if contender.framework == "torch":
        return lambda: _synchronized(contender.function(*first))
    if not contender.carries:
        function = jax.jit(contender.function)
        return lambda: jax.block_until_ready(function(*first))
    function = jax.jit(contender.function, donate_argnums=0)
    state = [jax.tree.map(jnp.copy, first[0])]

    def step():
        state[0] = jax.block_until_ready(function(state[0], *first[1:]))
        return state[0]

    return step


def _torch_sees_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _synchronized(result: Any) -> Any:
    import torch

    torch.cuda.synchronize()
    return result


def _wall_clock(call: Callable[[], Any]) -> Callable[[], float]:
    """A turn by the wall clock: the median of ``_TURN_SECONDS`` of calls."""

    def turn() -> float:
        time.sleep(_REST_SECONDS)
        # Untimed: allocating memory that the other's turn released is not part of the call.
        first = _seconds(call)
        if first > _LONG_SECONDS:
            return first
        calls = []
        while sum(calls) < _TURN_SECONDS:
            calls.append(_seconds(call))
        return statistics.median(calls)

    return turn


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _on_device(contender: Contender) -> Prepared:
    """One program calls the function on every set of inputs, and is launched many times without waiting.

    The sets are separate arguments, so XLA can neither merge calls nor fold any away.
    """
    if contender.carries:
        launch, returned = _carrying_program(contender)
    else:
        program = jax.jit(over_sets(contender.function))

        def launch():
            return program(contender.inputs)

        returned = launch()[0]
    result = contender.as_result(jax.block_until_ready(returned))

    def series(count: int) -> float:
        start = time.perf_counter()
        last = None
        for _ in range(count):
            last = launch()
        jax.block_until_ready(last)
        return time.perf_counter() - start

    once = series(2) / 2
    short = max(1, min(100, math.ceil(_TURN_SECONDS / 8 / once)))

    def turn() -> float:
        # The cost of waiting is the same in the long and the short series, so it cancels.
        differences = [(series(3 * short) - series(short)) / (2 * short) for _ in range(3)]
        middle = statistics.median(differences)
        return (middle if middle > 0 else once) / len(contender.inputs)

    return Prepared(result, turn)


def over_sets(function: Callable) -> Callable[[Sequence[tuple]], list]:
    """The function of a launch: a call for every set of inputs."""
    return lambda sets: [function(*one) for one in sets]


def carrying_over_sets(function: Callable) -> Callable[[Any, Sequence[tuple]], Any]:
    """The function of a launch whose every call continues from the result of the last one."""

    def advance(state, rest):
        for one in rest:
            state = function(state, *one)
        return state

    return advance


def _carrying_program(contender: Contender) -> tuple[Callable[[], Any], Any]:
    """A launch that continues from the state of the last one, and the first state."""
    program = jax.jit(carrying_over_sets(contender.function), donate_argnums=0)
    rest = [one[1:] for one in contender.inputs]
    state = [jax.tree.map(jnp.copy, contender.inputs[0][0])]

    def launch():
        state[0] = program(state[0], rest)
        return state[0]

    return launch, launch()


def _on_torch_device(contender: Contender) -> Prepared:
    import torch

    returned = contender.as_result(_synchronized(contender.function(*contender.inputs[0])))

    def once() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        # Keeps the device busy while Python queues the calls, so that Python is not timed.
        torch.cuda._sleep(_SPIN_CYCLES)
        start.record()
        for one in contender.inputs:
            contender.function(*one)
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3 / len(contender.inputs)

    return Prepared(returned, lambda: statistics.median(once() for _ in range(5)))


def take_turns(turns: dict[str, Callable[[], float]], *, rounds: int, budget: float) -> dict[str, list[float]]:
    """Seconds per call of every contender in every round.

    Args:
      turns: from :func:`prepare`.
      rounds: the maximum of rounds; three run in any case.
      budget: seconds after which no further round starts.
    """
    times = {name: [] for name in turns}
    start = time.perf_counter()
    gc.collect()
    for number in range(rounds):
        if number >= min(3, rounds) and time.perf_counter() - start > budget:
            break
        for name, turn in turns.items():
            times[name].append(turn())
    return times


def median_ratio(slow: list[float], fast: list[float]) -> float:
    """Median over the rounds of ``slow / fast``: a disturbance that lasts a round affects both."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def summary(seconds: list[float]) -> dict[str, Any]:
    """Median and quartiles in milliseconds, for the result file."""
    low, middle, high = (1e3 * float(q) for q in np.quantile(seconds, [0.25, 0.5, 0.75]))
    return {"median": middle, "quartiles": [low, high], "rounds": len(seconds)}
