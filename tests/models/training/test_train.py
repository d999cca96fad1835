"""Training: a valid curriculum, served by the kernels; a seed determines every bit; the output loads."""

import importlib
import io
import itertools
import re
import tempfile

import jax
import numpy as np
import pytest
from flax import nnx
from rich.console import Console
from tokenizers import Tokenizer

import pallas_attn as pa
from pallas_attn.kernels import reference
from pallas_attn_models import load_hf
from pallas_attn_models.checkpoints import files as checkpoint_files
from pallas_attn_models.decoder.rope import rotary_tables, rotate
from pallas_attn_models.training import train
from pallas_attn_models.training.tasks import END_TOKEN, Mix

SHORT = (train.Phase(3, 2, 32, Mix(recall=1.0, max_pairs=6), first_pairs=4),)


@pytest.fixture(autouse=True)
def default_promotion():
    """optax relies on JAX's own promotion rules."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def quiet() -> Console:
    return Console(file=io.StringIO())


def weights(model: nnx.Module) -> list[np.ndarray]:
    return [np.asarray(x) for x in jax.tree.leaves(nnx.state(model, nnx.Param))]


def test_the_model_is_small():
    model = train.new_model(0)
    size = sum(x.size for x in weights(model))
    assert size <= 1.5e6
    assert 4 * size <= 4e6, "float32 in a file of 4 MB"
    assert model.config.num_kv_heads < model.config.num_heads
    assert model.config.eos_token_ids == (END_TOKEN,)


def test_heads_of_the_first_layer_start_by_looking_back():
    model = train.new_model(0)
    config, attention = model.config, model.layers[0].attention
    tokens = np.random.default_rng(0).integers(97, 123, (1, 64), dtype=np.int32)
    positions = np.arange(64, dtype=np.int32)[None]
    x = model.layers[0].attention_norm(model.embedding(tokens))
    rotary = rotary_tables(positions, config.head_dim, config.rope)
    query = rotate(attention.query(x).reshape(1, 64, config.num_heads, -1), rotary)
    key = rotate(attention.key(x).reshape(1, 64, config.num_kv_heads, -1), rotary)
    key = np.repeat(key, config.num_heads // config.num_kv_heads, axis=2)
    scores = np.where(positions <= positions.T, np.einsum("btnd,bsnd->bnts", query, key)[0], -np.inf)
    for head in range(config.num_heads):
        distance = np.arange(64) - scores[head].argmax(-1)
        assert np.mean(distance[8:] == head + 1) > 0.9


def test_later_layers_start_as_the_identity():
    model = train.new_model(0)
    tokens = np.arange(10, dtype=np.int32)[None]
    seen = []
    model(tokens, layer_hook=lambda index, hidden: seen.append(hidden) or hidden)
    output = model.norm(seen[1])
    np.testing.assert_array_equal(model(tokens).hidden, output)


def test_phases_follow_one_another():
    for phase in train.PHASES:
        pairs = [phase.mix_at(step).max_pairs for step in range(phase.steps)]
        assert pairs[0] == phase.first_pairs
        assert pairs == sorted(pairs)
        assert pairs[-1] <= phase.mix.max_pairs


@pytest.mark.parametrize("steps", [3, 4, 8, 100, 1800, 5000])
def test_scaled(steps):
    phases = train.scaled(train.PHASES, steps)
    assert sum(phase.steps for phase in phases) == steps
    assert all(phase.steps >= 1 for phase in phases)


def test_scaled_to_the_same_length_changes_nothing():
    assert train.scaled(train.PHASES, sum(phase.steps for phase in train.PHASES)) == train.PHASES


def test_scaled_needs_a_step_for_each_phase():
    with pytest.raises(ValueError, match="steps: expected at least one for each of 3 phases, got 2"):
        train.scaled(train.PHASES, 2)


def test_batches_depend_on_the_seed_alone():
    first, again, other = (list(itertools.islice(train.batches(train.PHASES, seed), 3)) for seed in (0, 0, 1))
    assert all(np.array_equal(a.tokens, b.tokens) for a, b in zip(first, again, strict=True))
    assert not any(np.array_equal(a.tokens, b.tokens) for a, b in zip(first, other, strict=True))
    assert first[0].tokens.shape == (train.PHASES[0].rows, train.PHASES[0].length)


def test_a_seed_fixes_every_bit():
    first, again = (weights(train.train(SHORT, 0, quiet())) for _ in range(2))
    assert all(np.isfinite(x).all() for x in first)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    before, other = (weights(train.new_model(seed)) for seed in (0, 1))
    assert not any(np.array_equal(a, b) for a, b in zip(before, first, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(before, other, strict=True))


def test_a_kernel_computes_the_gradients(monkeypatch):
    kernel = next(name for name, reason in pa.implementations().items() if reason is None)
    module, calls = importlib.import_module(f"pallas_attn.kernels.{kernel}"), []
    backward = module.backward
    monkeypatch.setattr(module, "backward", lambda *args, **options: calls.append(args) or backward(*args, **options))
    monkeypatch.setattr(reference, "forward", lambda *_, **__: pytest.fail("the reference ran"))
    model, weights = nnx.split(train.new_model(0))

    def gradients(weights, batch):
        return nnx.grad(train.loss_and_accuracy, has_aux=True)(nnx.merge(model, weights), batch)

    jax.eval_shape(gradients, weights, next(train.batches(SHORT, 0)))
    assert len(calls) == train.CONFIG.num_layers


def test_a_batch_can_be_learned():
    model = train.new_model(0)
    state = nnx.Optimizer(model, train.optimizer(40), wrt=nnx.Param)
    batch = next(train.batches(SHORT, 0))
    losses = [float(train.train_step(model, state, batch)[0]) for _ in range(40)]
    assert losses[-1] < 0.5 * losses[0]


def test_tokenizer(tmp_path):
    path = tmp_path / "tokenizer.json"
    train.byte_tokenizer().save(str(path))
    tokenizer = Tokenizer.from_file(str(path))
    assert tokenizer.get_vocab_size() == 256
    for text in ("a=7;k=2;k?", " two  spaces\tand\nlines\n", "é€😀", "".join(map(chr, range(256)))):
        assert tokenizer.encode(text).ids == list(text.encode())
        assert tokenizer.decode(list(text.encode())) == text


@pytest.fixture
def nothing_is_trained(monkeypatch):
    monkeypatch.setattr(train, "train", lambda *_: pytest.fail("training began"))


def refuse(**_):
    raise PermissionError(13, "Permission denied")


@pytest.mark.parametrize(
    ("arrange", "message"),
    [
        (lambda out: out.write_text(""), "--out: expected a directory, got .*/out, where a file is in the way"),
        (lambda out: (out / "config.json").mkdir(parents=True), r"a file or nothing at .*/out/config\.json, got a dir"),
        (lambda out: (out / "tokenizer.json").mkdir(parents=True), r"a file or nothing at .*/out/tokenizer\.json, got"),
        (
            lambda _: setattr(checkpoint_files.tempfile, "TemporaryFile", refuse),
            r"expected a writable directory, got .*/out",
        ),
    ],
)
def test_an_unwritable_directory_fails_before_training(
    arrange, message, nothing_is_trained, monkeypatch, capsys, tmp_path
):
    monkeypatch.setattr(checkpoint_files.tempfile, "TemporaryFile", tempfile.TemporaryFile)
    arrange(tmp_path / "out")
    with pytest.raises(SystemExit) as error:
        train.main(["--out", str(tmp_path / "out")])
    assert error.value.code == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", ""], "--out: expected a path, got ''"),
        (["--steps", "2"], "argument --steps: expected 3 to 2147483647, got 2"),
        (["--steps", "1" + 400 * "0"], "argument --steps: expected 3 to 2147483647, got 1000"),
        (["--steps", "1.5"], "argument --steps: invalid int value: '1.5'"),
        (["--steps", "8", "--quick"], "argument --quick: not allowed with argument --steps"),
        (["--seed", "-1"], "argument --seed: expected 0 to 4294967295, got -1"),
        (["--seed", str(2**32)], "argument --seed: expected 0 to 4294967295, got 4294967296"),
    ],
)
def test_wrong_arguments_are_refused_before_training(arguments, message, nothing_is_trained, capsys, tmp_path):
    with pytest.raises(SystemExit) as error:
        train.main(["--out", str(tmp_path), *arguments])
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_the_directory_is_created_empty_before_training(monkeypatch, tmp_path):
    class Began(Exception):
        pass

    def began(*_):
        assert list((tmp_path / "a" / "b").iterdir()) == []
        raise Began

    monkeypatch.setattr(train, "train", began)
    with pytest.raises(Began):
        train.main(["--out", str(tmp_path / "a" / "b"), "--quick"])


@pytest.mark.slow
def test_command(tmp_path, capsys):
    train.main(["--out", str(tmp_path), "--quick"])
    printed = capsys.readouterr().out
    assert all(task in printed for task in ("addition", "reversal", "recall"))
    assert load_hf(tmp_path, "float32").config == train.CONFIG
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
