"""The Triton kernels of the machine-code report, one entry each."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

import pallas_attn as pa
from bench.machine_code.compiled import lower_for_cuda
from pallas_attn import tuning
from pallas_attn.kernels import triton as kernels
from pallas_attn.kernels.call import Call
from pallas_attn.kernels.lse import Lse
from pallas_attn.kernels.triton.flash_decode import MERGE_SIZES
from pallas_attn.kernels.triton.key_weight_pass import LOGITS_SIZES
from pallas_attn.scores import Scores

DTYPES = ("bfloat16", "float16", "float32")
# Two rows of 2048 tokens, eight query heads on two KV heads. The loops do not depend on these sizes.
_BATCH, LENGTH, _Q_HEADS, _KV_HEADS = 2, 2048, 8, 2
RAGGED_LENGTH = 1999  # of no whole number of blocks


@dataclasses.dataclass(frozen=True)
class Setting:
    """The target and sizes of a compiled kernel.

    Attributes:
      capability: ten times the compute capability.
      length: queries (except in decode) and keys.
    """

    capability: int
    head_dim: int
    dtype: str
    sizes: pa.BlockSizes
    length: int = LENGTH


class Program(NamedTuple):
    """A function that calls the kernels directly, and the arrays or shapes for it."""

    function: Callable
    arguments: tuple


@dataclasses.dataclass(frozen=True)
class KernelCase:
    """A kernel under one mask, with or without scores.

    Attributes:
      name: the case's name.
      kernel: the kernel's name in Pallas; cases of one kernel differ in their mask and scores.
      about: the mask and the scores, in words.
      loops: names of the kernel's loops over blocks, in order; one named "full" must hold no mask.
      program: a setting -> the function with the kernel.
      default_sizes: (head_dim, dtype, capability) -> the entry of the tuning table.
      has_scores: whether scores change logits, which allows compares in full blocks, plain loads, and spills around the
        loops.
      pipelined: whether its loops copy asynchronously; otherwise they load in units of 16 bytes per thread.
    """

    name: str
    kernel: str
    about: str
    loops: tuple[str, ...]
    program: Callable[[Setting], Program]
    default_sizes: Callable[[int, str, int], pa.BlockSizes]
    has_scores: bool = False
    pipelined: bool = True

    def lower(self, setting: Setting) -> jax.stages.Lowered:
        """The function, lowered for a GPU."""
        function, arguments = self.program(setting)
        return lower_for_cuda(function, *arguments, capability=setting.capability)


def _forward(setting: Setting, mask: pa.masks.Mask, scores: Scores):
    def forward(query, key, value, q_positions, kv_positions, mask, scores):
        block_mask = pa.BlockMask.from_mask(mask, q_positions, kv_positions, setting.sizes)
        return kernels.forward(Call(query, key, value, block_mask, scores), scale=setting.head_dim**-0.5)

    return Program(forward, (*_tensors(setting), mask, scores))


# What each kernel of the backward pass computes: gradients of query, key, value and scores. A program without the
# others does not compile their kernels.
_GRADIENTS = {"d_query": slice(0, 1), "d_key_value": slice(1, 3), "d_score": slice(3, 4)}


def _backward(setting: Setting, mask: pa.masks.Mask, scores: Scores, gradients: slice):
    def backward(query, key, value, q_positions, kv_positions, mask, scores, lse, delta, d_out):
        sizes = setting.sizes
        block_mask = pa.BlockMask.from_mask(mask, q_positions, kv_positions, sizes)
        call = Call(query, key, value, block_mask, scores)
        found = kernels.backward(call, lse, delta, d_out, scale=setting.head_dim**-0.5, block_sizes=sizes)
        return found[gradients]

    tensors = _tensors(setting)
    return Program(backward, (*tensors, mask, scores, _lse(setting), _per_query(setting), tensors[0]))


def _key_weights(setting: Setting, mask: pa.masks.Mask, scores: Scores):
    def key_weights(query, key, q_positions, kv_positions, mask, scores, lse):
        block_mask = pa.BlockMask.from_mask(mask, q_positions, kv_positions, setting.sizes)
        call, scale = Call(query, key, key, block_mask, scores), setting.head_dim**-0.5
        return kernels.key_weights(call, lse, scale=scale, block_sizes=setting.sizes)

    query, key, _, *positions = _tensors(setting)
    return Program(key_weights, (query, key, *positions, mask, scores, _lse(setting)))


def _decode(
    setting: Setting,
    kind: Literal["int8", "int4"] | None = None,
    page: int | None = None,
    return_key_weights: bool = False,
    q_len: int = 1,
):
    """The split kernel, the merge, and with ``return_key_weights`` the kernel for key weights."""

    def decode(query, key, value, q_positions, kv_positions, page_table):
        block_mask = pa.BlockMask.from_mask(pa.masks.causal(), q_positions, kv_positions, setting.sizes)
        scale = setting.head_dim**-0.5
        call = Call(query, key, value, block_mask, page_table=page_table)
        return kernels.decode(call, scale=scale, return_key_weights=return_key_weights)

    query, key, _, _, kv_positions = _tensors(setting)
    query = jax.ShapeDtypeStruct((_BATCH, q_len, *query.shape[2:]), query.dtype)
    q_positions, page_table = jax.ShapeDtypeStruct((_BATCH, q_len), jnp.int32), None
    if page:
        pages = -(-setting.length // page)
        key = jax.ShapeDtypeStruct((_BATCH * pages, page, *key.shape[2:]), key.dtype)
        page_table = jax.ShapeDtypeStruct((_BATCH, pages), jnp.int32)
        kv_positions = jax.ShapeDtypeStruct((_BATCH, pages * page), jnp.int32)
    stored = jax.eval_shape(lambda x: pa.QuantizedArray.quantize(x, kind), key) if kind else key
    return Program(decode, (query, stored, stored, q_positions, kv_positions, page_table))


def _decode_in_default_blocks(setting: Setting, **options):
    """As :func:`_decode`, for kernels with their own sizes."""
    sizes = _default_sizes("decode")(setting.head_dim, setting.dtype, setting.capability)
    return _decode(dataclasses.replace(setting, sizes=sizes), **options)


def _tensors(setting: Setting) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Query, key, value, and the positions of queries and keys."""
    heads = (_Q_HEADS, _KV_HEADS, _KV_HEADS)
    tensors = (jax.ShapeDtypeStruct((_BATCH, setting.length, n, setting.head_dim), setting.dtype) for n in heads)
    positions = jax.ShapeDtypeStruct((_BATCH, setting.length), jnp.int32)
    return *tensors, positions, positions


