"""Times attention, masks, caches and generation against their peers.

``python -m bench.run --suite cpu``. Results are compared before anything is timed; a wrong result gets no time.
Suite gpu is two calls of at most five minutes (:mod:`bench.gpu_day`); --plan and --rehearse need no GPU.
"""

import argparse
import dataclasses
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import pallas_attn as pa
from bench import machine
from bench.gpu_day import command, plan
from bench.gpu_day.steps import BROKEN
from bench.gpu_day.worker import Options
from bench.machine import Peaks
from bench.results_file import ResultsError, ResultsFile
from bench.times import peaks
from bench.times.cases import SUITES, Case, named
from bench.times.measure import OURS, Effort, Setting, failed, free_memory, measure
from bench.times.peers import Peer, all_peers
from bench.times.physics import bound_seconds

# No case of suite cpu starts after these; one that has started finishes.
_CPU_MINUTES = 14.0
_DTYPE = "float32"  # of the peaks of suite cpu
_TOY_EFFORT = Effort(rounds=1, seconds=0.0)

_OK, _WRONG, _USAGE, _UNFINISHED = range(4)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a suite.

    Returns:
      0; 1 if a result is wrong, or a case, step or rehearsed program broke off; 2 for wrong arguments or a suite that
      this machine cannot run; 3 if time ran out before the last case.
    """
    options = _parse(argv)
    gpu = options.suite in ("gpu", "all")
    console = Console(stderr=True)
    suites = SUITES if options.suite == "all" else (options.suite,)
    try:
        peers = _choose_peers(options.peers, all_peers(interpret=options.toy))
        _check_cases(options.case, options.suite)
        if options.list:
            _print_list(suites, options.case, peers)
            return _OK
        if not gpu and (options.part or options.only or options.plan or options.rehearse):
            raise UsageError("--part, --only, --plan, --rehearse: expected --suite gpu with them, got --suite cpu")
        if options.plan:
            command.print_plan(_parts(options), _output())
            return _OK
        if options.rehearse:
            return _OK if command.rehearse(_split(options.only), _output()) else _WRONG
        run = {"cpu": _run_cpu, "gpu": _run_gpu}
        # First the GPU's, which may be missing.
        codes = [run[suite](peers, options, console) for suite in sorted(suites, reverse=True)]
    except (UsageError, ResultsError, command.Unavailable) as error:
        console.print(f"python -m bench.run: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return _USAGE
    return next((code for code in (_WRONG, _UNFINISHED) if code in codes), _OK)


def _output() -> Console:
    return Console(width=None if sys.stdout.isatty() else 160)


class UsageError(Exception):
    """Wrong arguments, or a suite that this machine cannot run, with the reason."""


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.run", description=__doc__, allow_abbrev=False)
    parser.add_argument("--suite", choices=[*SUITES, "all"], required=True)
    parser.add_argument("--case", metavar="NAMES", action="append", help="only these, separated by commas; see --list")
    parser.add_argument("--peers", metavar="NAMES", help='only these, separated by commas, or "none"; see --list')
    parser.add_argument(
        "--out", type=Path, metavar="PATH", help="a file or folder for the results, kept after each case"
    )
    parser.add_argument("--resume", action="store_true", help="continue --out: skip the cases and steps that it has")
    parser.add_argument("--minutes", type=_positive, help="cpu: start no case after these (14); gpu: of each call (5)")
    parser.add_argument("--toy", action="store_true", help="toy sizes and interpreted kernels, anywhere")
    parser.add_argument(
        "--part", choices=plan.PARTS, help="suite gpu: one of its two calls; default: one after the other"
    )
    parser.add_argument("--only", metavar="STEPS", action="append", help="suite gpu: steps that begin so; see --plan")
    parser.add_argument("--plan", action="store_true", help="suite gpu: show the steps and their estimated seconds")
    parser.add_argument("--rehearse", action="store_true", help="suite gpu: compile all of it for an H200, without one")
    parser.add_argument("--revision", metavar="COMMIT", help="commit of a copy without .git, for --out")
    parser.add_argument("--list", action="store_true", help="show cases and peers, and why some cannot run here")
    return parser.parse_args(argv)


def _positive(text: str) -> float:
    number = float(text)
    if not number > 0 or not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text}")
    return number


def _choose_peers(names: str | None, known: dict[str, Peer]) -> dict[str, Peer]:
    if names is None or names == "none":
        return {} if names else known
    wanted = names.split(",")
    if unknown := [name for name in wanted if name not in known]:
        raise UsageError(f"--peers: expected some of {', '.join(known)}, or none; got {', '.join(unknown)}")
    return {name: known[name] for name in known if name in wanted}


def _check_cases(wanted: list[str] | None, suite: str) -> None:
    known = named(suite)
    if unknown := [name for name in _split(wanted) if name not in known]:
        raise UsageError(f"--case: suite {suite} has {', '.join(known)}; got {', '.join(unknown)}")


def _split(wanted: list[str] | None) -> list[str]:
    return [name for names in wanted or [] for name in names.split(",")]


def _chosen(suite: str, wanted: list[str] | None) -> list[Case]:
    names = _split(wanted)
    return [case for case in named(suite).values() if not names or case.name in names]


def _path(options: argparse.Namespace, suite: str) -> Path | None:
    """Where the results of a suite go."""
    path = options.out
    if path is None:
        return None
    part = f"-{options.part}" if suite == "gpu" and options.part else ""
    if path.is_dir():
        return path / f"{suite}{part}.json"
    return path.with_stem(f"{path.stem}-{suite}") if options.suite == "all" else path


def _check_revision(file: ResultsFile, console: Console) -> None:
    if file.path is not None and file.machine["revision"] is None:
        console.print(machine.UNKNOWN_REVISION, style="red")


def _parts(options: argparse.Namespace) -> Sequence[str]:
    return (options.part,) if options.part else plan.PARTS


def _run_gpu(peers: dict[str, Peer], options: argparse.Namespace, console: Console) -> int:
    """Runs one call of suite gpu, or both, in processes of their own, and prints the tables."""
    only = [*_split(options.only), *(f"case/{case.name}" for case in _chosen("gpu", options.case) if options.case)]
    planned = [plan.blocks(part, toy=options.toy, only=only) for part in _parts(options)]
    if not any(planned):
        raise UsageError(f"--only: expected beginnings of steps that --plan shows, got {', '.join(only)}")
    minutes = options.minutes or (math.inf if options.toy else plan.CALL_SECONDS / 60)
    file = command.run(
        [blocks for blocks in planned if blocks],
        Options(options.toy, tuple(peers), revision=options.revision),
        peers=(*peers,),
        path=_path(options, "gpu"),
        resume=options.resume,
        seconds=60 * minutes,
        console=console,
    )
    _check_revision(file, console)
    out, published = _output(), machine.peaks_of(file.machine["device"])
    out.print(table(file.results, published or Peaks.measured(file.machine["measured"])))
    _print_skipped(file.results, out)
    if (found := command.found_table(file)) is not None:
        out.print(found)
    for text in command.summary(file):
        out.print(text, markup=False, highlight=False, soft_wrap=True)
    statuses = {step["status"] for step in file.steps}
    return _WRONG if statuses & {*BROKEN} else _UNFINISHED if "late" in statuses else _OK


def _run_cpu(peers: dict[str, Peer], options: argparse.Namespace, console: Console) -> int:
    """Runs the cases of suite cpu that are missing from the file, and prints the table."""
    name = "cpu-toy" if options.toy else "cpu"
    file = ResultsFile(
        _path(options, "cpu"), suite=name, machine=machine.describe(options.revision), resume=options.resume
    )
    _check_revision(file, console)
    start, minutes = time.perf_counter(), options.minutes or _CPU_MINUTES
    effort = _TOY_EFFORT if options.toy else Effort()
    setting = Setting("cpu", peers, effort, options.toy, _measured_peaks(file, options.toy))
    cases, late = _chosen("cpu", options.case), []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("cpu", total=len(cases))
        for case in cases:
            progress.update(task, description=case.name)
            if file.has(case.name):
                pass
            elif time.perf_counter() - start > 60 * minutes:
                late.append(case.name)
            else:
                file.add(_measured(case, setting))
            progress.advance(task)
    out = _output()
    out.print(table(file.results, machine.peaks() or setting.measured))
    _print_skipped(file.results, out)
    if late:
        out.print(f"After {minutes:g} minutes no time was left for: {', '.join(late)}. --resume continues.")
    # None: the case could not run, and gives the reason. That is not wrong.
    wrong = any(result["correct"] is False for result in file.results)
    return _WRONG if wrong else _UNFINISHED if late else _OK


def _measured_peaks(file: ResultsFile, toy: bool) -> Peaks:
    """The peaks that the machine reaches now; also recorded in the file."""
    sizes = peaks.TOY if toy else peaks.SIZES["cpu"]
    found = peaks.measure(_DTYPE, sizes, by_device=False)
    file.machine = file.machine | {
        "measured": {"dtype": _DTYPE, **dataclasses.asdict(sizes), **dataclasses.asdict(found)}
    }
    return found


def _measured(case: Case, setting: Setting) -> dict:
    try:
        return measure(case, setting)
    except Exception as error:  # the other cases still run
        return failed(case, setting, error)
    finally:
        free_memory()


def table(results: list[dict], peaks: Peaks | None) -> Table:
    """One row per case: our time and rate, fractions of the bound and of a copy, and peer time / our time."""
    names = list(dict.fromkeys(name for result in results for name in (*result["ratios"], *_wrong_peers(result))))
    columns = ("case", "active", "ours, ms", "rate", "of bound", "of copy", *names, "claims")
    out = Table(*columns, title="medians of interleaved runs; peers: peer time / our time", title_justify="left")
    for result in results:
        mine = result["contenders"].get(OURS, {})
        if "ms" not in mine:
            out.add_row(result["case"], "", _without_time(result), *[""] * (len(columns) - 3))
            continue
        active = "" if result["active_fraction"] is None else f"{100 * result['active_fraction']:.1f} %"
        cells = [f"{result['ratios'][n]:.2f}" if n in result["ratios"] else _wrong(result, n) for n in names]
        milliseconds = mine["ms"]["median"]
        share = _share_of_bound(result, milliseconds, peaks)
        copy = "" if mine["of_copy"] is None else f"{100 * mine['of_copy']:.0f} %"
        out.add_row(result["case"], active, f"{milliseconds:.3g}", _rate(result), share, copy, *cells, _claims(result))
    return out


def _wrong_peers(result: dict) -> list[str]:
    return [name for name, one in result["contenders"].items() if "wrong" in one and name != OURS]


def _wrong(result: dict, name: str) -> str:
    return "WRONG" if name in _wrong_peers(result) else ""


def _without_time(result: dict) -> str:
    if "wrong" in result["contenders"].get(OURS, {}):
        return f"WRONG by {result['error']:.1e}, allowed {result['allowed_error']:.1e}"
    return "FAILED" if result["correct"] is False else "skipped"


def _rate(result: dict) -> str:
    mine = result["contenders"][OURS]
    if mine["tokens_per_second"]:
        return f"{mine['tokens_per_second']:.0f} tokens/s"
    if mine["tflops"] and result["kind"] != "decode":
        return f"{mine['tflops']:.3g} TFLOP/s"
    return f"{mine['gbps']:.3g} GB/s" if mine["gbps"] else ""


def _share_of_bound(result: dict, milliseconds: float, peaks: Peaks | None) -> str:
    if peaks is None or not (result["flops"] or result["bytes"]):
        return ""
    return f"{100 * 1e3 * bound_seconds(result['flops'], result['bytes'], peaks) / milliseconds:.0f} %"


def _claims(result: dict) -> str:
    """Every claim whose peer was timed, and whether it holds."""
    tested = {name: claim for name, claim in result["claims"].items() if name in result["ratios"]}
    missed = [f"missed: {name} {claim:.2f}" for name, claim in tested.items() if result["ratios"][name] < claim]
    return ", ".join(missed) or ("kept" if tested else "")


def _print_skipped(results: list[dict], out: Console) -> None:
    """Prints each reason once, with the cases to which it applies."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for result in results:
        for name, reason in result["skipped"].items():
            reasons.setdefault((name, reason), []).append(result["case"])
    for (name, reason), cases in reasons.items():
        which = ", ".join(cases) if len(cases) <= 3 else f"{len(cases)} cases"
        out.print(f"skipped: {name}, {which}: {reason}", markup=False, highlight=False, soft_wrap=True)


def _print_list(suites: Sequence[str], wanted: list[str] | None, peers: dict[str, Peer]) -> None:
    out = Console(width=None if sys.stdout.isatty() else 160)
    cases = Table("case", "kind", "about", "suites and sizes")
    for case in {case.name: case for suite in suites for case in _chosen(suite, wanted)}.values():
        sizes = "\n".join(f"{suite}: {case.sizes[suite]}" for suite in suites if suite in case.sizes)
        cases.add_row(case.name, case.kind, case.about.replace("{S}", "S"), sizes)
    out.print(cases)
    found = Table("peer", "here")
    for name, peer in peers.items():
        found.add_row(name, peer.unavailable() or "runs")
    out.print(found)
    implementations = Table("our implementation", "here")
    for name, reason in pa.implementations().items():
        implementations.add_row(name, reason or "runs")
    out.print(implementations)


if __name__ == "__main__":
    sys.exit(main())
