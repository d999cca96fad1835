"""Times attention, masks, caches and generation against their peers.

``python -m bench.run --suite cpu``. Results are compared before anything is timed; a wrong result gets no time.
"""

import argparse
import dataclasses
import math
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import pallas_attn as pa
from bench import machine
from bench.machine import Peaks
from bench.results_file import ResultsError, ResultsFile
from bench.times import peaks
from bench.times.cases import SUITES, Case, named
from bench.times.measure import OURS, Effort, Setting, failed, free_memory, measure
from bench.times.peers import Peer, all_peers
from bench.times.physics import bound_seconds

_ROOT = Path(__file__).parents[1]
# No case starts after these; one that has started finishes.
_MINUTES = {"cpu": 14.0, "gpu": 7.5}
_EFFORT = {"cpu": Effort(), "gpu": Effort(rounds=7, seconds=2.0, prepare_seconds=12.0)}
_DTYPES = {"cpu": "float32", "gpu": "bfloat16"}
_TOY_EFFORT = Effort(rounds=1, seconds=0.0)
_TESTS_SECONDS = 180

_OK, _WRONG, _USAGE, _UNFINISHED = range(4)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a suite.

    Returns:
      0; 1 if a result is wrong, a case broke off or the GPU tests failed; 2 for wrong arguments or a suite that this
      machine cannot run; 3 if time ran out before the last case.
    """
    options = _parse(argv)
    # Leaves GPU memory to PyTorch. JAX reads this when it first looks for a GPU.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    console = Console(stderr=True)
    suites = SUITES if options.suite == "all" else (options.suite,)
    try:
        peers = _choose_peers(options.peers, all_peers(interpret=options.toy))
        _check_cases(options.case, options.suite)
        if options.list:
            _print_list(suites, options.case, peers)
            return _OK
        if "gpu" in suites and not options.toy and (reason := pa.implementations()["triton"]) is not None:
            raise UsageError(f"--suite gpu: {reason}; --toy runs it at toy sizes anywhere")
        described = machine.describe(options.revision)
        files = {suite: _results_file(options, suite, described) for suite in suites}
    except (UsageError, ResultsError) as error:
        console.print(f"python -m bench.run: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return _USAGE
    if options.out is not None and described["revision"] is None:
        console.print(machine.UNKNOWN_REVISION, style="red")
    codes = [_run_suite(suite, files[suite], peers, options, console) for suite in suites]
    return next((code for code in (_WRONG, _UNFINISHED) if code in codes), _OK)


class UsageError(Exception):
    """Wrong arguments, or a suite that this machine cannot run, with the reason."""


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.run", description=__doc__, allow_abbrev=False)
    parser.add_argument("--suite", choices=[*SUITES, "all"], required=True)
    parser.add_argument("--case", metavar="NAMES", action="append", help="only these, separated by commas; see --list")
    parser.add_argument("--peers", metavar="NAMES", help='only these, separated by commas, or "none"; see --list')
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the results as JSON, after each case")
    parser.add_argument("--resume", action="store_true", help="continue --out: skip the cases that it has")
    parser.add_argument("--minutes", type=_positive, help="start no case after these (default 14 for cpu, 7.5 for gpu)")
    parser.add_argument("--toy", action="store_true", help="rehearse with toy sizes and interpreted kernels")
    parser.add_argument("--even-if-tests-fail", action="store_true", help="suite gpu: continue if the GPU tests fail")
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


def _results_file(options: argparse.Namespace, suite: str, described: dict) -> ResultsFile:
    path = options.out
    if path is not None and options.suite == "all":
        path = path.with_stem(f"{path.stem}-{suite}")
    name = f"{suite}-toy" if options.toy else suite
    return ResultsFile(path, suite=name, machine=described, resume=options.resume)


def _run_suite(suite: str, file: ResultsFile, peers: dict[str, Peer], options, console: Console) -> int:
    """Runs the cases that are missing from the file, and prints the table."""
    start, minutes = time.perf_counter(), options.minutes or _MINUTES[suite]
    if suite == "gpu" and not _gpu_tests_pass(options.toy, console) and not options.even_if_tests_fail:
        console.print("The GPU tests must pass first; --even-if-tests-fail continues without that.", style="red")
        return _WRONG
    setting = Setting(
        suite,
        peers,
        _TOY_EFFORT if options.toy else _EFFORT[suite],
        options.toy,
        _measured_peaks(file, suite, options.toy),
    )
    cases, late = _chosen(suite, options.case), []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(suite, total=len(cases))
        for case in cases:
            progress.update(task, description=case.name)
            if file.has(case.name):
                pass
            elif time.perf_counter() - start > 60 * minutes:
                late.append(case.name)
            else:
                file.add(_measured(case, setting))
            progress.advance(task)
    out = Console(width=None if sys.stdout.isatty() else 160)
    out.print(table(file.results, machine.peaks() or setting.measured))
    _print_skipped(file.results, out)
    if late:
        out.print(f"After {minutes:g} minutes no time was left for: {', '.join(late)}. --resume continues.")
    # None: the case could not run, and gives the reason. That is not wrong.
    wrong = any(result["correct"] is False for result in file.results)
    return _WRONG if wrong else _UNFINISHED if late else _OK


def _measured_peaks(file: ResultsFile, suite: str, toy: bool) -> Peaks:
    """The peaks that the machine reaches now, in the dtype of the suite; also recorded in the file."""
    dtype, sizes = _DTYPES[suite], peaks.TOY if toy else peaks.SIZES[suite]
    found = peaks.measure(dtype, sizes, by_device=suite == "gpu")
    file.machine = file.machine | {
        "measured": {"dtype": dtype, **dataclasses.asdict(sizes), **dataclasses.asdict(found)}
    }
    return found


def _measured(case: Case, setting: Setting) -> dict:
    try:
        return measure(case, setting)
    except Exception as error:  # the other cases still run
        return failed(case, setting, error)
    finally:
        free_memory()


def _gpu_tests_pass(toy: bool, console: Console) -> bool:
    """Runs ``pytest -m gpu``; a rehearsal only collects the tests."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu and not slow", "-p", "no:cacheprovider"]
    console.print(f"{'Collecting' if toy else 'Running'} the GPU tests: {' '.join(command[1:])}", markup=False)
    try:
        done = subprocess.run(
            [*command, "--collect-only"] if toy else command,
            cwd=_ROOT,
            capture_output=True,
            text=True,
            timeout=_TESTS_SECONDS,
        )
    except subprocess.TimeoutExpired:
        console.print(f"The GPU tests did not finish within {_TESTS_SECONDS} s.", style="red")
        return False
    if done.returncode:
        console.print((done.stdout + done.stderr)[-4000:], markup=False, highlight=False)
    return done.returncode == 0


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
