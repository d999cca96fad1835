"""Formats conversations with the chat template of a checkpoint."""

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
_SURROGATE = re.compile("[\ud800-\udfff]")
# Limits for a template. Real ones take milliseconds and almost no memory.
_CPU_SECONDS, _SECONDS, _BYTES = 5, 60, 2**30


@dataclasses.dataclass(frozen=True, eq=False)
class ChatTemplate:
    """The chat template of a checkpoint, rendered like transformers, but in a separate process.

    A template is an untrusted program, limited to 5 seconds of CPU time and 1 GiB of memory. Writing an undefined name,
    such as ``bos_token``, is an error; transformers would write nothing.

    Attributes:
      path: the file that contains the template.
      source: the template's text.
      special_tokens: texts of the special tokens by name, such as ``"bos_token"``.
    """

    path: Path
    source: str
    special_tokens: Mapping[str, str]

    @staticmethod
    def read(directory: str | os.PathLike[str]) -> "ChatTemplate":
        """Reads ``chat_template.jinja`` or ``chat_template`` in ``tokenizer_config.json``; files take precedence.

        Of several named templates (a list in the config, or ``additional_chat_templates/NAME.jinja``), uses the one
        called ``"default"``.

        Raises:
          FileNotFoundError: no template; names the expected files.
          ValueError: an unreadable file, or a template with a syntax error.
        """
        directory = Path(directory)
        config = TokenizerConfig.read(directory)
        path, source = _find(directory, config.fields.get("chat_template"))
        template = ChatTemplate(path, source, {name: token.content for name, token in config.named.items()})
        template._run(None)
        return template

    def render(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True) -> str:
        """The text of a conversation with special tokens; encode it with ``add_special_tokens=False``.

        Args:
          messages: each with ``"role"`` (``"system"``, ``"user"``, ``"assistant"``) and ``"content"``.
          add_generation_prompt: whether to end with the header of the assistant's next message.

        Raises:
          ValueError: the template fails or rejects the conversation, for example two messages of a role in a row.
        """
        given = {"messages": [dict(message) for message in messages], "tools": None, "documents": None}
        text = self._run({**self.special_tokens, **given, "add_generation_prompt": add_generation_prompt})
        if surrogate := _SURROGATE.search(text):
            if not any(surrogate[0] in value for message in messages for value in message.values()):
                raise ValueError(f"{self.path}: chat template: expected Unicode output, got {surrogate[0]!r} in it")
            raise ValueError(f"messages: expected text in UTF-8, got {surrogate[0]!r} in it")
        return text

    def _run(self, variables: Mapping[str, Any] | None) -> str:
        # Skip "site", which is slower to import than Jinja, but pass on this process's module path.
        command = [sys.executable, "-S", "-P", str(_PROGRAM), str(_CPU_SECONDS), str(_BYTES)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        request = json.dumps({"source": self.source, "variables": variables}).encode()
        try:
            process = subprocess.run(
                command, input=request, capture_output=True, env=environment, timeout=_SECONDS, check=False
            )
        except subprocess.TimeoutExpired:
            raise ValueError(f"{self.path}: chat template: it takes more than {_SECONDS} seconds") from None
        if process.returncode:
            raise ValueError(f"{self.path}: chat template: {_failure(process)}")
        response = json.loads(process.stdout)
        if "error" in response:
            line = "" if response["line"] is None else f", line {response['line']}"
            raise ValueError(f"{self.path}: chat template{line}: {response['error']}")
        return response["text"]


def _find(directory: Path, configured: Any) -> tuple[Path, str]:
    path, more = directory / _FILE, directory / _MORE_FILES
    files = {_DEFAULT: path} if path.exists() else {}
    files |= {one.stem: one for one in sorted(more.glob("*.jinja"))}
    if _DEFAULT in files:
        return files[_DEFAULT], read_text(files[_DEFAULT])
    if files:
        raise ValueError(f"{more}: expected a template called {_DEFAULT!r}, got {', '.join(map(repr, files))}")
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
        got = ", ".join(map(repr, named))
        raise ValueError(f"{path}: chat_template: expected a template called {_DEFAULT!r}, got {got}")
    return path, named[_DEFAULT]


def _failure(process: subprocess.CompletedProcess[bytes]) -> str:
    """The reason why the process failed, in words."""
    last = process.stderr.decode(errors="replace").strip().rpartition("\n")[2]
    if "MemoryError" in last:
        return "it takes too much memory"
    if process.returncode > 0:
        return last or f"its process ended with code {process.returncode}"
    if -process.returncode == getattr(signal, "SIGXCPU", None):
        return f"it takes more than {_CPU_SECONDS} seconds"
    return f"its process was killed by signal {-process.returncode}"
