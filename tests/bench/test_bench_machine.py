"""The machine of a result file: the revision of the code, and the measured peaks."""

import subprocess

import pytest

from bench import machine
from bench.machine import Peaks
from bench.times import peaks
from bench.times.timing import Prepared


@pytest.fixture
def clone(tmp_path):
    """A repository with one commit, and its name."""
    root = tmp_path / "clone"
    (root / "bench" / "results").mkdir(parents=True)
    (root / "code.py").write_text("x = 1\n")
    (root / ".gitignore").write_text("__pycache__/\n")
    identity = ("-c", "user.name=a", "-c", "user.email=a@b")
    for command in (("init", "-q"), ("add", "."), (*identity, "commit", "-q", "-m", "one")):
        subprocess.run(("git", "-C", str(root), *command), check=True)
    done = subprocess.run(("git", "-C", str(root), "rev-parse", "HEAD"), check=True, capture_output=True, text=True)
    return root, done.stdout.strip()


def test_a_clean_clone_has_its_commit(clone):
    root, commit = clone
    assert machine.commit(root) == commit
    (root / "bench" / "results" / "cpu.json").write_text("{}")
    (root / "__pycache__").mkdir()
    (root / "__pycache__" / "code.pyc").touch()
    assert machine.commit(root) == commit, "results are no code, and neither is what git ignores"


@pytest.mark.parametrize("name", ["code.py", "new.py"])
def test_a_tree_that_differs_is_marked(name, clone):
    root, commit = clone
    (root / name).write_text("x = 2\n")
    assert machine.commit(root) == commit + "-dirty"


def test_a_copy_without_git_has_no_commit(clone, tmp_path):
    root, _ = clone
    assert machine.commit(tmp_path) is None
    assert machine.commit(root / "bench") is None, "the repository around a copy is not its origin"


def test_peaks_count_both_ways_of_a_copy_and_both_operations_of_a_product(monkeypatch):
    turns = {False: 0.5, True: 0.25}  # of the product, and of the copy, which carries its state
    monkeypatch.setattr(peaks, "prepare", lambda x, by_device: Prepared(None, lambda: turns[x.carries]))
    found = peaks.measure("float32", peaks.Sizes(side=100, nbytes=10**9), by_device=False)
    assert found == Peaks(tflops=2 * 100**3 / 0.5 / 1e12, gbps=2 * 10**9 / 0.25 / 1e9)


@pytest.mark.parametrize("by_device", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peaks_are_measured_in_both_dtypes(dtype, by_device):
    found = peaks.measure(dtype, peaks.TOY, by_device=by_device)
    assert found.tflops > 0
    assert found.gbps > 0


def test_the_copied_array_has_the_size_that_is_counted():
    for dtype in ("float32", "bfloat16"):
        ((array,),) = peaks._copy(dtype, peaks.TOY).inputs
        assert (array.nbytes, array.dtype) == (peaks.TOY.nbytes, dtype)
