"""save_hf over an older checkpoint: killed, failing or concurrent, it leaves the complete old or new one."""

import concurrent.futures
import contextlib
import io
import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pallas_attn_models import Decoder, DecoderConfig, RopeConfig, load_hf, save_hf
from pallas_attn_models.checkpoints import files as checkpoint_files
from pallas_attn_models.checkpoints import hf as checkpoint
from pallas_attn_models.checkpoints.files import open_checkpoint
from pallas_attn_models.checkpoints.hf_config import config_from_hf

SIZES = {"vocab_size": 24, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "num_kv_heads": 1, "head_dim": 4}
ONE_FILE, SHARDS = 10**9, 1200


def make_model(seed: int) -> Decoder:
    """The models have equal names and shapes, so that a mixture of two would load; their configs differ."""
    config = DecoderConfig(num_layers=1, rope=RopeConfig(theta=100.0 + seed), tie_word_embeddings=True, **SIZES)
    return Decoder(config, rngs=nnx.Rngs(seed))


OLDER, OLD, NEW = map(make_model, range(3))


def contents(directory: Path) -> tuple:
    """The input of load_hf, without tracing a decoder: much faster."""
    checkpoint = open_checkpoint(directory)
    tensors = {name: tensor.read().tobytes() for name, tensor in checkpoint.tensors.items()}
    return config_from_hf(checkpoint.fields), tensors


def same(a: Decoder, b: Decoder) -> bool:
    leaves = zip(jax.tree.leaves(nnx.state(a)), jax.tree.leaves(nnx.state(b)), strict=True)
    return a.config == b.config and all(np.array_equal(x, y) for x, y in leaves)


