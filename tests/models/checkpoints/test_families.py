"""Every model family against transformers: logits, generated tokens, and checkpoints in both directions."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from pallas_attn_models import Generator, Sampling, load_hf, save_hf
from pallas_attn_models.checkpoints.families import FAMILIES
from tests import tolerances
from tests.models.family_cases import CASES, VOCAB, logits_of, make, publish

reason = "compares with transformers"
torch = pytest.importorskip("torch", reason=reason)
transformers = pytest.importorskip("transformers", reason=reason)

BUDGET = 6
PROMPTS = [np.random.default_rng(length).integers(3, VOCAB, length) for length in (1, 3, 9, 14, 22)]
TOKENS = np.random.default_rng(0).integers(3, VOCAB, 40).astype(np.int32)

pytestmark = pytest.mark.slow


@nnx.jit
def compute_logits(model, tokens):
    return model(tokens).logits


def assert_close(ours, theirs) -> None:
    error = np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()
    assert error < tolerances.FAMILY_LOGITS_RELATIVE, f"error {error:.1e} of the largest logit"


def test_every_family_has_two_cases():
    counted = dict.fromkeys(FAMILIES, 0)
    for name, case in CASES.items():
        model_type = getattr(transformers, f"{case.config}Config").model_type
        assert name.split(",")[0] in (model_type, "gemma3")
        counted[model_type] += 1
    assert min(counted.values()) >= 2, counted


@pytest.mark.parametrize("name", CASES)
def test_family(name, tmp_path):
    theirs = make(name, tmp_path / "theirs")
    model = load_hf(tmp_path / "theirs", jnp.float32, implementation="xla")
    expected = logits_of(theirs, TOKENS)
    assert_close(compute_logits(model, TOKENS[None])[0], expected)

    save_hf(model, tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["model_type"] == model.config.family
    reloaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", dtype=torch.float32, attn_implementation="eager" if CASES[name].eager else "sdpa"
    )
    np.testing.assert_allclose(
        logits_of(reloaded, TOKENS), expected, rtol=tolerances.RELOADED_LOGITS, atol=tolerances.RELOADED_LOGITS
    )
    again = load_hf(tmp_path / "ours", jnp.float32)
    assert again.config == model.config

    if name == "llama, dynamic":
        return  # transformers stretches the context anew at every length, whatever keys it has cached
    # The capacity decides for LongRoPE here, the length in transformers.
    prompts = PROMPTS[-1:] if name == "phi3, longrope" else PROMPTS
    generator = Generator(model, batch_size=4, capacity=48, prefill_chunk=8)
    result = generator.generate([prompt.tolist() for prompt in prompts], Sampling(BUDGET, forbidden_tokens=END_TOKENS))
    for prompt, tokens in zip(prompts, result.tokens, strict=True):
        assert tokens == greedy(theirs, prompt), f"{len(prompt)} tokens"


END_TOKENS = (0, 1, 2, 3)  # of the families with a default in the small vocabulary


def greedy(model, prompt) -> list[int]:
    """The most likely tokens, other than the end tokens."""
    tokens = [*prompt]
    for _ in range(BUDGET):
        logits = logits_of(model, np.asarray(tokens))[-1]
        logits[[*END_TOKENS]] = -np.inf
        tokens.append(int(logits.argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("name", [name for name in CASES if "," not in name])
def test_published_spelling(name, tmp_path):
    """The same fields and tensors as transformers 4 wrote them."""
    make(name, tmp_path)
    expected = load_hf(tmp_path, jnp.float32)
    publish(tmp_path)
    assert "rope_parameters" not in json.loads((tmp_path / "config.json").read_text())
    model = load_hf(tmp_path, jnp.float32)
    assert model.config == expected.config
    np.testing.assert_array_equal(compute_logits(model, TOKENS[None]), compute_logits(expected, TOKENS[None]))


def test_experts_in_mxfp4_have_the_values_of_transformers(tmp_path):
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    make("gpt_oss", tmp_path, intermediate_size=64)
    weights = load_file(tmp_path / "model.safetensors")
    rng = np.random.default_rng(0)
    expected = {}
    for name in [name for name in weights if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, inner, outer = weights.pop(name).shape
        blocks = rng.integers(0, 256, (experts, outer, inner // 32, 16), dtype=np.uint8)
        scales = rng.integers(120, 126, blocks.shape[:-1], dtype=np.uint8)
        weights |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        values = convert_moe_packed_tensors(torch.tensor(blocks), torch.tensor(scales), dtype=torch.bfloat16)
        expected[name] = values.float().numpy()
    save_file(weights, tmp_path / "model.safetensors")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": "mxfp4"}}))
    mlp = load_hf(tmp_path, jnp.float32).layers[1].mlp
    gate_up, down = (expected[f"model.layers.1.mlp.experts.{name}"] for name in ("gate_up_proj", "down_proj"))
    np.testing.assert_array_equal(mlp.expert_gate.kernel[...], gate_up[..., 0::2])
    np.testing.assert_array_equal(mlp.expert_up.kernel[...], gate_up[..., 1::2])
    np.testing.assert_array_equal(mlp.expert_down.kernel[...], down)
