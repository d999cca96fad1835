"""Every public function times every argument times every kind of object: errors name what does not fit.

The error is a TypeError, a ValueError or a NotImplementedError that begins with the argument's name, then what was
expected and what came; never one that JAX, NumPy or Python raised by itself.
"""

import inspect
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_attn as pa
from pallas_attn import caches, masks, scores
from tests import wrong_kinds

B, T, S, N, K, D = 1, 16, 16, 2, 1, 8

CACHE = caches.init(batch_size=B, capacity=S, kv_heads=K, head_dim=D, dtype=jnp.float32)
POSITIONS = np.arange(4, dtype=np.int32)[None]
TOKENS = np.ones((B, 4, K, D), np.float32)
BLOCK_MASK = pa.BlockMask.from_mask(masks.causal(), 3, 3)
RESERVATION = jax.eval_shape(lambda: CACHE.reserve(POSITIONS))

KINDS = {
    "None": None,
    "bool": True,
    "int": 3,
    "negative": -7,
    "2**31": 2**31,
    "2**70": 2**70,
    "10**400": 10**400,
    "10**5000": 10**5000,
    "float": 0.5,
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
    "str": "causal",
    "bytes": b"causal",
    "path": pathlib.PurePath("causal"),
    "list": ["xla"],
    "list of ints": [1, 2, 3],
    "list of floats": [0.5, 1.5, 2.5],
    "list of bools": [True, False, True],
    "list of 10**400": [10**400, 1, 1],
    "list of 1e39": [1e39, 1.0, 1.0],
    "ragged list": [[1], [1, 2]],
    "list of None": [None, None],
    "list of arrays": [jnp.int32(1), jnp.int32(2), jnp.int32(3)],
    "tuple": (),
    "range": range(3),
    "set": {1, 2},
    "dict": {"a": 1},
    "generator": (x for x in "ab"),
    "function": len,
    "class": int,
    "array class": np.ndarray,
    "object": object(),
    "odd object": wrong_kinds.NeverEqual(),
    "dtype": np.dtype(np.float32),
    "tensor": wrong_kinds.Tensor(1, 16),
    "bools": np.ones(3, np.bool_),
    "ints": np.ones(3, np.int32),
    "wide ints": np.full(3, 2**40),
    "floats": np.ones(3, np.float32),
    "huge floats": np.full(3, 1e39),
    "complex array": np.ones(3, np.complex64),
    "empty array": np.ones((0, 3), np.float32),
    "rank 5": np.ones((1, 1, 1, 1, 1), np.float32),
    "masked array": np.ma.masked_array(np.ones(3, np.int32), [0, 1, 0]),
    "objects": np.array([None, 1], object),
    "strings": np.array(["a", "b"]),
    "records": np.zeros(3, [("x", "i4")]),
    "times": np.zeros(3, "m8[s]"),
    "shape": jax.ShapeDtypeStruct((1, 16), jnp.int32),
    "key": jax.random.key(0),
    "mask": masks.causal(),
    "BlockMask": BLOCK_MASK,
    "score": scores.softcap(5.0),
    "scores": [scores.softcap(5.0)],
    "QuantizedArray": pa.QuantizedArray(np.ones((1, 3, 1, 8), np.int8), np.ones((1, 3, 1), np.float32)),
    "BlockSizes": pa.BlockSizes(16, 16),
    "cache": CACHE,
    "policy": caches.Dense(),
    "storage": caches.Plain(),
    "paged storage": caches.Paged(16, 4),
    "reservation": RESERVATION,
    "view": jax.eval_shape(CACHE.view),
}

INTEGERS = {"int", "numpy int"}
NUMBERS = {*INTEGERS, "float", "numpy float"}
BOOLS = {"bool", "numpy bool"}
LISTED_INTEGERS = {"list of ints", "ints", "wide ints", "range", "list of arrays"}
CALLABLE = {"function", "class", "array class"}
ROWS = {"ints"}
ANYTHING = set(KINDS)

QUERY, KEY = np.ones((B, T, N, D), np.float32), np.ones((B, S, K, D), np.float32)
CALL = {"query": QUERY, "key": KEY, "value": KEY}
POOL = np.ones((2, 16, K, D), np.float32)


def paged(page_table):
    return pa.attention(QUERY, POOL, POOL, page_table=page_table)


def combined(and_, or_):
    return masks.causal() & and_ | or_


def quantized(values, scales):
    return pa.QuantizedArray(values, scales).check("key")


def nbytes(policy=None, storage=None):
    return caches.nbytes(policy, storage, batch_size=1, capacity=32, kv_heads=1, head_dim=64)


def attention_fn(**options):
    return pa.flax.attention_fn(**options)(QUERY, KEY, KEY)


attention_fn.__signature__ = inspect.signature(pa.flax.attention_fn)

