"""Generation with every kind of cache: two executables, rows longer than the cache, exhausted pools."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pallas_attn import caches
from pallas_attn_models import Decoder, Generator, Sampling
from tests.marks import quick
from tests.models.decoder.test_decoder import SMALL, random_tokens, widen

CONFIG = dataclasses.replace(SMALL, head_dim=16)
PROMPTS = [random_tokens(row, length, vocab_size=40).tolist() for row, length in enumerate((30, 3, 17))]
SAMPLING = Sampling(max_new_tokens=24)


def decoder(**fields) -> Decoder:
    model = Decoder(dataclasses.replace(CONFIG, **fields), rngs=nnx.Rngs(0))
    widen(model, 0)
    return model


def generator(model: Decoder, **options) -> Generator:
    return Generator(model, **({"batch_size": 3, "prefill_chunk": 4} | options))


@functools.partial(jax.jit, static_argnums=0)
def following(graph, weights, tokens, length):
    """The most likely token after the first ``length`` of ``[1, 40]``."""
    places = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    logits = nnx.merge(graph, weights)(tokens, jnp.where(places < length, places, -1)).logits
    return logits[0, length - 1].argmax()


def greedy_of_the_uncached(model: Decoder, prompt: list[int], count: int) -> list[int]:
    """Recomputes the whole padded row for every token."""
    tokens = np.zeros((1, 40), np.int32)
    tokens[0, : len(prompt)] = prompt
    graph, weights = nnx.split(model)
    for length in range(len(prompt), len(prompt) + count):
        tokens[0, length] = following(graph, weights, tokens, np.int32(length))
    return tokens[0, len(prompt) : len(prompt) + count].tolist()


ROOM_FOR_ALL = {
    "window": {"policy": caches.Window(60)},
    "h2o": {"policy": caches.H2O(recent=8)},
    "one for each layer, paged": {
        "policy": [caches.Dense(), caches.QHitter(recent=8)],
        "storage": caches.Paged(16, 15),
    },
}


@pytest.mark.parametrize("name", quick(ROOM_FOR_ALL, "one for each layer, paged"))
def test_with_enough_room_tokens_equal_dense(name):
    model, options = decoder(), ROOM_FOR_ALL[name]
    dense = generator(model, capacity=80).generate(PROMPTS, SAMPLING)
    result = generator(model, capacity=80, **options).generate(PROMPTS, SAMPLING)
    assert result.tokens == dense.tokens
    assert result.finish_reasons == dense.finish_reasons == ["length"] * 3
    assert dense.tokens[1][:6] == greedy_of_the_uncached(model, PROMPTS[1], 6)


BOUNDED = {
    f"{policy}, {storage}": (policies, storages)
    for policy, policies in {
        "window": caches.Window(10, sinks=2),
        "h2o": caches.H2O(recent=4),
        "q-hitter": caches.QHitter(recent=4),
    }.items()
    for storage, storages in {"plain": caches.Plain(), "paged int8": caches.Paged(16, 3, caches.Int8())}.items()
}


@functools.cache
def bounded(name: str) -> Generator:
    policy, storage = BOUNDED[name]
    return generator(decoder(), capacity=16, policy=policy, storage=storage, max_length=500)


@pytest.mark.parametrize("name", quick(BOUNDED, "window, plain", "h2o, paged int8"))
def test_rows_may_be_longer_than_a_bounded_cache(name):
    generate = bounded(name)
    long = random_tokens(9, 400, vocab_size=40).tolist()
    for prompts in (PROMPTS, [long], [long[:5], long[:390]]):
        result = generate.generate(prompts, SAMPLING)
        assert result.finish_reasons == ["length"] * len(prompts)
        assert [len(tokens) for tokens in result.tokens] == [24] * len(prompts)
        assert np.isfinite(np.concatenate(result.logprobs)).all()
    assert generate.compile_counts == {"prefill": 1, "decode": 1}


def test_a_row_does_not_depend_on_other_rows():
    generate = generator(decoder(), capacity=16, policy=caches.H2O(recent=4), max_length=100)
    together = generate.generate(PROMPTS, SAMPLING)
    for row, prompt in enumerate(PROMPTS):
        alone = generate.generate([prompt], SAMPLING)
        assert alone.tokens[0] == together.tokens[row]
        assert alone.logprobs[0] == together.logprobs[row]


def test_the_end_of_a_row_is_max_length():
    long = random_tokens(9, 490, vocab_size=40).tolist()
    result = bounded("window, plain").generate([long], Sampling(max_new_tokens=99))
    assert result.finish_reasons == ["capacity"]
    assert len(result.tokens[0]) == 500 - len(long)


def test_requests_wait_for_pages():
    """Rows of up to 40, 13 and 27 tokens, and 4 pages of 16: room for the first two, then for the third."""
    generate = generator(decoder(), capacity=64, storage=caches.Paged(16, 4))
    result = generate.generate(PROMPTS, Sampling(max_new_tokens=10))
    plain = generator(decoder(), capacity=64).generate(PROMPTS, Sampling(max_new_tokens=10))
    assert result.finish_reasons == ["length"] * 3
    assert result.tokens == plain.tokens


def test_an_exhausted_pool_ends_the_row_with_capacity():
    generate = generator(decoder(), capacity=64, storage=caches.Paged(16, 2))
    result = generate.generate(PROMPTS, Sampling(max_new_tokens=10))
    assert result.finish_reasons == ["capacity", "length", "length"]
    # The tokens before that equal those with enough room.
    counts = (2 * 16 + 1 - len(PROMPTS[0]), 10, 10)
    expected = [greedy_of_the_uncached(generate.model, *x) for x in zip(PROMPTS, counts, strict=True)]
    assert result.tokens == expected


def test_window_layers_hold_only_the_window():
    model = decoder(sliding_windows=(8, None))
    generate = generator(model, capacity=64)
    all_dense = [caches.Dense()] * 2
    assert generate.cache_nbytes < sum(
        cache.nbytes for cache in model.init_caches(batch_size=3, capacity=64, policy=all_dense)
    )
    result = generate.generate(PROMPTS, Sampling(max_new_tokens=20))
    for row, prompt in enumerate(PROMPTS):
        assert result.tokens[row][:4] == greedy_of_the_uncached(model, prompt, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"capacity": 16, "max_length": 17},
            "max_length: expected at most capacity=16, because layer 0 keeps every token",
        ),
        (
            {"capacity": 16, "max_length": 99, "policy": caches.Window(12, 2)},
            "prefill_chunk: expected at most 3, for Window(size=12, sinks=2) of capacity=16 in layer 0, got 4",
        ),
        (
            {"capacity": [32, 16], "max_length": 99, "policy": caches.H2O(recent=14)},
            "prefill_chunk: expected at most 2, for H2O(recent=14, normalize=False, value_norm=False) of capacity=16 "
            "in layer 1, got 4",
        ),
        ({"capacity": 16, "max_length": 0}, "max_length: expected an int of at least 1, got 0"),
        ({"capacity": [16, -1]}, "capacity: expected an int of at least 1, got -1"),
    ],
)
def test_invalid_options_are_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        generator(decoder(), **options)
