"""For any broken file of a checkpoint, a command prints one line that names the file, and exits with 2."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest
from flax import nnx
from tokenizers import Regex, pre_tokenizers

from pallas_attn_models import cli
from pallas_attn_models.checkpoints.hf import load_hf, save_hf
from pallas_attn_models.cli import chat, generate, loading
from pallas_attn_models.cli.completions import CompletionRow, to_json
from pallas_attn_models.decoder.config import DecoderConfig
from pallas_attn_models.decoder.decoder import Decoder
from pallas_attn_models.generation.generator import GenerationResult
from pallas_attn_models.generation.sampling import Sampling
from pallas_attn_models.generation.stats import GenerationStats
from pallas_attn_models.text.chat_template import ChatTemplate
from tests.models.scripted import ScriptedGenerator, byte_tokenizer

CONFIG = DecoderConfig(
    vocab_size=258,
    hidden_size=16,
    intermediate_size=16,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
)
DEEP = "[" * 200000
HUGE = "1" + "0" * 400
GENERATE = ("generate", "--prompt", "a")
CHAT = ("chat",)
STATS = GenerationStats(1, 0, 0.0, 2, 0.5, 0.5, 0, 0, 0, 0, 0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint")
    save_hf(Decoder(CONFIG, rngs=nnx.Rngs(0)), directory)
    byte_tokenizer(["<s>", "</s>"]).save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    (directory / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[-1].content }}{{ eos_token }}")
    (directory / "generation_config.json").write_text("{}")
    return directory


@pytest.fixture
def damaged(checkpoint, tmp_path):
    """A copy with one file changed: bytes, text, or None for a directory in its place."""

    def damaged(name: str, content: str | bytes | None) -> Path:
        directory = tmp_path / "copy"
        shutil.copytree(checkpoint, directory)
        (directory / name).unlink(missing_ok=True)
        if content is None:
            (directory / name).mkdir()
        else:
            (directory / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return directory

    return damaged


@pytest.fixture
def run(capfd, monkeypatch):
    """Runs a command with a mocked Generator: ``(exit code, stdout, stderr)``."""

    class Silent(ScriptedGenerator):
        def __init__(self, model, **options):
            super().__init__([[]] * 9)
            self.compile_counts = {}

        def warmup(self, progress):
            return 0.0

        def generate(self, prompts, samplings, **options):
            return GenerationResult(*([one] * len(prompts) for one in ([], [], "length", [])), STATS)

    def run(*argv: object, stdin: str = "Hi\n", silent: bool = True) -> tuple[int, str, str]:
        if silent:
            monkeypatch.setattr(loading, "Generator", Silent)
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        code = cli.main([str(argument) for argument in argv])
        return code, *capfd.readouterr()

    return run


FILES = [
    ("config.json", DEEP, GENERATE),
    ("config.json", DEEP, CHAT),
    ("config.json", DEEP, ("cache-size", "--capacity", 8)),
    ("config.json", "{", ("cache-size", "--capacity", 8)),
    ("config.json", None, ("cache-size", "--capacity", 8)),
    ("config.json", '{"hidden_size": "x"}', ("cache-size", "--capacity", 8)),
    ("config.json", "[]", GENERATE),
    ("config.json", b"\xff\xfe{", GENERATE),
    ("config.json", b"\xff", GENERATE),
    ("config.json", None, GENERATE),
    ("config.json", '{"model_type": "llama", "vocab_size": ' + HUGE + "}", GENERATE),
    ("config.json", '{"model_type": "llama", "vocab_size": 1' + "0" * 5000 + "}", GENERATE),
    ("config.json", '{"model_type": {}}', GENERATE),
    ("model.safetensors", b"", GENERATE),
    ("model.safetensors", b"\xff" * 64, GENERATE),
    ("model.safetensors", None, GENERATE),
    ("tokenizer.json", DEEP, GENERATE),
    ("tokenizer.json", "", GENERATE),
    ("tokenizer.json", "{}", CHAT),
    ("tokenizer.json", None, GENERATE),
    ("tokenizer.json", b"\x80", GENERATE),
    ("tokenizer_config.json", DEEP, CHAT),
    ("tokenizer_config.json", DEEP, GENERATE),
    ("tokenizer_config.json", "7", CHAT),
    ("tokenizer_config.json", '{"eos_token": 7}', CHAT),
    ("tokenizer_config.json", b"\xc3(", CHAT),
    ("special_tokens_map.json", DEEP, CHAT),
    ("special_tokens_map.json", "[]", CHAT),
    ("added_tokens.json", '{"a": "b"}', GENERATE),
    ("chat_template.jinja", "{{ 1 / 0 }}", CHAT),
    ("chat_template.jinja", "{% for i in range(10**9) %}{% endfor %}", CHAT),
    ("chat_template.jinja", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", CHAT),
    ("chat_template.jinja", "{{ 'x' * 10**10 }}", CHAT),
    ("chat_template.jinja", "{% if %}", CHAT),
    ("chat_template.jinja", "{{ raise_exception('\x1b[2J no\n\nno') }}", CHAT),
    ("chat_template.jinja", "{{ nobody }}", CHAT),
    ("chat_template.jinja", "{{ '\\ud800' }}", CHAT),
    ("chat_template.jinja", b"\xff", CHAT),
    ("chat_template.jinja", None, CHAT),
    ("generation_config.json", DEEP, GENERATE),
    ("generation_config.json", None, GENERATE),
    ("generation_config.json", '{"top_k": ' + HUGE + "}", GENERATE),
    ("generation_config.json", '{"temperature": ' + HUGE + ', "do_sample": true}', GENERATE),
    ("generation_config.json", '{"temperature": 1e400, "do_sample": true}', GENERATE),
    ("generation_config.json", '{"top_p": NaN, "do_sample": true}', GENERATE),
    ("generation_config.json", '{"eos_token_id": ' + HUGE + "}", CHAT),
    ("generation_config.json", '{"do_sample": "yes"}', CHAT),
    ("generation_config.json", '{"repetition_penalty": 0}', GENERATE),
]


@pytest.mark.parametrize(("name", "content", "argv"), FILES, ids=lambda x: str(x)[:40])
def test_one_line_with_the_name_of_the_file(run, damaged, name, content, argv):
    directory = damaged(name, content)
    code, out, err = run(*argv, "--model", directory)
    assert (code, out) == (2, "")
    last = err.splitlines()[-1]
    assert last.startswith("error: ")
    assert str(directory / name) in last
    assert len(last) < 2000
    assert last.isprintable()
    assert sum(line.startswith("error") for line in err.splitlines()) == 1


def test_the_same_in_a_process_of_its_own(damaged):
    directory = damaged("config.json", DEEP)
    command = [sys.executable, "-m", "pallas_attn_models.cli", *GENERATE, "--model", str(directory)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert (finished.returncode, finished.stdout) == (2, "")
    assert (
        finished.stderr.splitlines()[-1]
        == f"error: {directory}/config.json: expected JSON, got objects or arrays nested too deeply"
    )
    assert "Traceback" not in finished.stderr


@pytest.mark.skipif(os.geteuid() == 0, reason="root can read every file")
def test_a_file_that_may_not_be_read(run, damaged):
    directory = damaged("tokenizer_config.json", "{}")
    (directory / "tokenizer_config.json").chmod(0)
    code, _, err = run(*CHAT, "--model", directory)
    assert code == 2
    assert "tokenizer_config.json" in err.splitlines()[-1]


@pytest.mark.parametrize("argv", [("generate", "--prompt", "a" * 50 + "!"), ("chat",)], ids=str)
def test_a_tokenizer_that_panics(run, damaged, argv):
    tokenizer = byte_tokenizer(["<s>", "</s>"])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("(a+)+$"), "isolated")
    directory = damaged("tokenizer.json", tokenizer.to_str())
    code, out, err = run(*argv, "--model", directory, stdin="a" * 50 + "!\n")
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith(f"error: {directory}/tokenizer.json: expected to tokenize the text, got: ")
    assert "panicked" not in err


# --- valid files ---


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"top_k": -1, "do_sample": True}, Sampling(temperature=1.0)),
        ({"top_k": 50.0, "do_sample": True}, Sampling(temperature=1.0, top_k=50)),
        ({"top_k": 0, "temperature": 1, "do_sample": True}, Sampling(temperature=1.0)),
        ({"top_p": 0, "do_sample": False}, Sampling(top_p=2.0**-126)),
        ({"top_p": 3, "do_sample": False}, Sampling()),
        ({"temperature": -1, "min_p": 7, "top_k": -3}, Sampling()),
        ({"temperature": None, "top_k": None, "eos_token_id": None, "max_new_tokens": None}, Sampling()),
        ({"eos_token_id": -1}, Sampling()),
        ({"eos_token_id": [3, 258, 70000]}, Sampling(stop=(3,))),
    ],
    ids=str,
)
def test_generation_config_like_transformers(run, damaged, monkeypatch, fields, expected):
    asked = []
    make = loading.make_generator
    directory = damaged("generation_config.json", json.dumps(fields))
    monkeypatch.setattr(generate, "make_generator", lambda *args, **rest: asked.append(args[2]) or make(*args, **rest))
    code, _, err = run(*GENERATE, "--model", directory)
    assert code == 0, err
    assert asked == [expected]
    assert ("end tokens 258 70000 are not used: the model has 258 tokens" in err) == ("70000" in str(fields))


@pytest.mark.parametrize(
    ("content", "prompts"),
    [
        ("\ufeffone\ntwo\n".encode(), ["one", "two"]),
        (b"one\r\n\r\ntwo\r\n", ["one", "two"]),
        ("\ufeffone\r\nt\u00a0wo".encode("utf-16-le"), ["one", "t\u00a0wo"]),
        ("a\u2028b\x0cc\n".encode(), ["a\u2028b\x0cc"]),
    ],
    ids=str,
)
def test_a_prompts_file_of_any_editor(run, checkpoint, tmp_path, monkeypatch, content, prompts):
    (tmp_path / "prompts.txt").write_bytes(content)
    asked = []
    monkeypatch.setattr(generate, "encode", lambda directory, tokenizer, text: asked.append(text) or [1])
    run("generate", "--model", checkpoint, "--prompts-file", tmp_path / "prompts.txt")
    assert asked == prompts


def test_stdin_with_a_byte_order_mark(run, checkpoint, monkeypatch):
    asked = []
    monkeypatch.setattr(chat.Chat, "answer", lambda self, message: asked.append(message) or True)
    assert run(*CHAT, "--model", checkpoint, stdin="\ufeffHi\n\ufeffyou\n")[0] == 0
    assert asked == ["Hi", "\ufeffyou"]


# --- other user errors ---


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["generate", "--prompt", "a", "--max-new-tokens", HUGE],
            "--max-new-tokens: expected an int below 2^31, got 1",
        ),
        (["generate", "--prompt", "a", "--max-new-tokens", "9" * 5000], "--max-new-tokens: invalid int value: '999"),
        (["generate", "--prompt", "a", "--capacity", HUGE], "--capacity: expected an int below 2^31"),
        (["generate", "--prompt", "a", "--top-k", HUGE], "--top-k: expected an int below 2^31"),
        (["generate", "--prompt", "a", "--seed", HUGE], "seed: expected an int in [0, 4294967296)"),
        (
            ["generate", "--prompt", "a", "--temperature", "nan"],
            "temperature: expected a finite number of at least 0, got nan",
        ),
        (["generate", "--prompt", "a", "--top-p", "inf"], "top_p: expected a number in (0, 1], got inf"),
        (["generate", "--prompts-file", "."], ".: expected a file, found a directory"),
        (["generate", "--prompts-file", "nowhere"], "nowhere: expected a file, found none"),
        (["show-mask", "causal", "--q", HUGE], "--q: expected an int below 2^31"),
        (["show-mask", "causal", "--q", "4", "--out", "/nowhere/mask.svg"], "'/nowhere'"),
        (["show-mask", "causal & sink(" + HUGE + ")", "--q", "4"], "sink"),
        (["show-mask", "sliding_window(" + "9" * 5000 + ")", "--q", "4"], "error"),
        (["cache-size", "--capacity", "4", "--storage", "int4(group=" + HUGE + ")"], "group"),
        (["cache-size", "--capacity", "4", "--cache", "window(" * 5000], "cache: expected one of"),
        (["cache-size", "--capacity", "4", "--cache=" + "-" * 100000 + "1"], "cache: expected one of"),
        (["cache-size", "--capacity", "4", "--cache", "window(9\0)"], "cache: expected one of"),
        (["cache-size", "--capacity", "-4"], "capacity: expected"),
        (["chat", "--model", "nowhere"], "nowhere"),
    ],
    ids=lambda x: " ".join(x)[:50] if isinstance(x, list) else "",
)
def test_invalid_arguments(capsys, argv, message):
    code = cli.main(argv)
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err
    assert max(map(len, err.splitlines())) < 11000


def test_text_that_is_not_utf8(run, checkpoint):
    code, _, err = run("generate", "--prompt", "a\udcff", "--model", checkpoint)
    assert code == 2
    assert err.splitlines()[-1] == "error: expected text in UTF-8, got '\\udcff' in it"


@pytest.mark.parametrize("closed", ["pipe", "disk"])
def test_a_closed_or_full_stdout(closed):
    """A closed or full stdout: no traceback, not even from Python's last flush."""
    command = [sys.executable, "-m", "pallas_attn_models.cli", "show-mask", "causal", "--q", "1000", "--block-q", "4"]
    if closed == "disk":
        if not Path("/dev/full").exists():
            pytest.skip("no /dev/full")
        with open("/dev/full", "wb") as stdout:
            finished = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, timeout=300, check=False)
        assert finished.returncode == 2
        assert b"No space left" in finished.stderr
    else:
        reader, writer = os.pipe()
        os.close(reader)
        finished = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, timeout=300, check=False)
        os.close(writer)
        assert finished.returncode == 141
        assert finished.stderr == b""
    assert b"Traceback" not in finished.stderr
    assert b"Exception ignored" not in finished.stderr


