"""Seconds of each step, from the rehearsal: what compiles how long, and the physics of what runs.

A rehearsal counts the CPU seconds of compiling a program on all threads. Where there are more than two cores, the wall
time is shorter, because kernels of a program compile side by side; that is the margin. Constants marked as assumed are
not measured.
"""

import functools
import json
import math
from pathlib import Path
from typing import Any

from bench.gpu_day import efforts
from bench.machine import Peaks, peaks_of
from bench.times.cases import named
from bench.times.physics import bound_seconds

START = 12.0  # assumed: imports, the CUDA context and the description of the machine
PEAKS = 4.0  # assumed
COUNTERS = 35.0  # assumed: a process of its own, and a dozen replays of each kernel
LEAST_TESTS = 20.0
# Assumed: small programs around a case, such as counts of pairs, inputs, and plain attention for the check.
_AROUND = {"forward": 2.5, "decode": 2.5, "backward": 7.0, "mask": 3.0, "append": 2.0, "generation": 20.0}
_FETCH_RATE = 2e9  # assumed: bytes per second from the GPU into arrays of NumPy
_OVERSHOOT = 5.0  # assumed, at most: the last peer that starts within its time ends after it
_SLOWDOWN = 4.0  # assumed: a contender takes at most this many times the bound
_CONTENDERS = 6  # assumed: on average
_SHORT_TURN = 0.1  # a turn of calls much shorter than this
_CALLS_PER_TURN = 12  # at least: three differences between series of three calls and of one
_RECORD = Path(__file__).with_name("rehearsal.json")


@functools.cache
def record() -> dict[str, Any]:
    """The committed rehearsal."""
    return json.loads(_RECORD.read_text())


def h200() -> Peaks:
    """The published peaks."""
    found = peaks_of("NVIDIA H200")
    assert found is not None
    return found


def compile_seconds(step: str, *parts: str) -> float:
    """Of the programs of a step, or of some of them."""
    programs = (x for x in record()["programs"] if x["step"] == step and (not parts or x["part"] in parts))
    return sum(x["seconds"] for x in programs)


def seconds(step: str) -> float:
    """The estimate of a step."""
    kind, _, which = step.partition("/")
    match kind:
        case "peaks":
            return PEAKS
        case "smoke":
            return compile_seconds(step) + 0.5 + (2.0 if "backward" in which else 0.5)
        case "case":
            return _case(step, which)
        case "sweep":
            candidates = sum(x["step"] == step for x in record()["programs"])
            return compile_seconds(step) + 1.0 + candidates * _turns(step, rounds=6)
        case "generator":
            return compile_seconds(step) + _generating(which)
        case "counters":
            return COUNTERS
    raise ValueError(f"step: expected a kind with an estimate, got {step}")


def _case(step: str, which: str) -> float:
    kind, effort = named("gpu")[which].kind, efforts.of(which)
    work = record()["physics"].get(step, {"input_bytes": 0})
    peers = (
        effort.prepare_seconds + min(_OVERSHOOT, effort.prepare_seconds)
        if kind in ("forward", "backward", "decode")
        else 0.0
    )
    timing = min(effort.seconds, _CONTENDERS * _turns(step, effort.rounds)) + _CONTENDERS * _turns(step, rounds=1)
    fetching = 2 * work["input_bytes"] / _FETCH_RATE
    return compile_seconds(step, "ours", "inputs", "prefill", "decode") + _AROUND[kind] + fetching + peers + timing


def _turns(step: str, rounds: int) -> float:
    """Seconds of the turns of one contender; a sweep runs a case whose bound is far below a turn."""
    work = record()["physics"].get(step)
    if work is None:
        return rounds * _SHORT_TURN
    call = _SLOWDOWN * bound_seconds(int(work["flops"]), int(work["bytes"]), h200()) * work["sets"]
    return rounds * max(_SHORT_TURN, _CALLS_PER_TURN * call)


def _generating(which: str) -> float:
    """Each step reads all weights; prefill multiplies them with all tokens. With the making of the weights, assumed."""
    from bench.gpu_day.decoding import SCALE

    config = SCALE.config
    layer = config.hidden_size * (3 * config.intermediate_size + 4 * config.num_heads * config.head_dim)
    weights = config.num_layers * layer + 2 * config.vocab_size * config.hidden_size
    tokens = SCALE.batch_size * SCALE.capacity // 4
    once = bound_seconds(2 * weights * tokens, 2 * weights * SCALE.new_tokens, h200())
    runs = SCALE.repeats + (1 if which == "graph-loops" else 0)
    return math.ceil(_SLOWDOWN * once * runs) + 2.0
