"""One case from its name to its entry in the result file: results are compared first, then contenders take turns."""
# PyTorch is no dependency.
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
from bench.times.workloads import Append, Attention, Generation, MaskBuild, Size, Workload

OURS = "pallas_attn"
_MOST_SETS = 16


@dataclasses.dataclass(frozen=True)
class Effort:
    """How much time a case may take.

    Attributes:
      rounds: of turns, at most.
      seconds: for the rounds; no further one starts after them.
      prepare_seconds: for compiling and checking peers; one whose turn comes later is skipped.
    """

    rounds: int = 15
    seconds: float = 7.0
    prepare_seconds: float = math.inf


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is the same for all cases of a run.

    Attributes:
      suite, peers, effort: which, against whom, and how long.
      toy: toy sizes, our Triton kernels in Pallas' interpreter.
      measured: what the machine reaches at best.
    """

    suite: str
    peers: dict[str, Peer]
    effort: Effort
    toy: bool = False
    measured: Peaks | None = None

    @property
    def by_device(self) -> bool:
        """Time by the device's clock."""
        return self.suite == "gpu"


def measure(case: Case, setting: Setting) -> dict[str, Any]:
    """The case's entry in the result file."""
    size = case.size(setting.suite, setting.toy)
    workload = case.build(size)
    result = _description(case, size, workload, setting)
    sets = _number_of_sets(workload, setting)

    # Ours first: without it there is nothing to compare.
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
    turns = {OURS: ours.turn} | _peers_turns(result, workload, sets, judge, ready, setting)

    if not setting.by_device:
        for name, build in case.beside.items():
            # Ours takes turns with itself alone: a peer's hundreds of MB in between would empty the caches.
            other = prepare(_our_contender(build(), 1, setting), by_device=False)
            pair, effort = {OURS: ours.turn, name: other.turn}, setting.effort
            times = take_turns(pair, rounds=4 * effort.rounds, budget=effort.seconds / 4)
            _report(result, workload, {name: times[name]}, times[OURS], setting)
    times = take_turns(turns, rounds=setting.effort.rounds, budget=setting.effort.seconds)
    _report(result, workload, times, times[OURS], setting)
    return result


def _peers_turns(result, workload, sets, judge, ready: dict[str, Prepared], setting) -> dict[str, Callable[[], float]]:
    """Compiles and checks the peers. What has no turn, the result says why."""
    turns, start = {}, time.perf_counter()
    for name, peer in setting.peers.items():
        if not peer.serves(workload):
            continue
        if (reason := peer.unavailable()) is not None:
            result["skipped"][name] = reason
            continue
        if time.perf_counter() - start > setting.effort.prepare_seconds:
            result["skipped"][name] = "no time left for it"
            continue
        try:
            prepared = ready.get(name) or prepare(peer.contender(workload, sets), by_device=setting.by_device)
            verdict = judge(prepared.returned).of_peer()
        except Exception as error:  # whatever happens inside a peer, the others are measured
            result["skipped"][name] = _reason(error)
            continue
        if verdict.correct:
            turns[name] = prepared.turn
        else:
            result["contenders"][name] = {"wrong": verdict.error}
    return turns


def failed(case: Case, setting: Setting, error: Exception) -> dict[str, Any]:
    """The entry of a case that broke off with an error that nobody expected."""
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
    """The entry, with everything that is known before anything runs."""
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


def _number_of_sets(workload: Workload, setting: Setting) -> int:
    """So many different inputs that the GPU's cache holds none of them when it is needed again."""
    if not setting.by_device or isinstance(workload, Generation):
        return 1
    if setting.toy:
        return 1
    if isinstance(workload, Attention) and workload.backward:
        return 2
    if not isinstance(workload, Attention):
        return _MOST_SETS  # short: launching one must not outweigh it
    nbytes = sum(x.nbytes for x in workload.arrays(0)[:3])
    return max(2, min(_MOST_SETS, math.ceil(2 * machine.L2_BYTES / nbytes)))


def _our_contender(workload: Workload, sets: int, setting: Setting) -> Contender:
    if isinstance(workload, Generation):
        return generation.our_contender(workload)
    return workload.ours(sets=sets, interpret=setting.toy)


def _known_result(workload: Workload) -> tuple[Callable[[Any], Verdict], dict[str, Prepared]]:
    """What judges every contender's result, and by name what had to be run for it."""
    if not isinstance(workload, Generation):
        return Oracle(workload).judge, {}
    # Nobody but the peer knows the right tokens.
    peer = prepare(generation.transformers_contender(workload), by_device=False)
    return _same_tokens(peer.returned), {"transformers": peer}


def _same_tokens(expected: np.ndarray) -> Callable[[Any], Verdict]:
    return lambda got: Verdict(float((np.asarray(got) != expected).sum()), 0.0)


def _reason(error: Exception) -> str:
    """In one line: what an implementation says that it cannot do, or with what it broke off."""
    text = " ".join(str(error).split())
    text = text if len(text) <= 200 else text[:197] + "..."
    return text if isinstance(error, NotImplementedError) else f"failed: {type(error).__name__}: {text}"


def _report(
    result: dict[str, Any], workload: Workload, times: dict[str, list[float]], ours: list[float], setting: Setting
) -> None:
    """Adds what was timed to the result."""
    # Decode moves bytes and computes little: what it could reach is what a copy does.
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
    """Between cases: what one leaves behind must not be what the next one lacks."""
    gc.collect()
    try:
        import torch
    except ImportError:
        return
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
