"""The machine-code report: its findings in kernels, and its failures when instructions are lost."""

import dataclasses
import re
from pathlib import Path

import pytest

import pallas_attn as pa

pytest.importorskip("triton", reason="PyPI's triton, which compiles without a GPU, is not installed")

from bench.machine_code import issue_rates, report, sass, static
from bench.machine_code.compiled import compile_kernels
from bench.machine_code.kernel_cases import CASES, KernelCase, Setting
from pallas_attn.kernels import triton as kernels
from tests.bench.toy_kernels import CASE, FORWARD, SETTING, with_mask_in_full_blocks


def entry_of(case: KernelCase, setting: Setting) -> dict:
    """The entry of a case without what XLA makes of it; see test_xla_registers.py."""
    (code,) = compile_kernels(case.lower(setting), setting.capability, name=case.kernel)
    return report.describe(code, case, setting)


@pytest.fixture(scope="module")
def code():
    (kernel,) = compile_kernels(FORWARD.lower(SETTING), 90)
    return kernel


@pytest.fixture(scope="module")
def entry(code):
    return report.describe(code, FORWARD, SETTING)


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
    everything = dataclasses.replace(FORWARD, program=CASE["forward-composed"].program)
    other = entry_of(everything, SETTING)
    assert other["loops"]["full"]["kinds"] == entry["loops"]["full"]["kinds"]
    assert other["loops"]["partial"]["mask"] > entry["loops"]["partial"]["mask"]


@pytest.mark.parametrize(("name", "products"), [("d-query", 3), ("d-key-value", 4)])
def test_both_loops_of_the_backward_kernels_are_found(name, products):
    found = entry_of(CASE[name], SETTING)
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
    found = entry_of(CASE[name], decode_setting(name))
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
    found = entry_of(CASE["decode-weights"], decode_setting("decode-weights"))
    assert report.problems(found) == []
    assert found["loops"]["visited"]["copied_bytes"] == {"asked": 16 * 64 * 4, "done": 16 * 64 * 4}


def test_a_mask_given_as_an_array_is_no_tile_of_numbers():
    partial = entry_of(CASE["forward-array"], SETTING)["loops"]["partial"]
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
    found = report.problems(entry_of(CASE["d-key-value-bias"], setting))
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
    table_entry = pa.tuning.default_block_sizes(2048, 2048, implementation="triton", **call)
    assert {case.default_sizes(256, "float32", 80) for case in cases} == {table_entry}


def test_a_mask_in_the_loop_over_full_blocks_is_reported():
    found = report.problems(entry_of(with_mask_in_full_blocks(True), SETTING))
    assert any("mask instructions in the loop over full blocks" in line for line in found)


def test_a_kernel_is_one_entry_of_the_list():
    assert report.problems(entry_of(with_mask_in_full_blocks(False), SETTING)) == []


def test_spills_and_copies_through_registers_are_reported():
    sizes = pa.BlockSizes(64, 64, num_warps=1, num_stages=1)
    found = report.problems(entry_of(FORWARD, Setting(80, 64, "bfloat16", sizes)))
    assert any(line.startswith("spills: ") for line in found)
    assert any(line.startswith("full blocks: only 0 of 16384 bytes are copied asynchronously") for line in found)


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


def test_entries_that_the_baseline_lacks_are_named(entry):
    document = {"versions": {}, "entries": [entry]}
    assert static.differences({"versions": {}, "entries": []}, document) == [
        "forward, sm_90, D 64, bfloat16: not in the baseline"
    ]
