"""A decoder so small that its Generator compiles in seconds, and random requests for it."""

import dataclasses
from collections.abc import Iterator

import jax
import numpy as np
from flax import nnx

import pallas_attn as pa
from pallas_attn_models import Decoder, DecoderConfig, Generator, Sampling
from pallas_attn_models.generation.generator import GenerationResult, StreamEvent
from pallas_attn_models.generation.requests import Completion, Handle

EOS = 7
CONFIG = DecoderConfig(
    vocab_size=50,
    hidden_size=32,
    intermediate_size=48,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    eos_token_ids=(EOS,),
)
ONE_EACH = {"prefill": 1, "decode": 1}


def make_model(seed: int = 3, config: DecoderConfig = CONFIG, wide: float = 8.0) -> Decoder:
    """Wide weights: uneven attention and a clear most likely token."""
    model = Decoder(config, rngs=nnx.Rngs(seed), implementation="xla", block_sizes=pa.BlockSizes(16, 16))
    nnx.update(model, jax.tree.map(lambda x: x * wide if x.ndim == 2 else x, nnx.state(model)))
    return model


def prompt_of(length: int, seed: int = 0) -> list[int]:
    """Random tokens other than the end token."""
    return np.random.default_rng([seed, length]).integers(10, CONFIG.vocab_size, length).tolist()


@dataclasses.dataclass(frozen=True)
class Ask:
    """A request: arguments of ``generate`` for one prompt."""

    prompt: list[int]
    sampling: Sampling
    negative: list[int] | None = None
    scale: float = 1.0
    num_samples: int = 1

    def submit(self, generator: Generator) -> Handle:
        return generator.submit(self.prompt, self.sampling, (), self.negative, self.scale)

    def generate(self, generator: Generator) -> list[Completion]:
        return completions(generator.generate(*self._arguments()))

    def stream(self, generator: Generator, interval: int) -> Iterator[StreamEvent]:
        return generator.stream(*self._arguments(), interval=interval)

    def samples(self) -> "list[Ask]":
        """One request per sample."""
        seeds = [(self.sampling.seed + index) % 2**32 for index in range(self.num_samples)]
        samplings = [dataclasses.replace(self.sampling, seed=seed) for seed in seeds]
        return [dataclasses.replace(self, sampling=sampling, num_samples=1) for sampling in samplings]

    def _arguments(self) -> tuple:
        negatives = None if self.negative is None else [self.negative]
        return [self.prompt], self.sampling, (), negatives, self.scale, self.num_samples


def completions(result: GenerationResult) -> list[Completion]:
    """The entries of a result."""
    columns = result.tokens, result.logprobs, result.top_logprobs, result.finish_reasons
    return [Completion(*entry) for entry in zip(*columns, strict=True)]


def random_ask(rng: np.random.Generator, longest: int, budget: int = 20) -> Ask:
    """A random prompt, usually with random sampling options; sometimes guided."""

    def tokens(low: int, high: int) -> tuple[int, ...]:
        return tuple(rng.integers(10, CONFIG.vocab_size, rng.integers(low, high)).tolist())

    most = int(rng.integers(1, budget + 1))
    options = {
        "temperature": float(rng.choice([0.0, 0.7, 1.0, 3.0])),
        "top_k": int(rng.choice([1, 5, 1000])),
        "top_p": float(rng.choice([0.3, 0.9])),
        "min_p": float(rng.choice([0.01, 0.3])),
        "repetition_penalty": float(rng.choice([0.8, 1.5])),
        "presence_penalty": float(rng.choice([-1.0, 2.0])),
        "frequency_penalty": float(rng.choice([-0.5, 1.0])),
        "logit_bias": {token: float(rng.normal() * 5) for token in tokens(1, 9)},
        "forbidden_tokens": tokens(1, 20),
        "min_new_tokens": int(rng.integers(1, most + 1)),
        "stop": [tokens(1, 3), *tokens(1, 3)],
        "top_logprobs": int(rng.integers(1, 9)),
    }
    options = {name: value for name, value in options.items() if rng.random() < 0.4} if rng.random() < 0.7 else {}
    sampling = Sampling(max_new_tokens=most, seed=int(rng.integers(2**32)), **options)
    prompt = prompt_of(int(rng.integers(1, longest)), int(rng.integers(2**20)))
    if rng.random() < 0.8:
        return Ask(prompt, sampling)
    return Ask(prompt, sampling, prompt_of(int(rng.integers(1, longest))), float(rng.choice([0.0, 0.5, 1.0, 1.5])))
