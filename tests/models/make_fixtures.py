"""Makes tests/models/fixtures: tiny random checkpoints saved by transformers, and the logits that it computes.

    python -m venv /tmp/torch && /tmp/torch/bin/pip install torch==2.13.0 transformers safetensors numpy
    PYTHONPATH=. /tmp/torch/bin/python tests/models/make_fixtures.py

Each directory is a checkpoint, with ``expected.npz`` beside it: ``tokens_i`` int32 ``[T]`` and ``logits_i`` float32
``[T, V]``, computed in float32 from the weights as stored. ``versions.json`` has the library versions. In the folder
``families`` there is one for each model family, spelled as published files are.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import torch
import transformers

from tests.models import family_cases

FAMILY_VOCAB, FAMILY_LENGTH = 32, 24
FIXTURES = Path(__file__).parent / "fixtures"
PROMPT_LENGTHS = (1, 7, 40)
LLAMA3 = {
    # Wavelengths up to 16 tokens stay, those above 64 are stretched: a head of 16 has some of each and some between.
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

# name -> (fields of LlamaConfig, dtype of the file, bytes of a shard, spelling of the rotary settings)
CASES = {
    "gqa": ({}, "float32", None, "rope_parameters"),
    "mqa_tied": (
        {"num_key_value_heads": 1, "head_dim": 16, "tie_word_embeddings": True, "rope_theta": 500000.0},
        "bfloat16",
        None,
        "rope_parameters",
    ),
    "mha_llama3_sharded": (
        {
            "hidden_size": 48,
            "num_attention_heads": 3,
            "num_key_value_heads": 3,
            "eos_token_id": [2, 5],
            "max_position_embeddings": 512,
            "rope_scaling": LLAMA3,
        },
        "float16",
        40_000,
        "rope_scaling",
    ),
    "gqa_llama3_tied": (
        {"head_dim": 16, "tie_word_embeddings": True, "max_position_embeddings": 512, "rope_scaling": LLAMA3},
        "bfloat16",
        None,
        "rope_parameters",
    ),
    "linear": (
        {"head_dim": 12, "rope_scaling": {"type": "linear", "factor": 4.0}, "rms_norm_eps": 1e-5},
        "bfloat16",
        None,
        "rope_scaling",
    ),
}


def make(name: str, seed: int) -> None:
    fields, dtype, shard_bytes, spelling = CASES[name]
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(**sizes | heads | fields)
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            # Wide weights for uneven attention, and norms other than 1.
            parameter.copy_(torch.randn_like(parameter) * 0.3 + (parameter.ndim == 1))

    directory = FIXTURES / name
    model.to(getattr(torch, dtype)).save_pretrained(directory, **{"max_shard_size": shard_bytes} if shard_bytes else {})
    (directory / "generation_config.json").unlink()
    if spelling == "rope_scaling":
        respell(directory / "config.json")

    model = transformers.LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    generator = np.random.default_rng(seed)
    expected = {}
    for index, length in enumerate(PROMPT_LENGTHS):
        tokens = generator.integers(0, config.vocab_size, length, dtype=np.int32)
        with torch.no_grad():
            logits = model(torch.from_numpy(tokens).long()[None]).logits[0]
        expected |= {f"tokens_{index}": tokens, f"logits_{index}": logits.numpy()}
    np.savez_compressed(directory / "expected.npz", **expected)


def respell(path: Path) -> None:
    """Converts to the field names of transformers 4, which published checkpoints use."""
    fields = json.loads(path.read_text())
    rope = fields.pop("rope_parameters")
    fields["rope_theta"] = rope.pop("rope_theta")
    if "type" in rope:
        del rope["rope_type"]
    fields["rope_scaling"] = rope
    fields["torch_dtype"] = fields.pop("dtype")
    path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")


def make_family(name: str) -> None:
    """The first case of a family, with the tokens of one row."""
    directory = FIXTURES / "families" / name.replace(", ", "_")
    model = family_cases.make(name, directory, "bfloat16", vocab_size=FAMILY_VOCAB)
    (directory / "generation_config.json").unlink(missing_ok=True)
    tokens = np.random.default_rng(0).integers(3, FAMILY_VOCAB, FAMILY_LENGTH, dtype=np.int32)
    np.savez_compressed(directory / "expected.npz", tokens_0=tokens, logits_0=family_cases.logits_of(model, tokens))
    family_cases.publish(directory)


if __name__ == "__main__":
    shutil.rmtree(FIXTURES, ignore_errors=True)
    for seed, name in enumerate(CASES):
        make(name, seed)
    for name in family_cases.CASES:
        if "," not in name or name.startswith("falcon"):
            make_family(name)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    (FIXTURES / "versions.json").write_text(json.dumps(versions, indent=2) + "\n")
