"""Files of weights: mapped, read tensor by tensor, duplicates refused."""

import json
import os
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from pallas_attn_models import load_hf
from pallas_attn_models.checkpoints.safetensors_file import opened

FIXTURES = Path(__file__).parents[1] / "fixtures"


def write(path: Path, header: str, data: bytes) -> Path:
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + data)
    return path


def entry(start: int, end: int) -> str:
    return json.dumps({"dtype": "F32", "shape": [(end - start) // 4], "data_offsets": [start, end]})


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.uint8])
def test_values_and_metadata(dtype, tmp_path):
    tensors = {"a": np.arange(12).reshape(3, 4).astype(dtype), "b": np.ones((), dtype)}
    save_file(tensors, tmp_path / "x.safetensors", {"format": "pt"})
    file = opened(tmp_path / "x.safetensors")
    assert file.metadata == {"format": "pt"}
    assert file.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        stored = file.tensors[name]
        assert (stored.shape, stored.nbytes) == (tensor.shape, tensor.nbytes)
        values = stored.read()
        stored.release()
        assert values.dtype == tensor.dtype
        np.testing.assert_array_equal(values, tensor)
        with pytest.raises(ValueError, match="read-only"):
            values[...] = 0


@pytest.mark.parametrize("padding", range(4))
def test_values_at_any_address(padding, tmp_path):
    header = f'{{"a": {entry(0, 8)}}}' + " " * padding
    values = np.array([1, -2], np.float32)
    file = opened(write(tmp_path / "x.safetensors", header, values.tobytes()))
    stored = file.tensors["a"].read()
    assert stored.flags.aligned
    np.testing.assert_array_equal(stored, values)


def test_values_outlive_the_file(tmp_path):
    save_file({"a": np.arange(4096, dtype=np.float32)}, tmp_path / "x.safetensors")
    file = opened(tmp_path / "x.safetensors")
    os.unlink(tmp_path / "x.safetensors")
    values = file.tensors["a"].read()
    del file
    np.testing.assert_array_equal(values, np.arange(4096))


@pytest.mark.parametrize("second", [entry(0, 8), entry(8, 16)], ids=["the same", "another"])
@pytest.mark.parametrize("name", ['"a"', r'"\u0061"'], ids=["spelled alike", "spelled differently"])
def test_a_name_that_is_twice_in_the_header(second, name, tmp_path):
    size = 8 if second == entry(0, 8) else 16
    path = write(tmp_path / "x.safetensors", f'{{"a": {entry(0, 8)}, {name}: {second}}}', bytes(size))
    with pytest.raises(ValueError, match=r"x\.safetensors: .*, got: duplicates in the header of a$"):
        opened(path)


def test_load_hf_refuses_duplicates_before_it_reads_a_tensor(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text((FIXTURES / "gqa/config.json").read_text())
    data = (FIXTURES / "gqa/model.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + size].decode().rstrip()
    norm = json.dumps(json.loads(header)["model.norm.weight"])
    write(tmp_path / "model.safetensors", f'{header[:-1]}, "model.norm.weight": {norm}}}', data[8 + size :])
    monkeypatch.setattr(
        "pallas_attn_models.checkpoints.safetensors_file.mmap.mmap", lambda *_, **__: pytest.fail("mapped")
    )
    with pytest.raises(ValueError, match=r"duplicates in the header of model\.norm\.weight"):
        load_hf(tmp_path)


@pytest.mark.parametrize("header", ["[]", "7", '{"a": [1]}', '{"a": {}}', "[" * 10_000, '{"a": ' * 10_000, '"a"', "{"])
def test_a_header_of_another_form(header, tmp_path):
    path = write(tmp_path / "x.safetensors", header, b"")
    with pytest.raises(ValueError, match=r"x\.safetensors: expected a complete safetensors file, got: "):
        opened(path)


@pytest.mark.parametrize("name", ["gqa", "linear"])
def test_a_model_shares_no_memory_with_its_file(name, tmp_path):
    """Truncating a mapped file would end the process at the next read."""
    data = (FIXTURES / name / "model.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + size].decode().ljust(-(-(8 + size) // 4096) * 4096 - 8)  # so that a CPU could share memory
    write(tmp_path / "model.safetensors", header, data[8 + size :])
    (tmp_path / "config.json").write_text((FIXTURES / name / "config.json").read_text())
    dtype = {"gqa": "float32", "linear": "bfloat16"}[name]
    model, expected = load_hf(tmp_path, dtype), load_hf(FIXTURES / name, dtype)
    os.truncate(tmp_path / "model.safetensors", 0)
    for x, y in zip(jax.tree.leaves(nnx.state(model)), jax.tree.leaves(nnx.state(expected)), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()