# By name: a function, arguments that fit, and the other kinds that fit each argument; a default of None fits too.
FUNCTIONS = {
    "attention": (
        pa.attention,
        CALL,
        {
            "key": {"QuantizedArray"},  # raises about its length, which differs from that of value
            "mask": {"mask"},
            "scores": {"score", "scores", "tuple"},
            "scale": {*NUMBERS, "negative", "2**31", "2**70"},
            "return_lse": BOOLS,
            "return_key_weights": BOOLS,
            "interpret": BOOLS,
            "block_sizes": {"BlockSizes"},
        },
    ),
    "attention, paged": (paged, {"page_table": np.zeros((1, 1), np.int32)}, {"page_table": {"None"}}),
    "implementations": (pa.implementations, {}, {}),
    "BlockMask.from_mask": (
        pa.BlockMask.from_mask,
        {"mask": masks.causal(), "q_positions": T, "kv_positions": S},
        {
            "mask": {"mask"},
            "q_positions": INTEGERS,
            "kv_positions": INTEGERS,
            "block_sizes": {"BlockSizes"},
        },
    ),
    "BlockSizes": (
        pa.BlockSizes,
        {"q": 16, "kv": 16},
        dict.fromkeys(("q", "kv", "num_warps", "num_stages", "chunk", "shares"), INTEGERS),
    ),
    "save_picture": (
        pa.save_picture,
        {"block_mask": BLOCK_MASK, "path": "mask.png"},
        {"block_mask": {"BlockMask"}, "title": {"str"}},
    ),
    "QuantizedArray": (
        quantized,
        {"values": np.ones((3, 8), np.int8), "scales": np.ones(3, np.float32)},
        {
            "scales": {"floats"},
        },
    ),
    "quantize": (
        pa.QuantizedArray.quantize,
        {"x": KEY, "kind": "int4", "group": 4},
        {"x": {"floats", "rank 5"}},
    ),
    "Mask.dense_array": (
        masks.causal().dense_array,
        {"q_positions": POSITIONS, "kv_positions": POSITIONS},
        {},
    ),
    "& and |": (combined, {"and_": masks.causal(), "or_": masks.causal()}, {"and_": {"mask"}, "or_": {"mask"}}),
    "full": (masks.full, {}, {}),
    "causal": (masks.causal, {}, {}),
    "sliding_window": (masks.sliding_window, {"left": 3}, {"left": INTEGERS, "right": INTEGERS}),
    "prefix": (masks.prefix, {"lengths": [3]}, {"lengths": LISTED_INTEGERS - {"wide ints"}}),
    "sink": (masks.sink, {"n": 1}, {"n": INTEGERS}),
    "chunked": (masks.chunked, {"size": 1}, {"size": INTEGERS}),
    "segments": (masks.segments, {"q_ids": POSITIONS, "kv_ids": POSITIONS}, {}),
    "dense": (masks.dense, {"array": np.ones((2, 3), np.bool_)}, {}),
    "tree": (masks.tree, {"ancestors": np.ones((2, 2), np.bool_)}, {"start": LISTED_INTEGERS}),
    "masks.custom": (masks.custom, {"function": jnp.equal}, {"function": CALLABLE}),
    "softcap": (scores.softcap, {"cap": 5.0}, {"cap": {*NUMBERS, "2**31", "2**70"}}),
    "alibi": (
        scores.alibi,
        {"slopes": [1.0]},
        {"slopes": {"floats", "list of floats", "list of ints", "range", "list of arrays"}},
    ),
    "bias": (scores.bias, {"array": np.ones((1, 1, 1, 1), np.float32)}, {}),
    "caches.init": (
        caches.init,
        {"batch_size": 1, "capacity": 32, "kv_heads": 1, "head_dim": 64, "dtype": jnp.float32},
        {
            "policy": {"policy"},
            "storage": {"storage", "paged storage"},
            "batch_size": INTEGERS,
            "capacity": INTEGERS,
            "kv_heads": INTEGERS,
            "head_dim": INTEGERS,
            "dtype": {"dtype"},
        },
    ),
    "caches.nbytes": (
        nbytes,
        {},
        {"policy": {"policy"}, "storage": {"storage", "paged storage"}},
    ),
    "Window": (caches.Window, {"size": 4}, {"size": INTEGERS, "sinks": INTEGERS}),
    "H2O": (caches.H2O, {"recent": 4}, {"recent": INTEGERS, "normalize": BOOLS, "value_norm": BOOLS}),
    "QHitter": (
        caches.QHitter,
        {"recent": 4},
        {"recent": INTEGERS, "normalize": BOOLS, "value_norm": BOOLS, "balance": {"float", "numpy float"}},
    ),
    "Dense": (caches.Dense, {}, {}),
    "Plain": (caches.Plain, {}, {}),
    "Int8": (caches.Int8, {}, {}),
    "Float8": (caches.Float8, {}, {}),
    "Int4": (caches.Int4, {}, {"group": INTEGERS}),
    "Paged": (
        caches.Paged,
        {"page_size": 16, "num_pages": 4},
        {"num_pages": INTEGERS, "inner": {"storage"}},
    ),
    "append": (CACHE.append, {"key": TOKENS, "value": TOKENS, "positions": POSITIONS}, {"rows": ROWS}),
    "reserve": (CACHE.reserve, {"positions": POSITIONS}, {"rows": ROWS}),
    "write": (
        CACHE.write,
        {"key": TOKENS, "value": TOKENS, "reservation": RESERVATION},
        {"reservation": {"reservation"}},
    ),
    "positions_after": (CACHE.positions_after, {"positions": POSITIONS}, {"rows": ROWS}),
    "positions_with": (CACHE.positions_with, {"reservation": RESERVATION}, {"reservation": {"reservation"}}),
    "view": (CACHE.view, {}, {"rows": ROWS}),
    "observe": (CACHE.observe, {"key_weights": np.ones((B, K, S), np.float32)}, {"rows": ROWS}),
    "truncate": (CACHE.truncate, {"lengths": [1]}, {}),
    "keep": (CACHE.keep, {"first": [0], "path": POSITIONS, "count": [1]}, {}),
    "reset": (CACHE.reset, {"rows": [True]}, {}),
    "fork": (CACHE.fork, {"sources": [0]}, {}),
    "copy_rows": (
        CACHE.copy_rows,
        {"sources": np.zeros(3, np.int32), "targets": np.zeros(3, np.int32), "count": 1},
        {
            "sources": LISTED_INTEGERS,
            "targets": LISTED_INTEGERS,
            "count": {*INTEGERS, "negative", "2**31", "jax int"},
        },
    ),
    "attention_fn": (
        attention_fn,
        {},
        {
            "mask": {"mask"},
            "scores": {"score", "scores", "tuple"},
            "scale": {*NUMBERS, "negative", "2**31", "2**70"},
            "interpret": BOOLS,
            "block_sizes": {"BlockSizes"},
        },
    ),
    "attention_fn, called": (
        pa.flax.attention_fn(),
        CALL,
        {
            "query": {"rank 5"},  # raises about its batch axes, which differ from those of key
            "precision": {"tuple"},
            "mask": {"jax int", "jax float", "numpy int", "numpy float", "numpy bool"},
            "bias": {"jax float", "numpy float"},
            "dropout_rate": {*NUMBERS},
            "deterministic": ANYTHING,  # ignored while dropout is off, like the next three
            "broadcast_dropout": ANYTHING,
            "dropout_rng": ANYTHING,
            "force_fp32_for_softmax": ANYTHING,
            "dtype": {"dtype"},
            "is_causal": BOOLS,
        },
    ),
}


