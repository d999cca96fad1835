"""Answers with a cache smaller than its context: ``python -m bench.cache_quality``.

The shipped checkpoint recalls values from lists of key-value pairs that are longer than the cache. Every policy and
storage answers the same held-out prompts, greedily, with caches of several sizes. The prompts are prefilled in chunks,
and the policy evicts what does not fit. The table and the picture show the fraction of answers that are right to the
last byte against the bytes of a row's caches.

A recall prompt names the key at its end. Until then all pairs of the list are equally likely to be queried, so no
policy can know which one to keep: with a fraction ``f`` of the list in the cache, ``f`` of the answers can be right.
"""

import argparse
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import pallas_attn as pa
from bench import machine
from bench.results_file import ResultsError, ResultsFile
from pallas_attn.picture import plain_style, save_figure
from pallas_attn_models import Decoder, Generator, load_hf, weights
from pallas_attn_models.training import tasks
from pallas_attn_models.training.train import exact_answers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MIN_PAIRS = 60
CHUNK = 16
SLOTS = (64, 128, 192, 256, 320, 384)
SINKS = 4
_MAX_LENGTH = 512
_ROWS = 25
_OK, _USAGE = 0, 2


@dataclasses.dataclass(frozen=True)
class Kind:
    """A policy, for any number of slots, and a storage.

    Attributes:
      name: its label in the table and the picture.
      policy: "dense", "window", "h2o", "h2o, by age" or "q-hitter"; its settings follow from the slots.
      first_layer: the policy of the first layer, if different.
    """

    name: str
    policy: str
    storage: pa.caches.Storage
    color: str
    style: str = "-"
    first_layer: pa.caches.Policy | None = None

    def policies(self, slots: int, layers: int) -> list[pa.caches.Policy]:
        """One policy per layer."""
        policy = {
            "dense": pa.caches.Dense(),
            "window": pa.caches.Window(max(1, slots - SINKS - CHUNK + 1), SINKS),
            "h2o": pa.caches.H2O(recent=slots // 4),
            "h2o, by age": pa.caches.H2O(recent=slots // 4, normalize=True, value_norm=True),
            "q-hitter": pa.caches.QHitter(recent=slots // 4),
        }[self.policy]
        first = [] if self.first_layer is None else [self.first_layer]
        return first + [policy] * (layers - len(first))


# Okabe and Ito's colors, safe for color-blind readers.
KINDS = (
    Kind("Dense", "dense", pa.caches.Plain(), "#000000"),
    Kind("Dense, int8", "dense", pa.caches.Int8(), "#000000", "--"),
    Kind("Dense, int4", "dense", pa.caches.Int4(32), "#000000", ":"),
    Kind("Window", "window", pa.caches.Plain(), "#e69f00"),
    Kind("Window, int8", "window", pa.caches.Int8(), "#e69f00", "--"),
    Kind("H2O", "h2o", pa.caches.Plain(), "#0072b2"),
    Kind("H2O, int8", "h2o", pa.caches.Int8(), "#0072b2", "--"),
    Kind("H2O by age and value", "h2o, by age", pa.caches.Plain(), "#56b4e9"),
    Kind("Q-Hitter, int8", "q-hitter", pa.caches.Int8(), "#009e73", "--"),
    Kind("Dense; first layer Window", "dense", pa.caches.Plain(), "#cc79a7", first_layer=pa.caches.Window(16)),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0; 2 for wrong arguments or a file that cannot be written."""
    parser = argparse.ArgumentParser(prog="python -m bench.cache_quality", description=__doc__, allow_abbrev=False)
    parser.add_argument("--prompts", type=int, default=100, help="default %(default)s")
    parser.add_argument("--slots", type=int, nargs="+", default=SLOTS, help="default %(default)s")
    parser.add_argument("--revision", metavar="COMMIT", help="commit of a copy without .git, for --out")
    parser.add_argument("--model", type=Path, metavar="DIR", help="default: the shipped checkpoint")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the results as JSON, and a picture next to it")
    options = parser.parse_args(argv)
    console = Console(stderr=True)
    try:
        for name, values in (("--prompts", [options.prompts]), ("--slots", options.slots)):
            least = 1 if name == "--prompts" else SINKS + CHUNK
            if min(values) < least:
                raise ValueError(f"{name}: expected at least {least}, got {min(values)}")
        file = ResultsFile(options.out, suite="cache-quality", machine=machine.describe(options.revision))
        shipped = weights.DIRECTORY
        model = load_hf(options.model or shipped, dtype=jnp.float32)
    except (ValueError, OSError, ResultsError) as error:
        text = f"python -m bench.cache_quality: {error}"
        console.print(text, style="red", markup=False, highlight=False, soft_wrap=True)
        return _USAGE
    for result in measure(model, options.slots, options.prompts, console):
        file.add(result)
    Console(width=None if sys.stdout.isatty() else 160).print(table(file.results))
    if options.out is not None:
        with plain_style():
            save_figure(draw(file.results), options.out.with_suffix(".png"))
    return _OK


def measure(model: Decoder, slots: Sequence[int], prompts: int, console: Console) -> Iterator[dict[str, Any]]:
    """Runs the same prompts with every kind and size. Yields a result entry for each."""
    examples = tasks.held_out_prompts("recall", prompts, seed=0, min_pairs=MIN_PAIRS)
    lengths = sorted(len(example.prompt) for example in examples)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        runs = [(kind, size) for kind in KINDS for size in ([_MAX_LENGTH] if kind.policy == "dense" else slots)]
        bar = progress.add_task("", total=len(runs))
        for kind, size in runs:
            progress.update(bar, description=f"{kind.name}, {size} slots")
            policies = kind.policies(size, model.config.num_layers)
            capacities = [CHUNK + policy.size if isinstance(policy, pa.caches.Window) else size for policy in policies]
            if kind.policy == "window":
                capacities = [size] * len(policies)
            generator = Generator(
                model,
                batch_size=_ROWS,
                capacity=capacities,
                prefill_chunk=CHUNK,
                policy=policies,
                storage=kind.storage,
                max_length=_MAX_LENGTH,
            )
            accuracy = exact_answers(generator, examples)
            yield {
                "case": f"{kind.name}, {size} slots",
                "about": f"recall, {prompts} prompts of {lengths[0]} to {lengths[-1]} tokens in chunks of {CHUNK}",
                "kind": kind.name,
                "policies": [str(policy) for policy in policies],
                "storage": str(kind.storage),
                "slots": size,
                "bytes_per_row": generator.cache_nbytes // _ROWS,
                "accuracy": accuracy,
                "prompt_tokens": {"min": lengths[0], "median": lengths[len(lengths) // 2], "max": lengths[-1]},
            }
            progress.advance(bar)


def table(results: Sequence[dict[str, Any]]) -> Table:
    """One row per kind and size."""
    out = Table("cache", "slots", "bytes per row", "exact answers", title=results[0]["about"], title_justify="left")
    for result in results:
        row = (result["kind"], str(result["slots"]), f"{result['bytes_per_row']:,}", f"{result['accuracy']:.0%}")
        out.add_row(*row)
    return out


def draw(results: Sequence[dict[str, Any]]) -> "Figure":
    """Draws accuracy against memory: a line per kind, or a point if it has one size."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.4), facecolor="white", layout="constrained")
    axes = figure.subplots()
    for kind in KINDS:
        of_kind = [result for result in results if result["kind"] == kind.name]
        points = sorted((result["bytes_per_row"] / 2**10, 100 * result["accuracy"]) for result in of_kind)
        marker = "o" if len(points) > 1 else "D"
        axes.plot(*zip(*points, strict=True), kind.style, color=kind.color, marker=marker, label=kind.name)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("KiB of a row's caches, all layers")
    axes.set_ylabel("exact answers, %")
    axes.set_ylim(-3, 103)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", frameon=False)
    figure.suptitle("Recall from lists that are longer than the cache", x=0.02, ha="left", fontweight="bold")
    return figure


if __name__ == "__main__":
    sys.exit(main())
