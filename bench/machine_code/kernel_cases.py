"""The Triton kernels of the machine-code report, one entry each."""

import dataclasses
from collections.abc import Callable
from typing import Literal

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
from pallas_attn.kernels.triton.key_weight_pass import sizes_of as key_weights_sizes
from pallas_attn.scores import Scores

DTYPES = ("bfloat16", "float16", "float32")
# Two rows of 2048 tokens, eight query heads on two KV heads. The loops do not depend on these sizes.
_BATCH, _LENGTH, _Q_HEADS, _KV_HEADS = 2, 2048, 8, 2


@dataclasses.dataclass(frozen=True)
class Setting:
    """The target and sizes of a compiled kernel; ``capability`` is ten times the compute capability."""

    capability: int
    head_dim: int
    dtype: str
    sizes: pa.BlockSizes


@dataclasses.dataclass(frozen=True)
class KernelCase:
    """A kernel under one mask, with or without scores.

    Attributes:
      name: the case's name.
      kernel: the kernel's name in Pallas; cases of one kernel differ in their mask and scores.
      about: the mask and the scores, in words.
      loops: names of the kernel's loops over blocks, in order; one named "full" must hold no mask.
      lower: a setting -> the lowered function.
      default_sizes: (head_dim, dtype, capability) -> the entry of the tuning table.
      has_scores: whether scores change logits, which allows compares in full blocks, plain loads, and spills around the
        loops.
      pipelined: whether its loops copy asynchronously; otherwise they load in units of 16 bytes per thread.
    """

    name: str
    kernel: str
    about: str
    loops: tuple[str, ...]
    lower: Callable[[Setting], object]
    default_sizes: Callable[[int, str, int], pa.BlockSizes]
    has_scores: bool = False
    pipelined: bool = True


def _forward(setting: Setting, mask: pa.masks.Mask, scores: Scores):
    def forward(query, key, value, q_positions, kv_positions, mask, scores):
        block_mask = pa.BlockMask.from_mask(mask, q_positions, kv_positions, setting.sizes)
        return kernels.forward(Call(query, key, value, block_mask, scores), scale=setting.head_dim**-0.5)

    return lower_for_cuda(forward, *_tensors(setting), mask, scores, capability=setting.capability)


def _backward(setting: Setting, mask: pa.masks.Mask, scores: Scores):
    def backward(query, key, value, q_positions, kv_positions, mask, scores, lse, delta, d_out):
        sizes = setting.sizes
        block_mask = pa.BlockMask.from_mask(mask, q_positions, kv_positions, sizes)
        call = Call(query, key, value, block_mask, scores)
        return kernels.backward(call, lse, delta, d_out, scale=setting.head_dim**-0.5, block_sizes=sizes)

    tensors = _tensors(setting)
    arguments = *tensors, mask, scores, _lse(), _per_query(), tensors[0]
    return lower_for_cuda(backward, *arguments, capability=setting.capability)


def _key_weights(setting: Setting, mask: pa.masks.Mask, scores: Scores):
    def key_weights(query, key, q_positions, kv_positions, mask, scores, lse):
        block_mask = pa.BlockMask.from_mask(mask, q_positions, kv_positions, setting.sizes)
        return kernels.key_weights(Call(query, key, key, block_mask, scores), lse, scale=setting.head_dim**-0.5)

    query, key, _, *positions = _tensors(setting)
    arguments = query, key, *positions, mask, scores, _lse()
    return lower_for_cuda(key_weights, *arguments, capability=setting.capability)


