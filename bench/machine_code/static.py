"""Reports the machine code of every Triton kernel, without a GPU: ``python -m bench.static``.

Prints registers, spills, occupancy and the cost of the loops over full and partial blocks by published issue rates,
then the difference from the committed report. bench/README.md explains the columns and their limits.
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib.metadata
import importlib.util
import itertools
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import jax.numpy as jnp
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from bench import machine
from bench.machine_code import report, sweep, xla_gpu, xla_registers
from bench.machine_code.kernel_cases import CASES, DTYPES, KernelCase, Setting
from bench.machine_code.sweep import Candidate
from pallas_attn import BlockSizes

SCHEMA = 1
BASELINE = Path(__file__).parents[1] / "results" / "static.json"
_CAPABILITIES = (80, 90)
_HEAD_DIMS = (64, 128, 256)
_DEFAULT_DTYPES = ("bfloat16", "float32")  # float16 differs only in instruction names
_CASES = {case.name: case for case in CASES}
_COUNTED = ("matrix", "ex2", "async copy", "barrier", "stack")  # kinds whose changes are reported
_TABLE_KEY = ("kernel", "capability", "head_dim", "itemsize")  # identifies an entry of the tuning table


class _UsageError(Exception):
    """A request that the command cannot serve, with a message for the user."""


def main(argv: list[str] | None = None) -> int:
    """Prints the report. Returns 0; 1 if ``--check`` finds a problem; 2 for wrong arguments."""
    options = _options(argv)
    try:
        return _run(options)
    except (_UsageError, FileNotFoundError) as error:
        print(f"python -m bench.static: error: {error}", file=sys.stderr)
        return 2


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.static", description=__doc__, allow_abbrev=False)
    add = functools.partial(parser.add_argument, action="append")
    add("--capability", type=int, choices=_CAPABILITIES, help="ten times the compute capability; may be repeated")
    add("--head-dim", type=int, choices=_HEAD_DIMS, help="only this head size; may be repeated")
    add("--dtype", choices=DTYPES, help="only this dtype; may be repeated (default: not float16)")
    add("--kernel", choices=list(_CASES), help="only this case (kernel and mask); may be repeated")
    parser.add_argument("--out", type=Path, help="also write the report as JSON")
    parser.add_argument("--baseline", type=Path, help=f"report to compare with (default results/{BASELINE.name})")
    parser.add_argument("--jobs", type=int, default=2, help="number of processes (default 2)")
    parser.add_argument(
        "--xla", choices=("judged", "every"), default="judged", help="cases that XLA compiles, too (default judged)"
    )
    parser.add_argument("--resume", action="store_true", help="continue --out of a sweep: skip its entries")
    action = parser.add_mutually_exclusive_group()
    action.add_argument(
        "--check", action="store_true", help="exit 1 on spills, masked full blocks or lost instructions"
    )
    action.add_argument("--sweep", action="store_true", help="rank block sizes and compare them with the tuning table")
    options = parser.parse_args(argv)
    if options.jobs < 1:
        parser.error(f"argument --jobs: expected at least 1, got {options.jobs}")
    if options.resume and not (options.sweep and options.out):
        parser.error("argument --resume: expected --sweep and --out, the file to continue")
    return options


def _run(options: argparse.Namespace) -> int:
    if importlib.util.find_spec("triton") is None:
        raise _UsageError("PyPI's triton compiles the kernels and is not installed: pip install 'pallas-attn[bench]'")
    baseline = _read_baseline(options.baseline or BASELINE, required=options.baseline is not None)
    if options.out:
        _check_writable(options.out)
    console = Console(width=None if sys.stdout.isatty() else 180)
    if options.sweep:
        return _sweep(options, console)

    work = [(case.name, setting, options.xla) for case, setting in _defaults(options)]
    with _compilers(options.jobs, len(work)) as compiled:
        entries = compiled("compiling", _default_entry, work)
    document = {**_report_head("static"), "entries": entries}
    console.print(_resources_table(entries), _loops_table(entries))
    if reason := xla_gpu.missing():
        console.print(f"[yellow]registers by XLA: {reason}[/yellow]", highlight=False)
    for line in differences(baseline, document) if baseline else [f"no baseline at {BASELINE}"]:
        console.print(line, highlight=False)
    found = [f"{label(entry)}: {problem}" for entry in entries for problem in report.problems(entry)]
    for entry in entries:
        for line in report.spills(entry) + xla_registers.spills(entry):
            if (line := f"{label(entry)}: {line}") not in found:
                console.print(f"[yellow]{line}[/yellow]", highlight=False)
    for line in found:
        console.print(f"[red]{line}[/red]", highlight=False)
    if options.out:
        _write(options.out, _as_json(document, "entries"))
    return 1 if options.check and found else 0


def _settings(options: argparse.Namespace) -> list[tuple[KernelCase, int, int, str]]:
    return list(
        itertools.product(
            [_CASES[name] for name in options.kernel or _CASES],
            options.capability or _CAPABILITIES,
            options.head_dim or _HEAD_DIMS,
            options.dtype or _DEFAULT_DTYPES,
        )
    )


def _defaults(options: argparse.Namespace) -> list[tuple[KernelCase, Setting]]:
    return [
        (case, Setting(capability, head_dim, dtype, case.default_sizes(head_dim, dtype, capability)))
        for case, capability, head_dim, dtype in _settings(options)
    ]


def _default_entry(name: str, setting: Setting, by_xla: str) -> dict:
    """An entry of the report, which XLA compiles too."""
    case = _CASES[name]
    xla = xla_registers.entries(case, setting, every_case=by_xla == "every")
    return {**report.entry(case, setting), "xla": xla}


def _finalist(names: tuple[str, ...], setting: Setting) -> Candidate:
    """Compiles a candidate in some cases, first by PyPI's Triton, then by XLA, until one has a problem."""
    candidate = _candidate(names, setting)
    for name in () if candidate.reason else names:
        xla = xla_registers.entries(_CASES[name], setting)
        if xla and (found := xla_registers.problems({**candidate.entries[names.index(name)], "xla": xla})):
            return dataclasses.replace(candidate, reason=f"{name}: {'; '.join(found)}")
    return candidate


