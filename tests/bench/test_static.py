"""The machine-code report: its findings in kernels, and its failures when instructions are lost."""

import dataclasses
import importlib.util
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

import pallas_attn as pa

pytest.importorskip("triton", reason="PyPI's triton, which compiles without a GPU, is not installed")

from bench.machine_code import issue_rates, report, sass, static, sweep, tables
from bench.machine_code.compiled import compile_kernels, lower_for_cuda
from bench.machine_code.kernel_cases import CASES, KernelCase, Setting
from pallas_attn.kernels import triton as kernels

CASE = {case.name: case for case in CASES}
FORWARD = CASE["forward"]
SIZES = pa.BlockSizes(64, 64, num_warps=4, num_stages=2)
SETTING = Setting(90, 64, "bfloat16", SIZES)


@pytest.fixture(scope="module")
def code():
    (kernel,) = compile_kernels(FORWARD.lower(SETTING), 90)
    return kernel


@pytest.fixture(scope="module")
def entry(code):
    return report.describe(code, FORWARD, SETTING)


def with_mask_in_full_blocks(masked: bool) -> KernelCase:
    """A kernel of two loops over products; the first compares positions if ``masked``."""

    def kernel(x_ref, bounds_ref, out_ref):
        def step(i, acc, mask):
            y = plgpu.load(x_ref.at[pl.Slice(i * 64, 64), :])
            product = lax.dot_general(y, y, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
            if mask:
                rows, columns = jnp.arange(64)[:, None] * 3, i * 64 + jnp.arange(64)[None, :]
                product = jnp.where(rows >= columns, product, 0.0)
            return acc + product

        acc = jnp.zeros((64, 64), jnp.float32)
        acc = lax.fori_loop(0, bounds_ref[0], lambda i, acc: step(i, acc, masked), acc)
        acc = lax.fori_loop(bounds_ref[0], bounds_ref[1], lambda i, acc: step(i, acc, True), acc)
        plgpu.store(out_ref, acc)

    def lower(setting: Setting):
        call = pl.pallas_call(
            kernel,
            out_shape=jax.ShapeDtypeStruct((64, 64), jnp.float32),
            compiler_params=plgpu.CompilerParams(num_warps=setting.sizes.num_warps, num_stages=2),
            name="toy",
        )
        arguments = jax.ShapeDtypeStruct((4096, 64), jnp.bfloat16), jax.ShapeDtypeStruct((2,), jnp.int32)
        return lower_for_cuda(call, *arguments, capability=setting.capability)

    return KernelCase("toy", "toy", "", ("full", "partial"), lower, lambda *_: SIZES)


def test_the_forward_kernel_has_no_problem(entry):
    assert report.problems(entry) == []


def test_every_multiply_add_and_copy_of_a_block_is_found_in_both_loops(entry):
    for loop in entry["loops"].values():
        assert loop["multiply_adds"] == {"asked": 2 * 64 * 64 * 64, "done": 2 * 64 * 64 * 64}
        assert loop["copied_bytes"]["asked"] == 2 * 64 * 64 * 2 <= loop["copied_bytes"]["done"]
        # One exponential per logit and thread, and one per row for the rescaling.
        assert loop["kinds"]["ex2"] == 64 * 64 // 128 + 2


def test_the_mask_is_in_the_loop_over_partial_blocks_alone(entry):
    # At least a compare and a select per logit and thread.
    assert entry["loops"]["partial"]["mask"] >= 2 * 64 * 64 // 128
    assert entry["loops"]["full"]["mask"] == 0
    # The rest controls the loop, the ring of copies and the prefetch of the next index.
    assert sum(entry["loops"]["full"]["kinds"].get(kind, 0) for kind in issue_rates.COMPARES) <= 12


def test_loops_are_distinguished_under_any_mask(entry):
    everything = dataclasses.replace(FORWARD, lower=CASE["forward-composed"].lower)
    other = report.entry(everything, SETTING)
    assert other["loops"]["full"]["kinds"] == entry["loops"]["full"]["kinds"]
    assert other["loops"]["partial"]["mask"] > entry["loops"]["partial"]["mask"]


@pytest.mark.parametrize(("name", "products"), [("d-query", 3), ("d-key-value", 4)])
def test_both_loops_of_the_backward_kernels_are_found(name, products):
    found = report.entry(CASE[name], SETTING)
    assert report.problems(found) == []
    for loop in found["loops"].values():
        # The logits, the gradient of the probabilities, and one product per accumulator.
        assert loop["multiply_adds"] == {"asked": products * 64 * 64 * 64, "done": products * 64 * 64 * 64}
        assert loop["copied_bytes"]["asked"] == 2 * 64 * 64 * 2 <= loop["copied_bytes"]["done"]
        assert loop["kinds"]["ex2"] == 64 * 64 // 128
    assert found["loops"]["partial"]["mask"] >= 2 * 64 * 64 // 128 > found["loops"]["full"]["mask"] == 0


def decode_setting(name: str) -> Setting:
    return Setting(90, 64, "bfloat16", CASE[name].default_sizes(64, "bfloat16", 90))


def decode_code(name: str):
    (code,) = compile_kernels(CASE[name].lower(decode_setting(name)), 90, name=CASE[name].kernel)
    return code


@pytest.mark.parametrize("name", ["decode", "decode-paged", "decode-logits"])
def test_plain_keys_and_values_are_copied_in_units_of_16_bytes(name):
    copies = set(re.findall(r"LDGSTS[\w.]*", decode_code(name).sass))
    wide = {x for x in copies if ".128" in x}
    # Partial blocks also copy positions, one per thread.
    assert wide
    assert copies - wide <= {"LDGSTS.E"}


@pytest.mark.parametrize(
    ("name", "bytes_per_key"),
    # int8 scales are not tiles; int4 has a float32 for 32 numbers.
    [
        ("decode", 2 * 128),
        ("decode-paged", 2 * 128),
        ("decode-logits", 2 * 128),
        ("decode-int8", 2 * 64),
        ("decode-int4", 2 * (32 + 4 * 2)),
    ],
)
def test_decode_copies_what_is_stored(name, bytes_per_key):
    found = report.entry(CASE[name], decode_setting(name))
    assert report.problems(found) == []
    kv = found["blocks"]["kv"]
    for loop in found["loops"].values():
        assert loop["multiply_adds"] == {"asked": 2 * 16 * kv * 64, "done": 2 * 16 * kv * 64}
        assert loop["copied_bytes"] == {"asked": kv * bytes_per_key, "done": kv * bytes_per_key}
    assert found["loops"]["partial"]["mask"] > found["loops"]["full"]["mask"] == 0


def test_a_lost_copy_is_found_beside_scales_that_only_some_threads_copy():
    code, case = decode_code("decode-int4"), CASE["decode-int4"]
    without = dataclasses.replace(code, sass=code.sass.replace("LDGSTS.E.64", "NOP"))
    found = report.problems(report.describe(without, case, decode_setting("decode-int4")))
    assert any(line.startswith("full blocks: only 3072 of 5120 bytes are copied asynchronously") for line in found)


def test_the_merge_loads_16_bytes_at_once():
    code, case = decode_code("decode-merge"), CASE["decode-merge"]
    assert code.num_warps == case.default_sizes(64, "bfloat16", 90).num_warps
    found = report.describe(code, case, decode_setting("decode-merge"))
    assert report.problems(found) == []
    assert found["loops"]["parts"]["copied_bytes"] == {"asked": 16 * 64 * 4, "done": 16 * 64 * 4}
    narrow = dataclasses.replace(code, sass=code.sass.replace("LDG.E.128", "LDG.E.64"))
    assert report.problems(report.describe(narrow, case, decode_setting("decode-merge"))) == [
        "parts blocks: only 0 of 4096 bytes are loaded in units of 16 bytes"
    ]


def test_the_weights_of_keys_load_each_logit_once_16_bytes_at_once():
    found = report.entry(CASE["decode-weights"], decode_setting("decode-weights"))
    assert report.problems(found) == []
    assert found["loops"]["visited"]["copied_bytes"] == {"asked": 16 * 64 * 4, "done": 16 * 64 * 4}


def test_a_mask_given_as_an_array_is_no_tile_of_numbers():
    partial = report.entry(CASE["forward-array"], SETTING)["loops"]["partial"]
    assert partial["copied_bytes"]["asked"] == 2 * 64 * 64 * 2


def test_problems_that_scores_excuse_are_reported_without_scores(entry):
    full = entry["loops"]["full"] | {"mask": 3, "copied_bytes": {"asked": 2, "done": 1}}
    changed = entry | {"loops": entry["loops"] | {"full": full}, "spill_stores": 1}
    assert len(report.problems(changed)) == 3
    assert report.problems(changed | {"has_scores": True}) == []
    assert report.spills(changed | {"has_scores": True}) == ["spills: 0 bytes of stack, 1 stores and 0 loads"]
    full["multiply_adds"] = {"asked": 2, "done": 1}
    full["kinds"] = full["kinds"] | {"stack": 2}
    product, spill = sorted(report.problems(changed | {"has_scores": True}), reverse=True)
    assert product == "full blocks: only 1 of 2 multiply-adds are in matrix instructions"
    assert spill == "2 loads and stores of spilled registers in the loop over full blocks"


def test_spills_in_a_loop_are_found():
    setting = Setting(80, 64, "bfloat16", pa.BlockSizes(64, 64, num_warps=4, num_stages=2))
    found = report.problems(report.entry(CASE["d-key-value-bias"], setting))
    assert any("of spilled registers in the loop over partial blocks" in line for line in found)


def test_the_report_covers_every_kernel_of_the_package():
    package = Path(kernels.__file__).parent
    named = {name for path in package.glob("*.py") for name in re.findall(r'"(pallas_attn_\w+)"', path.read_text())}
    assert len(named) == 8
    assert {case.kernel for case in CASES} == named


@pytest.mark.parametrize("kernel", ["forward", "d_query", "d_key_value"])
def test_every_kernel_is_reported_with_masks_and_with_scores(kernel):
    cases = [case for case in CASES if case.kernel == f"pallas_attn_{kernel}"]
    assert {case.has_scores for case in cases} == {False, True}
    call = {"kernel": kernel, "head_dim": 256, "dtype": "float32", "compute_capability": 8.0}
    entry_of_table = pa.tuning.default_block_sizes(2048, 2048, implementation="triton", **call)
    assert {case.default_sizes(256, "float32", 80) for case in cases} == {entry_of_table}


def test_a_mask_in_the_loop_over_full_blocks_is_reported():
    found = report.problems(report.entry(with_mask_in_full_blocks(True), SETTING))
    assert any("mask instructions in the loop over full blocks" in line for line in found)


def test_a_kernel_is_one_entry_of_the_list():
    assert report.problems(report.entry(with_mask_in_full_blocks(False), SETTING)) == []


def test_spills_and_copies_through_registers_are_reported():
    sizes = pa.BlockSizes(128, 128, num_warps=4, num_stages=1)
    found = report.problems(report.entry(FORWARD, Setting(80, 128, "bfloat16", sizes)))
    assert any(line.startswith("spills: ") for line in found)
    assert any(line.startswith("full blocks: only 0 of 65536 bytes are copied asynchronously") for line in found)


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("HGMMA", "full blocks: only 0 of 524288 multiply-adds are in matrix instructions"),
        ("LDGSTS", "full blocks: only 0 of 16384 bytes are copied asynchronously"),
    ],
)
def test_lost_instructions_are_reported(code, lost, message):
    without = dataclasses.replace(code, sass=code.sass.replace(f"{lost}.", "NOP."))
    assert message in report.problems(report.describe(without, FORWARD, SETTING))


