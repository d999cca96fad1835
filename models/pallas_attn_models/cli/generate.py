"""``pallas-attn generate``: completes prompts."""

import argparse
import collections
import dataclasses
import sys
from pathlib import Path

from tokenizers import Tokenizer

from pallas_attn_models.cli import cache_options, options
from pallas_attn_models.cli.completions import (
    CompletionRow,
    figures,
    print_in_turn,
    print_table,
    show_growing,
    to_json,
)
from pallas_attn_models.cli.loading import (
    encode,
    end_tokens,
    load_model,
    load_tokenizer,
    make_generator,
    model_directory,
    read_defaults,
)
from pallas_attn_models.cli.output import status
from pallas_attn_models.cli.text_stream import TextStream, read_streams
from pallas_attn_models.generation import GenerationStats, Generator, Sampling, check_prompts
from pallas_attn_models.text_files import read_text
from pallas_attn_models.training import END, Example, held_out_prompts

_BATCH_SIZE = 8
_CAPACITY = 1024
_MAX_NEW_TOKENS = 64

_HELP = """\
Complete prompts of different lengths in a batch. Without --model, run the small byte-level decoder that ships with the
package: it adds numbers, reverses words, and recalls values from a list of key-value pairs."""
_EXAMPLES = """\
examples:
  pallas-attn generate
  pallas-attn generate --prompt "17+25=" --prompt "reverse:pallas=" --prompt "a=7;k=2;k?"
  pallas-attn generate --model ./Llama-3.2-1B --prompt "Once upon a time" --stream --temperature 0.8 --min-p 0.1
  pallas-attn generate --model ./Llama-3.2-1B --prompts-file prompts.txt --temperature 0.7 --top-p 0.9 --json
  pallas-attn generate --model ./Llama-3.2-1B --prompt "Q: 2+2? A:" --stop $'\\n' --num-samples 4 --temperature 1
  pallas-attn generate --model ./Llama-3.2-1B --prompt "A good day" --guidance 1.5 --negative-prompt "A bad day"
  pallas-attn generate --model ./Llama-3.2-1B --prompts-file code.txt --speculate --max-new-tokens 512"""


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the ``generate`` command."""
    parser = commands.add_parser(
        "generate",
        help="complete prompts",
        description=_HELP,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(command=run)
    options.add_model_options(parser, required=False)
    prompts = parser.add_argument_group("prompts")
    given = prompts.add_mutually_exclusive_group()
    given.add_argument("--prompt", action="append", metavar="TEXT", help="may be repeated")
    given.add_argument("--prompts-file", type=Path, metavar="FILE", help="one prompt per line; empty lines are skipped")
    help = "completions of each prompt; default %(default)s"
    prompts.add_argument("--num-samples", type=options.int32, default=1, metavar="N", help=help)
    seed = "seed of the first completion; each completion adds 1; default 0"
    options.add_sampling_options(parser, max_new_tokens=_MAX_NEW_TOKENS, seed=seed)
    guidance = parser.add_argument_group("guidance", "Classifier-free guidance (arXiv:2306.17806).")
    help = "guidance scale, above 1 to steer away from the negative prompt; uses a second row per completion"
    guidance.add_argument("--guidance", type=float, metavar="X", help=help)
    help = "prompt to steer away from, shared by all prompts"
    guidance.add_argument("--negative-prompt", metavar="TEXT", help=help)
    shapes = parser.add_argument_group("speed and memory")
    help = f"rows of the cache; default {_BATCH_SIZE}, or as many as the samples of a prompt need"
    shapes.add_argument("--batch-size", type=options.int32, metavar="N", help=help)
    help = f"tokens per row of the cache; default {_CAPACITY}, or as many as the longest prompt needs"
    shapes.add_argument("--capacity", type=options.int32, metavar="N", help=help)
    options.add_cache_options(shapes)
    options.add_speculation_option(shapes)
    output = parser.add_argument_group("output")
    form = output.add_mutually_exclusive_group()
    help = "print text as it is generated; statistics go to stderr"
    form.add_argument("--stream", action="store_true", help=help)
    form.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    help = "with --json: the N most likely tokens at each position, with their log-probabilities"
    output.add_argument("--logprobs", type=options.int32, default=0, metavar="N", help=help)


@dataclasses.dataclass(frozen=True)
class _Requests:
    """The requests of a run: one entry per prompt; the last three fields apply to all prompts."""

    texts: list[str]
    right_answers: list[str | None]
    prompts: list[list[int]]
    samplings: list[Sampling]
    negative_prompt: list[int] | None
    guidance_scale: float
    num_samples: int

    @property
    def labels(self) -> list[tuple[str, str | None]]:
        """Prompt text and right answer of every completion."""
        pairs = zip(self.texts, self.right_answers, strict=True)
        return [pair for pair in pairs for _ in range(self.num_samples)]


def run(args: argparse.Namespace) -> int:
    """Completes prompts and prints the results; the exit code is 1 if the model's logits were NaN or infinite."""
    _check(args)
    texts, right_answers = _read_prompts(args)
    directory = model_directory(args)
    defaults = read_defaults(directory)
    samplings = [
        # One seed per completion, so that equal prompts get different completions.
        options.sampling(args, defaults, seed=args.seed + index * args.num_samples, top_logprobs=args.logprobs)
        for index in range(len(texts))
    ]
    policy, _ = cache_options.policy(args.cache), cache_options.storage(args.storage)
    model = load_model(args, directory)
    tokenizer = load_tokenizer(directory)

    stop = end_tokens(model, defaults.eos_token_ids)
    samplings = [dataclasses.replace(sampling, stop=stop) for sampling in samplings]
    prompts = [encode(directory, tokenizer, text) for text in texts]
    negative = None if args.negative_prompt is None else encode(directory, tokenizer, args.negative_prompt)
    max_length = _default_capacity([*prompts, negative or []], args.max_new_tokens)
    capacity = max_length if args.capacity is None else args.capacity
    # Check all prompts before compiling, so that an error in the last one appears at once.
    limits = {"max_length": max_length if policy.bounded else capacity, "vocab_size": model.config.vocab_size}
    check_prompts(prompts, **limits)
    if negative is not None:
        check_prompts([negative], **limits, name="negative_prompts")
    rows = args.num_samples * (1 if negative is None else 2)
    generator = make_generator(
        args,
        model,
        samplings[0],
        batch_size=max(_BATCH_SIZE, rows) if args.batch_size is None else args.batch_size,
        capacity=capacity,
        max_length=max_length,
        max_queue=len(prompts) * args.num_samples,
    )
    compile_seconds = generator.warmup(lambda name: status(f"compiling {name}"))
    status(f"completing {len(prompts)} prompts")

    scale = 1.0 if args.guidance is None else args.guidance
    requests = _Requests(texts, right_answers, prompts, samplings, negative, scale, args.num_samples)
    if args.stream or args.stop:
        completions, stats = _stream(generator, tokenizer, requests, stop=args.stop, show=args.stream)
    else:
        completions, stats = _complete(generator, tokenizer, requests)
    stats = dataclasses.replace(stats, compile_seconds=compile_seconds)
    if args.json:
        print(to_json(directory, completions, stats, with_top=args.logprobs > 0))
    elif args.stream:
        status(figures(stats))
    else:
        print_table(completions)
        print(figures(stats))
    invalid = sum(one.finish_reason == "invalid" for one in completions)
    if invalid:
        status(f"{invalid} of {len(completions)} completions ended because the model's logits were NaN or infinite")
    return 1 if invalid else 0


