"""The supervisor's side of a worker process: a step with a time limit, whose process may crash or hang."""

import contextlib
import json
import os
import queue
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from bench.gpu_day.steps import Outcome

_CLOSING_SECONDS = 5.0
_LOG_BYTES = 3000


class WorkerError(Exception):
    """The process did not start, with the reason."""


class Worker:
    """A process that runs steps one after another.

    Args:
      command: runs :func:`bench.gpu_day.serving_steps.serve`.
      environment: variables that are added to those of this process.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (it lives as long as the process)
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={**os.environ, **(environment or {})},
            text=True,
            start_new_session=True,  # so that its own children can be ended with it
        )
        self._answers: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()
        self.ended = False

    def ready(self, limit: float) -> dict[str, Any]:
        """The description of the machine.

        Raises:
          WorkerError: the process ended or took longer than ``limit`` seconds.
        """
        answer, why = self._answer(time.monotonic() + limit, limit)
        if answer is None:
            raise WorkerError(why)
        return answer["ready"]

    def run(self, step: str, limit: float) -> Outcome:
        """Runs a step; ends the process if the step takes longer than ``limit`` seconds."""
        start = time.monotonic()
        found: dict[str, Any] | None = None
        doing: str | None = None
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # then the answers end, too
            self._process.stdin.write(step + "\n")
            self._process.stdin.flush()
        while True:
            answer, why = self._answer(start + limit, limit)
            seconds = time.monotonic() - start
            if answer is None:
                status = "crashed" if self.ended else "timed out"
                log = self._log()
                self.close(kill=True)
                return Outcome(status, seconds, why, found, doing, log)
            if "lost" in answer and "done" not in answer:
                log = self._log()
                self.close(kill=True)
                return Outcome("crashed", seconds, f"the GPU: {answer['lost']}", found, doing, log)
            doing = answer.get("doing", doing)
            found = answer.get("so_far", found)
            if "done" in answer:
                done = answer["done"]
                log = self._log() if done["status"] == "failed" else None
                if "lost" in answer:
                    self.close(kill=True)
                return Outcome(done["status"], seconds, done.get("why"), done.get("found", found), doing, log)

    def close(self, *, kill: bool = False) -> None:
        """Ends the process; without ``kill`` it may finish."""
        self.ended = True
        with contextlib.suppress(BrokenPipeError):
            assert self._process.stdin is not None
            self._process.stdin.close()
        if not kill:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_CLOSING_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._listener.join()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._errors.close()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(json.loads(line))
        self._answers.put(None)

    def _answer(self, deadline: float, limit: float) -> tuple[dict[str, Any] | None, str]:
        """The next answer; or None and the reason, if there is none until the deadline."""
        try:
            answer = self._answers.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            return None, f"took more than {limit:.0f} s"
        if answer is not None:
            return answer, ""
        self.ended = True
        code = self._process.wait()
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return None, f"its process ended by {how}: {self._last_words()}"

    def _log(self) -> str:
        """The end of standard error."""
        self._errors.seek(max(0, self._errors.seek(0, os.SEEK_END) - _LOG_BYTES))
        return self._errors.read().decode(errors="replace")

    def _last_words(self) -> str:
        lines = (line.strip()[:300] for line in reversed(self._log().split("\n")))
        return next(filter(None, lines), "nothing on standard error")
