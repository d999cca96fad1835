"""The code blocks of README.md run in order, in one namespace, and show what the text says."""

import re
from pathlib import Path

import numpy as np
import pytest

from tests import tolerances

README = Path(__file__).parents[1] / "README.md"
# A block is known by a line of its own.
BLOCKS = {
    "module": "class SelfAttention(nnx.Module):",
    "flax": "attention_fn = pa.flax.attention_fn",
    "scores": "scores = [pa.scores.alibi",
    "storage": "pa.QuantizedArray.quantize",
    "generate": "result = generator.generate(prompts",
    "requests": "handle = generator.submit",
    "loop": "decoder = CachedDecoder",
    "small": "small = Generator(",
    "cache": "cache = pa.caches.init(",
}


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


@pytest.fixture(scope="module")
def names() -> dict:
    """What the blocks define, after all of them ran; ``y`` of each block, and the output, by the block's name."""
    names: dict = {"__name__": "README"}
    for label, block in zip(BLOCKS, blocks(), strict=True):
        exec(compile(block, f"README.md, {label}", "exec"), names)
        names[f"after {label}"] = {"y": names.get("y"), "out": names.get("out")}
    return names


def test_every_block_is_known_and_checked():
    found = blocks()
    assert len(found) == len(BLOCKS)
    for marker, block in zip(BLOCKS.values(), found, strict=True):
        assert marker in block


def test_module(names):
    assert names["after module"]["y"].shape == (2, 512, 256)
    assert np.isfinite(names["after module"]["y"]).all()
    assert "density" in str(names["block_mask"])
    assert names["block_mask"].density() < 1


def test_flax_module_takes_the_function(names):
    assert names["y"].shape == (2, 512, 256)
    assert np.isfinite(names["y"]).all()


def test_scores_and_sinks(names):
    assert names["after scores"]["out"].shape == (2, 512, 8, 64)
    assert names["lse"].shape == (2, 8, 512)


def test_quantized_and_paged_keys_give_the_same_attention(names):
    plain = names["pa"].attention(*(names[name] for name in ("query", "key", "value")), names["pa"].masks.causal())
    limit = tolerances.attention_limit(0, float(np.abs(plain).max()), "float32")
    np.testing.assert_allclose(names["from_pages"], plain, rtol=0, atol=limit)
    stored = names["int8_key"].dequantize(), names["int8_value"].dequantize()
    expected = names["pa"].attention(names["query"], *stored, names["pa"].masks.causal())
    assert not np.array_equal(names["from_int8"], plain)
    np.testing.assert_allclose(names["from_int8"], expected, rtol=0, atol=4 * limit)


def test_generation_answers_the_prompts(names):
    answers = [bytes(tokens).strip() for tokens in names["result"].tokens]
    assert answers == [b"101", b"unpk"]
    assert names["result"].finish_reasons == ["stop", "stop"]


def test_requests(names):
    assert names["streamed"] == names["handle"].tokens
    assert names["finish_reason"] == "stop"
    assert len(names["samples"].tokens) == 4
    assert len(names["guided"].tokens) == 2
    assert [len(score.logprobs) for score in names["log_probabilities"]] == [len(x) - 1 for x in names["prompts"]]
    assert names["generator"].compile_counts["prefill"] == names["generator"].compile_counts["decode"] == 1
    expected = names["generator"].generate(names["prompts"], names["Sampling"](max_new_tokens=16)).tokens
    assert names["drafting"].generate(names["prompts"], names["Sampling"](max_new_tokens=16)).tokens == expected


def test_loop_of_ones_own(names):
    assert bytes(names["answer"]) == b"101"


def test_small_cache_holds_what_the_text_says(names):
    assert names["small"].max_length == 100_000
    config = names["model"].config
    numbers = 8 * 1024 * config.num_layers * 2 * config.num_kv_heads * config.head_dim
    assert numbers < names["small"].cache_nbytes < 2 * numbers  # a byte each, scales, positions and scores


def test_cache(names):
    expected = names["pa"].attention(
        *(names[name][:, :100] for name in ("query", "key", "value")), names["pa"].masks.causal()
    )
    limit = tolerances.attention_limit(0, float(np.abs(expected).max()), "float32")
    np.testing.assert_allclose(names["out"], expected[:, 99:], rtol=0, atol=limit)
    assert names["cache"].lengths.tolist() == [100, 100]