def _check(args: argparse.Namespace) -> None:
    if args.num_samples < 1:
        raise ValueError(f"--num-samples: expected at least 1, got {args.num_samples}")
    if args.logprobs and not args.json:
        raise ValueError("--logprobs: expected --json, the only output that shows them")
    if (args.guidance is None) != (args.negative_prompt is None):
        raise ValueError("--guidance, --negative-prompt: expected both or neither, got one")


def _read_prompts(args: argparse.Namespace) -> tuple[list[str], list[str | None]]:
    """The prompts, and their right answers where known."""
    if args.prompts_file is not None:
        prompts = [line for line in read_text(args.prompts_file).split("\n") if line]
        if not prompts:
            raise ValueError(f"--prompts-file: expected a prompt per line, got none in {args.prompts_file}")
    elif args.prompt is not None:
        prompts = args.prompt
    elif args.model is not None:
        raise ValueError("--model: expected also --prompt or --prompts-file, got neither")
    else:
        examples = _shipped_examples()
        return [one.prompt for one in examples], [one.answer.removesuffix(END) for one in examples]
    return prompts, [None] * len(prompts)


def _shipped_examples() -> list[Example]:
    """Prompts of every task of the shipped checkpoint, held out of its training, 4 to 450 bytes long."""
    return [
        *held_out_prompts("addition", 3, seed=0),
        *held_out_prompts("reversal", 2, seed=2),
        *held_out_prompts("recall", 1, seed=0, max_pairs=8),
        *held_out_prompts("recall", 2, seed=0, min_pairs=60),
    ]


