import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mosaicjax.errors import InputError
from mosaicjax.report.curve import HELDOUT, SMOOTH, draw_curve, points, smoothed, smoothing_rows


def rows(count):
    made = []
    for step in range(1, count + 1):
        loss = 2.0 + 6.0 * math.exp(-step / (count / 6)) + 0.1 * math.sin(step)
        made.append({"kind": "train", "step": step, "tokens": step * 8192, "loss": loss, "time": {}})
        if step % (count // 10) == 0:
            made.append({"kind": "eval", "step": step, "tokens": step * 8192, "loss": loss + 0.2, "time": {}})
    return made


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=30), st.integers(1, 8))
def test_smoothing_is_the_mean_around_each_value(values, window):
    for i, got in enumerate(smoothed(values, window)):
        reach = min(window, i)
        assert got == pytest.approx(np.mean(values[i - reach : i + reach + 1]), abs=1e-9)


def test_smoothing_keeps_a_straight_line_but_for_its_end():
    line = [10.0 - i for i in range(20)]
    assert smoothed(line, 3)[:17] == pytest.approx(line[:17])
    assert smoothed(line, 3)[19] == pytest.approx(np.mean(line[16:]))


def test_smoothing_leaves_a_gap_where_there_is_no_number():
    got = smoothed([1.0, math.nan, 3.0, 5.0], 2)
    assert got[0] == 1.0 and math.isnan(got[1]) and got[2:] == [3.0, 4.0]


def test_one_row_smooths_over_itself():
    assert smoothing_rows(1) == 1 and smoothing_rows(1000) == 10
    assert smoothed([4.0], smoothing_rows(1)) == [4.0]


def test_points_take_one_kind_in_order():
    mixed = [
        {"kind": "train", "step": 2, "loss": math.inf},
        {"kind": "eval", "step": 2, "loss": 9.0},
        {"kind": "train", "step": 1, "loss": 3.0},
        {"kind": "train", "step": 3},
    ]
    found = points(mixed, "train", "step")
    assert found[0] == (1.0, 3.0) and found[1][0] == 2.0 and math.isnan(found[1][1]) and len(found) == 2


def colored(pixels, color):
    """Which pixels are near a colour, as (row, column) pairs."""
    wanted = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.argwhere(np.abs(pixels[..., :3] - wanted).max(axis=-1) < 0.03)


def test_the_picture_shows_both_losses_falling(tmp_path):
    from matplotlib.image import imread

    path = tmp_path / "curve.png"
    draw_curve(rows(200), path, title="a run")
    pixels = imread(path)
    assert pixels.shape[:2] == (576, 960)
    for color in (SMOOTH, HELDOUT):
        # Left of the legend's text the colour is the curve's own; it ends lower than it begins.
        found = colored(pixels, color)
        first, last = found[found[:, 1].argmin()], found[found[:, 1].argmax()]
        assert last[0] > first[0] and last[1] > 800


def test_the_same_rows_draw_the_same_bytes(tmp_path):
    for name in ("a.png", "b.png"):
        draw_curve(rows(50), tmp_path / name, title="a run", over="step")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_run_that_was_never_finite_is_drawn(tmp_path):
    from matplotlib.image import imread

    nothing = [{"kind": "train", "step": n, "loss": math.nan} for n in range(1, 5)]
    draw_curve(nothing, tmp_path / "curve.png", title="a run", over="step")
    assert len(colored(imread(tmp_path / "curve.png"), HELDOUT)) == 0


def test_nothing_to_draw_is_refused(tmp_path):
    with pytest.raises(InputError, match="expected train rows with loss and tokens; got 1 rows"):
        draw_curve([{"kind": "train", "step": 1, "loss": 2.0}], tmp_path / "curve.png", title="a run")


def test_drawing_leaves_pyplot_alone(tmp_path):
    code = f"""
import sys
from mosaicjax.report.curve import draw_curve
assert "matplotlib" not in sys.modules
draw_curve([{{"kind": "train", "step": 1, "loss": 2.0}}], {str(tmp_path / "a.png")!r}, title="a", over="step")
sys.exit("matplotlib.pyplot" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