def _per_query(setting: Setting) -> jax.ShapeDtypeStruct:
    """A float32 per query and head."""
    return jax.ShapeDtypeStruct((_BATCH, _Q_HEADS, setting.length), jnp.float32)


def _lse(setting: Setting) -> Lse:
    """The lse of the forward pass."""
    return Lse(_per_query(setting), _per_query(setting))


def _default_sizes(kernel: tuning.Kernel) -> Callable[[int, str, int], pa.BlockSizes]:
    def default_sizes(head_dim: int, dtype: str, capability: int) -> pa.BlockSizes:
        return tuning.default_block_sizes(
            *(1 if kernel == "decode" else LENGTH, LENGTH),
            implementation="triton",
            kernel=kernel,
            head_dim=head_dim,
            dtype=jnp.dtype(dtype),
            compute_capability=capability / 10,
        )

    return default_sizes


def _causal(length: int) -> pa.masks.Mask:
    return pa.masks.causal()


def _composed(length: int) -> pa.masks.Mask:
    return pa.masks.causal() & pa.masks.sliding_window(300) | pa.masks.sink(4)


def _array(length: int) -> pa.masks.Mask:
    return pa.masks.causal() & pa.masks.dense(jnp.ones((1, 1, length, length), jnp.bool_))


def _alibi(length: int) -> Scores:
    return pa.scores.alibi(jnp.ones(_Q_HEADS)), pa.scores.softcap(30.0)


def _slopes(length: int) -> Scores:
    return (pa.scores.alibi(jnp.ones(_Q_HEADS)),)


def _bias(length: int) -> Scores:
    return (pa.scores.bias(jnp.zeros((1, _Q_HEADS, length, length), jnp.bfloat16)),)


