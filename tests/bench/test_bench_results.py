"""The result file: written after each case, resumed, and never confused with another."""

import json

import pytest

from bench.results_file import ResultsError, ResultsFile

MACHINE = {
    "device": "cpu",
    "processor": "x",
    "python": "3.11",
    "revision": "abc",
    "versions": {"jax": "1"},
    "date": "d",
}
DONE = {"case": "causal", "contenders": {"pallas_attn": {}}}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "cpu.json"


def test_is_written_after_each_case(path):
    file = ResultsFile(path, suite="cpu", machine=MACHINE)
    assert not path.exists(), "what was there stays until there is a result"
    file.add(DONE)
    content = json.loads(path.read_text())
    assert content == {"schema": 1, "suite": "cpu", "machine": MACHINE, "results": [DONE]}
    file.add(DONE | {"case": "window"})
    assert len(json.loads(path.read_text())["results"]) == 2
    assert list(path.parent.iterdir()) == [path], "nothing else is left there"


def test_resume_keeps_what_is_done(path):
    file = ResultsFile(path, suite="cpu", machine=MACHINE)
    file.add(DONE)
    file.add({"case": "backward", "contenders": {}})
    file = ResultsFile(path, suite="cpu", machine=MACHINE | {"date": "later"}, resume=True)
    assert file.has("causal")
    assert not file.has("backward"), "what could not run is tried again"
    assert not file.has("window")
    file = ResultsFile(path, suite="cpu", machine=MACHINE)
    assert not file.has("causal"), "a new run starts empty"


@pytest.mark.parametrize("name", ["device", "processor", "python", "revision", "versions"])
def test_resume_elsewhere_is_refused(path, name):
    ResultsFile(path, suite="cpu", machine=MACHINE).add(DONE)
    with pytest.raises(ResultsError, match=f"its {name} is .*, here it is other"):
        ResultsFile(path, suite="cpu", machine=MACHINE | {name: "other"}, resume=True)
    with pytest.raises(ResultsError, match="its suite is cpu"):
        ResultsFile(path, suite="gpu", machine=MACHINE, resume=True)


@pytest.mark.parametrize("content", ['{"schema": 2}', '{"machine": {}, "results": []}', "[1]", "no JSON", "\udcff"])
@pytest.mark.parametrize("resume", [False, True])
def test_another_schema_is_refused_and_left_alone(path, content, resume):
    before = content.encode(errors="surrogateescape")
    path.write_bytes(before)
    with pytest.raises(ResultsError, match=r"expected a result file of schema 1|cannot be read"):
        ResultsFile(path, suite="cpu", machine=MACHINE, resume=resume)
    assert path.read_bytes() == before


def test_unwritable_paths_are_refused(tmp_path):
    with pytest.raises(ResultsError, match=r"nowhere/cpu\.json: cannot be written: No such file"):
        ResultsFile(tmp_path / "nowhere" / "cpu.json", suite="cpu", machine=MACHINE)
    with pytest.raises(ResultsError, match="cannot be"):
        ResultsFile(tmp_path, suite="cpu", machine=MACHINE)


def test_resume_needs_a_file():
    with pytest.raises(ResultsError, match="expected --out"):
        ResultsFile(None, suite="cpu", machine=MACHINE, resume=True)