def _default_capacity(prompts: list[list[int]], max_new_tokens: int) -> int:
    needed = max(map(len, prompts)) + max_new_tokens
    return max(_CAPACITY, -(-needed // 128) * 128)


def _complete(
    generator: Generator, tokenizer: Tokenizer, requests: _Requests
) -> tuple[list[CompletionRow], GenerationStats]:
    """Completes all prompts without streaming."""
    negative = requests.negative_prompt
    result = generator.generate(
        requests.prompts,
        requests.samplings,
        negative_prompts=None if negative is None else [negative] * len(requests.prompts),
        guidance_scale=requests.guidance_scale,
        num_samples=requests.num_samples,
    )
    completions = [
        CompletionRow(
            prompt,
            tokenizer.decode(result.tokens[index]),
            right_answer,
            result.finish_reasons[index],
            result.tokens[index],
            result.logprobs[index],
            result.top_logprobs[index],
        )
        for index, (prompt, right_answer) in enumerate(requests.labels)
    ]
    return completions, result.stats


def _stream(
    generator: Generator, tokenizer: Tokenizer, requests: _Requests, *, stop: list[str], show: bool
) -> tuple[list[CompletionRow], GenerationStats]:
    """Completes token by token, to show text as it is generated or to find stop strings."""
    before = generator.spent
    guidance = {"negative_prompt": requests.negative_prompt, "guidance_scale": requests.guidance_scale}
    streams = [
        TextStream(handle, tokenizer, stop)
        for prompt, one in zip(requests.prompts, requests.samplings, strict=True)
        for handle in generator.submit_samples(prompt, requests.num_samples, one, **guidance)
    ]
    labels = requests.labels

    def completions() -> list[CompletionRow]:
        return [_so_far(*label, stream) for label, stream in zip(labels, streams, strict=True)]

    texts = read_streams(generator, streams)
    events = ((index, text, streams[index].finish_reason is not None) for index, text in texts)
    if show and len(streams) > 1 and sys.stdout.isatty():
        show_growing(events, completions)
    elif show:
        print_in_turn(events, [prompt for prompt, _ in labels])
    else:
        collections.deque(events, maxlen=0)
    stats = generator.spent.since(before).of_run(
        prompt_tokens=sum(len(prompt) + len(requests.negative_prompt or []) for prompt in requests.prompts),
        new_tokens=sum(len(stream.tokens) for stream in streams),
        compile_seconds=0.0,
        executables=sum(generator.compile_counts.values()),
    )
    return completions(), stats


def _so_far(prompt: str, right_answer: str | None, stream: TextStream) -> CompletionRow:
    handle, length = stream.handle, len(stream.tokens)
    return CompletionRow(
        prompt,
        stream.text,
        right_answer,
        stream.finish_reason or "",
        [*stream.tokens],
        handle.logprobs[:length],
        handle.top_logprobs[:length],
    )
