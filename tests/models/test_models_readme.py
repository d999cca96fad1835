"""The code in the READMEs of the wings runs, and does what the text says."""

import contextlib
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import pallas_attn_models
from pallas_attn_models import GenerationResult, Generator, QueueFull, Sampling
from pallas_attn_models.checkpoints.families import FAMILIES
from pallas_attn_models.checkpoints.hf_config import config_from_hf, config_to_hf
from pallas_attn_models.checkpoints.tensors import Layout
from tests import tolerances
from tests.models.small_model import ONE_EACH

ROOT = Path(pallas_attn_models.__file__).parent
WINGS = ["decoder", "checkpoints", "generation", "text", "training", "cli"]
README = (ROOT / "generation" / "README.md").read_text(encoding="utf-8")


def blocks(wing: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / wing / "README.md").read_text(encoding="utf-8"), re.DOTALL)


PROMPTS = [[8, 9], [20, 1, 2], [33] * 9]
SAMPLINGS = [Sampling(30), Sampling(30, temperature=1.0, seed=4), Sampling(20, temperature=0.5, stop=([9, 9], 30))]


def execute(wing: str) -> dict:
    """The names that the code blocks define, in order, and the lines that they print."""
    names, out = {"__name__": "README"}, io.StringIO()
    for block in blocks(wing):
        # Optax does not run with the strict promotion of these tests.
        promotion = jax.numpy_dtype_promotion("standard" if "optax.adam" in block else "strict")
        with promotion, contextlib.redirect_stdout(out):
            exec(compile(block, f"{wing}/README.md", "exec"), names)
    return names | {"printed": out.getvalue().splitlines()}


@pytest.fixture(scope="module")
def names() -> dict:
    return execute("generation")


@pytest.fixture
def generator(names) -> Generator:
    return names["generator"]


def generate(generator: Generator) -> GenerationResult:
    return generator.generate(PROMPTS, SAMPLINGS)


def test_every_block_of_code_is_run():
    assert [wing for wing in WINGS if blocks(wing)] == ["decoder", "checkpoints", "generation"]


@pytest.mark.parametrize("wing", WINGS)
def test_the_files_of_a_wing_exist_and_are_listed(wing):
    text = (ROOT / wing / "README.md").read_text(encoding="utf-8")
    files = {path.name for path in (ROOT / wing).glob("*.py")} - {"__init__.py", "__main__.py"}
    named = set(re.findall(r"`(?:[a-z]+/)*([a-z0-9_]+\.py)`", text))
    assert files <= named, files - named
    everywhere = {path.name for folder in (ROOT, Path(__file__).parents[1]) for path in folder.rglob("*.py")}
    assert named <= everywhere, named - everywhere


