"""Displays completions: as a table, as streamed text, or as JSON."""

import collections
import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pallas_attn_models.cli.output import printable
from pallas_attn_models.generation import GenerationStats, TopLogprobs


@dataclasses.dataclass(frozen=True)
class CompletionRow:
    """A prompt with its completion.

    Attributes:
      prompt, completion: text.
      right_answer: the expected completion, or None if unknown.
      finish_reason, tokens, logprobs, top_logprobs: see :class:`~pallas_attn_models.generation.Completion`.
    """

    prompt: str
    completion: str
    right_answer: str | None
    finish_reason: str
    tokens: list[int]
    logprobs: list[float]
    top_logprobs: list[TopLogprobs] = dataclasses.field(default_factory=list)


def table(completions: Sequence[CompletionRow]) -> Table:
    """A table with one row per completion."""
    known = any(one.right_answer is not None for one in completions)
    table = Table("prompt", "completion", *(["right answer"] if known else []), "ended by", show_lines=True)
    for one in completions:
        cells = [_shorten(printable(one.prompt)), printable(one.completion, keep="\n")]
        if known:
            cells.append(one.right_answer or "")
        # Text, not markup: a model may write "[bold]".
        table.add_row(*map(Text, [*cells, one.finish_reason]))
    return table


def print_table(completions: Sequence[CompletionRow]) -> None:
    """Prints :func:`table`."""
    Console(highlight=False).print(table(completions))


def to_json(model: Path, completions: Sequence[CompletionRow], stats: GenerationStats, *, with_top: bool) -> str:
    """One JSON object; ``with_top`` includes ``top_logprobs``. NaN and infinities become null."""
    rows = [dataclasses.asdict(one) for one in completions]
    if not with_top:
        for row in rows:
            del row["top_logprobs"]
    figures = {**dataclasses.asdict(stats), "tokens_per_second": stats.tokens_per_second}
    return json.dumps(_finite({"model": str(model), "completions": rows, "stats": figures}), allow_nan=False)


def _finite(value: Any) -> Any:
    """``value`` with null in place of NaN and infinities, which JSON cannot represent."""
    match value:
        case float():
            return value if math.isfinite(value) else None
        case dict():
            return {name: _finite(one) for name, one in value.items()}
        case list() | tuple():
            return [_finite(one) for one in value]
    return value


def figures(stats: GenerationStats) -> str:
    """A one-line summary of a run."""
    visited, total = stats.kv_blocks_visited, stats.kv_blocks_total
    figures = [
        f"prompt tokens {stats.prompt_tokens:,}",
        f"new tokens {stats.new_tokens:,}",
        f"tokens/s {stats.tokens_per_second:,.0f}",
        f"executables compiled {stats.executables}",
        f"KV blocks visited {visited:,} of {total:,} ({visited / max(total, 1):.1%})",
    ]
    if stats.drafted:
        share = stats.accepted / stats.drafted
        figures.append(f"draft tokens accepted {stats.accepted:,} of {stats.drafted:,} ({share:.1%})")
    return ", ".join(figures)


def _shorten(text: str) -> str:
    """A long prompt without its middle, so that a row of the table fits 80 columns."""
    if len(text) <= 36:
        return text
    return f"{text[:7]} .. {len(text)} characters .. {text[-7:]}"


def show_growing(events: Iterable[Any], completions: Callable[[], Sequence[CompletionRow]]) -> None:
    """Updates a table on the terminal as ``events`` arrive; ``completions`` returns its rows."""
    with Live(get_renderable=lambda: table(completions()), console=Console(highlight=False)):
        collections.deque(events, maxlen=0)


def print_in_turn(events: Iterable[tuple[int, str, bool]], headings: Sequence[str]) -> None:
    """Streams the completions one after the other; text of later ones waits.

    Args:
      events: index of the completion, its new text, and whether it is finished.
      headings: printed before each completion, unless there is only one.
    """
    waiting = [""] * len(headings)
    done = [False] * len(headings)
    current = 0
    _print(_heading(headings, 0))
    for index, text, last in events:
        waiting[index] += text
        done[index] = last
        while current < len(headings):
            _print(waiting[current])
            waiting[current] = ""
            if not done[current]:
                break
            current += 1
            _print("\n" + _heading(headings, current))


def _heading(headings: Sequence[str], index: int) -> str:
    if len(headings) == 1 or index == len(headings):
        return ""
    return ("\n" if index else "") + f"[{index + 1}] {headings[index]}\n"


def _print(text: str) -> None:
    if text:
        print(printable(text, keep="\n\t"), end="", flush=True)