def _candidate(names: tuple[str, ...], setting: Setting, reason: str | None = None) -> Candidate:
    """Compiles a candidate in some cases until one has a problem; a ``reason`` rejects it without compiling."""
    if reason:
        return Candidate(setting, (), reason)
    entries = []
    for name in names:
        try:
            entries.append(report.entry(_CASES[name], setting))
        except (ImportError, FileNotFoundError):  # an installation problem, not the candidate's
            raise
        except Exception as error:  # any compiler error rejects the candidate only
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            return Candidate(setting, tuple(entries), f"{name}: {reason}")
        if found := report.problems(entries[-1]):
            return Candidate(setting, tuple(entries), f"{name}: {'; '.join(found)}")
    return Candidate(setting, tuple(entries), None)


@contextlib.contextmanager
def _compilers(jobs: int, total: int) -> Iterator[Callable[[str, Callable, list[tuple]], list]]:
    """Compiler processes with a progress bar of ``total`` steps.

    Yields ``compiled(about, function, work)``, which maps the function over the work, in order. Triton's cache makes a
    second run short.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    progress = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
    task = progress.add_task("", total=total)
    # JAX has threads, so processes are not forked.
    spawn = multiprocessing.get_context("spawn")
    pool = None if jobs == 1 else ProcessPoolExecutor(jobs, mp_context=spawn)

    def results(function: Callable, work: list[tuple]) -> Iterator:
        if pool is None:
            yield from itertools.starmap(function, work)
            return
        futures = [pool.submit(function, *piece) for piece in work]
        for future in futures:
            yield future.result()

    def compiled(about: str, function: Callable, work: list[tuple]) -> list:
        progress.update(task, description=about)
        with progress:  # cleared at the end, because results are printed in between
            found = []
            for result in results(function, work):
                found.append(result)
                progress.advance(task)
            return found

    try:
        yield compiled
    except BrokenProcessPool:
        raise _UsageError("a compiler crashed its process; --jobs 1 shows at which kernel") from None
    finally:
        if pool is not None:
            pool.shutdown(cancel_futures=True)  # a stopped run compiles nothing more


def _sweep(options: argparse.Namespace, console: Console) -> int:
    """Ranks candidates per entry of the tuning table; float16 and bfloat16 share entries."""
    if fixed := [name for name in options.kernel or () if _CASES[name].kernel not in sweep.HELD]:
        raise _UsageError(f"--sweep: {', '.join(fixed)} is not swept")
    document = {**_report_head("static sweep"), "rankings": _done_rankings(options)}
    done = [tuple(ranking[name] for name in _TABLE_KEY) for ranking in document["rankings"]]
    todo: dict[tuple, tuple[KernelCase, list[Setting], BlockSizes]] = {}
    for case, capability, head_dim, dtype in _settings(options):
        itemsize = jnp.dtype(dtype).itemsize
        key = (case.kernel, capability, head_dim, itemsize)
        if case.kernel in sweep.HELD and key not in done and key not in todo:
            current = case.default_sizes(head_dim, dtype, capability)
            choices = dict.fromkeys([*sweep.candidates(case.kernel, head_dim, itemsize), current])
            todo[key] = case, [Setting(capability, head_dim, dtype, sizes) for sizes in choices], current
    if done:
        console.print(f"{options.out} has {len(done)} entries; {len(todo)} are left", highlight=False, soft_wrap=True)
    total = sum(len(settings) + min(sweep.FINALISTS, len(settings)) for _, settings, _ in todo.values())
    with _compilers(options.jobs, total) as compiled:
        for key, (case, settings, current) in todo.items():
            ranking, order = _ranked_entry(key, case, settings, current, compiled)
            console.print(_ranking_table(f"{_about(key)}: {len(settings)} tried", order, current))
            document["rankings"].append(ranking)
            if options.out:
                _write(options.out, _as_json(document, "rankings"))
    return 0


def _ranked_entry(
    key: tuple,
    case: KernelCase,
    settings: list[Setting],
    current: BlockSizes,
    compiled: Callable[[str, Callable, list[tuple]], list],
) -> tuple[dict, list[Candidate]]:
    """The sweep report's entry, and its candidates, best first."""

    def hopeless(sizes: BlockSizes) -> str | None:
        # The table's entry is always compiled.
        return None if sizes == current else sweep.hopeless(sizes, tried)

    tried: list[Candidate] = []
    for wave in sweep.waves(settings):
        work = [((case.name,), x, hopeless(x.sizes)) for x in wave]
        tried += compiled(_about(key), _candidate, work)
    leaders = [x.setting for x in sweep.ranked(tried)]
    cases = tuple(x.name for x in _CASES.values() if x.kernel == case.kernel)
    finalists: list[Candidate] = []
    order: list[Candidate] = []
    while leaders and len(order) < sweep.FINALISTS:
        wanted = sweep.FINALISTS - len(order)
        finalists += compiled(_about(key) + ", the best", _finalist, [(cases, x) for x in leaders[:wanted]])
        leaders, order = leaders[wanted:], sweep.ranked(finalists)
    ranking = {
        **dict(zip(_TABLE_KEY, key, strict=True)),
        "ranking": [x.entries for x in order],
        "out": [{"blocks": str(x.setting.sizes), "reason": x.reason} for x in (*tried, *finalists) if x.reason],
    }
    return ranking, order


