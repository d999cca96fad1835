"""Parses nvdisasm's text into instructions, their control-flow graph and its loops.

The graph defines loops, not the order of the text: a back edge is an edge to a block that dominates its source,
and the natural loop of a back edge holds all blocks that reach its source without passing its target (Aho, Lam, Sethi
and Ullman, *Compilers*, second edition, section 9.6).
"""

import dataclasses
import itertools
import re

_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);")
_LABEL = re.compile(r"^(\.L_x_\d+|\$[\w$.]+):")
_TARGET = re.compile(r"`\((\.L_x_\d+|\$[\w$.]+)\)")
_LINE = re.compile(r"//## File \"[^\"]*\", line (\d+)")

# nvcc and ptxas also emit a predicated jump out of a loop as a call that never returns.
_JUMPS = {"BRA", "CALL", "JMP"}
_ENDS = {"EXIT", "RET", "BRX", "JMX", "BREAK"}


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One machine instruction.

    Attributes:
      opcode: opcode with modifiers, such as ``HGMMA.64x128x16.F32.BF16``.
      operands: the operands as text.
      predicate: for example ``P0`` or ``!P0``; None if it always runs.
      line: line of the IR that it comes from; 0 if unknown.
    """

    opcode: str
    operands: str
    predicate: str | None
    line: int

    @property
    def name(self) -> str:
        """The opcode without modifiers."""
        return self.opcode.partition(".")[0]

    @property
    def never_runs(self) -> bool:
        return self.predicate == "!PT"


@dataclasses.dataclass(frozen=True)
class Block:
    """A basic block: its instructions, and the indices of the blocks that may follow."""

    instructions: tuple[Instruction, ...]
    successors: tuple[int, ...]


def parse(text: str) -> list[Block]:
    """The control-flow graph of a kernel; block 0 is its entry."""
    instructions, starts, labels, line = [], {0}, {}, 0
    for row in text.splitlines():
        if found := _LABEL.match(row):
            labels[found[1]] = len(instructions)
            starts.add(len(instructions))
        elif found := _LINE.search(row):
            line = int(found[1])
        elif found := _INSTRUCTION.search(row):
            predicate, opcode, operands = found.groups()
            instructions.append(Instruction(opcode, operands.strip(), predicate, line))
            if instructions[-1].name in _JUMPS | _ENDS:
                starts.add(len(instructions))
    if not instructions:
        raise ValueError("no instructions in the disassembly")
    bounds = [*sorted(start for start in starts if start < len(instructions)), len(instructions)]
    index = {start: i for i, start in enumerate(bounds[:-1])}
    blocks = []
    for start, end in itertools.pairwise(bounds):
        last = instructions[end - 1]
        successors = []
        if last.name in _JUMPS and (found := _TARGET.search(last.operands)):
            successors.append(index[labels[found[1]]])
        leaves = last.name in _JUMPS | _ENDS and last.predicate is None and last.name != "CALL"
        if not leaves and end in index:
            successors.append(index[end])
        blocks.append(Block(tuple(instructions[start:end]), tuple(successors)))
    return blocks


def natural_loops(blocks: list[Block]) -> list[list[Instruction]]:
    """The instructions of each loop, in text order, those of nested loops included."""
    loops: dict[int, set[int]] = {}
    dominators = _dominators(blocks)
    predecessors = _predecessors(blocks)
    # Unreachable: the padding after the last EXIT is a block that jumps to itself.
    for source in dominators:
        for header in blocks[source].successors:
            if header in dominators[source]:
                loops.setdefault(header, {header}).update(_natural_loop(header, source, predecessors))
    return [[x for i in sorted(body) for x in blocks[i].instructions] for _, body in sorted(loops.items())]


def _predecessors(blocks: list[Block]) -> list[list[int]]:
    predecessors: list[list[int]] = [[] for _ in blocks]
    for source, block in enumerate(blocks):
        for target in block.successors:
            predecessors[target].append(source)
    return predecessors


def _dominators(blocks: list[Block]) -> dict[int, set[int]]:
    """For each reachable block, the blocks on every path to it."""
    reached, pending = set(), [0]
    while pending:
        block = pending.pop()
        if block not in reached:
            reached.add(block)
            pending.extend(blocks[block].successors)
    predecessors = _predecessors(blocks)
    dominators = {block: {0} if block == 0 else set(reached) for block in sorted(reached)}
    changed = True
    while changed:
        changed = False
        for block in sorted(reached - {0}):
            before = [dominators[p] for p in predecessors[block] if p in reached]
            new = {block} | set.intersection(*before)
            changed |= new != dominators[block]
            dominators[block] = new
    return dominators


def _natural_loop(header: int, source: int, predecessors: list[list[int]]) -> set[int]:
    body, pending = {header}, [source]
    while pending:
        block = pending.pop()
        if block not in body:
            body.add(block)
            pending.extend(predecessors[block])
    return body
