"""The steps: checks, block sizes, tests and counters."""

import dataclasses
import shutil
import subprocess

import jax.numpy as jnp
import pytest

import pallas_attn as pa
from bench.gpu_day import block_sizes, command, counters, gpu_tests, smoke
from bench.gpu_day.block_sizes import Entry
from bench.gpu_day.steps import Outcome, Step
from bench.times import measure
from bench.times.cases import named
from bench.times.timing import Contender
from bench.times.watcher import Watcher
from bench.times.workloads import Attention, Size


class Recorder(Watcher):
    """Keeps what it hears."""

    def __init__(self):
        self.heard = []

    def doing(self, what):
        self.heard.append(what)

    def so_far(self, result):
        self.heard.append(result)


# --- the smoke test ---


@dataclasses.dataclass(frozen=True)
class Stub:
    """A call whose result is the number of earlier calls, and a judge that allows an error of 1."""

    results: tuple

    def ours(self, *, interpret=False):
        return Contender(lambda: None, [()])

    def judge(self, result):
        return smoke.Verdict(abs(float(result)), 1.0)


@pytest.mark.parametrize(
    ("results", "status", "why"),
    [
        ((0.5, 0.5), "ok", None),
        ((0.5, 0.25), "wrong", "two runs differ"),
        ((2.0, 2.0), "wrong", "error 2.0e+00, allowed 1.0e+00"),
    ],
)
def test_a_check_judges_and_repeats(results, status, why, monkeypatch):
    turns = iter(results)
    monkeypatch.setattr(smoke.jax, "jit", lambda function: lambda: jnp.float32(next(turns)))
    done = smoke.run(smoke.Check("stub", frozenset(), lambda toy: Stub(results)), toy=True)
    assert (done["status"], done.get("why")) == (status, why)
    assert done["found"]["same_bits_twice"] == (results[0] == results[1])


def formula(wrong: float) -> smoke._Formula:
    """A call that is off by a factor wherever it is not the reference."""

    def call(x, *, implementation=None, interpret=False):
        return (x * (1.0 if implementation == "reference" else wrong),)

    return smoke._Formula(call, ((4, 5),), gradients=True)


@pytest.mark.parametrize(("wrong", "right"), [(1.0, True), (1.1, False), (float("nan"), False)])
def test_formulas_are_compared_with_gradients(wrong, right):
    judged = formula(wrong)
    contender = judged.ours(interpret=True)
    result = contender.function(*contender.inputs[0])
    assert [len(one) for one in result] == [2, 2, 2], "the output and a gradient"
    assert judged.judge(result).correct == right


# --- what a measurement tells ---


def test_our_time_is_known_before_a_peer_runs():
    case, recorder = named("gpu")["append-token"], Recorder()
    setting = measure.Setting("gpu", {}, measure.Effort(rounds=1, seconds=0.0), True, None, recorder)
    result = measure.measure(case, setting)
    ours, alone, timing = recorder.heard
    assert (ours, timing) == (measure.OURS, "timing")
    assert alone["contenders"][measure.OURS]["ms"]["median"] > 0
    assert alone.keys() == result.keys()


def test_entries_of_cases_that_break():
    step = Step("case/causal", 1.0, 1.0)
    early = {"case": "causal", "correct": True, "skipped": {"a": "b"}}
    broken = command.entry(step, Outcome("crashed", 1.0, "SIGSEGV", early, "peer"), toy=False)
    assert broken == early | {"skipped": {"a": "b", "peer": "crashed: SIGSEGV"}}
    nothing = command.entry(step, Outcome("crashed", 1.0, "SIGSEGV"), toy=False)
    assert (nothing["correct"], nothing["skipped"]) == (False, {"pallas_attn": "crashed: SIGSEGV"})
    late = command.entry(step, Outcome("timed out", 1.0, "took more than 9 s"), toy=False)
    assert late["correct"] is None
    assert command.entry(step, Outcome("late", 0.0, "0 s were left"), toy=False) is None
    assert command.entry(Step("sweep/x", 1.0, 1.0), Outcome("ok", 1.0, None, {}), toy=False) is None


