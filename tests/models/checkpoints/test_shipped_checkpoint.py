"""The shipped checkpoint answers held-out prompts."""

import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer

from pallas_attn_models import Generator, Sampling, load_hf, weights
from pallas_attn_models.training import tasks
from tests import tolerances

ROWS = 25
DIRECTORY = weights.DIRECTORY


@pytest.fixture(scope="module")
def generator():
    return Generator(load_hf(DIRECTORY, dtype=jnp.float32), batch_size=ROWS, capacity=512)


def test_it_is_small():
    model = load_hf(DIRECTORY, dtype=jnp.float32)
    size = sum(path.stat().st_size for path in DIRECTORY.glob("*.safetensors"))
    assert size <= 4e6
    assert model.config.vocab_size == tasks.VOCAB_SIZE


def test_its_tokens_are_bytes():
    tokenizer = Tokenizer.from_file(str(DIRECTORY / "tokenizer.json"))
    for text in ("17+25=", "reverse:pallas=", "a=7;k=2;k?\n", "ü 漢\t\x00"):
        assert tokenizer.encode(text).ids == list(text.encode())
        assert tokenizer.decode(list(text.encode())) == text


@pytest.mark.parametrize("count", [20, pytest.param(100, marks=pytest.mark.slow)])
def test_held_out_prompts_of_unequal_length(count, generator):
    """Prompts of all tasks, mixed in every batch."""
    examples = {task: tasks.held_out_prompts(task, count, seed=2026) for task in tasks.TASKS}
    prompts = [(task, example) for task, drawn in examples.items() for example in drawn]
    assert all(tasks.is_held_out(example.prompt) for _, example in prompts)
    assert max(len(example.prompt) for example in examples["recall"]) > 300
    mixed = [prompts[i] for i in np.random.default_rng(0).permutation(len(prompts))]
    right = dict.fromkeys(tasks.TASKS, 0)
    for start in range(0, len(mixed), ROWS):
        batch = mixed[start : start + ROWS]
        result = generator.generate([tasks.encode(example.prompt) for _, example in batch], Sampling(max_new_tokens=16))
        for (task, example), tokens, reason in zip(batch, result.tokens, result.finish_reasons, strict=True):
            right[task] += reason == "stop" and tasks.decode(tokens) + tasks.END == example.answer
    assert min(right.values()) / count >= tolerances.EXACT_ANSWERS, right
    assert generator.compile_counts == {"prefill": 1, "decode": 1}
