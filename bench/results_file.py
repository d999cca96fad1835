"""The result file: JSON of schema 1, written after each case or step."""

import errno
import json
import os
from pathlib import Path
from typing import Any

SCHEMA = 1
# Statuses of steps that came to their end; ``resume`` tries the others again.
DONE = ("ok", "wrong")
# Fields of ``machine`` that must agree to resume a run.
_SAME = ("device", "processor", "python", "revision", "versions")


class ResultsError(Exception):
    """A result file that cannot be written or resumed, with the reason."""


class ResultsFile:
    """Results of one run.

    Args:
      path: where to write; None writes nothing.
      suite: name of the suite.
      machine: from :func:`bench.machine.describe`.
      resume: continue the existing file.

    Raises:
      ResultsError: the file cannot be written; an existing file has no schema 1; or, with ``resume``, its suite,
        machine or revision differs.
    """

    def __init__(self, path: Path | None, *, suite: str, machine: dict[str, Any], resume: bool = False) -> None:
        self.path = path
        self.suite = suite
        self.machine = machine
        self.results: list[dict[str, Any]] = []
        self.steps: list[dict[str, Any]] = []
        if path is None:
            if resume:
                raise ResultsError("--resume: expected --out, the file to continue")
            return
        before = _read(path)
        if before is not None and resume:
            self._check_same(before)
            # Cases that could not run are tried again.
            self.results = [result for result in before["results"] if result["contenders"]]
            self.steps = [step for step in before.get("steps", []) if step["status"] in DONE]
        self._scratch().unlink()  # writable; an existing file stays until there is a result

    def has(self, case: str) -> bool:
        """Whether the file has a result of the case."""
        return any(result["case"] == case for result in self.results)

    def add(self, result: dict[str, Any]) -> None:
        """Adds a case's result and writes the file."""
        self.results.append(result)
        self._write()

    def replace(self, result: dict[str, Any]) -> None:
        """Adds a case's result, in place of earlier ones of the case, and writes the file."""
        self.results = [one for one in self.results if one["case"] != result["case"]]
        self.add(result)

    def has_step(self, name: str) -> bool:
        """Whether the file has the step, and it came to its end."""
        return any(step["step"] == name and step["status"] in DONE for step in self.steps)

    def add_step(self, step: dict[str, Any]) -> None:
        """Adds what became of a step of the GPU suite, in place of an earlier try, and writes the file."""
        self.steps = [*(x for x in self.steps if x["step"] != step["step"]), step]
        self._write()

    def _check_same(self, before: dict[str, Any]) -> None:
        pairs = {"suite": (before["suite"], self.suite)}
        pairs |= {name: (before["machine"].get(name), self.machine[name]) for name in _SAME}
        for name, (old, new) in pairs.items():
            if old != new:
                raise ResultsError(f"{self.path}: cannot resume: its {name} is {old}, here it is {new}")

    def _write(self) -> None:
        """Replaces the file atomically: a reader never sees half of one. Without a path, does nothing."""
        if self.path is None:
            return
        content = {"schema": SCHEMA, "suite": self.suite, "machine": self.machine, "results": self.results}
        content |= {"steps": self.steps} if self.steps else {}
        scratch = self._scratch()
        scratch.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
        os.replace(scratch, self.path)

    def _scratch(self) -> Path:
        assert self.path is not None
        scratch = self.path.with_name(f".{self.path.name}.part")
        try:
            if self.path.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            scratch.touch()
        except OSError as error:
            raise ResultsError(f"{self.path}: cannot be written: {error.strerror}") from None
        return scratch


def _read(path: Path) -> dict[str, Any] | None:
    """The content of an existing file, or None."""
    try:
        text = path.read_text()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise ResultsError(f"{path}: cannot be read: {error}") from None
    try:
        content = json.loads(text)
    except json.JSONDecodeError:
        content = None
    schema = content.get("schema") if isinstance(content, dict) else None
    if schema != SCHEMA:
        raise ResultsError(
            f"{path}: expected a result file of schema {SCHEMA}, got {f'schema {schema}' if schema else 'none'}; "
            "move it away or choose another --out"
        )
    return content
