"""Pictures of benchmark results: ``python -m bench.plot RESULT.json [RESULT.json ...] --out DIR``.

From each file of ``bench.run``: time against the active fraction of a mask, time against the capacity of a cache, time
against peers, and a roofline (Williams, Waterman and Patterson, CACM 52(4), 2009). Pictures for which a file has no
figures are left out, with a message.
"""

import argparse
import collections
import dataclasses
import itertools
import json
import math
import sys
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.machine import Peaks
from bench.times.cases import VARIANTS
from pallas_attn.picture import plain_style, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SCHEMA = 1
_OURS = "pallas_attn"
# Okabe and Ito's and Paul Tol's colors, safe for color-blind readers; markers differ for prints in gray.
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#882255", "#44aa99", "#999933")
_GRAYS = ("#1b2733", "#5d6975", "#8f9aa5", "#c3cad1")
_MARKERS = "osD^vP*X<>"
_DARK, _TEXT, _LINE = "#1b2733", "#4a5561", "#b4bdc7"
_TITLE_HEIGHT = 0.75  # inches
_BEHIND_TEXT = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.5}


@dataclasses.dataclass(frozen=True)
class Result:
    """The fields of a case that pictures use."""

    case: str
    kind: str
    shape: dict[str, int]
    dtype: str
    active_fraction: float | None
    capacity: int | None
    flops: float | None
    bytes: float | None
    ms: dict[str, float]  # medians of the contenders with a right result
    ratios: dict[str, float]
    claims: dict[str, float]

    @staticmethod
    def from_json(raw: dict[str, Any]) -> "Result":
        ms = {name: float(found["ms"]["median"]) for name, found in raw["contenders"].items() if "wrong" not in found}
        ratios = {name: float(ratio) for name, ratio in raw["ratios"].items() if name in ms}
        same = ("case", "kind", "shape", "dtype", "active_fraction", "capacity", "flops", "bytes", "claims")
        return Result(**{name: raw[name] for name in same}, ms=ms, ratios=ratios)


@dataclasses.dataclass(frozen=True)
class Suite:
    """One result file."""

    name: str
    about: str
    left_out: dict[str, str]  # cases without a right result of ours, which are not drawn, and why
    published: Peaks | None  # from the datasheet
    measured: Peaks | None  # measured in the same run
    results: tuple[Result, ...]

    @property
    def styles(self) -> dict[str, dict[str, Any]]:
        """Color and marker of each contender, the same in all pictures of a suite; our other workloads are gray."""
        names = dict.fromkeys([_OURS, *(name for one in self.results for name in (*one.ms, *one.ratios))])
        colors, grays = itertools.cycle(_COLORS), itertools.cycle(_GRAYS)
        return {
            name: {"color": next(grays if name in VARIANTS else colors), "marker": marker}
            for name, marker in zip(names, itertools.cycle(_MARKERS))
        }


class NoData(Exception):
    """Nothing to draw, with the reason."""


