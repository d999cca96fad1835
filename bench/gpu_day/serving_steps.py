"""The side of a worker process: takes the name of a step per line, and answers in lines of JSON. Imports no JAX.

Answers: ``{"ready": description}`` once; then, for each step, any number of ``{"doing": contender}`` and ``{"so_far":
result}``, and ``{"done": {"status", "why", "found"}}``. An answer with ``"lost": reason`` is the last one: the GPU
fails every later call, as after an access outside of its memory.
"""

import json
import os
import sys
import traceback
from collections.abc import Callable, Iterable
from typing import Any, Protocol, TextIO

from bench.times.watcher import Watcher

Send = Callable[[dict[str, Any]], None]


class Session(Protocol):
    """What a worker process runs."""

    def describe(self) -> dict[str, Any]:
        """The machine, for the result file."""
        ...

    def execute(self, step: str, watcher: Watcher) -> dict[str, Any]:
        """Runs a step; returns its status, and optionally ``why`` and ``found``."""
        ...

    def lost(self) -> str | None:
        """Why the GPU cannot go on, or None."""
        ...


class DeviceLost(BaseException):
    """The GPU cannot go on. No ``except Exception`` of a measurement stops it."""


class Reporter(Watcher):
    """Passes on what a step does, and looks after the GPU between its contenders."""

    def __init__(self, send: Send, lost: Callable[[], str | None]) -> None:
        self._send, self._lost = send, lost

    def doing(self, what: str) -> None:
        if (reason := self._lost()) is not None:
            raise DeviceLost(reason)
        self._send({"doing": what})

    def so_far(self, result: dict[str, Any]) -> None:
        self._send({"so_far": result})


def serve(session: Session, lines: Iterable[str], send: Send) -> None:
    """Runs the steps named by the lines until they end or the GPU is lost."""
    send({"ready": session.describe()})
    for line in lines:
        try:
            done = session.execute(line.strip(), Reporter(send, session.lost))
        except DeviceLost as error:
            send({"lost": str(error)})
            return
        except Exception as error:
            traceback.print_exc(limit=-4)
            done = {"status": "failed", "why": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        lost = session.lost()
        send({"done": done} | ({"lost": lost} if lost else {}))
        if lost:
            return


def own_output() -> tuple[TextIO, Send]:
    """Keeps standard output for answers: whatever else is printed goes to standard error."""
    channel = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def send(message: dict[str, Any]) -> None:
        channel.write(json.dumps(message, default=float) + "\n")

    return channel, send
