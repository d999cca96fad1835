"""From a directory and options to a Generator and a tokenizer."""

import argparse
import importlib.resources
from pathlib import Path

import jax
import jax.numpy as jnp
from tokenizers import Tokenizer

from pallas_attn_models import cache_options
from pallas_attn_models.checkpoint import load_hf
from pallas_attn_models.cli.output import status
from pallas_attn_models.decoder import Decoder
from pallas_attn_models.generation_config import GenerationDefaults
from pallas_attn_models.generator import Generator
from pallas_attn_models.sampling import Limits, Sampling, stop_sequences
from pallas_attn_models.speculation import PromptLookup

_PREFILL_CHUNK = 128
_DRAFT_LENGTH = 8


def shipped_checkpoint() -> Path:
    """The directory of the model that comes with the package."""
    return Path(str(importlib.resources.files("pallas_attn_models") / "checkpoint"))


def read_defaults(directory: Path) -> GenerationDefaults:
    """What the checkpoint asks for itself, said on the status line if it asks for anything."""
    defaults = GenerationDefaults.read(directory)
    if defaults.settings:
        status(str(defaults))
    return defaults


def load_model(args: argparse.Namespace, directory: Path) -> Decoder:
    """The decoder of a directory, with the options of :func:`~pallas_attn_models.cli.options.add_model_options`."""
    status(f"loading {directory}")
    dtype = args.dtype or ("bfloat16" if jax.default_backend() == "gpu" else "float32")
    return load_hf(directory, jnp.dtype(dtype), implementation=args.implementation)


def load_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer of a directory.

    Raises:
      FileNotFoundError: there is none.
      ValueError: its file is not one of the tokenizers library.
    """
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected the tokenizer of the model, found none")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more special
        raise ValueError(f"{path}: expected a file of the tokenizers library, got: {error}") from error


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
    """A Generator with the cache and speculation that the options say.

    Args:
      args: ``cache``, ``storage`` and ``speculate``.
      model: the decoder.
      sampling: no request asks for more stop tokens or log-probabilities than this one.
      batch_size, capacity, max_queue: see :class:`~pallas_attn_models.generator.Generator`.
      max_length: tokens that a row can have, where the policy lets old ones go; otherwise it is the capacity.
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
