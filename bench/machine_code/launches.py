"""The launches of a compiled function: reads the sequence of thunks that XLA writes when it compiles for a GPU.

A thunk is what XLA's runtime executes: a kernel, a copy, or a loop or a conditional with thunks of its own. Thunks in a
command buffer are one CUDA graph, which the host launches at once. A loop outside of one is run by the host, which
waits for the device in each iteration to read the condition; a conditional likewise.
"""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

_THUNK = re.compile(r"(?P<indent> *)\d+: k(?P<kind>\w+) *(?:\[[^\]]*\])? *(?P<name>\S*)")
_COPIES = {"Copy", "DeviceToDeviceCopy", "Memcpy", "CopyDone"}


@dataclasses.dataclass(frozen=True)
class Thunk:
    """One line of the sequence, with the lines that belong to it.

    Attributes:
      kind: ``"CustomKernel"``, ``"Copy"``, ``"CommandBuffer"``, ``"While"``, ``"Conditional"``, ...
      name: of the kernel, if it is one.
      parts: thunks by label: ``"condition"`` and ``"body"`` of a loop, the branches of a conditional, else ``""``.
    """

    kind: str
    name: str
    parts: dict[str, list["Thunk"]]


@dataclasses.dataclass(frozen=True)
class Launches:
    """What a sequence of thunks launches.

    Attributes:
      launches: kernels and copies, with the cheapest branch of each conditional, and each loop's body once.
      copies: how many of them are copies.
      attention: how many of them are kernels of pallas_attn.
      graphs: command buffers, at any depth, that are not part of another.
      loops, conditionals: at any depth, in all branches.
      host_loops, host_conditionals: those of them that are outside of every command buffer.
    """

    launches: int
    copies: int
    attention: int
    graphs: int
    loops: int
    conditionals: int
    host_loops: int
    host_conditionals: int

    @staticmethod
    def of(thunks: Sequence[Thunk]) -> "Launches":
        """Counts a sequence, such as the whole function, or the :func:`step` of its largest loop."""
        run, every = list(_run(thunks)), list(_walk(thunks))

        def number(kind: str, on_host: bool = False) -> int:
            return sum(thunk.kind == kind and not (on_host and in_graph) for thunk, in_graph in every)

        return Launches(
            launches=len(run),
            copies=sum(thunk.kind in _COPIES for thunk in run),
            attention=sum(thunk.name.startswith("pallas_attn") for thunk in run),
            graphs=number("CommandBuffer", on_host=True),
            loops=number("While"),
            conditionals=number("Conditional"),
            host_loops=number("While", on_host=True),
            host_conditionals=number("Conditional", on_host=True),
        )


def read(dump: Path) -> list[Thunk]:
    """The thunks of the function compiled with this ``dump`` of :func:`bench.machine_code.xla_gpu.compile`.

    Raises:
      ValueError: not one function was compiled with it.
    """
    found = sorted(dump.glob("*thunk_sequence_after_thunk_passes.txt"))
    if len(found) != 1:
        raise ValueError(f"dump: expected the thunks of one function in {dump}, got {[path.name for path in found]}")
    return parse(found[0].read_text())


def parse(text: str) -> list[Thunk]:
    """The thunks of a sequence as text."""
    thunks: list[Thunk] = []
    # Those to which the next line may belong, from the outside in: indentation, thunk, and list to which it adds.
    open_: list[tuple[int, Thunk | None, list[Thunk]]] = [(-1, None, thunks)]
    for line in filter(str.strip, text.splitlines()):
        indent = len(line) - len(line.lstrip())
        if match := _THUNK.match(line):
            while open_[-1][0] >= indent:
                open_.pop()
            thunk = Thunk(match["kind"], match["name"], {})
            open_[-1][2].append(thunk)
            open_.append((indent, thunk, thunk.parts.setdefault("", [])))
        else:
            label = line.strip().removesuffix(":")
            # A label is indented by two more than its thunk; "condition", not indented at all, follows its loop.
            while label != "condition" and open_[-1][0] > indent - 2:
                open_.pop()
            start, owner, _ = open_.pop()
            if owner is None:
                raise ValueError(f"text: expected a thunk before {line!r}, got none")
            open_.append((start, owner, owner.parts.setdefault(label, [])))
    return thunks


def step(thunks: Sequence[Thunk]) -> list[Thunk]:
    """The body of the loop with the most thunks.

    Raises:
      ValueError: there is no loop.
    """
    loops = [thunk for thunk, _ in _walk(thunks) if thunk.kind == "While"]
    if not loops:
        raise ValueError("thunks: expected a loop, got none")
    return max(loops, key=lambda loop: sum(1 for _ in _walk([loop]))).parts["body"]


def _run(thunks: Sequence[Thunk]) -> Iterator[Thunk]:
    """The kernels and copies that are launched if every conditional takes its cheapest branch."""
    for thunk in thunks:
        parts = [list(_run(part)) for label, part in thunk.parts.items() if label or part]
        if thunk.kind == "Conditional":
            yield from min(parts, key=len)
        elif thunk.kind in ("While", "CommandBuffer", "Sequential"):
            for part in parts:
                yield from part
        else:
            yield thunk


def _walk(thunks: Sequence[Thunk], in_graph: bool = False) -> Iterator[tuple[Thunk, bool]]:
    """All thunks at any depth, and whether each is inside of a command buffer."""
    for thunk in thunks:
        yield thunk, in_graph
        for part in thunk.parts.values():
            yield from _walk(part, in_graph or thunk.kind == "CommandBuffer")
