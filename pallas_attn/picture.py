"""Draws a BlockMask as a PNG or SVG picture.

The picture shows the block grid of one batch row and one head, with axes in tokens. A grid too large to show is scaled
down: neighboring blocks become one cell, which is full or empty only if all of them are.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.core
import numpy as np

from pallas_attn import checks, grids
from pallas_attn.block_mask import BlockMask
from pallas_attn.grids import Grid

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Light to dark by the work of a block, so that they are distinct in gray and to color-blind readers.
_EMPTY_COLOR, _PARTIAL_COLOR, _FULL_COLOR = "#edf1f5", "#f2a65a", "#1f4e79"
_PADDING_COLOR, _LINE_COLOR, _TEXT_COLOR = "#b4bdc7", "#8a94a0", "#4a5561"
_MAX_CELLS = 256  # along an axis of a picture, so that a cell is several pixels wide
_METADATA = {".png": {"Software": None}, ".svg": {"Date": None, "Creator": None}}  # for reproducible bytes


def save_picture(
    block_mask: BlockMask,
    path: str | os.PathLike,
    *,
    batch: int = 0,
    head: int = 0,
    title: str | None = None,
) -> None:
    """Draws full, partial and empty blocks, and padding. Needs the extra ``plots``, but no display.

    With one version of matplotlib, the same mask gives the same bytes on any day and with any user settings.

    Args:
      block_mask: any size; a grid of more than 256 blocks along an axis is scaled down, which the picture states.
      path: a file that ends in ``.png`` or ``.svg``, in an existing directory.
      batch: the batch row to draw, below the B of the lists (1 if all rows share them).
      head: the head to draw, below the M of the lists (1 if all heads share them).
      title: default "BlockMask".

    Raises:
      ValueError: another suffix; no such directory, batch row or head; or a traced BlockMask.
      TypeError: an argument is of the wrong kind.
      ImportError: matplotlib is not installed.
    """
    if not isinstance(block_mask, BlockMask):
        got = checks.describe(block_mask)
        raise TypeError(f"block_mask: expected a BlockMask (BlockMask.from_mask makes one), got {got}")
    path = _checked_path(path)
    if not isinstance(title, str | None):
        raise TypeError(f"title: expected a str or None, got {checks.describe(title)}")
    rows, heads = block_mask.num_full.shape[:2]
    batch, head = _checked_index("batch", batch, rows), _checked_index("head", head, heads)
    if isinstance(block_mask.num_full, jax.core.Tracer):
        raise ValueError("block_mask: expected concrete values, got a traced BlockMask; draw it outside of jit")
    with plain_style():
        save_figure(_figure(grids.grid_of(block_mask, batch, head), block_mask, title or "BlockMask"), path)


@contextlib.contextmanager
def plain_style() -> Iterator[None]:
    """A context in which matplotlib ignores the user's configuration.

    Raises:
      ImportError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError('pictures need matplotlib: pip install "pallas-attn[plots]"') from error
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        # SVG ids are hashes with a salt, random by default.
        matplotlib.rcParams["svg.hashsalt"] = "pallas_attn"
        yield


def save_figure(figure: "Figure", path: Path, dpi: int = 160) -> None:
    """Writes a PNG or SVG, by the suffix, without date and program name in its metadata."""
    figure.savefig(path, dpi=dpi, metadata=_METADATA[path.suffix.lower()])


def _checked_path(path: str | os.PathLike) -> Path:
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"path: expected a str or a path, got {checks.describe(path)}")
    path = Path(path)
    if path.suffix.lower() not in _METADATA:
        raise ValueError(f"path: expected a file that ends in .png or .svg, got {str(path)!r}")
    if not path.parent.is_dir():
        raise ValueError(f"path: expected a directory that exists, got {str(path.parent)!r}")
    if path.is_dir():
        raise ValueError(f"path: expected a file, got the directory {str(path)!r}")
    return path


def _checked_index(name: str, value: int, count: int) -> int:
    if not 0 <= checks.integer(name, value, least=-checks.LARGEST_INT32) < count:
        raise ValueError(f"{name}: expected an index from 0 to {count - 1} into the lists, got {value}")
    return value