def test_one_matrix_instruction_less_is_reported(code):
    first = next(row for row in code.sass.splitlines() if "HGMMA" in row)
    without = dataclasses.replace(code, sass=code.sass.replace(first, ""))
    assert report.problems(report.describe(without, FORWARD, SETTING))


def test_a_kernel_that_does_not_fit_is_reported(code):
    large = dataclasses.replace(code, shared_bytes=228 * 1024)
    found = report.problems(report.describe(large, FORWARD, SETTING))
    assert found == ["does not fit on a multiprocessor: too much of shared memory"]


def test_it_is_compiled_as_xla_does(code):
    rows = code.sass.splitlines()
    full, _ = sass.natural_loops(sass.parse(code.sass))
    # After Triton's first passes the product with V accumulates in place; only the one with K starts from zero.
    assert sum("HGMMA" in row and "RZ, !UPT" in row for row in rows) == 2
    # Denormals are kept, so only an instruction requested by name flushes them: no compare per exponential.
    assert "ex2.approx.ftz.f32" in code.ptx
    assert not any(x.name == "FSETP" for x in full)


NESTED = """
entry:
  //## File "x", line 7
        /*0000*/   MOV R1, RZ ;
.L_x_1:
        /*0010*/   FADD R1, R1, R2 ;
        /*0020*/   @P0 BRA `(.L_x_3) ;
.L_x_2:
  //## File "x", line 9
        /*0030*/   @!PT LDS RZ, [RZ] ;
        /*0040*/   @!P1 CALL.REL.NOINC `(.L_x_3) ;
        /*0050*/   BRA `(.L_x_2) ;
.L_x_3:
        /*0060*/   @P2 BRA `(.L_x_1) ;
        /*0070*/   EXIT ;
.L_x_4:
        /*0080*/   BRA `(.L_x_4) ;
"""


