"""The command line: ``pallas-attn generate``, ``chat``, ``show-mask``, ``cache-size``, ``doctor``; a file for each."""

import argparse
import io
import sys
from collections.abc import Sequence
from typing import NoReturn

import jax

from pallas_attn_models.cli import cache_size, chat, doctor, generate, show_mask
from pallas_attn_models.mask_expression import MaskExpressionError

_EXAMPLES = """\
examples:
  pallas-attn generate         complete some prompts with the model that ships with the package
  pallas-attn generate --help  what else it can do
  pallas-attn chat --model ./Llama-3.2-1B-Instruct
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
    except MaskExpressionError as error:
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
