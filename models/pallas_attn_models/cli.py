"""The command line: ``pallas-attn generate``, ``show-mask``, ``cache-size`` and ``doctor``."""

import argparse
import collections
import dataclasses
import functools
import importlib.metadata
import importlib.resources
import io
import json
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text
from tokenizers import Tokenizer

import pallas_attn as pa
from pallas_attn import tuning
from pallas_attn_models import cache_options, mask_expression, tasks
from pallas_attn_models.checkpoint import load_hf
from pallas_attn_models.config import DecoderConfig
from pallas_attn_models.decoder import FLOAT_DTYPES
from pallas_attn_models.generator import GenerationStats, Generator, check_prompts
from pallas_attn_models.layer_caches import init_caches
from pallas_attn_models.sampling import Sampling

_CAPACITY = 1024
_PREFILL_CHUNK = 128
_SELF_CHECK_TOLERANCE = 1e-5  # absolute, float32, outputs of size about 1

_GENERATE_HELP = """\
Complete a batch of prompts of any lengths. Without --model this runs the small byte-level decoder that ships with the
package, which adds, reverses words, and recalls values from a list of key-value pairs."""
_GENERATE_EXAMPLES = """\
examples:
  pallas-attn generate
  pallas-attn generate --prompt "17+25=" --prompt "reverse:pallas=" --prompt "a=7;k=2;k?"
  pallas-attn generate --model ./Llama-3.2-1B --prompts-file prompts.txt --temperature 0.7 --top-p 0.9 --json"""
_SHOW_MASK_HELP = f"""\
Show which blocks a mask leaves alive: full ones, which a kernel computes without looking at the mask, partial ones, and
empty ones, which it never reads. A mask is an expression of

  {"  ".join(mask_expression.FORMS.values())}

combined by & (and), | (or), ~ (not) and parentheses; ~ binds most, then &, then |. segments packs documents of these
lengths one after the other; what follows the last is one more document."""
_SHOW_MASK_EXAMPLES = """\
examples:
  pallas-attn show-mask "causal & sliding_window(256) | sink(4)" --q 2048
  pallas-attn show-mask "causal & sliding_window(256) | sink(4)" --q 2048 --left-pad 300 --out mask.png
  pallas-attn show-mask "causal & segments([700, 300, 1048])" --q 2048 --block-q 64 --block-kv 64
  pallas-attn show-mask "causal" --q 1 --kv 16384"""
_CACHE_SIZE_HELP = f"""\
Say how many bytes the KV caches of a model take, before anything is allocated. A cache is a policy, one of

  {"  ".join(cache_options.forms(cache_options.POLICIES))}

and a storage, one of

  {"  ".join(cache_options.forms(cache_options.STORAGES))}"""
_CACHE_SIZE_EXAMPLES = """\
examples:
  pallas-attn cache-size --capacity 4096
  pallas-attn cache-size --model ./Llama-3.2-1B --capacity 131072 --batch-size 8 --storage int8
  pallas-attn cache-size --model ./Llama-3.2-1B --capacity 2048 --cache "h2o(recent=256)" --storage "int4(group=32)"
  pallas-attn cache-size --model ./Llama-3.2-1B --capacity 8192 --batch-size 32 --storage "paged(64, 2048, int8)\""""
_DOCTOR_HELP = """\
Show versions, devices and implementations of attention, why each can or cannot run here, and check the numbers of
those that can against the reference."""
_DOCTOR_EXAMPLES = """\
example:
  pallas-attn doctor"""