def test_loops_are_those_of_the_graph():
    outer, inner = sass.natural_loops(sass.parse(NESTED))
    assert [x.opcode for x in outer] == ["FADD", "BRA", "LDS", "CALL.REL.NOINC", "BRA", "BRA"]
    assert [x.opcode for x in inner] == ["LDS", "CALL.REL.NOINC", "BRA"]
    assert (outer[0].line, inner[0].line, inner[0].never_runs) == (7, 9, True)


def test_a_jump_back_without_dominance_is_no_loop():
    # The loop is entered at two places, so neither dominates the other.
    text = """
        /*0000*/   @P0 BRA `(.L_x_2) ;
.L_x_1:
        /*0010*/   FADD R1, R1, R2 ;
.L_x_2:
        /*0020*/   @P1 BRA `(.L_x_1) ;
        /*0030*/   EXIT ;
"""
    assert sass.natural_loops(sass.parse(text)) == []


def instruction(opcode: str, operands: str = "") -> sass.Instruction:
    return sass.Instruction(opcode, operands, None, 0)


@pytest.mark.parametrize(
    ("capability", "clock_hz", "teraflops"),
    [(80, 1.41e9, 312.0), (90, 1.83e9, 989.4)],  # dense 16-bit, from the whitepapers
)
def test_matrix_rates_are_the_published_peaks(capability, clock_hz, teraflops):
    processor = issue_rates.PROCESSORS[capability]
    opcode = {80: "HMMA.16816.F32.BF16", 90: "HGMMA.64x128x16.F32.BF16"}[capability]
    done = issue_rates.multiply_adds(instruction(opcode))
    cycles = issue_rates.unit_cycles(instruction(opcode, "R24, R104, gdesc[UR8]"), processor)["matrix"]
    per_clock = 2 * done / cycles * issue_rates.SUB_PARTITIONS * processor.multiprocessors
    assert per_clock * clock_hz / 1e12 == pytest.approx(teraflops, rel=0.01)


