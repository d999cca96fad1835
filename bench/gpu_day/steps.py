"""A step of the GPU suite, and what becomes of it. Imports no JAX."""

import dataclasses
import math
from typing import Any

# "ok" and "wrong" come from the step's own check. "skipped": it cannot run here. "failed": an exception. "crashed": its
# process ended. "timed out": it was ended. "late": it was not started, because no time was left.
STATUSES = ("ok", "wrong", "skipped", "failed", "crashed", "timed out", "late")
BROKEN = ("wrong", "failed", "crashed", "timed out")


@dataclasses.dataclass(frozen=True)
class Step:
    """One thing to run, with the time that it gets.

    Attributes:
      name: ``kind/which``, such as ``case/causal``.
      seconds: estimated.
      limit: seconds after which its process is ended.
      open_ended: it takes whatever time is left, and what it has found by then is its result.
    """

    name: str
    seconds: float
    limit: float
    open_ended: bool = False

    @property
    def kind(self) -> str:
        return self.name.partition("/")[0]

    @property
    def which(self) -> str:
        return self.name.partition("/")[2]


@dataclasses.dataclass(frozen=True)
class Block:
    """Steps in order; none of them starts or runs after ``seconds`` from the block's beginning."""

    name: str
    steps: tuple[Step, ...]
    seconds: float = math.inf


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a step.

    Attributes:
      status: one of :data:`STATUSES`.
      seconds: that it took.
      why: the reason of any status but "ok".
      found: its result, or as much as was known when it broke.
      doing: the contender that was running when it broke.
      log: the end of its standard error, if it broke.
    """

    status: str
    seconds: float
    why: str | None = None
    found: dict[str, Any] | None = None
    doing: str | None = None
    log: str | None = None
