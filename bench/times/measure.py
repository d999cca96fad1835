"""Measures one case: compares results first, then times the contenders in turns.

The result is an entry of the result file.
"""
# PyTorch is not a dependency.
# pyright: reportMissingImports=false

import dataclasses
import gc
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from bench import machine
from bench.machine import Peaks
from bench.times import generation
from bench.times.cases import Case
from bench.times.check import Oracle, Verdict
from bench.times.peers import Peer
from bench.times.timing import Contender, Prepared, median_ratio, prepare, summary, take_turns
from bench.times.watcher import Watcher
from bench.times.workloads import Append, Attention, Generation, MaskBuild, Size, Workload

OURS = "pallas_attn"
_MOST_SETS = 16


@dataclasses.dataclass(frozen=True)
class Effort:
    """The time budget of a case.

    Attributes:
      rounds: the maximum of rounds.
      seconds: no further round starts after this time.
      prepare_seconds: time for compiling and checking peers; later peers are skipped.
    """

    rounds: int = 15
    seconds: float = 7.0
    prepare_seconds: float = math.inf


@dataclasses.dataclass(frozen=True)
class Setting:
    """Settings shared by all cases of a run.

    Attributes:
      suite, peers, effort: the suite, the peers, and the time budget of a case.
      toy: toy sizes, with our Triton kernels in Pallas' interpreter.
      measured: the measured peaks of the machine.
      watcher: hears which contender runs, and the result before the peers run.
    """

    suite: str
    peers: dict[str, Peer]
    effort: Effort
    toy: bool = False
    measured: Peaks | None = None
    watcher: Watcher = dataclasses.field(default_factory=Watcher)

    @property
    def by_device(self) -> bool:
        """Whether the device's clock is used."""
        return self.suite == "gpu"


def measure(case: Case, setting: Setting) -> dict[str, Any]:
    """The case's entry in the result file."""
    size = case.size(setting.suite, setting.toy)
    workload = case.build(size)
    result = _description(case, size, workload, setting)
    sets = number_of_sets(workload, by_device=setting.by_device, toy=setting.toy)

    # Ours first: without it there is no comparison.
    setting.watcher.doing(OURS)
    try:
        if isinstance(workload, Generation) and (reason := generation.unavailable()):
            raise NotImplementedError(reason)
        ours = prepare(_our_contender(workload, sets, setting), by_device=setting.by_device)
    except NotImplementedError as error:
        result["skipped"][OURS] = _reason(error)
        return result
    judge, ready = _known_result(workload)
    verdict = judge(ours.returned)
    result |= {"correct": verdict.correct, "error": verdict.error, "allowed_error": verdict.allowed}
    if not verdict.correct:
        result["contenders"][OURS] = {"wrong": verdict.error}
        return result
    if setting.by_device:
        setting.watcher.so_far(_alone(result, workload, ours, setting))
    turns = {OURS: ours.turn} | _peers_turns(result, workload, sets, judge, ready, setting)

    if not setting.by_device:
        for name, build in case.variants.items():
            # Without peers in between, whose hundreds of MB would evict the CPU's caches.
            other = prepare(_our_contender(build(), 1, setting), by_device=False)
            pair, effort = {OURS: ours.turn, name: other.turn}, setting.effort
            times = take_turns(pair, rounds=4 * effort.rounds, budget=effort.seconds / 4)
            _report(result, workload, {name: times[name]}, times[OURS], setting)
    setting.watcher.doing("timing")
    times = take_turns(turns, rounds=setting.effort.rounds, budget=setting.effort.seconds)
    _report(result, workload, times, times[OURS], setting)
    return result


def _alone(result: dict[str, Any], workload: Workload, ours: Prepared, setting: Setting) -> dict[str, Any]:
    """The result with our time without peers, in case one of them breaks the process."""
    times = take_turns({OURS: ours.turn}, rounds=min(3, setting.effort.rounds), budget=0.0)
    alone = result | {"contenders": {}}
    _report(alone, workload, times, times[OURS], setting)
    return alone


def _peers_turns(result, workload, sets, judge, ready: dict[str, Prepared], setting) -> dict[str, Callable[[], float]]:
    """Compiles and checks the peers; the result records why the others have no turn."""
    turns, start = {}, time.perf_counter()
    for name, peer in setting.peers.items():
        if not peer.serves(workload):
            continue
        if (reason := peer.unavailable()) is not None:
            result["skipped"][name] = reason
            continue
        if time.perf_counter() - start > setting.effort.prepare_seconds:
            result["skipped"][name] = "no time left"
            continue
        setting.watcher.doing(name)
        try:
            prepared = ready.get(name) or prepare(peer.contender(workload, sets), by_device=setting.by_device)
            verdict = judge(prepared.returned).of_peer()
        except Exception as error:  # an error of one peer must not stop the others
            result["skipped"][name] = _reason(error)
            continue
        if verdict.correct:
            turns[name] = prepared.turn
        else:
            result["contenders"][name] = {"wrong": verdict.error}
    return turns


