"""The command line: output, streams and exit codes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from tokenizers import Tokenizer, decoders, models

import pallas_attn as pa
from pallas_attn_models import cli
from pallas_attn_models.checkpoints.hf import save_hf
from pallas_attn_models.cli import completions, doctor, generate, loading
from pallas_attn_models.decoder.config import DecoderConfig
from pallas_attn_models.decoder.decoder import Decoder

CONFIG = DecoderConfig(
    vocab_size=256,
    hidden_size=16,
    intermediate_size=16,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    eos_token_ids=(10,),
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """An untrained byte-level decoder."""
    directory = tmp_path_factory.mktemp("checkpoint")
    save_hf(Decoder(CONFIG, rngs=nnx.Rngs(0)), directory)
    tokenizer = Tokenizer(models.BPE({f"<0x{byte:02X}>": byte for byte in range(256)}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


@pytest.fixture
def run(capsys):
    """Runs a command: ``(exit code, stdout, stderr)``."""

    def run(*argv: object) -> tuple[int, str, str]:
        code = cli.main([str(argument) for argument in argv])
        return code, *capsys.readouterr()

    return run


# --- generate ---


def test_json_is_all_that_is_printed_and_batches_share_two_executables(run, checkpoint, tmp_path):
    prompts = ["17+25=", "h\u00e9llo", "x" * 40]
    file = tmp_path / "prompts.txt"
    file.write_text("\n\n".join(prompts), encoding="utf-8")
    code, out, err = run(
        *("generate", "--model", checkpoint, "--prompts-file", file, "--batch-size", 2, "--capacity", 64),
        *("--max-new-tokens", 9, "--temperature", 1.5, "--top-k", 50, "--top-p", 0.95, "--seed", 3, "--json"),
    )
    assert code == 0
    assert "loading" in err
    assert "compiling" in err
    result = json.loads(out)
    assert result["model"] == str(checkpoint)
    assert [one["prompt"] for one in result["completions"]] == prompts
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    for one in result["completions"]:
        assert one["completion"] == tokenizer.decode(one["tokens"])
        assert one["finish_reason"] in ("stop", "length")
        assert len(one["logprobs"]) == len(one["tokens"]) <= 9
    stats = result["stats"]
    assert stats["prompt_tokens"] == sum(len(prompt.encode()) for prompt in prompts)
    assert stats["new_tokens"] == sum(len(one["tokens"]) for one in result["completions"])
    assert stats["executables"] == 2
    assert stats["compile_seconds"] > 0
    assert stats["tokens_per_second"] > 0
    assert 0 < stats["kv_blocks_visited"] <= stats["kv_blocks_total"]


def test_the_shipped_model_answers_its_own_tasks(run, checkpoint, monkeypatch):
    monkeypatch.setattr(loading.weights, "DIRECTORY", checkpoint)
    code, out, err = run("generate", "--max-new-tokens", 1)
    assert code == 0
    assert "completing 8 prompts" in err
    *table, figures = out.splitlines()
    assert "right answer" in table[1]
    assert max(map(len, table)) <= 80
    assert re.fullmatch(
        r"prompt tokens \d+, new tokens \d, tokens/s [\d,]+, executables compiled 2, "
        r"KV blocks visited \d+ of \d+ \(\d+\.\d%\)",
        figures,
    )
    lengths = [len(example.prompt) for example in generate._shipped_examples()]
    assert min(lengths) < 10
    assert max(lengths) > 300


def test_the_table_shows_what_was_written_and_no_more(capsys):
    completions.print_table(
        [
            completions.CompletionRow("a [bold] prompt", "[red]two\nlines", None, "stop", [], []),
            completions.CompletionRow("a" * 20 + "b" * 1100 + "\x1b", "\x1b[2J", None, "length", [], []),
        ]
    )
    out = capsys.readouterr().out
    assert "a [bold] prompt" in out
    assert "[red]two" in out
    assert "[red]two\\n" not in out
    assert "aaaaaaa .. 1124 characters .. bbb\\x1b" in out, "the escape character is four characters when shown"
    assert "\x1b" not in out
    assert "right answer" not in out


def test_an_interrupt_is_no_error(run, checkpoint, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(loading, "load_hf", interrupt)
    code, out, err = run("generate", "--model", checkpoint, "--prompt", "a")
    assert (code, out) == (130, "")
    assert "error" not in err


@pytest.mark.parametrize("terminal", [True, False])
def test_loading_shows_a_bar_only_in_a_terminal(run, checkpoint, monkeypatch, terminal):
    shown = []

    def stop(*_, progress, **__):
        shown.append(progress)
        raise KeyboardInterrupt

    monkeypatch.setattr(loading, "load_hf", stop)
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal, raising=False)
    run("generate", "--model", checkpoint, "--prompt", "a")
    assert shown == [terminal]


# --- doctor ---


def test_doctor_shows_versions_devices_and_implementations(run):
    code, out, err = run("doctor")
    assert (code, err) == (0, "")
    platform = jax.devices()[0].platform
    for word in ("python", "pallas-attn", "jax", "jaxlib", "flax", platform, "xla", "reference", "triton"):
        assert word in out
    if pa.implementations()["triton"] is not None:
        assert "no: needs an NVIDIA GPU" in out
    assert "WRONG" not in out


@pytest.mark.parametrize("wrong", ["numbers", "nan", "failure"])
def test_doctor_reports_what_is_wrong(run, monkeypatch, wrong):
    def small_attention(implementation: str) -> jax.Array:
        if wrong == "failure" and implementation == "xla":
            raise RuntimeError("no such instruction")
        return jnp.full(3, {"xla": {"numbers": 1.1, "nan": jnp.nan}.get(wrong), "reference": 1.0}[implementation])

    monkeypatch.setattr(doctor, "_small_attention", small_attention)
    code, out, _ = run("doctor")
    assert code == 1
    assert {"numbers": "1.0e-01 (WRONG)", "nan": "nan (WRONG)", "failure": "FAILED: no such"}[wrong] in out


# --- user errors ---


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the following arguments are required: COMMAND (see pallas-attn --help)"),
        (["fly"], "invalid choice: 'fly'"),
        (
            ["generate", "--top-k", "many"],
            "--top-k: invalid int value: 'many' (see pallas-attn generate --help)",
        ),
        (["generate", "--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (["generate", "--prompt", "a", "--prompts-file", "b"], "not allowed with argument"),
        (["generate", "--prompts-file", "nowhere.txt"], "nowhere.txt"),
        (["generate", "--model", "nowhere"], "--model: expected also --prompt or --prompts-file, got neither"),
        (
            ["generate", "--model", "nowhere", "--prompt", "a"],
            "--model: expected a directory with a checkpoint, got nowhere, where nothing is",
        ),
        (["generate", "--prompt", "a", "--top-p", "2"], "top_p: expected a number in (0, 1], got 2.0"),
        (["generate", "--prompt", "a", "--seed", "-1"], "seed: expected an int in [0, 4294967296), got -1"),
        (["generate", "--prompt", "a", "--max-new-tokens", "0"], "max_new_tokens: expected an int in [1, "),
    ],
    ids=" ".join,
)
def test_errors_are_one_line(run, argv, message):
    code, out, err = run(*argv)
    assert (code, out) == (2, "")
    last = err.splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--prompt", "a", "--prompt", "b" * 40, "--capacity", "40"],
            "prompts[1]: expected fewer tokens than max_length",
        ),
        (["--prompt", "a", "--prompt", ""], "prompts[1]: expected at least one token, got none"),
        (["--prompt", "a", "--batch-size", "0"], "batch_size: expected an int of at least 1, got 0"),
        (["--prompt", "a", "--capacity", "0"], "prompts[0]: expected fewer tokens than max_length=0"),
    ],
    ids=lambda x: x if isinstance(x, str) else " ".join(x),
)
def test_errors_that_need_the_model_are_one_line_too(run, checkpoint, argv, message):
    code, out, err = run("generate", "--model", checkpoint, *argv)
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith(f"error: {message}")


@pytest.mark.parametrize(("content", "message"), [(None, "found none"), ("{}", "expected a file of the tokenizers")])
def test_a_tokenizer_that_cannot_be_read(run, checkpoint, tmp_path, content, message):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(checkpoint / name)
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    code, _, err = run("generate", "--model", tmp_path, "--prompt", "a")
    assert code == 2
    assert err.splitlines()[-1].startswith(f"error: {tmp_path}/tokenizer.json: expected")
    assert message in err


@pytest.mark.skipif(pa.implementations()["triton"] is None, reason="needs a machine where Triton cannot run")
def test_an_implementation_that_cannot_run_says_why(run, checkpoint):
    code, _, err = run("generate", "--model", checkpoint, "--prompt", "a", "--implementation", "triton")
    assert code == 2
    assert "triton: needs an NVIDIA GPU" in err.splitlines()[-1]


@pytest.mark.parametrize("argv", [["--help"], ["generate", "--help"], ["doctor", "--help"]], ids=" ".join)
def test_help_gives_an_example(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == 0
    assert re.search(r"examples?:\n  pallas-attn (generate|doctor)", capsys.readouterr().out)


def test_as_a_module_in_a_terminal_that_knows_only_ascii():
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "pallas_attn_models.cli", "doctor"]
    finished = subprocess.run(command, env=environment, capture_output=True, timeout=300, check=False)
    assert finished.returncode == 0, finished.stderr.decode()
    assert b"reference" in finished.stdout
    assert finished.stdout.isascii()
