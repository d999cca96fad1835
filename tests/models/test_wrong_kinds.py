"""Decoders and generation: every function x every argument x every kind of object.

An invalid argument raises a TypeError or ValueError that names it, with the expected and the given value, before
anything is compiled; never an error that JAX, NumPy or Python raised on its own.
"""

import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pallas_attn import caches
from pallas_attn_models import CachedDecoder, Decoder, DraftModel, Generator, Limits, PromptLookup, Sampling
from pallas_attn_models.generation.stopping import StopStrings
from tests import wrong_kinds
from tests.models.small_model import CONFIG, make_model

MODEL = make_model()
GENERATOR = Generator(MODEL, batch_size=2, capacity=16, prefill_chunk=8)
CACHED = CachedDecoder(MODEL, batch_size=2, capacity=16)
CACHES = MODEL.init_caches(batch_size=2, capacity=16)
TOKENS = np.ones((2, 3), np.int32)

KINDS = {
    "None": None,
    "bool": True,
    "0": 0,
    "int": 3,
    "negative": -7,
    "2**31": 2**31,
    "2**70": 2**70,
    "10**400": 10**400,
    "10**5000": 10**5000,
    "float": 0.5,
    "1.5": 1.5,
    "1e39": 1e39,
    "1e-50": 1e-50,
    "NaN": float("nan"),
    "inf": float("inf"),
    "complex": 1j,
    "numpy int": np.int64(3),
    "numpy float": np.float64(0.5),
    "numpy bool": np.bool_(True),
    "jax int": jnp.int32(3),
    "jax float": jnp.float32(0.5),
    "str": "abc",
    "empty str": "",
    "bytes": b"abc",
    "path": pathlib.PurePath("abc"),
    "list of str": ["abc"],
    "list of ints": [1, 2, 3],
    "list of floats": [0.5, 1.5],
    "list of bools": [True, False],
    "list of 10**5000": [10**5000],
    "list of lists": [[1, 2, 3], [4, 5, 6]],
    "ragged list": [[1], [1, 2]],
    "list of None": [None, None],
    "list of samplings": [Sampling(), Sampling()],
    "empty list": [],
    "range": range(1, 4),
    "set": {1, 2},
    "dict": {"a": 1},
    "dict of biases": {1: 0.5},
    "dict of 1e39": {1: 1e39},
    "dict of 10**400": {1: 10**400},
    "dict of 1e-50": {1: 1e-50},
    "generator": (x for x in "ab"),
    "function": len,
    "class": int,
    "PromptLookup itself": PromptLookup,
    "object": object(),
    "odd object": wrong_kinds.NeverEqual(),
    "dtype": np.dtype(np.float32),
    "tensor": wrong_kinds.Tensor(1, 3),
    "scalar array": np.array(3),
    "bools": np.ones(2, np.bool_),
    "ints": np.ones(2, np.int32),
    "wide ints": np.full(2, 2**40),
    "floats": np.ones(2, np.float32),
    "matrix of bools": np.ones((2, 3), np.bool_),
    "matrix": TOKENS,
    "jax matrix": jnp.asarray(TOKENS),
    "matrix of wide ints": np.full((2, 3), 2**40),
    "matrix of floats": np.ones((2, 3), np.float32),
    "square of bools": np.ones((3, 3), np.bool_),
    "rank 3": np.ones((2, 3, CONFIG.hidden_size), np.float32),
    "empty array": np.ones((0, 3), np.int32),
    "masked array": np.ma.masked_array(TOKENS, TOKENS > 3),
    "objects": np.array([[None, 1]], object),
    "strings": np.array(["a", "b"]),
    "shape": jax.ShapeDtypeStruct((2, 3), jnp.int32),
    "key": jax.random.key(0),
    "model": MODEL,
    "cached decoder": CACHED,
    "config": CONFIG,
    "caches": CACHES,
    "other caches": CACHES * 2,
    "policy": caches.Dense(),
    "policies": [caches.Dense()],
    "storage": caches.Plain(),
    "Sampling": Sampling(),
    "Limits": Limits(),
    "speculation": PromptLookup(3),
}

