"""Chooses block sizes by machine code: every candidate that fits without a spill, ranked by its estimate."""

import dataclasses
import itertools

from bench.kernel_cases import Setting
from pallas_attn import BlockSizes

# Larger blocks than 128 would skip less of a sparse mask.
_ROWS = {2: ((64, 128), (32, 64, 128)), 4: ((16, 32, 64), (16, 32, 64))}
_WARPS = (4, 8)
_STAGES = (2, 3)
# How many of the best under one mask are compiled under the others too.
FINALISTS = 6
_MOST_REGISTERS = 248  # of 255; the next smaller unit of allocation
# Estimates closer than this are alike: they leave out more than that.
_ALIKE = 0.03


def candidates(head_dim: int, itemsize: int) -> list[BlockSizes]:
    """Block sizes to try, without those whose accumulators alone overflow the 255 registers of a thread."""
    q_sizes, kv_sizes = _ROWS[itemsize]
    tried = itertools.starmap(BlockSizes, itertools.product(q_sizes, kv_sizes, _WARPS, _STAGES))
    return [x for x in tried if x.q * (head_dim + x.kv) / (32 * x.num_warps) < 255]


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A setting with the report's entries, one per mask, or with the reason why it is out."""

    setting: Setting
    entries: tuple[dict, ...]
    reason: str | None

    @property
    def registers(self) -> int:
        """Of the mask that needs most."""
        return max(entry["registers"] for entry in self.entries)

    @property
    def warps(self) -> int:
        """Resident on a multiprocessor, with the mask that leaves fewest."""
        return min(entry["occupancy"]["warps"] for entry in self.entries)

    def cycles_per_tile(self, loop: str) -> float:
        """Estimated clocks of a multiprocessor per 64 x 64 query-key pairs, with the slowest mask."""
        sizes = self.setting.sizes
        return max(entry["loops"][loop]["cycles"] for entry in self.entries) * 64 * 64 / (sizes.q * sizes.kv)


def ranked(tried: list[Candidate]) -> list[Candidate]:
    """Those without a problem, best first.

    One that needs nearly all registers comes last, for XLA's version of the compilers may need a few more and spill.
    Among estimates that are alike the one with cheaper partial blocks leads, then the one with more warps resident,
    then the one with more copies in flight: the estimate knows no latency, which those hide.
    """
    fitting = [x for x in tried if x.reason is None]
    best_full = min((x.cycles_per_tile("full") for x in fitting), default=1.0)
    best_partial = min((x.cycles_per_tile("partial") for x in fitting), default=1.0)

    def order(candidate: Candidate):
        return (
            candidate.registers > _MOST_REGISTERS,
            int((candidate.cycles_per_tile("full") / best_full - 1) / _ALIKE),
            int((candidate.cycles_per_tile("partial") / best_partial - 1) / _ALIKE),
            -candidate.warps,
            -candidate.setting.sizes.num_stages,
            candidate.cycles_per_tile("full"),
        )

    return sorted(fitting, key=order)
