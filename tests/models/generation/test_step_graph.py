"""What a step of a Generator launches on an H100, as XLA compiles it for one that may be absent."""

import functools

import jax
import pytest

pytest.importorskip("triton", reason="PyPI's triton, which compiles without a GPU, is not installed")

from bench.machine_code import xla_gpu
from bench.machine_code.generator_steps import STORAGES, StepGraph, compile_step, generator

if reason := xla_gpu.missing():
    pytest.skip(reason, allow_module_level=True)

LAYERS = 4
# Launches of a decode step, and of a chunk of prefill. XLA fuses a little less since JAX 0.11.
MORE = 4 * (jax.__version_info__ >= (0, 11))
MOST = {"Plain": (79, 65), "Int8": (102, 95), "Paged": (100, 85), "Paged Int8": (130, 110)}
CASES = [pytest.param(name, marks=[pytest.mark.slow] * (name != "Plain")) for name in STORAGES]


@functools.cache
def compiled(name: str, which: str, layers: int = LAYERS, **options) -> StepGraph:
    return compile_step(generator(STORAGES[name], layers, prefill_chunk=128, **options), which)


@pytest.mark.parametrize("name", CASES)
def test_a_decode_step_is_one_cuda_graph_of_few_launches(name):
    graph = compiled(name, "decode")
    assert graph.step.launches <= MOST[name][0] + MORE
    assert graph.step.attention == 2 * LAYERS, "decode and merge"
    assert (graph.step.graphs, graph.step.loops, graph.step.host_conditionals) == (1, 0, 0)
    assert graph.call.loops == 2, "steps, and the rows that are done"


@pytest.mark.parametrize("name", CASES)
def test_a_prefill_call_has_three_loops(name):
    graph = compiled(name, "prefill")
    assert graph.call.loops <= 3, "empties rows, runs a chunk, copies rows; none of them in many calls"
    assert graph.step.loops == 0
    assert graph.step.launches <= MOST[name][1] + MORE
    assert graph.step.attention == LAYERS - 1, "of the last layer only the keys and values are needed"


@pytest.mark.parametrize("which", ["decode", "prefill"])
@pytest.mark.parametrize("name", CASES)
def test_caches_are_updated_in_place(name, which):
    graph = compiled(name, which)
    assert graph.aliased_bytes >= graph.cache_bytes
    assert graph.temporary_bytes < graph.cache_bytes / LAYERS


@pytest.mark.slow
def test_a_layer_adds_few_launches():
    twelve, four = (compiled("Plain", "decode", layers).step.launches for layers in (12, LAYERS))
    assert twelve <= 190 + MORE
    assert twelve - four <= 13 * (12 - LAYERS)


@pytest.mark.slow
@pytest.mark.parametrize("which", ["decode", "prefill"])
def test_graphs_that_may_contain_loops_contain_the_whole_call(which):
    """Neither a step nor what is skipped needs the host."""
    assert compiled("Plain", which).call.host_loops == compiled("Plain", which).call.loops
    graph = compiled("Plain", which, graph_loops=True).call
    assert (graph.graphs, graph.host_loops, graph.host_conditionals) == (1, 0, 0)
    assert graph.loops == compiled("Plain", which).call.loops