def _decode(
    setting: Setting,
    kind: Literal["int8", "int4"] | None = None,
    page: int | None = None,
    return_key_weights: bool = False,
    q_len: int = 1,
):
    """The split kernel, the merge, and with ``return_key_weights`` the kernel for key weights."""

    def decode(query, key, value, q_positions, kv_positions, page_table):
        block_mask = pa.BlockMask.from_mask(_CAUSAL, q_positions, kv_positions, setting.sizes)
        scale = setting.head_dim**-0.5
        call = Call(query, key, value, block_mask, page_table=page_table)
        return kernels.decode(call, scale=scale, return_key_weights=return_key_weights)

    query, key, _, _, kv_positions = _tensors(setting)
    query = jax.ShapeDtypeStruct((_BATCH, q_len, *query.shape[2:]), query.dtype)
    q_positions, page_table = jax.ShapeDtypeStruct((_BATCH, q_len), jnp.int32), None
    if page:
        key = jax.ShapeDtypeStruct((_BATCH * _LENGTH // page, page, *key.shape[2:]), key.dtype)
        page_table = jax.ShapeDtypeStruct((_BATCH, _LENGTH // page), jnp.int32)
    stored = jax.eval_shape(lambda x: pa.QuantizedArray.quantize(x, kind), key) if kind else key
    arguments = query, stored, stored, q_positions, kv_positions, page_table
    return lower_for_cuda(decode, *arguments, capability=setting.capability)


def _decode_in_default_blocks(setting: Setting, **options):
    """As :func:`_decode`, for kernels with their own sizes."""
    sizes = _default_sizes("decode")(setting.head_dim, setting.dtype, setting.capability)
    return _decode(dataclasses.replace(setting, sizes=sizes), **options)


def _tensors(setting: Setting) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Query, key, value, and the positions of queries and keys."""
    heads = (_Q_HEADS, _KV_HEADS, _KV_HEADS)
    tensors = (jax.ShapeDtypeStruct((_BATCH, _LENGTH, n, setting.head_dim), setting.dtype) for n in heads)
    positions = jax.ShapeDtypeStruct((_BATCH, _LENGTH), jnp.int32)
    return *tensors, positions, positions


def _per_query() -> jax.ShapeDtypeStruct:
    """A float32 per query and head."""
    return jax.ShapeDtypeStruct((_BATCH, _Q_HEADS, _LENGTH), jnp.float32)


def _lse() -> Lse:
    """The lse of the forward pass."""
    return Lse(_per_query(), _per_query())


def _default_sizes(kernel: tuning.Kernel) -> Callable[[int, str, int], pa.BlockSizes]:
    def default_sizes(head_dim: int, dtype: str, capability: int) -> pa.BlockSizes:
        return tuning.default_block_sizes(
            *(1 if kernel == "decode" else _LENGTH, _LENGTH),
            implementation="triton",
            kernel=kernel,
            head_dim=head_dim,
            dtype=jnp.dtype(dtype),
            compute_capability=capability / 10,
        )

    return default_sizes


def _case(kernel: tuning.Kernel, suffix: str, about: str, mask: pa.masks.Mask, scores: Scores = ()) -> KernelCase:
    lower = _forward if kernel == "forward" else _backward
    entry: tuning.Kernel = "d_key_value_bias" if kernel == "d_key_value" and scores is _BIAS else kernel
    return KernelCase(
        kernel.replace("_", "-") + suffix,
        f"pallas_attn_{kernel}",
        about,
        ("full", "partial"),
        lambda setting: lower(setting, mask, scores),
        _default_sizes(entry),
        has_scores=bool(scores),
    )


def _key_weights_case(suffix: str, about: str, mask: pa.masks.Mask, scores: Scores = ()) -> KernelCase:
    """The second pass that computes key weights after a forward pass, with its blocks."""
    return KernelCase(
        f"key-weights{suffix}",
        "pallas_attn_key_weights",
        about,
        ("full", "partial"),
        lambda setting: _key_weights(setting, mask, scores),
        lambda *setting: key_weights_sizes(_default_sizes("forward")(*setting)),
        has_scores=bool(scores),
    )


def _score_gradient_case(suffix: str, about: str, scores: Scores) -> KernelCase:
    """The gradient of a score's array."""
    return KernelCase(
        f"d-score{suffix}",
        "pallas_attn_d_score",
        f"causal; {about}",
        ("visited",),
        lambda setting: _backward(setting, _CAUSAL, scores),
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
_CAUSAL = pa.masks.causal()
_COMPOSED = _CAUSAL & pa.masks.sliding_window(300) | pa.masks.sink(4)
_ARRAY = _CAUSAL & pa.masks.dense(jnp.ones((1, 1, _LENGTH, _LENGTH), jnp.bool_))
_ALIBI = pa.scores.alibi(jnp.ones(_Q_HEADS)), pa.scores.softcap(30.0)
_SLOPES = (pa.scores.alibi(jnp.ones(_Q_HEADS)),)
_BIAS = (pa.scores.bias(jnp.zeros((1, _Q_HEADS, _LENGTH, _LENGTH), jnp.bfloat16)),)

CASES = [
    case
    for kernel in _KERNELS
    for case in (
        _case(kernel, "", "causal", _CAUSAL),
        _case(kernel, "-composed", "causal & sliding_window(300) | sink(4)", _COMPOSED),
        _case(kernel, "-array", "causal & dense(array)", _ARRAY),
        _case(kernel, "-alibi", "causal; alibi, softcap", _CAUSAL, _ALIBI),
        _case(kernel, "-bias", "causal; a bias [1, N, T, S] in bfloat16", _CAUSAL, _BIAS),
    )
] + [
    _key_weights_case("", "causal", _CAUSAL),
    _key_weights_case("-array", "causal & dense(array)", _ARRAY),
    _key_weights_case("-bias", "causal; a bias [1, N, T, S] in bfloat16", _CAUSAL, _BIAS),
    _score_gradient_case("-slopes", "the slopes of alibi", _SLOPES),
    _score_gradient_case("-bias", "a bias [1, N, T, S] in bfloat16", _BIAS),
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