def main(argv: list[str] | None = None) -> int:
    """Draws all pictures. Returns 0, or 2 with one line on stderr for files that cannot be read or written."""
    parser = argparse.ArgumentParser(prog="python -m bench.plot", description=__doc__, allow_abbrev=False)
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULT.json", help="written by bench.run")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="output folder, created if missing")
    parser.add_argument("--format", choices=["png", "svg"], default="png", help="default %(default)s")
    options = parser.parse_args(argv)
    try:
        suites = [read(path) for path in options.results]
        if len({suite.name for suite in suites}) < len(suites):
            raise ValueError("expected result files with different names, because pictures are named after them")
        options.out.mkdir(parents=True, exist_ok=True)
        with plain_style():
            for suite in suites:
                _draw_all(suite, options.out, options.format)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def read(path: Path) -> Suite:
    """Reads a result file of schema 1.

    Raises:
      ValueError: the file is not a result file, or has no right results.
      OSError: the file cannot be read.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON, got {error}") from error
    schema = raw.get("schema") if isinstance(raw, dict) else None
    if schema != _SCHEMA:
        raise ValueError(f"{path}: expected a result file of schema {_SCHEMA}, got schema {schema}")
    try:
        machine = raw["machine"]
        results = tuple(Result.from_json(result) for result in raw["results"] if result["correct"])
        left_out = {
            str(result["case"]): str(result["skipped"].get(_OURS, "its result is wrong"))
            for result in raw["results"]
            if not result["correct"]
        }
        versions = machine["versions"]
        date = str(machine["date"])[: len("2000-01-01")]
        about = f"{machine['device']}, jax {versions['jax']}, pallas_attn {versions['pallas_attn']}, {date}"
        suite = Suite(
            path.stem,
            about,
            left_out,
            _peaks(machine["peak_tflops"], machine["peak_gbps"]),
            # Older files have no measured peaks.
            _peaks(**{name: (machine.get("measured") or {}).get(name) for name in ("tflops", "gbps")}),
            results,
        )
    except KeyError as error:
        raise ValueError(f"{path}: expected a result file of schema {_SCHEMA}, got one without {error}") from error
    except (TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path}: expected a result file of schema {_SCHEMA}, got a wrong value: {error}") from error
    if not results:
        raise ValueError(f"{path}: expected right results, got none")
    return suite


def _peaks(tflops: float | None, gbps: float | None) -> Peaks | None:
    return Peaks(float(tflops), float(gbps)) if tflops and gbps else None


def _draw_all(suite: Suite, directory: Path, suffix: str) -> None:
    for case, reason in suite.left_out.items():
        print(f"left out case {case} of {suite.name}: {reason}")
    for name, draw in PICTURES.items():
        path = directory / f"{suite.name}-{name}.{suffix}"
        try:
            figure = draw(suite)
        except NoData as reason:
            print(f"left out {path}: {reason}")
            continue
        save_figure(figure, path, dpi=130)
        print(f"wrote {path}")


# --- time against active fraction, and against capacity ---


def active_fraction(suite: Suite) -> "Figure":
    """Draws time per mask of one shape. Work that follows the lists falls with the fraction of allowed pairs."""
    groups = _groups(
        suite,
        x=lambda one: one.active_fraction,
        alike=lambda one: (one.kind, one.dtype, tuple(one.shape.items())),
        missing="needs two masks over the same shape with different active fractions",
    )
    figure, panels = _panels(suite, "Time against the fraction of pairs that the mask allows", len(groups))
    for axes, group in zip(panels, groups, strict=True):
        x = [one.active_fraction or 0.0 for one in group]
        _lines(axes, suite, group, x)
        densest = group[-1].ms[_OURS] / x[-1]
        axes.plot([x[0], x[-1]], [densest * x[0], densest * x[-1]], ":", color=_TEXT, label="in proportion", zorder=1)
        axes.set_xticks(_apart(x))
        axes.xaxis.set_major_formatter(lambda x, _: f"{100 * x:.2g}%" if x < 1 else "100%")
        for where in dict.fromkeys(x):
            names = [one for one, at in zip(group, x, strict=True) if at == where]
            offset = {"xytext": (0, -6), "textcoords": "offset points", "ha": "center", "va": "top"}
            text = "\n".join(one.case for one in names)
            axes.annotate(
                text, (where, min(one.ms[_OURS] for one in names)), **offset, fontsize=6, color=_TEXT, bbox=_BEHIND_TEXT
            )
        axes.set_title(f"{group[0].kind}, {group[0].dtype}, {_shape_text(group[0].shape)}", **_panel_title())
        axes.set_xlabel("active fraction")
    _legend(figure, panels)
    return figure


def capacity(suite: Suite) -> "Figure":
    """Draws the time of the same live work in buffers of several sizes; it should not depend on the buffer."""
    groups = _groups(
        suite,
        x=lambda one: one.capacity,
        # The same live keys mean the same operations and bytes.
        alike=lambda one: (one.kind, one.dtype, _without_capacity(one), one.flops, one.bytes),
        missing="needs the same decode step at two capacities",
    )
    figure, panels = _panels(suite, "Time against capacity, with the same live keys", len(groups))
    for axes, group in zip(panels, groups, strict=True):
        _lines(axes, suite, group, [one.capacity or 0 for one in group])
        axes.set_xscale("log", base=2)
        axes.set_xticks([one.capacity or 0 for one in group], minor=False)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        shape = dict(_without_capacity(group[0]))
        axes.set_title(f"{group[0].kind}, {group[0].dtype}, {_shape_text(shape)}", **_panel_title())
        axes.set_xlabel("capacity (keys)")
    _legend(figure, panels)
    return figure


def _without_capacity(one: Result) -> tuple[tuple[str, int], ...]:
    return tuple((name, size) for name, size in one.shape.items() if name != "S")


def _groups(
    suite: Suite, x: Callable[[Result], float | None], alike: Callable[[Result], Hashable], missing: str
) -> list[list[Result]]:
    """Groups of results that differ only in x, with at least two values of x, sorted by x."""
    by_key = collections.defaultdict(list)
    for one in suite.results:
        if x(one) and _OURS in one.ms:
            by_key[alike(one)].append(one)
    groups = [sorted(group, key=lambda one: x(one) or 0) for group in by_key.values() if len(set(map(x, group))) > 1]
    if not groups:
        raise NoData(missing)
    return groups


def _apart(x: list[float]) -> list[float]:
    """Values far enough apart for labels of a logarithmic axis: each a third more than the last."""
    kept: list[float] = []
    for value in x:
        if not kept or value > kept[-1] * 4 / 3:
            kept.append(value)
    return kept


def _lines(axes: "Axes", suite: Suite, group: list[Result], x: list[float] | list[int]) -> None:
    """Draws milliseconds of each contender, ours on top, on logarithmic axes."""
    axes.set_xscale("log")
    axes.set_yscale("log")
    for name, style in suite.styles.items():
        at = [i for i, one in enumerate(group) if name in one.ms]
        if len(at) > 1:
            width = 2.2 if name == _OURS else 1.2
            y = [group[i].ms[name] for i in at]
            axes.plot(
                [x[i] for i in at], y, **style, label=name, linewidth=width, markersize=5, zorder=3 + (name == _OURS)
            )
    axes.margins(0.12, 0.2)
    _log_ticks(axes.yaxis, [one.ms[name] for one in group for name in one.ms])
    axes.set_ylabel("ms")
    _plain(axes)


# --- time against peers ---


def peers(suite: Suite) -> "Figure":
    """Draws peer time / our time. To the right of 1 we are faster; a tick marks the project's claim."""
    results = [one for one in suite.results if one.ratios]
    if not results:
        raise NoData("needs a case with a peer's time")
    rows = [(one, peer) for one in results for peer in one.ratios]
    # A row per bar, and half a row between cases.
    heights, starts = {}, {}
    y = 0.0
    for one in results:
        starts[one.case] = y
        for peer in one.ratios:
            heights[one.case, peer] = y
            y += 1.0
        y += 0.5
    figure, (axes,) = _panels(suite, "Peers' time over ours", 1, size=(7.2, 0.9 + 0.15 * y))
    axes.set_xscale("log")
    for one, peer in rows:
        ratio, at = one.ratios[peer], heights[one.case, peer]
        axes.barh(at, ratio - 1, left=1, height=0.8, color=suite.styles[peer]["color"], label=peer, zorder=2)
        outwards = 4 if ratio >= 1 else -4
        text = {"xytext": (outwards, 0), "textcoords": "offset points", "va": "center", "fontsize": 6.5, "color": _DARK}
        axes.annotate(
            f"{ratio:.2g}" if ratio < 10 else f"{ratio:.0f}", (ratio, at), ha="left" if ratio >= 1 else "right", **text
        )
        if peer in one.claims:
            axes.plot([one.claims[peer]] * 2, [at - 0.4, at + 0.4], color=_DARK, linewidth=1.6, zorder=4, label="claim")
    axes.axvline(1, color=_DARK, linewidth=1)
    middles = [starts[one.case] + (len(one.ratios) - 1) / 2 for one in results]
    axes.set_yticks(middles, [one.case for one in results])
    axes.set_ylim(y - 0.5, -1)
    _log_ticks(axes.xaxis, [1.0, *(ratio for one in results for ratio in one.ratios.values())])
    axes.set_xlabel("peer's time / ours (above 1: we are faster)")
    axes.margins(x=0.12)
    _plain(axes)
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0)
    _legend(figure, [axes])
    return figure


