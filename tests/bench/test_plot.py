"""Pictures of result files show the file's figures and report missing ones. All figures here are invented."""

import json
import re

import matplotlib.colors
import matplotlib.image
import numpy as np
import pytest

from bench import plot
from pallas_attn.picture import plain_style

SQUARE = {"B": 1, "T": 4096, "S": 4096, "N": 8, "K": 8, "D": 64}
PAIRS = 8 * 4096 * 4096


def result(case: str, ms: dict[str, float | None], **facts) -> dict:
    """One case as ``bench.run`` writes it; a contender without a time is wrong."""

    def contender(median):
        if median is None:
            return {"wrong": 0.25}
        return {
            "ms": {"median": median, "quartiles": [0.9 * median, 1.2 * median], "rounds": 9},
            "tflops": None,
            "gbps": None,
            "tokens_per_second": None,
        }

    ratios = {name: time / ms["pallas_attn"] for name, time in ms.items() if name != "pallas_attn" and time}
    plain = {
        "case": case,
        "about": "an invented case",
        "kind": "forward",
        "shape": SQUARE,
        "dtype": "float32",
        "active_fraction": None,
        "visited_fraction": None,
        "capacity": None,
        "flops": None,
        "bytes": None,
        "correct": True,
        "error": 1e-7,
        "allowed_error": 1e-6,
        "contenders": {name: contender(time) for name, time in ms.items()},
        "ratios": ratios,
        "claims": {},
        "skipped": {"tokamax": "not installed"},
    }
    return plain | facts


def decode(capacity: int, **facts) -> dict:
    shape = {"B": 8, "T": 1, "S": capacity, "N": 16, "K": 4, "D": 64}
    ms = {"pallas_attn": 1.5 + capacity / 2**20, "jax.nn": capacity / 150}
    same = {"kind": "decode", "shape": shape, "capacity": capacity, "flops": 2.5e7, "bytes": 1.2e7}
    return result(f"decode-{capacity}", ms, **same | {"active_fraction": 768 / capacity} | facts)


def masks(kind: str = "forward") -> list[dict]:
    times = {"causal": 0.5, "dense": 1.0, "blocks": 0.1, "window": 0.03}
    return [
        result(
            f"{name}-{kind}",
            {"pallas_attn": 200 * active + 5, "jax.nn": 900.0, "torch SDPA": 170.0},
            kind=kind,
            active_fraction=active,
            flops=4 * 64 * PAIRS * active,
            bytes=4 * 4 * 64 * 8 * 4096,
            claims={"jax.nn": 3.0},
        )
        for name, active in times.items()
    ]


FULL = [
    *masks(),
    *masks("backward"),
    *map(decode, (2048, 16384, 131072)),
    result("mask-causal", {"pallas_attn": 0.4}, kind="mask"),
    result("generation", {"pallas_attn": 900.0, "transformers": 2100.0}, kind="generation"),
    result("half-wrong", {"pallas_attn": 1.0, "jax.nn": 0.5, "torch SDPA": None}),
]


def content(results: list[dict], **machine) -> dict:
    known = {
        "date": "2026-01-02T03:04:05+00:00",
        "device": "an invented processor",
        "processor": "two cores",
        "python": "3.11.7",
        "revision": None,
        "versions": {"jax": "0.10.2", "jaxlib": "0.10.2", "pallas_attn": "0.1.0"},
        "peak_tflops": None,
        "peak_gbps": None,
        "measured": None,
    }
    return {"schema": 1, "suite": "cpu", "machine": known | machine, "results": results}


@pytest.fixture
def write(tmp_path):
    def write(data, name="cpu.json"):
        path = tmp_path / name
        path.write_text(data if isinstance(data, str) else json.dumps(data))
        return path

    return write


@pytest.fixture
def run(capsys, tmp_path):
    """Draws into ``out``: ``(exit code, stdout, stderr)``."""

    def run(*paths, out=tmp_path / "out", options=()):
        code = plot.main([*map(str, paths), "--out", str(out), *options])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def axes(write):
    """The axes of one picture of some results."""

    def axes(name, results, **machine):
        with plain_style():
            figure = plot.PICTURES[name](plot.read(write(content(results, **machine))))
            figure.draw_without_rendering()
        return [x for x in figure.axes if x.get_visible()]

    return axes


def lines(axes) -> dict[str, tuple[list, list]]:
    return {
        line.get_label(): tuple(np.asarray(x).tolist() for x in line.get_data())
        for line in axes.lines
        if not line.get_label().startswith("_")
    }


