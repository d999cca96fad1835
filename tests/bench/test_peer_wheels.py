"""The list of wheels for a machine without a network."""

import subprocess

import pytest

from bench import peer_wheels


@pytest.fixture
def calls(monkeypatch):
    made = []
    done = subprocess.CompletedProcess([], 0)
    monkeypatch.setattr(subprocess, "run", lambda arguments: made.append(arguments) or done)
    return made


def test_the_list_needs_no_network(calls, capsys):
    assert peer_wheels.main([]) == 0
    assert calls == []
    printed = capsys.readouterr().out
    for wheel in peer_wheels.WHEELS:
        assert f"{wheel.name} {wheel.version}" in printed
    assert "together" in printed


def test_wheels_fit_and_replace_neither_jax_nor_pytorch():
    names = {wheel.name for wheel in peer_wheels.WHEELS}
    assert sum(wheel.nbytes for wheel in peer_wheels.WHEELS) < peer_wheels.LARGEST
    assert not names & {"jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda13-pjrt", "torch", "triton", "numpy"}
    assert len(names) == len(peer_wheels.WHEELS), "two versions of one would stop the installation"


def test_download(calls, tmp_path):
    assert peer_wheels.main(["--to", str(tmp_path / "new")]) == 0
    ((_, *arguments),) = calls
    assert "--no-deps" in arguments
    assert arguments[arguments.index("--python-version") + 1] == "3.12"
    assert "tokamax==0.0.12" in arguments
    assert (tmp_path / "new").is_dir()