def _about(key: tuple) -> str:
    return "{}, sm_{}, D {}, {} bytes".format(*key)


def _done_rankings(options: argparse.Namespace) -> list[dict]:
    """The rankings that ``--resume`` finds in the file."""
    if not options.resume:
        return []
    try:
        found = json.loads(options.out.read_text())
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise _UsageError(f"--resume: {options.out}: cannot be read: {error}") from None
    for name, here in _report_head("static sweep").items():
        there = found.get(name) if isinstance(found, dict) else None
        if there != here:
            raise _UsageError(f"--resume: {options.out}: its {name} is {there}, here it is {here}")
    return found["rankings"]


def _ranking_table(title: str, order: list[Candidate], current: BlockSizes) -> Table:
    table = Table("q x kv, warps, stages", "full", "partial", "registers", "warps on SM", "bound", title=title)
    table.add_column("")
    for candidate in order:
        sizes = candidate.setting.sizes
        table.add_row(
            f"{sizes.q} x {sizes.kv}, {sizes.num_warps}, {sizes.num_stages}",
            f"{candidate.cycles_per_tile('full'):.0f}",
            f"{candidate.cycles_per_tile('partial'):.0f}",
            str(candidate.registers),
            str(candidate.warps),
            candidate.entries[0]["loops"]["full"]["bound"],
            "in the table" if sizes == current else "",
        )
    table.caption = "clocks per 64 x 64 pairs"
    if not any(x.setting.sizes == current for x in order):
        table.caption += f"; the entry of the table is not among the best: {current}"
    return table


