"""Kernels as XLA compiles them for an absent GPU: registers, spills, and what counts as a problem."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

pytest.importorskip("triton", reason="PyPI's triton, whose tools disassemble machine code, is not installed")

from bench.machine_code import xla_gpu, xla_registers
from bench.machine_code.kernel_cases import KernelCase, Program, Setting
from pallas_attn import BlockSizes
from tests.bench.toy_kernels import CASE

needs_xla = pytest.mark.skipif(xla_gpu.missing() is not None, reason=str(xla_gpu.missing()))
SETTING = Setting(90, 64, "float32", BlockSizes(16, 16, num_warps=1))


def toy(size: int) -> KernelCase:
    """A kernel of one warp that holds a tile of ``size`` squared numbers across a loop."""

    def kernel(x_ref, out_ref):
        x = plgpu.load(x_ref)
        total = jax.lax.fori_loop(0, 3, lambda i, y: jnp.cumsum(y, axis=0) + x, x)
        plgpu.store(out_ref, total)

    def program(setting: Setting) -> Program:
        shape = jax.ShapeDtypeStruct((size, size), jnp.float32)
        options = {"compiler_params": plgpu.CompilerParams(num_warps=setting.sizes.num_warps, num_stages=1)}
        return Program(pl.pallas_call(kernel, out_shape=shape, name="pallas_attn_toy", **options), (shape,))

    return KernelCase("toy", "pallas_attn_toy", "", (), program, lambda *_: SETTING.sizes)


@needs_xla
@pytest.mark.parametrize(("size", "spills"), [(16, False), (128, True)])
def test_spills_are_found(size, spills):
    found = xla_registers.read(toy(size), SETTING)
    assert (found["stack_bytes"] > 0) == (found["spill_stores"] > 0) == (found["in_loops"] > 0) == spills


@needs_xla
@pytest.mark.parametrize(
    ("name", "capability", "head_dim", "dtype"),
    [("forward", 80, 64, "bfloat16"), ("forward", 90, 64, "bfloat16"), ("key-weights", 90, 128, "float32")],
)
def test_kernels_do_not_spill_at_any_length(name, capability, head_dim, dtype):
    case = CASE[name]
    setting = Setting(capability, head_dim, dtype, case.default_sizes(head_dim, dtype, capability))
    found = xla_registers.entries(case, setting)
    assert [x["length"] for x in found] == list(xla_registers.LENGTHS)
    assert all(16 <= x["registers"] <= 255 and x["spill_stores"] == 0 for x in found)


def entry(has_scores: bool = False, **xla) -> dict:
    figures = {"length": 1999, "registers": 255, "stack_bytes": 0, "spill_stores": 0, "spill_loads": 0, "in_loops": 0}
    head = {"case": "forward", "capability": 90, "head_dim": 64, "dtype": "float32", "has_scores": has_scores}
    return {**head, "xla": [figures | xla]}


def test_a_spill_is_a_problem_and_with_scores_one_in_a_loop():
    assert xla_registers.problems(entry()) == []
    outside = {"stack_bytes": 8, "spill_stores": 1, "spill_loads": 1}
    (problem,) = xla_registers.problems(entry(**outside))
    assert "XLA at length 1999 spills: 8 bytes of stack, 1 stores and 1 loads, 0 of them in a loop" in problem
    assert xla_registers.problems(entry(has_scores=True, **outside)) == []
    assert len(xla_registers.problems(entry(has_scores=True, **outside, in_loops=1))) == 1


def test_an_accepted_entry_may_spill_outside_of_its_loops(monkeypatch):
    monkeypatch.setitem(xla_registers.ACCEPTED, ("forward", 90, 64, "float32"), "10 clocks, not 20")
    assert xla_registers.problems(entry(stack_bytes=8, spill_stores=1, spill_loads=1)) == []
    assert len(xla_registers.problems(entry(stack_bytes=8, spill_stores=1, spill_loads=2, in_loops=1))) == 1


def test_without_the_plugin_nothing_is_compiled_and_the_reason_names_the_command(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(xla_gpu, "TOOLKITS", {})
    assert "python -m bench.xla_gpu" in str(xla_gpu.missing())
    assert xla_registers.entries(CASE["forward"], SETTING) == []


def test_cases_that_are_not_judged_are_compiled_on_request_and_their_spills_only_reported(monkeypatch):
    monkeypatch.setattr(xla_registers, "read", lambda case, setting: setting.length)
    monkeypatch.setattr(xla_gpu, "missing", lambda: None)
    assert xla_registers.entries(CASE["forward-bias"], SETTING) == []
    assert xla_registers.entries(CASE["forward-bias"], SETTING, every_case=True) == list(xla_registers.LENGTHS)
    spilling = entry(has_scores=True, stack_bytes=8, spill_stores=1, in_loops=1) | {"case": "forward-bias"}
    assert xla_registers.problems(spilling) == []
    (line,) = xla_registers.spills(spilling)
    assert "8 bytes of stack" in line
