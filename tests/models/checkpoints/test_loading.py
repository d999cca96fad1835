"""How load_hf loads: memory, progress, dtypes; and sizes that are only described."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from pallas_attn_models import Decoder, load_hf
from pallas_attn_models.checkpoints import config_from_hf
from pallas_attn_models.checkpoints.families import FAMILIES
from pallas_attn_models.checkpoints.tensors import Layout
from pallas_attn_models.decoder import abstract_decoder
from pallas_attn_models.decoder.decoder import DecoderLayer

FIXTURES = Path(__file__).parents[1] / "fixtures"
NAMES = sorted(path.parent.name for path in FIXTURES.glob("*/config.json"))

LLAMA_70B = {
    "model_type": "llama",
    "vocab_size": 128_256,
    "hidden_size": 8192,
    "intermediate_size": 28_672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}
GPT_OSS_120B = {
    "model_type": "gpt_oss",
    "vocab_size": 201_088,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_hidden_layers": 36,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "num_local_experts": 128,
    "num_experts_per_tok": 4,
    "sliding_window": 128,
    "layer_types": ["sliding_attention", "full_attention"] * 18,
}


# --- progress ---


@pytest.mark.parametrize("name", NAMES)
def test_progress_is_that_of_the_files(name):
    calls = []
    load_hf(FIXTURES / name, progress=lambda done, total: calls.append((done, total)))
    done, totals = zip(*calls, strict=True)
    files = [path.read_bytes() for path in (FIXTURES / name).glob("*.safetensors")]
    assert {*totals} == {sum(len(data) - 8 - int.from_bytes(data[:8], "little") for data in files)}
    assert [*done] == sorted({*done})
    assert done[-1] == totals[-1]


@pytest.mark.parametrize(("progress", "expected"), [(None, False), (False, False), (True, True)])
def test_a_bar_on_stderr(progress, expected, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich draws nothing if there is no terminal
    load_hf(FIXTURES / "gqa", progress=progress)
    out, err = capsys.readouterr()
    assert out == ""
    assert bool(err) == expected
    if expected:
        assert "kB" in err


@pytest.mark.parametrize("progress", [1, "bar", [print]])
def test_progress_of_the_wrong_kind(progress):
    with pytest.raises(TypeError, match="progress: expected a function, a bool or None, got"):
        load_hf(FIXTURES / "gqa", progress=progress)


# --- memory ---

# Prints how far the memory of a process grows while it loads a checkpoint, in bytes. ru_maxrss would not do: it begins
# with the peak of the process that started this one.
MEASURE = """
import re, sys
import jax, jax.numpy as jnp
from pallas_attn_models import load_hf

def status(name):
    with open("/proc/self/status") as file:
        return int(re.search(rf"{name}:\\s+(\\d+) kB", file.read())[1]) * 1024

small = load_hf(sys.argv[3], sys.argv[2])  # loads libraries, and compiles programs
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # resets the peak
before = status("VmRSS")
model = load_hf(sys.argv[1], sys.argv[2])
print(status("VmHWM") - before)
"""


def write_random(directory: Path, fields: dict, dtype: type, num_shards: int) -> tuple[int, int]:
    """Writes a checkpoint; returns the bytes of its values and of its largest parameter."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(fields))
    config = config_from_hf(fields)
    layout = Layout(FAMILIES[config.family], config)
    generator = np.random.default_rng(0)
    weight_map, total, names = {}, 0, [*layout.names()]
    for shard in range(num_shards):
        file = f"model-{shard + 1:05}-of-{num_shards:05}.safetensors"
        tensors = {
            name: generator.standard_normal(layout.shape_of(name), np.float32).astype(dtype)
            for name in names[shard::num_shards]
        }
        save_file(tensors, directory / file)
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    largest = max(np.prod(shape) for place in layout.places() for shape in place.shapes)
    return total, int(largest) * np.dtype(dtype).itemsize


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_the_peak_of_memory(family, dtype, tmp_path):
    """At most 1.15 times the checkpoint, and the largest parameter once more, which may be transposed or stacked."""
    size = {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 4096}
    kinds = {
        "llama": {"intermediate_size": 1536, "num_hidden_layers": 14},
        "mixtral": {"intermediate_size": 512, "num_local_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 9},
    }
    fields = {"model_type": family, **size, **kinds[family]}
    factor = 4 // np.dtype(dtype).itemsize
    fields["num_hidden_layers"] *= factor
    total, largest = write_random(tmp_path / "large", fields, dtype, num_shards=3)
    write_random(tmp_path / "small", {**fields, "num_hidden_layers": 1}, dtype, num_shards=1)
    assert total > 10 * largest
    arguments = [tmp_path / "large", np.dtype(dtype).name, tmp_path / "small"]
    finished = subprocess.run([sys.executable, "-c", MEASURE, *arguments], capture_output=True, text=True, check=True)
    peak = int(finished.stdout)
    assert 0.9 * total < peak <= 1.15 * total + largest, f"{peak / total:.3f} of {total} bytes"


# --- dtypes ---


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_may_have_their_own_dtype(dtype):
    model = load_hf(FIXTURES / "gqa", dtype, param_dtype="float32")
    assert model.dtype == jnp.dtype(dtype)
    exact = load_hf(FIXTURES / "gqa", "float32")
    for x, y in zip(jax.tree.leaves(nnx.state(model)), jax.tree.leaves(nnx.state(exact)), strict=True):
        assert x.dtype == jnp.float32
        np.testing.assert_array_equal(x, y)


# --- sizes that are only described ---


@pytest.mark.parametrize("name", NAMES)
def test_an_abstract_decoder_is_that_of_flax(name):
    config = config_from_hf(json.loads((FIXTURES / name / "config.json").read_text()))
    dtypes = {"dtype": jnp.bfloat16, "param_dtype": jnp.float32}
    ours = nnx.split(abstract_decoder(config, **dtypes))
    theirs = nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0), **dtypes)))
    assert ours[0] == theirs[0]
    assert jax.tree.structure(ours[1]) == jax.tree.structure(theirs[1])
    assert jax.tree.leaves(ours[1]) == jax.tree.leaves(theirs[1])


@pytest.mark.parametrize(
    ("fields", "kinds", "tensors", "parameters"),
    [(LLAMA_70B, 1, 723, 70_553_706_496), (GPT_OSS_120B, 2, 615, 116_829_156_672)],
    ids=["70B", "120B"],
)
def test_large_models_are_described_by_their_kinds_of_layers(fields, kinds, tensors, parameters, monkeypatch):
    """Each kind of layer is traced twice: for the shapes of its tensors, and for the decoder."""
    config = config_from_hf(fields)
    traced = []
    init = DecoderLayer.__init__
    monkeypatch.setattr(
        DecoderLayer, "__init__", lambda self, *args, **kwargs: (traced.append(1), init(self, *args, **kwargs))[1]
    )
    layout = Layout(FAMILIES[config.family], config)
    names = [*layout.names()]
    assert len(names) == len({*names}) == len(layout) == tensors
    shapes = {
        path: shape for place in layout.places() for path, shape in zip(place.parameters, place.shapes, strict=True)
    }
    model = abstract_decoder(config, dtype=jnp.bfloat16)
    assert len(traced) <= 2 * kinds + 2, "and those of a decoder with one layer, twice, too"
    found = {".".join(map(str, path)): x.shape for path, x in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    assert found == shapes
    assert sum(np.prod(shape, dtype=np.int64) for shape in shapes.values()) == parameters
    assert {type(x.get_value()) for _, x in nnx.to_flat_state(nnx.state(model, nnx.Param))} == {jax.ShapeDtypeStruct}
