"""Prints the machine-code tables of bench/README.md as Markdown: ``python -m bench.static_tables``.

A test compares them with the README.
"""

import argparse
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp

from bench import machine
from bench.machine_code import issue_rates, static
from bench.machine_code.compiled import DEVICE_KINDS
from pallas_attn import QuantizedArray

Kind = Literal["bfloat16", "int8", "int4"]
_STORED: dict[str, Kind] = {"decode": "bfloat16", "decode-int8": "int8", "decode-int4": "int4"}
_CAPABILITIES = (90, 80)


def tables(entries: list[dict]) -> Iterator[tuple[str, str]]:
    """The title and the text of each table."""
    for case, title in (("forward", "Forward"), ("d-query", "dQ"), ("d-key-value", "dK and dV")):
        yield title, _of_loops(entries, case)
    yield "Decode", _of_decode(entries)


def _of_loops(entries: list[dict], case: str) -> str:
    def cells(loop: dict, *, of_bound: bool) -> list[str]:
        share = static.matrix_share(loop)
        bound = [f"{loop['overlapped'] / loop['cycles']:.0%}"] if of_bound else []
        counts = [str(loop["instructions"]), str(loop["cycles"]), loop["bound"]]
        return [*counts, *bound, f"{share:.0%}" if share else "none"]

    rows = []
    for dtype in ("bfloat16", "float32"):
        for entry in _ordered(entries, case, dtype):
            sizes = entry["blocks"]
            blocks = f"{sizes['q']}x{sizes['kv']}, {sizes['num_warps']}, {sizes['num_stages']}"
            full, partial = entry["loops"]["full"], entry["loops"]["partial"]
            row = [dtype, blocks, *_resources(entry), *cells(full, of_bound=True), *cells(partial, of_bound=False)]
            rows.append(_named(entry) + row)
    blocks = ["dtype", "qxkv, warps, stages", "registers", "warps on SM"]
    of_full = ["full: instructions", "clocks", "bound", "bound / clocks", "matrix share"]
    return _markdown(["", "D", *blocks, *of_full, "partial: instructions", "clocks", "bound", "matrix share"], rows)


def _of_decode(entries: list[dict]) -> str:
    found: list[tuple[dict, Kind]] = [
        (x, kind) for case, kind in _STORED.items() for x in _ordered(entries, case, "bfloat16")
    ]
    rows = []
    for entry, kind in sorted(found, key=lambda x: (-x[0]["capability"], x[0]["head_dim"])):
        sizes, loop = entry["blocks"], entry["loops"]["full"]
        per_key = 2 * _stored_bytes(kind, entry["head_dim"])
        memory = per_key * sizes["kv"] * _clocks_per_byte(entry["capability"])
        blocks = f"{sizes['kv']}, {sizes['num_warps']}, {sizes['num_stages']}"
        counts = [str(per_key), str(loop["instructions"]), str(loop["cycles"]), loop["bound"], f"{memory:.0f}"]
        rows.append([*_named(entry), kind, blocks, *_resources(entry), *counts])
    blocks = ["keys", "kv, warps, stages", "registers", "warps on SM", "bytes per key"]
    return _markdown(["", "D", *blocks, "full: instructions", "clocks", "bound", "memory: clocks"], rows)


def _stored_bytes(kind: Kind, head_dim: int) -> int:
    """Bytes of a key (or value) of one head, scales included."""
    x = jax.ShapeDtypeStruct((head_dim,), jnp.bfloat16)
    if kind == "bfloat16":
        return x.size * x.dtype.itemsize
    return jax.eval_shape(functools.partial(QuantizedArray.quantize, kind=kind), x).nbytes


def _clocks_per_byte(capability: int) -> float:
    """Clocks per byte of a multiprocessor's share of the memory bandwidth, at the clock of the published peak."""
    processor, peaks = issue_rates.PROCESSORS[capability], machine.peaks_of(DEVICE_KINDS[capability])
    assert peaks is not None
    clock = peaks.tflops * 1e12 / (processor.multiprocessors * processor.multiply_adds * 2)
    return clock * processor.multiprocessors / (peaks.gbps * 1e9)


def _ordered(entries: list[dict], case: str, dtype: str) -> list[dict]:
    of_case = [x for x in entries if (x["case"], x["dtype"]) == (case, dtype)]
    return sorted(of_case, key=lambda x: (_CAPABILITIES.index(x["capability"]), x["head_dim"]))


def _named(entry: dict) -> list[str]:
    return [f"sm_{entry['capability']}", str(entry["head_dim"])]


def _resources(entry: dict) -> list[str]:
    return [str(entry["registers"]), str(entry["occupancy"]["warps"])]


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    first, *rest = ("| " + " | ".join(cells) + " |" for cells in (header, *rows))
    return "\n".join([first, "|---" * len(header) + "|", *rest])


def main(argv: list[str] | None = None) -> int:
    """Prints the tables of a report."""
    parser = argparse.ArgumentParser(prog="python -m bench.static_tables", description=__doc__, allow_abbrev=False)
    parser.add_argument("report", type=Path, nargs="?", default=static.BASELINE, help="default: results/static.json")
    options = parser.parse_args(argv)
    try:
        entries = json.loads(options.report.read_text())["entries"]
        text = "\n".join(f"{title}:\n\n{table}\n" for title, table in tables(entries))
    except (OSError, ValueError, KeyError) as error:
        parser.error(f"{options.report}: cannot be read as a report of bench.static: {error!r}")
    print(text)
    return 0
