"""NVIDIA's published limits and rates of a multiprocessor, and an estimate of cycles made from them.

Sources:
  [guide] CUDA C++ Programming Guide: "Compute Capabilities", technical specifications (registers, warps, blocks, shared
    memory), and "Arithmetic Instructions", throughput of native arithmetic instructions.
  [nsight] Nsight Compute documentation, "Pipelines": which instructions share a unit. Compares, selects, logic, shifts
    and the packing of two 16-bit floats run on the ALU; FP32 arithmetic and integer multiply-adds on the FMA unit;
    ex2 and other special functions on the XU.
  [ga100] NVIDIA A100 Tensor Core GPU Architecture, whitepaper: 108 multiprocessors, 1024 dense 16-bit multiply-adds per
    clock and multiprocessor, 5120 bytes per clock from the L2 cache.
  [gh100] NVIDIA H100 Tensor Core GPU Architecture, whitepaper: 132 multiprocessors, 2048 multiply-adds. It gives no
    bytes per clock for the L2 cache, so the A100's are used.

A multiprocessor has four sub-partitions, and each issues one instruction of one warp per clock [guide].
"""

import dataclasses
import re
from collections.abc import Iterable

from bench.machine_code.sass import Instruction

SUB_PARTITIONS = 4
_WARP = 32
_SHARED_BYTES_PER_CLOCK = 128  # 32 banks of 4 bytes [guide]
_BYTES_PER_COPY = 16  # per thread of a cp.async; narrower ones name their width


@dataclasses.dataclass(frozen=True)
class Processor:
    """A multiprocessor of one compute capability.

    Attributes:
      capability: ten times the compute capability.
      multiprocessors: multiprocessors of the GPU, which share one L2 cache.
      multiply_adds: 16-bit matrix multiply-adds per clock and multiprocessor.
      fp32_lanes: FP32 adds, products or multiply-adds per clock and multiprocessor.
      shared_bytes, block_shared_bytes: shared memory of a multiprocessor, and the maximum of one block.
    """

    capability: int
    multiprocessors: int
    multiply_adds: int
    fp32_lanes: int
    shared_bytes: int
    block_shared_bytes: int
    registers: int = 65536
    warps: int = 64
    blocks: int = 32
    reserved_shared_bytes: int = 1024  # per block, for the system
    l2_bytes: int = 5120  # per clock


PROCESSORS = {
    80: Processor(80, 108, 1024, 64, shared_bytes=164 * 1024, block_shared_bytes=163 * 1024),
    90: Processor(90, 132, 2048, 128, shared_bytes=228 * 1024, block_shared_bytes=227 * 1024),
}


@dataclasses.dataclass(frozen=True)
class Occupancy:
    """Blocks (programs) and warps resident on a multiprocessor, and the resource that limits them."""

    blocks: int
    warps: int
    limit: str


