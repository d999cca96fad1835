"""Conversations as the text that a model was trained on, by the template that its checkpoint carries."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pallas_attn_models.text.tokenizer_config import TOKENIZER_CONFIG, TokenizerConfig
from pallas_attn_models.text_files import read_text

_FILE, _MORE_FILES = "chat_template.jinja", "additional_chat_templates"
_DEFAULT = "default"
_PROGRAM = Path(__file__).with_name("template_process.py")
_HALF = re.compile("[\ud800-\udfff]")
# What a template may take. Real ones take milliseconds and next to no memory.
_CPU_SECONDS, _SECONDS, _BYTES = 5, 60, 2**30


@dataclasses.dataclass(frozen=True, eq=False)
class ChatTemplate:
    """The chat template of a checkpoint, rendered as transformers renders it, but in a process of its own.

    It is someone's program: it gets 5 seconds of a processor and 1 GiB of memory. And a name that it writes and that
    nobody defines, ``bos_token`` for instance, is an error, where transformers writes nothing.

    Attributes:
      path: the file that it is in.
      source: its text.
      special_tokens: their texts by name, such as ``"bos_token"``.
    """

    path: Path
    source: str
    special_tokens: Mapping[str, str]

    @staticmethod
    def read(directory: str | os.PathLike[str]) -> "ChatTemplate":
        """The template of a checkpoint: ``chat_template.jinja``, or ``chat_template`` in ``tokenizer_config.json``.

        Of several templates with names (a list in the config, or ``additional_chat_templates/NAME.jinja``) it takes
        the one called ``"default"``. Files come before the config.

        Raises:
          FileNotFoundError: there is none; names what was looked for.
          ValueError: a file that cannot be read, or a template with a syntax error.
        """
        directory = Path(directory)
        config = TokenizerConfig.read(directory)
        path, source = _find(directory, config.fields.get("chat_template"))
        template = ChatTemplate(path, source, {name: token.content for name, token in config.named.items()})
        template._run(None)
        return template

    def render(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True) -> str:
        """The text of a conversation, special tokens included: encode it with ``add_special_tokens=False``.

        Args:
          messages: each with ``"role"`` (``"system"``, ``"user"``, ``"assistant"``) and ``"content"``.
          add_generation_prompt: whether the text ends where the assistant's next message begins.

        Raises:
          ValueError: the template refuses the conversation, as some do two messages of a role in a row, or fails.
        """
        given = {"messages": [dict(message) for message in messages], "tools": None, "documents": None}
        text = self._run({**self.special_tokens, **given, "add_generation_prompt": add_generation_prompt})
        if half := _HALF.search(text):
            if not any(half[0] in said for message in messages for said in message.values()):
                raise ValueError(f"{self.path}: chat template: it writes {half[0]!r}, half a character")
            raise ValueError(f"messages: expected text in UTF-8, got {half[0]!r} in it")
        return text

    def _run(self, variables: Mapping[str, Any] | None) -> str:
        # Without "site", which takes longer than Jinja; but with whatever this process finds Jinja by.
        command = [sys.executable, "-S", "-P", str(_PROGRAM), str(_CPU_SECONDS), str(_BYTES)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        asked = json.dumps({"source": self.source, "variables": variables}).encode()
        try:
            ran = subprocess.run(
                command, input=asked, capture_output=True, env=environment, timeout=_SECONDS, check=False
            )
        except subprocess.TimeoutExpired:
            raise ValueError(f"{self.path}: chat template: it takes more than {_SECONDS} seconds") from None
        if ran.returncode:
            raise ValueError(f"{self.path}: chat template: {_what_ended(ran)}")
        answer = json.loads(ran.stdout)
        if "error" in answer:
            line = "" if answer["line"] is None else f", line {answer['line']}"
            raise ValueError(f"{self.path}: chat template{line}: {answer['error']}")
        return answer["text"]


def _find(directory: Path, configured: Any) -> tuple[Path, str]:
    path, more = directory / _FILE, directory / _MORE_FILES
    files = {_DEFAULT: path} if path.exists() else {}
    files |= {one.stem: one for one in sorted(more.glob("*.jinja"))}
    if _DEFAULT in files:
        return files[_DEFAULT], read_text(files[_DEFAULT])
    if files:
        raise ValueError(f"{more}: expected one called {_DEFAULT!r}, got {', '.join(map(repr, files))}")
    path = directory / TOKENIZER_CONFIG
    if configured is None:
        looked_for = f"{_FILE}, or chat_template in {TOKENIZER_CONFIG}"
        raise FileNotFoundError(f"{directory}: expected a chat template ({looked_for}), found none")
    if isinstance(configured, list) and all(isinstance(one, dict) for one in configured):
        configured = {one.get("name"): one.get("template") for one in configured}
    configured = configured if isinstance(configured, dict) else {_DEFAULT: configured}
    named = {name: text for name, text in configured.items() if isinstance(name, str) and isinstance(text, str)}
    if len(named) < len(configured):
        raise ValueError(f"{path}: chat_template: expected a string or a list of named templates")
    if _DEFAULT not in named:
        raise ValueError(f"{path}: chat_template: expected one called {_DEFAULT!r}, got {', '.join(map(repr, named))}")
    return path, named[_DEFAULT]


def _what_ended(ran: subprocess.CompletedProcess[bytes]) -> str:
    """Why the process gave no answer, in words."""
    last = ran.stderr.decode(errors="replace").strip().rpartition("\n")[2]
    if "MemoryError" in last:
        return "it takes too much memory"
    if ran.returncode > 0:
        return last or f"its process ended with code {ran.returncode}"
    if -ran.returncode == getattr(signal, "SIGXCPU", None):
        return f"it takes more than {_CPU_SECONDS} seconds"
    return f"its process was ended by signal {-ran.returncode}"