# --- NaN and infinite logits ---


@pytest.mark.parametrize("form", [["--json", "--logprobs", 1], []])
def test_completions_that_end_with_nan_logits(run, checkpoint, monkeypatch, form):
    result = GenerationResult([[1], []], [[-1.0], []], ["invalid", "length"], [[[(0, float("-inf"))]], []], STATS)
    monkeypatch.setattr(generate.Generator, "generate", lambda *_, **__: result)
    monkeypatch.setattr(generate.Generator, "warmup", lambda *_: 0.0)
    code, out, err = run("generate", "--prompt", "a", "--prompt", "b", "--model", checkpoint, *form, silent=False)
    assert code == 1
    assert err.splitlines()[-1] == "1 of 2 completions ended because the model's logits were NaN or infinite"
    assert "invalid" in out


def test_an_answer_that_ends_with_nan_logits(checkpoint, monkeypatch, capfd):
    class Broken(ScriptedGenerator):
        def step(self, interval: int = 64) -> None:
            first = self._running[0][0]
            if not first.done:
                first.extend([5], [-1.0], [[]])
                first.finish("invalid")
            super().step(interval)

    generator = Broken([[], byte_tokenizer().encode("ok").ids])
    monkeypatch.setattr("sys.stdin", io.StringIO("a\nb\n"))
    template = ChatTemplate.read(checkpoint)
    one = chat.Chat(generator, byte_tokenizer(), template, Sampling(max_new_tokens=500))
    assert one.run() == 1
    out, err = capfd.readouterr()
    assert out.splitlines()[-1] == "ok", "the conversation goes on"
    assert err.splitlines() == ["cut: the model's logits are NaN or infinite"]
    assert [message["content"] for message in one.messages] == ["b", "ok"], "without the question that had no answer"


