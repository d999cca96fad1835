"""Policies and storages as text, and ``pallas-attn cache-size``."""

import json
import re

import jax.numpy as jnp
import pytest

from pallas_attn import caches
from pallas_attn_models import cli
from pallas_attn_models.cli import cache_options


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("dense", caches.Dense()),
        (" Dense() ", caches.Dense()),
        ("window(1024)", caches.Window(1024)),
        ("window(1024, sinks=4)", caches.Window(1024, 4)),
        ("h2o(recent=64, normalize=True)", caches.H2O(64, normalize=True)),
        ("qhitter(64, balance=0.25)", caches.QHitter(64, balance=0.25)),
    ],
)
def test_policies(text, policy):
    assert cache_options.policy(text) == policy


@pytest.mark.parametrize(
    ("text", "storage"),
    [
        ("plain", caches.Plain()),
        ("int8", caches.Int8()),
        ("int4(64)", caches.Int4(64)),
        ("float8", caches.Float8()),
        ("paged(64, 512)", caches.Paged(64, 512)),
        ("paged(64, 512, inner=int4(group=16))", caches.Paged(64, 512, caches.Int4(16))),
    ],
)
def test_storages(text, storage):
    assert cache_options.storage(text) == storage


@pytest.mark.parametrize(
    "text",
    ["", "windows(3)", "window", "window(3", "window(size=3, size=4)", "window(**x)", "3", "window(__import__('os'))"],
)
def test_invalid_text_is_refused(text):
    with pytest.raises(ValueError, match=re.escape("cache: expected one of dense, window(size: int, sinks: int = 0)")):
        cache_options.policy(text)


def test_a_wrong_value_has_the_message_of_its_class():
    with pytest.raises(ValueError, match="size: expected at least 1, got 0"):
        cache_options.policy("window(0)")


@pytest.mark.parametrize("cache", ["dense", "h2o(recent=8)"])
@pytest.mark.parametrize("storage", ["plain", "int8", "paged(16, 24, int4(group=16))"])
def test_cache_size_is_that_of_the_caches(cache, storage, capsys):
    arguments = ["--capacity", "128", "--batch-size", "3", "--cache", cache, "--storage", storage, "--json"]
    assert cli.main(["cache-size", *arguments]) == 0
    found = json.loads(capsys.readouterr().out)
    layer = caches.init(
        cache_options.policy(cache),
        cache_options.storage(storage),
        batch_size=3,
        capacity=128,
        kv_heads=2,
        head_dim=64,
        dtype=jnp.bfloat16,
    )
    assert found["layers"] == [layer.nbytes] * 3
    assert found["bytes"] == 3 * layer.nbytes


def test_cache_size_as_a_table(capsys):
    assert cli.main(["cache-size", "--capacity", "128", "--storage", "int8"]) == 0
    shown = capsys.readouterr().out
    assert "Int8()" in shown
    assert re.search(r"[\d,]+ bytes for 1 rows", shown)


def test_a_missing_model(capsys, tmp_path):
    assert cli.main(["cache-size", "--capacity", "128", "--model", str(tmp_path)]) == 2
    assert "config.json" in capsys.readouterr().err


def test_generate_with_a_bounded_quantized_cache(capsys):
    prompt = "a=7;k=2;k?"
    arguments = ["--prompt", prompt, "--max-new-tokens", "4", "--batch-size", "1", "--json"]
    arguments += ["--cache", "h2o(recent=4)", "--storage", "int8", "--capacity", "64"]
    assert cli.main(["generate", *arguments]) == 0
    (completion,) = json.loads(capsys.readouterr().out)["completions"]
    assert completion["completion"].startswith("2")
