"""A small checkpoint of every model family, spelled as published files are, against the logits of transformers."""

import json
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pallas_attn_models import load_hf
from pallas_attn_models.checkpoints.families import FAMILIES
from pallas_attn_models.checkpoints.hf_config import config_from_hf
from tests import tolerances

FIXTURES = Path(__file__).parents[1] / "fixtures" / "families"
CACHED = 20  # tokens before the last call, which is one of the rest


@nnx.jit
def compute_logits(model, tokens):
    """In one call, and in two through caches: the sliding windows of 8 tokens have moved by then."""
    caches = model.init_caches(batch_size=1, capacity=tokens.shape[1], chunk=CACHED)
    first = model(tokens[:, :CACHED], caches=caches)
    second = model(tokens[:, CACHED:], caches=first.caches)
    return model(tokens).logits[0], jnp.concatenate([first.logits, second.logits], axis=1)[0]


def test_every_family_has_a_fixture():
    found = {config_from_hf(json.loads(path.read_text())).family for path in FIXTURES.glob("*/config.json")}
    assert found == {*FAMILIES}


def test_the_readme_lists_every_family():
    readme = (Path(__file__).parents[3] / "README.md").read_text(encoding="utf-8")
    section = readme[readme.index("## Models") : readme.index("## A KV cache")]
    assert {name for name in re.findall(r"`([a-z0-9_]+)`", section) if name in FAMILIES} == {*FAMILIES}
    assert f"[{len(FAMILIES)} model families](#models)" in readme


@pytest.mark.parametrize("name", sorted(path.parent.name for path in FIXTURES.glob("*/config.json")))
def test_family(name):
    model = load_hf(FIXTURES / name, jnp.float32, implementation="reference")
    with np.load(FIXTURES / name / "expected.npz") as file:
        tokens, expected = file["tokens_0"], file["logits_0"]
    for logits in compute_logits(model, tokens[None]):
        error = np.abs(np.asarray(logits) - expected).max() / np.abs(expected).max()
        assert error < tolerances.FAMILY_LOGITS_RELATIVE, f"error {error:.1e} of the largest logit"
