"""Random calls and their gradients equal the oracle."""

import contextlib

import jax
import numpy as np
import pytest
from hypothesis import Phase, example, given, settings

from tests import oracle, strategies
from tests.gradient_check import Case, check


def capped_twice(factor: float) -> Case:
    """Cancellation is frequent: in flat parts of caps, and for queries that see one or two keys."""
    holes = np.array([[*(4, 5, -1, -1), *range(8, 15), -1, *range(16, 20), -1, 21, -1, 23, 24, 25]], np.int32)
    return Case(
        oracle.chunked(2),
        np.arange(-3, 7, dtype=np.int32)[None],
        holes,
        batch=3,
        q_len=10,
        kv_len=22,
        q_heads=1,
        kv_heads=1,
        head_dim=32,
        scale=-0.3,
        block_sizes=(16, 32),
        scores=(oracle.factor(np.array([factor], np.float32)), oracle.softcap(0.5), oracle.softcap(0.5)),
    )


def one_bias_for_all() -> Case:
    """Its gradient is the sum of all derivatives of logits, which cancel; float16 rounds outputs."""
    row = np.arange(5, 28, dtype=np.int32)
    nothing = np.full_like(row, -1)
    generator = np.random.default_rng(0)
    shapes = (1, 6, 4, 1), (1, 1, 1, 1)
    return Case(
        oracle.sliding_window(0, 5),
        np.arange(4, dtype=np.int32)[None],
        np.stack([row, nothing, nothing])[:, None],
        batch=3,
        q_len=4,
        kv_len=23,
        q_heads=6,
        kv_heads=2,
        head_dim=32,
        value_dim=8,
        dtype="float16",
        block_sizes=(16, 32),
        scores=tuple(oracle.bias(generator.standard_normal(shape).astype(np.float32)) for shape in shapes),
    )


@contextlib.contextmanager
def quickly_compiled():
    """Without LLVM's optimizations, which take most of the time of a program that runs once."""
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", False)


@pytest.mark.parametrize(
    ("implementation", "examples"),
    [
        ("xla", 4),
        pytest.param("xla", 500, marks=pytest.mark.slow),
        pytest.param("interpreted", 60, marks=pytest.mark.slow),
        pytest.param("triton", 100, marks=[pytest.mark.gpu, pytest.mark.slow]),
    ],
)
def test_random_programs_equal_the_oracle(implementation, examples):
    @settings(max_examples=examples, phases=[Phase.explicit, Phase.generate])
    @example(capped_twice(-1.5))
    @example(one_bias_for_all())
    @given(strategies.programs())
    def check_one(case):
        check(case, implementation, few_pairs=True)

    many_on_a_cpu = examples > 15 and implementation != "triton"
    with quickly_compiled() if many_on_a_cpu else contextlib.nullcontext():
        check_one()
