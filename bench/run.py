"""Times attention against its peers: ``python -m bench.run --suite cpu``.

Before anything is timed, results are compared; a case whose results differ prints no speed and fails the run.
"""

import argparse
import datetime
import json
import platform
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from rich.console import Console
from rich.table import Table

import pallas_attn as pa
from bench.cases import CPU_CASES, Case, Workload
from bench.timing import median_ratio, take_turns

# Largest accepted difference of float32 outputs of size about 1.
_TOLERANCE = 1e-5


def main(argv: list[str] | None = None) -> int:
    """Runs the suite; returns 0, or 1 if a result is wrong, or 2 for a wrong call."""
    names = [case.name for case in CPU_CASES]
    parser = argparse.ArgumentParser(prog="python -m bench.run", description=__doc__, allow_abbrev=False)
    parser.add_argument("--suite", choices=["cpu"], required=True)
    parser.add_argument("--case", choices=names, action="append", help="only this case; may be repeated")
    parser.add_argument("--rounds", type=int, default=30, help="rounds per case at most (default 30)")
    parser.add_argument("--budget", type=float, default=40.0, help="seconds per case (default 40)")
    parser.add_argument("--out", type=Path, help="also write the results as JSON")
    options = parser.parse_args(argv)

    console = Console(stderr=True)
    results = []
    for case in CPU_CASES:
        if options.case and case.name not in options.case:
            continue
        with console.status(f"{case.name}: {case.about}"):
            results.append(_measure(case, options.rounds, options.budget))
    Console(width=None if sys.stdout.isatty() else 120).print(_table(results))
    if options.out:
        options.out.write_text(json.dumps({"machine": _machine(), "results": results}, indent=2) + "\n")
    return 0 if all(result["correct"] for result in results) else 1


def _measure(case: Case, rounds: int, budget: float) -> dict:
    workload = case.build()
    ours = _ours(workload)
    peers: dict[str, Callable[[], Array]] = {"jax.nn": _jax_nn(workload)}
    error = _largest_difference(ours(), peers["jax.nn"](), workload)
    result = {"case": case.name, "about": case.about, "difference": error, "correct": error <= _TOLERANCE, "peers": {}}
    if not result["correct"]:
        return result
    if case.smaller is not None:
        smaller = _ours(case.smaller())
        # Our two buffers take turns with each other alone: a peer's hundreds of MB in between would empty the caches.
        times = take_turns({"ours": ours, "buffer of 2048": smaller}, rounds=4 * rounds, budget=budget / 4)
        result["peers"]["buffer of 2048"] = _compared(times, "buffer of 2048")
    times = take_turns({"ours": ours, **peers}, rounds=rounds, budget=budget)
    result["ms"] = _milliseconds(times["ours"])
    result["peers"] |= {name: _compared(times, name) for name in peers}
    for name, peer in result["peers"].items():
        peer["claim"] = case.claims[name]
    return result


def _ours(workload: Workload) -> Callable[[], Array]:
    @jax.jit
    def attend(query, key, value, q_positions, kv_positions):
        # The lists are built inside: their time is ours.
        return pa.attention(query, key, value, workload.mask, q_positions=q_positions, kv_positions=kv_positions)

    arguments = (workload.query, workload.key, workload.value, workload.q_positions, workload.kv_positions)
    return lambda: attend(*arguments)


def _jax_nn(workload: Workload) -> Callable[[], Array]:
    mask = workload.boolean_mask()
    # Its own causal flag is faster than an array, where it says the same.
    plain_causal = isinstance(workload.mask, pa.masks.Causal) and bool((workload.q_positions[:, 0] == 0).all())
    plain_causal = plain_causal and workload.q_positions.shape == workload.kv_positions.shape

    @jax.jit
    def attend(query, key, value, mask):
        if plain_causal:
            return jax.nn.dot_product_attention(query, key, value, is_causal=True)
        return jax.nn.dot_product_attention(query, key, value, mask=mask)

    return lambda: attend(workload.query, workload.key, workload.value, mask)


def _largest_difference(ours: Array, theirs: Array, workload: Workload) -> float:
    real = (workload.q_positions >= 0)[:, :, None, None]
    return float(jnp.max(jnp.where(real, jnp.abs(ours - theirs), 0.0)))


def _compared(times: dict[str, list[float]], name: str) -> dict:
    return {"ms": _milliseconds(times[name]), "ratio": median_ratio(times[name], times["ours"])}


def _milliseconds(times: list[float]) -> dict:
    low, middle, high = (1e3 * q for q in np.quantile(times, [0.25, 0.5, 0.75]))
    return {"median": middle, "quartiles": [low, high], "rounds": len(times)}


def _table(results: list[dict]) -> Table:
    table = Table("case", "ours, ms", "against", "theirs, ms", "ratio", "claim", title="median of rounds in turns")
    for result in results:
        if not result["correct"]:
            table.add_row(result["case"], f"WRONG by {result['difference']:.1e}", "", "", "", "")
            continue
        for name, peer in result["peers"].items():
            table.add_row(
                result["case"],
                f"{result['ms']['median']:.2f}",
                name,
                f"{peer['ms']['median']:.2f}",
                f"{peer['ratio']:.2f}",
                f"{'' if peer['ratio'] >= peer['claim'] else 'missed: '}{peer['claim']:.2f}",
            )
    return table


def _machine() -> dict:
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": jax.devices()[0].device_kind,
        "processor": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "pallas_attn": pa.__version__,
    }


if __name__ == "__main__":
    sys.exit(main())
