"""The picture of a schedule shows its programs."""

import numpy as np
import pytest

from bench import schedule_picture


def test_both_ways_of_splitting_cover_all_blocks():
    blocks = sum(-(-length // schedule_picture.KV_BLOCK) for length in schedule_picture.ROW_LENGTHS)
    for row, size in (
        schedule_picture.shares(schedule_picture.ROW_LENGTHS),
        schedule_picture.parts(schedule_picture.ROW_LENGTHS),
    ):
        assert size.sum() == blocks
        assert size[row == 0].sum() == schedule_picture.ROW_LENGTHS[0] // schedule_picture.KV_BLOCK


def test_a_bar_for_every_program(tmp_path):
    pytest.importorskip("matplotlib")
    equal, split = schedule_picture.picture().axes
    for axes, (_, size) in (
        (equal, schedule_picture.shares(schedule_picture.ROW_LENGTHS)),
        (split, schedule_picture.parts(schedule_picture.ROW_LENGTHS)),
    ):
        np.testing.assert_array_equal([bar.get_height() for bar in axes.patches], size)
    schedule_picture.main(["--out", str(tmp_path / "schedule.png")])
    assert (tmp_path / "schedule.png").stat().st_size > 10_000


def test_another_kind_of_file_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        schedule_picture.main(["--out", str(tmp_path / "schedule.gif")])
    assert "--out: expected a file that ends in .png or .svg" in capsys.readouterr().err
