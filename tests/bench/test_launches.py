"""The launches of a compiled function, read from XLA's sequence of thunks."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from bench.machine_code.launches import Launches, parse, read, step

# Two command buffers; in the body of a loop, the second one, and a conditional and a loop of the host. XLA does not
# indent the label "condition", however deep its loop is.
SAMPLE = """\
000: kCommandBuffer [source       | next=003 (1)]
    001: kCopy         [source       | next=002 (1)] kCopy
    002: kCustomKernel [prev=001 (1) | sink        ] loop_add_fusion grid: [4, 1, 1] threads: [128, 1, 1]
003: kWhile         [prev=000 (1) | next=019 (1)]
condition:
    004: kCustomKernel [source | sink] loop_compare_fusion grid: [1, 1, 1] threads: [1, 1, 1]
  body:
    000: kCommandBuffer [source | next=011 (1)]
        005: kCustomKernel [source | sink] pallas_attn_decode grid: [64, 4, 1] threads: [128, 1, 1]
        010: kConditional  [source | sink]
          false_branch:
            006: kCustomKernel [source | sink] gemm_fusion grid: [8, 1, 1] threads: [64, 1, 1]
            007: kCopy         [source | sink] kCopy
            008: kCopy         [source | sink] kCopy
          true_branch:
            009: kCopy         [source | sink] kCopy
    014: kConditional   [prev=000 (1) | next=015 (1)]
      branch 0:
        011: kCustomKernel [source | sink] fusion grid: [8, 1, 1] threads: [64, 1, 1]
        012: kCustomKernel [source | sink] fusion_1 grid: [8, 1, 1] threads: [64, 1, 1]
      branch 1:
        013: kCustomKernel [source | sink] fusion_2 grid: [8, 1, 1] threads: [64, 1, 1]
    015: kWhile         [prev=014 (1) | next=018 (1)]
condition:
        016: kCustomKernel [source | sink] wrapped_compare grid: [1, 1, 1] threads: [1, 1, 1]
      body:
        017: kCustomKernel [source | sink] input_scatter_fusion grid: [1, 1, 1] threads: [32, 1, 1]
    018: kCustomKernel [prev=015 (1) | sink] pallas_attn_merge grid: [1, 1, 1] threads: [32, 1, 1]
019: kCopy [prev=003 (1) | sink] kCopy
"""


def test_a_sample_is_counted_by_hand():
    thunks = parse(SAMPLE)
    assert [thunk.kind for thunk in thunks] == ["CommandBuffer", "While", "Copy"]
    body = step(thunks)
    assert [thunk.kind for thunk in body] == ["CommandBuffer", "Conditional", "While", "CustomKernel"]
    assert {label: len(part) for label, part in body[1].parts.items() if label} == {"branch 0": 2, "branch 1": 1}
    expected = {"copies": 1, "attention": 2, "conditionals": 2, "host_conditionals": 1}
    # Decode and a copy; the smaller branch; the condition and the body of the loop; merge.
    assert Launches.of(body) == Launches(launches=6, graphs=1, loops=1, host_loops=1, **expected)
    # Beside them: two in the first graph, the condition, and the last copy.
    expected["copies"] = 3
    assert Launches.of(thunks) == Launches(launches=10, graphs=2, loops=2, host_loops=2, **expected)


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda tmp: parse("  body:\n"), "text: expected a thunk before '  body:', got none"),
        (lambda tmp: step(parse("000: kCopy [source | sink] kCopy\n")), "thunks: expected a loop, got none"),
        (read, r"dump: expected the thunks of one function in .*, got \[\]"),
    ],
    ids=["label alone", "no loop", "empty dump"],
)
def test_what_is_no_step_is_an_error(call, expected, tmp_path):
    with pytest.raises(ValueError, match=expected):
        call(tmp_path)


def test_a_loop_whose_condition_is_on_the_device_is_run_by_the_host(tmp_path):
    pytest.importorskip("triton", reason="PyPI's triton, which compiles without a GPU, is not installed")
    from bench.machine_code import xla_gpu

    if reason := xla_gpu.missing():
        pytest.skip(reason)

    def function(x, n):
        return lax.fori_loop(0, n, lambda i, x: lax.cond(x.sum() > 0, lambda: jnp.sort(x), lambda: x * 2), x)

    shapes = jax.ShapeDtypeStruct((1000,), jnp.float32), jax.ShapeDtypeStruct((), jnp.int32)
    xla_gpu.compile(xla_gpu.lower(function, *shapes, gpu="H100"), dump=tmp_path)
    whole = Launches.of(read(tmp_path))
    body = Launches.of(step(read(tmp_path)))
    assert (whole.loops, whole.host_loops, whole.conditionals, whole.attention) == (1, 1, 1, 0)
    assert (body.loops, body.conditionals) == (0, 1)
    assert 0 < body.launches < whole.launches
