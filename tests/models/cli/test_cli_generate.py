"""``pallas-attn generate``: the effect of its options, streaming and stop strings."""

import contextlib
import io
import json
import shlex
import string
from pathlib import Path

import pytest
from flax import nnx
from tokenizers import Tokenizer, decoders, models

from pallas_attn_models import cli
from pallas_attn_models.checkpoints.hf import save_hf
from pallas_attn_models.cli import generate, loading
from pallas_attn_models.cli.completions import CompletionRow, figures, show_growing
from pallas_attn_models.decoder.config import DecoderConfig
from pallas_attn_models.decoder.decoder import Decoder
from pallas_attn_models.generation.generator import GenerationResult
from pallas_attn_models.generation.sampling import Limits, Sampling
from pallas_attn_models.generation.speculation import PromptLookup
from pallas_attn_models.generation.stats import GenerationStats

CONFIG = DecoderConfig(
    vocab_size=26,
    hidden_size=16,
    intermediate_size=16,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    eos_token_ids=(25,),
)
PROMPTS = ["--prompt", "abc", "--prompt", "hello", "--num-samples", 2, "--temperature", 2, "--max-new-tokens", 20]
STATS = GenerationStats(1, 2, 0.0, 2, 0.5, 0.5, 1, 2, 2, 0, 0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """An untrained decoder of lower-case letters; z is the end token."""
    directory = tmp_path_factory.mktemp("checkpoint")
    save_hf(Decoder(CONFIG, rngs=nnx.Rngs(0)), directory)
    letters = {letter: index for index, letter in enumerate(string.ascii_lowercase)}
    tokenizer = Tokenizer(models.BPE(letters, []))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


@pytest.fixture
def run(checkpoint, capsys):
    """Runs the command with the model: ``(exit code, stdout, stderr)``."""

    def run(*argv: object, model: Path = checkpoint) -> tuple[int, str, str]:
        code = cli.main(["generate", "--model", str(model), *map(str, argv)])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def asked(monkeypatch):
    """Records the arguments of a Generator and of its requests, without serving them."""
    calls = {}

    class Recorder:
        def __init__(self, model, **options):
            calls["made"] = options

        def warmup(self, progress):
            return 0.0

        def generate(self, prompts, samplings, **options):
            calls["prompts"], calls["samplings"], calls["asked"] = prompts, samplings, options
            n = len(prompts) * options["num_samples"]
            return GenerationResult([[0]] * n, [[-1.0]] * n, ["length"] * n, [[[(0, -1.0)]]] * n, STATS)

    monkeypatch.setattr(loading, "Generator", Recorder)
    return calls


# --- options ---


def test_every_sampling_option(run, asked):
    options = "--max-new-tokens 9 --min-new-tokens 2 --temperature 0.5 --top-k 7 --top-p 0.9 --min-p 0.1"
    options += " --repetition-penalty 1.1 --presence-penalty 0.2 --frequency-penalty 0.3 --seed 5 --logprobs 3 --json"
    code, out, _ = run("--prompt", "abc", "--prompt", "d", *options.split())
    assert code == 0
    assert asked["samplings"] == [
        Sampling(
            max_new_tokens=9,
            min_new_tokens=2,
            temperature=0.5,
            top_k=7,
            top_p=0.9,
            min_p=0.1,
            repetition_penalty=1.1,
            presence_penalty=0.2,
            frequency_penalty=0.3,
            seed=seed,
            top_logprobs=3,
        )
        for seed in (5, 6)
    ]
    assert asked["made"]["limits"] == Limits(logit_bias=0, stop_sequences=0, stop_length=1, top_logprobs=3)
    assert json.loads(out)["completions"][0]["top_logprobs"] == [[[0, -1.0]]]


def test_the_default_is_greedy(run, asked):
    code, out, _ = run("--prompt", "abc", "--json")
    assert code == 0
    assert asked["samplings"] == [Sampling()]
    assert asked["asked"] == {"negative_prompts": None, "guidance_scale": 1.0, "num_samples": 1}
    assert asked["made"]["speculation"] is None
    assert asked["made"]["batch_size"] == 8
    assert "top_logprobs" not in json.loads(out)["completions"][0]


def test_guidance_samples_and_speculation(run, asked):
    options = ["--guidance", 1.5, "--negative-prompt", "cab", "--num-samples", 5, "--seed", 3, "--speculate"]
    code, out, _ = run("--prompt", "a", "--prompt", "b", *options)
    assert code == 0
    assert asked["asked"] == {"negative_prompts": [[2, 0, 1]] * 2, "guidance_scale": 1.5, "num_samples": 5}
    assert [one.seed for one in asked["samplings"]] == [3, 8], "a seed for each completion"
    assert asked["made"]["batch_size"] == 10, "two rows for each sample of a prompt"
    assert asked["made"]["speculation"] == PromptLookup(length=8)
    assert out.count("length") == 10


def test_an_option_overrides_the_generation_config(run, asked, checkpoint, tmp_path):
    for file in checkpoint.iterdir():
        (tmp_path / file.name).symlink_to(file)
    fields = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [25, 4], "num_beams": 2}
    (tmp_path / "generation_config.json").write_text(json.dumps(fields))
    code, _, err = run("--prompt", "a", "--temperature", 0, model=tmp_path)
    assert code == 0
    assert asked["samplings"] == [Sampling(temperature=0.0, top_p=0.9, stop=(25, 4))]
    assert asked["made"]["limits"].stop_sequences == 2
    assert "generation_config.json: temperature 0.6, top_p 0.9, end tokens 25 4, not used: num_beams" in err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--logprobs 2", "--logprobs: expected --json, the only output that shows them"),
        ("--guidance 2", "--guidance, --negative-prompt: expected both or neither, got one"),
        ("--negative-prompt a", "--guidance, --negative-prompt: expected both or neither, got one"),
        ("--num-samples 0", "--num-samples: expected at least 1, got 0"),
        ("--stream --json", "not allowed with argument"),
        ("--speculate magic", "argument --speculate: invalid choice: 'magic'"),
        ("--min-p 2", "min_p: expected a number in [0, 1], got 2.0"),
        ("--num-samples 4 --batch-size 2", "num_samples: expected at most batch_size=2 rows for a prompt, got 4"),
    ],
)
def test_errors_are_one_line(run, argv, message):
    code, out, err = run("--prompt", "a", *argv.split())
    assert (code, out) == (2, "")
    assert message in err.splitlines()[-1]