def occupancy(processor: Processor, *, registers: int, shared_bytes: int, num_warps: int) -> Occupancy:
    """Occupancy from a kernel's resources; 0 blocks if not even one fits.

    Registers are allocated to a warp in units of 256, so per thread in eights [guide].
    """
    per_warp = _WARP * 8 * -(-registers // 8)
    limits = {
        "registers": processor.registers // (per_warp * num_warps),
        "shared memory": processor.shared_bytes // (shared_bytes + processor.reserved_shared_bytes),
        "warps": processor.warps // num_warps,
        "blocks": processor.blocks,
    }
    if shared_bytes > processor.block_shared_bytes:
        limits["shared memory"] = 0
    limit = min(limits, key=limits.__getitem__)
    return Occupancy(limits[limit], limits[limit] * num_warps, limit)


# Kinds of instructions, as the report counts them. A kind without a published unit takes an issue slot and nothing
# else.
_KINDS = {
    "matrix": "HMMA HGMMA",
    "ex2": "",  # MUFU.EX2 only
    "special": "MUFU I2F F2I F2F FRND POPC FLO BREV",
    "fp32": "FADD FMUL FFMA",
    "fp32 max": "FMNMX",
    "pack": "F2FP I2FP",
    "multiply": "IMAD IMUL IDP",
    "integer": "IADD3 IADD LOP3 SHF LEA MOV PRMT SGXT BMSK IABS IMNMX VIMNMX VIADD VIADDMNMX VIMNMX3 LOP I2I",
    "select": "ISETP FSETP SEL FSEL PLOP3 P2R R2P PSETP CSEL HSETP2 VOTE",
    "uniform": "UMOV UIADD3 ULEA USHF ULOP3 USGXT UIMAD UPRMT UBMSK R2UR S2UR ULDC UFLO UPOPC",
    "uniform select": "UISETP USEL UPLOP3 UP2UR UR2UP VOTEU",
    "shuffle": "SHFL",
    "shared": "LDS STS LDSM STSM",
    "global": "LDG STG LD ST RED ATOMG",
    "async copy": "LDGSTS UTMALDG UBLKCP",
    "barrier": "BAR DEPBAR LDGDEPBAR WARPGROUP WARPSYNC MEMBAR FENCE SYNCS ARRIVES ERRBAR",
    "stack": "LDL STL",
}
_KIND_OF = {name: kind for kind, names in _KINDS.items() for name in names.split()}
COMPARES = {"select", "uniform select"}


def kind(instruction: Instruction) -> str:
    """The kind of an instruction; "other" for branches, constants and unknown opcodes."""
    if instruction.opcode.startswith("MUFU.EX2"):
        return "ex2"
    return _KIND_OF.get(instruction.name, "other")


def unit_cycles(instruction: Instruction, processor: Processor) -> dict[str, float]:
    """Clocks for which one warp's instruction keeps each unit of its sub-partition busy."""
    # An instruction that never runs is still issued.
    busy = {"issue": 1.0}
    if instruction.never_runs:
        return busy
    match kind(instruction):
        case "matrix":
            per_sub_partition = processor.multiply_adds / SUB_PARTITIONS
            slower = 2 if "TF32" in instruction.opcode else 1
            busy["matrix"] = slower * multiply_adds(instruction) / per_sub_partition
            busy["shared memory"] = _matrix_operand_bytes(instruction) / _SHARED_BYTES_PER_CLOCK
        case "ex2" | "special":
            busy["ex2"] = _at(16)
        case "fp32":
            busy["fp32"] = _at(processor.fp32_lanes)
        case "multiply":
            busy["fp32"] = _at(64)
        case "fp32 max" | "pack" | "integer" | "select":
            busy["integer"] = _at(64)
        case "shuffle":
            busy["shared memory"] = _at(32)
        case "shared" | "async copy" | "global" | "stack":
            # Loads and stores of the four sub-partitions share one path.
            bytes_moved = _WARP * _bytes_per_thread(instruction)
            busy["shared memory"] = SUB_PARTITIONS * bytes_moved / _SHARED_BYTES_PER_CLOCK
    return busy


def _at(lanes: int) -> float:
    """Clocks of a warp's instruction on a unit with ``lanes`` results per clock and multiprocessor."""
    return _WARP / (lanes / SUB_PARTITIONS)


def multiply_adds(instruction: Instruction) -> int:
    """Multiply-adds that one warp does in a matrix instruction.

    Raises:
      ValueError: for a shape that is not known, so that none is counted wrong.
    """
    if found := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)\.", instruction.opcode):
        m, n, k = map(int, found.groups())
        return m * n * k // 4  # a warpgroup of four warps does it together
    if found := re.match(r"HMMA\.(16816|1688)\.", instruction.opcode):
        return 16 * 8 * {"16816": 16, "1688": 8}[found[1]]
    raise ValueError(f"{instruction.opcode}: a matrix instruction of unknown shape")


def _matrix_operand_bytes(instruction: Instruction) -> int:
    """Shared memory that a warpgroup's 16-bit matrix instruction reads; 0 where all operands are registers."""
    if instruction.name != "HGMMA":
        return 0
    m, n, k = map(int, re.findall(r"\d+", instruction.opcode.split(".")[1]))
    from_registers = re.match(r"R\d+, R\d+", instruction.operands) is not None
    return 2 * (n * k + (0 if from_registers else m * k))


