"""load_hf and save_hf: bitwise round trips; missing, extra or broken files and tensors raise."""

import json
import logging
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from pallas_attn_models.checkpoints import config_from_hf, contents
from pallas_attn_models.checkpoints import files as checkpoint_files
from pallas_attn_models.checkpoints import hf as checkpoint
from pallas_attn_models.checkpoints.families import FAMILIES
from pallas_attn_models.checkpoints.hf import load_hf, save_hf
from pallas_attn_models.checkpoints.tensors import Layout
from pallas_attn_models.decoder.config import DecoderConfig
from pallas_attn_models.decoder.decoder import Decoder

FIXTURES = Path(__file__).parents[1] / "fixtures"
MISTRAL = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 8}
DTYPES = {"gqa": "float32", "mqa_tied": "bfloat16", "mha_llama3_sharded": "float16", "linear": "bfloat16"}


@pytest.fixture
def copy(tmp_path):
    """Copies a fixture, so that a test may break it."""

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
def test_save_and_load_are_bitwise(name, dtype, max_shard_bytes, tmp_path):
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


def test_a_tensor_larger_than_a_shard_is_alone(tmp_path):
    model = load_hf(FIXTURES / "gqa", dtype="float32")
    sizes = {name: x.nbytes for name, x in load_file(FIXTURES / "gqa" / "model.safetensors").items()}
    limit = sizes["model.layers.0.mlp.up_proj.weight"]
    assert sizes["lm_head.weight"] > limit
    save_hf(model, tmp_path, max_shard_bytes=limit)
    shards = [load_file(path) for path in sorted(tmp_path.glob("*.safetensors"))]
    assert {"lm_head.weight"} in [set(shard) for shard in shards]
    assert {"model.layers.0.mlp.up_proj.weight"} in [set(shard) for shard in shards], "a limit is exact"
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == sizes.keys()
    assert index["metadata"]["total_size"] == sum(sizes.values())
    assert len(shards) < len(sizes)


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


def test_weights_are_as_readable_as_the_config(tmp_path):
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


@pytest.mark.parametrize("max_shard_bytes", [0, -1, 1.5, True, None, "5GB", [1]])
def test_an_invalid_shard_size(max_shard_bytes, tmp_path):
    with pytest.raises(ValueError, match="max_shard_bytes: expected an int of at least 1"):
        save_hf(load_hf(FIXTURES / "gqa"), tmp_path, max_shard_bytes=max_shard_bytes)


def test_missing_tensors_are_named(copy):
    path = copy("gqa")
    edit_tensors(path / "model.safetensors", lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(ValueError, match=r"missing model\.layers\.1\.mlp\.up_proj\.weight"):
        load_hf(path)


def test_missing_tensors_are_counted_and_the_first_of_them_named(copy):
    path = copy("gqa")
    edit_tensors(path / "model.safetensors", lambda tensors: [tensors.pop(name) for name in sorted(tensors)[1:9]])
    with pytest.raises(ValueError, match=r"got all but 8 of them: missing model\.embed_tokens\.weight, .* and 3 more"):
        load_hf(path)


@pytest.fixture
def nothing_is_built(monkeypatch):
    monkeypatch.setattr(checkpoint, "abstract_decoder", lambda *_, **__: pytest.fail("a decoder was built"))
    monkeypatch.setattr(checkpoint_files.StoredTensor, "read", lambda _: pytest.fail("a tensor was read"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"num_hidden_layers": 3},
            r"all 30 tensors of 3 layers, got all but 9 of them: missing model\.layers\.2\..*",
        ),
        (
            {"num_hidden_layers": 10**6},
            r"all 9000003 tensors of 1000000 layers, got all but 8999982 of them: missing .* and 8999977 more",
        ),
        ({"num_hidden_layers": 1}, r"got also model\.layers\.1\..* and 4 more"),
        ({"num_hidden_layers": 10**9}, r"config\.json: num_layers: expected an int of at most 1048576, got 1000000000"),
        (
            {"num_hidden_layers": 10**9, **MISTRAL},
            r"config\.json: num_hidden_layers: expected an int of at most 1048576",
        ),
        (
            {"hidden_size": 10**12},
            r"config\.json: hidden_size: expected an int of at most 2147483647, got 1000000000000",
        ),
        ({"hidden_size": 2**30}, r"expected shape \[96, 1073741824\], got \[96, 32\]; and 20 more tensors"),
        ({"intermediate_size": 2**31 - 1}, r"down_proj.*expected shape \[32, 2147483647\], got \[32, 64\]; and 5 more"),
        ({"vocab_size": 10**8}, r"lm_head\.weight: expected shape \[100000000, 32\], got \[96, 32\]; and 1 more"),
        ({"tie_word_embeddings": True, "vocab_size": 95}, r"expected shape \[95, 32\], got \[96, 32\]; and 1 more"),
    ],
)
def test_sizes_are_compared_before_anything_is_built(copy, nothing_is_built, fields, message):
    path = copy("gqa")
    edit_json(path / "config.json", lambda old: old.update({"head_dim": 8, **fields}))
    with pytest.raises(ValueError, match=message):
        load_hf(path)


