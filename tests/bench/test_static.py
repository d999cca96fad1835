"""``python -m bench.static`` and ``bench.static_tables``: the committed report, and the commands."""

import copy
import dataclasses
import functools
import importlib.util
import json

import pytest

import pallas_attn as pa

pytest.importorskip("triton", reason="PyPI's triton, which compiles without a GPU, is not installed")

from bench.machine_code import report, static, sweep, tables, xla_registers
from tests.bench.toy_kernels import FORWARD, SIZES, with_mask_in_full_blocks


def test_the_committed_report_covers_every_case_without_a_problem():
    lines = static.BASELINE.read_text().splitlines()
    entries = json.loads("\n".join(lines))["entries"]
    assert len(lines) == len(entries) + 2
    defaults = static._defaults(static._options([]))
    assert [(x["case"], x["capability"], x["head_dim"], x["dtype"]) for x in entries] == [
        (case.name, setting.capability, setting.head_dim, setting.dtype) for case, setting in defaults
    ]
    assert [x["blocks"]["kv"] for x in entries] == [setting.sizes.kv for _, setting in defaults]
    assert [problem for x in entries for problem in report.problems(x)] == []
    assert [spill for x in entries for spill in report.spills(x)] == []
    for entry in entries:
        lengths = xla_registers.LENGTHS if entry["case"] in xla_registers.CASES else ()
        assert [x["length"] for x in entry["xla"]] == list(lengths)


def test_the_readme_has_the_tables_of_the_committed_report():
    readme = (static.BASELINE.parent.parent / "README.md").read_text()
    entries = json.loads(static.BASELINE.read_text())["entries"]
    found = dict(tables.tables(entries))
    assert list(found) == ["Forward", "dQ", "dK and dV", "Decode"]
    for title, table in found.items():
        assert len(table.splitlines()) == (20 if title == "Decode" else 14)
        assert table in readme, f"{title}: python -m bench.static_tables prints what it should be"


def test_a_file_that_is_not_a_report_is_rejected(tmp_path, capsys):
    path = tmp_path / "report.json"
    path.write_text("{}")
    with pytest.raises(SystemExit):
        tables.main([str(path)])
    assert "cannot be read as a report of bench.static: KeyError('entries')" in capsys.readouterr().err


ONE = ["--kernel", "forward", "--capability", "90", "--head-dim", "64", "--dtype", "bfloat16", "--jobs", "1"]
SMALL_FORWARD = dataclasses.replace(FORWARD, default_sizes=lambda *_: SIZES)


@pytest.fixture(scope="module")
def entry_once():
    return functools.cache(report.entry)


@pytest.fixture
def shared_entries(monkeypatch, entry_once):
    """``report.entry`` compiles each case once for all tests of this file."""
    monkeypatch.setattr(report, "entry", lambda *arguments: copy.deepcopy(entry_once(*arguments)))


@pytest.fixture
def one_case(monkeypatch):
    """The command with one kernel, at small block sizes."""

    def use(case=SMALL_FORWARD):
        monkeypatch.setattr(static, "_CASES", {"forward": case})

    use()
    return use


def test_check_and_baseline(one_case, shared_entries, tmp_path, capsys):
    out = tmp_path / "report.json"
    assert static.main([*ONE, "--check", "--out", str(out)]) == 0
    document = json.loads(out.read_text())
    assert (document["schema"], len(document["entries"])) == (static.SCHEMA, 1)
    assert out.read_text().splitlines()[1:] == [json.dumps(document["entries"][0]), "]}"]

    capsys.readouterr()
    assert static.main([*ONE, "--baseline", str(out)]) == 0
    assert "no difference from the baseline" in capsys.readouterr().out

    document["entries"][0]["registers"] -= 8
    document["entries"][0]["loops"]["full"]["cycles"] += 5
    document["versions"]["triton"] = "0.1"
    out.write_text(json.dumps(document))
    assert static.main([*ONE, "--baseline", str(out)]) == 0
    text = capsys.readouterr().out
    assert "baseline made with triton 0.1" in text
    assert "registers: " in text
    assert "full cycles: " in text


def test_check_fails_on_a_problem(one_case, shared_entries, capsys):
    one_case(dataclasses.replace(with_mask_in_full_blocks(True), name="forward"))
    assert static.main([*ONE, "--check"]) == 1
    assert "mask instructions in the loop over full blocks" in capsys.readouterr().out
    assert static.main(ONE) == 0


