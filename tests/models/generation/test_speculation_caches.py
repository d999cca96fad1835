"""Speculation: the caches hold the accepted tokens, and are updated in place."""

import dataclasses
import math
import re

import numpy as np
import pytest

from pallas_attn import caches
from pallas_attn_models import Generator, Sampling
from pallas_attn_models.generation.requests import Handle
from pallas_attn_models.generation.speculation import DraftModel
from tests import tolerances
from tests.marks import quick
from tests.models import speculations
from tests.models.small_model import EOS
from tests.models.speculations import CHUNK, CONFIG, SMALLER, TREE, VARIANTS, generator, make_model, prompt_of

Snapshot = tuple[list[np.ndarray], list[np.ndarray], list[int]]


@pytest.fixture(autouse=True, scope="module")
def _forgotten_generators():
    yield
    speculations.forget()


def snapshots(generator_: Generator, handles: list[Handle]) -> dict[tuple[int, int], Snapshot]:
    """By handle and number of its tokens: positions, keys and values, and lengths of its row in every layer."""
    found = {}
    for group in generator_._scheduler._active:
        row, index = group.rows[0], handles.index(group.handles[0])
        if not group.prefills:
            of_row = [(cache.positions[row, 0], cache.key[row], cache.value[row]) for cache in _caches(generator_)]
            positions, keys, values = ([np.asarray(x) for x in xs] for xs in zip(*of_row, strict=True))
            held = [np.stack(pair) for pair in zip(keys, values, strict=True)]
            lengths = [int(cache.lengths[row]) for cache in _caches(generator_)]
            found[index, len(group.prompt) + len(group.handles[0].tokens)] = positions, held, lengths
    return found


def _caches(generator_: Generator) -> tuple[caches.KVCache, ...]:
    return generator_._engine._state.caches


def run_in_steps(name: str) -> dict[tuple[int, int], Snapshot]:
    """Snapshots after every step of three requests, until they are cancelled."""
    generator_, found = generator(name), {}
    requests = [(21, 0.0), (2, 0.5), (33, 1.0)]
    handles = [
        generator_.submit(prompt_of(length), Sampling(60, temperature=temperature, logit_bias={EOS: -50.0}, seed=seed))
        for seed, (length, temperature) in enumerate(requests)
    ]
    while (name not in VARIANTS or any(len(handle.tokens) < 16 for handle in handles)) and generator_.step(1):
        found |= snapshots(generator_, handles)
    for handle in handles:
        handle.cancel()
    generator_.run()
    assert all((cache.positions == -1).all() for cache in _caches(generator_))
    return found


@pytest.mark.parametrize(
    "name", quick(["chain", "tree", "hints", "same model", "other model", "hints, window"], "tree", "hints, window")
)
def test_caches_hold_the_accepted_tokens(name):
    plain, actual = run_in_steps(VARIANTS[name][0]), run_in_steps(name)
    assert len(actual) > 10
    if name not in ("chain", "tree"):
        assert len({length for _, length in actual}) < len({length for _, length in plain})
    for at, (positions, held, lengths) in actual.items():
        length = at[1] - 1  # no cache holds the newest token
        expected_positions, expected, _ = plain[at]
        layers = CONFIG.num_layers
        assert lengths[:layers] == [length] * layers
        assert all(length - 1 <= one <= length for one in lengths[layers:])
        for layer, position in enumerate(positions):
            real = position >= 0
            if layer < layers and name != "hints, window":
                np.testing.assert_array_equal(position, expected_positions[layer])
            elif layer < layers:  # drafts that were rejected may have evicted tokens before the window
                kept = expected_positions[layer]
                np.testing.assert_array_equal(real, real & (position == kept))
                needed = (kept >= 0) & ((kept >= length - 20) | (kept < 2))
                assert (real >= needed).all()
            else:
                newest = np.sort(position[real])[-7:]  # the keys of a query with a window of 8
                np.testing.assert_array_equal(newest, np.arange(lengths[layer])[-len(newest) :])
                assert len(newest) == min(7, lengths[layer])
            if layer < layers or name == "same model":
                error = np.abs(held[layer] - expected[layer % layers])[:, real].max()
                assert error <= tolerances.CACHED_LOGITS


@pytest.mark.parametrize("speculation", ["tree", "draft model"])
def test_caches_are_updated_in_place(speculation):
    capacity = 9984  # a size that no other array has
    model = make_model(config=dataclasses.replace(SMALLER, head_dim=32))
    drafts = TREE if speculation == "tree" else DraftModel(model, 2)
    generator_ = Generator(model, batch_size=3, capacity=capacity, prefill_chunk=CHUNK, speculation=drafts)
    engine = generator_._engine
    state = engine.abstract_state()
    compiled = engine._decode.lower(engine._weights(), state, np.int32(1), np.bool_(False)).compile()
    text = compiled.as_text()
    shape = rf"\w+\[3,{capacity},1,32\]"
    assert all(re.fullmatch(shape, f"f32[{','.join(map(str, cache.key.shape))}]") for cache in state.caches)
    assert re.search(shape, text)
    assert "input_output_alias=" in text.partition("\n")[0]
    assert not re.search(rf"= {shape}\S* copy\(", text)
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= sum(cache.nbytes for cache in state.caches)
    assert memory.temp_size_in_bytes < math.prod(state.caches[0].key.shape) * 4
