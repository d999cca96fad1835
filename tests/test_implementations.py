"""The choice of an implementation: those available, and the default."""

import pytest

import pallas_attn as pa
from tests.attention_check import NO_GPU, SMALL, assert_same_bits, numbers


def test_implementations_are_told_best_first():
    assert list(pa.implementations()) == ["triton", "xla", "reference"]
    assert pa.implementations()["xla"] is None
    assert pa.implementations()["reference"] is None


@pytest.mark.skipif(NO_GPU is None, reason="says why there are no compiled kernels, and here they are")
def test_without_a_gpu_the_reason_says_so_and_xla_serves():
    assert "NVIDIA GPU" in pa.implementations()["triton"]
    query, key, value = numbers(SMALL)
    assert_same_bits(
        pa.attention(query, key, value, pa.masks.causal()),
        pa.attention(query, key, value, pa.masks.causal(), implementation="xla"),
    )


@pytest.mark.gpu
def test_with_a_gpu_the_compiled_kernels_serve():
    query, key, value = numbers(SMALL)
    assert_same_bits(
        pa.attention(query, key, value, pa.masks.causal()),
        pa.attention(query, key, value, pa.masks.causal(), implementation="triton"),
    )