def label(entry: dict) -> str:
    """The entry's name in messages."""
    return f"{entry['case']}, sm_{entry['capability']}, D {entry['head_dim']}, {entry['dtype']}"


def _resources_table(entries: list[dict]) -> Table:
    table = Table("kernel", "sm", "D", "dtype", "q x kv, warps, stages", title="resources")
    for name in ("registers", "stack bytes", "shared bytes", "blocks on SM", "warps on SM", "limited by"):
        table.add_column(name, justify="right")
    for entry in entries:
        resident = entry["occupancy"]
        numbers = (entry["registers"], entry["stack_bytes"], entry["shared_bytes"], resident["blocks"])
        table.add_row(*_key_cells(entry), *map(str, numbers), str(resident["warps"]), resident["limit"])
    return table


def _key_cells(entry: dict) -> list[str]:
    blocks = entry["blocks"]
    sizes = f"{blocks['q']} x {blocks['kv']}, {blocks['num_warps']}, {blocks['num_stages']}"
    return [entry["case"], str(entry["capability"]), str(entry["head_dim"]), entry["dtype"], sizes]


def _loops_table(entries: list[dict]) -> Table:
    table = Table(title="instructions per block and warp; clocks per block and multiprocessor, by issue rates alone")
    for name in ("kernel", "sm", "D", "dtype", "blocks"):
        table.add_column(name)
    for name in ("all", "matrix", "ex2", "fp32", "integer", "select", "mask", "copies", "barriers"):
        table.add_column(name, justify="right")
    for name in ("clocks", "bound", "matrix share"):
        table.add_column(name, justify="right")
    for entry in entries:
        for i, (name, loop) in enumerate(entry["loops"].items()):
            table.add_row(*(_key_cells(entry)[:4] if i == 0 else [""] * 4), name, *_loop_cells(loop))
    return table


def _loop_cells(loop: dict) -> list[str]:
    def count(*kinds: str) -> str:
        return str(sum(loop["kinds"].get(kind, 0) for kind in kinds))

    return [
        str(loop["instructions"]),
        count("matrix"),
        count("ex2"),
        count("fp32", "fp32 max"),
        count("integer", "multiply", "uniform"),
        count("select", "uniform select"),
        str(loop["mask"]),
        count("async copy"),
        count("barrier"),
        str(loop["cycles"]),
        loop["bound"],
        f"{matrix_share(loop):.0%}" if loop["multiply_adds"]["done"] else "none",
    ]


