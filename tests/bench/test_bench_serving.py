"""bench.serving: the same tokens in two ways, and the meaning of the figures."""

import dataclasses
import json

import numpy as np
import pytest

from bench import plot, serving
from bench.times.measure import OURS


@pytest.mark.parametrize("kind", ["chat", "documents"])
def test_requests_are_unequal_and_always_the_same(kind):
    longest_prompt, most_new = getattr(serving.FULL, kind)
    requests = serving.unequal_requests(serving.FULL, longest_prompt, most_new)
    prompts, new = [len(prompt) for prompt in requests.prompts], requests.new_tokens
    assert len(prompts) == len(new) == 64
    for lengths, least, most in ((prompts, 8, longest_prompt), (new, 4, most_new)):
        assert min(lengths) >= least
        assert max(lengths) <= most
        # Log-uniform: as many below the geometric mean as above.
        assert 20 <= sum(length < np.sqrt(least * most) for length in lengths) <= 44
    assert requests == serving.unequal_requests(serving.FULL, longest_prompt, most_new)
    batches = requests.batches(8)
    assert [len(batch.prompts) for batch in batches] == [8] * 8
    assert [x for batch in batches for x in batch.samplings] == requests.samplings


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The result file of all cases at toy sizes."""
    path = tmp_path_factory.mktemp("serving") / "serving.json"
    assert serving.main(["--toy", "--out", str(path)]) == 0
    return path


@pytest.mark.slow
def test_every_case_has_the_same_tokens_and_two_times(written):
    content = json.loads(written.read_text())
    assert content["suite"] == "serving-toy", "no one takes it for a result"
    found = {result["case"]: result for result in content["results"]}
    assert list(found) == list(serving.CASES)
    for result in found.values():
        assert result["correct"]
        ((other, ratio),) = result["ratios"].items()
        assert set(result["contenders"]) == {OURS, other}
        assert ratio > 0
    for kind in ("chat", "documents"):
        requests = serving.unequal_requests(serving.TOY, *getattr(serving.TOY, kind))
        assert found[f"batching-{kind}"]["new_tokens"] == sum(requests.new_tokens)
        steps = found[f"batching-{kind}"]["least_steps"]
        assert steps[serving.SEQUENTIAL] == sum(max(batch.new_tokens) for batch in requests.batches(2))
        assert steps[OURS] == max(-(-sum(requests.new_tokens) // 2), max(requests.new_tokens))
    # The prompt is full of drafts, and all are accepted except those beyond the last token.
    assert found["speculation-copy"]["tokens_per_step"] == 8
    assert found["speculation-copy"]["acceptance"] == 7 / 8
    # The answer is one digit that the prompt does not predict.
    assert found["speculation-recall"]["tokens_per_step"] < 1.5
    assert np.isfinite(found["streaming"]["overhead_ms"])


@pytest.mark.slow
def test_the_file_can_be_drawn(written):
    suite = plot.read(written)
    assert [result.case for result in suite.results] == list(serving.CASES)


def test_tokens_that_differ_are_wrong(monkeypatch, capsys):
    def differing(scale):
        contenders = {OURS: lambda: [[1], [2, 3]], "other": lambda: [[1], [2, 4]]}
        return serving._compared("one", "invented", {}, contenders, 1)

    monkeypatch.setattr(serving, "CASES", {"one": differing})
    result = differing(serving.TOY)
    assert (result["correct"], result["error"], result["ratios"]) == (False, 1.0, {})
    assert result["contenders"] == {OURS: {"wrong": 1.0}}
    assert serving.main(["--toy"]) == 1
    assert "WRONG in 1 rows" in capsys.readouterr().out


def test_the_overhead_is_that_of_more_returns_to_python(monkeypatch):
    entry = {"contenders": {OURS: {"ms": {"median": 30.0}}, serving.INTERVALS: {"ms": {"median": 20.0}}}}
    monkeypatch.setattr(serving, "_compared", lambda *_: dict(entry))
    # 66 steps are streamed in 66 returns, or in two.
    scale = dataclasses.replace(serving.TOY, streamed=66)
    assert serving.streaming(scale)["overhead_ms"] == pytest.approx(10 / 64)


def test_findings():
    assert "no draft, 1.00 tokens" in serving._finding({"acceptance": None, "tokens_per_step": 1.0})
    assert "50% of drafts accepted" in serving._finding({"acceptance": 0.5, "tokens_per_step": 3.0})
    assert "goal: 1 ms, kept" in serving._finding({"overhead_ms": 1.0})
    assert "goal: 1 ms, missed" in serving._finding({"overhead_ms": 1.1})
    steps = {OURS: 10, serving.SEQUENTIAL: 25}
    assert "batches take 2.50 times the minimum" in serving._finding({"least_steps": steps})


@pytest.mark.parametrize("arguments", [["--case", "chat"], ["--rounds", "2"]])
def test_wrong_calls(arguments, capsys):
    with pytest.raises(SystemExit):
        serving.main(arguments)
    assert "usage: python -m bench.serving" in capsys.readouterr().err


def test_a_file_that_cannot_be_written(tmp_path, capsys):
    assert serving.main(["--toy", "--out", str(tmp_path)]) == 2
    assert "cannot be" in capsys.readouterr().err