def _no_scores(length: int) -> Scores:
    return ()


_Mask = Callable[[int], pa.masks.Mask]  # of a length
_Scores = Callable[[int], Scores]


def _case(kernel: tuning.Kernel, suffix: str, about: str, mask: _Mask, scores: _Scores = _no_scores) -> KernelCase:
    program = _forward if kernel == "forward" else functools.partial(_backward, gradients=_GRADIENTS[kernel])
    entry: tuning.Kernel = "d_key_value_bias" if kernel == "d_key_value" and scores is _bias else kernel
    return KernelCase(
        kernel.replace("_", "-") + suffix,
        f"pallas_attn_{kernel}",
        about,
        ("full", "partial"),
        lambda setting: program(setting, mask(setting.length), scores(setting.length)),
        _default_sizes(entry),
        has_scores=scores is not _no_scores,
    )


def _key_weights_case(suffix: str, about: str, mask: _Mask, scores: _Scores = _no_scores) -> KernelCase:
    """The second pass that computes key weights after a forward pass, with its blocks."""
    return KernelCase(
        f"key-weights{suffix}",
        "pallas_attn_key_weights",
        about,
        ("full", "partial"),
        lambda setting: _key_weights(setting, mask(setting.length), scores(setting.length)),
        _default_sizes("key_weights"),
        has_scores=scores is not _no_scores,
    )


def _score_gradient_case(suffix: str, about: str, scores: _Scores) -> KernelCase:
    """The gradient of a score's array."""
    return KernelCase(
        f"d-score{suffix}",
        "pallas_attn_d_score",
        f"causal; {about}",
        ("visited",),
        lambda setting: _backward(setting, pa.masks.causal(), scores(setting.length), _GRADIENTS["d_score"]),
        _default_sizes("d_score"),
        has_scores=True,
    )


def _decode_case(
    suffix: str,
    about: str,
    kind: Literal["int8", "int4"] | None = None,
    page: int | None = None,
    return_key_weights: bool = False,
) -> KernelCase:
    return KernelCase(
        f"decode{suffix}",
        "pallas_attn_decode",
        f"one query, a group of four heads, causal; {about}",
        ("full", "partial"),
        lambda setting: _decode(setting, kind, page, return_key_weights),
        _default_sizes("decode"),
    )


_KERNELS: tuple[tuning.Kernel, ...] = ("forward", "d_query", "d_key_value")

CASES = [
    case
    for kernel in _KERNELS
    for case in (
        _case(kernel, "", "causal", _causal),
        _case(kernel, "-composed", "causal & sliding_window(300) | sink(4)", _composed),
        _case(kernel, "-array", "causal & dense(array)", _array),
        _case(kernel, "-alibi", "causal; alibi, softcap", _causal, _alibi),
        _case(kernel, "-bias", "causal; a bias [1, N, T, S] in bfloat16", _causal, _bias),
    )
] + [
    _key_weights_case("", "causal", _causal),
    _key_weights_case("-array", "causal & dense(array)", _array),
    _key_weights_case("-bias", "causal; a bias [1, N, T, S] in bfloat16", _causal, _bias),
    _score_gradient_case("-slopes", "the slopes of alibi", _slopes),
    _score_gradient_case("-bias", "a bias [1, N, T, S] in bfloat16", _bias),
    _decode_case("", "plain keys"),
    _decode_case("-int8", "int8 keys and values", "int8"),
    _decode_case("-int4", "int4 keys and values", "int4"),
    _decode_case("-paged", "pages of 64 keys", page=64),
    _decode_case("-logits", "plain keys; logits are kept for the key weights", return_key_weights=True),
    KernelCase(
        "decode-merge",
        "pallas_attn_merge",
        "the partial results of decode",
        ("parts",),
        _decode_in_default_blocks,
        lambda *_: MERGE_SIZES,
        pipelined=False,
    ),
    KernelCase(
        "decode-weights",
        "pallas_attn_decode_weights",
        "four queries, a group of four heads; key weights from the logits of decode",
        ("visited",),
        lambda setting: _decode_in_default_blocks(setting, return_key_weights=True, q_len=4),
        lambda *_: LOGITS_SIZES,
        pipelined=False,
    ),
]
