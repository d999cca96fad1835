"""JAX's transformations of whole programs: sharding over devices, and export. Others have places of their own:

``vmap`` in test_vmap.py; checkpoints and a scan over layers in test_checkpoints.py; forward mode and second derivatives
in test_derivatives.py.
"""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import pallas_attn as pa
from bench.machine_code.compiled import assumed_device
from pallas_attn.kernels import triton
from tests import tolerances

B, T, S, N, K, D = 2, 19, 21, 4, 2, 8
rng = np.random.default_rng(7)
OPTIONS = {
    "xla": {"implementation": "xla"},
    "interpreted": {"interpret": True},
    "reference": {"implementation": "reference"},
}


def array(*shape: int) -> jax.Array:
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


ARRAYS = {
    "query": array(B, T, N, D),
    "key": array(B, S, K, D),
    "value": array(B, S, K, D),
    "slopes": array(N),
    "bias": array(1, N, 1, S),
    "sinks": array(N),
}
POSITIONS = {
    "q_positions": jnp.asarray(rng.integers(-1, S, (B, T)), jnp.int32),
    "kv_positions": jnp.asarray(np.where(rng.random((B, S)) < 0.2, -1, np.arange(S)), jnp.int32),
}
ONE_MASK = {"mask": pa.BlockMask.from_mask(pa.masks.causal(), T, S, pa.BlockSizes(16, 16))}


def attend(arrays: dict, where: dict, options: dict) -> tuple[jax.Array, jax.Array]:
    if "mask" not in where:
        where = {"mask": pa.masks.causal(), "block_sizes": pa.BlockSizes(16, 16), **where}
    scores = [pa.scores.alibi(arrays["slopes"]), pa.scores.bias(arrays["bias"]), pa.scores.softcap(5.0)]
    tensors = (arrays[name] for name in ("query", "key", "value"))
    out = pa.attention(*tensors, scores=scores, sinks=arrays["sinks"], return_lse=True, **where, **options)
    return out.out, out.lse


def with_gradients(function):
    """``(out, lse)`` and the gradients of all arrays."""

    def loss(arrays: dict, where: dict):
        out, lse = function(arrays, where)
        return jnp.sin(out).sum() + jnp.where(lse > -jnp.inf, lse, 0.0).sum(), (out, lse)

    return jax.jit(jax.grad(loss, has_aux=True))


# Shards.


def check_shards(implementation: str) -> None:
    """On four devices: two halves of the batch, two of the heads. Runs in a process with four devices."""
    mesh = jax.make_mesh((2, 2), ("rows", "heads"))
    tokens = P("rows", None, "heads", None)
    specs = {"query": tokens, "key": tokens, "value": tokens}
    # Shared by all rows, so gradients are summed over devices.
    specs |= {"slopes": P("heads"), "sinks": P("heads"), "bias": P(None, "heads", None, None)}

    def whole(arrays, where):
        return attend(arrays, where, OPTIONS[implementation])

    cases = [(POSITIONS, P("rows"))] + [(ONE_MASK, P())] * (implementation != "interpreted")  # which is slow
    for where, spec in cases:
        sharded = jax.shard_map(
            whole, mesh=mesh, in_specs=(specs, spec), out_specs=(tokens, P("rows", "heads", None)), check_vma=False
        )
        placed = {name: jax.device_put(x, NamedSharding(mesh, specs[name])) for name, x in ARRAYS.items()}
        placed_where = jax.device_put(where, NamedSharding(mesh, spec))
        results = with_gradients(whole)(ARRAYS, where), with_gradients(sharded)(placed, placed_where)
        for expected, actual in zip(*(jax.tree.leaves(x) for x in results), strict=True):
            limit = tolerances.ATTENTION_GRADIENT * np.abs(expected, where=np.isfinite(expected)).max(initial=0)
            assert len(actual.sharding.device_set) == 4
            np.testing.assert_allclose(actual, expected, rtol=0, atol=limit)


@pytest.mark.parametrize("implementation", OPTIONS)
def test_shards_of_batch_and_heads_are_the_whole(implementation):
    """In another process, because the number of devices is fixed when JAX starts."""
    program = f"from tests import conftest, test_transformations as t; t.check_shards({implementation!r})"
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    subprocess.run(
        [sys.executable, "-c", program],
        check=True,
        cwd=Path(__file__).parents[1],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
    )


# Export.


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_an_exported_program_gives_the_same_bits(implementation):
    program = with_gradients(lambda arrays, where: attend(arrays, where, OPTIONS[implementation]))
    restored = export.deserialize(export.export(program)(ARRAYS, POSITIONS).serialize())
    actual, expected = restored.call(ARRAYS, POSITIONS), program(ARRAYS, POSITIONS)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_compiled_kernels_are_exported_for_gpus_that_are_not_here(monkeypatch):
    """JAX requires an explicit flag, because it does not promise that another XLA can read the kernels."""
    monkeypatch.setattr(triton, "unavailable", lambda: None)
    program = with_gradients(lambda arrays, where: attend(arrays, where, {"implementation": "triton"}))
    target = "__gpu$xla.gpu.triton"
    consent = [export.DisabledSafetyCheck.custom_call(target)]
    with assumed_device("NVIDIA H100"):
        exported = export.export(program, platforms=("cuda",), disabled_checks=consent)(ARRAYS, POSITIONS)
    restored = export.deserialize(exported.serialize())
    assert restored.platforms == ("cuda",)
    kernels = ("forward", "d_query", "d_key_value", "d_score of slopes", "d_score of the bias")
    assert restored.mlir_module().count(target) == len(kernels)
    assert [x.shape for x in restored.out_avals] == [x.shape for x in exported.out_avals]
