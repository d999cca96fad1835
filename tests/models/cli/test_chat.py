"""Conversations: the model's input, the messages kept, and user commands."""

import io
import json
import signal
from pathlib import Path

import pytest
from flax import nnx
from tokenizers import processors

from pallas_attn_models import cli
from pallas_attn_models.checkpoints.hf import load_hf, save_hf
from pallas_attn_models.cli import chat
from pallas_attn_models.decoder.config import DecoderConfig
from pallas_attn_models.decoder.decoder import Decoder
from pallas_attn_models.generation.generator import Generator
from pallas_attn_models.generation.sampling import Sampling
from pallas_attn_models.text.chat_template import ChatTemplate
from tests.models.scripted import ScriptedGenerator, byte_tokenizer

SPECIAL = ["<s>", "<end>", "<user>", "<system>", "<assistant>"]
TOKENIZER = byte_tokenizer(SPECIAL)
TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message.content == "refuse" %}{{ raise_exception("this is refused") }}{% endif %}
    {{- "<" + message.role + ">" + message.content + eos_token }}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<assistant>" }}{% endif %}"""
CONFIG = DecoderConfig(
    vocab_size=256 + len(SPECIAL),
    hidden_size=16,
    intermediate_size=16,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    max_position_embeddings=160,
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """An untrained model with a chat template. Its tokenizer adds a BOS to every text."""
    directory = tmp_path_factory.mktemp("checkpoint")
    save_hf(Decoder(CONFIG, rngs=nnx.Rngs(0)), directory)
    tokenizer = byte_tokenizer(SPECIAL)
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 256)])
    tokenizer.save(str(directory / "tokenizer.json"))
    fields = {"bos_token": "<s>", "eos_token": "<end>", "chat_template": TEMPLATE}
    fields["tokenizer_class"] = "PreTrainedTokenizerFast"
    (directory / "tokenizer_config.json").write_text(json.dumps(fields))
    return directory


def encode(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False).ids


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def talk(checkpoint, monkeypatch, capsys):
    """Sends lines to a conversation with scripted answers: ``(generator, chat, stdout, stderr)``."""

    def talk(lines: list[str], answers: list[str], *, terminal: bool = False, max_length: int = 1000, **options):
        generator = ScriptedGenerator([encode(answer) for answer in answers], max_length)
        sampling = options.pop("sampling", Sampling(max_new_tokens=500))
        one = chat.Chat(generator, TOKENIZER, ChatTemplate.read(checkpoint), sampling, **options)
        text = "".join(f"{line}\n" for line in lines)
        monkeypatch.setattr("sys.stdin", Terminal(text) if terminal else io.StringIO(text))
        one.run()
        return generator, one, *capsys.readouterr()

    return talk


def test_the_model_sees_the_whole_conversation(talk):
    generator, one, out, err = talk(["Hello", "", "  And you? "], ["Hi.\nWell?", "Me too"], system="Be brief")
    first = "<s><system>Be brief<end><user>Hello<end><assistant>"
    second = first + "Hi.\nWell?<end><user>And you?<end><assistant>"
    assert [prompt for prompt, _ in generator.asked] == [encode(first), encode(second)]
    assert encode(first)[0] == 256
    assert encode(first)[1] != 256, "one BOS"
    assert (out, err) == ("Hi.\nWell?\nMe too\n", "")
    assert one.messages[-1] == {"role": "assistant", "content": "Me too"}


def test_each_answer_has_its_own_seed(talk):
    generator, *_ = talk(["a", "b"], ["x", "y"], sampling=Sampling(seed=2**32 - 1, temperature=1.0))
    assert [sampling.seed for _, sampling in generator.asked] == [2**32 - 1, 0]


def test_commands(talk):
    generator, _, out, err = talk(["a", "/reset", "/what", "/etc/hosts is a file", "/exit", "b"], ["x", "y"])
    assert [prompt for prompt, _ in generator.asked] == [
        encode("<s><user>a<end><assistant>"),
        encode("<s><user>/etc/hosts is a file<end><assistant>"),
    ]
    assert out == "x\ny\n"
    assert err.splitlines() == ["new conversation", "/what: expected a message, /reset or /exit"]


def test_a_reset_keeps_the_system_message(talk):
    _, one, *_ = talk(["a", "/reset"], ["x"], system="Be brief")
    assert one.messages == [{"role": "system", "content": "Be brief"}]


def test_a_stop_string_is_not_part_of_the_conversation(talk):
    _, one, out, _ = talk(["a"], ["One. Two."], stop=["."])
    assert out == "One\n"
    assert one.messages[-1]["content"] == "One"


def test_control_characters_do_not_reach_the_terminal(talk):
    _, one, out, _ = talk(["a"], ["\x1b[2J\tb"])
    assert out == "\\x1b[2J\tb\n"
    assert one.messages[-1]["content"] == "\x1b[2J\tb"


@pytest.mark.parametrize("terminal", [True, False])
def test_a_conversation_longer_than_the_cache(talk, terminal, capsys):
    message = r"the conversation has 28 tokens and the cache holds 20: /reset starts a new one, and --capacity makes"
    lines, answers = ["short", "longer than it", "b"], ["x", "y"]
    if not terminal:
        with pytest.raises(ValueError, match=message):
            talk(lines, answers, max_length=20)
        assert capsys.readouterr().out == "x\n"
        return
    generator, _, _, err = talk(lines, answers, terminal=True, max_length=20)
    assert message in err
    assert generator.asked[1][0] == encode("<s><user>short<end><assistant>x<end><user>b<end><assistant>")


