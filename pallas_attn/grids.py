"""The block grid of a BlockMask: as arrays for pictures, and as text for terminals."""

from typing import NamedTuple, Protocol

import jax
import jax.core
import numpy as np
from jax import Array

from pallas_attn.tuning import BlockSizes

PARTIAL = 1  # block classes as in `BlockMask.bitmap`: 0 empty, 1 partial, 2 full
_CHARACTERS = np.array(["·", "▒", "█"])


class Blocks(Protocol):
    """The part of BlockMask that this module reads."""

    @property
    def shape(self) -> tuple[int, int, int, int]: ...
    @property
    def grid(self) -> tuple[int, int]: ...
    @property
    def block_sizes(self) -> BlockSizes: ...
    @property
    def num_full(self) -> Array: ...
    @property
    def q_positions(self) -> Array: ...
    @property
    def kv_positions(self) -> Array: ...
    def density(self) -> Array: ...
    def classes(self, batch: int, head: int) -> np.ndarray: ...


class Grid(NamedTuple):
    """The blocks and the padding of one batch row and one head."""

    name: str
    classes: np.ndarray  # uint8 [nq, nk]
    q_padding: np.ndarray  # bool [T]
    kv_padding: np.ndarray  # bool [S]

    @property
    def density(self) -> float:
        return float((self.classes != 0).mean())

    @property
    def padding(self) -> str:
        counts = {"queries": self.q_padding, "keys": self.kv_padding}
        return ", ".join(f"{x.sum():,} of {x.size:,} {name}" for name, x in counts.items() if x.any())


def as_text(block_mask: Blocks, *, max_rows: int = 32, max_columns: int = 64, max_grids: int = 4) -> str:
    """Draws blocks as characters (``█`` full, ``▒`` partial, ``·`` empty), one grid for each batch row and head.

    A grid larger than ``max_rows`` x ``max_columns`` is scaled down: a character is full or empty only if all its
    blocks are. After ``max_grids`` grids, only the number of the remaining ones is printed. Under jit, where the lists
    have no values yet, the text gives only the shape.
    """
    batch, heads, q_len, kv_len = block_mask.shape
    sizes = block_mask.block_sizes
    title = f"BlockMask(B={batch}, heads={heads}, T={q_len}, S={kv_len}, blocks of {sizes.q}x{sizes.kv}"
    if isinstance(block_mask.num_full, jax.core.Tracer):
        return title + ", traced)"
    lines = [f"{title}, density {float(block_mask.density()):.1%})"]
    q_step, kv_step = step(block_mask.grid[0], max_rows), step(block_mask.grid[1], max_columns)
    q_tokens, kv_tokens = q_step * sizes.q, kv_step * sizes.kv  # per character
    which = list(np.ndindex(block_mask.num_full.shape[:2]))
    for b, h in which[:max_grids]:
        grid = grid_of(block_mask, b, h)
        facts = f"{grid.name}: density {grid.density:.1%}"
        lines.append(f"{facts}, padding {grid.padding}" if grid.padding else facts)
        lines += _with_axes(merged(grid.classes, q_step, kv_step), q_tokens, kv_tokens)
    if len(which) > max_grids:
        lines.append(f"and {len(which) - max_grids} more; pallas_attn.save_picture draws any of them")
    scale = f"{q_tokens} queries x {kv_tokens} keys"
    if q_step * kv_step > 1:
        scale += f" ({q_step}x{kv_step} blocks, partial where mixed)"
    lines += ["█ full  ▒ partial  · empty", f"one character = {scale}"]
    return "\n".join(lines)


def grid_of(block_mask: Blocks, batch: int, head: int) -> Grid:
    """The blocks and the padding of one batch row and one head of the lists."""
    rows, heads = block_mask.num_full.shape[:2]
    classes = block_mask.classes(batch, head)
    q_positions, kv_positions = np.asarray(block_mask.q_positions), np.asarray(block_mask.kv_positions)
    kv_positions = kv_positions[:, head * kv_positions.shape[1] // heads]
    name = f"batch {batch} of {rows}" if rows > 1 else "all batch rows"
    name += f", head {head} of {heads}" if heads > 1 else ", all heads"
    return Grid(name, classes, *(x[batch if x.shape[0] > 1 else 0] < 0 for x in (q_positions, kv_positions)))


def step(blocks: int, most: int) -> int:
    """How many blocks to merge into one cell for at most ``most`` cells."""
    return -(-blocks // most)


def merged(classes: np.ndarray, q_step: int, kv_step: int) -> np.ndarray:
    """Merges every ``q_step`` x ``kv_step`` blocks into one cell; a cell of mixed classes is partial."""
    starts = np.arange(0, classes.shape[0], q_step), np.arange(0, classes.shape[1], kv_step)
    lowest, highest = (
        reduce.reduceat(reduce.reduceat(classes, starts[0], axis=0), starts[1], axis=1)
        for reduce in (np.minimum, np.maximum)
    )
    return np.where(lowest == highest, lowest, PARTIAL)


def _with_axes(cells: np.ndarray, q_tokens: int, kv_tokens: int) -> list[str]:
    """Lines of characters, labeled with each row's first query and the first keys of some columns."""
    q_labels = [str(i * q_tokens) for i in range(cells.shape[0])]
    kv_labels = [str(j * kv_tokens) for j in range(cells.shape[1])]
    margin = max(len("queries"), len(q_labels[-1]))
    every = 1 << len(kv_labels[-1]).bit_length()  # a power of two that leaves space between labels
    header = "".join(label.ljust(every) for label in kv_labels[::every]).rstrip()
    rows = (f"{label:>{margin}} {''.join(row)}" for label, row in zip(q_labels, _CHARACTERS[cells], strict=True))
    return [f"{'':{margin}} keys", f"{'queries':>{margin}} {header}", *rows]