INTS = {"int", "numpy int"}
SIZES = {"int"}
NUMBERS = {*INTS, "0", "2**31", "2**70", "float", "1.5", "numpy float"}
NOT_TOO_LARGE = {"2**31", "2**70", "10**400", "10**5000"}  # above any useful value, which means all
LISTED = {"list of ints", "range"}
STOPS = {*INTS, "0", *LISTED, "list of lists", "ragged list", "empty list", "empty array", "ints", "matrix"}
PROMPT = {*LISTED, "ints"}
PROMPTS = {"list of lists", "ragged list", "matrix", "jax matrix"}
POLICY, STORAGE = {"policy", "policies"}, {"storage"}
HOOKS = {"function", "class", "PromptLookup itself", "model", "cached decoder"}  # callable
BOOLS = {"bool", "numpy bool"}
MATRIX = {"list of lists", "matrix", "jax matrix"}
SETTINGS = {
    "max_new_tokens": INTS,
    "temperature": NUMBERS,
    "top_k": {*INTS, "0"},
    "top_p": {"float", "numpy float", "1e-50"},
    "min_p": {"float", "numpy float", "0"},
    "repetition_penalty": NUMBERS - {"0"},
    "seed": {*INTS, "0", "2**31"},
    "presence_penalty": {*NUMBERS, "negative"},
    "frequency_penalty": {*NUMBERS, "negative"},
    "logit_bias": {"dict of biases"},
    "forbidden_tokens": {*PROMPT, "empty list", "empty array"},
    "min_new_tokens": {*INTS, "0"},
    "stop": STOPS,
    "top_logprobs": {*INTS, "0"},
}
ASKED = {
    "sampling": {"Sampling"},
    "stop": STOPS,
    "negative_prompts": PROMPTS,
    "negative_prompt": PROMPT,
    "interval": {*SIZES, *NOT_TOO_LARGE},
}
CACHE = {
    "batch_size": INTS,
    "capacity": INTS,
    "policy": POLICY,
    "storage": STORAGE,
    "dtype": {"dtype"},
    "chunk": {*SIZES, *NOT_TOO_LARGE},
}

