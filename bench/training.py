"""Trains the model of the shipped checkpoint twice, alternating step by step: ``python -m bench.training``.

One run uses the default attention, the other the reference, with the same seed and batches. The losses must agree at
every step. That holds only for a short training, because rounding errors grow: in the full curriculum to 1e-3 within
140 steps, as they do between two runs of the reference whose weights differ in the last bit.

Rows are packed documents, so the lists name only some of the blocks. The claim of a phase is the speed-up of a step if
attention took the visited fraction of the reference's time and nothing else changed.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from flax import nnx
from jax import Array
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import pallas_attn as pa
from bench import machine
from bench.results_file import ResultsError, ResultsFile
from bench.times.measure import OURS
from bench.times.timing import median_ratio, summary
from pallas_attn.picture import plain_style, save_figure
from pallas_attn_models import Decoder
from pallas_attn_models.training import Batch, train
from tests import tolerances

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REFERENCE = "reference"
_IMPLEMENTATIONS = {OURS: None, REFERENCE: REFERENCE}
_STEPS = 100
_COLORS = {OURS: "#0072b2", REFERENCE: "#e69f00"}  # Okabe and Ito's, safe for color-blind readers
_OK, _WRONG, _USAGE = range(3)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0; 1 if the losses disagree; 2 for wrong arguments or a file that cannot be written."""
    parser = argparse.ArgumentParser(prog="python -m bench.training", description=__doc__, allow_abbrev=False)
    total = sum(phase.steps for phase in train.PHASES)
    parser.add_argument("--steps", type=int, default=_STEPS, help=f"default %(default)s; the checkpoint took {total}")
    parser.add_argument("--seed", type=int, default=0, help="default %(default)s")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="write the results as JSON, and a picture of the losses next to it"
    )
    parser.add_argument("--revision", metavar="COMMIT", help="commit of a copy without .git, for --out")
    options = parser.parse_args(argv)
    console = Console(stderr=True)
    try:
        phases = train.scaled(train.PHASES, options.steps)
        if min(phase.steps for phase in phases) < 2:
            raise ValueError(f"--steps: expected at least two for each phase, got {options.steps}")
        file = ResultsFile(options.out, suite="training", machine=machine.describe(options.revision))
    except (ValueError, ResultsError) as error:
        console.print(f"python -m bench.training: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return _USAGE
    if options.out is not None and file.machine["revision"] is None:
        console.print(machine.UNKNOWN_REVISION, style="red")
    for result in compare(phases, options.seed, console):
        file.add(result)
    Console(width=None if sys.stdout.isatty() else 160).print(table(file.results))
    if options.out is not None:
        with plain_style():
            save_figure(draw(file.results), options.out.with_suffix(".png"))
    return _OK if all(result["correct"] for result in file.results) else _WRONG


class _Run:
    """One of the two training runs."""

    def __init__(self, phases: Sequence[train.Phase], seed: int, implementation: str | None) -> None:
        self.model = train.new_model(seed, implementation)
        optimizer = train.optimizer(sum(phase.steps for phase in phases))
        self._optimizer = nnx.Optimizer(self.model, optimizer, wrt=nnx.Param)

    def step(self, batch: Batch) -> tuple[float, float]:
        """Trains on a batch; returns the loss before the update, and the seconds of the step."""
        start = time.perf_counter()
        loss = float(train.train_step(self.model, self._optimizer, batch)[0])
        return loss, time.perf_counter() - start


def compare(phases: Sequence[train.Phase], seed: int, console: Console) -> Iterator[dict[str, Any]]:
    """Trains with both. Yields a result entry for each phase."""
    runs = {name: _Run(phases, seed, implementation) for name, implementation in _IMPLEMENTATIONS.items()}
    layers = {name: _layer(implementation) for name, implementation in _IMPLEMENTATIONS.items()}
    batches = train.batches(phases, seed)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=sum(phase.steps for phase in phases))
        for phase in phases:
            progress.update(bar, description=f"{phase.rows} x {phase.length}")
            losses, steps, attention = ({name: [] for name in runs} for _ in range(3))
            fractions = []
            arrays = _arrays(phase)
            for batch in itertools.islice(batches, phase.steps):
                for name, run in runs.items():
                    loss, seconds = run.step(batch)
                    losses[name].append(loss)
                    steps[name].append(seconds)
                block_mask, active = _block_mask(runs[OURS].model, batch)
                fractions.append((float(active), float(block_mask.density())))
                for name, layer in layers.items():
                    attention[name].append(_seconds(layer, *arrays, block_mask))
                progress.advance(bar)
            steps = {name: seconds[1:] for name, seconds in steps.items()}  # the first compiles
            active, visited = map(float, np.mean(fractions, axis=0))
            yield _entry(phase, losses, steps, attention, active, visited)


@nnx.jit
def _block_mask(model: Decoder, batch: Batch) -> tuple[pa.BlockMask, Array]:
    """The lists that all layers share, and the fraction of pairs that may attend. XLA drops the rest of the model."""
    block_mask = model(batch.tokens, batch.positions, segment_ids=batch.segment_ids, apply_head=False).block_masks[0]
    allowed = block_mask.mask.dense_array(block_mask.q_positions, block_mask.kv_positions)
    return block_mask, allowed.mean()


