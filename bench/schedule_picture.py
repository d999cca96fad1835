"""Draws how decode splits a ragged batch: ``python -m bench.schedule_picture --out schedule.png``.

One long row among short ones, split into equal shares (``pallas_attn.schedule``), and, for comparison, every row split
into the same number of parts, as by a kernel that does not know the lengths. A bar is a program.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np

from pallas_attn.picture import plain_style, save_figure
from pallas_attn.schedule import Schedule

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KV_BLOCK = 64
ROW_LENGTHS = (65536, *(512,) * 31)
SHARES = 128
PARTS = 16
_LONG, _SHORT, _TEXT = "#1f4e79", "#f2a65a", "#4a5561"


def shares(lengths: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Row and number of KV blocks of every program of the balanced schedule, without the idle ones."""
    num_active = jnp.asarray([-(-length // KV_BLOCK) for length in lengths], jnp.int32)
    schedule = Schedule.balanced(num_active, int(num_active.max()), SHARES)
    total = int(schedule.total)
    return np.asarray(schedule.row)[:total], np.asarray(schedule.last - schedule.first)[:total]


def parts(lengths: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """The same with every row split into ``PARTS``."""
    blocks = np.array([-(-length // KV_BLOCK) for length in lengths])
    edges = np.linspace(0, blocks, PARTS + 1).round().astype(int)
    return np.repeat(np.arange(len(lengths)), PARTS), np.diff(edges, axis=0).T.ravel()


def picture() -> "Figure":
    """Draws both, one above the other, on the same scale."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    figure = Figure(figsize=(8, 4.6), facecolor="white", layout="constrained")
    rows = {
        f"shares of equal size ({SHARES} wanted)": shares(ROW_LENGTHS),
        f"every row in {PARTS} parts": parts(ROW_LENGTHS),
    }
    panels = figure.subplots(len(rows), sharey=True)
    for axes, (title, (row, size)) in zip(panels, rows.items(), strict=True):
        axes.bar(np.arange(size.size), size, width=1.0, color=np.where(row == 0, _LONG, _SHORT))
        ratio = size.max() / size.mean()
        axes.set_title(f"{title}: the longest is {ratio:.2f} x the mean", loc="left", fontsize=10, fontweight="bold")
        axes.set_ylabel("KV blocks", color=_TEXT, fontsize=9)
        axes.set_xlim(-1, size.size)
        axes.tick_params(colors=_TEXT, labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel("program", color=_TEXT, fontsize=9)
    lengths = f"the row of {ROW_LENGTHS[0]:,} keys", f"the {len(ROW_LENGTHS) - 1} rows of {ROW_LENGTHS[1]:,}"
    patches = [Patch(color=color, label=label) for color, label in zip((_LONG, _SHORT), lengths, strict=True)]
    panels[0].legend(handles=patches, frameon=False, fontsize=9, loc="center right")
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes the picture; see ``--help``."""
    parser = argparse.ArgumentParser(prog="python -m bench.schedule_picture", description=str(__doc__).splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="a .png or .svg file")
    out = parser.parse_args(arguments).out
    if out.suffix.lower() not in (".png", ".svg"):
        parser.error(f"--out: expected a file that ends in .png or .svg, got {str(out)!r}")
    with plain_style():
        save_figure(picture(), out)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
