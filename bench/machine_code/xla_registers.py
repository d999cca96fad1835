"""Registers and spills of a kernel as XLA compiles it, at lengths of a whole number of blocks and of none."""

import dataclasses

from bench.machine_code import issue_rates, sass, xla_gpu
from bench.machine_code.kernel_cases import LENGTH, RAGGED_LENGTH, KernelCase, Setting

_GPUS = {80: "A100", 90: "H100"}
LENGTHS = (LENGTH, RAGGED_LENGTH)
# Each takes seconds, so the others (masks with arrays, scores, the merge) are compiled on request, and only reported.
CASES = ("forward", "d-query", "d-key-value", "key-weights", "decode", "decode-int8", "decode-paged")

# Entries that spill a little outside of their loops and are faster by the estimate than the best that does not: (case,
# capability, head_dim, dtype) -> why, with both figures.
ACCEPTED: dict[tuple[str, int, int, str], str] = {
    ("d-key-value", 80, 128, "bfloat16"): "JAX 0.12: 8 bytes, 3360 clocks per 64x64 pairs; 64x64, 8, 2: 4024",
    ("key-weights", 80, 256, "bfloat16"): "8 bytes, 1864 clocks per 64x64 pairs; 32x64, 8, 2: 2384",
}


def read(case: KernelCase, setting: Setting) -> dict:
    """Registers, bytes of stack, spills, and spills within loops of a case."""
    function, arguments = case.program(setting)
    lowered = xla_gpu.lower(function, *arguments, gpu=_GPUS[setting.capability])
    (code,) = xla_gpu.kernels(lowered, case.kernel)
    loops = sass.natural_loops(sass.parse(code.sass))
    return {
        "length": setting.length,
        "registers": code.registers,
        "stack_bytes": code.stack_bytes,
        "spill_stores": code.spill_stores,
        "spill_loads": code.spill_loads,
        "in_loops": max((sum(issue_rates.kind(x) == "stack" for x in body) for body in loops), default=0),
    }


def entries(case: KernelCase, setting: Setting, *, every_case: bool = False) -> list[dict]:
    """Of every length, if the case is one of :data:`CASES` or ``every_case``; an empty list without XLA's plugin."""
    if not (every_case or case.name in CASES) or xla_gpu.missing():
        return []
    return [read(case, dataclasses.replace(setting, length=length)) for length in LENGTHS]


def spills(entry: dict) -> list[str]:
    """Spills in an entry of the report, in words."""
    return [_in_words(xla) for xla in entry.get("xla", []) if _has_spills(xla)]


def problems(entry: dict) -> list[str]:
    """Spills of one of :data:`CASES`. With scores, or if accepted, they may be outside of loops."""
    if entry["case"] not in CASES:
        return []
    tolerated = (entry["case"], entry["capability"], entry["head_dim"], entry["dtype"]) in ACCEPTED
    tolerated |= entry["has_scores"]
    return [_in_words(x) for x in entry.get("xla", []) if x["in_loops"] or (_has_spills(x) and not tolerated)]


def _has_spills(xla: dict) -> bool:
    return any(xla[name] for name in ("stack_bytes", "spill_stores", "spill_loads"))


def _in_words(xla: dict) -> str:
    numbers = f"{xla['stack_bytes']} bytes of stack, {xla['spill_stores']} stores and {xla['spill_loads']} loads"
    return f"XLA at length {xla['length']} spills: {numbers}, {xla['in_loops']} of them in a loop"
