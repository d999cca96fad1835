"""Describes the machine for the result file, and knows the published peaks of GPUs."""

import dataclasses
import datetime
import importlib.metadata
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

import pallas_attn as pa
from bench.results_file import ResultsError


@dataclasses.dataclass(frozen=True)
class Peaks:
    """Peak rates: TFLOP/s of the matrix units in the dtype of a case, and GB/s of the memory."""

    tflops: float
    gbps: float

    @property
    def ridge(self) -> float:
        """FLOP per byte above which arithmetic is the bound, and below which memory is."""
        return 1e3 * self.tflops / self.gbps

    @staticmethod
    def measured(fields: Mapping[str, Any] | None) -> "Peaks | None":
        """From the result file's ``machine.measured``."""
        return Peaks(fields["tflops"], fields["gbps"]) if fields else None

    def ceiling(self, intensity: float) -> float:
        """The highest FLOP/s at this intensity, in FLOP per byte."""
        return min(1e12 * self.tflops, 1e9 * self.gbps * intensity)


# Dense bfloat16 TFLOP/s and GB/s, from NVIDIA's datasheets of the A100 (2021), H100 (2023) and H200 (2024). The first
# name that JAX's device kind contains wins.
_PEAKS = {
    "H200": Peaks(989.4, 4800),
    "H100 PCIe": Peaks(756.0, 2000),
    "H100 NVL": Peaks(835.0, 3900),
    "H100": Peaks(989.4, 3350),
    "A100-SXM4-80GB": Peaks(312.0, 2039),
    "A100 80GB PCIe": Peaks(312.0, 1935),
    "A100": Peaks(312.0, 1555),
}
UNKNOWN_REVISION = "This is not a clone of the repository: without --revision the file does not name its commit."
# At least the L2 cache of each of these GPUs.
L2_BYTES = 64 * 2**20

_DISTRIBUTIONS = ("jax", "jaxlib", "flax", "tokamax", "torch", "transformers", "triton")


def peaks() -> Peaks | None:
    """Published peaks of this machine; None for a CPU or an unknown GPU."""
    device = jax.devices()[0]
    if device.platform != "gpu":
        return None
    return peaks_of(device.device_kind)


def peaks_of(device_kind: str) -> Peaks | None:
    """Published peaks of a GPU by JAX's device kind, or None."""
    return next((peaks for name, peaks in _PEAKS.items() if name in device_kind), None)


def describe(revision: str | None = None) -> dict:
    """The result file's ``machine``. ``revision``: the commit of a copy without ``.git``.

    Raises:
      ResultsError: ``revision`` is given in a clone.
    """
    known, found = peaks(), commit()
    if revision is not None and found is not None:
        raise ResultsError(
            f"--revision: expected none in a clone of the repository, which is at {found}; got {revision}"
        )
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": jax.devices()[0].device_kind,
        "processor": _processor(),
        "python": platform.python_version(),
        "revision": found or revision,
        "versions": {"pallas_attn": pa.__version__, **_versions()},
        "peak_tflops": known and known.tflops,
        "peak_gbps": known and known.gbps,
        "measured": None,
    }


def _versions() -> dict[str, str]:
    versions = {}
    for name in _DISTRIBUTIONS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores" if names else platform.processor() or platform.machine()


def commit(root: Path = Path(__file__).parents[1]) -> str | None:
    """The commit, with ``-dirty`` if files other than results differ from it; None outside a clone."""

    def git(*arguments: str) -> str | None:
        done = subprocess.run(("git", "-C", str(root), *arguments), capture_output=True, text=True)
        return None if done.returncode else done.stdout.strip()

    try:
        # A copy inside another repository has a prefix there.
        if git("rev-parse", "--show-prefix") != "":
            return None
    except FileNotFoundError:
        return None
    head = git("rev-parse", "--verify", "HEAD")
    changed = git("status", "--porcelain", "--", ".", ":!bench/results")
    return head and head + ("-dirty" if changed else "")
