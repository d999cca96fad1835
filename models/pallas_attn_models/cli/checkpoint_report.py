"""What ``pallas-attn doctor --model`` says about a checkpoint, from its config and the headers of its weights."""

import argparse
import collections
import math
from collections.abc import Callable, Iterable

import jax.numpy as jnp
from rich.console import Console
from rich.table import Table
from rich.text import Text

import pallas_attn as pa
from pallas_attn_models.checkpoints import CONFIG, OpenCheckpoint, check_contents, local_directory, open_headers
from pallas_attn_models.cli.loading import read_config
from pallas_attn_models.cli.output import one_line
from pallas_attn_models.decoder import DecoderConfig, LayerConfig, layer_shapes, outer_shapes

_STORAGES = pa.caches.Plain(), pa.caches.Int8()
_SLOTS = 128


def run(args: argparse.Namespace) -> int:
    """Prints what the checkpoint is, and the verdict; the exit code is 1 if it cannot be loaded."""
    console = Console(highlight=False)
    directory = local_directory("--model", args.model, args.revision, (CONFIG,))
    try:
        config = read_config(directory)
        kinds = collections.Counter(config.layer(index) for index in range(config.num_layers))
        console.print(_sizes(config, kinds, args.dtype))
        console.print(_caches(config, kinds, args.dtype))
        checkpoint = open_headers("--model", args.model, args.revision, directory)
        console.print(_weights(checkpoint))
        number = len(check_contents(directory, checkpoint).layout)
    except (ValueError, FileNotFoundError) as error:
        print(f"refused: {one_line(str(error))}")
        return 1
    print(f"can be loaded: all {number} tensors are there, in their shapes, and no others")
    return 0


def _sizes(config: DecoderConfig, kinds: collections.Counter[LayerConfig], dtype: str) -> Table:
    parameters = sum(count * _number(layer_shapes(config, kind).values()) for kind, count in kinds.items())
    parameters += _number(outer_shapes(config).values())
    head = "the output head is the embedding" if config.tie_word_embeddings else "the output head is separate"
    table = Table("", "", show_header=False)
    table.add_row("family", Text(config.family))
    table.add_row("layers", f"{config.num_layers:,} of width {config.hidden_size:,}")
    sinks = ["every head has a sink"] if config.attention_sinks else []
    table.add_row("attention", Text("\n".join([*_listed(kinds, _attention), *sinks])))
    table.add_row("MLP", Text("\n".join(_listed(kinds, _mlp))))
    table.add_row("vocabulary", f"{config.vocab_size:,} tokens; {head}")
    table.add_row("context", f"{config.max_position_embeddings:,} tokens in training")
    table.add_row("parameters", f"{parameters:,}")
    table.add_row("in memory", f"{_bytes(parameters * jnp.dtype(dtype).itemsize)} in {dtype}")
    return table


def _caches(config: DecoderConfig, layers: collections.Counter[LayerConfig], dtype: str) -> Table:
    """Bytes of KV caches per token, for each kind of attention, and of a whole sequence."""
    table = Table("layers", "tokens kept", *(f"bytes per token and layer, {_name(storage)}" for storage in _STORAGES))
    totals = dict.fromkeys(_STORAGES, 0)
    kinds: collections.Counter[tuple[int | None, int, int]] = collections.Counter()
    for kind, count in layers.items():
        kinds[kind.window, kind.num_kv_heads, kind.head_dim] += count
    for (window, kv_heads, head_dim), count in kinds.items():
        sizes = {storage: _bytes_per_token(storage, kv_heads, head_dim, dtype) for storage in _STORAGES}
        kept = config.max_position_embeddings if window is None else min(window, config.max_position_embeddings)
        for storage, size in sizes.items():
            totals[storage] += count * kept * size
        table.add_row(f"{count:,}", "all" if window is None else f"{window:,}", *(f"{x:,}" for x in sizes.values()))
    table.add_section()
    table.add_row(f"all {config.num_layers:,}", f"{config.max_position_embeddings:,}", *map(_bytes, totals.values()))
    return table


def _weights(checkpoint: OpenCheckpoint) -> Table:
    numbers: collections.Counter[str] = collections.Counter()
    nbytes: collections.Counter[str] = collections.Counter()
    for tensor in checkpoint.tensors.values():
        numbers[tensor.dtype] += 1
        nbytes[tensor.dtype] += tensor.nbytes
    files = {tensor.path for tensor in checkpoint.tensors.values()}
    table = Table("stored as", "tensors", "bytes")
    for dtype, number in numbers.items():
        table.add_row(Text(dtype), f"{number:,}", _bytes(nbytes[dtype]))
    table.add_section()
    table.add_row(f"{len(files)} file{'s' * (len(files) != 1)}", f"{numbers.total():,}", _bytes(nbytes.total()))
    return table


def _listed(kinds: collections.Counter[LayerConfig], describe: Callable[[LayerConfig], str]) -> list[str]:
    """What ``describe`` says of each kind of layer, with the number of layers if there are several."""
    counts: collections.Counter[str] = collections.Counter()
    for kind, count in kinds.items():
        counts[describe(kind)] += count
    return [text if len(counts) == 1 else f"{count:,} of the layers: {text}" for text, count in counts.items()]


def _attention(kind: LayerConfig) -> str:
    heads = f"{kind.num_heads} heads, {kind.num_kv_heads} KV heads of {kind.head_dim}"
    rotation = "" if kind.rope is not None else ", without rotation"
    return heads + (", full" if kind.window is None else f", window of {kind.window:,} tokens") + rotation


def _mlp(kind: LayerConfig) -> str:
    experts = kind.experts
    if experts is None:
        return f"of width {kind.intermediate_size:,}"
    shared = "" if experts.shared_size is None else f", and a shared one of width {experts.shared_size:,}"
    width = f"of width {experts.intermediate_size:,}"
    return f"{experts.num_experts} experts {width}, {experts.experts_per_token} per token{shared}"


def _name(storage: pa.caches.Storage) -> str:
    return type(storage).__name__


def _bytes_per_token(storage: pa.caches.Storage, kv_heads: int, head_dim: int, dtype: str) -> int:
    few, many = (
        pa.caches.nbytes(
            storage=storage,
            batch_size=1,
            capacity=slots,
            kv_heads=kv_heads,
            head_dim=head_dim,
            dtype=dtype,
        )
        for slots in (_SLOTS, 2 * _SLOTS)
    )
    return (many - few) // _SLOTS


def _number(shapes: Iterable[tuple[int, ...]]) -> int:
    return sum(map(math.prod, shapes))


def _bytes(number: int) -> str:
    return f"{number:,} ({number / 2**20:,.1f} MiB)"
