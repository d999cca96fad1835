"""bench.text_quality: a text read with every kind of cache."""

import json

import pytest

from bench import text_quality
from pallas_attn_models import weights

TEXT = "".join(f"{number}+{number + 3}={2 * number + 3}\n" for number in range(10, 40))


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "sums.txt"
    path.write_text(TEXT)
    return path


@pytest.mark.slow
def test_a_table_and_a_file(text, tmp_path, capsys, monkeypatch):
    kinds = [kind for kind in text_quality.KINDS if kind.name in ("Dense", "Dense, int8", "Window", "H2O")]
    monkeypatch.setattr(text_quality, "KINDS", kinds)
    out = tmp_path / "text.json"
    arguments = ["--model", str(weights.DIRECTORY), "--text", str(text), "--tokens", "90", "--slots", "48"]
    assert text_quality.main([*arguments, "--out", str(out)]) == 0
    everywhere, dense, int8, window, h2o = json.loads(out.read_text())["results"]
    assert (everywhere["slots"], window["slots"]) == (80, 48), "in whole chunks"
    assert dense["perplexity"] == pytest.approx(everywhere["perplexity"])
    assert everywhere["same_token"] == dense["same_token"] == 1.0
    assert 0.9 < int8["perplexity"] / dense["perplexity"] < 1.1
    assert len({one["perplexity"] for one in (dense, window, h2o)}) == 3, "tokens were evicted"
    assert 0.5 < h2o["same_token"] <= 1.0
    assert int8["bytes_per_row"] < window["bytes_per_row"] < dense["bytes_per_row"]
    assert "sums.txt" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "8"], "--tokens: expected at least 32, got 8"),
        (["--slots", "64", "3"], "--slots: expected at least 32, got 3"),
        (["--tokens", "4000"], "--text: expected at least 4000 tokens, got"),
        (["--model", "nowhere"], "nowhere"),
        (["--text", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_wrong_calls(arguments, message, text, capsys):
    assert text_quality.main(["--model", str(weights.DIRECTORY), "--text", str(text), *arguments]) == 2
    err = capsys.readouterr().err
    assert "python -m bench.text_quality:" in err
    assert message in err
