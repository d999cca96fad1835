"""The worker process: ``python -m bench.gpu_day.worker OPTIONS`` runs the steps that standard input names."""

import dataclasses
import json
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bench.gpu_day.serving_steps import own_output, serve
from bench.times.watcher import Watcher


@dataclasses.dataclass(frozen=True)
class Options:
    """What a worker is told at its start, as JSON.

    Attributes:
      toy: toy sizes and interpreted kernels, on the CPU.
      peers: names of the peers that run, or None for all.
      without: peers that must not run, with reasons.
      measured: the fields of the peaks that an earlier worker measured.
      revision: the commit of a copy without ``.git``.
    """

    toy: bool = False
    peers: tuple[str, ...] | None = None
    without: Mapping[str, str] = dataclasses.field(default_factory=dict)
    measured: Mapping[str, Any] | None = None
    revision: str | None = None

    def command(self) -> list[str]:
        """The command line of a worker with these options."""
        return [sys.executable, "-W", "ignore", "-m", "bench.gpu_day.worker", json.dumps(dataclasses.asdict(self))]

    def environment(self) -> dict[str, str]:
        """Its environment: JAX leaves memory to PyTorch, and compiled programs outlive a process that breaks."""
        cache = Path(tempfile.gettempdir(), f"pallas-attn-compiled-{os.getuid()}")
        root = Path(__file__).parents[2]
        path = os.pathsep.join(x for x in (str(root), str(root / "models"), os.environ.get("PYTHONPATH")) if x)
        return {
            "PYTHONPATH": path,
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
        } | ({"JAX_PLATFORMS": "cpu"} if self.toy else {})


class GpuSession:
    """Runs steps with JAX; implements :class:`bench.gpu_day.serving_steps.Session`."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._measured = options.measured
        self._kinds: dict[str, Callable[[str, Watcher], dict[str, Any]]] = {
            "peaks": self._peaks,
            "smoke": self._smoke,
            "case": self._case,
            "sweep": self._sweep,
            "generator": self._generator,
            "tests": self._tests,
            "counters": self._counters,
        }

    def describe(self) -> dict[str, Any]:
        """The machine, and why it cannot run the suite, if it cannot."""
        import pallas_attn as pa
        from bench import machine

        reason = None if self._options.toy else pa.implementations()["triton"]
        return {"machine": machine.describe(self._options.revision), "unavailable": reason}

    def execute(self, step: str, watcher: Watcher) -> dict[str, Any]:
        kind, _, which = step.partition("/")
        return self._kinds[kind](which, watcher)

    def lost(self) -> str | None:
        import jax
        import jax.numpy as jnp

        try:
            jax.block_until_ready(jnp.zeros(8) + 1)
        except Exception as error:
            return " ".join(str(error).split())[:300]
        return None

    def _peaks(self, which: str, watcher: Watcher) -> dict[str, Any]:
        from bench.times import peaks

        sizes = peaks.TOY if self._options.toy else peaks.SIZES["gpu"]
        found = peaks.measure("bfloat16", sizes, by_device=True)
        self._measured = {"dtype": "bfloat16", **dataclasses.asdict(sizes), **dataclasses.asdict(found)}
        return {"status": "ok", "found": self._measured}

    def _smoke(self, which: str, watcher: Watcher) -> dict[str, Any]:
        from bench.gpu_day import smoke

        (check,) = (x for x in smoke.CHECKS if x.name == which)
        return smoke.run(check, toy=self._options.toy)

    def _case(self, which: str, watcher: Watcher) -> dict[str, Any]:
        from bench.gpu_day import efforts
        from bench.machine import Peaks
        from bench.times.cases import named
        from bench.times.measure import OURS, Setting, free_memory, measure
        from bench.times.peers import all_peers

        toy, wanted, without = self._options.toy, self._options.peers, self._options.without
        known = all_peers(interpret=toy)
        peers = {name: known[name] for name in efforts.in_order(known) if wanted is None or name in wanted}
        for name, reason in without.items():
            peers[name] = dataclasses.replace(peers[name], unavailable=lambda reason=reason: reason)
        measured = Peaks.measured(self._measured)
        effort = efforts.TOY if toy else efforts.of(which)
        try:
            found = measure(named("gpu")[which], Setting("gpu", peers, effort, toy, measured, watcher))
        finally:
            free_memory()
        status = {True: "ok", False: "wrong", None: "skipped"}[found["correct"]]
        return {"status": status, "why": found["skipped"].get(OURS), "found": found}

    def _sweep(self, which: str, watcher: Watcher) -> dict[str, Any]:
        from bench.gpu_day import block_sizes

        return block_sizes.run(block_sizes.entries()[which], watcher, toy=self._options.toy)

    def _generator(self, which: str, watcher: Watcher) -> dict[str, Any]:
        from bench.gpu_day import decoding

        return decoding.run(which, watcher, toy=self._options.toy)

    def _tests(self, which: str, watcher: Watcher) -> dict[str, Any]:
        from bench.gpu_day import gpu_tests

        return gpu_tests.run(watcher, collect_only=self._options.toy)

    def _counters(self, which: str, watcher: Watcher) -> dict[str, Any]:
        from bench.gpu_day import counters

        return counters.run(toy=self._options.toy)


def main(argv: list[str]) -> int:
    """Serves until standard input ends or the GPU is lost."""
    _, send = own_output()
    serve(GpuSession(Options(**json.loads(argv[0]))), sys.stdin, send)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
