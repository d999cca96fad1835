"""Chat templates: their locations, and the output of transformers."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from pallas_attn_models.text import chat_template
from pallas_attn_models.text.chat_template import ChatTemplate

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1 < 2 & \u00e9\n?"},
    {"role": "assistant", "content": " Yes. "},
    {"role": "user", "content": "'Why' \"so\"?"},
]

# Written for these tests, each with the features of a family of published templates.
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
    "tools, json, namespaces, names that may be undefined": """\
{% set ns = namespace(count=0) %}
{% for message in messages %}
{% set ns.count = ns.count + 1 %}
{{ message | tojson }},{{ message | tojson(indent=2) }}
{% endfor %}
{{ ns.count }}{{ tools is none }}{{ documents is none }}{{ unk_token }}
{{ custom is defined }}{{ nothing | default("-") }}
{% if enable_thinking %}{{ enable_thinking }}{% endif %}{{ messages[0].name }}
{% if messages | length > 9 %}{% set late = 1 %}{% endif %}{{ late }}
""",
    "what the assistant says, marked": """\
{% for message in messages %}
{% if message.role == "assistant" %}{% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}
{% else %}
{{ message.content }}{% endif %}
{% endfor %}
""",
    "macros, tests, filters": """\
{%- macro said(message, mark="*") -%}
{{ mark }}{{ caller() if caller else "" }}{{ message.content.split("?")[0].strip() | replace("e", "E") }}
{%- endmacro %}
{%- set users = messages | selectattr("role", "equalto", "user") | list %}
{%- if not tools is defined %}{% set tools = none %}{% endif %}
{%- for message in messages if message.role != "system" -%}
{{ said(message) }}{{ said(message, mark=loop.index) }}{{ message == users[-1] }}{{ message.tool_calls is defined }}
{%- call said(message) %}<{{ loop.last }}>{% endcall %}
{%- endfor %}
{{- messages[1:] | map(attribute="role") | join(",") ~ (tools or "no tools") }}
{{- dict(a=1) | tojson(separators=(",", ":")) }}
{{- {"b": "\u00e9<", "a": [1, none]} | tojson(sort_keys=true, ensure_ascii=true) | indent(2) }}{{ range(3) | list }}
""",
    "what is set in what the assistant says": """\
{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{{ messages[0].content }}{% endgeneration %}{{ x }}
{%- for a in [[1, [2]]] recursive %}{{ a is iterable }}{{ loop(a) if a is iterable and a is not string }}{% endfor %}
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
def test_it_renders_like_transformers(tmp_path, name, add_generation_prompt):
    transformers = pytest.importorskip("transformers")
    save(tmp_path, TEMPLATES[name])
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    expected = theirs.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=add_generation_prompt)
    assert ChatTemplate.read(tmp_path).render(MESSAGES, add_generation_prompt=add_generation_prompt) == expected


def test_in_words(tmp_path):
    """The same test without transformers installed."""
    save(tmp_path, TEMPLATES["headers, special tokens, trimmed content"])
    assert ChatTemplate.read(tmp_path).render(MESSAGES[2:]) == (
        "<s><|start|>assistant<|end|>\n\nYes.</s><|start|>user<|end|>\n\n'Why' \"so\"?</s><|start|>assistant<|end|>\n\n"
    )


def test_a_file_of_its_own_comes_first(tmp_path):
    save(tmp_path, "from the config")
    (tmp_path / "chat_template.jinja").write_text("from the file, {{ bos_token }}")
    assert ChatTemplate.read(tmp_path).render(MESSAGES) == "from the file, <s>"


@pytest.mark.parametrize(
    ("configured", "files", "expected"),
    [
        ([{"name": "tool_use", "template": "t"}, {"name": "default", "template": "{{ eos_token }}!"}], {}, "</s>!"),
        ({"tool_use": "t", "default": "d"}, {}, "d"),
        ("config", {"chat_template.jinja": "file"}, "file"),
        ("config", {"chat_template.jinja": "file", "additional_chat_templates/tool_use.jinja": "t"}, "file"),
        ("config", {"additional_chat_templates/default.jinja": "more"}, "more"),
        ("config", {"chat_template.jinja": "f", "additional_chat_templates/default.jinja": "more"}, "more"),
        (
            "config",
            {"additional_chat_templates/tool_use.jinja": "t"},
            "expected a template called 'default', got 'tool_use'",
        ),
        ("config", {"chat_template.jinja": "a\r\nb\rc\n"}, "a\nb\nc"),
    ],
    ids=str,
)
def test_several_templates_have_the_precedence_of_transformers(tmp_path, configured, files, expected):
    save(tmp_path, configured)
    (tmp_path / "additional_chat_templates").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_bytes(text.encode())
    if "expected" in expected:
        with pytest.raises(ValueError, match=expected):
            ChatTemplate.read(tmp_path)
        return
    assert ChatTemplate.read(tmp_path).render(MESSAGES) == expected
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.apply_chat_template(MESSAGES, tokenize=False) == expected


