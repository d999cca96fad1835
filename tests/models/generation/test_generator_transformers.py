"""The greedy tokens of transformers' generate, with the options common to both."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_attn_models import Generator, Sampling, load_hf

reason = "compares with transformers' own generate()"
torch = pytest.importorskip("torch", reason=reason)
transformers = pytest.importorskip("transformers", reason=reason)

FIXTURE = Path(__file__).parents[1] / "fixtures" / "gqa"
VOCAB_SIZE, BUDGET = 96, 20
LENGTHS = (1, 2, 8, 9, 17, 40)
PROMPTS = [np.random.default_rng(length).integers(3, VOCAB_SIZE, length).tolist() for length in LENGTHS]
# Tokens in the continuations of these prompts.
COMMON = (3, 23, 32, 43, 65, 70, 81)
ENDS = [30, 36, 45, 76, 92]

# name -> (fields of Sampling, fields of GenerationConfig)
OPTIONS = {
    "greedy": ({}, {}),
    "repetition": ({"repetition_penalty": 1.6}, {"repetition_penalty": 1.6}),
    "forbidden": ({"forbidden_tokens": COMMON}, {"suppress_tokens": list(COMMON)}),
    "bad words": ({"forbidden_tokens": COMMON}, {"bad_words_ids": [[token] for token in COMMON]}),
    "bias": ({"logit_bias": {5: 9.0, 8: -4.0}}, {"sequence_bias": [[[5], 9.0], [[8], -4.0]]}),
    "minimum": ({"min_new_tokens": 12}, {"min_new_tokens": 12}),
    "all": (
        {"repetition_penalty": 1.3, "forbidden_tokens": COMMON, "min_new_tokens": 12},
        {"repetition_penalty": 1.3, "suppress_tokens": list(COMMON), "min_new_tokens": 12},
    ),
}


@pytest.fixture(scope="module")
def generator():
    model = load_hf(FIXTURE, dtype=jnp.float32)
    return Generator(model, batch_size=4, capacity=64, prefill_chunk=8)


@pytest.fixture(scope="module")
def theirs():
    model = transformers.LlamaForCausalLM.from_pretrained(FIXTURE, dtype=torch.float32).eval()

    def generate(prompt: list[int], ends: list[int], stops=(), **fields) -> list[int]:
        """New tokens, including the stop sequence."""

        def stopped(tokens, *_, **__):
            new = tokens[0, len(prompt) :].tolist()
            return torch.tensor([any(new[-len(stop) :] == list(stop) for stop in stops)])

        config = transformers.GenerationConfig(
            max_new_tokens=BUDGET, eos_token_id=ends, pad_token_id=0, do_sample=False, **fields
        )
        out = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones((1, len(prompt)), dtype=torch.long),
            generation_config=config,
            stopping_criteria=transformers.StoppingCriteriaList([stopped] if stops else []),
        )
        return out[0, len(prompt) :].tolist()

    return generate


@pytest.mark.parametrize("name", OPTIONS)
def test_options(generator, theirs, name):
    """Up to the budget, and up to the first end token."""
    ours, fields = OPTIONS[name]
    ends = [*generator.model.config.eos_token_ids]
    for more in ([], ENDS):
        result = generator.generate(PROMPTS, Sampling(BUDGET, **ours), stop=more)
        for prompt, tokens, reason in zip(PROMPTS, result.tokens, result.finish_reasons, strict=True):
            expected = theirs(prompt, ends + more, **fields)
            ended = expected[-1] in ends + more
            assert tokens == (expected[:-1] if ended else expected)
            assert reason == ("stop" if ended else "length")


def test_options_do_something(generator):
    """Every option but the minimum changes the tokens; the minimum keeps rows from ending early."""
    results = {name: generator.generate(PROMPTS, Sampling(BUDGET, **ours)) for name, (ours, _) in OPTIONS.items()}
    for name, result in results.items():
        assert name in ("greedy", "minimum") or result.tokens != results["greedy"].tokens
    early = generator.generate(PROMPTS, Sampling(BUDGET), stop=COMMON)
    late = generator.generate(PROMPTS, Sampling(BUDGET, min_new_tokens=12), stop=COMMON)
    assert min(map(len, early.tokens)) < 12 <= min(map(len, late.tokens))


def test_stop_sequences(generator, theirs):
    """Stop sequences of one to four tokens, some of which occur in the row."""
    free = generator.generate(PROMPTS, Sampling(BUDGET)).tokens
    ends = [*generator.model.config.eos_token_ids]
    for size in (1, 2, 3, 4):
        for at in (0, 3, 9):
            stops = [tuple(tokens[at : at + size]) for tokens in free[::2]]
            stops += [(*stops[0][:-1], 94), (94, *stops[0])]
            stops = [stop for stop in stops if stop]
            result = generator.generate(PROMPTS, Sampling(BUDGET), stop=stops)
            assert "stop" in result.finish_reasons
            for prompt, tokens, reason in zip(PROMPTS, result.tokens, result.finish_reasons, strict=True):
                expected = theirs(prompt, ends, stops)
                matched = [len(stop) for stop in stops if expected[-len(stop) :] == list(stop)]
                matched += [1] if expected[-1] in ends else []
                assert tokens == expected[: len(expected) - max(matched, default=0)]
                assert reason == ("stop" if matched else "length")