# --- block sizes ---

SIZE = Size(1, 64, 64, 2, 2, 32)


@pytest.mark.parametrize("factor", [1.0, 1.1, float("nan")])
def test_a_candidate_that_differs_from_the_table_has_no_time(factor, monkeypatch):
    entry = Entry("forward", 128, (pa.BlockSizes(16, 16), pa.BlockSizes(32, 16)))
    good, bad = entry.in_table, entry.sizes[0]

    def contender(entry, workload, sizes, *, sets, interpret):
        return Contender(lambda x: x * (factor if sizes == bad else 1.0), [(jnp.ones((4, 4)),)])

    monkeypatch.setattr(block_sizes, "contender", contender)
    monkeypatch.setattr(Entry, "workload", lambda *_: Attention(SIZE, pa.masks.causal(), None, None))
    monkeypatch.setattr(block_sizes, "_SECONDS", 0.0)
    done = block_sizes.run(entry, Recorder(), toy=True)
    found = done["found"]["candidates"]
    assert list(found) == [block_sizes.text(x) for x in (good, *entry.sizes)]
    assert ("ms" in found[block_sizes.text(bad)]) == (factor == 1.0)
    assert done["status"] == ("ok" if factor == 1.0 else "wrong")
    assert "ms" in found[block_sizes.text(entry.sizes[1])]


# --- the tests of compiled kernels ---


@pytest.mark.parametrize("bodies", [("assert True", "assert 1 == 2"), ()])
def test_gpu_tests_are_reported_one_by_one(bodies, tmp_path, monkeypatch):
    """In a project with these tests; a project without GPU tests does not pass."""
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    gpu\n    slow\n")
    tests = [f"@pytest.mark.gpu\ndef test_{i}():\n    {body}\n" for i, body in enumerate(bodies)]
    (tmp_path / "test_it.py").write_text("import pytest\n\n" + "\n".join([*tests, "def test_other(): assert False"]))
    monkeypatch.setattr(gpu_tests, "_ROOT", tmp_path)
    monkeypatch.setattr(gpu_tests, "FILES", ("test_it.py",))
    monkeypatch.setattr(gpu_tests, "_PROCESSES", 0)
    monkeypatch.setenv("PYTHONPATH", str(command.Path(gpu_tests.__file__).parents[2]))
    recorder = Recorder()
    done = gpu_tests.run(recorder)
    assert done["status"] == "wrong" if bodies else "failed"
    assert done["found"]["passed"] == min(1, len(bodies))
    assert len(recorder.heard) == len(bodies)
    if bodies:
        ((name, why),) = done["found"]["failed"].items()
        assert name == "test_it.py::test_1"
        assert "assert 1 == 2" in why


# --- counters ---

NCU = """==PROF== Connected to process 1
"ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"
"0","pallas_attn_forward","Occupancy","Achieved Occupancy","%","24.5"
"0","pallas_attn_forward","Launch Statistics","Registers Per Thread","register/thread","192"
"1","pallas_attn_decode","Launch Statistics","Grid Size","","128"
"1","pallas_attn_decode","Launch Statistics","","",""
"""


def test_counters_by_kernel(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda tool: "/opt/ncu")
    calls = []

    def profile(arguments, **_):
        calls.append(arguments)
        return subprocess.CompletedProcess(arguments, 0, NCU, "")

    monkeypatch.setattr(subprocess, "run", profile)
    done = counters.run()
    assert done["found"] == {
        "pallas_attn_forward": {"Achieved Occupancy (%)": "24.5", "Registers Per Thread (register/thread)": "192"},
        "pallas_attn_decode": {"Grid Size": "128"},
    }
    ((tool, *arguments),) = calls
    assert tool == "/opt/ncu"
    assert arguments[:2] == ["--clock-control", "none"], "the clocks are not ours to set"


def test_counters_need_the_tool(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda tool: None)
    assert counters.run() == {"status": "skipped", "why": "ncu is not installed"}
    monkeypatch.setattr(shutil, "which", lambda tool: "/opt/ncu")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 1, "", "no permission"))
    assert counters.run() == {"status": "failed", "why": "no permission"}
