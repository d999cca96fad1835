"""Sampling: the processed logits of transformers, for any options, in its order."""

import jax
import numpy as np
import pytest

from pallas_attn_models.generation.sampling import Limits, Sampling, SamplingArrays, count_new, count_prompt, process
from tests import tolerances

reason = "compares with transformers' own generate()"
torch = pytest.importorskip("torch", reason=reason)
transformers = pytest.importorskip("transformers", reason=reason)

VOCAB_SIZE = 50
EOS = (4, 9)
STEPS = 8

run_process = jax.jit(process)

OPTIONS = {
    "bias": {"logit_bias": {3: 4.0, 17: -2.5, 30: 1.0}},
    "forbidden": {"forbidden_tokens": (1, 2, 40)},
    "repetition": {"repetition_penalty": 1.8},
    "encouraged repetition": {"repetition_penalty": 0.6},
    "minimum": {"min_new_tokens": 5},
    "temperature": {"temperature": 0.7},
    "top-k": {"temperature": 1.0, "top_k": 7},
    "top-p": {"temperature": 1.0, "top_p": 0.8},
    "min-p": {"temperature": 1.0, "min_p": 0.1},
    "top-k and top-p": {"temperature": 1.3, "top_k": 12, "top_p": 0.7},
}
OPTIONS["all"] = {name: value for options in OPTIONS.values() for name, value in options.items()}
OPTIONS["all, greedy"] = OPTIONS["all"] | {"temperature": 0.0}


@pytest.fixture(scope="module")
def model():
    """A tiny Llama whose logits are far apart."""
    config = transformers.LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        initializer_range=0.5,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


def generate(model, prompts: np.ndarray, sampling: Sampling):
    """New tokens ``[B, T]``, and the logits before and after transformers' processors, each ``[T, B, V]``."""
    torch.manual_seed(1)
    options = {
        "do_sample": sampling.temperature > 0,
        "repetition_penalty": sampling.repetition_penalty,
        "suppress_tokens": list(sampling.forbidden_tokens) or None,
        "min_new_tokens": sampling.min_new_tokens,
    }
    if sampling.logit_bias:
        options["sequence_bias"] = [[[token], bias] for token, bias in sampling.logit_bias.items()]
    if sampling.temperature > 0:
        options |= {name: getattr(sampling, name) for name in ("temperature", "top_k", "top_p", "min_p")}
    out = model.generate(
        torch.from_numpy(prompts).long(),
        attention_mask=torch.ones(prompts.shape, dtype=torch.long),
        generation_config=transformers.GenerationConfig(
            max_new_tokens=STEPS,
            eos_token_id=list(EOS),
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
            output_scores=True,
            **options,
        ),
    )
    new = out.sequences[:, prompts.shape[1] :].numpy().astype(np.int32)
    return new, *(np.stack([one.numpy() for one in logits]) for logits in (out.logits, out.scores))


@pytest.mark.parametrize("name", OPTIONS)
def test_every_step_of_a_generation(model, name):
    sampling = Sampling(**OPTIONS[name])
    batch_size = 5
    prompts = np.random.default_rng(0).integers(10, VOCAB_SIZE, (batch_size, 6), dtype=np.int32)
    new, before, after = generate(model, prompts, sampling)
    settings = SamplingArrays.stack([sampling] * batch_size, limits=Limits(), vocab_size=VOCAB_SIZE, eos_token_ids=EOS)
    counts = np.zeros((batch_size, VOCAB_SIZE), np.int32)
    counts = count_prompt(jax.numpy.asarray(counts), prompts, np.ones(prompts.shape, np.bool_))
    running = np.ones(batch_size, np.bool_)
    for step in range(new.shape[1]):
        actual = run_process(before[step], settings, counts, np.full(batch_size, step, np.int32))
        assert_same_distribution(np.asarray(actual)[running], after[step][running])
        if name.startswith(("repetition", "encouraged", "forbidden", "minimum")):
            # Greedy, so no later setting applies: equal bits.
            np.testing.assert_array_equal(np.asarray(actual)[running], after[step][running])
        counts = count_new(counts, new[:, step], running)
        running &= ~np.isin(new[:, step], EOS)
    assert new.shape[1] > 2


@pytest.mark.parametrize(
    "settings",
    [{"top_k": 40}, {"top_p": 0.3}, {"top_p": 0.95}, {"min_p": 0.02}, {"top_k": 300, "top_p": 0.9, "min_p": 0.01}],
    ids=str,
)
def test_the_tokens_that_filters_keep(settings):
    """Large vocabularies, flat and peaked."""
    rng = np.random.default_rng(0)
    logits = (rng.normal(size=(64, 1000)) * np.linspace(0.3, 6, 64)[:, None]).astype(np.float32)
    processors = transformers.LogitsProcessorList(
        warper(settings[name])
        for name, warper in (
            ("top_k", transformers.TopKLogitsWarper),
            ("top_p", transformers.TopPLogitsWarper),
            ("min_p", transformers.MinPLogitsWarper),
        )
        if name in settings
    )
    expected = processors(torch.zeros((64, 1), dtype=torch.long), torch.from_numpy(logits)).numpy()
    arrays = SamplingArrays.stack([Sampling(temperature=1.0, **settings)] * 64, limits=Limits(), vocab_size=1000)
    actual = run_process(logits, arrays, np.zeros(logits.shape, np.int32), np.zeros(64, np.int32))
    assert_same_distribution(np.asarray(actual), expected)
    assert 64 < np.isfinite(expected).sum() < expected.size


def assert_same_distribution(actual: np.ndarray, expected: np.ndarray) -> None:
    """The same possible tokens with the same log-probabilities."""
    np.testing.assert_array_equal(np.isneginf(actual), np.isneginf(expected))
    actual, expected = (np.asarray(jax.nn.log_softmax(x)) for x in (actual, expected))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerances.PROCESSED_LOGITS)
