"""``doctor --model``: what a checkpoint is, and what load_hf refuses in it, from its config and headers alone."""

import json
import re
import shutil
from pathlib import Path

import huggingface_hub
import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import pallas_attn as pa
from pallas_attn_models import cli, load_hf
from pallas_attn_models.checkpoints import config_from_hf
from pallas_attn_models.checkpoints.families import FAMILIES
from pallas_attn_models.checkpoints.safetensors_file import StoredTensor
from pallas_attn_models.checkpoints.tensors import Layout

FIXTURES = Path(__file__).parents[1] / "fixtures"
# Windows in every other layer, and experts with sinks.
GPT_OSS = {
    "model_type": "gpt_oss",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "sliding_window": 24,
    "max_position_embeddings": 1000,
}


@pytest.fixture
def doctor(capsys, monkeypatch):
    """Runs the command, which must read no tensor: ``(exit code, stdout, stderr)``."""

    def doctor(model: object, *more: str) -> tuple[int, str, str]:
        with monkeypatch.context() as patch:
            patch.setattr(StoredTensor, "read", lambda _: pytest.fail("a tensor was read"))
            patch.setenv("COLUMNS", "140")
            code = cli.main(["doctor", "--model", str(model), *more])
        return code, *capsys.readouterr()

    return doctor


@pytest.fixture
def copy(tmp_path):
    def copy(name: str) -> Path:
        return Path(shutil.copytree(FIXTURES / name, tmp_path / name))

    return copy


def cells(out: str) -> dict[str, list[str]]:
    """The rows of all tables, by their first cells."""
    rows = [[cell.strip() for cell in re.split("[│┃]", line)[1:-1]] for line in out.splitlines() if line[:1] in "│┃"]
    return {row[0]: row[1:] for row in rows}


@pytest.mark.parametrize("name", ["gqa", "mqa_tied", "mha_llama3_sharded"])
def test_a_checkpoint_that_can_be_loaded(doctor, name):
    code, out, err = doctor(FIXTURES / name, "--dtype", "float32")
    assert (code, err) == (0, "")
    model, rows = load_hf(FIXTURES / name, "float32"), cells(out)
    config = model.config
    number = sum(x.size for x in jax.tree.leaves(nnx.state(model)))
    assert rows["family"] == ["llama"]
    assert rows["layers"] != []
    assert rows["attention"] == [f"{config.num_heads} heads, {config.num_kv_heads} KV heads of {config.head_dim}, full"]
    assert rows["MLP"] == [f"of width {config.intermediate_size}"]
    assert ("head is the embedding" in rows["vocabulary"][0]) == config.tie_word_embeddings
    assert rows["parameters"] == [f"{number:,}"]
    assert rows["in memory"][0].startswith(f"{4 * number:,} (")
    files = [*(FIXTURES / name).glob("*.safetensors")]
    nbytes = sum(x.nbytes for path in files for x in load_file(path).values())
    assert rows[f"{len(files)} file{'s' * (len(files) > 1)}"][1].startswith(f"{nbytes:,} (")
    assert "can be loaded: all " in out.splitlines()[-1]