def _layer(implementation: str | None) -> Callable[..., tuple[Array, ...]]:
    """The gradients of one layer's attention, as a jitted function."""

    @jax.jit
    def gradients(query: Array, key: Array, value: Array, d_out: Array, block_mask: pa.BlockMask) -> tuple[Array, ...]:
        def attend(query, key, value):
            return pa.attention(query, key, value, block_mask, implementation=implementation)

        return jax.vjp(attend, query, key, value)[1](d_out)

    return gradients


def _arrays(phase: train.Phase) -> list[Array]:
    """Random query, key, value and output gradient, shaped as in a layer."""
    config = train.CONFIG
    heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads, config.num_heads)
    keys = jax.random.split(jax.random.key(0), len(heads))
    shapes = [(phase.rows, phase.length, count, config.head_dim) for count in heads]
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


def _seconds(function: Callable[..., Any], *arguments: Any) -> float:
    jax.block_until_ready(function(*arguments))  # untimed: the other run has filled the CPU's caches
    start = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    return time.perf_counter() - start


def _entry(
    phase: train.Phase,
    losses: dict[str, list[float]],
    steps: dict[str, list[float]],
    attention: dict[str, list[float]],
    active: float,
    visited: float,
) -> dict[str, Any]:
    config = train.CONFIG
    error = float(np.max(np.abs(np.subtract(losses[OURS], losses[REFERENCE]))))
    step, layer = (float(np.median(seconds[REFERENCE])) for seconds in (steps, attention))
    return {
        "case": f"training-{phase.rows}x{phase.length}",
        "about": f"{phase.steps} steps of {phase.rows} rows of {phase.length} tokens: documents packed into rows",
        "kind": "training",
        "shape": {
            "B": phase.rows,
            "T": phase.length,
            "S": phase.length,
            "N": config.num_heads,
            "K": config.num_kv_heads,
            "D": config.head_dim,
        },
        "dtype": "float32",
        "active_fraction": active,
        "visited_fraction": visited,
        "capacity": None,
        "flops": None,
        "bytes": None,
        "correct": error <= tolerances.TRAINING_LOSS,
        "error": error,
        "allowed_error": tolerances.TRAINING_LOSS,
        "contenders": {name: {"ms": summary(seconds)} for name, seconds in steps.items()},
        "ratios": {REFERENCE: median_ratio(steps[REFERENCE], steps[OURS])},
        "claims": {REFERENCE: step / (step - (1 - visited) * config.num_layers * layer)},
        "skipped": {},
        "attention": {
            "contenders": {name: {"ms": summary(seconds)} for name, seconds in attention.items()},
            "ratios": {REFERENCE: median_ratio(attention[REFERENCE], attention[OURS])},
        },
        "losses": losses,
    }


def table(results: Sequence[dict[str, Any]]) -> Table:
    """One row per phase."""
    columns = ("batch", "pairs allowed", "blocks visited", "loss differs by")
    columns += ("step, ms", "reference, ms", "ratio", "claim", "attention of a layer, ms", "reference, ms", "ratio")
    out = Table(*columns, title="medians of interleaved runs; ratios: reference time / our time", title_justify="left")
    for result in results:

        def times(of: dict[str, Any]) -> list[str]:
            return [f"{of['contenders'][name]['ms']['median']:.3g}" for name in (OURS, REFERENCE)]

        shape = result["shape"]
        out.add_row(
            f"{shape['B']} x {shape['T']}",
            f"{result['active_fraction']:.0%}",
            f"{result['visited_fraction']:.0%}",
            f"{result['error']:.1e}" + ("" if result["correct"] else " WRONG"),
            *times(result),
            f"{result['ratios'][REFERENCE]:.2f}",
            f"{result['claims'][REFERENCE]:.2f}",
            *times(result["attention"]),
            f"{result['attention']['ratios'][REFERENCE]:.2f}",
        )
    return out


def draw(results: Sequence[dict[str, Any]]) -> "Figure":
    """Draws both losses of every step, and their difference below."""
    from matplotlib.figure import Figure

    losses = {name: np.concatenate([result["losses"][name] for result in results]) for name in _COLORS}
    figure = Figure(figsize=(7.2, 4.4), facecolor="white", layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    steps = np.arange(1, losses[OURS].size + 1)
    for name, width in ((REFERENCE, 4.0), (OURS, 1.2)):
        above.plot(steps, losses[name], color=_COLORS[name], linewidth=width, label=name)
    above.set_ylabel("loss, nats")
    above.legend(frameon=False)
    # Equal losses have a difference of 0, which has no logarithm.
    apart = np.maximum(np.abs(losses[OURS] - losses[REFERENCE]), np.finfo(np.float32).eps / 2)
    below.plot(steps, apart, color=_COLORS[OURS], linewidth=1.2)
    below.axhline(tolerances.TRAINING_LOSS, color="#d55e00", linestyle="--", label="allowed")
    below.set_yscale("log")
    below.set_ylabel("difference")
    below.set_xlabel("step")
    below.legend(frameon=False, loc="center right")
    for end in np.cumsum([len(result["losses"][OURS]) for result in results])[:-1]:
        for axes in (above, below):
            axes.axvline(end + 0.5, color="#b4bdc7", linewidth=0.8, zorder=0)  # longer rows from here on
    figure.suptitle("Training with the kernels and with the reference", x=0.02, ha="left", fontweight="bold")
    return figure


if __name__ == "__main__":
    sys.exit(main())