def matrix_share(loop: dict) -> float:
    """The minimum of clocks for the block's own matrix products, as a fraction of the estimate."""
    done, asked = loop["multiply_adds"]["done"], loop["multiply_adds"]["asked"]
    return loop["units"]["matrix"] * min(1.0, asked / done) / loop["cycles"] if done else 0.0


def differences(baseline: dict, report: dict) -> list[str]:
    """Changes since the baseline, a line per entry; entries that only the baseline has are ignored."""
    lines = [
        f"baseline made with {name} {baseline['versions'].get(name)}, this with {version}"
        for name, version in report["versions"].items()
        if baseline["versions"].get(name) != version
    ]
    before = {label(entry): entry for entry in baseline["entries"]}
    for entry in report["entries"]:
        if label(entry) not in before:
            lines.append(f"{label(entry)}: not in the baseline")
            continue
        old, new = _facts(before[label(entry)]), _facts(entry)
        # Without XLA's plugin a report lacks its figures.
        changed = [f"{k}: {old[k]} -> {new[k]}" for k in old if k in new and old[k] != new[k]]
        if changed:
            lines.append(f"{label(entry)}: {', '.join(changed)}")
    return lines or ["no difference from the baseline"]


def _facts(entry: dict) -> dict[str, object]:
    """The facts whose changes are reported, flat."""
    facts: dict[str, object] = {"blocks": "x".join(map(str, entry["blocks"].values()))}
    facts |= {name: entry[name] for name in ("registers", "stack_bytes", "shared_bytes")}
    facts["warps on SM"] = entry["occupancy"]["warps"]
    for xla in entry.get("xla", []):
        facts |= {f"XLA {name} at {xla['length']}": xla[name] for name in ("registers", "stack_bytes")}
    for name, loop in entry["loops"].items():
        facts |= {f"{name} {key}": loop[key] for key in ("instructions", "mask", "cycles", "bound")}
        facts |= {f"{name} {kind}": loop["kinds"].get(kind, 0) for kind in _COUNTED}
    return facts


def _read_baseline(path: Path, *, required: bool) -> dict | None:
    try:
        report = json.loads(path.read_text())
    except FileNotFoundError:
        if required:
            raise _UsageError(f"--baseline {path}: no such file") from None
        return None
    except (OSError, ValueError) as error:
        raise _UsageError(f"baseline {path}: cannot be read: {error}") from None
    schema, suite = (report.get("schema"), report.get("suite")) if isinstance(report, dict) else (None, None)
    if (schema, suite) != (SCHEMA, "static"):
        raise _UsageError(f"baseline {path}: expected schema {SCHEMA} of suite 'static', got {schema!r} of {suite!r}")
    return report


def _as_json(report: dict, rows: str) -> str:
    """The report with one line per entry of ``rows``, so that diffs are readable."""
    head = json.dumps({**report, rows: []}).removesuffix("]}")
    lines = ",\n".join(map(json.dumps, report[rows]))
    return f"{head}\n{lines}\n]}}\n"


def _write(path: Path, text: str) -> None:
    """Replaces the file atomically: a stopped run leaves no half of one."""
    scratch = path.with_name(f".{path.name}.part")
    try:
        scratch.write_text(text)
        os.replace(scratch, path)
    except OSError as error:
        raise _UsageError(f"--out {path}: cannot be written: {error.strerror}") from None


def _check_writable(path: Path) -> None:
    """Fails before the long work, not after it; keeps an existing file."""
    new = not path.exists()
    try:
        path.open("a").close()
    except OSError as error:
        raise _UsageError(f"--out {path}: cannot be written: {error.strerror}") from None
    if new:
        path.unlink()


def _report_head(suite: str) -> dict:
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "triton", "pallas-attn")}
    return {"schema": SCHEMA, "suite": suite, "revision": machine.commit(), "versions": versions}
