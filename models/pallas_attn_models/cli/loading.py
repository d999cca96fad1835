"""Loads a checkpoint's model and tokenizer, and builds the Generator, from command-line options."""

import argparse
import contextlib
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
from tokenizers import Tokenizer

from pallas_attn_models import checkpoints, weights
from pallas_attn_models.checkpoints import CHECKPOINT_FILES, CONFIG, load_hf, local_directory
from pallas_attn_models.cli import cache_options
from pallas_attn_models.cli.output import quiet_failures, status
from pallas_attn_models.decoder import Decoder, DecoderConfig
from pallas_attn_models.generation import Generator, Limits, PromptLookup, Sampling, stop_sequences
from pallas_attn_models.text import TOKENIZER, GenerationDefaults
from pallas_attn_models.text import encode as encode_text
from pallas_attn_models.text import load_tokenizer as load_tokenizer

_TEXT_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("generation_config.json", "chat_template.jinja", "additional_chat_templates/*.jinja"),
)
_PREFILL_CHUNK = 128
_DRAFT_LENGTH = 8


def shipped_checkpoint() -> Path:
    """The directory of the model that ships with the package."""
    return weights.DIRECTORY


def model_directory(args: argparse.Namespace) -> Path:
    """The directory of ``--model``, fetched from the Hub if it is an id; default: :func:`shipped_checkpoint`."""
    if args.model is None:
        return shipped_checkpoint()
    return local_directory("--model", args.model, args.revision, (*CHECKPOINT_FILES, *_TEXT_FILES))


def config_directory(args: argparse.Namespace) -> Path:
    """The same, of which only ``config.json`` is fetched."""
    return (
        shipped_checkpoint() if args.model is None else local_directory("--model", args.model, args.revision, (CONFIG,))
    )


def read_defaults(directory: Path) -> GenerationDefaults:
    """The checkpoint's own generation defaults, reported on stderr if there are any."""
    defaults = GenerationDefaults.read(directory)
    if defaults.settings:
        status(str(defaults))
    return defaults


def load_model(args: argparse.Namespace, directory: Path) -> Decoder:
    """Loads a checkpoint, with the options of :func:`~pallas_attn_models.cli.options.add_model_options`.

    Raises:
      NotImplementedError: ``--implementation`` cannot run on this machine.
      ValueError: the checkpoint cannot be loaded; names the file, or at least the directory.
    """
    status(f"loading {directory}")
    dtype = args.dtype or ("bfloat16" if jax.default_backend() == "gpu" else "float32")
    with _naming(directory):
        progress = sys.stderr.isatty()
        return load_hf(directory, jnp.dtype(dtype), implementation=args.implementation, progress=progress)


def read_config(directory: Path) -> DecoderConfig:
    """The checkpoint's configuration; errors as in :func:`load_model`."""
    with _naming(directory / CONFIG):
        return checkpoints.read_config(directory)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Adds the path to errors that do not name it."""
    try:
        yield
    except (NotImplementedError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:
        if str(path) in str(error):
            raise
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"{path}: {kind}{error}") from error


def end_tokens(model: Decoder, tokens: Iterable[int]) -> tuple[int, ...]:
    """The unique end tokens within the model's vocabulary; reports the others on stderr."""
    tokens = [*dict.fromkeys(tokens)]
    if unknown := [token for token in tokens if token >= model.config.vocab_size]:
        size = model.config.vocab_size
        status(f"end tokens {' '.join(map(str, unknown))} are not used: the model has {size} tokens")
    return tuple(token for token in tokens if token < model.config.vocab_size)


def encode(directory: Path, tokenizer: Tokenizer, text: str, *, add_special_tokens: bool = True) -> list[int]:
    """The tokens of a text; raises ValueError, naming the tokenizer's file, on failure."""
    with quiet_failures():
        return encode_text(directory / TOKENIZER, tokenizer, text, add_special_tokens=add_special_tokens)


def make_generator(
    args: argparse.Namespace,
    model: Decoder,
    sampling: Sampling,
    *,
    batch_size: int,
    capacity: int,
    max_length: int,
    max_queue: int = 1,
) -> Generator:
    """Builds a Generator with the cache and speculation options.

    Args:
      args: ``cache``, ``storage`` and ``speculate``.
      model: the decoder.
      sampling: bounds the stop tokens and log-probabilities of every request.
      batch_size, capacity, max_queue: see :class:`~pallas_attn_models.generation.Generator`.
      max_length: tokens per row if the policy evicts old tokens; otherwise the capacity is the limit.
    """
    policy, storage = cache_options.policy(args.cache), cache_options.storage(args.storage)
    return Generator(
        model,
        batch_size=batch_size,
        capacity=capacity,
        prefill_chunk=min(_PREFILL_CHUNK, max(1, policy.longest_append(capacity))),
        policy=policy,
        storage=storage,
        max_length=max(capacity, max_length) if policy.bounded else capacity,
        max_queue=max_queue,
        limits=Limits(
            logit_bias=0,
            stop_sequences=len(stop_sequences(sampling.stop)),
            stop_length=1,
            top_logprobs=sampling.top_logprobs,
        ),
        speculation=PromptLookup(length=_DRAFT_LENGTH) if args.speculate else None,
    )