def failed(case: Case, setting: Setting, error: Exception) -> dict[str, Any]:
    """The entry of a case that stopped with an unexpected error."""
    size = case.size(setting.suite, setting.toy)
    return _entry(case, size, setting) | {"correct": False, "skipped": {OURS: _reason(error)}}


def _entry(case: Case, size: Size, setting: Setting) -> dict[str, Any]:
    about = f"{case.about}; {size}".replace("{S}", str(size.kv_len))
    return {
        "case": case.name,
        "about": about,
        "kind": case.kind,
        "shape": size.as_dict(),
        "dtype": size.dtype,
        "active_fraction": None,
        "visited_fraction": None,
        "capacity": size.kv_len if case.capacity else None,
        "flops": None,
        "bytes": None,
        "correct": None,
        "error": None,
        "allowed_error": None,
        "contenders": {},
        "ratios": {},
        "claims": dict(case.claims) if setting.suite == "cpu" and not setting.toy else {},
        "skipped": {},
    }


def _description(case: Case, size: Size, workload: Workload, setting: Setting) -> dict[str, Any]:
    """The entry with everything known before the case runs."""
    entry = _entry(case, size, setting)
    implementation = "triton" if setting.toy else None
    match workload:
        case Attention():
            entry["flops"], entry["bytes"] = workload.work.flops, workload.work.nbytes
            entry["active_fraction"] = workload.active_fraction
            entry["visited_fraction"] = workload.visited_fraction(implementation)
        case MaskBuild():
            entry["active_fraction"] = workload.attention.active_fraction
            entry["visited_fraction"] = workload.attention.visited_fraction(implementation)
        case Append():
            entry["bytes"] = workload.nbytes
    return entry


def number_of_sets(workload: Workload, *, by_device: bool, toy: bool) -> int:
    """How many different inputs keep each from still being in the GPU's cache when it is used again."""
    if not by_device or toy or isinstance(workload, Generation):
        return 1
    if isinstance(workload, Attention) and workload.backward:
        return 2
    if not isinstance(workload, Attention):
        return _MOST_SETS  # calls are short, so the launch must be shared
    return max(2, min(_MOST_SETS, math.ceil(2 * machine.L2_BYTES / workload.input_bytes)))


def _our_contender(workload: Workload, sets: int, setting: Setting) -> Contender:
    if isinstance(workload, Generation):
        return generation.our_contender(workload)
    return workload.ours(sets=sets, interpret=setting.toy)


def _known_result(workload: Workload) -> tuple[Callable[[Any], Verdict], dict[str, Prepared]]:
    """The judge of every contender's result, and the peers that had to run for it, by name."""
    if not isinstance(workload, Generation):
        return Oracle(workload).judge, {}
    # The peer's tokens are the expected ones.
    peer = prepare(generation.transformers_contender(workload), by_device=False)
    return _same_tokens(peer.returned), {"transformers": peer}


def _same_tokens(expected: np.ndarray) -> Callable[[Any], Verdict]:
    return lambda got: Verdict(float((np.asarray(got) != expected).sum()), 0.0)


def _reason(error: Exception) -> str:
    """One line: what an implementation does not support, or the error that stopped it."""
    text = " ".join(str(error).split())
    text = text if len(text) <= 200 else text[:197] + "..."
    return text if isinstance(error, NotImplementedError) else f"failed: {type(error).__name__}: {text}"


def _report(
    result: dict[str, Any], workload: Workload, times: dict[str, list[float]], ours: list[float], setting: Setting
) -> None:
    """Adds the times to the result."""
    # Decode mostly moves bytes, so a copy bounds it.
    copy = setting.measured.gbps if setting.measured and result["kind"] == "decode" else None
    for name, seconds in times.items():
        median = float(np.median(seconds))
        flops, nbytes = result["flops"], result["bytes"]
        result["contenders"][name] = {
            "ms": summary(seconds),
            "tflops": flops and flops / median / 1e12,
            "gbps": nbytes and nbytes / median / 1e9,
            "of_copy": copy and nbytes / median / 1e9 / copy,
            "tokens_per_second": (
                workload.size.batch * workload.size.new / median if isinstance(workload, Generation) else None
            ),
        }
        if name != OURS:
            result["ratios"][name] = median_ratio(seconds, ours)


def free_memory() -> None:
    """Frees memory that the next case may need."""
    gc.collect()
    try:
        import torch
    except ImportError:
        return
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