def test_a_byte_order_mark_is_no_part_of_a_template(tmp_path):
    save(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes("\ufeff{{ bos_token }}\u00e9".encode("utf-8-sig")[3:])
    assert ChatTemplate.read(tmp_path).render(MESSAGES) == "<s>\u00e9"


# --- undefined names ---


@pytest.mark.parametrize(
    "template",
    [
        "a\n{{ nobody }}",
        "a\n{{ nobody ~ 'x' }}",
        "a\n{{ 'x' + nobody }}",
        "a\n{{ nobody | trim }}",
        "a\n{{ ['x', nobody] | join }}",
        "a\n{% for m in messages %}{{ nobody }}{% endfor %}",
        "a\n{% macro f() %}{{ nobody }}{% endmacro %}{{ f() }}",
        "a\n{{ 'x' if false else nobody }}",
        "a\n{% set x = nobody %}{{ x }}",
    ],
)
def test_an_undefined_name_is_an_error_with_its_line(tmp_path, template):
    """Intended: transformers writes nothing, and a prompt without its BOS looks valid."""
    save(tmp_path, template)
    with pytest.raises(ValueError, match=r"tokenizer_config.json: chat template, line 2: 'nobody' is undefined"):
        ChatTemplate.read(tmp_path).render(MESSAGES)


# --- hostile templates ---

HOSTILE = {
    "divides by zero": ("{{ 1 / 0 }}", "ZeroDivisionError: division by zero"),
    "long range": ("{% for i in range(10**9) %}{% endfor %}", "Range too big"),
    "macro without end": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recurses without end"),
    "loop without end": ("{% for a in [[1]] recursive %}{{ loop([a]) }}{% endfor %}", "recurses without end"),
    "brackets": ("{{ " + "(" * 50000 + "1" + ")" * 50000 + " }}", "nested too deeply"),
    "long product": ("{{ 'x' * 10**10 }}", "too much memory"),
    "long product of a message": ("{{ messages[0].content * 10**10 }}", "too much memory"),
    "long list": ("{{ [0] * 10**10 }}", "too much memory"),
    "wide method": ("{{ messages[0].content.center(10**10) }}", "too much memory"),
    "wide format": ("{{ '%10000000000d' % 1 }}", "too much memory"),
    "wide format method": ("{{ '{:10000000000}'.format(1) }}", "too much memory"),
    "wide format filter": ("{{ '%10000000000d' | format(1) }}", "too much memory"),
    "wide join": ("{{ range(99999) | join('x' * 10**6) }}", "too much memory"),
    "long output": ("{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}", "at most 16777216 characters"),
    "wrong kinds": ("{{ [1, 'a'] | sort }}", "TypeError: "),
    "unknown filter": ("{{ 1 | nothing }}", "No filter named 'nothing'"),
    "another file": ("{% include '/etc/passwd' %}", "TypeError: no loader"),
    "loops in loops": ("{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3, "more than 1 seconds"),
    "doubling": (
        "{% set ns = namespace(s='x') %}{% for i in range(64) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
        "too much memory|more than 1 seconds",
    ),
    "power": ("{% set n = messages | length + 9 %}{{ n ** (n ** n) }}", "more than 1 seconds"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_template_gets_bounded_time_and_memory(tmp_path, monkeypatch, name):
    monkeypatch.setattr(chat_template, "_CPU_SECONDS", 1)
    template, message = HOSTILE[name]
    (tmp_path / "chat_template.jinja").write_text(template)
    with pytest.raises(ValueError, match=f"(?s)chat_template.jinja: chat template.*: .*({message})") as raised:
        ChatTemplate.read(tmp_path).render(MESSAGES[1:2])
    assert len(str(raised.value)) < 2000


def test_a_template_cannot_leave_its_sandbox(tmp_path):
    save(tmp_path, "{{ messages.__class__.__mro__ }}")
    with pytest.raises(ValueError, match="chat template, line 1: access to attribute '__class__'"):
        ChatTemplate.read(tmp_path).render(MESSAGES)
    save(tmp_path, "{{ messages.append(1) }}")
    with pytest.raises(ValueError, match="chat template, line 1: "):
        ChatTemplate.read(tmp_path).render(MESSAGES)


def test_a_template_rejects_in_its_own_words(tmp_path):
    save(tmp_path, "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ValueError, match=r"/tokenizer_config\.json: chat template: roles must alternate$"):
        ChatTemplate.read(tmp_path).render(MESSAGES)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, r"expected a chat template \(chat_template.jinja, or chat_template in tokenizer_config.json\), found"),
        (
            [{"name": "a", "template": ""}, {"name": "b", "template": ""}],
            "expected a template called 'default', got 'a', 'b'",
        ),
        ({"a": 1}, "tokenizer_config.json: chat_template: expected a string or a list of named templates"),
        (7, "tokenizer_config.json: chat_template: expected a string or a list of named templates"),
        ("a\n{% if %}", "tokenizer_config.json: chat template, line 2: "),
    ],
    ids=str,
)
def test_an_invalid_template(tmp_path, template, message):
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