def test_sweep(one_case, shared_entries, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sweep, "candidates", lambda *_: [])
    out = tmp_path / "sweep.json"
    assert static.main([*ONE, "--sweep", "--out", str(out)]) == 0, "what is in the table is tried in any case"
    assert "1 tried" in capsys.readouterr().out
    (report,) = json.loads(out.read_text())["rankings"]
    ((best,),) = report["ranking"]
    assert pa.BlockSizes(**best["blocks"]) == SIZES


def test_a_sweep_resumes_where_it_stopped(one_case, monkeypatch, tmp_path, capsys):
    out = tmp_path / "sweep.json"
    command = [*ONE, "--sweep", "--resume", "--out", str(out)]
    compiled = []

    def candidate(names, setting, reason=None):
        if setting.head_dim == 128 and len(compiled) == 2:
            raise KeyboardInterrupt
        compiled.append(setting.head_dim)
        loops = {name: {"cycles": 1, "bound": "issue"} for name in ("full", "partial")}
        entry = {"registers": 1, "stack_bytes": 0, "loops": loops, "occupancy": {"warps": 8}, "has_scores": False}
        return sweep.Candidate(setting, (entry,), None)

    monkeypatch.setattr(static, "_candidate", candidate)
    monkeypatch.setattr(xla_registers, "entries", lambda *_: [])
    monkeypatch.setattr(sweep, "candidates", lambda *_: [SIZES])
    with pytest.raises(KeyboardInterrupt):
        static.main([*command, "--head-dim", "128"])
    assert compiled == [64, 64], "the one of 64 columns, and it again as the best"
    compiled[:] = [0, 0, 0]
    assert static.main([*command, "--head-dim", "128"]) == 0
    assert compiled[3:] == [128, 128], "what the file has is not compiled again"
    assert "has 1 entries; 1 are left" in capsys.readouterr().out
    document = json.loads(out.read_text())
    assert [x["head_dim"] for x in document["rankings"]] == [64, 128]

    out.write_text(json.dumps(document | {"revision": "another"}))
    assert_refused(command, "its revision is another, here it is", capsys)
    out.write_text("{")
    assert_refused(command, "cannot be read", capsys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kernel", "sideways"], "invalid choice: 'sideways'"),
        (["--resume"], "argument --resume: expected --sweep and --out"),
        (["--capability", "75"], "invalid choice: 75"),
        (["--jobs", "0"], "argument --jobs: expected at least 1, got 0"),
        (["--check", "--sweep"], "not allowed with argument"),
    ],
)
def test_wrong_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        static.main(arguments)
    assert message in capsys.readouterr().err


def assert_refused(arguments, message, capsys):
    assert static.main(arguments) == 2
    error = capsys.readouterr().err
    assert "python -m bench.static: error: " in error
    assert message in error
    assert "Traceback" not in error


def test_a_kernel_that_is_not_swept(capsys):
    assert_refused(["--kernel", "decode-merge", "--sweep"], "--sweep: decode-merge is not swept", capsys)


def test_unwritable_output(tmp_path, capsys):
    assert_refused([*ONE, "--out", str(tmp_path / "none" / "x.json")], "cannot be written", capsys)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"schema": 99, "suite": "static"}', "expected schema 1 of suite 'static', got 99 of 'static'"),
        ('{"schema": 1, "suite": "cpu"}', "expected schema 1 of suite 'static', got 1 of 'cpu'"),
        ("[]", "got None of None"),
        ("{", "cannot be read"),
        (None, "no such file"),
    ],
)
def test_wrong_baselines(text, message, tmp_path, capsys):
    path = tmp_path / "baseline.json"
    if text is not None:
        path.write_text(text)
    assert_refused([*ONE, "--baseline", str(path)], message, capsys)


def test_without_triton(monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else find(name))
    assert_refused(ONE, "PyPI's triton compiles the kernels and is not installed", capsys)


def test_without_a_tool_of_triton(one_case, monkeypatch, tmp_path, capsys):
    from triton.backends import nvidia

    monkeypatch.setattr(nvidia, "__file__", str(tmp_path / "__init__.py"))
    assert_refused(ONE, "cuobjdump: expected it in the wheel of triton at", capsys)
