"""Runs steps in worker processes within a time, and writes the result file after each."""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bench.gpu_day.process import Worker, WorkerError
from bench.gpu_day.steps import BROKEN, Block, Outcome, Step
from bench.results_file import ResultsFile

START_LIMIT = 60.0
# Estimates have a margin, so a step starts if this much of its estimate is left.
_LEAST = 0.5
# A step whose process cannot start is tried again once; then nothing starts any more.
_MOST_FAILED_STARTS = 2

Entry = Callable[[Step, Outcome], dict[str, Any] | None]


@dataclasses.dataclass
class Supervisor:
    """Runs the blocks of a call. Peaks are measured in every call, everything else once in a file.

    Attributes:
      file: where results go.
      start: starts a worker process, given the peers that it must not run, with reasons.
      entry: the result file's entry of a step that measures a case; None for other steps.
      concerns: the kernels that a step uses, by its name.
      peers: names of contenders without which a process may be started again.
      seconds: of the whole call.
      show: hears the record of each step.
      clock: seconds, for tests.
    """

    file: ResultsFile
    start: Callable[[Mapping[str, str]], Worker]
    entry: Entry
    concerns: Callable[[str], frozenset[str]]
    peers: frozenset[str]
    seconds: float
    show: Callable[[dict[str, Any]], None]
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self._worker: Worker | None = None
        self._failed_starts = 0
        self._without: dict[str, str] = {}  # peers that broke a process
        self._deadline = self.clock() + self.seconds

    def run(self, blocks: Sequence[Block], worker: Worker | None = None) -> None:
        """Runs every step that the file lacks. ``worker``: one that has started already."""
        self._worker = worker
        try:
            for block in blocks:
                until = min(self._deadline, self.clock() + block.seconds)
                for step in block.steps:
                    if step.kind == "peaks" or not self.file.has_step(step.name):
                        self._record(step, self._outcome(step, until))
        finally:
            if self._worker is not None and not self._worker.ended:
                self._worker.close(kill=self.clock() >= self._deadline)

    def _outcome(self, step: Step, until: float) -> Outcome:
        left = until - self.clock()
        if left < _LEAST * step.seconds:
            return Outcome("late", 0.0, f"{max(0.0, left):.0f} s were left")
        if self._failed_starts == _MOST_FAILED_STARTS:
            return Outcome("failed", 0.0, "no process starts any more")
        try:
            worker = self._running()
        except WorkerError as error:
            self._failed_starts += 1
            return Outcome("crashed", 0.0, f"at its start: {error}")
        left = until - self.clock()
        outcome = worker.run(step.name, min(step.limit, left))
        if step.open_ended and outcome.status == "timed out" and outcome.found:
            status = "wrong" if outcome.found.get("failed") else "ok"
            return dataclasses.replace(outcome, status=status, why=f"stopped after {outcome.seconds:.0f} s")
        due = outcome.status == "crashed" or (outcome.status == "timed out" and step.limit <= left)
        if due and outcome.doing in self.peers:
            self._without[str(outcome.doing)] = f"broke {step.name}: {outcome.why}"
        return outcome

    def _running(self) -> Worker:
        if self._worker is None or self._worker.ended:
            self._worker = self.start(self._without)
            try:
                self._worker.ready(min(START_LIMIT, self._deadline - self.clock()))
            except WorkerError:
                self._worker.close(kill=True)
                raise
            self._failed_starts = 0
        return self._worker

    def _record(self, step: Step, outcome: Outcome) -> None:
        record = {
            "step": step.name,
            "status": outcome.status,
            "seconds": round(outcome.seconds, 2),
            "estimated": round(step.seconds, 2),
            "why": outcome.why,
            "found": outcome.found,
        }
        if outcome.status in BROKEN and outcome.doing:
            record["doing"] = outcome.doing
        if outcome.log:
            record["log"] = outcome.log
        if doubts := self._doubts(step):
            record["doubts"] = doubts
        if (entry := self.entry(step, outcome)) is not None:
            record["found"] = None
            self.file.replace(entry)
        if step.kind == "peaks" and outcome.found:
            self.file.machine = self.file.machine | {"measured": outcome.found}
        self.file.add_step(record)
        self.show(record)

    def _doubts(self, step: Step) -> list[str]:
        """Checks that broke and concern the kernels of a step."""
        broken = [x["step"] for x in self.file.steps if x["step"].startswith("smoke/") and x["status"] in BROKEN]
        return [name for name in broken if name != step.name and self.concerns(name) & self.concerns(step.name)]
