"""Speculating and plain Generators, each compiled once, and their requests."""

import dataclasses
import functools
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax import Array

from pallas_attn import caches
from pallas_attn_models import Decoder, Generator, Sampling
from pallas_attn_models.decoder.config import DecoderConfig
from pallas_attn_models.generation.requests import Completion
from pallas_attn_models.generation.speculation import DraftModel, Feed, PromptLookup
from pallas_attn_models.generation.state import State
from tests.models import small_model
from tests.models.small_model import EOS, Ask

VOCAB = 16
BATCH, CAPACITY, CHUNK = 4, 128, 16
CONFIG = DecoderConfig(
    vocab_size=VOCAB,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    eos_token_ids=(EOS,),
)


def make_model(seed: int = 0, config: DecoderConfig = CONFIG, wide: float = 5.0) -> Decoder:
    """Wide weights: the most likely tokens are clear, but not certain."""
    return small_model.make_model(seed, config, wide)


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng([seed, length]).integers(8, VOCAB, length).tolist()


def asked() -> list[Ask]:
    """Every setting in one batch; more requests than rows. The seed identifies a request."""
    random, endless = {"temperature": 1.0}, {"logit_bias": {EOS: -50.0}}
    settings = [
        (1, {}),
        (17, {"top_logprobs": 4}),
        (5, random | {"top_logprobs": 2}),
        (9, {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.02}),
        (12, {"temperature": 1.4, "repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.2}),
        (3, {"repetition_penalty": 1.2, "frequency_penalty": 0.5}),
        (7, random | {"logit_bias": {9: 2.5, 3: -4.0}, "forbidden_tokens": (11, 12)}),
        (2, random | {"min_new_tokens": 11, "stop": (8, 9, 10)}),
        (20, {"temperature": 0.4, "stop": (13, [10, 10])}),
        *((15 + last, random | endless | {"stop": [[first, last] for first in range(VOCAB)]}) for last in (2, 3, 4)),
        *((length, random | endless) for length in (3, CAPACITY - 14, CAPACITY - 3)),
        *((4, random | {"max_new_tokens": budget}) for budget in (1, 2, 3)),
        *((6, endless | {"max_new_tokens": budget}) for budget in (5, 6, 7)),
    ]
    requests = [
        Ask(prompt_of(length), Sampling(**({"max_new_tokens": 30, "seed": seed} | fields)))
        for seed, (length, fields) in enumerate(settings)
    ]
    first = len(requests)
    guided = [(6, 11, {"temperature": 0.9}, 1.7), (19, 2, {}, 0.6), (3, CAPACITY - 9, {"stop": (12, [9, 9])}, 1.2)]
    for index, (length, other, fields, scale) in enumerate(guided):
        sampling = Sampling(max_new_tokens=20, seed=first + index, **fields)
        requests.insert(4 * index, Ask(prompt_of(length), sampling, prompt_of(other, seed=1), scale))
    return requests


REQUESTS = asked()


@dataclasses.dataclass(frozen=True, eq=False)
class Hints:
    """Drafts the known continuation, with ``wrong`` of four tokens replaced; sometimes drafts nothing.

    Attributes:
      known: int32 ``[seeds, n]``, the new tokens of each request.
      wrong: replaced tokens, out of four.
    """

    known: np.ndarray
    length: int
    num_candidates: int
    wrong: int
    draft_model: None = None

    def draft(self, state: State, may: Array, feed: Feed) -> tuple[State, Array, Array]:
        drafts, found = self.of(state.rows.request.sampling.seed, state.rows.num_new)
        return state, drafts, found & may

    def of(self, seed: Array, number: Array) -> tuple[Array, Array]:
        """Drafts for rows with these seeds and numbers of new tokens."""
        candidate = jnp.arange(self.num_candidates, dtype=jnp.int32)[None, :, None]
        ahead = jnp.arange(self.length, dtype=jnp.int32)[None, None]
        row, number = jnp.asarray(seed).astype(jnp.int32)[:, None, None], jnp.asarray(number)[:, None, None]
        noise = _noise(((row * 71 + number) * 71 + ahead) * 71 + candidate)
        known = jnp.asarray(self.known).at[row, number + ahead + 0 * candidate].get(mode="fill", fill_value=0)
        drafts = jnp.where(noise % 4 < self.wrong, noise // 4 % VOCAB, known)
        return drafts, (_noise(row * 1009 + number) % 6 > 0)[:, 0, 0]


def _noise(x: Array) -> Array:
    """Pseudorandom non-negative int32."""
    x = x.astype(jnp.uint32) * jnp.uint32(2654435761)
    x = (x ^ (x >> 15)) * jnp.uint32(2246822519)
    return ((x ^ (x >> 13)) >> 2).astype(jnp.int32)


SLIDING = dataclasses.replace(CONFIG, sliding_windows=(8, None))
SMALLER = dataclasses.replace(CONFIG, hidden_size=8, num_layers=1)
SMALLER_SLIDING = dataclasses.replace(SMALLER, sliding_windows=(8,))
CHAIN, TREE = PromptLookup(length=5), PromptLookup(length=4, ngram=2, num_candidates=3)
# By name: the plain Generator to compare with, and the options.
VARIANTS: dict[str, tuple[str, Callable[[], dict]]] = {
    "chain": ("plain", lambda: {"speculation": CHAIN}),
    "tree": ("plain", lambda: {"speculation": TREE}),
    "same model": ("plain", lambda: {"speculation": DraftModel(model_of("plain"), length=4)}),
    "other model": ("plain", lambda: {"speculation": DraftModel(make_model(1, SMALLER_SLIDING), length=3)}),
    "hints": ("plain", lambda: {"speculation": Hints(known_tokens(), 5, 3, wrong=1)}),
    "garbage": ("plain", lambda: {"speculation": Hints(known_tokens(), 4, 1, wrong=4)}),
    "tree, paged int8": ("int8", lambda: {"speculation": TREE, "storage": caches.Paged(16, 24, caches.Int8())}),
    "hints, window": ("window", lambda: {"speculation": Hints(known_tokens("window"), 7, 1, 1)} | OPTIONS["window"]),
    "same model, sliding": ("sliding", lambda: {"speculation": DraftModel(model_of("sliding"), length=4)}),
}
OPTIONS = {"int8": {"storage": caches.Int8()}, "window": {"policy": caches.Window(20, sinks=2), "capacity": 48}}
CONFIGS = {"sliding": SLIDING}


@functools.cache
def model_of(plain: str) -> Decoder:
    return make_model(config=CONFIGS.get(plain, CONFIG))


@functools.cache
def generator(name: str) -> Generator:
    plain, options = VARIANTS.get(name, (name, lambda: OPTIONS.get(name, {})))
    sizes = {"batch_size": BATCH, "capacity": CAPACITY, "max_length": CAPACITY, "prefill_chunk": CHUNK}
    return Generator(model_of(plain), **(sizes | options()))


@dataclasses.dataclass
class Ran:
    """The results of ``REQUESTS``.

    Attributes:
      completions: one per request.
      drawn: all new tokens per request, including the stop sequence.
      counted: row steps, drafted and accepted tokens, in total.
    """

    completions: list[Completion]
    drawn: list[list[int]]
    counted: tuple[int, int, int]


@functools.cache
def ran(name: str) -> Ran:
    generator_ = generator(name)
    generator_.warmup()
    before, drawn = generator_.spent, [[] for _ in REQUESTS]
    handles = []
    for tokens, request in zip(drawn, REQUESTS, strict=True):
        handle = request.submit(generator_)

        def extend(new, *rest, tokens=tokens, extend=handle.extend):
            tokens += new
            extend(new, *rest)

        handle.extend = extend
        handles.append(handle)
    generator_.run()
    spent = generator_.spent.since(before)
    return Ran([handle.result() for handle in handles], drawn, (spent.row_steps, spent.drafted, spent.accepted))


def known_tokens(plain: str = "plain") -> np.ndarray:
    known = np.zeros((len(REQUESTS), CAPACITY), np.int32)
    for request, tokens in zip(REQUESTS, ran(plain).drawn, strict=True):
        known[request.sampling.seed, : len(tokens)] = tokens
    return known


def looked_up(tokens: list[int], speculation: PromptLookup) -> list[list[int]]:
    """The drafts of PromptLookup, by sequential search."""
    places = []
    for place in range(len(tokens) - 1):
        agree = 0
        while agree < min(speculation.ngram, place + 1) and tokens[place - agree] == tokens[len(tokens) - 1 - agree]:
            agree += 1
        if agree:
            places.append((agree, place))
    drafts: dict[int, list[int]] = {}
    for _, place in sorted(places, reverse=True):
        following = list(tokens)
        while len(following) < len(tokens) + speculation.length:
            following.append(following[place + 1 + len(following) - len(tokens)])
        drafts.setdefault(tokens[place + 1], following[len(tokens) :])
    return list(drafts.values())[: speculation.num_candidates]


def forget() -> None:
    """Releases the compiled Generators; called at the end of a test module."""
    for cached in (generator, model_of, ran):
        cached.cache_clear()
