"""Speculation: errors before anything is compiled."""

import dataclasses
import re

import pytest
from flax import nnx

from pallas_attn import caches
from pallas_attn_models import Decoder, Generator
from pallas_attn_models.generation.speculation import DraftModel, PromptLookup, num_nodes
from tests.models.speculations import CHAIN, CHUNK, SMALLER, TREE, model_of


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PromptLookup(0), "length: expected an int of at least 1, got 0"),
        (lambda: PromptLookup(2.0), "length: expected an int of at least 1, got 2.0"),
        (lambda: PromptLookup(True), "length: expected an int of at least 1, got True"),
        (lambda: PromptLookup(ngram=0), "ngram: expected an int of at least 1, got 0"),
        (lambda: PromptLookup(num_candidates=0), "num_candidates: expected an int of at least 1, got 0"),
        (lambda: PromptLookup(16), "length, num_candidates: expected at most 15 draft tokens in total, got 1 of 16"),
        (lambda: PromptLookup(4, num_candidates=4), "at most 15 draft tokens in total, got 4 of 4"),
        (lambda: DraftModel(model_of("plain"), 16), "at most 15 draft tokens in total, got 1 of 16"),
        (lambda: DraftModel(model_of("plain"), 0), "length: expected an int of at least 1, got 0"),
    ],
)
def test_sizes_out_of_range(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


def test_the_largest_sizes():
    assert num_nodes(PromptLookup(15)) == num_nodes(PromptLookup(5, num_candidates=3)) == 16


def test_a_draft_model_of_another_kind():
    with pytest.raises(TypeError, match="model: expected a Decoder, got str"):
        DraftModel("path/to/model")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"speculation": CHAIN, "policy": caches.H2O(recent=8)}, "caches that can truncate 6 tokens, got H2O("),
        (
            {"speculation": CHAIN, "policy": [caches.Dense(), caches.QHitter(recent=8)]},
            "caches that can truncate 6 tokens, got QHitter(recent=8",
        ),
        (
            {"speculation": CHAIN, "policy": caches.Window(44), "max_length": 200, "prefill_chunk": 4},
            "speculation: expected caches that can truncate 6 tokens, got Window(size=44, sinks=0) of capacity=48",
        ),
        (
            {"speculation": TREE, "policy": caches.Window(16)},
            "speculation: expected caches that can truncate 13 tokens, from a tree: Dense, got Window(size=16",
        ),
        (
            {"speculation": DraftModel(Decoder(dataclasses.replace(SMALLER, vocab_size=17), rngs=nnx.Rngs(0)))},
            "speculation: expected a draft model with vocab_size=16, got 17",
        ),
    ],
    ids=["H2O", "one layer H2O", "no slack", "a tree in a window", "another vocabulary"],
)
def test_caches_that_cannot_truncate_are_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Generator(model_of("plain"), **({"batch_size": 2, "capacity": 48} | options))


def test_a_tree_in_layers_with_a_window_is_refused():
    with pytest.raises(ValueError, match=r"from a tree: Dense, got Window\(size=8"):
        Generator(model_of("sliding"), batch_size=2, capacity=64, speculation=TREE, prefill_chunk=CHUNK)