_EXAMPLES = """\
examples:
  pallas-attn generate         complete some prompts with the model that ships with the package
  pallas-attn generate --help  what else it can do
  pallas-attn show-mask "causal & sliding_window(256)" --q 2048
  pallas-attn cache-size --capacity 4096 --storage int8
  pallas-attn doctor           see whether everything runs here"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; ``argv`` without the program's name, default ``sys.argv``.

    Returns:
      The exit code: 0; 1 if ``doctor`` found wrong numbers; 2 for what a user can set right, in one line on stderr.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a completion may hold what the terminal cannot show
    try:
        args = _parser().parse_args(argv)
        return args.command(args)
    except mask_expression.MaskExpressionError as error:
        print("error:", error, file=sys.stderr)  # with the expression and a caret under it
        return 2
    except (ValueError, TypeError, NotImplementedError, OSError, ImportError, jax.errors.JaxRuntimeError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see {self.prog} --help)")


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = _Parser(
        prog="pallas-attn",
        description="Text from Flax decoders whose attention reads only the KV blocks that matter.",
        epilog=_EXAMPLES,
        formatter_class=raw,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    generate = commands.add_parser(
        "generate",
        help="complete prompts",
        description=_GENERATE_HELP,
        epilog=_GENERATE_EXAMPLES,
        formatter_class=raw,
    )
    generate.set_defaults(command=_generate)
    model = generate.add_argument_group("model")
    model.add_argument(
        "--model", type=Path, metavar="DIR", help="config.json, safetensors and tokenizer.json of a Llama"
    )
    model.add_argument("--dtype", choices=FLOAT_DTYPES, help="default: bfloat16 on a GPU, else float32")
    model.add_argument("--implementation", choices=[*pa.implementations()], help="of attention; default: the best")
    prompts = generate.add_argument_group("prompts").add_mutually_exclusive_group()
    prompts.add_argument("--prompt", action="append", metavar="TEXT", help="may be repeated")
    prompts.add_argument(
        "--prompts-file", type=Path, metavar="FILE", help="one prompt per line; empty lines are skipped"
    )
    sampling = generate.add_argument_group("sampling")
    sampling.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="per prompt; default %(default)s")
    sampling.add_argument("--temperature", type=float, default=0.0, metavar="X", help="default 0: greedy")
    sampling.add_argument("--top-k", type=int, default=0, metavar="K", help="default 0: off")
    sampling.add_argument("--top-p", type=float, default=1.0, metavar="P", help="default 1: off")
    sampling.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the first prompt; the next has N + 1, ..."
    )
    shapes = generate.add_argument_group("shapes")
    shapes.add_argument("--batch-size", type=int, default=8, metavar="N", help="prompts at a time; default %(default)s")
    shapes.add_argument(
        "--capacity",
        type=int,
        metavar="N",
        help=f"tokens that the cache of a row holds; default {_CAPACITY}, or more if a prompt needs it",
    )
    _add_cache_options(shapes)
    generate.add_argument("--json", action="store_true", help="print one JSON object and nothing else")

    show_mask = commands.add_parser(
        "show-mask",
        help="show which blocks a mask leaves alive",
        description=_SHOW_MASK_HELP,
        epilog=_SHOW_MASK_EXAMPLES,
        formatter_class=raw,
    )
    show_mask.set_defaults(command=_show_mask)
    show_mask.add_argument("mask", metavar="MASK", help="an expression, in quotes")
    show_mask.add_argument("--q", type=int, required=True, metavar="N", help="queries")
    show_mask.add_argument("--kv", type=int, metavar="N", help="keys, the last of which are the queries; default --q")
    show_mask.add_argument("--left-pad", type=int, default=0, metavar="N", help="keys that are padding; default 0")
    show_mask.add_argument("--block-q", type=int, metavar="N", help="queries per block; default: as the kernels here")
    show_mask.add_argument("--block-kv", type=int, metavar="N", help="keys per block; default: as the kernels here")
    show_mask.add_argument("--out", type=Path, metavar="FILE", help="draw a .png or .svg instead of printing")

    cache_size = commands.add_parser(
        "cache-size",
        help="say how many bytes the caches of a model take",
        description=_CACHE_SIZE_HELP,
        epilog=_CACHE_SIZE_EXAMPLES,
        formatter_class=raw,
    )
    cache_size.set_defaults(command=_cache_size)
    cache_size.add_argument("--model", type=Path, metavar="DIR", help="with a config.json; default: what ships")
    cache_size.add_argument("--capacity", type=int, required=True, metavar="N", help="slots of a row")
    cache_size.add_argument("--batch-size", type=int, default=1, metavar="N", help="rows; default %(default)s")
    cache_size.add_argument("--dtype", choices=FLOAT_DTYPES, default="bfloat16", help="default %(default)s")
    cache_size.add_argument("--chunk", type=int, metavar="N", help="tokens of one call: windows need no more slots")
    _add_cache_options(cache_size)
    cache_size.add_argument("--json", action="store_true", help="print one JSON object and nothing else")

    doctor = commands.add_parser(
        "doctor",
        help="show what can run here, and check it",
        description=_DOCTOR_HELP,
        epilog=_DOCTOR_EXAMPLES,
        formatter_class=raw,
    )
    doctor.set_defaults(command=_doctor)
    return parser


def _add_cache_options(group: argparse._ActionsContainer) -> None:
    group.add_argument("--cache", default="dense", metavar="POLICY", help="dense, window(..), h2o(..); see cache-size")
    group.add_argument("--storage", default="plain", metavar="STORAGE", help="plain, int8, paged(..); see cache-size")


# --- generate ---


@dataclasses.dataclass(frozen=True)
class _Completion:
    prompt: str
    completion: str
    right_answer: str | None  # None where nobody knows it
    finish_reason: str
    tokens: list[int]
    logprobs: list[float]


def _generate(args: argparse.Namespace) -> int:
    texts, answers = _read_prompts(args)
    samplings = [
        # A seed for each prompt, so that the same prompt twice gives two answers.
        Sampling(args.max_new_tokens, args.temperature, args.top_k, args.top_p, seed=args.seed + index)
        for index in range(len(texts))
    ]
    policy, storage = cache_options.policy(args.cache), cache_options.storage(args.storage)
    directory = args.model or _shipped_checkpoint()
    _status(f"loading {directory}")
    dtype = args.dtype or ("bfloat16" if jax.default_backend() == "gpu" else "float32")
    model = load_hf(directory, jnp.dtype(dtype), implementation=args.implementation)
    tokenizer = _load_tokenizer(directory / "tokenizer.json")

    prompts = [tokenizer.encode(text).ids for text in texts]
    max_length = _default_capacity(prompts, args.max_new_tokens)
    capacity = max_length if args.capacity is None else args.capacity
    if not policy.bounded:
        max_length = capacity
    # All of them before any is run, so that a mistake in the last does not cost the time of the others.
    check_prompts(prompts, max_length=max_length, vocab_size=model.config.vocab_size)
    chunk = min(_PREFILL_CHUNK, max(1, policy.longest_append(capacity)))
    generator = Generator(
        model,
        batch_size=args.batch_size,
        capacity=capacity,
        prefill_chunk=chunk,
        policy=policy,
        storage=storage,
        max_length=max_length,
    )
    _status("compiling")
    compile_seconds = generator.compile()
    _status(f"completing {len(prompts)} prompts")
    completions, runs = [], []
    for first in range(0, len(prompts), args.batch_size):
        batch = slice(first, first + args.batch_size)
        result = generator.generate(prompts[batch], samplings[batch])
        decoded = [tokenizer.decode(tokens) for tokens in result.tokens]
        columns = (texts[batch], decoded, answers[batch], result.finish_reasons, result.tokens, result.logprobs)
        completions += [_Completion(*row) for row in zip(*columns, strict=True)]
        runs.append(result.stats)
    stats = _sum(runs, compile_seconds)

    if args.json:
        figures = {**dataclasses.asdict(stats), "tokens_per_second": stats.tokens_per_second}
        rows = [dataclasses.asdict(completion) for completion in completions]
        print(json.dumps({"model": str(directory), "completions": rows, "stats": figures}))
    else:
        _print_completions(completions)
        print(_figures(stats))
    return 0


def _read_prompts(args: argparse.Namespace) -> tuple[list[str], list[str | None]]:
    """The prompts, and the right answer to each where it is known."""
    if args.prompts_file is not None:
        prompts = [line for line in args.prompts_file.read_text(encoding="utf-8").split("\n") if line]
        if not prompts:
            raise ValueError(f"--prompts-file: expected a prompt per line, got none in {args.prompts_file}")
    elif args.prompt is not None:
        prompts = args.prompt
    elif args.model is not None:
        raise ValueError("--model: expected --prompt or --prompts-file with it, got neither")
    else:
        examples = _shipped_examples()
        return [one.prompt for one in examples], [one.answer.removesuffix(tasks.END) for one in examples]
    return prompts, [None] * len(prompts)


def _shipped_examples() -> list[tasks.Example]:
    """Some of every task that the shipped checkpoint has learnt, all held out of its training, 4 to 450 bytes long."""
    return [
        *tasks.held_out_prompts("addition", 3, seed=0),
        *tasks.held_out_prompts("reversal", 2, seed=0),
        *tasks.held_out_prompts("recall", 1, seed=0, max_pairs=8),
        *tasks.held_out_prompts("recall", 2, seed=0, min_pairs=60),
    ]


def _shipped_checkpoint() -> Path:
    return Path(str(importlib.resources.files("pallas_attn_models") / "checkpoint"))


def _load_tokenizer(path: Path) -> Tokenizer:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected the tokenizer of the model, found none")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more special
        raise ValueError(f"{path}: expected a file of the tokenizers library, got: {error}") from error


def _default_capacity(prompts: list[list[int]], max_new_tokens: int) -> int:
    needed = max(map(len, prompts)) + max_new_tokens
    return max(_CAPACITY, -(-needed // 128) * 128)


def _sum(runs: list[GenerationStats], compile_seconds: float) -> GenerationStats:
    totals: dict[str, Any] = {name: sum(getattr(run, name) for run in runs) for name in dataclasses.asdict(runs[0])}
    totals |= {"compile_seconds": compile_seconds, "executables": runs[-1].executables}
    return GenerationStats(**totals)


def _print_completions(completions: list[_Completion]) -> None:
    known = any(one.right_answer is not None for one in completions)
    table = Table("prompt", "completion", *(["right answer"] if known else []), "ended by", show_lines=True)
    for one in completions:
        cells = [_shorten(_printable(one.prompt)), _printable(one.completion, keep="\n")]
        if known:
            cells.append(one.right_answer or "")
        # Text, not markup: a model may well write "[bold]".
        table.add_row(*map(Text, [*cells, one.finish_reason]))
    Console(highlight=False).print(table)


def _printable(text: str, keep: str = "") -> str:
    """Control characters as escapes, so that no completion can play with the terminal."""
    return "".join(c if c.isprintable() or c in keep else repr(c)[1:-1] for c in text)


def _shorten(text: str) -> str:
    """A long prompt without its middle, so short that a row of the table fits a line of 80 characters."""
    if len(text) <= 36:
        return text
    return f"{text[:7]} .. {len(text)} characters .. {text[-7:]}"


def _figures(stats: GenerationStats) -> str:
    visited, total = stats.kv_blocks_visited, stats.kv_blocks_total
    figures = [
        f"prompt tokens {stats.prompt_tokens:,}",
        f"new tokens {stats.new_tokens:,}",
        f"tokens/s {stats.tokens_per_second:,.0f}",
        f"executables compiled {stats.executables}",
        f"KV blocks visited {visited:,} of {total:,} ({visited / total:.1%})",
    ]
    return ", ".join(figures)


# --- show-mask ---


def _show_mask(args: argparse.Namespace) -> int:
    q_len, kv_len = args.q, args.q if args.kv is None else args.kv
    if q_len < 1:
        raise ValueError(f"--q: expected at least 1, got {q_len}")
    if kv_len < q_len:
        raise ValueError(f"--kv: expected at least as many keys as queries ({q_len}), got {kv_len}")
    if not 0 <= args.left_pad < kv_len:
        raise ValueError(f"--left-pad: expected from 0 to one less than the {kv_len} keys, got {args.left_pad}")
    kv_positions = np.maximum(np.arange(kv_len, dtype=np.int32) - args.left_pad, -1)
    q_positions = kv_positions[kv_len - q_len :]
    mask = mask_expression.parse(args.mask, q_positions, kv_positions)
    default = tuning.default_block_sizes(q_len, kv_len, fine=mask.is_fine())
    sizes = pa.BlockSizes(
        default.q if args.block_q is None else args.block_q, default.kv if args.block_kv is None else args.block_kv
    )
    block_mask = pa.BlockMask.from_mask(mask, jnp.asarray(q_positions[None]), jnp.asarray(kv_positions[None]), sizes)
    if args.out is None:
        print(block_mask)
    else:
        pa.save_picture(block_mask, args.out, title=" ".join(args.mask.split()))
        _status(f"wrote {args.out}")
    return 0


# --- cache-size ---


def _cache_size(args: argparse.Namespace) -> int:
    policy, storage = cache_options.policy(args.cache), cache_options.storage(args.storage)
    path = (args.model or _shipped_checkpoint()) / "config.json"
    config = DecoderConfig.from_hf(json.loads(path.read_text(encoding="utf-8")))
    sizes = {"batch_size": args.batch_size, "capacity": args.capacity, "dtype": args.dtype, "chunk": args.chunk}

    def caches(**kinds: Any) -> tuple[pa.caches.KVCache, ...]:
        return jax.eval_shape(lambda: init_caches(config, **sizes, **kinds))  # nothing is allocated

    layers = caches(policy=policy, storage=storage)
    total, plain = (sum(cache.nbytes for cache in one) for one in (layers, caches()))
    if args.json:
        print(json.dumps({"bytes": total, "layers": [cache.nbytes for cache in layers], "dense_plain_bytes": plain}))
        return 0
    table = Table("layers", "policy", "storage", "slots of a row", "bytes of a layer")
    for (policy, storage, capacity, nbytes), count in collections.Counter(
        (cache.policy, cache.storage, cache.capacity, cache.nbytes) for cache in layers
    ).items():
        table.add_row(str(count), Text(str(policy)), Text(str(storage)), f"{capacity:,}", f"{nbytes:,}")
    console = Console(highlight=False)
    console.print(table)
    share = f"{total / plain:.1%} of Dense() in Plain() with the same slots in {args.dtype}"
    console.print(f"{total:,} bytes for {args.batch_size} rows ({total / 2**20:,.1f} MiB), {share}")
    return 0


# --- doctor ---


def _doctor(args: argparse.Namespace) -> int:
    del args
    console = Console(highlight=False)
    versions = Table("package", "version")
    versions.add_row("python", platform.python_version())
    for package in ("pallas-attn", "jax", "jaxlib", "flax"):
        versions.add_row(package, importlib.metadata.version(package))
    console.print(versions)

    devices = Table("device", "platform")
    for device in jax.devices():
        devices.add_row(Text(device.device_kind), device.platform)
    console.print(devices)

    table = Table("implementation", "can run", "largest error in a small causal attention")
    healthy = True
    for name, reason in pa.implementations().items():
        if reason is not None:
            table.add_row(name, Text(f"no: {reason}"), "")
            continue
        right, finding = _self_check(name)
        healthy &= right
        table.add_row(name, "yes", Text(finding))
    console.print(table)
    return 0 if healthy else 1


def _self_check(implementation: str) -> tuple[bool, str]:
    """Whether it gives what the reference gives, and a word about it."""
    if implementation == "reference":
        return True, "the others are measured against it"
    try:
        error = float(jnp.abs(_small_attention(implementation) - _small_attention("reference")).max())
    except Exception as error:  # whatever it is, the rest of the report still helps
        return False, f"FAILED: {error}"
    right = error <= _SELF_CHECK_TOLERANCE  # a NaN is not
    return right, f"{error:.1e} ({'right' if right else 'WRONG'})"


@functools.partial(jax.jit, static_argnames="implementation")
def _small_attention(implementation: str) -> jax.Array:
    """float32, lengths that fill no block, two query heads per KV head, causal, nine tokens of padding in a row."""
    key_q, key_k, key_v = jax.random.split(jax.random.key(0), 3)
    positions = jnp.arange(53, dtype=jnp.int32)[None] - jnp.array([[0], [9]], jnp.int32)
    positions = jnp.maximum(positions, -1)
    out = pa.attention(
        jax.random.normal(key_q, (2, 37, 4, 32)),
        jax.random.normal(key_k, (2, 53, 2, 32)),
        jax.random.normal(key_v, (2, 53, 2, 32)),
        pa.masks.causal(),
        q_positions=positions[:, -37:],
        kv_positions=positions,
        implementation=implementation,
    )
    return jnp.asarray(out)


def _status(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
