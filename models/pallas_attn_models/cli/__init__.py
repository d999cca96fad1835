"""The command line: ``pallas-attn generate``, ``chat``, ``show-mask``, ``cache-size``, ``doctor``; one file each."""

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
  pallas-attn generate --help  show all options
  pallas-attn chat --model ./Llama-3.2-1B-Instruct
  pallas-attn show-mask "causal & sliding_window(256)" --q 2048
  pallas-attn cache-size --capacity 4096 --storage int8
  pallas-attn doctor           check what runs on this machine
  pallas-attn doctor --model openai/gpt-oss-20b"""
# Errors that user input, files or the machine can cause. Any other exception is a bug and keeps its traceback.
_EXPECTED = (ValueError, TypeError, OSError, ImportError, RuntimeError, ArithmeticError, MemoryError)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; ``argv`` excludes the program name, default ``sys.argv[1:]``.

    Returns:
      The exit code: 0; 1 if ``doctor`` found wrong numbers or a checkpoint that cannot be loaded, or a model's logits
      were NaN or infinite; 2 for an error that the user can fix, with one line on stderr; 130 after Ctrl-C; 141 if
      stdout was closed by its reader.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # the terminal may not encode every character
    try:
        args = _parser().parse_args(argv)
        code = args.command(args)
        sys.stdout.flush()
        return code
    except MaskExpressionError as error:
        print("error:", printable(str(error), keep="\n"), file=sys.stderr)  # keeps the lines with expression and caret
        return 2
    except BrokenPipeError:
        _drop_stdout()
        return 141
    except _EXPECTED as error:
        _print_error(str(error) or type(error).__name__)
        if isinstance(error, OSError):
            _drop_stdout()
        return 2
    except KeyboardInterrupt:
        return 130
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of the tokenizers library; not an Exception
            raise
        _print_error(f"tokenizer.json: {str(error).partition(chr(10))[0]}")
        return 2


def _print_error(message: str) -> None:
    print("error:", one_line(message), file=sys.stderr)


def _drop_stdout() -> None:
    """Discards output that a broken stdout does not accept; otherwise Python would retry, and fail, at exit."""
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
        description="Generate text with Flax decoders whose attention reads only live KV blocks.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in (generate, chat, show_mask, cache_size, doctor):
        command.add_parser(commands)
    return parser
