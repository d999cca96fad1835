"""Issue rates, occupancy and clocks."""

import dataclasses

import pytest

pytest.importorskip("triton", reason="PyPI's triton, which compiles without a GPU, is not installed")

from bench.machine_code import issue_rates, sass


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