def test_an_unknown_matrix_shape_is_refused():
    with pytest.raises(ValueError, match=r"HMMA\.884\.F32: a matrix instruction of unknown shape"):
        issue_rates.multiply_adds(instruction("HMMA.884.F32"))


@pytest.mark.parametrize(
    ("capability", "registers", "shared_bytes", "num_warps", "expected"),
    [
        (90, 128, 0, 4, (4, 16, "registers")),
        (90, 129, 0, 4, (3, 12, "registers")),  # in eights: 136
        (80, 32, 81 * 1024, 4, (2, 8, "shared memory")),  # plus 1 KiB each for the system
        (90, 32, 0, 8, (8, 64, "registers")),
        (90, 24, 0, 1, (32, 32, "blocks")),
        (90, 24, 0, 8, (8, 64, "warps")),
    ],
)
def test_occupancy(capability, registers, shared_bytes, num_warps, expected):
    found = issue_rates.occupancy(
        issue_rates.PROCESSORS[capability], registers=registers, shared_bytes=shared_bytes, num_warps=num_warps
    )
    assert dataclasses.astuple(found) == expected


def test_warps_hide_each_other_and_no_more():
    loop = [instruction("HGMMA.64x128x16.F32.BF16", "R24, R104, gdesc[UR8]")] * 4 + [instruction("MUFU.EX2")] * 32
    processor = issue_rates.PROCESSORS[90]

    def cycles(warps: int) -> issue_rates.Estimate:
        return issue_rates.estimate(loop, processor, num_warps=4, warps=warps)

    alone = cycles(4)
    assert alone.units["matrix"] == alone.units["ex2"] == 256  # 4 x 64 x 128 x 16 / 4 / 512; 32 x 32 / 4
    assert alone.cycles == alone.serial == 512
    assert alone.serial > cycles(8).cycles > cycles(16).cycles > cycles(32).cycles > alone.overlapped == 256


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


