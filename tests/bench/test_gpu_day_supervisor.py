"""Steps in worker processes: what one of them breaks, and that the others run all the same."""

import itertools
import json
import sys
import textwrap

import pytest

from bench.gpu_day.process import Worker, WorkerError
from bench.gpu_day.steps import Block, Step
from bench.gpu_day.supervisor import Supervisor
from bench.results_file import ResultsFile
from tests.bench.test_bench_results import MACHINE

# A worker whose steps are named after what they do. It imports no JAX, so it starts at once.
WORKER = textwrap.dedent("""
    import os, signal, sys, time
    from bench.gpu_day.serving_steps import own_output, serve

    class Session:
        gone = None

        def describe(self):
            return {"machine": {}, "unavailable": None}

        def lost(self):
            return self.gone

        def execute(self, step, watcher):
            watcher.doing("ours")
            print("a library that prints to standard output")
            match step.partition("/")[2].partition("-")[0]:
                case "wrong":
                    return {"status": "wrong", "why": "off by one", "found": {"error": 1.0}}
                case "raises":
                    raise ValueError("no such\\nshape")
                case "dies":
                    watcher.so_far({"early": 1})
                    watcher.doing("peer")
                    print("illegal access", file=sys.stderr, flush=True)
                    os.kill(os.getpid(), signal.SIGSEGV)
                case "hangs":
                    watcher.so_far({"early": 2, "failed": {}})
                    watcher.doing("slow peer")
                    time.sleep(60)
                case "loses":
                    watcher.doing("peer")
                    self.gone = "CUDA_ERROR_ILLEGAL_ADDRESS"
                    watcher.doing("next peer")
                case "ruins":
                    self.gone = "CUDA_ERROR_ILLEGAL_ADDRESS"
            return {"status": "ok", "found": {"step": step, "without": sys.argv[1], "process": os.getpid()}}

    serve(Session(), sys.stdin, own_output()[1])
""")


def worker(without=()) -> Worker:
    return Worker([sys.executable, "-c", WORKER, ",".join(without)])


class Run:
    """A supervisor's call, the records in order, and the file as it was after each."""

    def __init__(self, tmp_path, *names, seconds=30.0, limit=30.0, resume=False, start=worker, open_ended=False):
        self.path = tmp_path / "gpu.json"
        file = ResultsFile(self.path, suite="gpu", machine=MACHINE, resume=resume)
        self.records, self.written = [], []
        supervisor = Supervisor(
            file=file,
            start=start,
            entry=lambda step, outcome: None,
            concerns=lambda step: frozenset({"kernel"}),
            peers=frozenset({"peer", "slow peer"}),
            seconds=seconds,
            show=self.show,
        )
        supervisor.run([Block("all", tuple(Step(name, 0.01, limit, open_ended) for name in names))])

    def show(self, record):
        self.records.append(record)
        self.written.append([x["step"] for x in json.loads(self.path.read_text())["steps"]])

    @property
    def statuses(self):
        return [x["status"] for x in self.records]


def test_a_step_that_breaks_marks_itself_and_stops_nothing(tmp_path):
    run = Run(tmp_path, "a/fine", "a/wrong", "a/raises", "a/dies", "a/fine-2", "a/loses", "a/ruins", "a/fine-3")
    assert run.statuses == ["ok", "wrong", "failed", "crashed", "ok", "crashed", "ok", "ok"]
    why = {x["step"]: x["why"] for x in run.records}
    assert why["a/wrong"] == "off by one"
    assert why["a/raises"] == "ValueError: no such shape"
    assert why["a/dies"] == "its process ended by SIGSEGV: illegal access"
    assert why["a/loses"] == "the GPU: CUDA_ERROR_ILLEGAL_ADDRESS"
    found = {x["step"]: x["found"] for x in run.records}
    assert found["a/dies"] == {"early": 1}, "what was known before it died"
    processes = [found[name]["process"] for name in ("a/fine", "a/fine-2", "a/ruins", "a/fine-3")]
    assert len(set(processes)) == 4, "a new process after each that broke or lost its GPU"


def test_the_file_is_written_after_every_step(tmp_path):
    run = Run(tmp_path, "a/fine", "a/dies", "a/fine-2")
    assert run.written == [["a/fine"], ["a/fine", "a/dies"], ["a/fine", "a/dies", "a/fine-2"]]


def test_a_contender_that_broke_a_process_does_not_run_again(tmp_path):
    run = Run(tmp_path, "a/dies", "a/fine")
    assert run.records[0]["doing"] == "peer"
    assert "illegal access" in run.records[0]["log"]
    assert run.records[1]["found"]["without"] == "peer"


def test_a_step_that_hangs_is_ended_at_its_limit(tmp_path):
    run = Run(tmp_path, "a/hangs", "a/fine", limit=0.5)
    assert run.statuses == ["timed out", "ok"]
    assert run.records[0]["why"] == "took more than 0 s"
    assert run.records[0]["seconds"] < 5
    assert run.records[1]["found"]["without"] == "slow peer"


def test_the_call_ends_in_time(tmp_path):
    run = Run(tmp_path, "a/hangs", "a/fine", seconds=0.8)
    assert run.statuses == ["timed out", "late"]
    assert run.records[0]["seconds"] < 5


def test_an_open_ended_step_keeps_what_it_has_found(tmp_path):
    run = Run(tmp_path, "a/hangs", seconds=0.8, open_ended=True)
    assert run.statuses == ["ok"]
    assert run.records[0]["found"] == {"early": 2, "failed": {}}


def test_a_block_has_its_own_time(tmp_path):
    ticks = itertools.count()
    file = ResultsFile(None, suite="gpu", machine=MACHINE)
    supervisor = Supervisor(
        file, worker, lambda *_: None, lambda _: frozenset(), frozenset(), 1000.0, lambda _: None, lambda: next(ticks)
    )
    short, long = (
        Block(name, (Step(f"{name}/fine", 20.0, 30.0),), seconds) for name, seconds in (("s", 5), ("l", 500))
    )
    supervisor.run([short, long])
    assert [(x["step"], x["status"]) for x in file.steps] == [("s/fine", "late"), ("l/fine", "ok")]


def test_resume_runs_what_is_missing_or_broke(tmp_path):
    Run(tmp_path, "a/fine", "a/wrong", "a/raises")
    again = Run(tmp_path, "a/fine", "a/wrong", "a/raises", "a/fine-2", resume=True)
    assert [x["step"] for x in again.records] == ["a/raises", "a/fine-2"]
    assert again.written[-1] == ["a/fine", "a/wrong", "a/raises", "a/fine-2"]


def test_a_broken_check_casts_doubt_on_steps_with_its_kernels(tmp_path):
    run = Run(tmp_path, "smoke/wrong", "case/fine")
    assert run.records[1]["doubts"] == ["smoke/wrong"]
    assert "doubts" not in run.records[0]


def test_a_process_that_never_starts_ends_the_call(tmp_path):
    def broken(without):
        return Worker([sys.executable, "-c", "raise SystemExit('no driver')"])

    run = Run(tmp_path, "a/fine", "a/fine-2", "a/fine-3", start=broken)
    assert run.statuses == ["crashed", "crashed", "failed"]
    assert run.records[0]["why"] == "at its start: its process ended by exit code 1: no driver"
    assert run.records[2]["why"] == "no process starts any more"
    slow = Worker([sys.executable, "-c", "import time; time.sleep(60)"])
    with pytest.raises(WorkerError, match="took more than 0 s"):
        slow.ready(0.1)
    slow.close(kill=True)