# By name: a function, arguments that fit, and the other kinds that each argument takes.
FUNCTIONS: dict[str, wrong_kinds.Case] = {
    "Sampling": (Sampling, {}, SETTINGS),
    "Limits": (
        Limits,
        {},
        {name: {*INTS, "0"} for name in ("logit_bias", "stop_sequences", "top_logprobs")} | {"stop_length": INTS},
    ),
    "PromptLookup": (
        PromptLookup,
        {"length": 2},
        {"length": SIZES, "ngram": {*SIZES, *NOT_TOO_LARGE}, "num_candidates": SIZES},
    ),
    "DraftModel": (DraftModel, {"model": MODEL}, {"model": {"model"}, "length": SIZES}),
    "Generator": (
        Generator,
        {"model": MODEL, "batch_size": 2, "capacity": 16},
        {
            "model": {"model"},
            "batch_size": SIZES,
            "capacity": SIZES,
            "max_length": SIZES,
            "prefill_chunk": {*SIZES, *NOT_TOO_LARGE},
            "max_queue": {*SIZES, *NOT_TOO_LARGE},
            "prefill_rows": {*SIZES, *NOT_TOO_LARGE},
            "policy": POLICY,
            "storage": STORAGE,
            "limits": {"Limits"},
            "layer_hook": HOOKS,
            "graph_loops": BOOLS,
            "speculation": {"speculation"},
        },
    ),
    "warmup": (GENERATOR.warmup, {}, {"progress": HOOKS}),
    "generate": (
        GENERATOR.generate,
        {"prompts": [[1], [2]]},
        {"prompts": PROMPTS, **ASKED, "sampling": {"Sampling", "list of samplings"}},
    ),
    "generate, guided": (
        GENERATOR.generate,
        {"prompts": [[1], [2]], "negative_prompts": [[3], [4]]},
        {
            "prompts": PROMPTS,
            **ASKED,
            "sampling": {"Sampling", "list of samplings"},
            "guidance_scale": {*NUMBERS, "list of floats"},
        },
    ),
    "stream": (
        GENERATOR.stream,
        {"prompts": [[1], [2]]},
        {"prompts": PROMPTS, **ASKED, "sampling": {"Sampling", "list of samplings"}},
    ),
    "submit": (GENERATOR.submit, {"prompt": [1]}, {"prompt": PROMPT, **ASKED}),
    "submit, guided": (
        GENERATOR.submit,
        {"prompt": [1], "negative_prompt": [3]},
        {"prompt": PROMPT, **ASKED, "guidance_scale": NUMBERS},
    ),
    "submit_samples": (GENERATOR.submit_samples, {"prompt": [1], "num_samples": 1}, {"prompt": PROMPT, **ASKED}),
    "step": (GENERATOR.step, {}, ASKED),
    "score": (GENERATOR.score, {"prompts": [[1], [2]]}, {"prompts": PROMPTS, "logits": {"bool"}}),
    "StopStrings": (StopStrings, {"strings": ["a"]}, {"strings": {"list of str", "empty list"}}),
    "CachedDecoder": (CachedDecoder, {"model": MODEL, "batch_size": 2, "capacity": 16}, {"model": {"model"}, **CACHE}),
    "CachedDecoder, called": (
        CACHED,
        {"tokens": TOKENS},
        {"tokens": MATRIX, "real": {"matrix of bools"}, "layer_hook": HOOKS, "apply_head": BOOLS},
    ),
    "reset": (CACHED.reset, {}, {"rows": {"bools", "list of bools"}}),
    "truncate": (CACHED.truncate, {"lengths": [1, 1]}, {"lengths": {"ints", "wide ints"}}),
    "fork": (CACHED.fork, {"sources": [0, 1]}, {"sources": {"ints", "wide ints"}}),
    "init_caches": (MODEL.init_caches, {"batch_size": 2, "capacity": 16}, CACHE),
    "Decoder, called": (
        MODEL,
        {"tokens": TOKENS},
        {
            "tokens": MATRIX,
            "positions": MATRIX,
            "segment_ids": {*MATRIX, "matrix of wide ints"},
            "caches": {"caches"},
            "layer_hook": HOOKS,
            "apply_head": BOOLS,
        },
    ),
    "Decoder, called with caches": (
        MODEL,
        {"tokens": TOKENS, "caches": CACHES},
        {
            "tokens": MATRIX,
            "positions": MATRIX,
            "caches": {"caches", "None"},
            "rows": {"ints"},
            "apply_head": BOOLS,
            "layer_hook": HOOKS,
        },
    ),
    "Decoder, called with a tree": (
        MODEL,
        {"tokens": TOKENS, "caches": CACHES, "positions": np.zeros((1, 3), np.int32)},
        {
            "tree": {"square of bools"},
            **{name: set(KINDS) for name in ("tokens", "positions", "caches", "rows", "layer_hook", "apply_head")},
        },
    ),
    "logits": (MODEL.logits, {"hidden": np.ones((2, 3, CONFIG.hidden_size), np.float32)}, {"hidden": {"rank 3"}}),
}


def is_named(error: Exception, argument: str) -> bool:
    pattern = rf"[\w.,\[\] ]*?\b{re.escape(argument)}\b[^:]*: expected .*, got "
    return isinstance(error, TypeError | ValueError) and bool(re.match(pattern, str(error), re.DOTALL))


@wrong_kinds.every_argument(FUNCTIONS)
def test_a_wrong_kind_of_object_is_named(name, argument):
    assert not wrong_kinds.complaints(FUNCTIONS[name], argument, KINDS, is_named)
    assert GENERATOR.compile_counts == {"prefill": 0, "decode": 0}
    assert GENERATOR._scheduler.idle


# --- layer hooks ---


@pytest.mark.parametrize(
    ("hook", "error", "got"),
    [
        (lambda layer, hidden: None, TypeError, "None"),
        (lambda layer, hidden: [hidden], TypeError, "list"),
        (lambda layer, hidden: (hidden, None), TypeError, "tuple"),
        (lambda layer, hidden: 0.0, TypeError, "0.0"),
        (lambda layer, hidden: hidden.astype(jnp.bfloat16), ValueError, "bfloat16"),
        (lambda layer, hidden: hidden > 0, ValueError, "bool"),
        (lambda layer, hidden: np.zeros(hidden.shape), ValueError, "float64"),
        (lambda layer, hidden: hidden[:, :1, :1], ValueError, "[2, 1, 1]"),
        (lambda layer, hidden: hidden[0], ValueError, "[3, 32]"),
    ],
    ids=["None", "a list", "a tuple", "a number", "bfloat16", "bool", "float64", "another shape", "another rank"],
)
def test_a_hook_preserves_shape_and_dtype(hook, error, got):
    wanted = rf"layer_hook: expected float32 \[2, 3, 32\] for layer 0, like its input, got .*{re.escape(got)}"
    with pytest.raises(error, match=wanted):
        MODEL(TOKENS, layer_hook=hook)
    with pytest.raises(error, match=wanted):
        CACHED(TOKENS, layer_hook=hook)
    generator = Generator(MODEL, batch_size=2, capacity=16, prefill_chunk=3, prefill_rows=2, layer_hook=hook)
    for run in (generator.warmup, lambda: generator.generate([[1, 2]])):
        with pytest.raises(error, match=wanted):
            run()


