"""Each peer computes its case, and PyTorch's translation of a mask is that mask."""

import shutil

import jax
import numpy as np
import pytest

from bench.times.cases import CASES
from bench.times.check import Oracle
from bench.times.peers import all_peers
from bench.times.timing import prepare
from bench.times.workloads import Attention, MaskBuild, Size

SIZE = Size(2, 64, 64, 4, 2, 16)


def workloads(*kinds: str):
    return [pytest.param(case.build, case.name, id=case.name) for case in CASES if case.kind in kinds]


@pytest.fixture(autouse=True)
def _jax_as_users_have_it():
    """The peers do not support JAX's strict modes."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def sized(build, name):
    one_query = {"q_len": 1} if name.startswith("decode") else {}
    return build(Size(**{**SIZE.__dict__, **one_query}))


@pytest.mark.parametrize(("build", "name"), workloads("forward", "decode", "mask"))
def test_torch_gets_the_same_mask(build, name):
    torch = pytest.importorskip("torch")
    from bench.times.torch_peers import _mask_mod

    workload = sized(build, name)
    workload = workload.attention if isinstance(workload, MaskBuild) else workload
    visible = np.asarray(workload.boolean_mask)
    mask_mod = _mask_mod(workload)
    i, j = torch.arange(workload.size.q_len)[:, None], torch.arange(workload.size.kv_len)[None]
    for b in range(visible.shape[0]):
        told = torch.broadcast_to(mask_mod(torch.tensor(b), torch.tensor(0), i, j), visible.shape[2:])
        np.testing.assert_array_equal(told.numpy(), visible[b, 0])


@pytest.mark.parametrize("peer", ["jax.nn", "torch.sdpa"])
@pytest.mark.parametrize(("build", "name"), workloads("forward", "decode", "backward"))
def test_peers_compute_the_case(build, name, peer):
    peer = all_peers()[peer]
    if reason := peer.unavailable():
        pytest.skip(reason)
    workload = sized(build, name)
    assert isinstance(workload, Attention)
    prepared = prepare(peer.contender(workload, 1), by_device=False)
    assert Oracle(workload).judge(prepared.returned).of_peer().correct


@pytest.mark.parametrize("name", ["dense", "causal", "documents", "decode-ragged"])
def test_pallas_operations_compute_the_case(name):
    (case,) = (case for case in CASES if case.name == name)
    workload = case.build(case.size("gpu", toy=True))
    peer = all_peers(interpret=True)["jax.pallas"]
    prepared = prepare(peer.contender(workload, 1), by_device=False)
    assert Oracle(workload).judge(prepared.returned).of_peer().correct


def test_pallas_operations_have_no_windows():
    (case,) = (case for case in CASES if case.name == "window")
    with pytest.raises(NotImplementedError, match="only causal masks and packed documents"):
        all_peers(interpret=True)["jax.pallas"].contender(case.build(case.size("gpu", toy=True)), 1)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # PyTorch's compiler warns about itself
@pytest.mark.skipif(shutil.which("g++") is None, reason="FlexAttention compiles for the CPU by a C++ compiler")
@pytest.mark.parametrize(("build", "name"), workloads("forward", "decode", "mask"))
def test_flex_attention_computes_the_case(build, name):
    pytest.importorskip("torch")
    workload = sized(build, name)
    prepared = prepare(all_peers()["torch.flex"].contender(workload, 1), by_device=False)
    assert Oracle(workload).judge(prepared.returned).of_peer().correct


def test_large_matrices_are_refused():
    (case,) = (case for case in CASES if case.name == "documents-16x8192")
    with pytest.raises(NotImplementedError, match="holds the whole T x S matrix: 64 GiB"):
        all_peers()["jax.nn"].contender(case.build(case.size("gpu")), 1)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="on a GPU it takes part")
def test_a_peer_that_disturbs_the_others_is_skipped():
    (case,) = (case for case in CASES if case.name == "decode-32768")
    workload = case.build(case.size("cpu", toy=True))
    for name in ("tokamax.xla", "tokamax.xla_chunked"):
        with pytest.raises(NotImplementedError, match="which disturbs the next contender"):
            all_peers()[name].contender(workload, 1)


def test_a_peer_rejects_a_kind_that_it_lacks():
    (case,) = (case for case in CASES if case.name == "append-token")
    workload = case.build(case.size("cpu", toy=True))
    for peer in all_peers().values():
        assert not peer.serves(workload)
        with pytest.raises(NotImplementedError):
            peer.contender(workload, 1)
