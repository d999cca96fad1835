"""Times the sweep's best block sizes of each kernel, which ``block_sizes.json`` lists beside the entry of the table.

``python -m bench.static --sweep --capability 90 --head-dim D --dtype bfloat16 --out sweep.json`` ranks them without a
GPU; ``python -m bench.gpu_day.block_sizes sweep.json`` adds its three best of each kernel to the list.
"""

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import pallas_attn as pa
from bench.times.cases import named
from bench.times.measure import number_of_sets
from bench.times.timing import Contender, prepare, summary, take_turns
from bench.times.watcher import Watcher
from bench.times.workloads import Attention
from pallas_attn import tuning
from pallas_attn.kernels import triton as kernels
from pallas_attn.kernels.call import Call
from tests import tolerances

LIST = Path(__file__).with_name("block_sizes.json")
BEST = 3
# The case of the GPU suite in which a kernel is timed at a head size.
_CASES = {
    "forward": {64: "causal-d64", 128: "causal", 256: "causal-d256"},
    "decode": {128: "decode-llama-8b"},
    "d_query": {128: "causal-backward"},
    "d_key_value": {128: "causal-backward"},
}
_ROUNDS, _SECONDS = 5, 1.0


@dataclasses.dataclass(frozen=True)
class Entry:
    """The block sizes to time of a kernel at a head size: the sweep's best, and those of the table.

    Attributes:
      kernel, head_dim: of the tuning table.
      sizes: best first by the estimate.
    """

    kernel: tuning.Kernel
    head_dim: int
    sizes: tuple[pa.BlockSizes, ...]

    @property
    def name(self) -> str:
        return f"{self.kernel}-d{self.head_dim}"

    @property
    def case(self) -> str:
        return _CASES[self.kernel][self.head_dim]

    def workload(self, toy: bool) -> Attention:
        """The arrays and the mask."""
        case = named("gpu")[self.case]
        built = case.build(case.size("gpu", toy))
        assert isinstance(built, Attention)
        return built

    @property
    def in_table(self) -> pa.BlockSizes:
        """The entry of the tuning table for compute capability 9.0."""
        return tuning.default_block_sizes(
            *(1 if self.kernel == "decode" else 4096, 4096),
            implementation="triton",
            kernel=self.kernel,
            head_dim=self.head_dim,
            compute_capability=9.0,
        )

    @property
    def candidates(self) -> dict[str, pa.BlockSizes]:
        """By their text, the table's first."""
        return {text(sizes): sizes for sizes in (self.in_table, *self.sizes)}


def text(sizes: pa.BlockSizes) -> str:
    return f"{sizes.q} x {sizes.kv}, {sizes.num_warps}, {sizes.num_stages}"


def entries() -> dict[str, Entry]:
    """The committed list, by name."""
    found = [
        Entry(x["kernel"], x["head_dim"], tuple(pa.BlockSizes(*sizes) for sizes in x["best"]))
        for x in json.loads(LIST.read_text())
    ]
    return {x.name: x for x in found}


def contender(entry: Entry, workload: Attention, sizes: pa.BlockSizes, *, sets: int, interpret: bool) -> Contender:
    """The kernel alone, with prebuilt lists; it returns the output, dQ, or dK and dV."""
    scale = workload.size.head_dim**-0.5
    options: dict[str, Any] = {"scale": scale, "interpret": interpret}
    inputs = [workload.arrays(seed) for seed in range(sets)]
    lists = pa.BlockMask.from_mask(workload.mask, workload.q_positions, workload.kv_positions, sizes)
    if not workload.backward:
        return Contender(
            lambda q, k, v, lists: kernels.forward(Call(q, k, v, lists), **options)[0],
            [(q, k, v, lists) for q, k, v, _ in inputs],
        )

    size = workload.size
    usual = tuning.default_block_sizes(
        size.q_len, size.kv_len, implementation="triton", head_dim=size.head_dim, dtype=size.dtype
    )
    before = pa.BlockMask.from_mask(workload.mask, workload.q_positions, workload.kv_positions, usual)

    def residuals(query, key, value, d_out):
        out, lse = kernels.forward(Call(query, key, value, before), **options)
        return lse, jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), -1).swapaxes(1, 2)

    def backward(query, key, value, d_out, lse, delta, lists):
        call = Call(query, key, value, lists)
        d_query, d_key, d_value, _ = kernels.backward(call, lse, delta, d_out, block_sizes=sizes, **options)
        return (d_query,) if entry.kernel == "d_query" else (d_key, d_value)  # XLA removes the other kernel

    keep = jax.jit(residuals)
    return Contender(backward, [(*one, *keep(*one), lists) for one in inputs])


def run(entry: Entry, watcher: Watcher, *, toy: bool) -> dict[str, Any]:
    """Compares every candidate with the entry of the table and times it; the result of a step."""
    workload = entry.workload(toy)
    sets = number_of_sets(workload, by_device=True, toy=toy)
    found: dict[str, Any] = {"case": entry.case, "in_table": text(entry.in_table), "candidates": {}}
    turns: dict[str, Callable[[], float]] = {}
    expected, wrong = None, []
    for name, sizes in entry.candidates.items():
        watcher.doing(name)
        try:
            ready = prepare(contender(entry, workload, sizes, sets=sets, interpret=toy), by_device=True)
        except Exception as error:  # the other candidates still run
            found["candidates"][name] = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
            continue
        expected = ready.returned if expected is None else expected
        if not _same(ready.returned, expected):
            wrong.append(name)
            found["candidates"][name] = {"wrong": True}
            continue
        turns[name] = ready.turn
        found["candidates"][name] = {"ms": summary([ready.turn()])}
        watcher.so_far(found)
    watcher.doing("timing")
    for name, seconds in take_turns(turns, rounds=1 if toy else _ROUNDS, budget=_SECONDS).items():
        found["candidates"][name] = {"ms": summary(seconds)}
    status = "wrong" if wrong else "ok" if turns else "failed"
    return {"status": status, "why": f"differs from the table's: {'; '.join(wrong)}" if wrong else None, "found": found}


def _same(got: Any, expected: Any) -> bool:
    """Whether two results differ by rounding alone; False for NaN."""

    def difference(a: jax.Array, b: jax.Array) -> float:
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        return float(jnp.linalg.norm((a - b).ravel()) / jnp.linalg.norm(b.ravel()))

    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)
    return all(difference(a, b) <= tolerances.BENCH_SAME_KERNEL for a, b in pairs)


def main(argv: list[str] | None = None) -> int:
    """Adds the best of a sweep to the list."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_day.block_sizes", description=__doc__)
    parser.add_argument("sweep", type=Path, help="written by python -m bench.static --sweep --out")
    rankings = json.loads(parser.parse_args(argv).sweep.read_text())["rankings"]
    listed = {(x["kernel"], x["head_dim"]): x for x in json.loads(LIST.read_text())} if LIST.exists() else {}
    for ranking in rankings:
        kernel = ranking["kernel"].removeprefix("pallas_attn_")
        if ranking["capability"] == 90 and ranking["itemsize"] == 2 and ranking["head_dim"] in _CASES.get(kernel, ()):
            best = [[*entries[0]["blocks"].values()] for entries in ranking["ranking"][:BEST]]
            key = (kernel, ranking["head_dim"])
            listed[key] = {"kernel": kernel, "head_dim": ranking["head_dim"], "best": best}
    LIST.write_text("[\n" + ",\n".join(" " + json.dumps(x) for x in listed.values()) + "\n]\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
