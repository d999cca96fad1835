"""Block sizes: how a call is cut into tiles. They change speed, never meaning."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from pallas_attn import checks

Kernel = Literal["forward", "decode", "d_query", "d_key_value", "d_key_value_bias", "d_score"]


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """How many queries and keys one step of a kernel works on.

    ``num_warps`` and ``num_stages`` speak to the Triton compiler alone, whose blocks are powers of two, at least 16.
    ``chunk`` and ``shares`` say how its decode kernel shares work (:mod:`pallas_attn.schedule`): ``chunk`` KV blocks
    per program, so that a row's bits do not depend on the rest of the batch, or, by default, the live blocks of the
    whole batch in ``shares`` equal parts.
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


# Triton: (bytes per element, oldest compute capability, largest head size) -> entry; the first that fits is taken. They
# are chosen by `python -m bench.static --sweep`: of the sizes that compile without a spill under every mask of its
# cases, and with scores without one in a loop, those of the best estimate, or a few percent more where only those leave
# shared memory for tiles of a bias. Products of float32 take no tensor cores (TF32 would lose 13 bits), so their tiles
# are small. The entries from 8.6 on fit into the 99 KiB of shared memory that a block has there, with a bias too.
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
        (4, 9.0, 64): BlockSizes(32, 64, num_warps=8, num_stages=3),
        (4, 8.0, 64): BlockSizes(32, 64, num_warps=8, num_stages=2),
        (4, 9.0, 128): BlockSizes(32, 64, num_warps=8, num_stages=2),
        (4, 8.0, 128): BlockSizes(32, 32, num_warps=8, num_stages=3),
        (4, 8.0, 256): BlockSizes(16, 32, num_warps=8, num_stages=2),
    },
    # The same for dQ. (2, 9.0, 128) is the forward entry, whose lists it shares. At D 256, 32 x 64 needs a little more
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
        (4, 9.0, 128): BlockSizes(32, 64, num_warps=8, num_stages=2),
        (4, 9.0, 256): BlockSizes(16, 64, num_warps=8, num_stages=2),
        (4, 8.0, 64): BlockSizes(32, 32, num_warps=4, num_stages=2),
        (4, 8.0, 128): BlockSizes(32, 16, num_warps=8, num_stages=2),
        (4, 8.0, 256): BlockSizes(16, 16, num_warps=8, num_stages=2),
    },
    # The same for dK and dV, whose kernel holds two sums with a row per key. Many keys and few queries estimate best: a
    # row of queries is read from shared memory by every warp. 16 queries, and at D 256 16 keys, are smaller than what
    # the sweep tries, and better than what of that does not spill.
    "d_key_value": {
        (2, 9.0, 64): BlockSizes(64, 64, num_warps=4, num_stages=2),
        (2, 9.0, 128): BlockSizes(32, 128, num_warps=8, num_stages=2),
        (2, 8.0, 64): BlockSizes(32, 128, num_warps=8, num_stages=2),
        (2, 8.0, 128): BlockSizes(16, 128, num_warps=8, num_stages=2),
        (2, 8.0, 256): BlockSizes(32, 16, num_warps=4, num_stages=2),
        (4, 8.0, 64): BlockSizes(16, 64, num_warps=8, num_stages=2),
        (4, 9.0, 128): BlockSizes(32, 32, num_warps=8, num_stages=2),
        (4, 9.0, 256): BlockSizes(16, 32, num_warps=8, num_stages=3),
        (4, 8.0, 128): BlockSizes(16, 32, num_warps=8, num_stages=2),
        (4, 8.0, 256): BlockSizes(16, 16, num_warps=8, num_stages=2),
    },
    # The same for decode, whose tile holds the queries of a group, and with keys of eight or four bits too. Plain keys
    # wait for memory; so where clocks differ little, the entry with more bytes on their way is taken.
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

# With tiles of a bias, the entries that are best without one would spill.
_TABLES["d_key_value_bias"] = _TABLES["d_key_value"] | {
    (2, 8.0, 64): BlockSizes(16, 128, num_warps=8, num_stages=2),
    (2, 8.0, 128): BlockSizes(64, 64, num_warps=8, num_stages=2),
}

# The gradients of scores share the lists of dQ where they can; but their kernel holds more, and some of those entries
# would spill.
_TABLES["d_score"] = _TABLES["d_query"] | {
    (2, 9.0, 128): BlockSizes(64, 64, num_warps=8, num_stages=3),
    (2, 9.0, 256): BlockSizes(64, 64, num_warps=8, num_stages=2),
    (2, 8.0, 64): BlockSizes(128, 32, num_warps=8, num_stages=2),
    (2, 8.6, 256): BlockSizes(32, 64, num_warps=8, num_stages=2),
    (2, 8.0, 256): BlockSizes(32, 64, num_warps=8, num_stages=2),
}

# XLA on CPU: large enough that a step's products outweigh its dispatch, small enough that a tile stays in cache, and,
# where a mask has edges in many places, that little is computed beyond them.
_XLA_BLOCK = 256
_XLA_BLOCK_FINE = 128

# A page is a whole number of the smallest blocks of a kernel.
PAGE_MULTIPLE = 16

# Up to so many queries a call is decode: the rows of a group make one tile, and the live blocks are shared out.
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
    """The entry of the table for a call.

    Args:
      q_len, kv_len: T and S.
      implementation: "triton", "xla" or "reference"; default: "triton" where JAX has a GPU, else "xla".
      kernel: which of the Triton kernels: the forward pass (decode for few queries), dQ, dK and dV without or with
        tiles of a bias, or the gradients of scores.
      head_dim, dtype: of the call, where known.
      compute_capability: of the GPU; default: this machine's, or 9.0 where there is none.
      fine: ``mask.is_fine()`` of the call's mask, where known. Only XLA's entries depend on it.
    """
    if implementation is None:
        implementation = "triton" if jax.default_backend() == "gpu" else "xla"
    if implementation != "triton":
        block = _XLA_BLOCK_FINE if fine and q_len > DECODE_QUERIES else _XLA_BLOCK
        return BlockSizes(min(q_len, block), min(kv_len, block))
    capability = gpu_capability() if compute_capability is None else compute_capability
    # From 12.0 on (GeForce, RTX PRO) there are neither the matrix instructions nor the shared memory of 9.0 and 10.0.
    capability = 8.9 if capability >= 12.0 else capability
    itemsize = jnp.dtype(dtype).itemsize
    table = _TABLES["decode" if kernel == "forward" and q_len <= DECODE_QUERIES else kernel]
    fitting = (
        sizes
        for (bytes_per_element, oldest, largest), sizes in table.items()
        if itemsize == bytes_per_element and capability >= oldest and head_dim <= largest
    )
    # What no entry fits, the implementation refuses with its own reason.
    return next(fitting, table[4, 8.0, 256])


def gpu_capability() -> float:
    """The compute capability of this machine's GPU; 9.0 where there is none."""
    try:
        return float(jax.devices("cuda")[0].compute_capability)
    except RuntimeError:
        return 9.0
