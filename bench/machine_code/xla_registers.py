"""Registers and spills of a kernel as XLA compiles it, at lengths of a whole number of blocks and of none."""

import dataclasses

from bench.machine_code import issue_rates, sass, xla_gpu
from bench.machine_code.kernel_cases import LENGTH, RAGGED_LENGTH, KernelCase, Setting

_GPUS = {80: "A100", 90: "H100"}
LENGTHS = (LENGTH, RAGGED_LENGTH)
# Each takes seconds, so masks with arrays, scores and key weights are left to PyPI's Triton.
CASES = ("forward", "d-query", "d-key-value", "decode", "decode-int8", "decode-paged")

# Entries that spill a little outside of their loops and are faster by the estimate than the best that does not: (case,
# capability, head_dim, dtype) -> why, with both figures.
ACCEPTED: dict[tuple[str, int, int, str], str] = {}


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


def entries(case: KernelCase, setting: Setting) -> list[dict]:
    """Of every length, if the case is one of :data:`CASES`; an empty list without XLA's plugin."""
    if case.name not in CASES or xla_gpu.missing():
        return []
    return [read(case, dataclasses.replace(setting, length=length)) for length in LENGTHS]


def problems(entry: dict) -> list[str]:
    """Spills in an entry of the report, in words. With scores, they may be outside of loops."""
    accepted = (entry["case"], entry["capability"], entry["head_dim"], entry["dtype"]) in ACCEPTED
    found = []
    for xla in entry.get("xla", []):
        spills = xla["stack_bytes"] or xla["spill_stores"] or xla["spill_loads"]
        if xla["in_loops"] or (spills and not (entry["has_scores"] or accepted)):
            numbers = (
                f"{xla['stack_bytes']} bytes of stack, {xla['spill_stores']} stores and {xla['spill_loads']} loads"
            )
            found.append(f"XLA at length {xla['length']} spills: {numbers}, {xla['in_loops']} of them in a loop")
    return found
