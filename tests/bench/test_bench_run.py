"""The command: the calls that it rejects, its files and its output."""

import json
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

import pallas_attn as pa
from bench import run
from bench.gpu_day import block_sizes, gpu_tests, plan
from bench.machine import Peaks
from bench.times import measure, workloads
from bench.times.cases import named
from bench.times.peers import Peer, all_peers

# The fastest case, and the fastest case of attention.
CACHE, ATTENTION = "append-token", "decode-llama-8b"

# Schema 1.
MACHINE_FIELDS = {"date", "device", "processor", "python", "revision", "versions"}
MACHINE_FIELDS |= {"peak_tflops", "peak_gbps", "measured"}
RESULT_FIELDS = {"case", "about", "kind", "shape", "dtype", "active_fraction", "visited_fraction", "capacity", "flops"}
RESULT_FIELDS |= {"bytes", "correct", "error", "allowed_error", "contenders", "ratios", "claims", "skipped"}


def toy(*arguments: str, suite="cpu") -> int:
    return run.main(["--suite", suite, "--toy", *arguments])


def results(path) -> dict[str, dict]:
    return {result["case"]: result for result in json.loads(path.read_text())["results"]}


# --- wrong calls ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--case", "causal,dens"], "--case: suite cpu has causal, decode, .*; got dens"),
        (["--case", "decode-131072"], "got decode-131072"),  # a case of the gpu suite
        (["--peers", "jax.nn,flash"], "--peers: expected some of jax.nn, .*transformers, or none; got flash"),
        (["--resume"], "expected --out"),
        (["--out", "nowhere/x.json"], "nowhere/x.json: cannot be written"),
        (["--part", "rest"], "expected --suite gpu with them, got --suite cpu"),
        (["--suite", "gpu", "--only", "cases"], "--only: expected beginnings of steps that --plan shows, got cases"),
    ],
)
def test_wrong_calls_are_refused_before_anything_runs(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(run, "measure", lambda *_: pytest.fail("something ran"))
    assert run.main(["--suite", "cpu", *arguments]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert re.search(message, error)


@pytest.mark.parametrize("arguments", [[], ["--suite", "tpu"], ["--suite", "cpu", "--minutes", "0"]])
def test_argparse_refuses_the_rest(arguments):
    with pytest.raises(SystemExit) as stop:
        run.main(arguments)
    assert stop.value.code == 2


class NoGpu:
    """A worker process on a machine without a GPU."""

    def ready(self, limit):
        return {"machine": {}, "unavailable": "JAX sees no GPU"}

    def close(self, *, kill):
        pass


@pytest.mark.parametrize("suite", ["gpu", "all"])
def test_no_gpu_no_gpu_suite(suite, capsys, monkeypatch):
    monkeypatch.setattr(run.command, "_started", lambda options: NoGpu())
    monkeypatch.setattr(run, "measure", lambda *_: pytest.fail("something ran"))
    assert run.main(["--suite", suite]) == 2
    assert "JAX sees no GPU; --toy runs it at toy sizes anywhere" in capsys.readouterr().err


def test_list_shows_cases_and_peers_with_reasons(capsys):
    assert run.main(["--suite", "all", "--list"]) == 0
    printed = capsys.readouterr().out
    for name in (*named("all"), *all_peers()):
        assert name in printed
    assert "needs an NVIDIA GPU" in printed


# --- the whole suite ---


@pytest.mark.slow
def test_the_whole_gpu_suite_at_toy_sizes(tmp_path, capsys):
    """Every step of both calls, in worker processes, as on a GPU."""
    assert toy("--peers", "jax.nn,jax.nn.cudnn", "--out", str(tmp_path), suite="gpu") == 0
    path = tmp_path / "gpu.json"
    planned = [step.name for part in plan.PARTS for block in plan.blocks(part, toy=True) for step in block.steps]
    steps = {step["step"]: step for step in json.loads(path.read_text())["steps"]}
    assert set(steps) == set(planned)
    unsupported = ("counters", "case/generation", *(name for name in steps if name.endswith("-backward")))
    for name, step in steps.items():
        assert step["status"] == "ok" or (step["status"] == "skipped" and name in unsupported), step
    found = results(path)
    assert set(found) == set(named("gpu"))
    printed = capsys.readouterr().out
    for name, result in found.items():
        assert name in printed
        if "pallas_attn" in result["skipped"]:
            assert result["kind"] in ("backward", "generation"), result["skipped"]
            continue
        assert result["correct"], name
        assert result["contenders"]["pallas_attn"]["ms"]["median"] > 0
        if result["kind"] in ("forward", "decode"):
            assert result["ratios"]["jax.nn"] > 0
            assert result["flops"] > 0
            assert 0 < result["visited_fraction"] <= 1
            assert "needs an NVIDIA GPU" in result["skipped"]["jax.nn.cudnn"]


@pytest.mark.slow
def test_a_kernel_runs_alone_in_its_blocks():
    """dQ of the kernel that is timed, against the derivative of the reference."""
    size = workloads.Size(1, 64, 64, 2, 2, 32)
    positions = jnp.arange(64, dtype=jnp.int32)[None]
    workload = workloads.Attention(size, pa.masks.causal(), positions, positions, backward=True)
    entry = block_sizes.Entry("d_query", 128, ())
    one = block_sizes.contender(entry, workload, pa.BlockSizes(32, 16), sets=1, interpret=True)
    (got,) = jax.jit(one.function)(*one.inputs[0])
    query, key, value, cotangent = workload.arrays(0)
    pull = jax.vjp(lambda q: pa.attention(q, key, value, pa.masks.causal(), implementation="reference"), query)[1]
    assert block_sizes._same(got, pull(cotangent)[0])


@pytest.mark.slow
def test_every_file_with_gpu_tests_is_known():
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--collect-only",
        "-m",
        "gpu and not slow",
        "-p",
        "no:cacheprovider",
    ]
    done = subprocess.run(command, cwd=gpu_tests._ROOT, capture_output=True, text=True)
    assert {line.partition("::")[0] for line in done.stdout.splitlines() if "::" in line} == {*gpu_tests.FILES}


def test_entries_have_the_fields_of_schema_1(tmp_path):
    path = tmp_path / "cpu.json"
    assert toy("--case", CACHE, "--out", str(path)) == 0
    content = json.loads(path.read_text())
    assert content["suite"] == "cpu-toy", "no one takes it for a result"
    assert set(content["machine"]) == MACHINE_FIELDS
    assert {"jax", "jaxlib", "pallas_attn"} <= set(content["machine"]["versions"])
    (result,) = content["results"]
    assert set(result) == RESULT_FIELDS
    assert set(result["shape"]) == set("BTSNKD")
    assert set(result["contenders"]["pallas_attn"]) == {"ms", "tflops", "gbps", "of_copy", "tokens_per_second"}
    assert result["capacity"] == 256


def test_peaks_are_measured_in_the_same_run(tmp_path, monkeypatch, capsys):
    path = tmp_path / "cpu.json"
    monkeypatch.setattr(run.peaks, "measure", lambda *_, **__: Peaks(0.5, 40.0))
    assert toy("--case", f"{ATTENTION},{CACHE}", "--peers", "none", "--out", str(path)) == 0
    measured = json.loads(path.read_text())["machine"]["measured"]
    assert measured == {"dtype": "float32", "tflops": 0.5, "gbps": 40.0, "side": 64, "nbytes": 2**16}
    decode, append = (results(path)[name]["contenders"]["pallas_attn"] for name in (ATTENTION, CACHE))
    assert decode["of_copy"] == pytest.approx(decode["gbps"] / 40)
    assert append["of_copy"] is None, "of decode alone"
    assert "of copy" in capsys.readouterr().out


def test_a_copy_without_git_needs_a_revision(tmp_path, monkeypatch, capsys):
    path = tmp_path / "cpu.json"
    monkeypatch.setattr(run.machine, "commit", lambda: None)
    assert toy("--case", CACHE, "--out", str(path)) == 0
    assert "without --revision the file does not name" in capsys.readouterr().err
    assert toy("--case", CACHE, "--out", str(path), "--revision", "abc123") == 0
    assert json.loads(path.read_text())["machine"]["revision"] == "abc123"
    assert "without --revision" not in capsys.readouterr().err
    monkeypatch.setattr(run.machine, "commit", lambda: "def456")
    assert toy("--case", CACHE, "--out", str(path), "--revision", "abc123") == 2
    assert "expected none in a clone of the repository, which is at def456; got abc123" in capsys.readouterr().err


# --- resuming ---


def test_resume_skips_what_is_done(tmp_path, monkeypatch):
    path = tmp_path / "cpu.json"
    assert toy("--case", CACHE, "--out", str(path)) == 0
    before = results(path)
    measured = []
    monkeypatch.setattr(run, "measure", lambda case, _: measured.append(case.name) or before[CACHE])
    assert toy("--case", f"{CACHE},append-chunk", "--out", str(path), "--resume") == 0
    assert measured == ["append-chunk"]


def test_time_is_up(tmp_path, capsys):
    path = tmp_path / "cpu.json"
    assert toy("--minutes", "1e-9", "--case", CACHE, "--out", str(path)) == 3
    assert f"no time was left for: {CACHE}. --resume continues." in capsys.readouterr().out
    assert not path.exists()


def test_a_case_that_breaks_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    def broken(case, setting):
        if case.name == CACHE:
            raise RuntimeError("out of\nmemory")
        return measure.measure(case, setting)

    monkeypatch.setattr(run, "measure", broken)
    path = tmp_path / "cpu.json"
    assert toy("--case", f"{CACHE},append-chunk", "--out", str(path)) == 1
    assert results(path)[CACHE]["skipped"] == {"pallas_attn": "failed: RuntimeError: out of memory"}
    assert results(path)["append-chunk"]["correct"]
    assert "FAILED" in capsys.readouterr().out


# --- wrong results, and cases that cannot run ---


@pytest.mark.parametrize("wrong", [lambda x: 1.1 * x, lambda x: x.at[0, 0, 0, 0].set(jnp.nan)], ids=["off", "NaN"])
def test_a_wrong_result_has_no_time(wrong, tmp_path, monkeypatch, capsys):
    right = pa.attention
    monkeypatch.setattr(workloads.pa, "attention", lambda *args, **options: wrong(right(*args, **options)))
    path = tmp_path / "cpu.json"
    assert toy("--case", ATTENTION, "--peers", "jax.nn", "--out", str(path)) == 1
    result = results(path)[ATTENTION]
    assert result["correct"] is False
    assert result["error"] > result["allowed_error"]
    assert result["contenders"] == {"pallas_attn": {"wrong": result["error"]}}
    assert result["ratios"] == {}
    printed = capsys.readouterr().out
    assert "WRONG by" in printed
    assert "GB/s" not in printed


def test_a_case_that_cannot_run_has_a_reason(tmp_path, monkeypatch, capsys):
    def refuse(*_, **__):
        raise NotImplementedError("no kernel for it yet")

    monkeypatch.setattr(workloads.pa, "attention", refuse)
    path = tmp_path / "cpu.json"
    assert toy("--case", ATTENTION, "--out", str(path)) == 0
    result = results(path)[ATTENTION]
    assert (result["correct"], result["contenders"]) == (None, {})
    assert result["skipped"] == {"pallas_attn": "no kernel for it yet"}
    assert f"skipped: pallas_attn, {ATTENTION}: no kernel for it yet" in capsys.readouterr().out


def test_peers_that_cannot_serve_are_skipped_and_wrong_ones_have_no_ratio(tmp_path, monkeypatch, capsys):
    def zeros(workload, sets):
        return workload.contender(lambda query, key, value: jnp.zeros_like(query), (), sets)

    def refusing(workload, sets):
        raise NotImplementedError("no such mask")

    def breaking(workload, sets):
        raise ZeroDivisionError("inside\nthe peer")

    peers = [
        Peer("zeros", lambda: None, zeros),
        Peer("refusing", lambda: None, refusing),
        Peer("breaking", lambda: None, breaking),
        Peer("missing", lambda: "missing is not installed", zeros),
        Peer("of another kind", lambda: None),
    ]
    monkeypatch.setattr(run, "all_peers", lambda interpret: {peer.name: peer for peer in peers})
    path = tmp_path / "cpu.json"
    assert toy("--case", ATTENTION, "--out", str(path)) == 0
    result = results(path)[ATTENTION]
    assert set(result["contenders"]) == {"pallas_attn", "zeros"}
    assert result["contenders"]["zeros"] == {"wrong": pytest.approx(0.5, abs=0.5)}
    assert result["ratios"] == {}
    assert result["skipped"] == {
        "refusing": "no such mask",
        "breaking": "failed: ZeroDivisionError: inside the peer",
        "missing": "missing is not installed",
    }
    assert "WRONG" in capsys.readouterr().out


def test_a_peer_comes_too_late(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "_TOY_EFFORT", measure.Effort(rounds=1, seconds=0.0, prepare_seconds=0.0))
    path = tmp_path / "cpu.json"
    assert toy("--case", ATTENTION, "--peers", "jax.nn", "--out", str(path)) == 0
    assert results(path)[ATTENTION]["skipped"] == {"jax.nn": "no time left"}


def test_generation_without_its_peer_is_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr(measure.generation, "unavailable", lambda: "torch is not installed")
    path = tmp_path / "cpu.json"
    assert toy("--case", "generation", "--out", str(path)) == 0
    assert results(path)["generation"]["skipped"] == {"pallas_attn": "torch is not installed"}


# --- the table ---


def entry(**changes) -> dict:
    mine = {"ms": {"median": 2.0}, "tflops": 100.0, "gbps": 500.0, "of_copy": 0.4, "tokens_per_second": None}
    return {
        "case": "one",
        "kind": "forward",
        "active_fraction": 0.25,
        "flops": 2 * 10**11,
        "bytes": 10**9,
        "correct": True,
        "contenders": {"pallas_attn": mine, "p": {"ms": {"median": 3.0}}},
        "ratios": {"p": 1.5},
        "claims": {},
        "skipped": {},
    } | changes


def line(result, peaks=None) -> list[str]:
    return [next(iter(column.cells)) for column in run.table([result], peaks).columns]


def test_table():
    assert line(entry()) == ["one", "25.0 %", "2", "100 TFLOP/s", "", "40 %", "1.50", ""]
    assert line(entry(kind="decode"))[3] == "500 GB/s"
    # 2e11 operations need 0.2 ms at 1000 TFLOP/s, 1e9 bytes 1 ms at 1000 GB/s.
    assert line(entry(), Peaks(1000.0, 1000.0))[4] == "50 %"
    assert line(entry(flops=None, bytes=None), Peaks(1000.0, 1000.0))[4] == ""


def test_claims_kept_and_missed():
    assert line(entry(claims={"p": 1.5}))[-1] == "kept"
    assert line(entry(claims={"p": 1.6}))[-1] == "missed: p 1.60"
    assert line(entry(claims={"not here": 1.6}))[-1] == "", "what was not measured is neither"


def test_ratios_are_peer_over_ours(tmp_path, monkeypatch):
    """A peer that takes three times as long has a ratio of three."""
    turns = {"pallas_attn": 0.002, "p": 0.006}
    monkeypatch.setattr(measure, "take_turns", lambda given, **_: {name: [turns[name]] * 3 for name in given})
    same = Peer("p", lambda: None, lambda workload, sets: workload.ours(interpret=True))
    monkeypatch.setattr(run, "all_peers", lambda interpret: {"p": same})
    path = tmp_path / "cpu.json"
    assert toy("--case", ATTENTION, "--out", str(path)) == 0
    result = results(path)[ATTENTION]
    assert result["ratios"] == {"p": pytest.approx(3)}
    assert result["contenders"]["p"]["ms"] == {"median": 6.0, "quartiles": [6.0, 6.0], "rounds": 3}
    mine = result["contenders"]["pallas_attn"]
    assert mine["gbps"] == pytest.approx(result["bytes"] / 0.002 / 1e9)
    assert mine["tflops"] == pytest.approx(result["flops"] / 0.002 / 1e12)


def test_tokens_per_second():
    workload = named("cpu")["generation"].build(named("cpu")["generation"].size("cpu"))
    result = {"kind": "generation", "flops": None, "bytes": None, "contenders": {}, "ratios": {}}
    setting = measure.Setting("cpu", {}, measure.Effort())
    measure._report(result, workload, {"pallas_attn": [4.0]}, [4.0], setting)
    assert result["contenders"]["pallas_attn"]["tokens_per_second"] == 8 * 128 / 4