def test_the_sweep_goes_down_its_list_until_enough_have_no_problem_in_any_case(monkeypatch):
    def candidate(names, setting, reason=None):
        cycles, alone = setting.sizes.q, len(names) == 1
        loops = {"full": {"cycles": cycles**2}, "partial": {"cycles": 1}}
        entry = {"stack_bytes": 0, "registers": 1, "loops": loops, "occupancy": {"warps": 8}, "has_scores": False}
        return sweep.Candidate(setting, (entry,), None if alone or cycles > 16 else "spills with a bias")

    monkeypatch.setattr(static, "_candidate", candidate)
    monkeypatch.setattr(sweep, "FINALISTS", 2)
    settings = [Setting(90, 64, "bfloat16", pa.BlockSizes(q, 64)) for q in (128, 64, 32, 16, 8, 4)]
    key = FORWARD.kernel, 90, 64, 2
    ranking, order = static._ranked_entry(key, FORWARD, settings, settings[0].sizes, run_here)
    assert [x.setting.sizes.q for x in order] == [32, 64]
    assert len(ranking["out"]) == 3


def test_candidates_that_the_sweep_does_not_compile_are_out(monkeypatch):
    def entry(case, setting):
        stack = 500 if setting.sizes.q == 32 else 0
        loops = {"full": {"cycles": 1}, "partial": {"cycles": 1}}
        return {"stack_bytes": stack, "registers": 1, "loops": loops, "occupancy": {"warps": 8}, "has_scores": False}

    monkeypatch.setattr(report, "entry", entry)
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


# The command.

ONE = ["--kernel", "forward", "--capability", "90", "--head-dim", "64", "--dtype", "bfloat16", "--jobs", "1"]


@pytest.fixture
def one_case(monkeypatch):
    """The command with one kernel, at block sizes that are already compiled."""

    def use(**changes):
        case = dataclasses.replace(FORWARD, **{"default_sizes": lambda *_: SIZES, **changes})
        monkeypatch.setattr(static, "_CASES", {"forward": case})

    use()
    return use


def test_check_and_baseline(one_case, tmp_path, capsys):
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


def test_check_fails_on_a_problem(one_case, capsys):
    one_case(lower=with_mask_in_full_blocks(True).lower, kernel="toy")
    assert static.main([*ONE, "--check"]) == 1
    assert "mask instructions in the loop over full blocks" in capsys.readouterr().out
    assert static.main(ONE) == 0


def test_entries_that_the_baseline_lacks_are_named(entry):
    document = {"versions": {}, "entries": [entry]}
    assert static.differences({"versions": {}, "entries": []}, document) == [
        "forward, sm_90, D 64, bfloat16: not in the baseline"
    ]


def test_sweep(one_case, monkeypatch, tmp_path, capsys):
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
    assert_refused(ONE, "ptxas: expected it in the wheel of triton at", capsys)
