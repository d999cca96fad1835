"""The sweep over block sizes: candidates, their order, and when it stops."""

import pytest

import pallas_attn as pa

pytest.importorskip("triton", reason="PyPI's triton, which compiles without a GPU, is not installed")

from bench.machine_code import report, static, sweep, xla_registers
from bench.machine_code.kernel_cases import Setting
from tests.bench.toy_kernels import FORWARD


def test_the_sweep_ranks_by_full_blocks_and_prefers_registers_to_be_left():
    def candidate(cycles, partial, registers, stages, reason=None):
        loops = {"full": {"cycles": cycles}, "partial": {"cycles": partial}}
        setting = Setting(90, 64, "bfloat16", pa.BlockSizes(64, 64, num_stages=stages))
        entry = {"registers": registers, "loops": loops, "occupancy": {"warps": 8}, "has_scores": False}
        return sweep.Candidate(setting, (entry,), reason)

    best, alike, slow = candidate(100, 200, 200, 3), candidate(101, 201, 200, 2), candidate(150, 200, 100, 3)
    full, spilling = candidate(98, 190, 255, 3), candidate(50, 50, 200, 3, "spills")
    assert sweep.ranked([slow, spilling, full, alike, best]) == [best, alike, full, slow]
    assert sweep.ranked([slow, spilling, alike, best]) == [best, alike, slow]
    assert sweep.ranked([spilling]) == []


def test_the_sweep_tries_no_accumulators_larger_than_the_registers():
    wide = pa.BlockSizes(32, 128, num_warps=8, num_stages=2)
    for kernel, holds_wide in {"forward": True, "d_query": True, "d_key_value": False}.items():
        tried = sweep.candidates(f"pallas_attn_{kernel}", 256, 2)
        assert pa.BlockSizes(128, 128, num_warps=4, num_stages=2) not in tried
        assert pa.BlockSizes(64, 64, num_warps=8, num_stages=2) in tried
        assert (wide in tried) == holds_wide  # dK and dV are two accumulators with a row per key


def test_the_sweep_tries_decode_with_one_block_of_queries():
    assert {x.q for x in sweep.candidates("pallas_attn_decode", 128, 2)} == {16}


def test_the_sweep_compiles_small_blocks_first_and_none_larger_than_one_that_spills_much():
    def setting(q, kv, warps=4, stages=2):
        return Setting(90, 64, "bfloat16", pa.BlockSizes(q, kv, num_warps=warps, num_stages=stages))

    large, small, staged, wide = setting(64, 64), setting(32, 32), setting(32, 32, stages=3), setting(32, 64)
    more_warps = setting(64, 64, warps=8)
    waves = sweep.waves([large, staged, wide, more_warps, small])
    assert list(waves) == [[small], [staged], [wide], [large, more_warps]]

    def tried(setting, stack):
        return sweep.Candidate(setting, ({"stack_bytes": stack},), "spills")

    broken = sweep.Candidate(small, (), "the compiler broke off")
    spilling = [broken, tried(small, 8), tried(wide, 200)]
    assert sweep.hopeless(large.sizes, spilling) == "not compiled: 32 x 64, 4, 2 spills 200 bytes of stack"
    for other in (small, staged, more_warps):
        assert sweep.hopeless(other.sizes, spilling) is None


def run_here(about, function, work):
    return [function(*piece) for piece in work]


@pytest.fixture
def by_xla(monkeypatch):
    """The settings that are compiled by XLA, which finds spills in blocks of 32 queries."""
    compiled = []

    def entries(case, setting):
        compiled.append(setting.sizes.q)
        spilled = 8 if setting.sizes.q == 32 else 0
        names = ("stack_bytes", "spill_stores", "spill_loads")
        return [{"length": length, "in_loops": 0} | dict.fromkeys(names, spilled) for length in xla_registers.LENGTHS]

    monkeypatch.setattr(xla_registers, "entries", entries)
    return compiled


def found(setting, cycles=1, stack=0):
    """An entry of the report, of the forward kernel."""
    head = {"case": "forward", "capability": 90, "head_dim": 64, "dtype": "bfloat16", "has_scores": False}
    loops = {"full": {"cycles": cycles}, "partial": {"cycles": 1}}
    return {**head, "stack_bytes": stack, "registers": 1, "loops": loops, "occupancy": {"warps": 8}}


def test_the_sweep_goes_down_its_list_until_enough_have_no_problem_in_any_case(monkeypatch):
    def candidate(names, setting, reason=None):
        cycles, alone = setting.sizes.q, len(names) == 1
        entries = tuple(found(setting, cycles**2) for _ in names)
        return sweep.Candidate(setting, entries, None if alone or cycles > 16 else "spills with a bias")

    monkeypatch.setattr(static, "_candidate", candidate)
    monkeypatch.setattr(xla_registers, "entries", lambda *_: [])
    monkeypatch.setattr(sweep, "FINALISTS", 2)
    settings = [Setting(90, 64, "bfloat16", pa.BlockSizes(q, 64)) for q in (128, 64, 32, 16, 8, 4)]
    key = FORWARD.kernel, 90, 64, 2
    ranking, order = static._ranked_entry(key, FORWARD, settings, settings[0].sizes, run_here)
    assert [x.setting.sizes.q for x in order] == [32, 64]
    assert len(ranking["out"]) == 3


def test_only_finalists_are_compiled_by_xla_and_may_not_spill_there(monkeypatch, by_xla):
    monkeypatch.setattr(report, "entry", lambda case, setting: found(setting, setting.sizes.q**2))
    monkeypatch.setattr(report, "problems", lambda entry: [])
    monkeypatch.setattr(static, "_CASES", {"forward": FORWARD})
    monkeypatch.setattr(sweep, "FINALISTS", 2)
    settings = [Setting(90, 64, "bfloat16", pa.BlockSizes(q, 64)) for q in (128, 64, 32, 16)]
    key = FORWARD.kernel, 90, 64, 2
    ranking, order = static._ranked_entry(key, FORWARD, settings, settings[0].sizes, run_here)
    assert by_xla == [16, 32, 64]
    assert [x.setting.sizes.q for x in order] == [16, 64]
    (out,) = ranking["out"]
    assert out["reason"].startswith("forward: XLA at length 2048 spills: 8 bytes of stack, 8 stores and 8 loads")


def test_candidates_that_the_sweep_does_not_compile_are_out(monkeypatch):
    monkeypatch.setattr(report, "entry", lambda case, setting: found(setting, 1, 500 if setting.sizes.q == 32 else 0))
    monkeypatch.setattr(xla_registers, "entries", lambda *_: [])
    monkeypatch.setattr(report, "problems", lambda entry: ["spills"] if entry["stack_bytes"] else [])
    settings = [Setting(90, 64, "bfloat16", pa.BlockSizes(q, 64)) for q in (128, 64, 32, 16)]
    key = FORWARD.kernel, 90, 64, 2
    in_table = settings[0].sizes
    ranking, order = static._ranked_entry(key, FORWARD, settings, in_table, run_here)
    assert [x.setting.sizes.q for x in order] == [128, 16], "the entry of the table is always compiled"
    assert [x["reason"] for x in ranking["out"]] == [
        "forward: spills",
        "not compiled: 32 x 64, 4, 2 spills 500 bytes of stack",
    ]
