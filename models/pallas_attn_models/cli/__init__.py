"""The command line: ``pallas-attn generate``, ``chat``, ``show-mask``, ``cache-size``, ``doctor``; a file for each."""

import argparse
import contextlib
import io
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from pallas_attn_models.cli import cache_size, chat, doctor, generate, show_mask
from pallas_attn_models.cli.mask_expression import MaskExpressionError
from pallas_attn_models.cli.output import one_line, printable

_EXAMPLES = """\
examples:
  pallas-attn generate         complete some prompts with the model that ships with the package
  pallas-attn generate --help  what else it can do
  pallas-attn chat --model ./Llama-3.2-1B-Instruct
  pallas-attn show-mask "causal & sliding_window(256)" --q 2048
  pallas-attn cache-size --capacity 4096 --storage int8
  pallas-attn doctor           see whether everything runs here"""
# What a user, his files or his machine can cause. Anything else is a fault of this program, and its traceback helps.
_EXPECTED = (ValueError, TypeError, OSError, ImportError, RuntimeError, ArithmeticError, MemoryError)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; ``argv`` without the program's name, default ``sys.argv``.

    Returns:
      The exit code: 0; 1 if ``doctor`` found wrong numbers, or if a model's logits were no numbers; 2 for what a user
      can set right, in one line on stderr; 130 after Ctrl-C, and 141 if nobody reads stdout any more.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a completion may hold what the terminal cannot show
    try:
        args = _parser().parse_args(argv)
        code = args.command(args)
        sys.stdout.flush()
        return code
    except MaskExpressionError as error:
        print("error:", printable(str(error), keep="\n"), file=sys.stderr)  # with the expression and a caret under it
        return 2
    except BrokenPipeError:
        _drop_stdout()
        return 141
    except _EXPECTED as error:
        _say(str(error) or type(error).__name__)
        if isinstance(error, OSError):
            _drop_stdout()
        return 2
    except KeyboardInterrupt:
        return 130
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of the tokenizers library; no Exception
            raise
        _say(f"tokenizer.json: {str(error).partition(chr(10))[0]}")
        return 2


def _say(message: str) -> None:
    print("error:", one_line(message), file=sys.stderr)


def _drop_stdout() -> None:
    """What is still to be written to a stdout that does not take it; else Python would try once more when it ends."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        return
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see {self.prog} --help)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="pallas-attn",
        description="Text from Flax decoders whose attention reads only the KV blocks that matter.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in (generate, chat, show_mask, cache_size, doctor):
        command.add_parser(commands)
    return parser
