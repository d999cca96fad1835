"""A BlockMask as text and as a picture: complete, and in agreement with the lists."""

import builtins
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import matplotlib.image
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pallas_attn as pa
from pallas_attn import grids, picture
from tests import oracle, strategies
from tests.oracle import EMPTY, FULL, PARTIAL, positions

CLASS_OF = {"·": EMPTY, "▒": PARTIAL, "█": FULL}


def build(mask: oracle.Mask, q_positions, kv_positions, q_block=4, kv_block=4) -> pa.BlockMask:
    return pa.BlockMask.from_mask(mask.build(pa.masks), q_positions, kv_positions, pa.BlockSizes(q_block, kv_block))


def of_classes(classes: np.ndarray) -> pa.BlockMask:
    """A BlockMask with these classes, in blocks of 2 x 2."""
    wanted = np.kron(classes > 0, np.ones((2, 2), bool))
    wanted[::2, ::2] &= classes == FULL  # a partial block misses one pair
    bm = build(oracle.dense(wanted[None, None]), *wanted.shape, 2, 2)
    np.testing.assert_array_equal(bm.bitmap()[0, 0], classes)
    return bm


def shown_grids(text: str) -> list[tuple[list[int], np.ndarray]]:
    """For each grid in a text: the first query of each row, and the classes of its characters."""
    found, rows = [], []
    for line in [*text.splitlines(), ""]:
        if match := re.fullmatch(r" *(\d+) ([·▒█]+)", line):
            rows.append((int(match[1]), [CLASS_OF[character] for character in match[2]]))
        elif rows:
            labels, classes = zip(*rows, strict=True)
            found.append((list(labels), np.array(classes)))
            rows = []
    return found


# --- text ---


def test_text_labels_both_axes_in_tokens():
    bm = build(oracle.causal(), positions(640, start=512)[None], 1280, 64, 32)
    lines = str(bm).splitlines()
    columns = next(line for line in lines if line.startswith("queries"))
    (labels, _), *_ = shown_grids(str(bm))
    assert labels == list(range(0, 640, 64))
    for label in re.finditer(r"\d+", columns):
        column = label.start() - len("queries ")
        assert int(label[0]) == column * 32, "a label stands over the column of its key"
    assert len(re.findall(r"\d+", columns)) == 5
    assert lines[-2] == "█ full  ▒ partial  · empty"
    assert lines[-1] == "one character = 64 queries x 32 keys"


def test_text_says_which_batch_row_and_head_with_density_and_padding():
    kv_positions = np.stack([[positions(16)] * 2, [positions(16, left=5), positions(16, right=12)]])
    lines = str(build(oracle.causal(), np.stack([positions(8, left=3), positions(8)]), kv_positions)).splitlines()
    assert [line for line in lines if line.startswith("batch")] == [
        "batch 0 of 2, head 0 of 2: density 37.5%, padding 3 of 8 queries",
        "batch 0 of 2, head 1 of 2: density 37.5%, padding 3 of 8 queries",
        "batch 1 of 2, head 0 of 2: density 62.5%, padding 5 of 16 keys",
        "batch 1 of 2, head 1 of 2: density 25.0%, padding 12 of 16 keys",
    ]


def test_text_of_many_rows_and_heads_shows_the_first_and_counts_the_others():
    text = str(build(oracle.dense(np.ones((3, 4, 8, 8), bool)), 8, 8))
    assert len(shown_grids(text)) == 4
    assert "batch 0 of 3, head 3 of 4" in text
    assert "batch 1" not in text
    assert "and 8 more" in text


def test_text_of_a_long_sequence_fits_a_terminal():
    bm = build(oracle.causal() & oracle.sliding_window(3000) | oracle.sink(4), 131072, 131072, 128, 128)
    text = str(bm)
    assert max(map(len, text.splitlines())) <= 80
    ((labels, classes),) = shown_grids(text)
    assert classes.shape == (32, 64)
    assert labels[:2] == [0, 4096]
    assert (classes[:, 0] != EMPTY).all(), "the sink, one block of sixteen"
    assert "one character = 4096 queries x 2048 keys (32x16 blocks, partial where mixed)" in text


