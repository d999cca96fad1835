"""Speculation: for any drafts, the output equals plain decoding, and the counters equal those of a replay."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_attn_models import Generator, Sampling, load_hf, weights
from pallas_attn_models.generation.speculation import DraftModel, PromptLookup, num_nodes
from pallas_attn_models.training import tasks
from tests import tolerances
from tests.marks import quick
from tests.models import speculations
from tests.models.small_model import ONE_EACH, Ask
from tests.models.speculations import (
    BATCH,
    CAPACITY,
    REQUESTS,
    VARIANTS,
    Hints,
    Ran,
    generator,
    looked_up,
    prompt_of,
    ran,
)


@pytest.fixture(autouse=True, scope="module")
def _forgotten_generators():
    yield
    speculations.forget()


def test_the_requests_end_in_every_way():
    plain = ran("plain")
    reasons = [one.finish_reason for one in plain.completions]
    assert min(map(reasons.count, ("stop", "length", "capacity"))) >= 2
    ending = {len(drawn) - len(one.tokens) for drawn, one in zip(plain.drawn, plain.completions, strict=True)}
    assert ending == {0, 1, 2}, "some by a stop sequence of more than one token"
    assert plain.counted == (fed(plain, 1, lambda *_: None)[0], 0, 0)


@pytest.mark.parametrize("name", quick(VARIANTS, "chain", "tree, paged int8", "other model", "hints, window"))
def test_the_output_equals_plain_decoding(name):
    expected, actual = ran(VARIANTS[name][0]), ran(name)
    assert actual.drawn == expected.drawn
    for one, plain in zip(actual.completions, expected.completions, strict=True):
        assert (one.tokens, one.finish_reason) == (plain.tokens, plain.finish_reason)
        np.testing.assert_allclose(one.logprobs, plain.logprobs, rtol=0, atol=tolerances.LOGPROBS)
        for top, plain_top in zip(one.top_logprobs, plain.top_logprobs, strict=True):
            assert [token for token, _ in top] == [token for token, _ in plain_top]
            values, plain_values = ([logprob for _, logprob in x] for x in (top, plain_top))
            np.testing.assert_allclose(values, plain_values, rtol=0, atol=tolerances.LOGPROBS)
    assert generator(name).compile_counts == ONE_EACH


@pytest.mark.parametrize("name", ["tree", "same model", "hints"])
def test_samples_of_one_prompt_equal_plain_decoding(name):
    samples = Sampling(12, temperature=1.0, seed=1), 3
    prompts, negatives = [prompt_of(18), prompt_of(5)], [prompt_of(3), prompt_of(21)]
    for options in ({"num_samples": 4}, {"num_samples": 2, "negative_prompts": negatives, "guidance_scale": 1.5}):
        plain, actual = (generator(one).generate(prompts, samples[0], samples[1], **options) for one in ("plain", name))
        assert actual.tokens == plain.tokens
        assert actual.finish_reasons == plain.finish_reasons
    assert generator(name).compile_counts == ONE_EACH


@pytest.mark.parametrize("name", ["chain", "tree", "same model"])
def test_random_programs_compile_once_and_change_nothing(name):
    rng = np.random.default_rng(5)
    for call in range(8):
        lengths = rng.integers(1, CAPACITY, rng.integers(1, 2 * BATCH))
        settings = [
            Sampling(
                max_new_tokens=int(rng.integers(1, 40)),
                temperature=float(rng.choice([0.0, 0.5, 1.0])),
                top_k=int(rng.choice([0, 3])),
                frequency_penalty=float(rng.choice([0, 0.3])),
                seed=int(rng.integers(2**32)),
            )
            for _ in lengths
        ]
        prompts, stop = [prompt_of(int(length), call) for length in lengths], ((), 3, [[1, 3], [9]])[call % 3]
        plain, actual = (generator(one).generate(prompts, settings, stop) for one in ("plain", name))
        assert (actual.tokens, actual.finish_reasons) == (plain.tokens, plain.finish_reasons)
        assert actual.stats.turns + actual.stats.accepted == plain.stats.turns
    assert generator(name).compile_counts == ONE_EACH


# --- counters ---


def fed(plain: Ran, nodes: int, drafts_of: Callable[[Ask, list[int], int], list[list[int]] | None]) -> tuple:
    """Row steps, drafted and accepted tokens when every request is replayed alone.

    Args:
      plain: the results of plain decoding.
      nodes: of a step.
      drafts_of: the drafts, given the request, all of its tokens, and the number of new ones.
    """
    turns = drafted = accepted = 0
    for request, drawn in zip(REQUESTS, plain.drawn, strict=True):
        rows = 1 if request.negative is None else 2
        longest = max(len(request.prompt), len(request.negative or ()))
        done = 0
        while done < len(drawn):
            drafts = None
            if longest + done - 1 + nodes <= CAPACITY:
                drafts = drafts_of(request, request.prompt + drawn[:done], done)
            right = 0
            for draft in drafts or ():
                same = np.array(draft) == np.array([*drawn, *[-1] * len(draft)])[done : done + len(draft)]
                right = max(right, int(np.cumprod(same).sum()))
            new = min(right + 1, len(drawn) - done)
            turns, accepted, done = turns + rows, accepted + rows * (new - 1), done + new
            drafted += rows * len(drafts[0]) if drafts else 0
    return turns, drafted, accepted


@pytest.mark.parametrize("name", ["chain", "tree", "hints", "garbage"])
def test_counts_are_those_of_a_replay(name):
    speculation = generator(name).speculation
    hints = jax.jit(speculation.of) if isinstance(speculation, Hints) else None

    def drafts_of(request: Ask, tokens: list[int], done: int) -> list[list[int]] | None:
        if hints is None:
            return looked_up(tokens, speculation) or None
        drafts, found = hints(np.array([request.sampling.seed]), np.array([done], np.int32))
        return np.asarray(drafts)[0].tolist() if found[0] else None

    assert ran(name).counted == fed(ran("plain"), num_nodes(speculation), drafts_of)
    assert ran(name).counted[2] > 0


@pytest.mark.parametrize("name", quick(["same model", "same model, sliding"], "same model"))
def test_the_model_as_its_own_draft_is_always_accepted(name):
    plain = ran(VARIANTS[name][0])
    drawn = {request.sampling.seed: tokens for request, tokens in zip(REQUESTS, plain.drawn, strict=True)}

    def drafts_of(request: Ask, _: list[int], done: int) -> list[list[int]]:
        following = [*drawn[request.sampling.seed], *[-1] * 4]
        return [following[done : done + 4]]

    assert ran(name).counted == fed(plain, 5, drafts_of)


def test_another_draft_model_is_often_rejected():
    turns, drafted, accepted = ran("other model").counted
    assert 0 < accepted < drafted / 2
    assert turns + accepted == ran("plain").counted[0]


def test_repetitive_text_yields_many_tokens_per_step():
    prompt = [9, 13, 10] * 4
    result = generator("chain").generate([prompt], Sampling(100, logit_bias={9: 50.0}))
    assert result.tokens[0] == [9] * 100  # more than one DecodeOutput holds
    assert result.stats.turns + result.stats.accepted == 100
    assert 100 / result.stats.turns > 5


# --- the shipped checkpoint ---


@pytest.mark.parametrize(
    "make",
    [
        lambda model: PromptLookup(8),
        pytest.param(lambda model: PromptLookup(5, 2, 3), marks=pytest.mark.slow),
        pytest.param(lambda model: DraftModel(model), marks=pytest.mark.slow),
    ],
    ids=["chain", "tree", "same model"],
)
def test_a_trained_model_answers_the_same(make):
    directory = weights.DIRECTORY
    model = load_hf(directory, dtype=jnp.float32)
    prompts = [tasks.encode(one.prompt) for task in tasks.TASKS for one in tasks.held_out_prompts(task, 8, seed=11)]
    sizes = {"batch_size": 8, "capacity": 512, "prefill_rows": 4}
    settings = [Sampling(16, temperature=temperature, seed=7) for temperature in np.linspace(0, 0.8, len(prompts))]
    plain, actual = (
        Generator(model, speculation=one, **sizes).generate(prompts, settings) for one in (None, make(model))
    )
    assert actual.tokens == plain.tokens
    assert actual.finish_reasons == plain.finish_reasons
    assert set(plain.finish_reasons) == {"stop"}
    assert actual.stats.accepted > 0
    assert actual.stats.turns + actual.stats.accepted == plain.stats.turns