@pytest.mark.parametrize("name", sorted(path.parent.name for path in FIXTURES.glob("*/config.json")))
def test_the_layout_is_that_of_the_decoder(name):
    model = load_hf(FIXTURES / name, jnp.float32)
    layout = Layout(FAMILIES["llama"], model.config)
    names = list(layout.names())
    assert len(names) == len(set(names)) == len(layout)
    assert all(name in layout for name in names)
    shapes = {".".join(map(str, path)): x.shape for path, x in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    places = list(layout.places())
    assert shapes == {path: shape for x in places for path, shape in zip(x.parameters, x.shapes, strict=True)}
    for place in places:
        assert {layout.shape_of(name) for name in place.names} == {place.shape}
        assert place.shape == (place.shapes[0][::-1] if place.tensor.transposed else place.shapes[0])


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.2.mlp.up_proj.weight",  # there are two layers
        "model.layers.01.mlp.up_proj.weight",
        "model.layers.-1.mlp.up_proj.weight",
        "model.layers.\u0661.mlp.up_proj.weight",
        f"model.layers.{'9' * 5000}.mlp.up_proj.weight",
        "model.layers.1.mlp.up_proj.weight ",
        "",
    ],
)
def test_names_similar_to_those_of_tensors(copy, name):
    path = copy("gqa")
    edit_tensors(path / "model.safetensors", lambda tensors: tensors.update({name: np.zeros(1, np.float32)}))
    with pytest.raises(ValueError, match="expected only tensors of the model, got also"):
        load_hf(path)


def edit_header(path: Path, edit) -> None:
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    edit(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("dtype", "F7"),
        ("shape", [-32]),
        ("shape", [2**40, 2**40]),
        ("shape", "32"),
        ("data_offsets", [0, 128]),
        ("data_offsets", [2**63, 2**63 + 128]),
        ("data_offsets", [5]),
    ],
)
def test_a_header_that_lies_is_named(copy, field, value):
    path = copy("gqa")
    edit_header(path / "model.safetensors", lambda header: header["model.norm.weight"].update({field: value}))
    with pytest.raises(ValueError, match=r"model\.safetensors: expected a complete safetensors file"):
        load_hf(path)


@pytest.mark.parametrize("size", [2**63, 2**64 - 1, 10**8 + 1, 3])
def test_a_size_of_a_header_that_lies_is_named(copy, size):
    weights = copy("gqa") / "model.safetensors"
    weights.write_bytes(size.to_bytes(8, "little") + weights.read_bytes()[8:])
    with pytest.raises(ValueError, match=r"model\.safetensors: expected a complete safetensors file"):
        load_hf(weights.parent)


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
    with caplog.at_level(logging.INFO, logger="pallas_attn_models.checkpoints"):
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


