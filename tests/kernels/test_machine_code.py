"""The Triton kernels as machine code, for GPUs that are not there."""

import re

import jax
import jax.numpy as jnp
import pytest

import pallas_attn as pa
from pallas_attn import tuning
from pallas_attn.kernels import triton as kernels
from pallas_attn.kernels.call import Call

pytest.importorskip("triton", reason="PyPI's triton, which compiles without a GPU, is not installed")

from bench.machine_code.compiled import compile_kernels, lower_for_cuda
from bench.machine_code.kernel_cases import CASES, Setting

CAUSAL = pa.masks.causal()
BACKWARD = ("d-query-bias", "d-key-value-bias", "d-score-bias")
COMPOSED = pa.masks.causal() & pa.masks.sliding_window(300) | pa.masks.sink(4)


def compiled(mask, head_dim, dtype, capability, value_dim=None):
    sizes = tuning.default_block_sizes(
        2048, 2048, implementation="triton", head_dim=head_dim, dtype=dtype, compute_capability=capability / 10
    )

    def forward(query, key, value, q_positions, kv_positions):
        block_mask = pa.BlockMask.from_mask(mask, q_positions, kv_positions, sizes)
        return kernels.forward(Call(query, key, value, block_mask), scale=head_dim**-0.5)

    def struct(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct(shape, dtype)

    lowered = lower_for_cuda(
        forward,
        struct(2, 2048, 8, head_dim),
        struct(2, 2048, 2, head_dim),
        struct(2, 2048, 2, value_dim or head_dim),
        struct(2, 2048, dtype=jnp.int32),
        struct(2, 2048, dtype=jnp.int32),
        capability=capability,
    )
    (kernel,) = compile_kernels(lowered, capability)
    return kernel


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(
    "mask", [pytest.param(CAUSAL, marks=pytest.mark.slow, id="causal"), pytest.param(COMPOSED, id="composed")]
)
def test_default_blocks_do_not_spill(mask, head_dim, capability):
    kernel = compiled(mask, head_dim, jnp.bfloat16, capability)
    assert (kernel.stack_bytes, kernel.spill_stores) == (0, 0)
    assert kernel.registers <= 255
    assert "cp.async" in kernel.ptx, "keys and values are not copied asynchronously"
    assert ("wgmma.mma_async" if capability == 90 else "mma.sync") in kernel.ptx, "no tensor cores"


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_every_default_entry_fits(dtype, head_dim, capability):
    kernel = compiled(COMPOSED, head_dim, dtype, capability)
    assert (kernel.stack_bytes, kernel.spill_stores) == (0, 0)


def test_masks_with_arrays_and_odd_head_sizes_compile():
    mask = pa.masks.dense(jnp.ones((2, 8, 2048, 2048), jnp.bool_)) & pa.masks.prefix(jnp.array([3, 900]))
    kernel = compiled(mask, 80, jnp.bfloat16, 90, value_dim=48)
    assert kernel.spill_stores == 0


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize(
    "name", ["forward-bias", "key-weights-bias", *(pytest.param(name, marks=pytest.mark.slow) for name in BACKWARD)]
)
def test_entries_from_8_6_on_fit_into_99_kib_with_a_bias(name, head_dim):
    (case,) = [case for case in CASES if case.name == name]
    setting = Setting(80, head_dim, "bfloat16", case.default_sizes(head_dim, "bfloat16", 86))
    (code,) = compile_kernels(case.lower(setting), 80, name=case.kernel)
    assert code.shared_bytes <= 99 * 1024


def test_geforce_has_the_entries_of_its_shared_memory():
    for kernel in ("forward", "d_query", "d_key_value", "d_key_value_bias", "d_score"):
        for head_dim in (64, 128, 256):
            options = {"implementation": "triton", "kernel": kernel, "head_dim": head_dim}
            ada, blackwell = (
                tuning.default_block_sizes(2048, 2048, compute_capability=capability, **options)
                for capability in (8.9, 12.0)
            )
            assert ada == blackwell


def definitions(ptx: str) -> dict[str, list[tuple[str, list[str]]]]:
    """Of every register, the instructions that write it: their names and what they read."""
    found: dict[str, list[tuple[str, list[str]]]] = {}
    for line in ptx.splitlines():
        match = re.match(r"\s*([a-z][\w.:]*)\s+(%\w+), (.*);", line)
        if match:
            name, register, read = match.groups()
            found.setdefault(register, []).append((name, read.split(", ")))
    return found


EXPONENTS = ("forward", "d-key-value-bias", "decode-merge")
ALL_EXPONENTS = ("d-query", "d-key-value", "key-weights-bias", "d-score-bias", "decode-int8", "decode-weights")


@pytest.mark.parametrize("name", [*EXPONENTS, *(pytest.param(x, marks=pytest.mark.slow) for x in ALL_EXPONENTS)])
def test_every_exponent_begins_with_a_rounded_difference(name):
    """Which no compiler may fuse with the product that a logit is: that would not be at most 0."""
    (case,) = [case for case in CASES if case.name == name]
    setting = Setting(90, 64, "bfloat16", case.default_sizes(64, "bfloat16", 90))
    (code,) = compile_kernels(case.lower(setting), 90, name=case.kernel)
    written = definitions(code.ptx)

    def begins(register: str) -> set[str]:
        """The instructions that an exponent comes from, through factors, sums to these, and comparisons."""
        found = set()
        for name, read in written[register]:
            through = name.startswith(("mul.", "fma.", "min.", "max.", "neg."))
            found |= begins(read[0]) if through and read[0].startswith("%") else {name}
        return found

    exponents = [read[0] for x in written.values() for name, read in x if name == "ex2.approx.ftz.f32"]
    assert exponents
    assert set().union(*map(begins, exponents)) == {"sub.rn.f32"}


@pytest.mark.parametrize("kind", [None, "int8", "int4"])
@pytest.mark.parametrize("capability", [80, 90])
def test_decode_copies_keys_as_they_are_stored(kind, capability):
    """Two stages of a block fill shared memory, in units of 16 bytes; nothing spills."""
    batch, length, head_dim = 8, 4096, 128
    sizes = tuning.default_block_sizes(
        1, length, implementation="triton", head_dim=head_dim, compute_capability=capability / 10
    )

    def decode(query, key, value, q_positions, kv_positions):
        block_mask = pa.BlockMask.from_mask(CAUSAL, q_positions, kv_positions, sizes)
        return kernels.decode(Call(query, key, value, block_mask), scale=head_dim**-0.5)

    keys = jax.ShapeDtypeStruct((batch, length, 8, head_dim), jnp.bfloat16)
    stored = keys if kind is None else jax.eval_shape(lambda x: pa.QuantizedArray.quantize(x, kind), keys)
    positions = (jax.ShapeDtypeStruct((batch, n), jnp.int32) for n in (1, length))
    query = jax.ShapeDtypeStruct((batch, 1, 32, head_dim), jnp.bfloat16)
    lowered = lower_for_cuda(decode, query, stored, stored, *positions, capability=capability)
    for kernel in compile_kernels(lowered, capability):
        assert (kernel.stack_bytes, kernel.spill_stores, kernel.spill_loads) == (0, 0, 0)
    (kernel,) = compile_kernels(lowered, capability, name="pallas_attn_decode")
    assert "cp.async.cg.shared.global" in kernel.ptx, "keys are not copied in units of 16 bytes"
    assert "mma.sync" in kernel.ptx, "no tensor cores"
    stages = (sizes.num_stages - 1) * sizes.kv * head_dim * 2
    stored_bytes = {None: 2.0, "int8": 1.0, "int4": 0.5}[kind]
    # Besides the stages there are scales, positions, and the weights on their way to the second product.
    assert stages * stored_bytes <= kernel.shared_bytes < stages * (stored_bytes + 0.6)
