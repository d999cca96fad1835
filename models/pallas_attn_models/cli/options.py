"""Options that several commands share."""

import argparse

import pallas_attn as pa
from pallas_attn_models.decoder import FLOAT_DTYPES
from pallas_attn_models.generation import Sampling
from pallas_attn_models.text import GenerationDefaults

_SETTINGS = (
    *("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty"),
    *("frequency_penalty", "min_new_tokens"),
)


def int32(text: str) -> int:
    """The type of an integer option.

    Raises:
      argparse.ArgumentTypeError: not an integer, or not an int32.
    """
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"invalid int value: {text!r}") from None
    if abs(value) >= 2**31:
        raise argparse.ArgumentTypeError(f"expected an int below 2^31, got {text}")
    return value


def add_model_options(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """Adds the choice of the model, its dtype and its attention implementation."""
    model = parser.add_argument_group("model")
    help = "directory with config.json, safetensors and tokenizer.json; or org/name on the Hugging Face Hub"
    add_model_option(model, required=required, help=help)
    model.add_argument("--dtype", choices=FLOAT_DTYPES, help="default: bfloat16 on a GPU, else float32")
    help = "attention implementation; default: the best available"
    model.add_argument("--implementation", choices=[*pa.implementations()], help=help)


def add_model_option(group: argparse._ActionsContainer, *, required: bool = False, help: str) -> None:
    """Adds ``--model`` and ``--revision``."""
    group.add_argument("--model", metavar="DIR|ORG/NAME", required=required, help=help)
    help = "branch, tag or commit of a model on the Hub; default: its main branch"
    group.add_argument("--revision", metavar="REV", help=help)


def add_sampling_options(parser: argparse.ArgumentParser, *, max_new_tokens: int, seed: str) -> None:
    """Adds sampling settings and stop conditions; :func:`sampling` reads them back.

    Args:
      max_new_tokens: the default.
      seed: help text of ``--seed``.
    """
    group = parser.add_argument_group(
        "sampling", "Defaults below apply where the model's generation_config.json has no value."
    )
    help = f"token budget; default {max_new_tokens}"
    group.add_argument("--max-new-tokens", type=int32, default=max_new_tokens, metavar="N", help=help)
    help = "minimum tokens before any stop applies; default 0"
    group.add_argument("--min-new-tokens", type=int32, metavar="N", help=help)
    help = "divides the logits; default 0: greedy"
    group.add_argument("--temperature", type=float, metavar="X", help=help)
    group.add_argument("--top-k", type=int32, metavar="K", help="keep the K most likely tokens; default 0: off")
    help = "keep the most likely tokens up to total probability P; default 1: off"
    group.add_argument("--top-p", type=float, metavar="P", help=help)
    help = "keep tokens at least P times as likely as the most likely one; default 0: off"
    group.add_argument("--min-p", type=float, metavar="P", help=help)
    help = "divides the logits of tokens in the prompt and completion so far; default 1: off"
    group.add_argument("--repetition-penalty", type=float, metavar="X", help=help)
    help = "subtracted from the logits of tokens in the completion so far; default 0: off"
    group.add_argument("--presence-penalty", type=float, metavar="X", help=help)
    help = "the same, times the number of occurrences; default 0: off"
    group.add_argument("--frequency-penalty", type=float, metavar="X", help=help)
    help = "stop string: ends the text and is not part of it; may be repeated"
    group.add_argument("--stop", action="append", default=[], metavar="TEXT", help=help)
    group.add_argument("--seed", type=int, default=0, metavar="N", help=seed)


def sampling(args: argparse.Namespace, defaults: GenerationDefaults, *, seed: int, top_logprobs: int = 0) -> Sampling:
    """The options, with the checkpoint's defaults for those not given.

    Raises:
      ValueError: a value out of range, or an empty ``--stop``.
    """
    if "" in args.stop:
        raise ValueError("--stop: expected a non-empty string, got ''")
    given = {name: value for name in _SETTINGS if (value := getattr(args, name)) is not None}
    settings = {**defaults.settings, **given}
    return Sampling(**settings, seed=seed, stop=defaults.eos_token_ids, top_logprobs=top_logprobs)


def add_speculation_option(group: argparse._ActionsContainer) -> None:
    """Adds speculative decoding."""
    help = "speculative decoding by prompt lookup: faster for repetitive text, with the same output"
    group.add_argument("--speculate", nargs="?", const="lookup", choices=["lookup"], help=help)


def add_cache_options(group: argparse._ActionsContainer) -> None:
    """Adds the policy and storage of the KV caches."""
    group.add_argument("--cache", default="dense", metavar="POLICY", help="dense, window(..), h2o(..); see cache-size")
    group.add_argument("--storage", default="plain", metavar="STORAGE", help="plain, int8, paged(..); see cache-size")
