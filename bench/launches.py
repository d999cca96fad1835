"""Prints what the steps of a Generator launch on a GPU that may be absent: ``python -m bench.launches``."""

import argparse

from rich import box
from rich.console import Console
from rich.table import Table

from bench.machine_code import generator_steps, xla_gpu
from bench.machine_code.generator_steps import BATCH_SIZE, CAPACITY, STORAGES, StepGraph
from bench.machine_code.gpus import GPUS

# Names of columns, and what they show of a step.
_COLUMNS = {
    "launches": "launches",
    "copies": "copies",
    "pallas": "attention",
    "conds": "conditionals",
    "host loops": "host_loops",
}


def main(argv: list[str] | None = None) -> int:
    """Compiles decode and prefill for each storage and prints a table; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.launches", description=__doc__, allow_abbrev=False)
    parser.add_argument("--layers", type=int, default=4, metavar="N", help="of the decoder (default %(default)s)")
    parser.add_argument("--gpu", choices=GPUS, default="H100", help="default %(default)s")
    parser.add_argument(
        "--storages", nargs="+", choices=STORAGES, default=[*STORAGES], metavar="NAME", help="of caches"
    )
    parser.add_argument("--graph-loops", action="store_true", help="let CUDA graphs contain loops")
    options = parser.parse_args(argv)
    if options.layers < 1:
        parser.error(f"--layers: expected an int of at least 1, got {options.layers}")
    if reason := xla_gpu.missing():
        parser.error(reason)
    table = Table(
        *("storage", "step", *_COLUMNS, "of call", "temp", "alias", "caches"),
        title=f"{options.layers} layers, {BATCH_SIZE} rows of {CAPACITY} tokens, {options.gpu}",
        caption="Per step, with the cheapest branch of each conditional; host loops of the call; memory in MiB.",
        box=box.SIMPLE,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    console = Console()
    for name in options.storages:
        for which in ("decode", "prefill"):
            with console.status(f"compiling {which}, {name}"):
                generator = generator_steps.generator(STORAGES[name], options.layers, graph_loops=options.graph_loops)
                graph = generator_steps.compile_step(generator, which, gpu=options.gpu)
            table.add_row(name, which, *_cells(graph))
    console.print(table)
    return 0


def _cells(graph: StepGraph) -> list[str]:
    counts = [getattr(graph.step, name) for name in _COLUMNS.values()] + [graph.call.host_loops]
    sizes = graph.temporary_bytes, graph.aliased_bytes, graph.cache_bytes
    return [*map(str, counts), *(f"{size / 2**20:.1f}" for size in sizes)]


if __name__ == "__main__":
    raise SystemExit(main())