def test_a_hook_may_return_a_numpy_array():
    hook: Any = lambda layer, hidden: np.zeros(hidden.shape, np.float32)  # noqa: E731
    zeros = MODEL(TOKENS, layer_hook=hook).hidden
    np.testing.assert_array_equal(zeros, MODEL(TOKENS, layer_hook=lambda layer, hidden: hidden * 0.0).hidden)


# --- custom speculation ---


class Own:
    """Returns given drafts."""

    length, num_candidates, draft_model = 2, 1, None

    def __init__(self, **parts):
        vars(self).update(parts)

    def draft(self, state, may, feed):
        return state, jnp.zeros((2, 1, 2), jnp.int32), may


@pytest.mark.parametrize(
    ("parts", "error", "message"),
    [
        ({"length": 0}, ValueError, "speculation.length: expected an int of at least 1, got 0"),
        ({"num_candidates": None}, ValueError, "speculation.num_candidates: expected an int of at least 1, got None"),
        ({"draft_model": "path"}, TypeError, "speculation.draft_model: expected a Decoder or None, got str"),
        ({"draft": None}, TypeError, "speculation.draft: expected a method, got NoneType"),
    ],
)
def test_parts_of_a_speculation(parts, error, message):
    with pytest.raises(error, match=message):
        Generator(MODEL, batch_size=2, capacity=16, speculation=Own(**parts))


def test_drafts_of_another_shape():
    own = Own(draft=lambda state, may, feed: (state, jnp.zeros((2, 2), jnp.int32), may))
    generator = Generator(MODEL, batch_size=2, capacity=16, speculation=own)
    with pytest.raises(
        ValueError, match=r"speculation.draft: expected int32 \[2, 1, 2\] and bool \[2\], got int32 \[2"
    ):
        generator.warmup()


# --- numbers ---


def test_invalid_tokens_have_no_vector():
    """NaN makes them visible; integers beyond 32 bits raise instead of wrapping to other tokens."""
    for token in (CONFIG.vocab_size, 2**31 - 1, -1):
        hidden = MODEL(np.array([[token]]), np.zeros((1, 1), np.int32)).hidden
        assert np.isnan(hidden).all()
    for name in ("tokens", "positions"):
        with pytest.raises(ValueError, match=f"{name}: expected .*, got {2**32 + 1}"):
            MODEL(**{"tokens": TOKENS, name: np.full((2, 3), 2**32 + 1)})


def test_wide_segment_ids_are_compared_as_they_are():
    wide = np.array([[1, 1, 2**32 + 1]])
    expected = MODEL(TOKENS[:1], segment_ids=np.array([[1, 1, 2]])).hidden
    np.testing.assert_array_equal(MODEL(TOKENS[:1], segment_ids=wide).hidden, expected)


def test_every_token_forbidden():
    """Settings that exclude every token, or every first token, raise before anything is compiled."""
    everything = range(CONFIG.vocab_size)
    with pytest.raises(ValueError, match="forbidden_tokens: expected fewer than vocab_size=50, got all"):
        GENERATOR.submit([1], Sampling(forbidden_tokens=everything))
    but_the_end = [token for token in everything if token not in (*CONFIG.eos_token_ids, 9)]
    with pytest.raises(ValueError, match="min_new_tokens: expected 0 if every token is forbidden or ends"):
        GENERATOR.submit([1], Sampling(forbidden_tokens=but_the_end, min_new_tokens=1), stop=9)
    handle = GENERATOR.submit([1], Sampling(forbidden_tokens=but_the_end))
    handle.cancel()


def test_a_decoder_is_not_what_holds_one():
    with pytest.raises(TypeError, match="model: expected a Decoder, got CachedDecoder"):
        Generator(CACHED, batch_size=1, capacity=16)  # pyright: ignore[reportArgumentType]
    assert not isinstance(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), Decoder)
