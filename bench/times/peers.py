"""The peers, each behind an adapter that gives the reason if it does not support a case.

Anything that a peer's users prepare once for many calls, such as a boolean mask, is prepared before the clock starts.
"""

import dataclasses
import functools
import importlib
import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import jax

from bench.times import torch_peers
from bench.times.generation import transformers_contender
from bench.times.timing import Contender
from bench.times.workloads import Attention, Generation, MaskBuild, Workload
from pallas_attn import masks

# Bytes of T x S float32 matrices above which a peer without tiles does not run.
_LARGEST_LOGITS = {"cpu": 3 * 2**30, "gpu": 20 * 2**30}


@dataclasses.dataclass(frozen=True)
class Peer:
    """Another implementation.

    Attributes:
      name: the name for ``--peers``.
      unavailable: why it cannot run on this machine, or None.
      attention, mask, generation: from a workload (and a number of sets of inputs) to a contender; each raises
        ``NotImplementedError`` with the reason for a workload that it does not support. None: it has no such kind.
    """

    name: str
    unavailable: Callable[[], str | None]
    attention: Callable[[Attention, int], Contender] | None = None
    mask: Callable[[MaskBuild, int], Contender] | None = None
    generation: Callable[[Generation], Contender] | None = None

    def serves(self, workload: Workload) -> bool:
        """Whether the peer has workloads of this kind."""
        kinds = {Attention: self.attention, MaskBuild: self.mask, Generation: self.generation}
        return kinds.get(type(workload)) is not None

    def contender(self, workload: Workload, sets: int) -> Contender:
        """The contender that runs the peer on the workload.

        Raises:
          NotImplementedError: the peer does not support the workload, with the reason.
        """
        if isinstance(workload, Attention) and self.attention is not None:
            return self.attention(workload, sets)
        if isinstance(workload, MaskBuild) and self.mask is not None:
            return self.mask(workload, sets)
        if isinstance(workload, Generation) and self.generation is not None:
            return self.generation(workload)
        raise NotImplementedError("has no such workload")


def all_peers(*, interpret: bool = False) -> dict[str, Peer]:
    """Every peer by name, quick compilers first. ``interpret``: interpret JAX's Pallas kernels."""
    tokamax = ("triton", "mosaic", "cudnn", "xla_chunked", "xla")
    peers = [
        Peer("jax.nn", lambda: None, functools.partial(_jax_nn, implementation="xla")),
        Peer("jax.nn.cudnn", _no_gpu, functools.partial(_jax_nn, implementation="cudnn")),
        Peer("torch.sdpa", lambda: _missing("torch"), torch_peers.sdpa),
        *(
            Peer(f"tokamax.{name}", functools.partial(_no_tokamax, name), functools.partial(_tokamax, name))
            for name in tokamax
        ),
        Peer(
            "jax.pallas", lambda: None if interpret else _no_gpu(), functools.partial(_jax_pallas, interpret=interpret)
        ),
        Peer("torch.flex", lambda: _missing("torch"), torch_peers.flex_attention, torch_peers.flex_mask),
        Peer("transformers", lambda: _missing("torch") or _missing("transformers"), generation=transformers_contender),
    ]
    return {peer.name: peer for peer in peers}


def _missing(package: str) -> str | None:
    return None if importlib.util.find_spec(package) else f"{package} is not installed"


def _no_gpu() -> str | None:
    return None if jax.default_backend() == "gpu" else "needs an NVIDIA GPU, and JAX sees none"


def _no_tokamax(implementation: str) -> str | None:
    needs_gpu = implementation in ("triton", "mosaic", "cudnn")
    return _missing("tokamax") or (_no_gpu() if needs_gpu else None)


# --- JAX ---