def is_named(error: Exception, argument: str) -> bool:
    if not isinstance(error, TypeError | ValueError | NotImplementedError):
        return False
    message = str(error)
    operator = {"and_": "&", "or_": r"\|"}.get(argument, argument)
    if re.match(rf"(?:[\w.]+: )?(?:\w+\.)?{operator}(?!\w)", message) and re.search("expected .*, got ", message):
        return True
    return isinstance(error, NotImplementedError) and f": {argument}: " in message


@wrong_kinds.every_argument(FUNCTIONS)
def test_a_wrong_kind_of_object_is_named(name, argument):
    assert not wrong_kinds.complaints(FUNCTIONS[name], argument, KINDS, is_named)


TENSORS = {
    "q_positions": lambda tensor: pa.attention(**CALL, q_positions=tensor(np.arange(T)[None])),
    "query": lambda tensor: pa.attention(tensor(QUERY), KEY, KEY),
    "sinks": lambda tensor: pa.attention(**CALL, sinks=tensor(np.zeros(N, np.float32))),
    "mask": lambda tensor: pa.attention(**CALL, mask=tensor(np.ones((1, 1, T, S), bool))),
    "segments: q_ids": lambda tensor: masks.segments(tensor(np.zeros((1, T), int))),
    "bias: array": lambda tensor: scores.bias(tensor(np.zeros((1, 1, T, S), np.float32))),
    "x": lambda tensor: pa.QuantizedArray.quantize(tensor(KEY), "int8"),
    "lengths": lambda tensor: CACHE.truncate(tensor(np.ones(B, int))),
}


@pytest.mark.parametrize("argument", TENSORS)
def test_a_tensor_of_torch_is_named(argument):
    tensor = pytest.importorskip("torch").tensor
    with pytest.raises(
        TypeError, match=rf"^{argument}: expected .* \(NumPy or JAX\), got torch\.\w+ \[.*\] \(Tensor\)"
    ):
        TENSORS[argument](tensor)


def test_what_has_a_jax_array_is_one():
    """A variable of Flax."""

    class Variable:
        def __jax_array__(self):
            return jnp.ones(N, jnp.float32)

    expected = pa.attention(**CALL, sinks=np.ones(N, np.float32))
    np.testing.assert_array_equal(pa.attention(**CALL, sinks=Variable()), expected)
