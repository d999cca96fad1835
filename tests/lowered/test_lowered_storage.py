"""Executed kernels read keys and values however they are stored: quantized, in pages, and both."""

import dataclasses

import numpy as np
import pytest

from tests import oracle
from tests.attention_check import HOLES, LAST, LEFT
from tests.lowered.calls import Case, check
from tests.oracle import positions

CAUSAL = oracle.causal()
DECODE = {"q_len": 3, "q_positions": LAST[:, -3:]}
QUANTIZED = {
    "int8": Case(CAUSAL, LAST, LEFT, key_kind="int8", value_kind="int8"),
    "int4, bfloat16": Case(CAUSAL, LAST, LEFT, key_kind="int4", value_kind="int4", head_dim=64, dtype="bfloat16"),
    "float8 keys, plain values": Case(CAUSAL, LAST, LEFT, key_kind="float8_e4m3fn", dtype="float16"),
    "decode, int8, wide heads": Case(
        CAUSAL, kv_positions=LEFT, key_kind="int8", value_kind="int8", head_dim=136, key_weights=True, **DECODE
    ),
    "decode, int4, groups of 3": Case(
        CAUSAL, kv_positions=HOLES, key_kind="int4", value_kind="int4", head_dim=96, group=3, **DECODE
    ),
    "decode, plain keys, float8 values": Case(CAUSAL, kv_positions=LEFT, value_kind="float8_e4m3fn", **DECODE),
}
# Rows share a page; some entries are no page.
TABLE = np.array([[4, 1, 7], [-1, 1, 2]], np.int32)
FAR_TABLE = np.array([[4, 2**31 - 1, 3], [0, 99, -(2**31)]], np.int32)
PAGES = {
    "blocks of one page": Case(CAUSAL, page_table=TABLE),
    "blocks of two pages": Case(CAUSAL, page_table=FAR_TABLE, block_sizes=(16, 32)),
    "blocks within a page": Case(CAUSAL, page_table=np.array([[3], [1]], np.int32), page=48),
    "blocks of neither": Case(CAUSAL, page_table=np.array([[3], [1]], np.int32), page=48, block_sizes=(16, 32)),
    "int8": Case(CAUSAL, page_table=TABLE, key_kind="int8", value_kind="int8"),
}


@pytest.mark.parametrize("name", QUANTIZED)
def test_quantized(name, watch):
    check(QUANTIZED[name])


@pytest.mark.parametrize("q_len", [1, 21])
@pytest.mark.parametrize("name", PAGES)
def test_pages(name, q_len, watch):
    q_positions = positions(q_len, start=48 - q_len)[None]
    check(dataclasses.replace(PAGES[name], q_len=q_len, q_positions=q_positions, kv_len=48, key_weights=True))
