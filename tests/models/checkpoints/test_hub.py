"""load_hf("org/name"): which files are fetched, from where, and what is said if they cannot be. Without a network."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import httpx2
import huggingface_hub
import jax
import numpy as np
import pytest
from flax import nnx
from huggingface_hub import errors

from pallas_attn_models import load_hf
from pallas_attn_models.checkpoints import check_contents, local_directory, open_headers

FIXTURES = Path(__file__).parents[1] / "fixtures"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def fetched(monkeypatch):
    """Calls of snapshot_download, which returns a fixture."""
    calls = []

    def snapshot_download(repo_id, **options):
        calls.append((repo_id, options))
        return str(FIXTURES / repo_id.partition("/")[2])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """The real snapshot_download without a network, and an empty cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def same(a: nnx.Module, b: nnx.Module) -> bool:
    pairs = zip(jax.tree.leaves(nnx.state(a)), jax.tree.leaves(nnx.state(b)), strict=True)
    return all(np.array_equal(x, y) for x, y in pairs)


def test_a_model_on_the_hub(fetched):
    model = load_hf("org/mha_llama3_sharded", revision="v1.0")
    assert same(model, load_hf(FIXTURES / "mha_llama3_sharded"))
    ((name, options),) = fetched
    assert name == "org/mha_llama3_sharded"
    assert options["revision"] == "v1.0"


def test_only_the_files_needed_are_fetched(fetched):
    local_directory("directory", "org/gqa")
    patterns = fetched[0][1]["allow_patterns"]
    files = [
        *("config.json", "model.safetensors", "model.safetensors.index.json", "model-00001-of-00003.safetensors"),
        *("consolidated.safetensors", "original/model.safetensors", "model.fp16.safetensors", "pytorch_model.bin"),
        *("original/model-00001-of-00003.safetensors", "tokenizer.json", "README.md", "training_config.json"),
    ]
    assert [*huggingface_hub.utils.filter_repo_objects(files, allow_patterns=patterns)] == files[:4]


def test_a_directory_comes_first(fetched, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "gqa").symlink_to(FIXTURES / "gqa")
    assert local_directory("directory", "org/gqa") == Path("org/gqa")
    (tmp_path / "org" / "file").touch()
    with pytest.raises(NotADirectoryError, match="directory: expected a directory with a checkpoint, got org/file"):
        local_directory("directory", "org/file")
    assert not fetched


@pytest.mark.parametrize(
    "path", ["./org/name", "/org/name", "../org", "org/name/more", "name", "org/", "~/name", "a b/c"]
)
def test_paths_that_are_no_ids(path, fetched, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"directory: expected a directory with a checkpoint, got .*nothing"):
        load_hf(path)
    assert not fetched


def test_offline_it_says_what_was_tried_and_what_helps(offline):
    with pytest.raises(FileNotFoundError) as raised:
        load_hf("org/name", revision="main")
    message = str(raised.value)
    assert message.startswith(
        "directory: expected a directory, or a model on the Hugging Face Hub, got 'org/name' at rev"
    )
    for word in ("no such directory", str(offline), "HF_HUB_OFFLINE", "hf download org/name", "local directory"):
        assert word in message


def test_offline_the_cache_is_enough(offline):
    folder = offline / "models--org--name"
    (folder / "snapshots").mkdir(parents=True)
    (folder / "snapshots" / COMMIT).symlink_to(FIXTURES / "gqa")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    for revision in (None, "main", COMMIT):
        assert same(load_hf("org/name", "float32", revision=revision), load_hf(FIXTURES / "gqa", "float32"))
    with pytest.raises(FileNotFoundError, match="at revision 'v2'"):
        load_hf("org/name", revision="v2")


RESPONSE = httpx2.Response(404, request=httpx2.Request("GET", "https://huggingface.co/org/name"))


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (errors.RepositoryNotFoundError("404", response=RESPONSE), FileNotFoundError, "no such model on the Hub"),
        (errors.GatedRepoError("403", response=RESPONSE), PermissionError, "ask for access"),
        (
            errors.RevisionNotFoundError("404", response=RESPONSE),
            FileNotFoundError,
            "^revision: .* of org/name, got 'v1'",
        ),
        (errors.HfHubHTTPError("500\nmore", response=RESPONSE), OSError, "HfHubHTTPError: 500$"),
        (httpx2.ProxyError("no proxy"), OSError, "ProxyError: no proxy$"),
        (errors.HFValidationError("'--' is bad"), FileNotFoundError, "not an id"),
        (errors.IncompleteSnapshotError("half of it", snapshot_path="x"), FileNotFoundError, "half of it"),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, Exception) else "",
)
def test_errors_of_the_hub(error, kind, message, monkeypatch):
    def snapshot_download(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(kind, match=message):
        load_hf("org/name", revision="v1")


@pytest.mark.parametrize("revision", [1, b"main", ["main"]])
def test_a_revision_of_the_wrong_kind(revision):
    with pytest.raises(TypeError, match="revision: expected a string or None, got"):
        load_hf(FIXTURES / "gqa", revision=revision)


def test_headers_of_a_model_on_the_hub(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text((FIXTURES / "gqa/config.json").read_text())
    local = open_headers("directory", FIXTURES / "gqa", None, FIXTURES / "gqa")
    entries = {
        name: SimpleNamespace(shape=[*one.shape], dtype=one.dtype, data_offsets=(one.start, one.start + one.nbytes))
        for name, one in local.tensors.items()
    }
    repository = SimpleNamespace(files_metadata={"model.safetensors": SimpleNamespace(tensors=entries)})
    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", lambda model, revision: repository)
    remote = open_headers("directory", "org/name", None, tmp_path)
    assert {**check_contents(tmp_path, remote).tensors}.keys() == local.tensors.keys()
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "missing.safetensors"}}))
    partial = open_headers("directory", "org/name", None, tmp_path)
    assert partial.tensors.keys() == local.tensors.keys(), "the cache lacks a shard"
    entries["model.norm.weight"].shape = [33]
    with pytest.raises(ValueError, match=r"model\.norm\.weight: expected shape \[32\], got \[33\]"):
        check_contents(tmp_path, open_headers("directory", "org/name", None, tmp_path))


def test_the_hub_is_imported_when_it_is_needed():
    code = "import sys, pallas_attn_models.cli; print('huggingface_hub' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