def test_the_example_of_a_family_reads_and_writes_as_the_real_one(monkeypatch):
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    fields = {
        "model_type": "qwen3",
        **sizes,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "attention_bias": True,
    }
    fields |= {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    config = config_from_hf(fields)
    assert config.sliding_windows == (None, 8, 8)
    written = config_to_hf(config)
    family = execute("checkpoints")["FAMILY"]
    assert len(Layout(family, config)) == len(Layout(FAMILIES["qwen3"], config)) > 30
    monkeypatch.setitem(FAMILIES, "qwen3", family)
    assert config_from_hf(fields) == config
    assert config_to_hf(config) == written


def test_requests_one_by_one(names, generator):
    *handles, cancelled = names["handles"]
    assert cancelled.finish_reason == "cancelled"
    assert cancelled.tokens == []
    result = generator.generate([[t, 20, 30] for t in range(8, 17)], [handle.sampling for handle in handles])
    assert [handle.tokens for handle in handles] == result.tokens
    assert [handle.finish_reason for handle in handles] == result.finish_reasons
    assert names["first"].tokens == result.tokens[0]
    assert names["second"] == result.tokens[1]
    with pytest.raises(QueueFull):  # as the ten requests above must have met
        [generator.submit([8]) for _ in range(10)]
    generator.run()


def test_a_stream_says_what_generate_says(names, generator):
    result = generator.generate([[1, 2, 3], [4, 5]], Sampling(max_new_tokens=8))
    events = [line.split() for line in names["printed"]]
    for row in range(2):
        _, tokens, reasons = zip(*(event for event in events if event[0] == str(row)), strict=True)
        assert [int(token) for token in tokens if token != "None"] == result.tokens[row]
        assert [*reasons] == ["None"] * (len(reasons) - 1) + [result.finish_reasons[row]]


def test_likelihoods_are_those_of_the_whole_sequence(names):
    question, answers = names["question"], names["answers"]
    longest = len(question) + max(map(len, answers))
    tokens = np.array([(question + answer + [0])[:longest] for answer in answers], np.int32)
    logprobs = jax.nn.log_softmax(nnx.jit(lambda model: model(tokens).logits)(names["model"]), axis=-1)
    for row, answer in enumerate(answers):
        first = len(question) - 1
        expected = sum(float(logprobs[row, first + index, token]) for index, token in enumerate(answer))
        np.testing.assert_allclose(names["likelihoods"][row], expected, rtol=0, atol=tolerances.LOGPROBS)


def test_two_executables_and_one_to_score(names, generator):
    assert names["seconds"] == 0
    assert generator.compile_counts == ONE_EACH | {"score": 1}
    generate(generator)
    assert generator.compile_counts == ONE_EACH | {"score": 1}


def test_any_drafts_give_the_same_output(names, generator):
    plain, guessed = generate(generator), generate(names["guessing"])
    assert guessed.tokens == plain.tokens
    assert guessed.finish_reasons == plain.finish_reasons
    assert 0 < guessed.stats.accepted < guessed.stats.drafted
    assert names["guessing"].compile_counts == ONE_EACH


def test_the_hook_steers_every_token(names, generator):
    (tokens,) = names["steered"].generate(PROMPTS[:1], Sampling(6)).tokens
    assert tokens != generator.generate(PROMPTS[:1], Sampling(6)).tokens[0]
    together = jnp.array([PROMPTS[0] + tokens], jnp.int32)
    logits = nnx.jit(lambda model: model(together, layer_hook=names["steer"]).logits)(names["model"])
    assert logits[0, len(PROMPTS[0]) - 1 : -1].argmax(-1).tolist() == tokens
    assert sorted(names["recorded"]) == [0, 1]


@pytest.fixture(scope="module")
def decoder_names() -> dict:
    return execute("decoder")


def test_flax_code_with_our_kernels(decoder_names):
    names = decoder_names
    block, x = names["block"], names["x"]
    own, _ = block.attention.attention_fn, block.set_attributes(attention_fn=nnx.dot_product_attention)
    causal = jnp.tril(jnp.ones((1, 1, x.shape[1], x.shape[1]), jnp.bool_))
    expected = x + block.attention(block.norm(x), mask=causal)
    np.testing.assert_allclose(names["y"], expected, rtol=0, atol=tolerances.LOGPROBS)
    block.set_attributes(attention_fn=own)
    assert names["z"].shape == x.shape

    # The reranker is the decoder with a head, and its gradient reaches the first and the last parameter.
    variables, tokens = names["variables"], names["tokens"]
    assert names["scores"].shape == (3,)
    permuted = names["reranker"].apply(variables, tokens[::-1])
    np.testing.assert_allclose(names["scores"][::-1], permuted, rtol=0, atol=tolerances.LOGPROBS)
    gradients = names["gradients"]["params"]
    for gradient in (gradients["decoder"]["embedding"]["table"], gradients["Dense_0"]["kernel"]):
        assert np.abs(gradient).max() > 0


def test_the_classifier_learns_and_sees_no_padding(decoder_names):
    names = decoder_names
    assert np.mean(names["losses"][-10:]) < 0.5 * np.log(2) < names["losses"][0]
    tokens, positions, labels = names["make_batch"](np.random.default_rng(1), rows=64)
    assert (positions[:, 0] < 0).any()
    classify = nnx.jit(lambda *arguments: names["classifier"](*arguments))
    logits = classify(tokens, positions)
    assert (logits.argmax(-1) == labels).mean() > 0.85
    others = np.where(positions < 0, 49 - tokens, tokens)
    np.testing.assert_array_equal(classify(others, positions), logits)


def test_another_process_finds_the_executables(tmp_path):
    """The example in two processes. By default JAX does not cache executables that compile in less than a second."""
    assert "`JAX_COMPILATION_CACHE_DIR=DIR`" in README
    setup, *others = blocks("generation")
    (warmup,) = (block for block in others if "warmup" in block)
    count = "lambda event, **_: event.endswith('/cache_misses') and print('miss')"
    listen = f"jax.monitoring.register_event_listener({count})"
    script = "\n".join([setup, listen, warmup, "print(generator.generate([[1, 2], [3]]).tokens)"])
    settings = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }

    def run() -> list[str]:
        done = subprocess.run(
            [sys.executable, "-c", script], env=os.environ | settings, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    def compiled() -> set[str]:
        return {path.name.split("-")[0] for path in tmp_path.iterdir()}

    first = run()
    assert {"jit_prefill", "jit_decode"} <= compiled()
    assert first.count("miss") > 0
    second = run()
    assert second == [line for line in first if line != "miss"]
    assert second[:2] == ["compiling prefill", "compiling decode"]
