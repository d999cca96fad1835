"""Chat templates: where they are found, and that they write what transformers writes."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from pallas_attn_models.chat_template import ChatTemplate

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1 < 2 & \u00e9\n?"},
    {"role": "assistant", "content": " Yes. "},
    {"role": "user", "content": "'Why' \"so\"?"},
]

# Written for these tests, each with what published templates of a family do.
TEMPLATES = {
    "headers, special tokens, trimmed content": """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|start|>' + message['role'] + '<|end|>\\n\\n' + message['content'] | trim + eos_token }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start|>assistant<|end|>\\n\\n' }}
{%- endif %}
""",
    "blocks on lines of their own": """\
{% for message in messages %}
    {% if loop.first and message.role == "system" %}
{{ message.content }}
        {% continue %}
    {% endif %}
[{{ message.role | upper }}] {{ message.content }}
    {% if loop.index0 > 5 %}
        {% break %}
    {% endif %}
{% endfor %}
{% if add_generation_prompt %}[ASSISTANT]{% endif %}
""",
    "tools, json, namespaces, undefined names": """\
{% set ns = namespace(count=0) %}
{% for message in messages %}
{% set ns.count = ns.count + 1 %}
{{ message | tojson }},{{ message | tojson(indent=2) }}
{% endfor %}
{{ ns.count }}{{ tools is none }}{{ documents is none }}{{ unk_token }}{{ custom is defined }}{{ nothing }}
""",
    "what the assistant says, marked": """\
{% for message in messages %}
{% if message.role == "assistant" %}{% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}
{% else %}
{{ message.content }}{% endif %}
{% endfor %}
""",
    "the date": "{{ strftime_now('%Y') | length }} {{ strftime_now('%d %b %Y') }}{{ messages[0].content }}",
}


def save(directory: Path, template: object = None, **config: object) -> Path:
    """A tokenizer that knows a few characters, with its config."""
    vocabulary = {token: index for index, token in enumerate(["<s>", "</s>", "<unk>", *"abcdefgh"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(directory / "tokenizer.json"))
    fields = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": {"__type": "AddedToken", "content": "</s>", "special": True},
        "unk_token": "<unk>",
        "pad_token": None,
        **({} if template is None else {"chat_template": template}),
        **config,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(fields))
    return directory


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("name", TEMPLATES)
def test_it_writes_what_transformers_writes(tmp_path, name, add_generation_prompt):
    transformers = pytest.importorskip("transformers")
    save(tmp_path, TEMPLATES[name])
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    expected = theirs.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=add_generation_prompt)
    assert ChatTemplate.read(tmp_path).render(MESSAGES, add_generation_prompt=add_generation_prompt) == expected


def test_in_words(tmp_path):
    """The same claim where transformers is not installed."""
    save(tmp_path, TEMPLATES["headers, special tokens, trimmed content"])
    assert ChatTemplate.read(tmp_path).render(MESSAGES[2:]) == (
        "<s><|start|>assistant<|end|>\n\nYes.</s><|start|>user<|end|>\n\n'Why' \"so\"?</s><|start|>assistant<|end|>\n\n"
    )


def test_a_file_of_its_own_comes_first(tmp_path):
    save(tmp_path, "from the config")
    (tmp_path / "chat_template.jinja").write_text("from the file, {{ bos_token }}")
    assert ChatTemplate.read(tmp_path).render(MESSAGES) == "from the file, <s>"


def test_of_several_the_default(tmp_path):
    save(tmp_path, [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "{{ eos_token }}!"}])
    assert ChatTemplate.read(tmp_path).render(MESSAGES) == "</s>!"


def test_a_template_cannot_leave_its_sandbox(tmp_path):
    save(tmp_path, "{{ messages.__class__.__mro__ }}")
    with pytest.raises(ValueError, match="chat template: access to attribute '__class__'"):
        ChatTemplate.read(tmp_path).render(MESSAGES)
    save(tmp_path, "{{ messages.append(1) }}")
    with pytest.raises(ValueError, match="chat template: "):
        ChatTemplate.read(tmp_path).render(MESSAGES)


def test_what_a_template_refuses_is_said_in_its_words(tmp_path):
    save(tmp_path, "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ValueError, match=r"^chat template: roles must alternate$"):
        ChatTemplate.read(tmp_path).render(MESSAGES)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, r"expected a chat template \(chat_template.jinja, or chat_template in tokenizer_config.json\), found"),
        ([{"name": "a", "template": ""}, {"name": "b", "template": ""}], "expected one called 'default', got 'a', 'b'"),
        ({"a": 1}, "tokenizer_config.json: chat_template: expected a string or a list of named templates"),
        (7, "tokenizer_config.json: chat_template: expected a string or a list of named templates"),
        ("a\n{% if %}", "tokenizer_config.json: chat template, line 2: "),
    ],
    ids=str,
)
def test_a_template_that_is_none(tmp_path, template, message):
    save(tmp_path, template)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        ChatTemplate.read(tmp_path)


@pytest.mark.parametrize(("content", "message"), [("{", "expected JSON"), ("[]", "expected a JSON object, got list")])
def test_a_config_that_cannot_be_read(tmp_path, content, message):
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(ValueError, match=f"tokenizer_config.json: {message}"):
        ChatTemplate.read(tmp_path)


def test_an_empty_directory(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"chat_template\.jinja"):
        ChatTemplate.read(tmp_path)
