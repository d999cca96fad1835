"""Block sizes: how a call is divided into tiles. They change speed, not results."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from pallas_attn import checks

Kernel = Literal["forward", "key_weights", "decode", "d_query", "d_key_value", "d_key_value_bias", "d_score"]


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """The number of queries and keys that one step of a kernel processes.

    ``num_warps`` and ``num_stages`` are options of the Triton compiler; its blocks are powers of two, at least 16.
    ``chunk`` and ``shares`` set how the Triton decode kernel splits work (:mod:`pallas_attn.schedule`): ``chunk`` KV
    blocks per program, so that a row's bits are independent of the rest of the batch, or, by default, the live blocks
    of the whole batch in ``shares`` equal parts.
    """

    q: int
    kv: int
    num_warps: int = 4
    num_stages: int = 2
    chunk: int | None = None
    shares: int = 128

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "chunk" and value is None:
                continue
            value = checks.integer(f"BlockSizes.{field.name}", value, least=1, most=checks.LONGEST_AXIS)
            object.__setattr__(self, field.name, value)


# Triton: (bytes per element, oldest compute capability, largest head size) -> entry; the first match applies. The
# entries come from `python -m bench.static --sweep`: among the sizes that PyPI's Triton compiles without spills under
# every mask of its cases (with scores: without spills in a loop), those with the best estimate, or up to a few percent
# worse where only those leave shared memory for tiles of a bias. Some float32 entries for wide heads are smaller,
# because XLA spills with those of the sweep (bench/README.md has the costs). float32 products use no tensor cores (TF32
# would lose 13 bits), so their tiles are small. The entries from 8.6 on fit, even with a bias, in the 99 KiB of shared
# memory per block there.
_TABLES: dict[Kernel, dict[tuple[int, float, int], BlockSizes]] = {
    "forward": {
        (2, 9.0, 64): BlockSizes(128, 64, num_warps=8, num_stages=2),
        (2, 9.0, 128): BlockSizes(128, 64, num_warps=8, num_stages=3),
        (2, 9.0, 256): BlockSizes(128, 32, num_warps=8, num_stages=3),
        (2, 8.0, 64): BlockSizes(128, 64, num_warps=8, num_stages=3),
        (2, 8.6, 128): BlockSizes(128, 32, num_warps=8, num_stages=3),
        (2, 8.0, 128): BlockSizes(128, 64, num_warps=8, num_stages=3),
        (2, 8.6, 256): BlockSizes(64, 32, num_warps=8, num_stages=2),
        (2, 8.0, 256): BlockSizes(32, 64, num_warps=4, num_stages=2),
        (4, 9.0, 64): BlockSizes(32, 32, num_warps=4, num_stages=3),
        (4, 8.0, 64): BlockSizes(32, 64, num_warps=8, num_stages=2),
        (4, 9.0, 128): BlockSizes(32, 16, num_warps=8, num_stages=2),
        (4, 8.0, 128): BlockSizes(32, 32, num_warps=8, num_stages=3),
        (4, 9.0, 256): BlockSizes(16, 32, num_warps=8, num_stages=2),
        (4, 8.6, 256): BlockSizes(32, 16, num_warps=8, num_stages=2),
        (4, 8.0, 256): BlockSizes(32, 16, num_warps=8, num_stages=2),
    },
    # dQ. (2, 9.0, 128) is the forward entry, so that the two share block lists. At D 256, 32 x 64 needs slightly more
    # shared memory than 8.6 and 8.9 have.
    "d_query": {
        (2, 9.0, 64): BlockSizes(64, 64, num_warps=4, num_stages=2),
        (2, 9.0, 128): BlockSizes(128, 64, num_warps=8, num_stages=3),
        (2, 9.0, 256): BlockSizes(128, 32, num_warps=8, num_stages=2),
        (2, 8.0, 64): BlockSizes(128, 64, num_warps=8, num_stages=2),
        (2, 8.0, 128): BlockSizes(128, 32, num_warps=8, num_stages=2),
        (2, 8.6, 256): BlockSizes(32, 32, num_warps=8, num_stages=2),
        (2, 8.0, 256): BlockSizes(32, 64, num_warps=4, num_stages=2),
        (4, 9.0, 64): BlockSizes(64, 32, num_warps=8, num_stages=3),
        (4, 9.0, 128): BlockSizes(32, 16, num_warps=8, num_stages=2),
        (4, 9.0, 256): BlockSizes(32, 16, num_warps=8, num_stages=2),
        (4, 8.0, 64): BlockSizes(32, 32, num_warps=4, num_stages=2),
        (4, 8.0, 128): BlockSizes(32, 16, num_warps=8, num_stages=2),
        (4, 8.0, 256): BlockSizes(16, 16, num_warps=8, num_stages=2),
    },
    # dK and dV; the kernel holds two accumulators with a row per key. Many keys and few queries estimate best, because
    # every warp reads a row of queries from shared memory. 16 queries, and at D 256 16 keys, are smaller than the sizes
    # in the sweep, and better than all of those that do not spill.
    "d_key_value": {
        (2, 9.0, 64): BlockSizes(64, 64, num_warps=4, num_stages=2),
        (2, 9.0, 128): BlockSizes(32, 128, num_warps=8, num_stages=2),
        (2, 8.0, 64): BlockSizes(32, 128, num_warps=8, num_stages=2),
        (2, 8.0, 128): BlockSizes(16, 128, num_warps=8, num_stages=2),
        (2, 8.0, 256): BlockSizes(32, 16, num_warps=4, num_stages=2),
        (4, 8.0, 64): BlockSizes(16, 64, num_warps=8, num_stages=2),
        (4, 9.0, 128): BlockSizes(32, 32, num_warps=8, num_stages=2),
        (4, 9.0, 256): BlockSizes(16, 32, num_warps=8, num_stages=3),
        (4, 8.0, 128): BlockSizes(16, 64, num_warps=8, num_stages=2),
        (4, 8.0, 256): BlockSizes(16, 32, num_warps=8, num_stages=2),
    },
    # Decode; a tile holds the queries of a group. Also chosen for 8- and 4-bit keys. Decode with plain keys is bound by
    # memory, so among entries with similar clock estimates the one with more bytes in flight is taken.
    "decode": {
        (2, 8.0, 64): BlockSizes(16, 64, num_warps=4, num_stages=3),
        (2, 9.0, 128): BlockSizes(16, 64, num_warps=4, num_stages=3),
        (2, 8.0, 128): BlockSizes(16, 32, num_warps=4, num_stages=3),
        (2, 9.0, 256): BlockSizes(16, 32, num_warps=4, num_stages=3),
        (2, 8.6, 256): BlockSizes(16, 32, num_warps=8, num_stages=2),
        (2, 8.0, 256): BlockSizes(16, 32, num_warps=4, num_stages=3),
        (4, 8.0, 64): BlockSizes(16, 32, num_warps=4, num_stages=3),
        (4, 9.0, 256): BlockSizes(16, 16, num_warps=8, num_stages=3),
        (4, 8.0, 128): BlockSizes(16, 16, num_warps=8, num_stages=2),
        (4, 8.0, 256): BlockSizes(16, 16, num_warps=8, num_stages=3),
    },
}

# Key weights take the blocks of the forward pass, whose lists they share, where they do not spill; with one tile per
# block more stages fit.
_TABLES["key_weights"] = {
    key: dataclasses.replace(sizes, num_stages=max(3, sizes.num_stages)) for key, sizes in _TABLES["forward"].items()
} | {
    (4, 9.0, 256): BlockSizes(32, 16, num_warps=8, num_stages=3),
    (4, 8.6, 256): BlockSizes(16, 16, num_warps=8, num_stages=2),
    (4, 8.0, 256): BlockSizes(64, 16, num_warps=8, num_stages=2),
}

# With tiles of a bias, the entries above would spill.
_TABLES["d_key_value_bias"] = _TABLES["d_key_value"] | {
    (2, 8.0, 64): BlockSizes(16, 128, num_warps=8, num_stages=2),
    (2, 8.0, 128): BlockSizes(64, 64, num_warps=8, num_stages=2),
}

# The gradients of scores share the block lists of dQ where possible; their kernel holds more, so some of those entries
# would spill.
_TABLES["d_score"] = _TABLES["d_query"] | {
    (2, 9.0, 128): BlockSizes(64, 64, num_warps=8, num_stages=3),
    (2, 9.0, 256): BlockSizes(64, 64, num_warps=8, num_stages=2),
    (2, 8.0, 64): BlockSizes(128, 32, num_warps=8, num_stages=2),
    (2, 8.6, 256): BlockSizes(32, 64, num_warps=8, num_stages=2),
    (2, 8.0, 256): BlockSizes(32, 64, num_warps=8, num_stages=2),
}

# XLA on CPU: large enough that a step's products outweigh its dispatch, small enough that a tile stays in cache and,
# for masks with fine edges, that little is computed beyond the edges.
_XLA_BLOCK = 256
_XLA_BLOCK_FINE = 128

# A page is a whole number of the smallest kernel blocks.
PAGE_MULTIPLE = 16

# Calls with at most this many queries are decode: the heads of a group form one tile, and programs share live blocks.
DECODE_QUERIES = 16


def default_block_sizes(
    q_len: int,
    kv_len: int,
    *,
    implementation: str | None = None,
    kernel: Kernel = "forward",
    head_dim: int = 128,
    dtype: jax.typing.DTypeLike = jnp.bfloat16,
    compute_capability: float | None = None,
    fine: bool = False,
) -> BlockSizes:
    """Looks up the block sizes for a call.

    Args:
      q_len, kv_len: T and S.
      implementation: "triton", "xla" or "reference"; default: "triton" where JAX has a GPU, else "xla".
      kernel: the Triton kernel: the forward pass (decode for few queries), key weights after it, dQ, dK and dV without
        or with tiles of a bias, or the gradients of scores.
      head_dim, dtype: of the call, if known.
      compute_capability: of the GPU; default: this machine's, or 9.0 without a GPU.
      fine: ``mask.has_fine_edges()`` of the call's mask, if known. Only XLA's entries depend on it.
    """
    if implementation is None:
        implementation = "triton" if jax.default_backend() == "gpu" else "xla"
    if implementation != "triton":
        block = _XLA_BLOCK_FINE if fine and q_len > DECODE_QUERIES else _XLA_BLOCK
        return BlockSizes(min(q_len, block), min(kv_len, block))
    capability = gpu_capability() if compute_capability is None else compute_capability
    # 12.0 and later (GeForce, RTX PRO) lack the matrix instructions and the shared memory of 9.0 and 10.0.
    capability = 8.9 if capability >= 12.0 else capability
    itemsize = jnp.dtype(dtype).itemsize
    table = _TABLES["decode" if kernel == "forward" and q_len <= DECODE_QUERIES else kernel]
    fitting = (
        sizes
        for (bytes_per_element, oldest, largest), sizes in table.items()
        if itemsize == bytes_per_element and capability >= oldest and head_dim <= largest
    )
    # If no entry matches, the implementation raises with its own reason.
    return next(fitting, table[4, 8.0, 256])


def gpu_capability() -> float:
    """The compute capability of this machine's GPU, or 9.0 without a GPU."""
    try:
        return float(jax.devices("cuda")[0].compute_capability)
    except RuntimeError:
        return 9.0
