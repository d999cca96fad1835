"""The two calls of the GPU suite: which steps, in which order, and the seconds that they get."""

import functools
from collections.abc import Sequence

from rich.table import Table

from bench.gpu_day import block_sizes, decoding, efforts, estimates, smoke
from bench.gpu_day.steps import Block, Step
from bench.times.cases import named

PARTS = ("headlines", "rest")
CALL_SECONDS = 300.0
SMOKE_SECONDS = 60.0
# An estimate may be wrong by this factor before the step's process is ended; compiling may take a while.
_PATIENCE, _LEAST_LIMIT = 2.5, 20.0
_TOY_LIMIT = 600.0
_ENDING = 2.0  # for the tables, after the last step
_LAST_RESORT = "if time is left"


def blocks(part: str, *, toy: bool = False, only: Sequence[str] = ()) -> tuple[Block, ...]:
    """The blocks of a call.

    Args:
      part: one of :data:`PARTS`.
      toy: at toy sizes nothing is estimated or skipped.
      only: names of steps, or beginnings of names; empty: all of them.
    """
    made = _headlines(toy) if part == "headlines" else _rest(toy)
    if not only:
        return made
    names = {x.name for block in made for x in block.steps}
    beginnings = tuple(x for x in only if x not in names)

    def wanted_step(step: Step) -> bool:
        return step.kind == "peaks" or step.name in only or step.name.startswith(beginnings)

    chosen = [[x for x in block.steps if wanted_step(x)] for block in made]
    wanted = [Block(x.name, tuple(steps), x.seconds) for x, steps in zip(made, chosen, strict=True) if steps]
    return tuple(wanted) if any(x.kind != "peaks" for block in wanted for x in block.steps) else ()


def _step(name: str, toy: bool) -> Step:
    if toy:
        return Step(name, 0.0, _TOY_LIMIT)
    seconds = estimates.seconds(name)
    return Step(name, seconds, max(_LEAST_LIMIT, _PATIENCE * seconds))


def _headlines(toy: bool) -> tuple[Block, ...]:
    step = functools.partial(_step, toy=toy)
    checks = tuple(step(f"smoke/{check.name}") for check in smoke.CHECKS)
    return (
        Block("smoke test", checks, _TOY_LIMIT if toy else SMOKE_SECONDS),
        Block("headline cases", (step("peaks"), *(step(f"case/{name}") for name in efforts.HEADLINES))),
    )


def _rest(toy: bool) -> tuple[Block, ...]:
    step = functools.partial(_step, toy=toy)
    sweep = [step(f"sweep/{name}") for name in block_sizes.entries()]
    generators = [step(f"generator/{name}") for name in decoding.STORAGES]
    cases = [step(f"case/{name}") for name in efforts.others()]
    counters = step("counters")
    budget = CALL_SECONDS - estimates.START - estimates.PEAKS - counters.seconds - estimates.LEAST_TESTS
    budget -= _sum([*sweep, *generators])
    planned, later = [], []
    for x in cases:
        (planned if toy or _sum(planned) + x.seconds <= budget else later).append(x)
    left = estimates.LEAST_TESTS + budget - _sum(planned) - _ENDING
    tests = Step("tests", 0.0 if toy else left, _TOY_LIMIT if toy else left, open_ended=True)
    return (
        Block("block sizes", (step("peaks"), *sweep)),
        Block("decode steps", tuple(generators)),
        Block("other cases", tuple(planned)),
        Block("counters and tests", (counters, tests)),
        Block(_LAST_RESORT, tuple(later)),
    )


def _sum(steps: Sequence[Step]) -> float:
    return sum(step.seconds for step in steps)


def total(planned: Sequence[Block]) -> float:
    """Seconds of a call: its start, and every block but the last resort."""
    counted = [block for block in planned if block.name != _LAST_RESORT]
    return estimates.START + sum(min(_sum(block.steps), block.seconds) for block in counted)


def concerned(step: str) -> frozenset[str]:
    """The kernels that a step uses, as far as a broken check casts doubt on it."""
    kind, _, which = step.partition("/")
    if kind == "smoke":
        return next(check.kernels for check in smoke.CHECKS if check.name == which)
    if kind == "sweep":
        return frozenset({which.partition("-")[0]})
    of_kind = {
        "forward": {"forward"},
        "backward": {"forward", "d_query", "d_key_value"},
        "decode": {"decode", "merge"},
        "generation": {"forward", "decode", "merge"},
    }
    named_kind = named("gpu")[which].kind if kind == "case" else "generation" if kind == "generator" else ""
    return frozenset(of_kind.get(named_kind, ()))


def table(part: str) -> Table:
    """The plan of a call, with its seconds."""
    planned = blocks(part)
    out = Table(
        *("block", "step", "seconds", "at"),
        title=f"--part {part}: {total(planned):.0f} s of at most {CALL_SECONDS:.0f} s",
        title_justify="left",
        caption="seconds: CPU time of compiling in the rehearsal, and the physics of what runs",
    )
    at = estimates.START
    out.add_row("start", "", f"{estimates.START:.1f}", "0")
    for block in planned:
        begin = at
        for index, step in enumerate(block.steps):
            late = block.name == _LAST_RESORT
            out.add_row(block.name if index == 0 else "", step.name, f"{step.seconds:.1f}", "" if late else f"{at:.0f}")
            at = at if late else min(begin + block.seconds, at + step.seconds)
    return out
