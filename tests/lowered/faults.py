"""What an executed kernel must not do, and the record of it."""

import collections
import dataclasses
from collections.abc import Callable

Report = Callable[[str, str], None]  # kind, detail


@dataclasses.dataclass
class Fault:
    """Something that must not happen.

    Attributes:
      kind: "out of bounds", "two writes", ...; README.md lists them all.
      kernel: its name.
      where: the operation, and the lines of Python that it was lowered from, innermost first.
      program: its place in the grid; None for what no single program did.
      detail: what happened the first time.
      count: how often it happened at this place.
    """

    kind: str
    kernel: str
    where: str
    program: tuple[int, ...] | None
    detail: str
    count: int = 1

    def __str__(self) -> str:
        program = "" if self.program is None else f", program {self.program}"
        return f"{self.kind}: {self.detail} ({self.kernel}{program}, {self.where}; {self.count} times)"


class Watch:
    """Collects the faults of all kernels that run, and counts their programs by kernel."""

    def __init__(self) -> None:
        self._faults: dict[tuple[str, str, str], Fault] = {}
        self.programs: collections.Counter[str] = collections.Counter()

    def report(self, kind: str, kernel: str, where: str, program: tuple[int, ...] | None, detail: str) -> None:
        key = kind, kernel, where
        if key in self._faults:
            self._faults[key].count += 1
        else:
            self._faults[key] = Fault(kind, kernel, where, program, detail)

    def take(self) -> list[Fault]:
        """The faults since the last call."""
        faults, self._faults = list(self._faults.values()), {}
        return faults

    def assert_clean(self) -> None:
        """Raises an AssertionError that lists the faults since the last call of this method or of :meth:`take`."""
        faults = self.take()
        assert not faults, "\n".join(map(str, faults))
