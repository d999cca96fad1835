"""The interpreter computes what operations mean, and reports every kind of fault: on kernels of a few lines."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from tests import tolerances
from tests.lowered.execution import executed, lower
from tests.lowered.faults import Watch
from tests.lowered.interpreter import Kernel
from tests.lowered.simplify import simplified
from tests.lowered.ttir import Unsupported, read

rng = np.random.default_rng(0)
N = 16


def call(kernel: Callable, *arrays: np.ndarray, out: Any = None, grid: tuple[int, ...] = (1,), **options: Any) -> Any:
    """Runs a kernel on arrays; the result is like the first one by default."""
    out = out or jax.ShapeDtypeStruct(arrays[0].shape, arrays[0].dtype)
    parameters = plgpu.CompilerParams(num_warps=1)
    return pl.pallas_call(kernel, out_shape=out, grid=grid, compiler_params=parameters, name="toy", **options)(*arrays)


def faults_of(kernel: Callable, *arrays: np.ndarray, **options: Any) -> list[str]:
    with executed() as watch:
        jax.block_until_ready(call(kernel, *arrays, **options))
    return [fault.kind for fault in watch.take()]


def square(dtype: Any = np.float32) -> np.ndarray:
    return (4 * rng.standard_normal((N, N))).astype(dtype)


def doubled_until_large(x: jax.Array) -> jax.Array:
    def step(state):
        count, y = state
        return count + 1, lax.fori_loop(0, count, lambda i, z: z + i.astype(jnp.float32), 2 * y)

    return lax.while_loop(lambda state: jnp.max(state[1]) < 1000, step, (jnp.int32(0), x))[1]


FUNCTIONS = {
    "arithmetic": lambda x: (x + 2) * x - x / 3,
    "minimum, maximum and absolute values": lambda x: jnp.maximum(x, -1) + jnp.minimum(abs(x), 2),
    "exponential functions": lambda x: jnp.exp(x / 4) + jnp.exp2(x / 4),
    "logarithm and roots": lambda x: jnp.log(abs(x) + 1) + jnp.sqrt(abs(x)) + lax.rsqrt(abs(x) + 1),
    "trigonometric functions": lambda x: jnp.sin(x) + jnp.cos(x) + jnp.tanh(x),
    "comparisons": lambda x: jnp.where((x > 0) & ~(x >= 2) | (x != x), x, -x),
    "sum of rows": lambda x: jnp.sum(x, 1)[:, None] + jnp.zeros_like(x),
    "maximum of columns": lambda x: jnp.max(x, 0)[None, :] + jnp.zeros_like(x),
    "argmax": lambda x: x + jnp.argmax(x, 1).astype(jnp.float32)[:, None],
    "product": lambda x: lax.dot_general(x, x, (((1,), (1,)), ((), ())), precision=lax.Precision.HIGHEST),
    "bfloat16": lambda x: (x.astype(jnp.bfloat16) * jnp.bfloat16(0.3)).astype(jnp.float32),
    "integers": lambda x: ((x.astype(jnp.int32) * 7 - 3) // 4 % 5).astype(jnp.float32),
    "bits": lambda x: ((x.astype(jnp.int32) << 3 >> 1) & 12 ^ 5 | 1).astype(jnp.float32),
    "unsigned integers": lambda x: (
        jnp.maximum(x.astype(jnp.int32).astype(jnp.uint32), 9) < x.astype(jnp.int32).astype(jnp.uint32)
    ).astype(jnp.float32),
    "bytes": lambda x: (x.astype(jnp.int8) << 4 >> 4).astype(jnp.float32),
    "casts of bits": lambda x: lax.bitcast_convert_type(lax.bitcast_convert_type(x, jnp.int32) & -2, jnp.float32),
    "a loop in a loop": doubled_until_large,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_of_tiles(name):
    """As XLA computes it."""
    x, function = square(), FUNCTIONS[name]

    def kernel(x_ref, out_ref):
        out_ref[:, :] = function(x_ref[:, :])

    with executed() as watch:
        actual = np.asarray(call(kernel, x))
    watch.assert_clean()
    expected = np.asarray(jax.jit(function)(x))
    limit = tolerances.attention_limit(0, np.abs(expected).max(), jnp.bfloat16 if name == "bfloat16" else np.float32)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=limit)


def test_programs_have_places():
    def kernel(out_ref):
        x, y = pl.program_id(0), pl.program_id(1)
        out_ref[x, y] = 10 * x + y + 100 * pl.num_programs(1)

    with executed() as watch:
        actual = call(kernel, out=jax.ShapeDtypeStruct((4, 8), jnp.int32), grid=(4, 8))
    watch.assert_clean()
    np.testing.assert_array_equal(actual, 10 * np.arange(4)[:, None] + np.arange(8) + 800)
    assert watch.programs == {"toy": 32}


def test_jit_and_vmap():
    def kernel(x_ref, out_ref):
        out_ref[:] = 2 * x_ref[:]

    x = rng.standard_normal((3, N)).astype(np.float32)
    with executed() as watch:
        np.testing.assert_array_equal(jax.jit(jax.vmap(lambda row: call(kernel, row)))(x), 2 * x)
    assert watch.programs == {"toy": 3}


def test_products_of_float32_round_to_tf32_by_default():
    x = square()

    def product(precision):
        def kernel(x_ref, out_ref):
            out_ref[:, :] = lax.dot_general(x_ref[:, :], x_ref[:, :], (((1,), (0,)), ((), ())), precision=precision)

        with executed():
            return np.asarray(call(kernel, x))

    exact = x.astype(np.float64) @ x
    errors = [np.abs(product(precision) - exact).max() for precision in (lax.Precision.HIGHEST, lax.Precision.DEFAULT)]
    assert errors[0] < 2.0**-20 * np.abs(exact).max() < 2.0**-14 * np.abs(exact).max() < errors[1]


# Faults.

ONES = np.ones(N, np.float32)


def lanes() -> jax.Array:
    return jnp.arange(N, dtype=jnp.int32)


def beyond_the_end(x_ref, out_ref):
    out_ref[:] = plgpu.load(x_ref.at[pl.Slice(pl.program_id(0) + 1, N)])


def before_the_start(x_ref, out_ref):
    out_ref[:] = x_ref[lanes() - 1]


def store_beyond_the_end(x_ref, out_ref):
    plgpu.store(out_ref.at[pl.Slice(pl.program_id(0) + 1, N)], x_ref[:])
    plgpu.store(out_ref.at[pl.program_id(0)], jnp.float32(0))


def several_lanes_write(x_ref, out_ref):
    out_ref[lanes() // 2] = x_ref[:]
    out_ref[lanes() // 2 + N // 2] = x_ref[:]


def every_program_writes(x_ref, out_ref):
    out_ref[:] = x_ref[:] + pl.program_id(0).astype(jnp.float32)


def writes_twice(x_ref, out_ref):
    out_ref[:] = x_ref[:]
    out_ref[:] = 2 * x_ref[:]


def half_is_written(x_ref, out_ref):
    plgpu.store(out_ref.at[:], x_ref[:], mask=lanes() < N // 2)


def reads_its_result(x_ref, out_ref):
    out_ref[:] = x_ref[:]
    plgpu.store(out_ref.at[:], 2 * plgpu.load(out_ref.at[:]), mask=lanes() < 0)


def reads_before_it_writes(x_ref, out_ref):
    out_ref[:] = x_ref[:] + plgpu.load(out_ref.at[:])


def divides_by_zero(x_ref, out_ref):
    out_ref[:] = x_ref[:] + lax.div(lanes(), lanes() - 3).astype(jnp.float32)


def shifts_too_far(x_ref, out_ref):
    out_ref[:] = x_ref[:] + lax.shift_left(lanes(), lanes() + 20).astype(jnp.float32)


def an_address_overflows(x_ref, out_ref):
    out_ref[:] = x_ref[lanes() * 400_000_000]


def a_number_overflows(x_ref, out_ref):
    out_ref[:] = x_ref[:] + (lanes() * 400_000_000).astype(jnp.float32)


def a_scalar_overflows(x_ref, out_ref):
    out_ref[:] = x_ref[:] + ((pl.program_id(0) + 5) * 600_000_000).astype(jnp.float32)


FAULTS = {
    beyond_the_end: {"out of bounds"},
    before_the_start: {"out of bounds"},
    store_beyond_the_end: {"out of bounds"},
    several_lanes_write: {"two lanes"},
    writes_twice: {"two writes"},
    half_is_written: {"never written"},
    reads_its_result: {"read after write"},
    reads_before_it_writes: {"unwritten read"},
    divides_by_zero: {"division by zero"},
    shifts_too_far: {"shift too wide"},
    an_address_overflows: {"out of bounds", "overflow"},
    a_number_overflows: {"overflow"},
    a_scalar_overflows: {"overflow"},
}


@pytest.mark.parametrize("kernel", FAULTS, ids=lambda x: x.__name__)
def test_a_fault_is_reported(kernel):
    assert set(faults_of(kernel, ONES)) == FAULTS[kernel]


def test_programs_that_write_one_place():
    assert faults_of(every_program_writes, ONES, grid=(3,)) == ["two writes"]
    assert faults_of(every_program_writes, ONES, grid=(1,)) == []


def test_a_program_reads_what_another_writes():
    """In place, through an alias."""

    def kernel(x_ref, out_ref):
        i = pl.program_id(0)
        out_ref[i] = x_ref[(i + 1) % N]

    def own(x_ref, out_ref):
        i = pl.program_id(0)
        out_ref[i] = 2 * x_ref[i]

    options = {"grid": (N,), "input_output_aliases": {0: 0}}
    assert set(faults_of(kernel, ONES, **options)) == {"write after read", "read after write"}
    assert faults_of(own, ONES, **options) == []


def test_a_later_kernel_reads_what_nobody_wrote():
    def double(x_ref, out_ref):
        out_ref[:] = 2 * x_ref[:]

    with executed() as watch:
        jax.block_until_ready(call(double, call(half_is_written, ONES)))
    assert [fault.kind for fault in watch.take()] == ["never written", "unwritten read"]


def test_excluded_lanes_are_no_fault():
    """They may be anywhere, and overflow; without a default they hold NaN."""

    def kernel(x_ref, out_ref):
        live = lanes() < 3
        x = plgpu.load(x_ref.at[lanes() * 400_000_000], mask=live & (lanes() < 1), other=jnp.float32(5))
        y = plgpu.load(x_ref.at[lanes() + 2 * N], mask=lanes() < 0)
        out_ref[:] = jnp.where(live, x, y)

    with executed() as watch:
        actual = call(kernel, ONES)
    watch.assert_clean()
    np.testing.assert_array_equal(actual, [1, 5, 5, *[np.nan] * (N - 3)])


def test_a_fault_says_where_it_is():
    with executed() as watch:
        jax.block_until_ready(call(beyond_the_end, ONES, grid=(1,)))
    (fault,) = watch.take()
    assert str(fault).startswith("out of bounds: 1 of 16 lanes, operand 0 at element 16 of 16 to operand 0")
    assert "toy, program (0, 0, 0), tt.load from test_lowered_interpreter.py" in str(fault)
    watch.report("overflow", "toy", "here", None, "5 and 6")
    with pytest.raises(AssertionError, match="overflow: 5 and 6"):
        watch.assert_clean()
    watch.assert_clean()  # they are reported once


def test_simplification_removes_repetitions_and_what_is_unused():
    (lowered,) = lower(lambda x: call(every_program_writes, x, grid=(4,)), ONES)
    planted = "%planted = tt.get_program_id x : i32\n%unused = arith.addi %planted, %planted : i32\n"
    text = re.sub(r"\n(.*tt\.get_program_id)", rf"\n{planted}\1", lowered.text, count=1)
    operations = [[x.name for x in f.body.operations] for f in (read(text), simplified(read(text)))]
    assert [names.count("tt.get_program_id") for names in operations] == [2, 1]
    assert "tt.load" in operations[0]
    assert len(operations[1]) < len(operations[0]) - 1
    before, after = (simplified(read(x)).body.operations for x in (lowered.text, text))
    assert [x.name for x in before] == [x.name for x in after]


def test_unknown_assembly_is_an_error():
    (lowered,) = lower(lambda x: call(every_program_writes, x), ONES)
    tile = "tensor<16xf32>"
    assembly = 'tt.elementwise_inline_asm "trap;" {constraints = "=f,f", packed_element = 1 : i32, pure = true}'
    text = re.sub(
        r"tt\.store (%\w+), (%\w+)",
        rf"%planted = {assembly} \2 : {tile} -> {tile}\ntt.store \1, %planted",
        lowered.text,
    )
    with pytest.raises(Unsupported, match="inline assembly 'trap;'"):
        Kernel("toy", text, (1, 1, 1))


def test_the_number_of_buffers_is_checked():
    (lowered,) = lower(lambda x: call(every_program_writes, x), ONES)
    with pytest.raises(ValueError, match="buffers: expected 2 for toy, got 1"):
        lowered.compiled().run([ONES], [], Watch())