def _structure(workload: Attention, *, ranges: bool) -> tuple[dict[str, Any], dict[str, jax.Array]]:
    """The mask as keywords of ``jax.nn.dot_product_attention``: static ones, and arrays.

    ``ranges``: prefer a window or lengths, for implementations that then skip work.
    """
    match workload.mask:
        case masks.Full() if workload.plain:
            return {}, {}
        case masks.Causal() if workload.plain:
            return {"is_causal": True}, {}
        case masks.SlidingWindow(left=left, right=0) if workload.plain and ranges:
            return {"is_causal": True, "local_window_size": (left - 1, 0)}, {}
    if ranges and (lengths := workload.live_lengths) is not None:
        return {}, {"key_value_seq_lengths": lengths}
    return {}, {"mask": workload.boolean_mask}


def _by_keywords(function: Callable, workload: Attention, sets: int, *, ranges: bool, **fixed) -> Contender:
    static, arrays = _structure(workload, ranges=ranges)

    def attend(query, key, value, *extras):
        return function(query, key, value, **dict(zip(arrays, extras, strict=True)), **static, **fixed)

    return workload.contender(attend, tuple(arrays.values()), sets)


def _refuse_large_logits(workload: Attention) -> None:
    largest = _LARGEST_LOGITS["gpu" if jax.default_backend() == "gpu" else "cpu"]
    needed = workload.logits_bytes * (4 if workload.backward else 1)
    if needed > largest:
        raise NotImplementedError(f"holds the whole T x S matrix: {needed / 2**30:.0f} GiB of logits")


def _jax_nn(workload: Attention, sets: int, *, implementation: str) -> Contender:
    if implementation == "xla":
        _refuse_large_logits(workload)
    elif workload.size.dtype == "float32":
        raise NotImplementedError("needs bfloat16 or float16")
    function = jax.nn.dot_product_attention
    return _by_keywords(function, workload, sets, ranges=implementation == "cudnn", implementation=implementation)


def _tokamax(implementation: str, workload: Attention, sets: int) -> Contender:
    if workload.size.q_len == 1 and jax.default_backend() == "cpu":
        # On two cores it made FlexAttention's next turn ten times slower.
        raise NotImplementedError("needs a second for decode on a CPU, which disturbs the next contender")
    if implementation == "xla":
        _refuse_large_logits(workload)
    function = importlib.import_module("tokamax").dot_product_attention
    # Otherwise tokamax would look for its flags in the command line of this process, and refuse ours.
    importlib.import_module("absl.flags").FLAGS.mark_as_parsed()
    return _by_keywords(function, workload, sets, ranges=True, implementation=implementation)


def _jax_pallas(workload: Attention, sets: int, *, interpret: bool) -> Contender:
    """``jax.experimental.pallas.ops.gpu``: causal and packed attention, and decode by lengths."""
    size, scale = workload.size, workload.size.head_dim**-0.5
    if (lengths := workload.live_lengths) is not None:
        decode = _pallas_op("decode_attention")
        group = size.q_heads // size.kv_heads

        def attend_one(query, key, value, lengths):
            # The kernel's tile has at least 16 query heads.
            options = {"sm_scale": scale, "block_h": max(16, group), "interpret": interpret}
            return decode.gqa(query[:, 0], key, value, kv_seq_len=lengths, **options)[:, None]

        return workload.contender(attend_one, (lengths,), sets)
    if size.q_heads != size.kv_heads:
        raise NotImplementedError("has no grouped-query heads")
    options: dict[str, Any] = {"sm_scale": scale, "interpret": interpret}
    ids = None
    match workload.mask:
        case masks.Full() if workload.plain:
            pass
        case masks.Causal() if workload.plain:
            options["causal"] = True
        case masks.And(left=masks.Segments(q_ids=found), right=masks.Causal()) if workload.plain:
            ids, options["causal"] = found[:, 0, :, 0], True
        case _:
            raise NotImplementedError("supports only causal masks and packed documents")
    mha = _pallas_op("attention").mha
    if ids is None:
        return workload.contender(lambda q, k, v: mha(q, k, v, None, **options), (), sets)
    return workload.contender(lambda q, k, v, ids: mha(q, k, v, ids, **options), (ids,), sets)


def _pallas_op(name: str):
    module = f"jax.experimental.pallas.ops.gpu.{name}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # deprecated upstream
            return importlib.import_module(module)
    except ImportError:
        raise NotImplementedError(f"this JAX has no {module}") from None
