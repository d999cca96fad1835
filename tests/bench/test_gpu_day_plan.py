"""The plan of the two calls, and the committed rehearsal on which it relies."""

import json

import pytest

from bench.gpu_day import block_sizes, decoding, efforts, estimates, plan, smoke
from bench.machine_code.kernel_cases import CASES
from bench.run import main
from bench.times.cases import named

# Bytes of stack of our kernels as CUDA 13's ptxas makes them; the case is float32 at head size 64.
SPILLS = {("case/generation", "prefill"): 8}


def steps(part: str) -> list[str]:
    return [step.name for block in plan.blocks(part) for step in block.steps]


@pytest.mark.parametrize("part", plan.PARTS)
def test_a_call_takes_at_most_five_minutes(part, capsys):
    assert plan.total(plan.blocks(part)) <= plan.CALL_SECONDS == 300
    assert main(["--suite", "gpu", "--plan", "--part", part]) == 0
    printed = capsys.readouterr().out
    assert f"--part {part}: {plan.total(plan.blocks(part)):.0f} s of at most 300 s" in printed
    for name in steps(part):
        assert name in printed


def test_first_the_smoke_test_then_ten_headlines():
    smoke_test, headlines = plan.blocks("headlines")
    assert smoke_test.seconds <= 60
    assert [step.which for step in smoke_test.steps] == [check.name for check in smoke.CHECKS]
    assert [step.name for step in headlines.steps] == ["peaks", *(f"case/{name}" for name in efforts.HEADLINES)]
    assert len({*efforts.HEADLINES}) == 10


def test_every_case_has_its_step():
    cases = [name for part in plan.PARTS for name in steps(part) if name.startswith("case/")]
    assert sorted(cases) == sorted(f"case/{name}" for name in named("gpu"))
    rest = steps("rest")
    assert {f"sweep/{name}" for name in block_sizes.entries()} <= {*rest}
    assert {f"generator/{name}" for name in decoding.STORAGES} <= {*rest}
    assert {"counters", "tests"} <= {*rest}


def test_the_smoke_test_runs_every_kernel():
    known = {case.kernel.removeprefix("pallas_attn_") for case in CASES}
    assert frozenset().union(*(check.kernels for check in smoke.CHECKS)) == known


def test_only_some_steps():
    assert [step.name for block in plan.blocks("headlines", only=["smoke/decode"]) for step in block.steps] == [
        check for check in steps("headlines") if check.startswith("smoke/decode")
    ] + ["peaks"]
    assert plan.blocks("rest", only=["smoke"]) == ()
    (block,) = plan.blocks("headlines", only=["case/causal"])
    assert [step.name for step in block.steps] == ["peaks", "case/causal"], "not causal-backward: it is a whole name"


def test_everything_has_been_rehearsed():
    programs = estimates.record()["programs"]
    assert estimates.record()["gpu"] == "H200"
    rehearsed = {x["step"] for x in programs}
    planned = {name for part in plan.PARTS for name in steps(part)} - {"peaks", "counters", "tests"}
    assert planned == rehearsed
    assert [x for x in programs if x["failure"] and x["required"]] == []
    stacks = {(x["step"], x["part"]): sum(kernel["stack_bytes"] for kernel in x["kernels"]) for x in programs}
    assert {name: nbytes for name, nbytes in stacks.items() if nbytes} == SPILLS


def test_the_rehearsal_knows_the_programs_of_a_step():
    by_step = {}
    for program in estimates.record()["programs"]:
        by_step.setdefault(program["step"], []).append(program)
    for check in smoke.CHECKS:
        (program,) = by_step[f"smoke/{check.name}"]
        assert {f"pallas_attn_{name}" for name in check.kernels} <= {x["name"] for x in program["kernels"]}
    for entry in block_sizes.entries().values():
        assert {x["part"] for x in by_step[f"sweep/{entry.name}"]} == {*entry.candidates}


def test_the_best_of_a_sweep_are_listed(tmp_path, monkeypatch):
    sizes = [{"blocks": {"q": 64, "kv": kv, "num_warps": 4, "num_stages": 2}} for kv in (16, 32, 64, 128)]
    same = {"capability": 90, "head_dim": 128, "itemsize": 2, "ranking": [[x] for x in sizes]}
    others = [{"kernel": "pallas_attn_forward", **same, **x} for x in ({"capability": 80}, {"itemsize": 4})]
    sweep = tmp_path / "sweep.json"
    sweep.write_text(json.dumps({"rankings": [*others, {"kernel": "pallas_attn_d_query", **same}]}))
    monkeypatch.setattr(block_sizes, "LIST", tmp_path / "list.json")
    assert block_sizes.main([str(sweep)]) == 0
    (entry,) = block_sizes.entries().values()
    assert entry.name == "d_query-d128"
    assert [block_sizes.text(x) for x in entry.sizes] == ["64 x 16, 4, 2", "64 x 32, 4, 2", "64 x 64, 4, 2"]
    assert next(iter(entry.candidates)) == block_sizes.text(entry.in_table), "for comparison"


def test_the_rehearsal_needs_the_plugin(monkeypatch, capsys):
    monkeypatch.setattr("bench.machine_code.xla_gpu.missing", lambda: "needs XLA's CUDA plugin")
    assert main(["--suite", "gpu", "--rehearse"]) == 2
    assert "needs XLA's CUDA plugin" in capsys.readouterr().err
