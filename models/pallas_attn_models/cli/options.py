"""Options that several commands share."""

import argparse
from pathlib import Path

import pallas_attn as pa
from pallas_attn_models.decoder import FLOAT_DTYPES
from pallas_attn_models.generation import Sampling
from pallas_attn_models.text import GenerationDefaults

_SETTINGS = (
    *("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty"),
    *("frequency_penalty", "min_new_tokens"),
)


def whole_number(text: str) -> int:
    """The type of an option that counts something.

    Raises:
      argparse.ArgumentTypeError: it is no integer, or one that is no int32.
    """
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"invalid int value: {text!r}") from None
    if abs(value) >= 2**31:
        raise argparse.ArgumentTypeError(f"expected an int below 2^31, got {text}")
    return value


def add_model_options(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """Which model, and how it computes."""
    model = parser.add_argument_group("model")
    what = "config.json, safetensors and tokenizer.json of a Llama"
    model.add_argument("--model", type=Path, metavar="DIR", required=required, help=what)
    model.add_argument("--dtype", choices=FLOAT_DTYPES, help="default: bfloat16 on a GPU, else float32")
    model.add_argument("--implementation", choices=[*pa.implementations()], help="of attention; default: the best")


def add_sampling_options(parser: argparse.ArgumentParser, *, max_new_tokens: int, seed: str) -> None:
    """How the new tokens are chosen, and what ends them; :func:`sampling` reads it back.

    Args:
      max_new_tokens: the default.
      seed: what the seed is of, in words.
    """
    group = parser.add_argument_group(
        "sampling", "What is not given is what the model's generation_config.json says, or else the default."
    )
    help = f"default {max_new_tokens}"
    group.add_argument("--max-new-tokens", type=whole_number, default=max_new_tokens, metavar="N", help=help)
    group.add_argument("--min-new-tokens", type=whole_number, metavar="N", help="nothing ends a text before; default 0")
    group.add_argument("--temperature", type=float, metavar="X", help="default 0: greedy")
    group.add_argument("--top-k", type=whole_number, metavar="K", help="only the K likeliest tokens; default 0: off")
    group.add_argument("--top-p", type=float, metavar="P", help="only the likeliest, up to this much; default 1: off")
    help = "only tokens P times as likely as the likeliest; default 0: off"
    group.add_argument("--min-p", type=float, metavar="P", help=help)
    help = "of tokens that are there already, prompt included: divides logits; default 1: off"
    group.add_argument("--repetition-penalty", type=float, metavar="X", help=help)
    help = "of new tokens that came before: subtracted; default 0: off"
    group.add_argument("--presence-penalty", type=float, metavar="X", help=help)
    help = "the same, as many times as they came; default 0: off"
    group.add_argument("--frequency-penalty", type=float, metavar="X", help=help)
    help = "ends a text, which is cut before it; may be repeated"
    group.add_argument("--stop", action="append", default=[], metavar="TEXT", help=help)
    group.add_argument("--seed", type=int, default=0, metavar="N", help=seed)


def sampling(args: argparse.Namespace, defaults: GenerationDefaults, *, seed: int, top_logprobs: int = 0) -> Sampling:
    """What the options say, and the checkpoint where they do not.

    Raises:
      ValueError: a value out of its range, or an empty ``--stop``.
    """
    if "" in args.stop:
        raise ValueError("--stop: expected text, got ''")
    given = {name: value for name in _SETTINGS if (value := getattr(args, name)) is not None}
    settings = {**defaults.settings, **given}
    return Sampling(**settings, seed=seed, stop=defaults.eos_token_ids, top_logprobs=top_logprobs)


def add_speculation_option(group: argparse._ActionsContainer) -> None:
    """Whether tokens are guessed ahead."""
    help = "guess several tokens ahead, from what follows the same words earlier in the text; never changes the text"
    group.add_argument("--speculate", nargs="?", const="lookup", choices=["lookup"], help=help)


def add_cache_options(group: argparse._ActionsContainer) -> None:
    """Which policy and storage the KV caches have."""
    group.add_argument("--cache", default="dense", metavar="POLICY", help="dense, window(..), h2o(..); see cache-size")
    group.add_argument("--storage", default="plain", metavar="STORAGE", help="plain, int8, paged(..); see cache-size")
