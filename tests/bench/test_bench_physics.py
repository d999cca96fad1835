"""Counted work against brute force, and the numbers that follow from it."""

import types

import jax.numpy as jnp
import numpy as np
import pytest

import pallas_attn as pa
from bench import machine
from bench.times import physics
from bench.times.cases import CASES, document_ids
from bench.times.workloads import Attention, Size
from tests import oracle

POSITIONS = np.stack([oracle.positions(20, left=6), oracle.positions(20, right=3)])
IDS = np.repeat([[0, 1, 2, 3]], 5, axis=1)
MASKS = {
    "full": oracle.full(),
    "causal": oracle.causal(),
    "window": oracle.sliding_window(4, 1),
    "prefix": oracle.prefix(np.array([3, 9])) | oracle.causal(),
    "documents": oracle.segments(IDS, IDS) & oracle.causal(),
    "dense": oracle.dense(np.random.default_rng(0).random((1, 1, 20, 20)) < 0.3),
}


@pytest.mark.parametrize("piece", [2**26, 100], ids=["at once", "in pieces"])
@pytest.mark.parametrize("name", MASKS)
def test_counts_are_those_of_every_pair(name, piece, monkeypatch):
    monkeypatch.setattr(physics, "_PIECE", piece)
    visible = oracle.visible(MASKS[name], POSITIONS, POSITIONS, 2, 1)[:, 0]
    counts = physics.count(MASKS[name].build(pa.masks), jnp.asarray(POSITIONS), jnp.asarray(POSITIONS), 2)
    assert counts == physics.Counts(visible.sum(), visible.any(2).sum(), visible.any(1).sum())


def test_rows_that_share_positions_are_all_counted():
    positions = jnp.arange(8)[None]
    assert physics.count(pa.masks.causal(), positions, positions, 3) == physics.Counts(3 * 36, 24, 24)


def test_masks_per_head_are_refused():
    with pytest.raises(ValueError, match="shared by all heads"):
        physics.count(pa.masks.dense(jnp.ones((1, 2, 4, 4), bool)), jnp.arange(4)[None], jnp.arange(4)[None], 1)


def test_work_by_hand():
    counts = physics.Counts(pairs=10, queries=4, keys=5)
    shape = {"q_heads": 6, "kv_heads": 2, "head_dim": 32, "itemsize": 2}
    forward = physics.attention_work(counts, **shape)
    q_bytes, kv_bytes = 4 * 6 * 32 * 2, 5 * 2 * 32 * 2
    assert forward == physics.Work(60, 4 * 32 * 60, 2 * q_bytes + 2 * kv_bytes)
    backward = physics.attention_work(counts, **shape, backward=True)
    assert backward.flops == 2.5 * forward.flops
    # q, out and their gradients; k, v and their gradients; the logsumexp.
    assert backward.nbytes == 4 * q_bytes + 4 * kv_bytes + 4 * 6 * 4


def test_the_bound_is_the_larger_time():
    peaks = machine.Peaks(tflops=2.0, gbps=100.0)
    assert physics.bound_seconds(4 * 10**12, 10**9, peaks) == 2.0
    assert physics.bound_seconds(10**9, 3 * 10**11, peaks) == 3.0
    assert physics.bound_seconds(None, 10**11, peaks) == 1.0


def test_the_ceiling_bends_at_the_ridge():
    peaks = machine.Peaks(tflops=2.0, gbps=100.0)
    assert peaks.ridge == 20.0
    assert [peaks.ceiling(x) for x in (5.0, 20.0, 80.0)] == [5e11, 2e12, 2e12]


def test_published_flops():
    """Causal, B4 S4096 N16 D128: half of 4 B N S S D operations, and the diagonal."""
    (case,) = (case for case in CASES if case.name == "causal")
    workload = case.build(case.size("gpu"))
    assert workload.work.flops == 4 * 4 * 16 * 128 * (4096 * 4097 // 2)


@pytest.mark.parametrize("percent", [10, 25, 50])
def test_random_blocks_have_their_share(percent):
    (case,) = (case for case in CASES if case.name == f"blocks-{percent}")
    assert case.build(Size(1, 256, 256, 1, 1, 16)).active_fraction == pytest.approx(percent / 100, abs=1 / 1024)


def test_documents_fill_every_row():
    ids = np.asarray(document_ids(Size(3, 240, 240, 1, 1, 16)))
    assert ids.shape == (3, 240)
    assert (np.diff(ids) >= 0).all()
    assert len({tuple(np.bincount(row)) for row in ids}) == 3  # unequal lengths that differ between rows


def test_no_toy_case_has_a_query_batch_without_work():
    for case in CASES:
        for suite in case.sizes:
            workload = case.build(case.size(suite, toy=True))
            if isinstance(workload, Attention):
                assert 0 < workload.active_fraction <= 1, case.name


@pytest.mark.parametrize(
    ("kind", "peaks"),
    [
        ("NVIDIA H200", (989.4, 4800)),
        ("NVIDIA H100 80GB HBM3", (989.4, 3350)),
        ("NVIDIA H100 PCIe", (756.0, 2000)),
        ("NVIDIA A100-SXM4-80GB", (312.0, 2039)),
        ("NVIDIA A100-SXM4-40GB", (312.0, 1555)),
        ("NVIDIA L4", None),
    ],
)
def test_peaks_by_the_name_of_the_device(kind, peaks, monkeypatch):
    device = types.SimpleNamespace(platform="gpu", device_kind=kind)
    monkeypatch.setattr(machine.jax, "devices", lambda: [device])
    assert machine.peaks() == (peaks and machine.Peaks(*peaks))


def test_a_cpu_has_no_known_peaks(monkeypatch):
    monkeypatch.setattr(machine.jax, "devices", lambda: [types.SimpleNamespace(platform="cpu", device_kind="cpu")])
    assert machine.peaks() is None
