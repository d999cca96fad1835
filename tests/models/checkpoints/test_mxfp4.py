"""Experts in MXFP4: their numbers, against the table of the format, and what is refused."""

import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from pallas_attn_models import Decoder, load_hf, save_hf
from pallas_attn_models.checkpoints import config_from_hf, read_config

# E2M1, in the order of its codes (OCP Microscaling Formats 1.0, table 5); the scales are powers of two with bias 127.
NUMBERS = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
FIELDS = {
    "model_type": "gpt_oss",
    "vocab_size": 32,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
    "sliding_window": 8,
}
QUANTIZATION = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}


@pytest.fixture
def checkpoint(tmp_path) -> tuple[Path, dict[str, np.ndarray]]:
    """A checkpoint with experts in MXFP4, and their numbers in float32 by the names of the tensors."""
    save_hf(Decoder(config_from_hf(FIELDS), rngs=nnx.Rngs(0)), tmp_path)
    tensors, expected = load_file(tmp_path / "model.safetensors"), {}
    generator = np.random.default_rng(0)
    for name in [name for name in tensors if name.endswith(EXPERTS)]:
        experts, inputs, outputs = tensors.pop(name).shape
        codes = generator.integers(0, 16, (experts, outputs, inputs // 32, 32), np.uint8)
        scales = generator.integers(110, 140, (experts, outputs, inputs // 32), np.uint8)
        numbers = NUMBERS[codes] * 2.0 ** (scales[..., None].astype(np.float32) - 127)
        expected[name] = numbers.reshape(experts, outputs, inputs).swapaxes(1, 2)
        tensors[f"{name}_blocks"] = codes[..., ::2] | codes[..., 1::2] << 4  # the first number in the lower bits
        tensors[f"{name}_scales"] = scales
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({**FIELDS, "quantization_config": QUANTIZATION}))
    return tmp_path, expected


def edit(path: Path, change) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")


def test_numbers(checkpoint, tmp_path):
    path, expected = checkpoint
    calls = []
    model = load_hf(path, "float32", progress=lambda done, total: calls.append((done, total)))
    stored = sum(x.nbytes for x in load_file(path / "model.safetensors").values())
    assert calls[-1] == (stored, stored)
    save_hf(model, tmp_path / "plain")
    plain = load_file(tmp_path / "plain" / "model.safetensors")
    assert len(expected) == 4
    for name, numbers in expected.items():
        np.testing.assert_array_equal(plain[name], numbers)
    again = load_hf(tmp_path / "plain", "float32")
    for x, y in zip(jax.tree.leaves(nnx.state(model)), jax.tree.leaves(nnx.state(again)), strict=True):
        np.testing.assert_array_equal(x, y)


def test_the_config_alone(checkpoint):
    assert read_config(checkpoint[0]) == config_from_hf(FIELDS)


@pytest.mark.parametrize(
    ("suffix", "value", "message"),
    [
        ("_scales", None, r"_scales: expected scales \[3, 64, 2\] of its blocks, got none"),
        ("_scales", np.zeros((3, 64), np.uint8), r"_scales: expected scales .*, got \[3, 64\]"),
        ("_scales", np.zeros((3, 64, 2), np.float32), "_blocks: expected bytes .*, got U8 with scales F32"),
        ("_blocks", np.zeros((3, 64, 32), np.uint8), "_scales: expected scales"),
    ],
    ids=["none", "shape", "dtype", "blocks"],
)
def test_blocks_without_their_scales(checkpoint, suffix, value, message):
    path, _ = checkpoint
    name = f"model.layers.0.{EXPERTS[0]}"

    def change(tensors: dict) -> None:
        del tensors[name + suffix]
        tensors.update({} if value is None else {name + suffix: value})

    edit(path, change)
    with pytest.raises(ValueError, match=rf"model\.safetensors: {re.escape(name)}{message}"):
        load_hf(path)


def test_blocks_of_another_size(checkpoint):
    path, _ = checkpoint
    name = f"model.layers.0.{EXPERTS[0]}"
    shapes = {f"{name}_blocks": np.zeros((3, 64, 3, 16), np.uint8), f"{name}_scales": np.zeros((3, 64, 3), np.uint8)}
    edit(path, lambda tensors: tensors.update(shapes))
    with pytest.raises(ValueError, match=r"gate_up_proj: expected shape \[3, 64, 64\], got \[3, 96, 64\]"):
        load_hf(path)


@pytest.mark.parametrize("method", ["gptq", "fp8", None])
def test_another_quantization_is_refused(checkpoint, method):
    path, _ = checkpoint
    (path / "config.json").write_text(json.dumps({**FIELDS, "quantization_config": {"quant_method": method}}))
    with pytest.raises(ValueError, match=r"config\.json: quantization_config: expected None, got"):
        load_hf(path)
