"""Hardware counters of forward and decode by Nsight Compute (``ncu``), where it is installed.

``python -m bench.gpu_day.counters`` is the program that it profiles.
"""

import csv
import functools
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).parents[2]
CASES = ("causal", "decode-llama-8b")
_SECTIONS = (
    "SpeedOfLight",
    "LaunchStats",
    "Occupancy",
    "ComputeWorkloadAnalysis",
    "MemoryWorkloadAnalysis",
    "WarpStateStats",
)


def command(tool: str) -> list[str]:
    """The command line: the first launch of each kernel, with the clocks left alone."""
    sections = [x for name in _SECTIONS for x in ("--section", name)]
    kernels = ["--kernel-name", "regex:pallas_attn_(forward|decode)", "--launch-count", "2"]
    program = [sys.executable, "-m", "bench.gpu_day.counters"]
    return [tool, "--clock-control", "none", *kernels, *sections, "--csv", "--page", "details", *program]


def run(*, toy: bool = False) -> dict[str, Any]:
    """Profiles the two kernels; the result of a step."""
    tool = shutil.which("ncu")
    if toy or tool is None:
        return {"status": "skipped", "why": "toy kernels have no counters" if toy else "ncu is not installed"}
    done = subprocess.run(command(tool), cwd=_ROOT, capture_output=True, text=True)
    found = parse(done.stdout)
    if not found:
        return {"status": "failed", "why": (done.stdout + done.stderr)[-300:]}
    return {"status": "ok", "found": found}


def parse(output: str) -> dict[str, dict[str, str]]:
    """``metric (unit)`` -> value, by kernel, from ncu's CSV, which other lines may precede."""
    lines = output.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    found: dict[str, dict[str, str]] = {}
    for row in csv.DictReader(lines[start:]):
        if row.get("Metric Name"):
            name = f"{row['Metric Name']} ({row['Metric Unit']})" if row["Metric Unit"] else row["Metric Name"]
            found.setdefault(row["Kernel Name"], {})[name] = row["Metric Value"]
    return found


def main() -> int:
    """Runs each case once."""
    import jax

    from bench.times.cases import named

    for name in CASES:
        case = named("gpu")[name]
        contender: Any = case.build(case.size("gpu")).ours()  # type: ignore[union-attr]
        function = functools.partial(jax.jit(contender.function), *contender.inputs[0])
        jax.block_until_ready(function())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
