"""Chooses block sizes by machine code: ranks the candidates that fit without a spill by their estimates."""

import dataclasses
import itertools
from collections.abc import Iterator

from bench.machine_code.kernel_cases import Setting
from pallas_attn import BlockSizes

# Larger blocks than 128 would skip less of a sparse mask.
_SIZES = {2: (32, 64, 128), 4: (16, 32, 64)}
# What a program holds in float32 at a time: (accumulators as wide as a head, tiles of queries x keys).
HELD = {
    "pallas_attn_forward": (1, 1),
    "pallas_attn_decode": (1, 1),
    "pallas_attn_d_query": (1, 2),
    "pallas_attn_d_key_value": (2, 2),
}
_WARPS = (4, 8)
_STAGES = (2, 3)
# How many candidates without a problem in any case are ranked.
FINALISTS = 3
# With XLA's version of the compilers a kernel may need a few more registers. One with hardly any left would then spill
# a little, at the cost of this handicap.
_MOST_REGISTERS = 248  # of 255; the next smaller unit of allocation
_HANDICAP = 1.1
# Estimates closer than this count as equal, because they neglect more than that.
_ALIKE = 0.03
# Bytes of a thread's stack. Larger blocks than one that spills this much spill too, and compile slowest.
_HOPELESS = 128


def candidates(kernel: str, head_dim: int, itemsize: int) -> list[BlockSizes]:
    """Block sizes to try, without those whose sums and tiles alone overflow the 255 registers of a thread."""
    sums, tiles = HELD[kernel]

    def registers(sizes: BlockSizes) -> float:
        rows = sizes.kv if kernel == "pallas_attn_d_key_value" else sizes.q
        return (rows * sums * head_dim + sizes.q * sizes.kv * tiles) / (32 * sizes.num_warps)

    # The queries of decode are one block, the smallest tile of a matrix instruction.
    queries = (16,) if kernel == "pallas_attn_decode" else _SIZES[itemsize]
    choices = itertools.product(queries, _SIZES[itemsize], _WARPS, _STAGES)
    return [x for x in itertools.starmap(BlockSizes, choices) if registers(x) < 255]


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A setting with the report's entries, one per case, or the reason why it is rejected."""

    setting: Setting
    entries: tuple[dict, ...]
    reason: str | None

    @property
    def registers(self) -> int:
        """Registers of the case that needs the most."""
        return max(entry["registers"] for entry in self.entries)

    @property
    def warps(self) -> int:
        """Warps resident on a multiprocessor in the worst case."""
        return min(entry["occupancy"]["warps"] for entry in self.entries)

    def cycles_per_tile(self, loop: str) -> float:
        """Estimated clocks of a multiprocessor per 64 x 64 query-key pairs, with the slowest mask and no scores."""
        sizes = self.setting.sizes
        cycles = (entry["loops"][loop]["cycles"] for entry in self.entries if not entry["has_scores"])
        return max(cycles) * 64 * 64 / (sizes.q * sizes.kv)


def waves(settings: list[Setting]) -> Iterator[list[Setting]]:
    """The settings, small blocks and few stages first, so that one wave can rule out candidates of the next."""

    def size(setting: Setting) -> tuple[int, int]:
        return setting.sizes.q * setting.sizes.kv, setting.sizes.num_stages

    for _, wave in itertools.groupby(sorted(settings, key=size), size):
        yield list(wave)


def hopeless(sizes: BlockSizes, tried: list[Candidate]) -> str | None:
    """Why a candidate is not compiled: its blocks are no smaller than those of one that spills much; or None."""
    for candidate in tried:
        smaller = candidate.setting.sizes
        stack = max((entry["stack_bytes"] for entry in candidate.entries), default=0)
        within = smaller.q <= sizes.q and smaller.kv <= sizes.kv and smaller.num_stages <= sizes.num_stages
        if within and smaller.num_warps == sizes.num_warps and stack >= _HOPELESS:
            blocks = f"{smaller.q} x {smaller.kv}, {smaller.num_warps}, {smaller.num_stages}"
            return f"not compiled: {blocks} spills {stack} bytes of stack"
    return None


def ranked(tried: list[Candidate]) -> list[Candidate]:
    """Candidates without a problem, best first.

    Among equal estimates, cheaper partial blocks come first, then more resident warps, then more copies in flight,
    because these hide latency, which the estimate neglects.
    """
    fitting = [x for x in tried if x.reason is None]

    def cycles(candidate: Candidate, loop: str) -> float:
        handicap = _HANDICAP if candidate.registers > _MOST_REGISTERS else 1.0
        return candidate.cycles_per_tile(loop) * handicap

    best_full = min((cycles(x, "full") for x in fitting), default=1.0)
    best_partial = min((cycles(x, "partial") for x in fitting), default=1.0)

    def order(candidate: Candidate):
        return (
            int((cycles(candidate, "full") / best_full - 1) / _ALIKE),
            int((cycles(candidate, "partial") / best_partial - 1) / _ALIKE),
            -candidate.warps,
            -candidate.setting.sizes.num_stages,
            cycles(candidate, "full"),
        )

    return sorted(fitting, key=order)
