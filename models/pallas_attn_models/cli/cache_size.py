"""``pallas-attn cache-size``: estimates cache memory without allocating."""

import argparse
import collections
import json
from typing import Any

import jax
from rich.console import Console
from rich.table import Table
from rich.text import Text

import pallas_attn as pa
from pallas_attn_models.cli import cache_options
from pallas_attn_models.cli.loading import config_directory, read_config
from pallas_attn_models.cli.options import add_cache_options, add_model_option, int32
from pallas_attn_models.decoder import FLOAT_DTYPES, init_caches

_HELP = f"""\
Estimate the memory of a model's KV caches without allocating. A cache combines a policy, one of

  {"  ".join(cache_options.forms(cache_options.POLICIES))}

with a storage, one of

  {"  ".join(cache_options.forms(cache_options.STORAGES))}"""
_EXAMPLES = """\
examples:
  pallas-attn cache-size --capacity 4096
  pallas-attn cache-size --model ./Llama-3.2-1B --capacity 131072 --batch-size 8 --storage int8
  pallas-attn cache-size --model ./Llama-3.2-1B --capacity 2048 --cache "h2o(recent=256)" --storage "int4(group=32)"
  pallas-attn cache-size --model ./Llama-3.2-1B --capacity 8192 --batch-size 32 --storage "paged(64, 2048, int8)\""""


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the ``cache-size`` command."""
    parser = commands.add_parser(
        "cache-size",
        help="estimate the memory of a model's KV caches",
        description=_HELP,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(command=run)
    help = "directory with a config.json, or org/name on the Hugging Face Hub; default: the shipped model"
    add_model_option(parser, help=help)
    parser.add_argument("--capacity", type=int32, required=True, metavar="N", help="slots per row")
    parser.add_argument("--batch-size", type=int32, default=1, metavar="N", help="rows; default %(default)s")
    parser.add_argument("--dtype", choices=FLOAT_DTYPES, default="bfloat16", help="default %(default)s")
    parser.add_argument("--chunk", type=int32, metavar="N", help="tokens per call: limits the slots of sliding windows")
    add_cache_options(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")


def run(args: argparse.Namespace) -> int:
    """Prints the bytes per kind of layer; returns the exit code."""
    policy, storage = cache_options.policy(args.cache), cache_options.storage(args.storage)
    config = read_config(config_directory(args))
    sizes = {"batch_size": args.batch_size, "capacity": args.capacity, "dtype": args.dtype, "chunk": args.chunk}

    def caches(**kinds: Any) -> tuple[pa.caches.KVCache, ...]:
        return jax.eval_shape(lambda: init_caches(config, **sizes, **kinds))  # nothing is allocated

    layers = caches(policy=policy, storage=storage)
    total, plain = (sum(cache.nbytes for cache in one) for one in (layers, caches()))
    if args.json:
        print(json.dumps({"bytes": total, "layers": [cache.nbytes for cache in layers], "dense_plain_bytes": plain}))
        return 0
    table = Table("layers", "policy", "storage", "slots per row", "bytes per layer")
    for (policy, storage, capacity, nbytes), count in collections.Counter(
        (cache.policy, cache.storage, cache.capacity, cache.nbytes) for cache in layers
    ).items():
        table.add_row(str(count), Text(str(policy)), Text(str(storage)), f"{capacity:,}", f"{nbytes:,}")
    console = Console(highlight=False)
    console.print(table)
    share = f"{total / plain:.1%} of Dense() in Plain() with as many slots in {args.dtype}"
    console.print(f"{total:,} bytes for {args.batch_size} rows ({total / 2**20:,.1f} MiB), {share}")
    return 0
