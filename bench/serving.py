"""Serving throughput of the Generator: ``python -m bench.serving --out serving.json``.

Each case runs our own Generator in two ways that must give the same tokens:

- *continuous batching*: a finished row goes to the next request at once, against batches that wait for their longest
  row. Requests have unequal lengths.
- *speculation*: drafts that are looked up in the prompt, where it contains the answer and where it does not.
- *streaming*: the cost of Python per token, streaming every step.
"""

import argparse
import dataclasses
import functools
import string
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from bench import machine
from bench.results_file import ResultsError, ResultsFile
from bench.times.measure import OURS
from bench.times.timing import Contender, median_ratio, prepare, summary, take_turns
from pallas_attn_models import Decoder, DecoderConfig, GenerationStats, Generator, Sampling, load_hf, weights
from pallas_attn_models.generation import PromptLookup
from pallas_attn_models.training import tasks

SEQUENTIAL = "sequential batches"
PLAIN = "without drafts"
LONG_INTERVAL = 64
INTERVALS = f"interval {LONG_INTERVAL}"
_OK, _WRONG, _USAGE = range(3)

_ROWS, _CAPACITY = 8, 768  # for the shipped checkpoint
AIM_MS = 1.0  # of Python, per step that is streamed
Tokens = list[list[int]]


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0; 1 if tokens differ; 2 for wrong arguments or a file that cannot be written."""
    parser = argparse.ArgumentParser(prog="python -m bench.serving", description=__doc__, allow_abbrev=False)
    parser.add_argument("--case", choices=list(CASES), action="append", help="run only this; may be repeated")
    parser.add_argument("--toy", action="store_true", help="rehearse with toy sizes")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the results as JSON, after each case")
    parser.add_argument("--revision", metavar="COMMIT", help="commit of a copy without .git, for --out")
    options = parser.parse_args(argv)
    console = Console(stderr=True)
    try:
        suite = "serving-toy" if options.toy else "serving"
        file = ResultsFile(options.out, suite=suite, machine=machine.describe(options.revision))
    except ResultsError as error:
        console.print(f"python -m bench.serving: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return _USAGE
    if options.out is not None and file.machine["revision"] is None:
        console.print(machine.UNKNOWN_REVISION, style="red")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        names = options.case or list(CASES)
        bar = progress.add_task("", total=len(names))
        for name in names:
            progress.update(bar, description=name)
            # TF32, JAX's default for float32 products on a GPU, could change tokens.
            with jax.default_matmul_precision("highest"):
                file.add(CASES[name](TOY if options.toy else FULL))
            progress.advance(bar)
    Console(width=None if sys.stdout.isatty() else 160).print(table(file.results))
    return _OK if all(result["correct"] for result in file.results) else _WRONG


def table(results: Sequence[dict[str, Any]]) -> Table:
    """One row per case."""
    title = "medians of interleaved runs; ratio: baseline time / our time"
    out = Table("case", "new tokens", "ours, tokens/s", "baseline", "its tokens/s", "ratio", "", title=title)
    for result in results:
        if not result["correct"]:
            out.add_row(result["case"], str(result["new_tokens"]), f"WRONG in {result['error']:.0f} rows")
            continue
        ((other, ratio),) = result["ratios"].items()
        ours, its = (f"{result['contenders'][name]['tokens_per_second']:.0f}" for name in (OURS, other))
        row = (result["case"], str(result["new_tokens"]), ours, other, its, f"{ratio:.2f}")
        out.add_row(*row, _finding(result))
    return out


def _finding(result: dict[str, Any]) -> str:
    if "least_steps" in result:
        steps = result["least_steps"]
        return f"batches take {steps[SEQUENTIAL] / steps[OURS]:.2f} times the minimum of steps"
    if "acceptance" in result:
        accepted = "no draft" if result["acceptance"] is None else f"{result['acceptance']:.0%} of drafts accepted"
        return f"{accepted}, {result['tokens_per_step']:.2f} tokens per step"
    kept = "kept" if result["overhead_ms"] <= AIM_MS else "missed"
    return f"{result['overhead_ms']:.2f} ms per streamed step (goal: {AIM_MS:g} ms, {kept})"


@dataclasses.dataclass(frozen=True)
class Scale:
    """Sizes of the cases.

    Attributes:
      rounds: turns of each contender.
      requests, batch: requests and rows of continuous batching.
      chat, documents: the longest prompt and continuation of two kinds of requests; the shortest have 8 and 4 tokens.
      model: the random model of continuous batching.
      prompts: prompts per task of speculation.
      streamed: new tokens per row of streaming.
    """

    rounds: int
    requests: int
    batch: int
    chat: tuple[int, int]
    documents: tuple[int, int]
    model: DecoderConfig
    prompts: int
    streamed: int


def _llama(layers: int, vocab_size: int) -> DecoderConfig:
    """As in the case ``generation`` of ``bench.run``, with fewer layers and tokens."""
    return DecoderConfig(
        vocab_size=vocab_size,
        hidden_size=512,
        intermediate_size=1365,
        num_layers=layers,
        num_heads=8,
        num_kv_heads=4,
        head_dim=64,
    )


FULL = Scale(3, 64, 8, (128, 512), (512, 256), _llama(4, 4096), prompts=32, streamed=256)
TOY = Scale(
    1, 6, 2, (12, 20), (40, 12), dataclasses.replace(_llama(1, 64), hidden_size=32, head_dim=8), prompts=3, streamed=12
)


# --- continuous batching ---


@dataclasses.dataclass(frozen=True)
class Requests:
    """Prompts and the sampling settings of each."""

    prompts: list[list[int]]
    samplings: list[Sampling]

    def batches(self, size: int) -> list["Requests"]:
        """Batches of ``size`` requests, in order."""
        starts = range(0, len(self.prompts), size)
        return [Requests(self.prompts[i : i + size], self.samplings[i : i + size]) for i in starts]

    @property
    def new_tokens(self) -> list[int]:
        """The budget of each request."""
        return [sampling.max_new_tokens for sampling in self.samplings]


def unequal_requests(scale: Scale, longest_prompt: int, most_new: int) -> Requests:
    """Prompt and continuation lengths are log-uniform and independent: most are short, a few are very long."""
    rng = np.random.default_rng(0)

    def lengths(least: int, most: int) -> np.ndarray:
        return np.exp(rng.uniform(np.log(least), np.log(most + 1), scale.requests)).astype(int)

    prompts = [rng.integers(scale.model.vocab_size, size=n).tolist() for n in lengths(8, longest_prompt)]
    return Requests(prompts, [Sampling(max_new_tokens=int(n)) for n in lengths(4, most_new)])


def continuous_batching(kind: str, scale: Scale) -> dict[str, Any]:
    """Submits all requests at once, and in batches; the minimum of steps follows from the requests."""
    longest_prompt, most_new = getattr(scale, kind)
    requests = unequal_requests(scale, longest_prompt, most_new)
    capacity = longest_prompt + most_new
    model = Decoder(scale.model, rngs=nnx.Rngs(0))
    generator = Generator(model, batch_size=scale.batch, capacity=capacity)

    def generate(*parts: Requests) -> Tokens:
        return [row for part in parts for row in generator.generate(part.prompts, part.samplings).tokens]

    batches = requests.batches(scale.batch)
    contenders = {OURS: lambda: generate(requests), SEQUENTIAL: lambda: generate(*batches)}
    shape = _shape(scale.batch, capacity, scale.model)
    about = f"{scale.requests} requests, prompts of 8-{longest_prompt}, 4-{most_new} new tokens, log-uniform"
    entry = _compared(f"batching-{kind}", about, shape, contenders, scale.rounds)
    new = requests.new_tokens
    least = max(-(-sum(new) // scale.batch), max(new))
    steps = {OURS: least, SEQUENTIAL: sum(max(batch.new_tokens) for batch in batches)}
    return entry | {"prompt_tokens": sum(map(len, requests.prompts)), "least_steps": steps}


# --- speculation ---


def _answers(task: str, **options: int) -> Callable[[int], Requests]:
    def requests(count: int) -> Requests:
        examples = tasks.held_out_prompts(task, count, seed=0, **options)
        sampling = Sampling(max_new_tokens=tasks.MAX_WORD + len(tasks.END))
        return Requests([tasks.encode(example.prompt) for example in examples], [sampling] * count)

    return requests


def _copies(count: int) -> Requests:
    """A repeated letter, continued by itself: the most that drafts from the prompt can gain."""
    letters = [ord(string.ascii_lowercase[i % 26]) for i in range(count)]
    sampling = Sampling(max_new_tokens=64, forbidden_tokens=(tasks.END_TOKEN,))
    return Requests([[letter] * 24 for letter in letters], [sampling] * count)


def _speculation(name: str, about: str, draw: Callable[[int], Requests]) -> Callable[[Scale], dict[str, Any]]:
    def measure(scale: Scale) -> dict[str, Any]:
        requests, lookup = draw(scale.prompts), PromptLookup()
        generators = {OURS: shipped_generator(lookup), PLAIN: shipped_generator()}
        stats: dict[str, GenerationStats] = {}

        def generate(contender: str) -> Tokens:
            result = generators[contender].generate(requests.prompts, requests.samplings)
            stats[contender] = result.stats
            return result.tokens

        contenders = {contender: lambda contender=contender: generate(contender) for contender in generators}
        shape = _shape(_ROWS, _CAPACITY, generators[OURS].model.config)
        entry = _compared(f"speculation-{name}", f"{about}; {lookup}", shape, contenders, scale.rounds)
        found = stats[OURS]
        return entry | {
            "acceptance": found.accepted / found.drafted if found.drafted else None,
            "tokens_per_step": (found.turns + found.accepted) / found.turns,
        }

    return measure


# --- streaming ---


def streaming(scale: Scale) -> dict[str, Any]:
    """The cost of returning to Python after every step instead of after many."""
    generator = shipped_generator()
    # No row ends early: all intervals take the same steps.
    sampling = Sampling(max_new_tokens=scale.streamed, forbidden_tokens=(tasks.END_TOKEN,))
    prompts = [tasks.encode(x.prompt) for x in tasks.held_out_prompts("reversal", _ROWS, seed=0)]

    def tokens(interval: int) -> Tokens:
        rows: Tokens = [[] for _ in prompts]
        for event in generator.stream(prompts, sampling, interval=interval):
            if event.token is not None:
                rows[event.row].append(event.token)
        return rows

    contenders = {OURS: lambda: tokens(1), INTERVALS: lambda: tokens(LONG_INTERVAL)}
    shape = _shape(_ROWS, _CAPACITY, generator.model.config)
    about = f"streaming every step, {scale.streamed} tokens per row"
    entry = _compared("streaming", about, shape, contenders, scale.rounds)
    once, seldom = (entry["contenders"][name]["ms"]["median"] for name in (OURS, INTERVALS))
    more_returns = scale.streamed - -(-scale.streamed // LONG_INTERVAL)
    return entry | {"overhead_ms": (once - seldom) / more_returns}


CASES: dict[str, Callable[[Scale], dict[str, Any]]] = {
    "batching-chat": functools.partial(continuous_batching, "chat"),
    "batching-documents": functools.partial(continuous_batching, "documents"),
    "speculation-recall": _speculation("recall", "recall from lists of 1 to 90 pairs", _answers("recall")),
    "speculation-reversal": _speculation("reversal", "reversed words", _answers("reversal")),
    "speculation-copy": _speculation("copy", "64 repetitions of the letter that the prompt repeats", _copies),
    "streaming": streaming,
}


# --- shared by all cases ---


@functools.cache
def shipped_generator(speculation: PromptLookup | None = None) -> Generator:
    """A Generator with the shipped checkpoint; cases share what it compiled."""
    checkpoint = weights.DIRECTORY
    model = load_hf(checkpoint, dtype=jnp.float32)
    return Generator(model, batch_size=_ROWS, capacity=_CAPACITY, speculation=speculation)


def _shape(rows: int, capacity: int, config: DecoderConfig) -> dict[str, int]:
    heads = {"N": config.num_heads, "K": config.num_kv_heads, "D": config.head_dim}
    return {"B": rows, "T": 1, "S": capacity, **heads}


def _compared(
    name: str, about: str, shape: dict[str, int], contenders: dict[str, Callable[[], Tokens]], rounds: int
) -> dict[str, Any]:
    """The result entry of two contenders, ours first; they are timed only if their tokens agree."""
    prepared = {
        contender: prepare(Contender(generate, [()], "host"), by_device=False)
        for contender, generate in contenders.items()
    }
    expected = prepared[OURS].returned
    (other,) = (contender for contender in contenders if contender != OURS)
    differing = sum(a != b for a, b in zip(expected, prepared[other].returned, strict=True))
    entry = {
        "case": name,
        "about": about,
        "kind": "generation",
        "shape": shape,
        "dtype": "float32",
        "active_fraction": None,
        "visited_fraction": None,
        "capacity": None,
        "flops": None,
        "bytes": None,
        "correct": differing == 0,
        "error": float(differing),
        "allowed_error": 0.0,
        "contenders": {},
        "ratios": {},
        "claims": {},
        "skipped": {},
        "new_tokens": sum(map(len, expected)),
    }
    if differing:
        return entry | {"contenders": {OURS: {"wrong": float(differing)}}}
    turns = {contender: one.turn for contender, one in prepared.items()}
    times = take_turns(turns, rounds=rounds, budget=0)
    for contender, seconds in times.items():
        rate = entry["new_tokens"] / float(np.median(seconds))
        entry["contenders"][contender] = {"ms": summary(seconds), "tokens_per_second": rate}
    return entry | {"ratios": {other: median_ratio(times[other], times[OURS])}}


if __name__ == "__main__":
    sys.exit(main())
