"""CachedDecoder: caches as module state."""

import dataclasses
import re

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, serialization

from pallas_attn import caches
from pallas_attn_models import CachedDecoder, Decoder
from tests import tolerances
from tests.models.decoder.test_decoder import SMALL, compiled, random_tokens, widen

B, CAPACITY = 2, 32
TOKENS = random_tokens(0, B, 12, vocab_size=SMALL.vocab_size)


@pytest.fixture(scope="module")
def model() -> Decoder:
    model = Decoder(dataclasses.replace(SMALL, head_dim=16), rngs=nnx.Rngs(0))
    widen(model, 0)
    return model


def cached(model: Decoder, **options) -> CachedDecoder:
    return CachedDecoder(model, batch_size=B, capacity=CAPACITY, **options)


@nnx.jit
def step(decoder, tokens, real=None):
    return decoder(tokens, real=real).logits


def assert_close(actual, expected) -> None:
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerances.CACHED_LOGITS)


def test_it_goes_on_where_it_stopped(model):
    decoder = cached(model)
    pieces = [step(decoder, TOKENS[:, start : start + 4]) for start in range(0, 12, 4)]
    assert_close(np.concatenate(pieces, axis=1), compiled(model)(TOKENS).logits)
    assert decoder.next_positions.tolist() == [12, 12]
    assert not decoder.overflowed.any()


def test_padding_is_not_stored(model):
    decoder = cached(model)
    real = np.array([[False, True, True, True], [True, True, False, False]])
    first = step(decoder, TOKENS[:, :4], real)
    assert decoder.next_positions.tolist() == [3, 2]
    second = step(decoder, TOKENS[:, 4:5])
    for row, (tokens, places) in enumerate([([1, 2, 3, 4], [1, 2, 3]), ([0, 1, 4], [0, 1])]):
        alone = compiled(model)(TOKENS[row : row + 1, tokens]).logits[0]
        assert_close(first[row, np.array(places)], alone[:-1])
        assert_close(second[row, 0], alone[-1])


def test_positions_must_be_the_next_ones(model):
    decoder = cached(model)
    decoder(TOKENS[:, :4], np.arange(4, dtype=np.int32)[None])
    again = np.array([[-1, 4, 5, 6], [4, 5, 7, 8]], np.int32)
    message = "positions: expected consecutive positions from 4 in row 1, got [4, 5, 7, 8]"
    with pytest.raises(ValueError, match=re.escape(message)):
        decoder(TOKENS[:, 4:8], again)
    assert decoder.next_positions.tolist() == [4, 4], "what is refused changes nothing"
    again[1] = [4, -1, 5, -1]
    decoder(TOKENS[:, 4:8], again)
    assert decoder.next_positions.tolist() == [7, 6]


def test_positions_cannot_be_checked_under_jit(model):
    run = nnx.jit(lambda decoder, tokens, positions: decoder(tokens, positions).logits)
    with pytest.raises(ValueError, match="positions: expected None under jit"):
        run(cached(model), TOKENS[:, :4], np.tile(np.arange(4, dtype=np.int32), (B, 1)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((TOKENS[:1, :2],), "tokens: expected int32 [2, T], got [1, 2]"),
        ((TOKENS[:, :2], np.zeros((B, 3), np.int32)), "positions: expected int32 [2|1, 2], got int32 [2, 3]"),
    ],
)
def test_wrong_shapes(model, arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        cached(model)(*arguments)


def test_real_is_a_bool_for_every_token_and_stands_alone(model):
    decoder = cached(model)
    with pytest.raises(ValueError, match=re.escape("real: expected bool [2, 2], got int32 [2, 2]")):
        decoder(TOKENS[:, :2], real=np.ones((B, 2), np.int32))
    with pytest.raises(ValueError, match="real: expected None together with positions"):
        decoder(TOKENS[:, :2], np.arange(2, dtype=np.int32)[None], real=np.ones((B, 2), bool))


def test_reset_truncate_and_fork(model):
    decoder = cached(model, storage=caches.Paged(16, 4))
    step(decoder, TOKENS[:, :8])
    decoder.truncate([8, 5])
    assert decoder.next_positions.tolist() == [8, 5]
    decoder.reset([True, False])
    assert decoder.next_positions.tolist() == [0, 5]
    decoder.fork([1, 1])
    assert decoder.next_positions.tolist() == [5, 5]
    logits = step(decoder, TOKENS[:, 8:9])
    for row in range(B):
        alone = np.concatenate([TOKENS[1:2, :5], TOKENS[row : row + 1, 8:9]], axis=1)
        assert_close(logits[row, 0], compiled(model)(alone).logits[0, -1])
    decoder.reset()
    assert decoder.next_positions.tolist() == [0, 0]


@pytest.mark.parametrize("storage", [caches.Plain(), caches.Int8()], ids=["plain", "int8"])
def test_the_state_is_split_merged_and_saved(model, storage):
    options = {"policy": caches.H2O(recent=4), "storage": storage}
    decoder = cached(model, **options)
    step(decoder, TOKENS[:, :8])
    flat = nnx.to_flat_state(nnx.state(decoder, nnx.Cache))
    names = {path[-1] for path, _ in flat}
    assert {"layer_0_positions", "layer_1_lengths", "layer_0_state_score"} <= names
    saved = serialization.msgpack_serialize({path[-1]: np.asarray(variable.get_value()) for path, variable in flat})
    expected = step(decoder, TOKENS[:, 8:])

    loaded, other = serialization.msgpack_restore(saved), cached(model, **options)
    flat = nnx.to_flat_state(nnx.state(other, nnx.Cache))
    state = [(path, variable.replace(jnp.asarray(loaded[path[-1]]))) for path, variable in flat]
    nnx.update(other, nnx.from_flat_state(state))
    other = nnx.merge(*nnx.split(other, nnx.Cache, ...))
    assert other.next_positions.tolist() == [8, 8]
    np.testing.assert_array_equal(step(other, TOKENS[:, 8:]), expected)


def test_it_compiles_once(model):
    traces = 0

    @nnx.jit
    def counted(decoder, tokens):
        nonlocal traces
        traces += 1
        return decoder(tokens).logits

    decoder = cached(model, policy=caches.Window(6, sinks=1))
    for start in range(12):
        counted(decoder, TOKENS[:, start : start + 1])
    assert traces == 1
    assert decoder.next_positions.tolist() == [12, 12]


def test_another_kind_of_model_is_refused(model):
    with pytest.raises(TypeError, match="model: expected a Decoder, got int"):
        CachedDecoder(1, batch_size=1, capacity=8)  # pyright: ignore[reportArgumentType]