def files(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def clean(directory: Path, *foreign: str) -> bool:
    """Whether the directory holds only one checkpoint and unrelated files."""
    found = files(directory) - {*foreign}
    if "model.safetensors" in found:
        return found == {"config.json", "model.safetensors"}
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    return found == {"config.json", "model.safetensors.index.json", *index["weight_map"].values()}


class Killed(BaseException):
    """Stands for the death of the process."""


OPERATIONS = ("chmod", "fsync", "mkdir", "open", "remove", "rename", "replace", "rmdir", "scandir", "unlink")


@pytest.fixture
def stopped(monkeypatch):
    """Calls a function whose file operation number ``at`` raises, and all later ones, too, if it is killed."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # the disk would take most of the time

    def stopped(function, at: int, error: type[BaseException]) -> bool:
        """Whether the function reached that operation."""
        count = 0

        def watched(operation):
            def call(*args, **options):
                nonlocal count
                count += 1
                if count == at or (count > at and error is Killed):
                    raise error(28, f"operation {at}")
                return operation(*args, **options)

            return call

        def half_a_file(tensors, path, metadata):
            path.write_bytes(b"half of it")
            return save_file(tensors, path, metadata)

        save_file = watched(checkpoint.save_file)
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "save_file", half_a_file)
            patch.setattr(io, "open", watched(io.open))
            for name in OPERATIONS:
                patch.setattr(os, name, watched(getattr(os, name)))
            with contextlib.suppress(error):
                function()
        return count >= at

    return stopped


def prepared(kind: str, directory: Path) -> Path:
    """A directory with the checkpoint OLD, or an empty one."""
    directory.mkdir()
    if kind == "one file":
        save_hf(OLD, directory)
    elif kind == "shards":
        save_hf(OLD, directory, max_shard_bytes=SHARDS)
    elif kind == "shards again":
        save_hf(OLDER, directory, max_shard_bytes=SHARDS)
        save_hf(OLD, directory, max_shard_bytes=SHARDS)
    return directory


@pytest.fixture(scope="module")
def older_old_new(tmp_path_factory):
    """The content of the three models."""
    directory = tmp_path_factory.mktemp("contents")
    for number, model in enumerate([OLDER, OLD, NEW]):
        save_hf(model, directory / f"{number}")
    return [contents(directory / f"{number}") for number in range(3)]


OVER = list(itertools.product(["nothing", "one file", "shards", "shards again"], [SHARDS, ONE_FILE]))
CASES = [(Killed, *over) for over in OVER] + [(OSError, *OVER[2]), (OSError, *OVER[6]), (KeyboardInterrupt, *OVER[3])]


@pytest.mark.parametrize(("error", "over", "max_shard_bytes"), CASES)
def test_stopped_at_every_file_operation(error, over, max_shard_bytes, stopped, older_old_new, tmp_path):
    before, (older, old, new) = prepared(over, tmp_path / "before"), older_old_new
    is_new = []
    for at in itertools.count(1):
        directory = Path(shutil.copytree(before, tmp_path / f"{at}"))
        go_on = stopped(lambda to=directory: save_hf(NEW, to, max_shard_bytes=max_shard_bytes), at, error)
        try:
            loaded = contents(directory)
        except FileNotFoundError:
            assert over == "nothing"
            loaded = old
        assert loaded in (old, new)
        is_new.append(loaded == new)
        if error is not Killed and not is_new[-1]:
            assert files(directory) == files(before), at
        # The next save, of any size, succeeds and removes what the stopped one left.
        save_hf(OLDER, directory, max_shard_bytes=(ONE_FILE, SHARDS)[at % 2])
        assert clean(directory), (at, files(directory))
        assert contents(directory) == older
        shutil.rmtree(directory)
        if not go_on:
            break
    assert set(is_new) == {False, True}
    if error is Killed:
        assert is_new == sorted(is_new), "there is one moment at which it changes"


@pytest.mark.skipif(sys.platform == "win32", reason="needs the numbers of files")
@pytest.mark.parametrize(("over", "max_shard_bytes"), OVER)
def test_every_step_is_on_the_disk_before_the_next(over, max_shard_bytes, monkeypatch, tmp_path):
    """After a power loss, a disk has all synced data and any part of the rest."""
    directory = prepared(over, tmp_path / "saved")
    unsynced, renamed = set(), []

    def fsync(descriptor):
        unsynced.discard(os.fstat(descriptor).st_ino)

    def replace(source, target):
        source, target = Path(source), Path(target)
        assert source.stat().st_ino not in unsynced, "contents come before a name"
        step = {"config.json": 2, "model.safetensors": 1, "model.safetensors.index.json": 1}.get(target.name, 0)
        assert not renamed or step >= renamed[-1]
        if step:
            assert directory.stat().st_ino not in unsynced, f"{target.name} has to wait for what came before it"
        renamed.append(step)
        unsynced.add(directory.stat().st_ino)
        os.rename(source, target)

    def unlink(path, **options):
        if Path(path).parent == directory:
            assert directory.stat().st_ino not in unsynced, "what is old goes when the new is safe"
            if Path(path).name == "model.safetensors":
                unsynced.add(directory.stat().st_ino)
        os.remove(path, **options)

    def half_synced(tensors, path, metadata):
        save_file(tensors, path, metadata)
        unsynced.add(path.stat().st_ino)

    save_file = checkpoint.save_file
    monkeypatch.setattr(checkpoint, "save_file", half_synced)
    for name, operation in {"fsync": fsync, "replace": replace, "unlink": unlink}.items():
        monkeypatch.setattr(os, name, operation)
    save_hf(NEW, directory, max_shard_bytes=max_shard_bytes)
    assert renamed == ([0] * (len(files(directory)) - 2) if max_shard_bytes == SHARDS else []) + [1, 2]
    assert directory.stat().st_ino not in unsynced


def test_only_files_of_checkpoints_are_removed(tmp_path):
    foreign = (
        ".save-notes",
        ".save-ABCDEFGH",
        ".saved",
        "README.md",
        "adapter_model.safetensors",
        "model-00001-of-00002.bin",
        "model-00001-of-00002.safetensors.bak",
        "model-best.safetensors",
        "tokenizer.json",
    )
    for name in foreign:
        (tmp_path / name).write_text("mine")
    (tmp_path / ".save-abcd1234").mkdir()  # of a save that was killed
    (tmp_path / "model-abcd1234-00001-of-00002.safetensors").write_text("as is this")
    for max_shard_bytes in (SHARDS, ONE_FILE, SHARDS):
        save_hf(NEW, tmp_path, max_shard_bytes=max_shard_bytes)
        assert clean(tmp_path, *foreign)
    assert all((tmp_path / name).read_text() == "mine" for name in foreign)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": {"a": [1]}}', '{"weight_map": {}, "metadata": 3}'])
@pytest.mark.parametrize("max_shard_bytes", [SHARDS, ONE_FILE])
def test_a_broken_checkpoint_can_be_replaced(text, max_shard_bytes, older_old_new, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    (tmp_path / "model-00001-of-00003.safetensors").write_text("half of it")
    (tmp_path / "config.json").write_text("{")
    save_hf(NEW, tmp_path, max_shard_bytes=max_shard_bytes)
    assert contents(tmp_path) == older_old_new[2]
    assert clean(tmp_path)


def test_shards_have_the_usual_names_where_these_are_free(tmp_path):
    usual = {f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)}
    for is_usual in (True, False, True):
        save_hf(NEW, tmp_path, max_shard_bytes=SHARDS)
        shards = {name for name in files(tmp_path) if name.endswith(".safetensors")}
        assert (shards == usual) == is_usual
        assert all(name.startswith("model-") and name.endswith("-of-00003.safetensors") for name in shards)


def test_a_config_that_was_edited_counts(tmp_path):
    save_hf(NEW, tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rope_theta": 5000.0}))
    assert load_hf(tmp_path, jnp.float32).config.rope.theta == 5000.0


def test_a_shard_of_another_save_is_refused(tmp_path):
    for name, model in {"old": OLD, "new": NEW}.items():
        save_hf(model, tmp_path / name, max_shard_bytes=SHARDS)
    shard = "model-00002-of-00003.safetensors"
    shutil.copy(tmp_path / "old" / shard, tmp_path / "new" / shard)
    with pytest.raises(ValueError, match=f"{shard}: expected a file of the same save as model.safetensors.index.json"):
        load_hf(tmp_path / "new")


def test_without_file_locks(monkeypatch, stopped, older_old_new, tmp_path):
    """As on Windows: a save cannot recover others, and uses its own names."""
    monkeypatch.setattr(checkpoint_files, "fcntl", None)
    old, new = older_old_new[1:]
    before = prepared("shards", tmp_path / "before")
    for at in itertools.count(1):
        directory = Path(shutil.copytree(before, tmp_path / f"{at}"))
        go_on = stopped(lambda to=directory: save_hf(NEW, to, max_shard_bytes=SHARDS), at, Killed)
        assert contents(directory) in (old, new)
        save_hf(NEW, directory, max_shard_bytes=SHARDS)
        assert contents(directory) == new
        if not go_on:
            break
    assert clean(directory)


def test_threads_that_save_and_load(tmp_path):
    models, wrong = [OLDER, OLD, NEW], []
    save_hf(OLD, tmp_path)
    saving = threading.Event()

    def save(number: int) -> None:
        for turn in range(6):
            save_hf(models[(number + turn) % 3], tmp_path, max_shard_bytes=(ONE_FILE, SHARDS)[turn % 2])

    def load() -> None:
        while saving.is_set():
            loaded = load_hf(tmp_path, jnp.float32)
            if not any(same(loaded, model) for model in models):
                wrong.append(loaded.config)

    saving.set()
    with concurrent.futures.ThreadPoolExecutor() as pool:
        readers = [pool.submit(load) for _ in range(2)]
        savers = [pool.submit(save, number) for number in range(3)]
        concurrent.futures.wait(savers)
        saving.clear()
    assert [done.exception() for done in (*readers, *savers)] == [None] * 5
    assert not wrong
    assert clean(tmp_path)


SAVE_UNTIL_KILLED = """
import itertools, sys, time
from pallas_attn_models import load_hf, save_hf
models = [load_hf(directory, "float32") for directory in sys.argv[2:]]
for turn in itertools.count():
    save_hf(models[turn % 2], sys.argv[1], max_shard_bytes=SHARDS)
    print(turn, flush=True)
    time.sleep(0.001)  # an unfair lock could starve the other process
"""


def test_processes_one_of_which_is_killed(tmp_path):
    sources = [str(tmp_path / name) for name in ("old", "new")]
    for model, source in zip((OLD, NEW), sources, strict=True):
        save_hf(model, source)
    tmp_path = tmp_path / "saved"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"}
    code = SAVE_UNTIL_KILLED.replace("SHARDS", str(SHARDS))
    command = [sys.executable, "-c", code, str(tmp_path), *sources]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"0\n"
            for turn in range(8):
                loaded = load_hf(tmp_path, jnp.float32)
                assert any(same(loaded, model) for model in (OLDER, OLD, NEW))
                if turn % 2:
                    save_hf(OLDER, tmp_path, max_shard_bytes=SHARDS)
            while int(process.stdout.readline()) < 20:
                pass
            time.sleep(0.0137)
        finally:
            process.kill()
    loaded = load_hf(tmp_path, jnp.float32)
    assert any(same(loaded, model) for model in (OLDER, OLD, NEW))
    save_hf(NEW, tmp_path)
    assert clean(tmp_path)
    assert same(load_hf(tmp_path, jnp.float32), NEW)
