"""A BlockMask as something to look at."""

from typing import TYPE_CHECKING

import jax.core
import numpy as np

if TYPE_CHECKING:
    from pallas_attn.block_mask import BlockMask

_CHARACTERS = np.array(["·", "▒", "█"])


def as_text(block_mask: "BlockMask", *, max_rows: int = 32, max_columns: int = 64) -> str:
    """Blocks as characters (``█`` full, ``▒`` partial, ``·`` empty), one picture per row of the batch and head.

    A grid larger than ``max_rows`` x ``max_columns`` is scaled down: a character is full or empty only where all the
    blocks under it are. Under jit, where the lists have no values yet, only the shape is told.
    """
    batch, heads, q_len, kv_len = block_mask.shape
    sizes = block_mask.block_sizes
    title = f"BlockMask(B={batch}, heads={heads}, T={q_len}, S={kv_len}, blocks of {sizes.q}x{sizes.kv}"
    if isinstance(block_mask.num_full, jax.core.Tracer):
        return title + ", traced)"
    classes = np.asarray(block_mask.bitmap())
    lines = [f"{title}, density {float(block_mask.density()):.1%})"]
    for b, h in np.ndindex(classes.shape[:2]):
        if classes.shape[:2] != (1, 1):
            lines.append(f"batch {b}, head {h}")
        lines += ["".join(row) for row in _CHARACTERS[_scaled_down(classes[b, h], max_rows, max_columns)]]
    return "\n".join(lines)


def _scaled_down(classes: np.ndarray, max_rows: int, max_columns: int) -> np.ndarray:
    """Merges neighbouring blocks until the grid fits; a merged block of mixed classes is partial."""
    row_step = -(-classes.shape[0] // max_rows)
    column_step = -(-classes.shape[1] // max_columns)
    rows = range(0, classes.shape[0], row_step)
    columns = range(0, classes.shape[1], column_step)
    scaled = np.empty((len(rows), len(columns)), classes.dtype)
    for i, r in enumerate(rows):
        for j, c in enumerate(columns):
            cell = classes[r : r + row_step, c : c + column_step]
            scaled[i, j] = cell.flat[0] if (cell == cell.flat[0]).all() else 1
    return scaled