# --- roofline ---


def roofline(suite: Suite) -> "Figure":
    """Draws our arithmetic rates against arithmetic intensity, under the machine's ceilings.

    Fractions are of the published ceilings if they are known, else of those measured in the same run.
    """
    results = [one for one in suite.results if one.flops and one.bytes and _OURS in one.ms]
    if not results:
        raise NoData("needs a case with operations and bytes")
    figure, (axes,) = _panels(suite, "Roofline", 1, size=(7.2, max(3.6, 1.2 + 0.17 * len(results))))
    axes.set_xscale("log")
    axes.set_yscale("log")
    points = [((one.flops or 0) / (one.bytes or 1), (one.flops or 0) / one.ms[_OURS] * 1e3) for one in results]
    kinds = list(dict.fromkeys(one.kind for one in results))
    places = collections.defaultdict(list)  # points close enough to share a label
    for number, (one, point) in enumerate(zip(results, points, strict=True), start=1):
        which = kinds.index(one.kind)
        style = {"color": _COLORS[which % len(_COLORS)], "marker": _MARKERS[which % len(_MARKERS)], "linestyle": ""}
        axes.plot(*point, **style, markersize=6, zorder=3, label=one.kind)
        places[tuple(round(math.log10(value) * 12) for value in point)].append(number)
    for numbers in places.values():
        label = ", ".join(map(str, numbers))
        at = points[numbers[-1] - 1]
        axes.annotate(label, at, xytext=(4, 4), textcoords="offset points", fontsize=7, color=_DARK, zorder=5)
    ceilings = {"published": suite.published, "measured in the same run": suite.measured}
    ceilings = {name: peaks for name, peaks in ceilings.items() if peaks is not None}
    for peaks, line in zip(ceilings.values(), ("-", "--"), strict=False):
        x = [point[0] for point in points]
        x = [min(peaks.ridge, *x) / 2, peaks.ridge, max(peaks.ridge, *x) * 2]
        axes.plot(x, [peaks.ceiling(at) for at in x], line, color=_DARK, linewidth=1.4, zorder=2)
    note = "no ceilings: the file has no peaks of the machine"
    shares = [""] * len(points)
    if ceilings:
        notes = (f"{_si(1e12 * x.tflops)}FLOP/s, {_si(1e9 * x.gbps)}B/s, {name}" for name, x in ceilings.items())
        note = "ceilings: " + "; ".join(notes)
        highest = next(iter(ceilings.values()))
        shares = [f", {y / highest.ceiling(x):.0%} of the ceiling" for x, y in points]
    numbered = enumerate(zip(results, points, shares, strict=True), start=1)
    listing = [f"{i}  {one.case}: {_si(y)}FLOP/s{share}" for i, (one, (_, y), share) in numbered]
    axes.text(1.03, 1, "\n".join(listing), transform=axes.transAxes, va="top", fontsize=7, color=_TEXT, linespacing=1.5)
    axes.text(0.02, 0.97, note, transform=axes.transAxes, va="top", fontsize=7, color=_TEXT)
    axes.yaxis.set_major_formatter(lambda y, _: _si(y))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("arithmetic intensity (FLOP per byte that must move)")
    axes.set_ylabel("FLOP/s of allowed pairs")
    axes.margins(0.15, 0.2)
    _plain(axes)
    _legend(figure, [axes])
    return figure


