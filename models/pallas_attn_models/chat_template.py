"""Conversations as the text that a model was trained on, by the template that its checkpoint carries."""

import dataclasses
import datetime
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from pallas_attn_models.checkpoint import read_json

_FILE, _TOKENIZER_CONFIG = "chat_template.jinja", "tokenizer_config.json"
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclasses.dataclass(frozen=True, eq=False)
class ChatTemplate:
    """The chat template of a checkpoint, rendered as transformers renders it: in a sandbox, as it is someone's program.

    Attributes:
      template: compiled.
      special_tokens: their texts by name, such as ``"bos_token"``.
    """

    template: jinja2.Template
    special_tokens: Mapping[str, str]

    @staticmethod
    def read(directory: str | os.PathLike[str]) -> "ChatTemplate":
        """The template of a checkpoint: ``chat_template.jinja``, or ``chat_template`` in ``tokenizer_config.json``.

        Of several templates with names it takes the one called ``"default"``.

        Raises:
          FileNotFoundError: there is none; names what was looked for.
          ValueError: a file that cannot be read, or a template with a syntax error.
        """
        directory = Path(directory)
        config_path = directory / _TOKENIZER_CONFIG
        config = read_json(config_path) if config_path.is_file() else {}
        path = directory / _FILE
        if path.is_file():
            source = path.read_text(encoding="utf-8")
        else:
            path, source = config_path, _source(config_path, config.get("chat_template"))
        if source is None:
            looked_for = f"{_FILE}, or chat_template in {_TOKENIZER_CONFIG}"
            raise FileNotFoundError(f"{directory}: expected a chat template ({looked_for}), found none")
        try:
            template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"{path}: chat template, line {error.lineno}: {error.message}") from error
        return ChatTemplate(template, _special_tokens(config))

    def render(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True) -> str:
        """The text of a conversation, special tokens included: encode it with ``add_special_tokens=False``.

        Args:
          messages: each with ``"role"`` (``"system"``, ``"user"``, ``"assistant"``) and ``"content"``.
          add_generation_prompt: whether the text ends where the assistant's next message begins.

        Raises:
          ValueError: the template refuses the conversation, as some do two messages of a role in a row.
        """
        given = {"messages": [dict(message) for message in messages], "tools": None, "documents": None}
        try:
            return self.template.render(**self.special_tokens, **given, add_generation_prompt=add_generation_prompt)
        except jinja2.TemplateError as error:
            raise ValueError(f"chat template: {error.message}") from error


def _source(path: Path, value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    try:
        named = {one["name"]: one["template"] for one in value}
    except (TypeError, KeyError) as error:
        raise ValueError(f"{path}: chat_template: expected a string or a list of named templates") from error
    if "default" not in named:
        raise ValueError(f"{path}: chat_template: expected one called 'default', got {', '.join(map(repr, named))}")
    return named["default"]


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """A token is its text, or an object with its text as ``"content"``."""
    found = {}
    for name in _SPECIAL_TOKENS:
        token = config.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            found[name] = token
    return found


def _environment() -> jinja2.Environment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _raise, "strftime_now": _now}
    return environment


class _Generation(jinja2.ext.Extension):
    """``{% generation %} .. {% endgeneration %}`` marks what the assistant said, for training; here it is its body."""

    tags = {"generation"}  # noqa: RUF012 (as Jinja declares it)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(value: Any, ensure_ascii: bool = False, **layout: Any) -> str:
    # Jinja's own escapes what HTML would misread.
    return json.dumps(value, ensure_ascii=ensure_ascii, **layout)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)
