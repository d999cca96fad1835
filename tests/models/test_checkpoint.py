"""load_hf and save_hf: bitwise round trips, and nothing missing, extra or broken goes unnoticed."""

import json
import logging
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from pallas_attn_models import checkpoint
from pallas_attn_models.checkpoint import load_hf, save_hf
from pallas_attn_models.config import DecoderConfig
from pallas_attn_models.decoder import Decoder

FIXTURES = Path(__file__).parent / "fixtures"
DTYPES = {"gqa": "float32", "mqa_tied": "bfloat16", "mha_llama3_sharded": "float16", "linear": "bfloat16"}


@pytest.fixture
def copy(tmp_path):
    """Copies a fixture to where a test may break it."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(FIXTURES / name, tmp_path / name))

    return copy


def edit_tensors(path: Path, edit) -> None:
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


def edit_json(path: Path, edit) -> None:
    value = json.loads(path.read_text())
    edit(value)
    path.write_text(json.dumps(value))


def assert_same_bits(a: nnx.Module, b: nnx.Module) -> None:
    leaves_a, leaves_b = (jax.tree.leaves_with_path(nnx.state(model)) for model in (a, b))
    assert [path for path, _ in leaves_a] == [path for path, _ in leaves_b]
    for (path, x), (_, y) in zip(leaves_a, leaves_b, strict=True):
        assert x.dtype == y.dtype, path
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), path


@pytest.mark.parametrize("max_shard_bytes", [5 * 10**9, 30_000, 1])
@pytest.mark.parametrize(("name", "dtype"), DTYPES.items())
def test_what_is_saved_is_loaded_bitwise(name, dtype, max_shard_bytes, tmp_path):
    model = load_hf(FIXTURES / name, dtype=dtype)
    save_hf(model, tmp_path / "saved", max_shard_bytes=max_shard_bytes)
    loaded = load_hf(tmp_path / "saved", dtype=dtype)
    assert loaded.config == model.config
    assert_same_bits(loaded, model)
    files = sorted(path.name for path in (tmp_path / "saved").iterdir())
    assert ("model.safetensors" in files) == (max_shard_bytes == 5 * 10**9)
    for path in (tmp_path / "saved").glob("*.safetensors"):
        tensors = load_file(path)
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= max_shard_bytes


@pytest.mark.parametrize(("name", "dtype"), DTYPES.items())
def test_tensors_on_disk_are_those_of_the_checkpoint(name, dtype, tmp_path):
    save_hf(load_hf(FIXTURES / name, dtype=dtype), tmp_path)
    original = {}
    for path in (FIXTURES / name).glob("*.safetensors"):
        original |= load_file(path)
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == original.keys()
    for tensor in original:
        assert saved[tensor].dtype == original[tensor].dtype
        assert saved[tensor].tobytes() == original[tensor].tobytes(), tensor


def test_weights_of_a_fresh_model_survive(tmp_path):
    config = DecoderConfig(
        vocab_size=32, hidden_size=20, intermediate_size=12, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=6
    )
    model = Decoder(config, rngs=nnx.Rngs(0))
    save_hf(model, tmp_path)
    assert_same_bits(load_hf(tmp_path, dtype=jnp.float32), model)


def test_dtype_defaults_to_bfloat16_and_rounds():
    model = load_hf(FIXTURES / "gqa")
    exact = load_hf(FIXTURES / "gqa", dtype=jnp.float32)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {jnp.dtype(jnp.bfloat16)}
    np.testing.assert_array_equal(
        np.asarray(model.embedding.table[...]), np.asarray(exact.embedding.table[...]).astype(jnp.bfloat16)
    )


def test_saving_again_leaves_no_file_of_the_earlier_save(tmp_path):
    first, second = load_hf(FIXTURES / "gqa", dtype=jnp.float32), load_hf(FIXTURES / "linear")
    (tmp_path / "tokenizer.json").write_text("{}")
    save_hf(first, tmp_path, max_shard_bytes=20_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    save_hf(second, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert_same_bits(load_hf(tmp_path), second)
    save_hf(first, tmp_path, max_shard_bytes=20_000)
    assert_same_bits(load_hf(tmp_path, dtype=jnp.float32), first)


def test_weights_can_be_read_by_whoever_can_read_the_config(tmp_path):
    save_hf(load_hf(FIXTURES / "gqa"), tmp_path)
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1


def test_a_save_that_fails_leaves_the_earlier_one(tmp_path, monkeypatch):
    first, second = load_hf(FIXTURES / "gqa", dtype=jnp.float32), load_hf(FIXTURES / "linear")
    save_hf(first, tmp_path)

    def full_disk(tensors, path, metadata):
        path.write_bytes(b"half a file")
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    with pytest.raises(OSError, match="no space left"):
        save_hf(second, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert_same_bits(load_hf(tmp_path, dtype=jnp.float32), first)


@pytest.mark.parametrize("max_shard_bytes", [0, -1, 1.5, True])
def test_a_shard_size_that_is_none(max_shard_bytes, tmp_path):
    with pytest.raises(ValueError, match="max_shard_bytes: expected an int of at least 1"):
        save_hf(load_hf(FIXTURES / "gqa"), tmp_path, max_shard_bytes=max_shard_bytes)


def test_missing_tensors_are_named(copy):
    path = copy("gqa")
    edit_tensors(path / "model.safetensors", lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(ValueError, match=r"missing model\.layers\.1\.mlp\.up_proj\.weight"):
        load_hf(path)


def test_extra_tensors_are_named(copy):
    path = copy("gqa")
    bias = {"model.layers.0.self_attn.q_proj.bias": np.zeros(32, np.float32)}
    edit_tensors(path / "model.safetensors", lambda tensors: tensors.update(bias))
    with pytest.raises(ValueError, match=r"got also model\.layers\.0\.self_attn\.q_proj\.bias"):
        load_hf(path)


@pytest.mark.parametrize(
    ("tensor", "value", "message"),
    [
        ("model.norm.weight", np.zeros(33, np.float32), r"model.norm.weight: expected shape \[32\], got \[33\]"),
        (
            "model.layers.0.mlp.up_proj.weight",
            np.zeros((32, 64), np.float32),
            r"up_proj.weight: expected shape \[64, 32\], got \[32, 64\]",
        ),
        ("model.norm.weight", np.zeros(32, np.float64), "model.norm.weight: expected one of F32, BF16, F16, got F64"),
        ("model.norm.weight", np.zeros(32, np.int8), "model.norm.weight: expected one of F32, BF16, F16, got I8"),
    ],
)
def test_a_tensor_of_another_shape_or_dtype_is_named(copy, tensor, value, message):
    path = copy("gqa")
    edit_tensors(path / "model.safetensors", lambda tensors: tensors.update({tensor: value}))
    with pytest.raises(ValueError, match=message):
        load_hf(path)


def test_rotary_buffers_are_ignored_and_it_says_so(copy, caplog):
    path = copy("gqa")
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(4, np.float32)}
    edit_tensors(path / "model.safetensors", lambda tensors: tensors.update(buffer))
    with caplog.at_level(logging.INFO, logger="pallas_attn_models.checkpoint"):
        model = load_hf(path, dtype=jnp.float32)
    assert "inv_freq" in caplog.text
    assert_same_bits(model, load_hf(FIXTURES / "gqa", dtype=jnp.float32))


def test_a_tied_head_must_equal_the_embedding(copy):
    path = copy("mqa_tied")
    weights = path / "model.safetensors"
    edit_tensors(weights, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"]}))
    assert_same_bits(load_hf(path), load_hf(FIXTURES / "mqa_tied"))
    edit_tensors(weights, lambda tensors: tensors.update({"lm_head.weight": tensors["lm_head.weight"] + 1}))
    with pytest.raises(ValueError, match=r"lm_head\.weight: expected the values of model\.embed_tokens\.weight"):
        load_hf(path)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_broken_weights_file_is_named(copy, keep):
    path = copy("gqa")
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model\.safetensors: expected a whole safetensors file"):
        load_hf(path)


@pytest.mark.parametrize("file", ["config.json", "model-00002-of-00003.safetensors", "model.safetensors.index.json"])
def test_a_missing_file_is_named(copy, file):
    path = copy("mha_llama3_sharded")
    (path / file).unlink()
    with pytest.raises(FileNotFoundError, match=file):
        load_hf(path)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize(("text", "message"), [("{", "expected JSON"), ("[]", "expected a JSON object, got list")])
def test_broken_json_is_named(copy, file, text, message):
    path = copy("mha_llama3_sharded")
    (path / file).write_text(text)
    with pytest.raises(ValueError, match=f"{file}: {message}"):
        load_hf(path)


def test_an_unsupported_config_names_the_file(copy):
    path = copy("gqa")
    edit_json(path / "config.json", lambda fields: fields.update(hidden_act="gelu"))
    with pytest.raises(ValueError, match=r"config\.json: hidden_act: expected 'silu', got 'gelu'"):
        load_hf(path)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda index: index.pop("weight_map"), "expected an object weight_map"),
        (lambda index: index.update(weight_map={"model.norm.weight": 3}), "expected an object weight_map"),
        (lambda index: index["weight_map"].pop("model.norm.weight"), "differs in model.norm.weight"),
        (
            lambda index: index["weight_map"].update({"model.ghost": "model-00001-of-00003.safetensors"}),
            "differs in model.ghost",
        ),
        (
            lambda index: index["weight_map"].update({"model.norm.weight": "../model.safetensors"}),
            r"expected the names of files beside it, got '\.\./model.safetensors'",
        ),
    ],
)
def test_an_index_that_does_not_fit_its_shards(copy, edit, message):
    path = copy("mha_llama3_sharded")
    edit_json(path / "model.safetensors.index.json", edit)
    with pytest.raises(ValueError, match=message):
        load_hf(path)


def test_a_tensor_in_two_shards_is_refused(copy):
    path = copy("mha_llama3_sharded")
    norm = {"model.norm.weight": np.zeros(48, np.float16)}
    held_by = json.loads((path / "model.safetensors.index.json").read_text())["weight_map"]["model.norm.weight"]
    other = next(file for file in sorted(path.glob("*.safetensors")) if file.name != held_by)
    edit_tensors(other, lambda tensors: tensors.update(norm))
    with pytest.raises(ValueError, match=r"expected every tensor once, got again model\.norm\.weight"):
        load_hf(path)


def test_a_dtype_that_weights_cannot_have():
    with pytest.raises(ValueError, match="dtype: expected one of float32, bfloat16, float16, got int8"):
        load_hf(FIXTURES / "gqa", dtype=jnp.int8)


@pytest.mark.parametrize("max_shard_bytes", [5 * 10**9, 30_000])
@pytest.mark.parametrize(("name", "dtype"), DTYPES.items())
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_transformers_loads_what_is_saved(name, dtype, max_shard_bytes, tmp_path):
    torch = pytest.importorskip("torch", reason="loads the checkpoint with PyTorch")
    transformers = pytest.importorskip("transformers", reason="loads the checkpoint with transformers")
    save_hf(load_hf(FIXTURES / name, dtype=dtype), tmp_path, max_shard_bytes=max_shard_bytes)
    theirs, report = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype="auto", output_loading_info=True)
    original = transformers.LlamaForCausalLM.from_pretrained(FIXTURES / name, dtype="auto")
    assert not any(report.values()), report
    for (tensor, a), (_, b) in zip(theirs.state_dict().items(), original.state_dict().items(), strict=True):
        assert a.dtype == b.dtype == getattr(torch, dtype)
        assert torch.equal(a, b), tensor
    assert theirs.config.rope_parameters["rope_theta"] == original.config.rope_parameters["rope_theta"]
    assert theirs.config.eos_token_id == original.config.eos_token_id