@pytest.mark.parametrize("form", ["--json", "--stream"])
def test_a_model_with_nan_weights(run, checkpoint, tmp_path, form):
    """A row that meets the broken token ends; its neighbor continues."""
    directory = tmp_path / "copy"
    shutil.copytree(checkpoint, directory)
    model = load_hf(directory, "float32")
    broken = byte_tokenizer().token_to_id("b")
    model.embedding.table.set_value(model.embedding.table[...].at[broken].set(jnp.nan))
    save_hf(model, directory)
    argv = ["--prompt", "bx", "--prompt", "hi", "--max-new-tokens", 3, "--capacity", 64, form]
    code, out, err = run("generate", "--model", directory, *argv, silent=False)
    assert code == 1
    assert err.count("1 of 2 completions ended because the model's logits were NaN or infinite") == 1
    if form == "--json":
        first, second = json.loads(out, parse_constant=pytest.fail)["completions"]
        assert (first["finish_reason"], first["tokens"]) == ("invalid", [])
        assert second["finish_reason"] == "length"


def test_json_has_null_for_nan_and_infinity(tmp_path):
    completion = CompletionRow("a", "b", None, "invalid", [1], [float("nan")], [[(0, float("-inf"))]])
    text = to_json(tmp_path, [completion], STATS, with_top=True)

    def refuse(constant):
        raise AssertionError(constant)

    (row,) = json.loads(text, parse_constant=refuse)["completions"]
    assert row["logprobs"] == [None]
    assert row["top_logprobs"] == [[[0, None]]]
    assert row["finish_reason"] == "invalid"