@settings(max_examples=100)
@given(
    st.tuples(st.integers(1, 40), st.integers(1, 40)).flatmap(
        lambda shape: strategies.generators.map(
            lambda rng: np.where(rng.random(shape) < rng.random(), rng.integers(0, 3, shape), rng.integers(0, 3))
        )
    ),
    st.integers(1, 12),
    st.integers(1, 12),
)
def check_merging(classes, q_step, kv_step):
    merged = grids.merged(classes, q_step, kv_step)
    assert merged.shape == (-(-classes.shape[0] // q_step), -(-classes.shape[1] // kv_step))
    for i, j in np.ndindex(merged.shape):
        cell = classes[i * q_step : (i + 1) * q_step, j * kv_step : (j + 1) * kv_step]
        assert merged[i, j] == (cell[0, 0] if len(np.unique(cell)) == 1 else PARTIAL)


def test_scaling_down_loses_no_region():
    check_merging()


@pytest.mark.parametrize("wanted", [EMPTY, PARTIAL, FULL])
def test_a_single_block_shows_at_any_scale(wanted):
    classes = np.full((100, 200), FULL if wanted == EMPTY else EMPTY)
    classes[57, 131] = wanted
    ((labels, shown),) = shown_grids(grids.as_text(of_classes(classes), max_rows=10, max_columns=16))
    assert shown.shape == (10, 16)
    assert labels[5] == 2 * 50
    assert shown[5, 131 // 13] == PARTIAL
    assert (np.delete(shown, 5, 0) == classes[0, 0]).all()


# --- PNG and SVG ---


def colors(path: Path, shape: tuple[int, int]) -> np.ndarray:
    """The color in the middle of each cell of a PNG whose grid has the given rows and columns."""
    pixels = (matplotlib.image.imread(path)[..., :3] * 255).round().astype(int)
    # Lines of pixels across the grid have much more ink than lines through text.
    ink = (pixels < 250).any(-1)
    rows, columns = (np.flatnonzero(x > 0.8 * x.max()) for x in (ink.mean(1), ink.mean(0)))
    top, bottom, left, right = rows[0], rows[-1], columns[0], columns[-1]
    y = (top + (np.arange(shape[0]) + 0.5) * (bottom - top) / shape[0]).astype(int)
    x = (left + (np.arange(shape[1]) + 0.5) * (right - left) / shape[1]).astype(int)
    return pixels[y[:, None], x]


def rgb(color: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(color[1:]))


def classes_in(path: Path, shape: tuple[int, int]) -> np.ndarray:
    tones = np.array([rgb(x) for x in (picture._EMPTY_COLOR, picture._PARTIAL_COLOR, picture._FULL_COLOR)])
    distance = np.abs(colors(path, shape)[:, :, None] - tones).max(-1)
    assert (distance.min(-1) <= 2).all(), "every cell has one of the three tones"
    return distance.argmin(-1)


@pytest.mark.parametrize("shape", [(1, 1), (12, 30), (64, 64)])
def test_every_block_has_the_tone_of_its_class(shape, tmp_path):
    classes = np.random.default_rng(0).integers(0, 3, shape)
    pa.save_picture(of_classes(classes), tmp_path / "mask.png")
    np.testing.assert_array_equal(classes_in(tmp_path / "mask.png", shape), classes)


def test_a_huge_grid_is_scaled_down_and_loses_nothing(tmp_path):
    bm = build(oracle.causal() & oracle.sliding_window(4096) | oracle.sink(1), 131072, 131072, 128, 128)
    assert bm.grid == (1024, 1024)
    with picture.plain_style():
        (axes,) = picture._figure(grids.grid_of(bm, 0, 0), bm, "").axes
    (image,) = axes.images
    shown = np.asarray(image.get_array())
    assert tuple(image.get_extent()) == (0, 131072, 131072, 0)
    assert axes.get_window_extent().width / 256 > 2, "a cell is some pixels wide, even on a screen of 100 dpi"
    np.testing.assert_array_equal(shown, grids.merged(np.asarray(bm.bitmap()[0, 0]), 4, 4))
    assert (shown[:, 0] != EMPTY).all()
    pa.save_picture(bm, tmp_path / "mask.png")
    assert (tmp_path / "mask.png").stat().st_size > 10_000


def test_the_chosen_row_and_head_are_drawn(tmp_path):
    array = np.random.default_rng(0).random((2, 3, 6, 6)) < 0.5
    bm = build(oracle.dense(array), 6, 6, 1, 1)
    for b, h in np.ndindex(2, 3):
        pa.save_picture(bm, tmp_path / "mask.png", batch=b, head=h)
        shown = classes_in(tmp_path / "mask.png", (6, 6))
        np.testing.assert_array_equal(shown, np.where(array[b, h], FULL, EMPTY))


def svg_text(bm: pa.BlockMask, path: Path, **options) -> str:
    """The texts of an SVG: matplotlib adds each as a comment beside its outlines."""
    pa.save_picture(bm, path, **options)
    return "\n".join(re.findall(r"<!-- (.*?) -->", path.read_text()))


def test_a_picture_says_what_it_shows(tmp_path):
    kv_positions = np.stack([positions(2048), positions(2048, left=300)])
    bm = build(oracle.causal(), kv_positions, kv_positions, 128, 128)
    text = svg_text(bm, tmp_path / "mask.svg", batch=1, title="$causal$ & more")
    density = float(np.mean(np.asarray(bm.bitmap())[1] > 0))
    assert "$causal$ &amp; more" in text, "a title is no formula"
    assert f"density {density:.1%}" in text
    assert "blocks of 128 x 128" in text
    assert "batch 1 of 2, all heads; padding: 300 of 2,048 queries, 300 of 2,048 keys" in text
    for word in ("keys (tokens)", "queries (tokens)", "2,048", "full", "partial", "empty", "\npadding"):
        assert word in text
    assert "\npadding" not in svg_text(bm, tmp_path / "mask.svg", batch=0), "a legend of what is there"
    large = build(oracle.causal(), 600, 300, 1, 1)
    assert "(one cell = 3 x 2 blocks)" in svg_text(large, tmp_path / "mask.svg")


def test_padding_is_hatched_and_the_rest_is_not(tmp_path):
    bm = build(oracle.full(), positions(8, right=4)[None], positions(8, left=4)[None])
    pa.save_picture(bm, tmp_path / "mask.png")
    # Among cells a sixteenth of a block wide, some must show the hatch, which has none of the tones.
    cells = colors(tmp_path / "mask.png", (160, 160))
    tones = np.array([rgb(x) for x in (picture._EMPTY_COLOR, picture._FULL_COLOR, "#ffffff")])
    other = np.abs(cells[:, :, None] - tones).max(-1).min(-1) > 20
    inside = (slice(4, 76), slice(84, 156))  # queries 0-3, keys 4-7, the only tokens
    assert not other[inside].any()
    other[inside] = True
    for quarter in (other[:76, :76], other[84:, :76], other[84:, 84:]):
        assert quarter.mean() > 0.1


@pytest.mark.parametrize(
    ("padding", "runs"),
    [
        ([], []),
        ([0, 1, 2], [[0, 3]]),
        ([2, 5, 6, 9], [[2, 3], [5, 7], [9, 10]]),
        (range(10), [[0, 10]]),
    ],
)
def test_runs_of_padding(padding, runs):
    mask = np.zeros(10, bool)
    mask[list(padding)] = True
    assert picture._runs(mask).tolist() == runs


def test_runs_of_padding_in_a_long_sequence():
    mask = np.zeros(100_000, bool)
    mask[:30_000] = mask[77_000:] = True
    mask[50_000:51_000:2] = True
    (first, last), (other, end) = picture._runs(mask).tolist()
    assert (first, end) == (0, 100_000)
    assert 30_000 - 98 < last <= 30_000
    assert 77_000 <= other < 77_000 + 98


@pytest.mark.parametrize("suffix", [".png", ".svg", ".PNG"])
def test_the_same_mask_gives_the_same_bytes_whatever_is_configured(suffix, tmp_path):
    bm = build(oracle.causal(), positions(32, left=9)[None], positions(32, left=9)[None])
    pa.save_picture(bm, tmp_path / f"one{suffix}")
    configured = {"font.size": 30, "figure.dpi": 30, "savefig.facecolor": "red", "image.interpolation": "bilinear"}
    with matplotlib.rc_context(configured):
        pa.save_picture(bm, str(tmp_path / f"two{suffix}"))
        assert matplotlib.rcParams["font.size"] == 30, "what a user has configured stays"
    content = (tmp_path / f"one{suffix}").read_bytes()
    assert content == (tmp_path / f"two{suffix}").read_bytes()
    assert content.startswith(b"\x89PNG" if suffix != ".svg" else b"<?xml")
    for word in (b"dc:date", b"Matplotlib v", b"Software"):
        assert word not in content


def test_nothing_global_is_touched_and_no_display_is_asked_for():
    program = """
import sys, tempfile
import pallas_attn as pa
assert "matplotlib" not in sys.modules
bm = pa.BlockMask.from_mask(pa.masks.causal(), 8, 8, pa.BlockSizes(4, 4))
pa.save_picture(bm, tempfile.mkdtemp() + "/mask.png")
assert "matplotlib" in sys.modules and "matplotlib.pyplot" not in sys.modules
"""
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=300, check=False)
    assert finished.returncode == 0, finished.stderr.decode()


def test_without_matplotlib_the_extra_is_named(monkeypatch, tmp_path):
    def without(name, *args, **kwargs):
        if name.partition(".")[0] == "matplotlib":
            raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")
        return actual(name, *args, **kwargs)

    actual = builtins.__import__
    bm = build(oracle.causal(), 8, 8)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r'pip install "pallas-attn\[plots\]"'):
        pa.save_picture(bm, tmp_path / "mask.png")
    assert "density" in str(bm), "text needs no library"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mask.gif", {}, r"path: expected a file that ends in .png or .svg, got '.*mask.gif'"),
        ("mask", {}, r"path: expected a file that ends in .png or .svg"),
        ("nowhere/mask.png", {}, r"path: expected a directory that exists, got '.*nowhere'"),
        ("directory.png", {}, r"path: expected a file, got the directory '.*directory.png'"),
        ("mask.png", {"batch": 2}, r"batch: expected an index from 0 to 1 into the lists, got 2"),
        ("mask.png", {"batch": -1}, r"batch: expected an index from 0 to 1 into the lists, got -1"),
        ("mask.png", {"head": 1}, r"head: expected an index from 0 to 0 into the lists, got 1"),
    ],
)
def test_wrong_arguments(name, options, message, tmp_path):
    (tmp_path / "directory.png").mkdir()
    bm = build(oracle.prefix(np.array([3, 5])), 8, 8)
    with pytest.raises(ValueError, match=message):
        pa.save_picture(bm, tmp_path / name, **options)
    assert [x.name for x in tmp_path.iterdir()] == ["directory.png"]


def test_what_is_no_block_mask_or_has_no_values(tmp_path):
    with pytest.raises(
        TypeError, match=r"block_mask: expected a BlockMask \(BlockMask.from_mask makes one\), got Causal"
    ):
        pa.save_picture(pa.masks.causal(), tmp_path / "mask.png")

    @jax.jit
    def traced(q_positions):
        pa.save_picture(build(oracle.causal(), q_positions, 8), tmp_path / "mask.png")
        return q_positions

    with pytest.raises(ValueError, match="got a traced BlockMask; draw it outside of jit"):
        traced(jnp.arange(8, dtype=jnp.int32)[None])