def _figure(grid: Grid, block_mask: BlockMask, title: str) -> "Figure":
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    q_len, kv_len = grid.q_padding.size, grid.kv_padding.size
    # In inches. The aspect ratio is clipped, so that a very wide or tall grid stays legible.
    width, height = 5.2, 5.2 * float(np.clip(q_len / kv_len, 0.22, 1.4))
    left, right, bottom, top = 1.0, 0.4, 0.95, 1.0
    size = (left + width + right, bottom + height + top)
    figure = Figure(figsize=size, facecolor="white")
    axes = figure.add_axes((left / size[0], bottom / size[1], width / size[0], height / size[1]))

    def write(inches_from_top: float, text: str, **style: Any) -> None:
        figure.text(left / size[0], 1 - inches_from_top / size[1], text, va="top", parse_math=False, **style)

    active, blocks = int((grid.classes != 0).sum()), grid.classes.size
    sizes = block_mask.block_sizes
    facts = f"density {grid.density:.1%}: {active:,} of {blocks:,} blocks of {sizes.q} x {sizes.kv} are visited"
    steps = grids.step(grid.classes.shape[0], _MAX_CELLS), grids.step(grid.classes.shape[1], _MAX_CELLS)
    if steps != (1, 1):
        facts += f" (one cell = {steps[0]} x {steps[1]} blocks)"
    where = f"{grid.name}; padding: {grid.padding}" if grid.padding else grid.name
    write(0.22, title, fontsize=_title_size(title), fontweight="bold", color="#1b2733")
    write(0.50, facts, fontsize=9, color=_TEXT_COLOR)
    write(0.69, where, fontsize=9, color=_TEXT_COLOR)

    _draw_cells(axes, grids.merged(grid.classes, *steps), steps[0] * sizes.q, steps[1] * sizes.kv)
    _draw_padding(axes, grid)
    axes.set_xlim(0, kv_len)
    axes.set_ylim(q_len, 0)
    axes.set_xticks(_ticks(kv_len, 8))
    axes.set_yticks(_ticks(q_len, max(2, round(8 * height / width))))
    for axis, name in ((axes.xaxis, "keys"), (axes.yaxis, "queries")):
        axis.set_major_formatter("{x:,.0f}")
        axis.set_label_text(f"{name} (tokens)", color=_TEXT_COLOR, fontsize=9)
    axes.tick_params(colors=_TEXT_COLOR, labelsize=8)
    for spine in axes.spines.values():
        spine.set_edgecolor(_LINE_COLOR)
        spine.set_linewidth(0.8)
        spine.set_position(("outward", 0.4))  # around the outer cells, not over them
    colors = {"full": _FULL_COLOR, "partial": _PARTIAL_COLOR, "empty": _EMPTY_COLOR}
    patches = [Patch(facecolor=c, edgecolor=_LINE_COLOR, linewidth=0.5, label=name) for name, c in colors.items()]
    if grid.padding:
        hatched = {"facecolor": "white", "edgecolor": _PADDING_COLOR, "hatch": "/////", "linewidth": 0.5}
        patches.append(Patch(**hatched, label="padding"))
    figure.legend(
        handles=patches,
        loc="lower left",
        bbox_to_anchor=(left / size[0], 0.12 / size[1]),
        borderaxespad=0,
        borderpad=0,
        ncols=len(patches),
        frameon=False,
        fontsize=9,
        labelcolor=_TEXT_COLOR,
    )
    return figure


def _title_size(title: str) -> float:
    """Font size in points, smaller for a long title so that it fits."""
    return float(np.clip(13 * 44 / max(len(title), 1), 6, 13))


def _draw_cells(axes: "Axes", cells: np.ndarray, q_tokens: int, kv_tokens: int) -> None:
    from matplotlib.colors import ListedColormap

    rows, columns = cells.shape
    axes.imshow(
        cells,
        cmap=ListedColormap([_EMPTY_COLOR, _PARTIAL_COLOR, _FULL_COLOR]),
        vmin=0,
        vmax=2,
        extent=(0, columns * kv_tokens, rows * q_tokens, 0),
        aspect="auto",
        interpolation="none",
    )
    if max(rows, columns) <= 64:
        style = {"color": "white", "linewidth": 0.6}
        axes.vlines(np.arange(1, columns) * kv_tokens, 0, rows * q_tokens, **style)
        axes.hlines(np.arange(1, rows) * q_tokens, 0, columns * kv_tokens, **style)


def _draw_padding(axes: "Axes", grid: Grid) -> None:
    """Hatches the rows and columns of padding."""
    style = {"facecolor": (1, 1, 1, 0.55), "edgecolor": _PADDING_COLOR, "hatch": "/////", "linewidth": 0}
    for first, last in _runs(grid.q_padding):
        axes.axhspan(first, last, **style)
    for first, last in _runs(grid.kv_padding):
        axes.axvspan(first, last, **style)


def _runs(padding: np.ndarray) -> np.ndarray:
    """``[runs, 2]``: start and end of each run of padding, in tokens.

    Longer axes are split into at most 1024 groups, each padding if all its tokens are: the error is below a pixel, and
    scattered empty slots do not hide the others.
    """
    starts = np.arange(0, padding.size, grids.step(padding.size, 1024))
    whole = np.logical_and.reduceat(padding, starts).astype(int)
    edges = np.flatnonzero(np.diff(whole, prepend=0, append=0))
    return np.append(starts, padding.size)[edges].reshape(-1, 2)


def _ticks(length: int, most: int) -> np.ndarray:
    """At most about ``most`` ticks, at multiples of a power of two."""
    return np.arange(0, length + 1, 1 << max(0, -(-length // most) - 1).bit_length())
