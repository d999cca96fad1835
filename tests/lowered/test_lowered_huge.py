"""Offsets into arrays around 2^31 elements, and around 2^32 bytes, where they change from 32 to 64 bits."""

import functools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest

import pallas_attn as pa
from pallas_attn.kernels import triton as kernels
from pallas_attn.kernels.call import Call
from pallas_attn.kernels.lse import Lse
from tests.lowered.faults import Watch
from tests.lowered.virtual import Corner, Visit, at_corners

shape = jax.ShapeDtypeStruct
CAUSAL = pa.masks.causal()


class Prefill(NamedTuple):
    """A call, with as many queries as keys."""

    batch: int
    length: int
    q_heads: int
    kv_heads: int
    head_dim: int
    dtype: Any = jnp.bfloat16
    mask: tuple[int, ...] | None = None
    bias: tuple[int, ...] | None = None
    block: int = 64

    @property
    def corners(self) -> list[Corner]:
        """The last full block, and the last block."""
        return [Corner(self.length // self.block - 1, True), Corner(-(-self.length // self.block) - 1, False)]

    def operands(self) -> tuple:
        """Query, key, the positions of both, the mask, the scores, and lse."""
        query, key = (
            shape((self.batch, self.length, n, self.head_dim), self.dtype) for n in (self.q_heads, self.kv_heads)
        )
        positions = shape((self.batch, self.length), jnp.int32)
        mask = CAUSAL if self.mask is None else jax.eval_shape(pa.masks.dense, shape(self.mask, jnp.bool_))
        scores = () if self.bias is None else (jax.eval_shape(pa.scores.bias, shape(self.bias, self.dtype)),)
        lse = shape((self.batch, self.q_heads, self.length), jnp.float32)
        return query, key, positions, positions, mask, scores, lse

    def all_kernels(self, query, key, q_positions, kv_positions, mask, scores, lse) -> None:
        """Traces both passes and key weights."""
        sizes, scale = pa.BlockSizes(self.block, self.block), self.head_dim**-0.5
        call = Call(query, key, key, pa.BlockMask.from_mask(mask, q_positions, kv_positions, sizes), scores)
        kernels.prefill(call, scale=scale)
        kernels.backward(call, Lse(lse, lse), lse, query, scale=scale, block_sizes=sizes)
        kernels.key_weights(call, Lse(lse, lse), scale=scale, block_sizes=sizes)


class Decode(NamedTuple):
    """A call of four queries."""

    batch: int
    kv_len: int
    kind: Any = None
    page: int | None = None
    kv_heads: int = 8
    head_dim: int = 128
    block: int = 64

    @property
    def pages(self) -> int:
        return self.batch * self.kv_len // (self.page or 1)

    @property
    def corners(self) -> list[Corner]:
        more = {"row": self.batch - 1, "page": self.pages - 1}
        blocks = [(self.kv_len // self.block - 1, True), (-(-self.kv_len // self.block) - 1, False)]
        return [Corner(*x, **more) for x in blocks]

    def operands(self) -> tuple:
        """Query, key, the positions of both, and the page table."""
        leading = (self.pages, self.page) if self.page else (self.batch, self.kv_len)
        key: Any = shape((*leading, self.kv_heads, self.head_dim), jnp.bfloat16)
        if self.kind:
            key = jax.eval_shape(functools.partial(pa.QuantizedArray.quantize, kind=self.kind), key)
        query = shape((self.batch, 4, 4 * self.kv_heads, self.head_dim), jnp.bfloat16)
        table = shape((self.batch, self.kv_len // self.page), jnp.int32) if self.page else None
        positions = (shape((self.batch, n), jnp.int32) for n in (4, self.kv_len))
        return query, key, *positions, table

    def all_kernels(self, query, key, q_positions, kv_positions, table) -> None:
        block_mask = pa.BlockMask.from_mask(CAUSAL, q_positions, kv_positions, pa.BlockSizes(16, self.block))
        call = Call(query, key, key, block_mask, page_table=table)
        kernels.decode(call, scale=0.1, return_key_weights=True)


CASES = {
    "one row, below 2^31": Prefill(1, 2**19 - 3, 32, 8, 128),
    "one row, 2^31": Prefill(1, 2**19, 32, 8, 128),
    "one row, above 2^31": Prefill(1, 2**19 + 5, 32, 8, 128),
    "many rows, below 2^31": Prefill(255, 2**14 - 3, 8, 8, 64),
    "float32, below 2^30": Prefill(1, 2**18 - 3, 32, 32, 128, jnp.float32, block=32),
    "float32, above 2^30": Prefill(1, 2**18 + 5, 32, 32, 128, jnp.float32, block=32),
    "D 80, the rows of the last tile end above 2^31": Prefill(1, 559240, 48, 48, 80),
    "a mask of bytes below 2^31": Prefill(1, 46339, 2, 2, 64, mask=(1, 1, 46339, 46339)),
    "a bias below 2^31": Prefill(1, 46339, 2, 2, 64, bias=(1, 1, 46339, 46339)),
    "a bias below 2^32": Prefill(1, 46339, 2, 2, 64, bias=(1, 2, 46339, 46339)),
    "decode, below 2^31": Decode(1, 2**21 - 3),
    "decode, above 2^31": Decode(63, 2**17 + 5),
    "decode, int8 below 2^31": Decode(1, 2**21 - 3, "int8"),
    "decode, int4 below 2^31": Decode(2, 2**21 - 3, "int4"),
    "decode, pages": Decode(15, 2**17, page=64),
    "decode, small pages, above 2^31": Decode(17, 2**17, page=16),
    "decode, int8 pages": Decode(7, 2**18, "int8", page=64),
}
QUICK = {"one row, below 2^31", "decode, above 2^31"}


def visits_of(case: Prefill | Decode, watch: Watch) -> list[Visit]:
    return at_corners(case.all_kernels, case.operands(), case.corners, watch)


@pytest.mark.parametrize("name", [x if x in QUICK else pytest.param(x, marks=pytest.mark.slow) for x in CASES])
def test_no_offset_overflows(name):
    case, watch = CASES[name], Watch()
    visits = visits_of(case, watch)
    watch.assert_clean()
    prefill = {f"pallas_attn_{x}" for x in ("forward", "d_query", "d_key_value", "key_weights")}
    decode = {f"pallas_attn_{x}" for x in ("decode", "merge", "decode_weights")}
    assert watch.programs.keys() >= (prefill if isinstance(case, Prefill) else decode)
    large = [x for visit in visits for x in visit.buffers if x.size > 2**29 and x.highest >= 0]
    assert large
    # Programs got to the last rows of each.
    assert all(x.highest > x.size - 2**20 for x in large), [(x.name, x.size, x.highest) for x in large]


def test_offsets_have_64_bits_only_where_needed():
    below, above = (visits_of(CASES[f"decode, {x} 2^31"], Watch()) for x in ("below", "above"))
    is_wide = [bool(re.search(r"tt\.addptr .*xi64>", visits[0].text)) for visits in (below, above)]
    assert is_wide == [False, True]


def test_an_array_of_bytes_above_2_to_the_31_overflows():
    """Which is why such calls are refused."""
    watch = Watch()
    visits_of(Decode(1, 2**21 + 5, "int8"), watch)
    assert {fault.kind for fault in watch.take()} >= {"overflow"}