def _si(value: float) -> str:
    """``1.5e10`` -> ``"15 G"``."""
    for prefix, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {prefix}"
    return f"{value:.3g} "


PICTURES: dict[str, Callable[[Suite], "Figure"]] = {
    "active-fraction": active_fraction,
    "capacity": capacity,
    "peers": peers,
    "roofline": roofline,
}


# --- shared by all pictures ---


def _panels(suite: Suite, title: str, count: int, size: tuple[float, float] | None = None) -> tuple["Figure", list]:
    """A figure with a title and ``count`` axes in at most two columns; ``size`` is in inches."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    columns = min(count, 2)
    rows = -(-count // columns)
    width, height = (5.0 if count == 1 else 3.8 * columns, 3.2 * rows) if size is None else size
    height += _TITLE_HEIGHT
    figure = Figure(figsize=(width, height), facecolor="white")
    figure.set_layout_engine(ConstrainedLayoutEngine(rect=(0, 0, 1, 1 - _TITLE_HEIGHT / height)))
    figure.text(0.12 / width, 1 - 0.15 / height, title, va="top", fontsize=12, fontweight="bold", color=_DARK)
    figure.text(0.12 / width, 1 - 0.42 / height, suite.about, va="top", fontsize=7.5, color=_TEXT)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for unused in panels[count:]:
        unused.set_visible(False)
    return figure, panels[:count]


def _panel_title() -> dict[str, Any]:
    return {"loc": "left", "fontsize": 8, "color": _DARK}


def _plain(axes: "Axes") -> None:
    axes.grid(True, color=_LINE, linewidth=0.5, alpha=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", colors=_TEXT, labelsize=7.5)
    axes.minorticks_off()
    for name in (axes.xaxis, axes.yaxis):
        name.label.set_color(_TEXT)
        name.label.set_fontsize(8)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_edgecolor(_LINE)


def _log_ticks(axis: Any, values: list[float]) -> None:
    """Ticks at plain numbers: 1, 2, 5, 10, ... if they fit, else powers of 10."""
    from matplotlib.ticker import LogLocator

    narrow = max(values) < 300 * min(values)
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if narrow else (1,)))
    axis.set_major_formatter("{x:g}")


def _legend(figure: "Figure", panels: list) -> None:
    """A legend below all panels, with each name once."""
    named = {label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(
        named.values(),
        named.keys(),
        loc="outside lower left",
        ncols=min(len(named), 4),
        frameon=False,
        fontsize=7.5,
        labelcolor=_TEXT,
    )


def _shape_text(shape: dict[str, int]) -> str:
    return " ".join(f"{name}{size}" for name, size in shape.items())


if __name__ == "__main__":
    sys.exit(main())
