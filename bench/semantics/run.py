"""Compares ``jax.nn`` and Flax with ``pallas_attn`` in their place, behavior by behavior.

``python -m bench.semantics``. Where both support a call, results must be equal up to rounding; intended differences
must be as documented; calls that we do not support must be rejected.
"""

import argparse
import sys
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import pallas_attn as pa
from bench.semantics import flax, flax_decode, jax_nn_cases
from bench.semantics.judge import Behavior, Row, judge

_SUITES: dict[str, Callable[[], list[Behavior]]] = {
    "jax.nn": jax_nn_cases.behaviors,
    "flax": lambda: [*flax.behaviors(), *flax_decode.behaviors()],
}

_OK, _WRONG, _USAGE = range(3)


def main(argv: Sequence[str] | None = None) -> int:
    """Compares all behaviors, or some.

    Returns:
      0; 1 if one of them fails; 2 for wrong arguments or an implementation that cannot run here.
    """
    options = _parse(argv)
    chosen = _chosen(options.only, options.match)
    reason = _unavailable(options.implementation, options.interpret)
    if not chosen:
        reason = f"--match: no behavior has {options.match!r} in its name"
    if reason is not None:
        console = Console(stderr=True)
        console.print(
            f"python -m bench.semantics: {reason}", style="red", markup=False, highlight=False, soft_wrap=True
        )
        return _USAGE
    given = {"implementation": options.implementation, "interpret": options.interpret}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    rows = []
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=len(chosen))
        for behavior in chosen:
            progress.update(task, description=behavior.name)
            rows.append(judge(behavior, given))
            progress.advance(task)
    out = Console(width=None if sys.stdout.isatty() else 160)
    out.print(table(rows))
    failed = [row.name for row in rows if not row.correct]
    out.print(f"{len(rows) - len(failed)} of {len(rows)} behaviors are right.", highlight=False)
    return _WRONG if failed else _OK


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.semantics", description=__doc__, allow_abbrev=False)
    parser.add_argument("--implementation", choices=list(pa.implementations()), help="default: the best available")
    parser.add_argument("--interpret", action="store_true", help="run the Triton kernels in Pallas' interpreter")
    parser.add_argument("--only", choices=list(_SUITES), help="only behaviors of this library")
    parser.add_argument("--match", metavar="TEXT", default="", help="only behaviors whose name contains this")
    return parser.parse_args(argv)


def _chosen(only: str | None, match: str) -> list[Behavior]:
    suites = [only] if only else list(_SUITES)
    named = [one._replace(name=f"{suite}: {one.name}") for suite in suites for one in _SUITES[suite]()]
    return [one for one in named if match in one.name]


def _unavailable(implementation: str | None, interpret: bool) -> str | None:
    """Why our implementation cannot run here with these options."""
    if interpret:
        is_other = implementation not in (None, "triton")
        return f"--interpret: expected --implementation triton, got {implementation}" if is_other else None
    reason = None if implementation is None else pa.implementations()[implementation]
    return None if reason is None else f"--implementation {implementation}: {reason}; --interpret runs it anywhere"


def table(rows: Sequence[Row]) -> Table:
    """One row per behavior: its array nearest to the limit."""
    title = "largest differences: ours from theirs; ours and theirs from float64; limit of ours"
    out = Table("behavior", "array", "from theirs", "ours", "theirs", "limit", "", title=title, title_justify="left")
    for row in rows:
        numbers = ("" if x != x else f"{x:.1e}" for x in (row.apart, row.error, row.their_error, row.limit))
        out.add_row(row.name, row.what, *numbers, "ok" if row.correct else f"WRONG: {row.note}")
    return out
