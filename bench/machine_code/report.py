"""One kernel's machine code as numbers, and the problems in it."""

import dataclasses
from collections import Counter

from bench.machine_code import issue_rates, sass, triton_ir, xla_registers
from bench.machine_code.compiled import MachineCode, compile_kernels
from bench.machine_code.kernel_cases import KernelCase, Setting


def entry(case: KernelCase, setting: Setting) -> dict:
    """Compiles a case by PyPI's Triton and returns its entry of the report's JSON."""
    (code,) = compile_kernels(case.lower(setting), setting.capability, name=case.kernel)
    return describe(code, case, setting)


def describe(code: MachineCode, case: KernelCase, setting: Setting) -> dict:
    """Resources of a compiled kernel, and the instructions and estimated clocks of each of its loops."""
    processor = issue_rates.PROCESSORS[setting.capability]
    resident = issue_rates.occupancy(
        processor, registers=code.registers, shared_bytes=code.shared_bytes, num_warps=code.num_warps
    )
    loops, masks = triton_ir.read(code.ir)
    if len(loops) != len(case.loops):
        raise ValueError(f"{case.name}: expected loops {case.loops}, got {len(loops)}")
    machine_loops = sass.natural_loops(sass.parse(code.sass))
    return {
        "case": case.name,
        "has_scores": case.has_scores,
        "pipelined": case.pipelined,
        "capability": setting.capability,
        "head_dim": setting.head_dim,
        "dtype": setting.dtype,
        "blocks": {name: getattr(setting.sizes, name) for name in ("q", "kv", "num_warps", "num_stages")},
        "registers": code.registers,
        "stack_bytes": code.stack_bytes,
        "spill_stores": code.spill_stores,
        "spill_loads": code.spill_loads,
        "shared_bytes": code.shared_bytes,
        "occupancy": dataclasses.asdict(resident),
        "loops": {
            name: _describe_loop(
                _machine_loop(loop, machine_loops), loop, masks, processor, code, resident.warps, case.pipelined
            )
            for name, loop in zip(case.loops, loops, strict=True)
        },
    }


def _machine_loop(loop: triton_ir.Loop, machine_loops: list[list[sass.Instruction]]) -> list[sass.Instruction]:
    """The machine loop of a loop of the IR; empty if the compiler left none.

    It is the smallest loop with at least half of the maximal count of instructions from the IR loop's lines, because
    instructions pipelined out of an inner loop stay in the outer one, and a spinning wait is a separate loop.
    """
    counted = [(sum(x.line in loop.lines for x in body), body) for body in machine_loops]
    most = max((count for count, _ in counted), default=0)
    return min((body for count, body in counted if 0 < most <= 2 * count), key=len, default=[])


def _describe_loop(
    instructions: list[sass.Instruction],
    loop: triton_ir.Loop,
    masks: triton_ir.MaskLines,
    processor: issue_rates.Processor,
    code: MachineCode,
    warps: int,
    pipelined: bool,
) -> dict:
    kinds = Counter(issue_rates.kind(x) for x in instructions)
    estimate = issue_rates.estimate(instructions, processor, num_warps=code.num_warps, warps=warps)
    done = sum(issue_rates.multiply_adds(x) for x in instructions if issue_rates.kind(x) == "matrix")
    asked = sum(loop.tiles.values())
    loaded = _copied(instructions, loop, code) if pipelined else issue_rates.wide_bytes(instructions) * code.num_warps
    return {
        "instructions": len(instructions),
        "kinds": dict(sorted(kinds.items())),
        "mask": sum(_belongs_to_mask(x, masks) for x in instructions),
        "multiply_adds": {"asked": loop.multiply_adds, "done": done * code.num_warps},
        "copied_bytes": {"asked": asked, "done": loaded},
        "cycles": round(estimate.cycles),
        "overlapped": round(estimate.overlapped),
        "serial": round(estimate.serial),
        "units": {unit: round(clocks) for unit, clocks in estimate.units.items()},
        "bound": estimate.bound,
    }


def _copied(instructions: list[sass.Instruction], loop: triton_ir.Loop, code: MachineCode) -> int:
    """Bytes of the loop's tiles that are copied asynchronously; only some threads copy a small tile."""

    def copied(line: int) -> int:
        return issue_rates.copied_bytes(x for x in instructions if x.line == line) * code.num_warps

    return sum(min(size, copied(line)) for line, size in loop.tiles.items())


def _belongs_to_mask(instruction: sass.Instruction, masks: triton_ir.MaskLines) -> bool:
    compares = issue_rates.kind(instruction) in issue_rates.COMPARES
    return instruction.line in masks.logic or (compares and instruction.line in masks.loads)


def spills(entry: dict) -> list[str]:
    """Spills with PyPI's Triton, in words."""
    stores, loads = entry["spill_stores"], entry["spill_loads"]
    if entry["stack_bytes"] or stores or loads:
        return [f"spills: {entry['stack_bytes']} bytes of stack, {stores} stores and {loads} loads"]
    return []


def problems(entry: dict) -> list[str]:
    """Problems of an entry, in words.

    With scores, full blocks may have compares and plain loads of operands, and values that are needed only after the
    loops may be spilled before them.
    """
    found = xla_registers.problems(entry)
    found += [] if entry["has_scores"] else spills(entry)
    if entry["occupancy"]["blocks"] == 0:
        found.append(f"does not fit on a multiprocessor: too much of {entry['occupancy']['limit']}")
    for name, loop in entry["loops"].items():
        if not loop["instructions"]:
            found.append(f"no loop over {name} blocks in the machine code")
            continue
        if name == "full" and loop["mask"] and not entry["has_scores"]:
            found.append(f"{loop['mask']} mask instructions in the loop over full blocks")
        if spilled := loop["kinds"].get("stack", 0):
            found.append(f"{spilled} loads and stores of spilled registers in the loop over {name} blocks")
        copied, products = loop["copied_bytes"], loop["multiply_adds"]
        if copied["done"] < copied["asked"] and not entry["has_scores"]:
            missing = f"{copied['done']} of {copied['asked']} bytes"
            how = "copied asynchronously" if entry["pipelined"] else "loaded in units of 16 bytes"
            found.append(f"{name} blocks: only {missing} are {how}")
        if products["done"] < products["asked"]:
            missing = f"{products['done']} of {products['asked']} multiply-adds"
            found.append(f"{name} blocks: only {missing} are in matrix instructions")
    return found
