"""The forward kernel at a small setting, and a kernel that breaks a promise on demand."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

import pallas_attn as pa
from bench.machine_code.kernel_cases import CASES, KernelCase, Program, Setting

CASE = {case.name: case for case in CASES}
FORWARD = CASE["forward"]
SIZES = pa.BlockSizes(64, 64, num_warps=4, num_stages=2)
SETTING = Setting(90, 64, "bfloat16", SIZES)


def with_mask_in_full_blocks(masked: bool) -> KernelCase:
    """A kernel of two loops over products; the first compares positions if ``masked``."""

    def kernel(x_ref, bounds_ref, out_ref):
        def step(i, acc, mask):
            y = plgpu.load(x_ref.at[pl.Slice(i * 64, 64), :])
            product = lax.dot_general(y, y, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
            if mask:
                rows, columns = jnp.arange(64)[:, None] * 3, i * 64 + jnp.arange(64)[None, :]
                product = jnp.where(rows >= columns, product, 0.0)
            return acc + product

        acc = jnp.zeros((64, 64), jnp.float32)
        acc = lax.fori_loop(0, bounds_ref[0], lambda i, acc: step(i, acc, masked), acc)
        acc = lax.fori_loop(bounds_ref[0], bounds_ref[1], lambda i, acc: step(i, acc, True), acc)
        plgpu.store(out_ref, acc)

    def program(setting: Setting) -> Program:
        call = pl.pallas_call(
            kernel,
            out_shape=jax.ShapeDtypeStruct((64, 64), jnp.float32),
            compiler_params=plgpu.CompilerParams(num_warps=setting.sizes.num_warps, num_stages=2),
            name="toy",
        )
        arguments = jax.ShapeDtypeStruct((4096, 64), jnp.bfloat16), jax.ShapeDtypeStruct((2,), jnp.int32)
        return Program(call, arguments)

    return KernelCase("toy", "toy", "", ("full", "partial"), program, lambda *_: SIZES)