def test_errors_of_empty_texts(run):
    assert (
        run("--prompt", "a", "--stop", "")[2].splitlines()[-1] == "error: --stop: expected a non-empty string, got ''"
    )
    err = run("--prompt", "a", "--guidance", 2, "--negative-prompt", "")[2]
    assert err.splitlines()[-1] == "error: negative_prompts[0]: expected at least one token, got none"


# --- streaming ---


@pytest.fixture(scope="module")
def plain(checkpoint):
    """Two completions of each of two prompts, as one JSON object."""
    return json.loads(_output(checkpoint, *PROMPTS, "--json", "--logprobs", 2))


def _output(checkpoint: Path, *argv: object) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert cli.main(["generate", "--model", str(checkpoint), "--capacity", "64", *map(str, argv)]) == 0
    return out.getvalue()


def test_streamed_text_is_that_of_a_run_at_once(checkpoint, plain, capsys):
    out = _output(checkpoint, *PROMPTS, "--stream")
    blocks = [f"[{index + 1}] {one['prompt']}\n{one['completion']}\n" for index, one in enumerate(plain["completions"])]
    assert out == "\n".join(blocks)
    assert "prompt tokens 8, new tokens" in capsys.readouterr().err


def test_a_stop_string_cuts_the_text_and_ends_the_work(checkpoint, plain):
    stop = plain["completions"][0]["completion"][4:6]
    found = json.loads(_output(checkpoint, *PROMPTS, "--json", "--logprobs", 2, "--stop", stop))
    for one, whole in zip(found["completions"], plain["completions"], strict=True):
        kept, found_stop, _ = whole["completion"].partition(stop)
        length = len(kept + found_stop)  # a token is a letter
        assert one["completion"] == kept
        assert one["finish_reason"] == ("stop" if found_stop else whole["finish_reason"])
        for name in ("tokens", "logprobs", "top_logprobs"):
            assert one[name] == whole[name][:length]
    assert len(found["completions"][0]["tokens"]) <= 6
    assert found["stats"]["turns"] < plain["stats"]["turns"]
    assert found["stats"].keys() == plain["stats"].keys()
    assert found["stats"]["prompt_tokens"] == plain["stats"]["prompt_tokens"]


def test_speculation_changes_nothing(checkpoint, plain):
    found = json.loads(_output(checkpoint, *PROMPTS, "--json", "--speculate"))
    assert [one["tokens"] for one in found["completions"]] == [one["tokens"] for one in plain["completions"]]
    assert found["stats"]["drafted"] > 0


def test_a_growing_table_ends_with_the_completions(capsys):
    shown = [CompletionRow("ab", "", None, "", [], [])]

    def events():
        yield
        shown[0] = CompletionRow("ab", "cd", None, "stop", [], [])
        yield

    show_growing(events(), lambda: shown)
    out = capsys.readouterr().out
    assert "cd" in out
    assert "stop" in out


def test_figures_report_the_acceptance_rate():
    stats = GenerationStats(1, 2, 0.0, 2, 0.5, 0.5, 1, 2, 2, 16, 4)
    assert figures(stats).endswith("draft tokens accepted 4 of 16 (25.0%)")
    assert "drafted" not in figures(STATS)


def test_examples_of_the_help_are_understood(capsys):
    with pytest.raises(SystemExit):
        cli.main(["generate", "--help"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  pallas-attn ")]
    assert len(lines) == generate._EXAMPLES.count("pallas-attn")
    for line in lines:
        args = cli._parser().parse_args(shlex.split(line)[1:])
        assert args.command is generate.run
        generate._check(args)