def texts(axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


# --- files ---


def test_every_picture_of_every_file_is_drawn(write, run, tmp_path):
    files = write(content(FULL)), write(content(FULL, peak_tflops=1.0, peak_gbps=30.0), "gpu.json")
    code, out, err = run(*files)
    assert (code, err) == (0, "")
    names = sorted(f"{suite}-{name}.png" for suite in ("cpu", "gpu") for name in plot.PICTURES)
    assert sorted(x.name for x in (tmp_path / "out").iterdir()) == names
    assert out.count("wrote ") == len(names)
    for path in (tmp_path / "out").iterdir():
        assert path.stat().st_size < 150_000, "small enough to commit"
        pixels = matplotlib.image.imread(path)
        assert np.asarray(pixels)[..., :3].std() > 0.05
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    run(*files)
    assert {path: path.read_bytes() for path in before} == before, "the same file gives the same bytes"


def test_svg_names_the_machine(write, run, tmp_path):
    code, _, _ = run(write(content(FULL)), options=["--format", "svg"])
    assert code == 0
    for name in plot.PICTURES:
        text = (tmp_path / "out" / f"cpu-{name}.svg").read_text()
        assert "an invented processor, jax 0.10.2, pallas_attn 0.1.0, 2026-01-02 -->" in text


@pytest.mark.parametrize(
    ("results", "left_out"),
    [
        ([result("mask-causal", {"pallas_attn": 0.4}, kind="mask")], set(plot.PICTURES)),
        ([decode(2048)], {"active-fraction", "capacity"}),
        (masks(), {"capacity"}),
        ([decode(2048), decode(4096)], {"active-fraction"}),
        ([result("a", {"pallas_attn": 1.0, "jax.nn": 2.0})], {"active-fraction", "capacity", "roofline"}),
    ],
)
def test_pictures_without_figures_are_left_out_with_a_message(results, left_out, write, run, tmp_path):
    code, out, err = run(write(content(results)))
    assert (code, err) == (0, "")
    assert set(re.findall(r"left out \S*cpu-([a-z-]+).png: needs", out)) == left_out
    drawn = {x.name for x in (tmp_path / "out").iterdir()}
    assert drawn == {f"cpu-{name}.png" for name in plot.PICTURES if name not in left_out}


# --- pictures ---


def test_active_fraction_shows_the_times_of_masks_over_one_shape(axes):
    forward, backward = axes("active-fraction", FULL)
    shown = lines(forward)
    assert shown["pallas_attn"] == ([0.03, 0.1, 0.5, 1.0], pytest.approx([11.0, 25.0, 105.0, 205.0]))
    assert shown["jax.nn"] == ([0.03, 0.1, 0.5, 1.0], [900.0] * 4)
    assert shown["in proportion"] == ([0.03, 1.0], pytest.approx([205 * 0.03, 205.0]))
    assert set(texts(forward)) == {"window-forward", "blocks-forward", "causal-forward", "dense-forward"}
    assert "forward, float32, B1 T4096" in forward.get_title(loc="left")
    assert "backward" in backward.get_title(loc="left")
    assert forward.get_xscale() == forward.get_yscale() == "log"


def test_masks_of_the_same_fraction_share_a_label(axes):
    twin = masks()[0] | {"case": "twin"}
    (panel,) = axes("active-fraction", [*masks(), twin])
    assert "causal-forward\ntwin" in texts(panel)


def test_masks_over_other_shapes_make_no_line(axes):
    other = masks()[0] | {"shape": SQUARE | {"D": 128}}
    with pytest.raises(plot.NoData):
        axes("active-fraction", [masks()[1], other])


def test_capacity_shows_the_same_step_in_buffers_of_several_sizes(axes):
    (panel,) = axes("capacity", [*map(decode, (16384, 2048, 131072)), decode(4096, flops=9e9)])
    shown = lines(panel)
    assert shown["pallas_attn"] == ([2048, 16384, 131072], [1.5 + x / 2**20 for x in (2048, 16384, 131072)])
    assert shown["jax.nn"] == ([2048, 16384, 131072], [x / 150 for x in (2048, 16384, 131072)])
    ticks = [text.get_text() for text in panel.get_xticklabels()]
    assert ticks == ["2,048", "16,384", "131,072"]
    assert panel.get_title(loc="left") == "decode, float32, B8 T1 N16 K4 D64"


def test_peers_show_a_bar_for_each_ratio(axes):
    (panel,) = axes("peers", FULL)
    bars = [(bar.get_y() + bar.get_height() / 2, bar.get_x(), bar.get_x() + bar.get_width()) for bar in panel.patches]
    wanted = [ratio for one in FULL for ratio in one["ratios"].values()]
    assert len(bars) == len(wanted)
    for (_, start, end), ratio in zip(bars, wanted, strict=True):
        assert (start, end) == pytest.approx((1, ratio)), "from 1 to the ratio"
    heights = [at for at, _, _ in bars]
    assert heights == sorted(heights)
    assert len(set(heights)) == len(heights), "none hides another"
    assert panel.get_xscale() == "log"
    low, high = panel.get_xlim()
    assert low < min(wanted)
    assert high > max(wanted)
    assert [text.get_text() for text in panel.get_yticklabels()] == [one["case"] for one in FULL if one["ratios"]]
    claims = [line.get_xdata().tolist() for line in panel.lines if line.get_label() == "claim"]
    assert claims == [[3.0, 3.0]] * 8
    assert [1, 1] in [list(line.get_xdata()) for line in panel.lines], "the line where both are as fast"
    assert "0.5" in texts(panel)


def test_a_contender_has_one_color_in_all_pictures(axes):
    (peers,) = axes("peers", FULL)
    (capacity,) = axes("capacity", FULL)
    forward, _ = axes("active-fraction", FULL)
    suite_colors = [{line.get_label(): line.get_color() for line in x.lines} for x in (capacity, forward)]
    assert suite_colors[0]["jax.nn"] == suite_colors[1]["jax.nn"]
    assert suite_colors[0]["pallas_attn"] == suite_colors[1]["pallas_attn"] != suite_colors[0]["jax.nn"]
    assert matplotlib.colors.to_hex(peers.patches[0].get_facecolor()) == suite_colors[0]["jax.nn"]


def test_roofline_shows_rates_against_intensity(axes):
    results = [*masks(), *map(decode, (2048, 16384)), result("no-flops", {"pallas_attn": 1.0})]
    (panel,) = axes("roofline", results, peak_tflops=2.0, peak_gbps=50.0)
    points = [(line.get_xdata()[0], line.get_ydata()[0]) for line in panel.lines if len(line.get_xdata()) == 1]
    wanted = [
        (one["flops"] / one["bytes"], one["flops"] / (one["contenders"]["pallas_attn"]["ms"]["median"] / 1e3))
        for one in results[:-1]
    ]
    np.testing.assert_allclose(points, wanted)
    (ceiling,) = [line.get_xydata() for line in panel.lines if len(line.get_xdata()) == 3]
    (left, memory), (ridge, peak), (right, flat) = ceiling
    assert (ridge, peak, flat) == pytest.approx((2e12 / 50e9, 2e12, 2e12))
    assert memory == pytest.approx(left * 50e9)
    assert left < min(x for x, _ in points)
    assert right > max(x for x, _ in points)
    (listing,) = [text for text in texts(panel) if text.startswith("1  ")]
    share = wanted[0][1] / min(2e12, wanted[0][0] * 50e9)
    assert f"1  causal-forward: {wanted[0][1] / 1e9:.3g} GFLOP/s, {share:.0%} of the ceiling\n" in listing
    assert "no-flops" not in listing
    assert "ceilings: 2 TFLOP/s, 50 GB/s, published" in texts(panel)
    numbers = [int(number) for text in texts(panel) if re.fullmatch(r"[\d, ]+", text) for number in text.split(",")]
    assert sorted(numbers) == list(range(1, 7)), "each point is numbered, those that coincide together"


@pytest.mark.parametrize("peaks", [{}, {"peak_tflops": 2.0}, {"peak_gbps": 50.0}])
def test_without_peaks_there_are_no_ceilings_and_a_note(axes, peaks):
    (panel,) = axes("roofline", masks(), **peaks)
    assert all(len(line.get_xdata()) == 1 for line in panel.lines)
    assert "no ceilings: the file has no peaks of the machine" in texts(panel)


MEASURED = {"dtype": "float32", "tflops": 0.2, "gbps": 25.0, "side": 2048, "nbytes": 2**28}


def test_ceilings_that_were_measured_are_drawn(axes):
    (panel,) = axes("roofline", masks(), measured=MEASURED)
    (ceiling,) = [line for line in panel.lines if len(line.get_xdata()) == 3]
    assert ceiling.get_xydata()[1] == pytest.approx((8.0, 2e11))
    assert "ceilings: 200 GFLOP/s, 25 GB/s, measured in the same run" in texts(panel)
    assert any("% of the ceiling" in text for text in texts(panel))


def test_fractions_are_of_the_published_ceilings_if_both_are_known(axes):
    (panel,) = axes("roofline", masks(), measured=MEASURED, peak_tflops=2.0, peak_gbps=50.0)
    solid, dashed = [line for line in panel.lines if len(line.get_xdata()) == 3]
    assert (solid.get_linestyle(), dashed.get_linestyle()) == ("-", "--")
    assert solid.get_ydata()[2] == 2e12
    assert dashed.get_ydata()[2] == pytest.approx(2e11)
    note = "ceilings: 2 TFLOP/s, 50 GB/s, published; 200 GFLOP/s, 25 GB/s, measured in the same run"
    assert note in texts(panel)
    (listing,) = [text for text in texts(panel) if text.startswith("1  ")]
    (alone,) = axes("roofline", masks(), peak_tflops=2.0, peak_gbps=50.0)
    assert listing in texts(alone)


def test_files_from_before_peaks_were_measured_can_be_read(write, run):
    data = content(masks())
    del data["machine"]["measured"]
    code, _, err = run(write(data))
    assert (code, err) == (0, "")


def test_a_wrong_result_is_never_drawn(axes, write, run):
    wrong = masks()[0] | {
        "case": "broken",
        "correct": False,
        "contenders": {"pallas_attn": {"wrong": 0.5}},
        "ratios": {},
    }
    skipped = result("elsewhere", {"pallas_attn": 1.0}, correct=None, contenders={}, skipped={"pallas_attn": "no GPU"})
    code, out, _ = run(write(content([*masks(), wrong, skipped])))
    assert code == 0
    assert "left out case broken of cpu: its result is wrong\n" in out
    assert "left out case elsewhere of cpu: no GPU\n" in out
    for name in ("active-fraction", "peers", "roofline"):
        for panel in axes(name, [*masks(), wrong]):
            labels = [*texts(panel), *(text.get_text() for text in panel.get_yticklabels())]
            assert not any("broken" in label for label in labels)


def test_a_wrong_contender_is_never_drawn(axes):
    half = result("half-wrong", {"pallas_attn": 1.0, "jax.nn": 0.5, "torch SDPA": None})
    (peers,) = axes("peers", [half | {"ratios": {"jax.nn": 0.5, "torch SDPA": 9.0}}])
    (bar,) = peers.patches
    assert bar.get_width() == -0.5
    ours = half | {"contenders": {"pallas_attn": {"wrong": 1.0}}, "ratios": {}, "flops": 1e9, "bytes": 1e6}
    with pytest.raises(plot.NoData):
        axes("roofline", [ours])


# --- errors of a user ---


def without(key: str) -> dict:
    data = content(masks())
    del data["results"][0][key]
    return data


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("", "expected JSON"),
        ("{", "expected JSON"),
        ("[]", "expected a result file of schema 1, got schema None"),
        ({"results": []}, "expected a result file of schema 1, got schema None"),
        (content(FULL) | {"schema": 2}, "expected a result file of schema 1, got schema 2"),
        (content([]), "expected right results, got none"),
        (without("kind"), "expected a result file of schema 1, got one without 'kind'"),
        (without("contenders"), "expected a result file of schema 1, got one without 'contenders'"),
        ({"schema": 1, "machine": {}, "results": []}, "got one without 'versions'"),
        (content([masks()[0] | {"ratios": 3}]), "expected a result file of schema 1, got a wrong value"),
    ],
)
def test_files_that_are_no_results(data, message, write, run, tmp_path):
    path = write(data)
    code, out, err = run(path)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {path}: ")
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_not_there(run, tmp_path):
    code, _, err = run(tmp_path / "nothing.json")
    assert code == 2
    assert re.fullmatch(r"error: .*No such file or directory: .*nothing.json'\n", err)


def test_a_directory_that_cannot_be_written(write, run, tmp_path):
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        code, _, err = run(write(content(FULL)), out=out)
        assert code == 2
        assert err.startswith("error: ")
        assert str(tmp_path / "file") in err


def test_files_of_the_same_name(write, run, tmp_path):
    (tmp_path / "other").mkdir()
    code, _, err = run(write(content(FULL)), write(content(FULL), "other/cpu.json"))
    assert code == 2
    assert "expected result files with different names" in err


@pytest.mark.parametrize("argv", [[], ["cpu.json"], ["cpu.json", "--out", "out", "--format", "gif"]])
def test_wrong_calls(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        plot.main(argv)
    assert stop.value.code == 2
    assert "usage: python -m bench.plot" in capsys.readouterr().err