def test_a_rejected_message_is_not_kept(talk):
    _, one, _, err = talk(["refuse", "a"], ["x"], terminal=True)
    assert "/tokenizer_config.json: chat template: this is refused" in err
    assert [message["content"] for message in one.messages] == ["a", "x"]


def test_an_answer_that_is_cut_says_so(talk):
    *_, err = talk(["a"], ["much"], sampling=Sampling(max_new_tokens=2))
    assert err == "cut after --max-new-tokens 2\n"


def test_ctrl_c_stops_the_answer_and_keeps_it(talk, monkeypatch):
    step = ScriptedGenerator.step

    def interrupted(self, interval=64):
        step(self, interval)
        if self.rounds == 3:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(ScriptedGenerator, "step", interrupted)
    before = signal.getsignal(signal.SIGINT)
    _, one, out, _ = talk(["a", "b"], ["endless", "second"])
    assert out == "end\nsecond\n"
    assert [message["content"] for message in one.messages] == ["a", "end", "b", "second"]
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_ctrl_c_ends_the_program(talk, monkeypatch):
    def interrupted(self, interval=64):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(ScriptedGenerator, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        talk(["a"], ["endless"])


def test_ctrl_c_at_the_prompt_leaves_the_line_and_ctrl_d_the_program(talk, monkeypatch):
    typed = iter([KeyboardInterrupt, "a", EOFError])

    def read(prompt: str) -> str:
        assert prompt == "> "
        line = next(typed)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", read)
    generator, *_ = talk([], ["x"], terminal=True)
    assert len(generator.asked) == 1


# --- with a model ---


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the command: ``(exit code, stdout, stderr)``."""

    def run(lines: str, *argv: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO(lines))
        code = cli.main(["chat", *map(str, argv)])
        return code, *capsys.readouterr()

    return run


def test_the_answer_continues_the_rendered_template(run, checkpoint, monkeypatch):
    asked, submit = [], Generator.submit
    monkeypatch.setattr(Generator, "submit", lambda self, *request: asked.append(request[0]) or submit(self, *request))
    code, out, err = run("Hi\n", "--model", checkpoint, "--max-new-tokens", 12, "--temperature", 1.5, "--seed", 5)
    assert code == 0
    assert "loading" in err
    prompt = encode("<s><user>Hi<end><assistant>")
    assert asked == [prompt], "one BOS, that of the template"
    generator = Generator(load_hf(checkpoint, "float32"), batch_size=1, capacity=160)
    result = generator.generate([prompt], Sampling(12, 1.5, seed=5), stop=TOKENIZER.token_to_id("<end>"))
    text = TOKENIZER.decode(result.tokens[0])
    assert out == chat.printable(text, keep="\n\t") + "\n"
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(checkpoint)
    message = [{"role": "user", "content": "Hi"}]
    assert theirs.apply_chat_template(message, add_generation_prompt=True)["input_ids"] == prompt


def test_generation_config_and_the_end_of_a_turn(run, checkpoint, tmp_path, monkeypatch):
    for file in checkpoint.iterdir():
        (tmp_path / file.name).symlink_to(file)
    defaults = {"do_sample": True, "temperature": 0.6, "top_k": 40, "eos_token_id": [7, 9]}
    (tmp_path / "generation_config.json").write_text(json.dumps(defaults))
    samplings = []
    monkeypatch.setattr(chat.Chat, "run", lambda self: samplings.append(self._sampling) or 0)
    code, _, err = run("", "--model", tmp_path, "--temperature", 0.2)
    assert code == 0
    assert "generation_config.json: temperature 0.6, top_k 40, end tokens 7 9" in err
    (sampling,) = samplings
    assert (sampling.temperature, sampling.top_k) == (0.2, 40), "an option wins over the file"
    assert {*sampling.stop} == {7, 9, TOKENIZER.token_to_id("<end>")}


def test_a_long_answer_says_that_the_cache_is_full(run, checkpoint):
    code, _, err = run("Hi\n", "--model", checkpoint, "--capacity", 32, "--min-new-tokens", 100)
    assert code == 0
    assert "cut: the cache holds 32 tokens; /reset starts a new conversation" in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        (
            "tokenizer_config.json",
            "expected a chat template (chat_template.jinja, or chat_template in tokenizer_co",
        ),
        ("tokenizer.json", "expected the model's tokenizer, found none"),
        ("config.json", "expected a JSON file, found none"),
    ],
)
def test_a_directory_without_something(run, checkpoint, tmp_path, missing, message):
    for file in checkpoint.iterdir():
        if file.name != missing:
            (tmp_path / file.name).symlink_to(file)
    code, out, err = run("Hi\n", "--model", tmp_path)
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith("error: ")
    assert message in err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the following arguments are required: --model (see pallas-attn chat --help)"),
        (["--model", ".", "--stop", ""], "--stop: expected a non-empty string, got ''"),
        (["--model", ".", "--top-p", "2"], "top_p: expected a number in (0, 1], got 2.0"),
    ],
    ids=" ".join,
)
def test_errors_are_one_line(run, argv, message):
    code, out, err = run("Hi\n", *argv)
    assert (code, out) == (2, "")
    assert message in err.splitlines()[-1]


def test_a_message_too_long_for_a_script_is_an_error(run, checkpoint):
    code, out, err = run("Hi" * 40 + "\n", "--model", checkpoint, "--capacity", 32)
    assert (code, out) == (2, "")
    assert "the conversation has 84 tokens and the cache holds 32" in err.splitlines()[-1]


def test_help_gives_an_example(capsys):
    with pytest.raises(SystemExit):
        cli.main(["chat", "--help"])
    assert "examples:\n  pallas-attn chat --model" in capsys.readouterr().out
