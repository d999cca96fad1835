"""bench.cache_quality: the same prompts for every cache, exact answers and memory."""

import json

import pytest

from bench import cache_quality

KINDS = {kind.name: kind for kind in cache_quality.KINDS}


@pytest.mark.slow
def test_a_table_and_a_picture(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cache_quality, "KINDS", [KINDS["Dense, int8"], KINDS["Window"], KINDS["H2O, int8"]])
    monkeypatch.setattr(cache_quality, "_ROWS", 2)
    out = tmp_path / "quality.json"
    assert cache_quality.main(["--prompts", "2", "--slots", "48", "--out", str(out)]) == 0
    dense, window, h2o = json.loads(out.read_text())["results"]
    assert dense["accuracy"] == 1.0, "lists of 60 pairs and more fit"
    assert window["accuracy"] < 1.0, "and here they do not"
    # 3 layers of 2 heads of 64: keys and values of a slot, its position and its policy state. Layers that keep the same
    # tokens share positions. Then 5 bytes per row and log of positions.
    assert dense["bytes_per_row"] == 3 * 512 * 2 * 2 * (64 + 4) + 512 * 4 + 5
    assert window["bytes_per_row"] == 3 * 48 * 2 * 2 * 64 * 4 + 48 * 4 + 5
    assert h2o["bytes_per_row"] == 3 * (48 * (2 * 2 * (64 + 4) + 2 * 4 + 2 * 4) + 5)
    assert window["policies"] == ["Window(size=29, sinks=4)"] * 3
    assert out.with_suffix(".png").stat().st_size > 10_000
    assert "H2O, int8" in capsys.readouterr().out


def test_every_kind_has_a_policy_for_every_layer():
    for kind in cache_quality.KINDS:
        for slots in cache_quality.SLOTS:
            policies = kind.policies(slots, 3)
            assert len(policies) == 3
            for policy in policies:
                policy.check(slots)
                assert policy.longest_append(slots) >= cache_quality.CHUNK


@pytest.mark.parametrize("arguments", [["--prompts", "0"], ["--slots", "3"], ["--model", "nowhere"]])
def test_wrong_calls(arguments, capsys):
    assert cache_quality.main(arguments) == 2
    assert "python -m bench.cache_quality:" in capsys.readouterr().err


def test_a_file_that_cannot_be_written(tmp_path, capsys):
    assert cache_quality.main(["--out", str(tmp_path)]) == 2
    assert "cannot be" in capsys.readouterr().err
