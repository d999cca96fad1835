"""``pallas-attn chat``: a conversation with an instruct model."""

import argparse
import contextlib
import dataclasses
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tokenizers import Tokenizer

from pallas_attn_models.cli import options
from pallas_attn_models.cli.loading import (
    encode,
    end_tokens,
    load_model,
    load_tokenizer,
    make_generator,
    model_directory,
    read_defaults,
)
from pallas_attn_models.cli.output import one_line, printable, status
from pallas_attn_models.cli.text_stream import TextStream, read_streams
from pallas_attn_models.generation import Generator, Sampling
from pallas_attn_models.text import ChatTemplate

_CAPACITY = 4096
_MAX_NEW_TOKENS = 1024

_HELP = """\
Talk to an instruct model. Each line is a message; /reset starts a new conversation, /exit or Ctrl-D ends the program,
and Ctrl-C stops an answer. The model's own chat template formats the messages: chat_template.jinja, or chat_template in
tokenizer_config.json. If stdin is not a terminal, its lines are the messages."""
_EXAMPLES = """\
examples:
  pallas-attn chat --model ./Llama-3.2-1B-Instruct
  pallas-attn chat --model ./Llama-3.2-1B-Instruct --system "You answer in one sentence." --temperature 0
  pallas-attn chat --model ./Llama-3.2-1B-Instruct --capacity 2048 --cache "h2o(recent=512)" --storage int8
  echo "Why is the sky blue?" | pallas-attn chat --model ./Llama-3.2-1B-Instruct --stop . > answer.txt"""


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the ``chat`` command."""
    parser = commands.add_parser(
        "chat",
        help="talk to an instruct model",
        description=_HELP,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(command=run)
    options.add_model_options(parser, required=True)
    parser.add_argument("--system", metavar="TEXT", help="system message; default: none")
    seed = "seed of the first answer; each answer adds 1; default 0"
    options.add_sampling_options(parser, max_new_tokens=_MAX_NEW_TOKENS, seed=seed)
    cache = parser.add_argument_group("speed and memory")
    help = f"tokens in the cache; default {_CAPACITY}, or the model's context length if smaller"
    cache.add_argument("--capacity", type=options.int32, metavar="N", help=help)
    options.add_cache_options(cache)
    options.add_speculation_option(cache)


def run(args: argparse.Namespace) -> int:
    """Answers messages until stdin ends; the exit code is 1 if the model's logits were NaN or infinite."""
    directory = model_directory(args)
    defaults = read_defaults(directory)
    sampling = options.sampling(args, defaults, seed=args.seed)
    template = ChatTemplate.read(directory)
    tokenizer = load_tokenizer(directory)
    # The token that ends a turn may differ from the end token in config.json.
    end = tokenizer.token_to_id(template.special_tokens.get("eos_token", ""))
    model = load_model(args, directory)
    stop = end_tokens(model, [*defaults.eos_token_ids, *([] if end is None else [end])])
    sampling = dataclasses.replace(sampling, stop=stop)
    longest = model.config.max_position_embeddings
    capacity = min(_CAPACITY, longest) if args.capacity is None else args.capacity
    generator = make_generator(args, model, sampling, batch_size=1, capacity=capacity, max_length=longest)
    generator.warmup(lambda name: status(f"compiling {name}"))
    return Chat(generator, tokenizer, template, sampling, stop=args.stop, system=args.system).run()


class Chat:
    """A conversation with a model.

    Args:
      generator: has at least one row.
      tokenizer, template: of the same model.
      sampling: settings of the answers; the seed increases by 1 with each answer.
      stop: stop strings; an answer is cut before the first.
      system: the system message, or None.

    Attributes:
      messages: so far, as :meth:`~pallas_attn_models.text.ChatTemplate.render` takes them.
    """

    def __init__(
        self,
        generator: Generator,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        sampling: Sampling,
        *,
        stop: Sequence[str] = (),
        system: str | None = None,
    ) -> None:
        self._generator, self._tokenizer, self._template = generator, tokenizer, template
        self._sampling, self._stop, self._system = sampling, stop, system
        self.reset()

    def reset(self) -> None:
        """Clears the conversation, but keeps the system message."""
        self.messages = [] if self._system is None else [{"role": "system", "content": self._system}]

    def run(self) -> int:
        """Reads stdin to its end and answers on stdout.

        Returns:
          The exit code: 0, or 1 if an answer ended because the logits were NaN or infinite.

        Raises:
          ValueError: a message that cannot be answered; a terminal shows the error instead, and reads on.
        """
        interactive = sys.stdin.isatty()
        code = 0
        for line in _lines(interactive):
            match line.strip():
                case "":
                    pass
                case "/exit":
                    break
                case "/reset":
                    self.reset()
                    status("new conversation")
                case word if word.startswith("/") and " " not in word:
                    status(f"{word}: expected a message, /reset or /exit")
                case message:
                    try:
                        code = code if self.answer(message) else 1
                    except ValueError as error:
                        if not interactive:
                            raise
                        status(f"error: {one_line(str(error))}")
        return code

    def answer(self, message: str) -> bool:
        """Adds a message and its answer to the conversation; streams the answer to stdout.

        Returns:
          Whether the answer is valid. If the logits are NaN or infinite, the conversation stays unchanged.

        Raises:
          ValueError: the conversation exceeds the cache, or the template rejects it; it stays unchanged.
        """
        conversation = [*self.messages, {"role": "user", "content": message}]
        # The template writes all special tokens, including the first.
        text = self._template.render(conversation)
        tokens = encode(self._template.path.parent, self._tokenizer, text, add_special_tokens=False)
        room = self._generator.max_length
        if len(tokens) >= room:
            hint = "/reset starts a new one, and --capacity makes room"
            raise ValueError(f"the conversation has {len(tokens)} tokens and the cache holds {room}: {hint}")
        text, reason = self._print_answer(tokens)
        if reason == "invalid":
            status("cut: the model's logits are NaN or infinite")
            return False
        self.messages = [*conversation, {"role": "assistant", "content": text}]
        self._sampling = dataclasses.replace(self._sampling, seed=(self._sampling.seed + 1) % 2**32)
        if reason == "length":
            status(f"cut after --max-new-tokens {self._sampling.max_new_tokens}")
        elif reason == "capacity":
            status(f"cut: the cache holds {room} tokens; /reset starts a new conversation, --capacity makes room")
        return True

    def _print_answer(self, tokens: list[int]) -> tuple[str, str]:
        """The text of the answer, and its finish reason."""
        answer = TextStream(self._generator.submit(tokens, self._sampling), self._tokenizer, self._stop)
        with _interrupts() as interrupted:
            for _, text in read_streams(self._generator, [answer], interrupted):
                print(printable(text, keep="\n\t"), end="", flush=True)
        print()
        return answer.text, str(answer.finish_reason)


def _lines(interactive: bool) -> Iterator[str]:
    if not interactive:
        try:
            for index, line in enumerate(sys.stdin):
                yield line if index else line.removeprefix("\ufeff")  # byte order mark
        except UnicodeDecodeError as error:
            raise ValueError(f"stdin: expected text in UTF-8, got: {error}") from error
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (gives input() a history and line editing)
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:  # clears the line, without ending the program
            print()


@contextlib.contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Records Ctrl-C for polling between tokens; a second Ctrl-C raises KeyboardInterrupt as usual."""
    received = False

    def handle(signum: int, frame: Any) -> None:
        nonlocal received
        if received:
            raise KeyboardInterrupt
        received = True

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: received
    finally:
        signal.signal(signal.SIGINT, before)