def test_a_tied_model_may_store_its_head_only(copy):
    path = copy("mqa_tied")

    def rename(tensors: dict) -> None:
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")

    edit_tensors(path / "model.safetensors", rename)
    calls = []
    model = load_hf(path, progress=lambda done, total: calls.append((done, total)))
    assert_same_bits(model, load_hf(FIXTURES / "mqa_tied"))
    assert calls[-1][0] == calls[-1][1]


def test_a_tied_head_is_compared_to_its_end(copy, monkeypatch):
    monkeypatch.setattr(contents, "_COMPARED", 100)
    path = copy("mqa_tied")

    def differ_at_the_end(tensors: dict) -> None:
        head = tensors["model.embed_tokens.weight"].copy()
        head[-1, -1] += 1
        tensors["lm_head.weight"] = head

    edit_tensors(path / "model.safetensors", differ_at_the_end)
    with pytest.raises(ValueError, match=r"lm_head\.weight: expected the values of model\.embed_tokens\.weight"):
        load_hf(path)


@pytest.mark.parametrize(
    "fields",
    [
        {"auto_map": {"AutoModelForCausalLM": "modeling_llama.LlamaForCausalLM"}},
        {"keys_to_ignore_at_inference": ["past_key_values"]},
        {"hidden_act": "swish"},
        {"pretraining_tp": 1, "use_cache": True, "transformers_version": "4.31.0", "pad_token_id": 0},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_fields_of_published_configs_without_effect(copy, fields):
    path = copy("gqa")
    edit_json(path / "config.json", lambda old: old.update(fields))
    model = load_hf(path)
    assert model.config == load_hf(FIXTURES / "gqa").config
    assert_same_bits(model, load_hf(FIXTURES / "gqa"))


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "qwen2_moe", "qwen3_moe"])
def test_windows_that_are_switched_off(family):
    """Published files of Qwen have a window beside ``use_sliding_window: false``."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    fields = {
        "model_type": family,
        **{"vocab_size": 32, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 2},
        **{"num_attention_heads": 2, "num_key_value_heads": 1},
        **(experts if "moe" in family else {}),
        **({"shared_expert_intermediate_size": 8} if family == "qwen2_moe" else {}),
    }
    off = {"use_sliding_window": False, "sliding_window": 4, "max_window_layers": 0}
    config = config_from_hf({**fields, **off})
    assert {config.sliding_window(layer) for layer in range(2)} == {None}
    assert config == config_from_hf(fields)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_broken_weights_file_is_named(copy, keep):
    path = copy("gqa")
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model\.safetensors: expected a complete safetensors file"):
        load_hf(path)


@pytest.mark.parametrize("file", ["config.json", "model-00002-of-00003.safetensors", "model.safetensors.index.json"])
def test_a_missing_file_is_named(copy, file):
    path = copy("mha_llama3_sharded")
    (path / file).unlink()
    with pytest.raises(FileNotFoundError, match=file):
        load_hf(path)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "expected JSON"),
        ("[]", "expected a JSON object, got list"),
        ("[" * 200_000, "expected JSON, got objects or arrays nested too deeply"),
        ('{"a": ' * 200_000, "expected JSON, got objects or arrays nested too deeply"),
        ('{"a": ' + "9" * 5000 + "}", "expected JSON, got: Exceeds the limit"),
    ],
)
def test_broken_json_is_named(copy, file, text, message):
    path = copy("mha_llama3_sharded")
    (path / file).write_text(text)
    with pytest.raises(ValueError, match=f"{file}: {message}"):
        load_hf(path)


def test_an_unsupported_config_names_the_file(copy):
    path = copy("gqa")
    edit_json(path / "config.json", lambda fields: fields.update(hidden_act="mish"))
    with pytest.raises(ValueError, match=r"config\.json: hidden_act: expected 'silu' or .*, got 'mish'"):
        load_hf(path)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda index: index.pop("weight_map"), "weight_map: expected an object"),
        (
            lambda index: index.update(weight_map={"model.norm.weight": 3}),
            "weight_map: expected an object from tensors to files",
        ),
        (lambda index: index["weight_map"].pop("model.norm.weight"), "got differences in model.norm.weight"),
        (
            lambda index: index["weight_map"].update({"model.ghost": "model-00001-of-00003.safetensors"}),
            "got differences in model.ghost",
        ),
        (
            lambda index: index["weight_map"].update({"model.norm.weight": "../model.safetensors"}),
            r"expected names of files in its directory, got '\.\./model.safetensors'",
        ),
        *(
            (
                lambda index, file=file: index["weight_map"].update({"model.norm.weight": file}),
                "names of files in its directory",
            )
            for file in ("/etc/passwd", "..", ".", "", "a/b.safetensors", "a\0b")
        ),
        (lambda index: index.update(metadata=[]), "metadata: expected an object, got "),
        (
            lambda index: index.update(metadata={"pallas_attn_save": "../../x"}),
            "underscores, got '../../x'",
        ),
        (
            lambda index: index.update(weight_map={"model.norm.weight": None}),
            "weight_map: expected an object from tensors to files",
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
    with pytest.raises(ValueError, match=r"expected every tensor once, got duplicates of model\.norm\.weight"):
        load_hf(path)


class Fake:
    """An object of the wrong kind for any argument."""


WRONG_PATHS = [None, 3, 1.5, b"bytes", ["a"], Fake(), Path, DecoderConfig]


@pytest.mark.parametrize("directory", WRONG_PATHS, ids=lambda x: type(x).__name__ if isinstance(x, Fake) else repr(x))
def test_a_directory_of_the_wrong_kind(directory):
    got = f"directory: expected a path, got {type(directory).__name__}"
    with pytest.raises(TypeError, match=got):
        load_hf(directory)
    with pytest.raises(TypeError, match=got):
        save_hf(load_hf(FIXTURES / "gqa"), directory)


@pytest.mark.parametrize("directory", ["", "a\0b"])
def test_a_path_that_is_not_one(directory):
    with pytest.raises(ValueError, match="directory: expected a path, got "):
        load_hf(directory)
    with pytest.raises(ValueError, match="directory: expected a path, got "):
        save_hf(load_hf(FIXTURES / "gqa"), directory)


def test_a_directory_that_is_not_one(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"directory: expected a directory with a checkpoint, got .*/none"):
        load_hf(tmp_path / "none")
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(NotADirectoryError, match=r"directory: expected a directory with a checkpoint, got .*/file"):
        load_hf(file)
    for directory in (file, file / "below"):
        with pytest.raises(NotADirectoryError, match=r"directory: expected a directory, got .*/file"):
            save_hf(load_hf(FIXTURES / "gqa"), directory)
    (tmp_path / "config.json").mkdir()
    with pytest.raises(IsADirectoryError, match=r"directory: expected a file or nothing at .*/config\.json"):
        save_hf(load_hf(FIXTURES / "gqa"), tmp_path)


def test_a_directory_that_cannot_be_written(tmp_path, monkeypatch):
    def refuse(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(checkpoint_files.tempfile, "TemporaryFile", refuse)
    with pytest.raises(PermissionError, match=r"directory: expected a writable directory, got .*denied"):
        save_hf(load_hf(FIXTURES / "gqa"), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("option", "value", "kind", "got"),
    [
        ("dtype", jnp.int8, ValueError, "int8"),
        ("dtype", "float64", ValueError, "float64"),
        ("dtype", float, ValueError, "float64"),
        ("dtype", "half a float", ValueError, "'half a float'"),
        ("dtype", None, TypeError, "None"),
        ("dtype", 3, TypeError, "3"),
        ("dtype", ["float32"], TypeError, "['float32']"),
        ("implementation", "cudnn", ValueError, "'cudnn'"),
        ("implementation", ["xla"], TypeError, "list"),
        ("implementation", 1, TypeError, "int"),
    ],
)
def test_options_of_the_wrong_kind(option, value, kind, got, nothing_is_built):
    with pytest.raises(kind, match=f"{option}: expected one of .*, got {re.escape(got)}"):
        load_hf(FIXTURES / "gqa", **{option: value})


@pytest.mark.parametrize("model", [None, 3, FIXTURES / "gqa", DecoderConfig, Decoder, {}], ids=repr)
def test_a_model_of_the_wrong_kind(model, tmp_path):
    with pytest.raises(TypeError, match=f"model: expected a Decoder, got {type(model).__name__}"):
        save_hf(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def replace_mlp(model: Decoder) -> None:
    model.layers[0].mlp = nnx.Linear(3, 3, rngs=nnx.Rngs(0))


def more_parameters(model: Decoder) -> None:
    model.layers[0].mlp.adapter = nnx.LoRA(32, 2, 64, rngs=nnx.Rngs(0))


def no_values(model: Decoder) -> None:
    model.norm.scale.set_value(jax.ShapeDtypeStruct((32,), jnp.float32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            replace_mlp,
            r"missing layers\.0\.mlp\.down\.kernel, .*, and also layers\.0\.mlp\.bias, layers\.0\.mlp\.kernel",
        ),
        (more_parameters, r"missing none, and also layers\.0\.mlp\.adapter\.lora_a, layers\.0\.mlp\.adapter\.lora_b"),
        (lambda model: model.layers.pop(), r"missing layers\.1\..* and 4 more, and also none"),
        (lambda model: setattr(model, "head", None), r"missing head\.kernel, and also none"),
        (no_values, r"expected parameters with values, got ShapeDtypeStruct for norm\.scale"),
        (
            lambda model: model.norm.scale.set_value(jnp.zeros(33, jnp.float32)),
            r"expected float32 or bfloat16 or float16 \[32\] for norm\.scale, as in its config, got float32 \[33\]",
        ),
        (
            lambda model: model.head.kernel.set_value(jnp.zeros((32, 96), jnp.int8)),
            r"expected float32 or bfloat16 or float16 \[32, 96\] for head\.kernel, as in its config, got int8",
        ),
    ],
)
def test_parameters_that_do_not_match_the_config(change, message, tmp_path):
    model = load_hf(FIXTURES / "gqa", jnp.float32)
    change(model)
    with pytest.raises((ValueError, TypeError), match=f"model: {message}" if "values" in message else message):
        save_hf(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_model_within_a_trace(tmp_path):
    with pytest.raises(TypeError, match=r"model: expected parameters with values, got .*Tracer"):
        nnx.jit(lambda model: save_hf(model, tmp_path / "new"))(load_hf(FIXTURES / "gqa"))


@pytest.mark.parametrize("max_shard_bytes", [5 * 10**9, 30_000])
@pytest.mark.parametrize(("name", "dtype"), DTYPES.items())
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_transformers_loads_what_is_saved(name, dtype, max_shard_bytes, tmp_path):
    torch = pytest.importorskip("torch", reason="loads the checkpoint with PyTorch")
    transformers = pytest.importorskip("transformers", reason="loads the checkpoint with transformers")
    for _ in range(2):  # the second time, names of shards are taken
        save_hf(load_hf(FIXTURES / name, dtype=dtype), tmp_path, max_shard_bytes=max_shard_bytes)
    theirs, report = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype="auto", output_loading_info=True)
    original = transformers.LlamaForCausalLM.from_pretrained(FIXTURES / name, dtype="auto")
    assert not any(report.values()), report
    for (tensor, a), (_, b) in zip(theirs.state_dict().items(), original.state_dict().items(), strict=True):
        assert a.dtype == b.dtype == getattr(torch, dtype)
        assert torch.equal(a, b), tensor
    assert theirs.config.rope_parameters["rope_theta"] == original.config.rope_parameters["rope_theta"]
    assert theirs.config.eos_token_id == original.config.eos_token_id
