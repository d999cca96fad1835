"""The judge accepts right results and rejects slightly wrong ones."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_attn as pa
from bench.times.cases import named
from bench.times.check import Oracle
from bench.times.timing import prepare
from bench.times.workloads import Attention, Size

SIZE = Size(2, 48, 48, 4, 2, 16)


def attend(workload):
    def reference(query, key, value):
        positions = {"q_positions": workload.q_positions, "kv_positions": workload.kv_positions}
        return pa.attention(query, key, value, workload.mask, **positions, implementation="reference")

    *inputs, cotangent = workload.arrays(0)
    if not workload.backward:
        return reference(*inputs)
    return jax.vjp(reference, *inputs)[1](cotangent)


ATTENTION = ("left-padded", "prefix", "causal-backward", "window-backward", "left-padded-backward")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ATTENTION)
def test_right_results_are_correct(name, dtype):
    workload = named("gpu")[name].build(dataclasses.replace(SIZE, dtype=dtype))
    verdict = Oracle(workload).judge(attend(workload))
    assert verdict.correct
    assert 0 < verdict.error < 0.1


def test_wrong_scale_is_refused():
    workload = named("gpu")["causal"].build(SIZE)
    assert not Oracle(workload).judge(1.0001 * attend(workload)).correct


def test_a_hole_between_the_samples_is_refused():
    workload = named("gpu")["causal"].build(SIZE)
    result = np.array(attend(workload))
    judge = Oracle(workload).judge
    for t in range(SIZE.q_len):
        broken = result.copy()
        broken[1, t, 2, 5] = np.nan
        assert not judge(broken).correct
    # Padded queries do not count: peers differ there.
    padded = named("gpu")["left-padded"].build(SIZE)
    result = np.array(attend(padded))
    result[np.asarray(padded.q_positions) < 0] = np.nan
    assert Oracle(padded).judge(result).correct


def test_other_shapes_are_refused():
    workload = named("gpu")["causal"].build(SIZE)
    with pytest.raises(ValueError, match=r"expected shape \(2, 48, 4, 16\)"):
        Oracle(workload).judge(np.zeros((2, 4, 48, 16)))


@pytest.mark.parametrize("wrong", range(3), ids=["query", "key", "value"])
def test_wrong_gradients_are_refused(wrong):
    workload = named("gpu")["causal-backward"].build(SIZE)
    gradients = list(attend(workload))
    gradients[wrong] = 1.001 * gradients[wrong]
    assert not Oracle(workload).judge(gradients).correct


def test_a_peer_is_judged_mildly():
    workload = named("gpu")["causal"].build(SIZE)
    verdict = Oracle(workload).judge(attend(workload) + 1e-5)
    assert not verdict.correct
    assert verdict.of_peer().correct
    assert not Oracle(workload).judge(attend(workload) + 1e-3).of_peer().correct


def test_lists_are_compared_block_by_block():
    workload = named("gpu")["mask-documents"].build(dataclasses.replace(SIZE, q_len=512, kv_len=512))
    built = prepare(workload.ours(), by_device=False).returned
    judge = Oracle(workload).judge
    assert judge(built).correct
    classes = built.classes.copy()
    classes[0, -1] += 1
    assert judge(built._replace(classes=classes)).error == 1


def test_lists_at_hand_are_not_built_again(monkeypatch):
    """The same result from lists that were built before the clock started."""
    workload = named("cpu")["decode"].build(dataclasses.replace(SIZE, q_len=1))
    ours = dataclasses.replace(workload, lists_at_hand=True).ours()
    monkeypatch.setattr(pa.BlockMask, "from_mask", lambda *_, **__: pytest.fail("lists were built"))
    assert Oracle(workload).judge(prepare(ours, by_device=False).returned).correct


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_append_to_another_slot_is_refused(dtype):
    workload = named("gpu")["append-chunk"].build(dataclasses.replace(SIZE, q_len=4, new=4, dtype=dtype))
    cache = prepare(workload.ours(), by_device=False).returned
    judge = Oracle(workload).judge
    assert judge(cache).correct
    rolled = jax.tree.map(lambda x: np.roll(x, 1, axis=1), cache.key)
    assert not judge(dataclasses.replace(cache, key=rolled)).correct
    assert not judge(dataclasses.replace(cache, positions=cache.positions + 1)).correct


def test_the_sample_has_no_query_without_keys():
    """An empty sample would accept everything."""
    positions = jnp.asarray([[-1] * 40 + list(range(8))])
    workload = Attention(dataclasses.replace(SIZE, batch=1), pa.masks.causal(), positions, positions)
    assert not Oracle(workload).judge(1.001 * attend(workload)).correct
