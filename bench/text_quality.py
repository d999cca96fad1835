"""How well a model predicts a text with a cache smaller than it: ``python -m bench.text_quality``.

The model reads the first tokens of the text in chunks, with every policy and storage. Two figures are compared with
those of a dense cache: the perplexity, and how often the most likely token is the same. Layers with sliding windows
keep no more slots than their windows need; all other layers get the policy.
"""

import argparse
import dataclasses
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console
from rich.progress import track
from rich.table import Table

import pallas_attn as pa
from bench import machine
from bench.cache_quality import KINDS
from bench.results_file import ResultsError, ResultsFile
from pallas_attn_models import Decoder, load_hf
from pallas_attn_models.text import encode, load_tokenizer

CHUNK = 16
SLOTS = (128, 256)
_OK, _USAGE = 0, 2


@dataclasses.dataclass(frozen=True)
class Run:
    """One policy and storage for all layers without a window."""

    name: str
    slots: int
    policies: list[pa.caches.Policy]
    storage: pa.caches.Storage
    chunk: int | None


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0; 2 for wrong arguments or a file that cannot be read or written."""
    parser = argparse.ArgumentParser(prog="python -m bench.text_quality", description=__doc__, allow_abbrev=False)
    parser.add_argument("--model", type=Path, metavar="DIR", required=True, help="a checkpoint with its tokenizer")
    parser.add_argument("--text", type=Path, metavar="FILE", required=True)
    parser.add_argument("--tokens", type=int, default=704, help="of the text; default %(default)s")
    parser.add_argument("--slots", type=int, nargs="+", default=SLOTS, help="default %(default)s")
    parser.add_argument("--revision", metavar="COMMIT", help="commit of a copy without .git, for --out")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the results as JSON")
    options = parser.parse_args(argv)
    console = Console(stderr=True)
    try:
        for name, values, least in (("--tokens", [options.tokens], 2 * CHUNK), ("--slots", options.slots, 2 * CHUNK)):
            if min(values) < least:
                raise ValueError(f"{name}: expected at least {least}, got {min(values)}")
        file = ResultsFile(options.out, suite="text-quality", machine=machine.describe(options.revision))
        tokens = _tokens(options.model, options.text, options.tokens)
        model = load_hf(options.model, dtype=jnp.float32)
    except (ValueError, OSError, ResultsError) as error:
        text = f"python -m bench.text_quality: {error}"
        console.print(text, style="red", markup=False, highlight=False, soft_wrap=True)
        return _USAGE
    about = f"{options.model.name}, the first {len(tokens)} tokens of {options.text.name} in chunks of {CHUNK}"
    for result in measure(model, tokens, options.slots, console):
        file.add({"about": about, **result})
    Console(width=None if sys.stdout.isatty() else 160).print(table(file.results))
    return _OK


def _tokens(directory: Path, text: Path, number: int) -> np.ndarray:
    """int32 ``[number]``: the start of the text, with the token that begins it, in whole chunks."""
    tokens = encode(directory, load_tokenizer(directory), text.read_text(encoding="utf-8"))
    number = number // CHUNK * CHUNK
    if len(tokens) < number:
        raise ValueError(f"--text: expected at least {number} tokens, got {len(tokens)}")
    return np.asarray(tokens[:number], np.int32)


def runs(model: Decoder, length: int, slots: Sequence[int]) -> Iterator[Run]:
    """Dense first; then every kind of cache, bounded ones with each number of slots."""
    layers = model.config.num_layers
    yield Run("Dense in all layers", length, [pa.caches.Dense()] * layers, pa.caches.Plain(), None)
    for kind in KINDS:
        if kind.first_layer is None:
            for size in [length] if kind.policy == "dense" else slots:
                yield Run(kind.name, size, kind.policies(size, layers), kind.storage, CHUNK)


def measure(model: Decoder, tokens: np.ndarray, slots: Sequence[int], console: Console) -> Iterator[dict[str, Any]]:
    """Reads the text with every kind of cache. Yields a result entry for each."""
    reference = None
    for run in track([*runs(model, len(tokens), slots)], console=console):
        nats, best, nbytes = _read(model, tokens, run)
        reference = best if reference is None else reference
        yield {
            "case": f"{run.name}, {run.slots} slots",
            "kind": run.name,
            "slots": run.slots,
            "storage": str(run.storage),
            "policies": sorted({str(policy) for policy in run.policies}),
            "bytes_per_row": nbytes,
            "perplexity": math.exp(nats),
            "same_token": float((best == reference).mean()),
        }


def _read(model: Decoder, tokens: np.ndarray, run: Run) -> tuple[float, np.ndarray, int]:
    """Nats per token, the most likely next token at each position, and the bytes of the caches."""
    caches = model.init_caches(
        batch_size=1, capacity=run.slots, policy=run.policies, storage=run.storage, chunk=run.chunk
    )
    nats, best = [], []
    for start in range(0, len(tokens), CHUNK):
        chunk, after = tokens[start : start + CHUNK], tokens[start + 1 : start + CHUNK + 1]
        after = np.pad(after, (0, CHUNK - len(after)))  # the last token of the text has no next one
        caches, likely, surprise = _step(model, caches, jnp.asarray(chunk)[None], jnp.asarray(after)[None])
        best.append(np.asarray(likely)[0])
        nats.append(np.asarray(surprise)[0])
    return float(np.concatenate(nats)[:-1].mean()), np.concatenate(best), sum(x.nbytes for x in jax.tree.leaves(caches))


@nnx.jit(donate_argnums=1)
def _step(model: Decoder, caches: Any, tokens: jax.Array, after: jax.Array) -> tuple[Any, jax.Array, jax.Array]:
    out = model(tokens, caches=caches)
    assert out.logits is not None
    logprobs = jax.nn.log_softmax(out.logits)
    surprise = -jnp.take_along_axis(logprobs, after[..., None], axis=-1)[..., 0]
    return out.caches, out.logits.argmax(-1), surprise


def table(results: Sequence[dict[str, Any]]) -> Table:
    """One row per kind and size."""
    out = Table(
        "cache", "slots", "KiB per row", "perplexity", "same token", title=results[0]["about"], title_justify="left"
    )
    for result in results:
        kib = f"{result['bytes_per_row'] / 2**10:,.0f}"
        figures = f"{result['perplexity']:.2f}", f"{result['same_token']:.1%}"
        out.add_row(result["kind"], str(result["slots"]), kib, *figures)
    return out


if __name__ == "__main__":
    sys.exit(main())