def test_windows_experts_and_caches(doctor, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(GPT_OSS))
    config = config_from_hf(GPT_OSS)
    layout = Layout(FAMILIES["gpt_oss"], config)
    save_file(
        {name: np.zeros(layout.shape_of(name), np.float16) for name in layout.names()}, tmp_path / "model.safetensors"
    )
    code, out, _ = doctor(tmp_path)
    assert code == 0
    rows = cells(out)
    assert rows["attention"] == ["2 of the layers: 4 heads, 2 KV heads of 16, window of 24 tokens"]
    assert "2 of the layers: 4 heads, 2 KV heads of 16, full" in out
    assert "every head has a sink" in out
    assert rows["MLP"] == ["8 experts of width 48, 2 per token"]
    assert rows["F16"][0] == str(len(layout))
    plain = 2 * 2 * 16 * 2 + 4  # keys and values of 2 heads in bfloat16, and the position
    int8 = 2 * 2 * (16 + 4) + 4  # 8 bits and a scale for each
    assert re.search(rf"│ 2 +│ 24 +│ {plain} +│ {int8} +│", out)
    assert re.search(rf"│ 2 +│ all +│ {plain} +│ {int8} +│", out)
    assert [cell.partition(" ")[0] for cell in rows["all 4"]] == ["1,000", f"{2048 * plain:,}", f"{2048 * int8:,}"]
    for storage, per_token in ((pa.caches.Plain(), plain), (pa.caches.Int8(), int8)):
        sizes = {"batch_size": 1, "capacity": 1000, "kv_heads": 2, "head_dim": 16, "dtype": "bfloat16"}
        assert 0 <= pa.caches.nbytes(storage=storage, **sizes) - 1000 * per_token < 100, "what a row takes beside them"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_act": "mish"}, r"config\.json: hidden_act: expected 'silu' or .*, got 'mish'"),
        ({"model_type": "nobody"}, r"config\.json: model_type: expected one of .*, got 'nobody'"),
        ({"model_type": "llama4_text"}, r"config\.json: model_type: 'llama4_text' is not supported, because it needs "),
        ({"vocab_size": None}, r"config\.json: vocab_size: expected "),
        ({"a_new_field": 1}, r"config\.json: fields: expected only known fields, got a_new_field"),
        ({"num_hidden_layers": 3}, r"got all but 9 of them: missing model\.layers\.2\."),
        ({"num_hidden_layers": 10**4}, r"got all but 89982 of them"),
        ({"intermediate_size": 63}, r"model\.safetensors: model\.layers\.0\.mlp\.down_proj\.weight: expected shape "),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_a_field_that_is_refused(doctor, copy, fields, message):
    path = copy("gqa")
    config = path / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "head_dim": 8, **fields}))
    code, out, err = doctor(path)
    assert (code, err) == (1, "")
    last = out.splitlines()[-1]
    assert re.search(f"^refused: .*{message}", last)
    with pytest.raises(ValueError, match=message):
        load_hf(path)
    assert ("parameters" in out) == ("config.json" not in message.replace("\\", "")), "sizes, if the config is right"


@pytest.mark.parametrize("file", ["model.safetensors.index.json", "model-00002-of-00003.safetensors", "config.json"])
def test_a_file_that_is_missing(doctor, copy, file):
    path = copy("mha_llama3_sharded")
    (path / file).unlink()
    code, out, _ = doctor(path)
    assert code == 1
    assert re.search(f"^refused: .*{re.escape(file)}", out.splitlines()[-1])


def test_a_file_that_is_cut(doctor, copy):
    path = copy("gqa")
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    code, out, _ = doctor(path)
    assert code == 1
    assert f"refused: {weights}: expected a complete safetensors file" in out


def test_no_such_model(doctor):
    code, out, err = doctor("nowhere")
    assert (code, out) == (2, "")
    assert err == "error: --model: expected a directory with a checkpoint, got nowhere, where nothing is\n"


# --- models on the Hub ---


@pytest.fixture
def hub(monkeypatch):
    """Patterns of the files that were fetched; every model on this Hub is the same."""
    patterns = []

    def snapshot_download(repo_id, revision, allow_patterns):
        patterns.append(allow_patterns)
        return str(FIXTURES / "gqa")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return patterns


@pytest.mark.parametrize("command", [["doctor"], ["cache-size", "--capacity", "8"]], ids=lambda x: x[0])
def test_commands_that_fetch_the_config_only(hub, capsys, command):
    assert cli.main([*command, "--model", "org/name", "--revision", "main"]) == 0
    assert hub == [("config.json",)] or hub == [["config.json"]]


@pytest.mark.parametrize("command", [["generate", "--prompt", "a"], ["chat"]], ids=lambda x: x[0])
def test_commands_that_fetch_weights_and_text(hub, capsys, command):
    assert cli.main([*command, "--model", "org/name"]) == 2
    assert "tokenizer" in capsys.readouterr().err, "the fixture has none"
    files = [
        *("config.json", "model.safetensors", "tokenizer.json", "generation_config.json", "chat_template.jinja"),
        *("additional_chat_templates/tool_use.jinja", "original/model.safetensors"),
    ]
    assert [*huggingface_hub.utils.filter_repo_objects(files, allow_patterns=hub[0])] == files[:-1]