def _bytes_per_thread(instruction: Instruction) -> int:
    if instruction.name == "LDS":  # threads may share words, which then move once: count the minimum
        return 4
    if instruction.name == "LDSM":  # a matrix of 8 rows of 16 bytes is 4 bytes per thread
        matrices = instruction.opcode.rpartition(".")[2]
        return 4 * (int(matrices) if matrices.isdigit() else 1)
    for width in (128, 64, 16, 8):
        if re.search(rf"\.[US]?{width}\b", instruction.opcode):
            return width // 8
    return 4


def copied_bytes(instructions: Iterable[Instruction]) -> int:
    """Bytes that one warp copies asynchronously from global to shared memory."""
    copies = (x for x in instructions if kind(x) == "async copy" and not x.never_runs)
    return sum(_WARP * (_BYTES_PER_COPY if ".128" in x.opcode else _bytes_per_thread(x)) for x in copies)


def wide_bytes(instructions: Iterable[Instruction]) -> int:
    """Bytes that one warp loads from global memory into registers in units of 16 bytes per thread."""
    return sum(_WARP * 16 for x in instructions if x.name == "LDG" and ".128" in x.opcode and not x.never_runs)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Clocks per block of a loop, for one multiprocessor full of programs.

    Attributes:
      cycles: the estimate.
      overlapped: the busiest unit alone, a lower bound.
      serial: matrix instructions and the rest one after the other, in every warp.
      units: clocks per unit.
      bound: the busiest unit.
    """

    cycles: float
    overlapped: float
    serial: float
    units: dict[str, float]
    bound: str


def estimate(instructions: Iterable[Instruction], processor: Processor, *, num_warps: int, warps: int) -> Estimate:
    """Clocks per trip of a loop from issue rates alone, without latencies.

    A warp runs its matrix instructions, then everything else, then the next block. The other warps of its sub-partition
    do the same out of step, so that the products of one hide the softmax of another. Mean-value analysis of a closed
    network of two queues gives the throughput (Reiser and Lavenberg, J. ACM 27(2), 1980): with one warp the two add
    up, with many the busier is the bound. Copies from shared memory and the L2 cache are asynchronous, so they are
    only a lower bound.

    Args:
      instructions: instructions of one trip of one warp.
      processor: the multiprocessor.
      num_warps: warps per program.
      warps: warps resident on the multiprocessor.
    """
    instructions = list(instructions)
    units = {"issue": 0.0, "matrix": 0.0, "fp32": 0.0, "integer": 0.0, "ex2": 0.0, "shared memory": 0.0}
    for instruction in instructions:
        for unit, clocks in unit_cycles(instruction, processor).items():
            units[unit] += clocks
    share = processor.l2_bytes / processor.multiprocessors
    units["L2"] = SUB_PARTITIONS * copied_bytes(instructions) / share
    other = max(units[unit] for unit in ("issue", "fp32", "integer", "ex2"))
    together = _two_queues(units["matrix"], other, max(1, warps // SUB_PARTITIONS))
    per_program = num_warps / SUB_PARTITIONS
    bound = max(units, key=units.__getitem__)
    return Estimate(
        cycles=per_program * max(together, units[bound]),
        overlapped=per_program * units[bound],
        serial=per_program * max(units["matrix"] + other, units[bound]),
        units={unit: per_program * clocks for unit, clocks in units.items()},
        bound=bound,
    )


def _two_queues(first: float, second: float, customers: int) -> float:
    """Mean time between customers that finish both queues, with ``customers`` circulating."""
    waiting_first = waiting_second = time = 0.0
    for n in range(1, customers + 1):
        in_first, in_second = first * (1 + waiting_first), second * (1 + waiting_second)
        time = (in_first + in_second) / n
        waiting_first, waiting_second = in_first / time, in_second / time
    return time
