"""The tests of compiled kernels (``pytest -m gpu``), each reported as it ends: they may be stopped at any time."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.times.watcher import Watcher

_ROOT = Path(__file__).parents[2]
# All files with such tests, the most telling first. Collecting all others takes longer than many tests.
FILES = (
    "tests/test_attention.py",
    "tests/test_gradients.py",
    "tests/test_decode.py",
    "tests/kernels/test_poison.py",
    "tests/kernels/test_gradient_poison.py",
    "tests/kernels/test_work_follows_lists.py",
    "tests/test_scores.py",
    "tests/test_sinks.py",
    "tests/test_custom_functions.py",
    "tests/test_shapes.py",
    "tests/test_attention_calls.py",
    "tests/test_derivatives.py",
    "tests/test_implementations.py",
    "tests/caches/test_checkpoints.py",
)
_PROCESSES = 8  # they mostly compile
_CHANNEL = "PALLAS_ATTN_TEST_REPORTS"


def run(watcher: Watcher, *, collect_only: bool = False) -> dict[str, Any]:
    """Runs the tests; the result of a step. ``collect_only``: only finds them."""
    read, write = os.pipe()
    options = ["--collect-only"] if collect_only else ["-n", str(_PROCESSES)]
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", "-q", "-m", "gpu and not slow", "-p", __name__, *options, *FILES],
        cwd=_ROOT,
        env={**os.environ, _CHANNEL: str(write)},
        pass_fds=(write,),
        stdout=sys.stderr,
    )
    os.close(write)
    found: dict[str, Any] = {"passed": 0, "skipped": 0, "failed": {}}
    with os.fdopen(read) as reports:
        for line in reports:
            report = json.loads(line)
            if report["outcome"] == "failed":
                found["failed"][report["test"]] = report["why"]
            else:
                found[report["outcome"]] += 1
            watcher.so_far(found)
    code = process.wait()
    if found["failed"]:
        return {"status": "wrong", "why": f"{len(found['failed'])} tests failed", "found": found}
    if code:
        return {"status": "failed", "why": f"pytest ended with {code}", "found": found}
    return {"status": "ok", "found": found}


# --- the plugin, in pytest's own process; its workers report through it ---


def pytest_configure(config) -> None:
    """Keeps the channel to itself."""
    if _CHANNEL in os.environ and not hasattr(config, "workerinput"):
        config.gpu_test_reports = os.fdopen(int(os.environ[_CHANNEL]), "w", buffering=1)
        config.pluginmanager.register(_Reports(config.gpu_test_reports))


class _Reports:
    def __init__(self, channel) -> None:
        self._channel = channel

    def pytest_runtest_logreport(self, report) -> None:
        """The outcome of a test, or of a setup that failed or skipped it."""
        if report.when == "call" or report.outcome != "passed":
            why = report.longreprtext[-400:] if report.failed else None
            self._channel.write(json.dumps({"test": report.nodeid, "outcome": report.outcome, "why": why}) + "\n")
