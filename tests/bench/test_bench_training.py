"""The comparison of two training runs: measurements, files, output and wrong arguments."""

import dataclasses
import json
import re

import jax
import pytest

from bench import plot, training
from bench.times.measure import OURS
from pallas_attn_models.training import train
from pallas_attn_models.training.tasks import Mix
from tests import tolerances

CONFIG = dataclasses.replace(train.CONFIG, num_layers=1, hidden_size=32, intermediate_size=32, head_dim=16)
# Both of one size, so that they share compiled programs.
PHASES = (
    train.Phase(3, 1, 192, Mix(addition=1.0), first_pairs=4),
    train.Phase(2, 1, 192, Mix(reversal=1.0), first_pairs=4),
)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The result file of a tiny model."""
    path = tmp_path_factory.mktemp("training") / "results.json"
    # optax relies on JAX's standard promotion.
    promotion = jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow")
    with pytest.MonkeyPatch.context() as patch, promotion[0], promotion[1]:
        patch.setattr(train, "CONFIG", CONFIG)
        patch.setattr(train, "PHASES", PHASES)
        assert training.main(["--steps", "5", "--out", str(path)]) == 0
    return path


def entry(ours=1.0, reference=1.0) -> dict:
    """The claim of a step of 100 ms with 10 ms of attention per layer and half of the blocks visited."""
    losses = {OURS: [0.5, ours], training.REFERENCE: [0.5, reference]}
    steps, attention = ({OURS: [t], training.REFERENCE: [2 * t]} for t in (0.05, 0.005))
    return training._entry(PHASES[0], losses, steps, attention, active=0.2, visited=0.5)


def test_both_learn_the_same(written):
    results = json.loads(written.read_text())["results"]
    assert [result["case"] for result in results] == ["training-1x192"] * 2
    for result, phase in zip(results, PHASES, strict=True):
        losses = result["losses"]
        assert len(losses[OURS]) == len(losses[training.REFERENCE]) == phase.steps
        assert result["correct"]
        assert result["error"] <= tolerances.TRAINING_LOSS
        assert losses[OURS] != losses[training.REFERENCE], "two ways to compute it, not the same one twice"


def test_fractions_are_those_of_packed_documents(written):
    # Sums of at most 10 bytes in 3 x 6 blocks: the diagonal, and four blocks where a sum spans two.
    sums = json.loads(written.read_text())["results"][0]
    assert 0 < sums["active_fraction"] < 0.05
    assert sums["visited_fraction"] == pytest.approx(10 / 18)


def test_the_file_can_be_drawn(written):
    suite = plot.read(written)
    assert [one.ratios.keys() for one in suite.results] == [{training.REFERENCE}] * 2
    assert written.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_a_step_is_faster_by_what_attention_saves():
    result = entry()
    assert result["ratios"] == {training.REFERENCE: 2.0}
    saved = 0.5 * train.CONFIG.num_layers * 10
    assert result["claims"] == {training.REFERENCE: pytest.approx(100 / (100 - saved))}


def test_losses_that_disagree_are_wrong(monkeypatch, capsys):
    assert entry(1.0, 1.0 + 0.9 * tolerances.TRAINING_LOSS)["correct"]
    wrong = entry(1.0, 1.0 + 1.1 * tolerances.TRAINING_LOSS)
    assert not wrong["correct"]
    assert not entry(float("nan"))["correct"]
    monkeypatch.setattr(training, "compare", lambda *_: [entry(), wrong])
    assert training.main([]) == 1
    assert re.search("1.1e-03 WRONG", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "2"], "steps: expected at least one for each of 3 phases, got 2"),
        (["--steps", "5"], "--steps: expected at least two for each phase, got 5"),
        (["--out", "nowhere/x.json"], "nowhere/x.json: cannot be written"),
    ],
)
def test_wrong_calls_are_refused_before_anything_runs(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(training, "compare", lambda *_: pytest.fail("something ran"))
    assert training.main(arguments) == 2
    assert message in capsys.readouterr().err
