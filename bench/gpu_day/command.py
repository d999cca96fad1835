"""The GPU suite of ``python -m bench.run``: its plan, its rehearsal, and the calls themselves."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.gpu_day import plan
from bench.gpu_day.process import Worker, WorkerError
from bench.gpu_day.steps import BROKEN, Block, Outcome, Step
from bench.gpu_day.supervisor import START_LIMIT, Supervisor
from bench.gpu_day.worker import Options
from bench.results_file import ResultsFile
from bench.times.cases import named
from bench.times.measure import OURS, Effort, Setting, failed


class Unavailable(Exception):
    """This machine cannot run the suite, with the reason."""


def print_plan(parts: Sequence[str], out: Console) -> None:
    """One table for each call."""
    for part in parts:
        out.print(plan.table(part))


def run(
    planned: Sequence[Sequence[Block]],
    options: Options,
    *,
    peers: Sequence[str],
    path: Path | None,
    resume: bool,
    seconds: float,
    console: Console,
) -> ResultsFile:
    """Runs calls, one after the other.

    Args:
      planned: the blocks of each call.
      options: of the worker processes.
      peers: names of all contenders that may break a process.
      path, resume: of the result file.
      seconds: of each call, its start included.
      console: shows each step as it ends.

    Raises:
      Unavailable: there is no GPU that runs our kernels, or no worker process starts.
      ResultsError: the file cannot be written or continued.
    """
    start = time.monotonic()
    worker = _started(options)
    try:
        described = worker.ready(START_LIMIT)
        if described["unavailable"]:
            raise Unavailable(f"--suite gpu: {described['unavailable']}; --toy runs it at toy sizes anywhere")
        suite = "gpu-toy" if options.toy else "gpu"
        file = ResultsFile(path, suite=suite, machine=described["machine"], resume=resume)
    except WorkerError as error:
        worker.close(kill=True)
        raise Unavailable(f"no worker process starts: {error}") from None
    except Exception:
        worker.close(kill=True)
        raise

    def started(without) -> Worker:
        measured = file.machine["measured"]
        return _started(Options(options.toy, options.peers, dict(without), measured, options.revision))

    def show(record: dict[str, Any]) -> None:
        why = f"  {record['why']}" if record["why"] else ""
        about = f"{record['step']:28} {record['seconds']:5.1f} s  {record['status']}{why}"
        text = f"{time.monotonic() - start:6.1f} s  {about}"
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    for number, blocks in enumerate(planned):
        spent = time.monotonic() - start if number == 0 else 0.0
        supervisor = Supervisor(
            file=file,
            start=started,
            entry=lambda step, outcome: entry(step, outcome, options.toy),
            concerns=plan.concerned,
            peers=frozenset(peers),
            seconds=seconds - spent,
            show=show,
        )
        supervisor.run(blocks, worker if number == 0 else None)
    return file


def _started(options: Options) -> Worker:
    return Worker(options.command(), options.environment())


def entry(step: Step, outcome: Outcome, toy: bool) -> dict[str, Any] | None:
    """The result file's entry of a case; None for other steps, and for a case that was not started."""
    if step.kind != "case" or outcome.status == "late":
        return None
    why = f"{outcome.status}: {outcome.why}"
    if outcome.found is None:
        case, setting = named("gpu")[step.which], Setting("gpu", {}, Effort(), toy)
        correct = None if outcome.status == "timed out" else False
        return failed(case, setting, RuntimeError()) | {"correct": correct, "skipped": {OURS: why}}
    if outcome.status in ("crashed", "timed out", "failed"):
        return outcome.found | {"skipped": outcome.found["skipped"] | {outcome.doing or OURS: why}}
    return outcome.found


def summary(file: ResultsFile) -> list[str]:
    """What did not go well, in lines: broken and late steps, and results in doubt."""
    lines = [f"{x['status']}: {x['step']}: {x['why']}" for x in file.steps if x["status"] in BROKEN]
    lines += [f"in doubt: {x['step']}, because of {', '.join(x['doubts'])}" for x in file.steps if "doubts" in x]
    if late := [x["step"] for x in file.steps if x["status"] == "late"]:
        lines.append(f"No time was left for: {', '.join(late)}. --resume continues.")
    return lines


def found_table(file: ResultsFile) -> Table | None:
    """The times of block sizes and of decode steps; None if there are none."""
    out = Table("step", "", "ms", title="block sizes (the table's first) and decode steps", title_justify="left")
    for step in file.steps:
        found = step["found"] or {}
        for name, one in found.get("candidates", {}).items():
            out.add_row(step["step"], name, f"{one['ms']['median']:.4g}" if "ms" in one else str(one))
        if "ms_per_step" in found:
            out.add_row(step["step"], f"{found['tokens_per_second']:.0f} tokens/s", f"{found['ms_per_step']:.4g}")
    return out if out.row_count else None


def rehearse(only: Sequence[str], out: Console) -> bool:
    """Compiles everything for an H200, lists it, and keeps the record; returns whether all of it compiles.

    Args:
      only: beginnings of the names of steps, or nothing for all; the record keeps what it has of other steps.

    Raises:
      Unavailable: XLA's CUDA plugin is missing.
    """
    from bench.gpu_day import rehearsal
    from bench.machine_code import xla_gpu

    if reason := xla_gpu.missing():
        raise Unavailable(reason)
    compiled, record = [], rehearsal.Record(fresh=not only)
    for program in rehearsal.programs(tuple(only)):
        one = rehearsal.compile_program(program)
        compiled.append(one)
        record.add(one)
        out.print(rehearsal.line(one), markup=False, highlight=False, soft_wrap=True)
    broken = [x for x in compiled if x.failure and x.required]
    spilled = [x for x in compiled if any(kernel.stack_bytes for kernel in x.kernels)]
    out.print(f"{len(compiled)} programs, {len(broken)} fail, {len(spilled)} spill", highlight=False)
    return not broken
