"""What a measurement reports while it runs, so that a crash or a hang loses only what was still to come."""

from typing import Any


class Watcher:
    """Ignores what it hears; a worker process passes it on (:mod:`bench.gpu_day.worker`)."""

    def doing(self, what: str) -> None:
        """``what`` begins: whatever breaks from now on is due to it."""

    def so_far(self, result: dict[str, Any]) -> None:
        """The result as far as it is known."""
