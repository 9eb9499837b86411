import io
import math
from dataclasses import replace

import pytest

from mosaicjax.report.live import (
    LiveLine,
    Mfu,
    Progress,
    format_count,
    format_duration,
    format_progress,
    format_usd,
)

HALFWAY = Progress(
    step=1200,
    steps=4800,
    loss=3.21349,
    tokens_per_second=12_345.6,
    seconds_left=3725,
    mfu=Mfu(causal=0.4123, full=0.4456),
    cost_usd=12.25,
)


def test_the_whole_line():
    assert format_progress(HALFWAY) == (
        "step 1,200/4,800 | loss 3.2135 | 12.3k tokens/s | MFU 41.2% causal, 44.6% full | $12.25"
        " | 1 h 02 min left"
    )


def test_what_is_unknown_is_left_out():
    line = format_progress(replace(HALFWAY, mfu=None, cost_usd=None))
    assert line == "step 1,200/4,800 | loss 3.2135 | 12.3k tokens/s | 1 h 02 min left"


def test_a_diverged_run_still_has_a_line():
    line = format_progress(replace(HALFWAY, mfu=None, cost_usd=None, loss=math.nan, seconds_left=math.inf))
    assert line == "step 1,200/4,800 | loss nan | 12.3k tokens/s | unknown time left"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (0.5, "0.5"),
        (7, "7.00"),
        (99.96, "100"),
        (999.4, "999"),
        (999.6, "1.00k"),
        (12_345, "12.3k"),
        (999_600, "1.00M"),
        (2.5e9, "2.50B"),
        (1e12, "1.00T"),
        (math.inf, "inf"),
    ],
)
def test_counts(value, text):
    assert format_count(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (-3, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (200, "3 min 20 s"),
        (7500, "2 h 05 min"),
        (3 * 86400 + 4 * 3600 + 59, "3 d 04 h"),
        (math.nan, "unknown time"),
    ],
)
def test_durations(seconds, text):
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("usd", "text"), [(0, "$0.00"), (0.00123, "$0.00123"), (0.1, "$0.10"), (200_640.4, "$200,640.40")]
)
def test_dollars(usd, text):
    assert format_usd(usd) == text


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def at(step):
    return replace(HALFWAY, step=step, steps=100, mfu=None, cost_usd=None)


def test_plain_lines_keep_their_distance():
    stream, clock = io.StringIO(), Clock()
    live = LiveLine(stream, clock, plain_seconds=10)
    for step in range(1, 101):
        clock.now = step * 1.0
        live.show(at(step))
    live.end()
    shown = [int(line.split("/")[0].removeprefix("step ")) for line in stream.getvalue().splitlines()]
    # The first, each after ten seconds of the last shown, and the last one.
    assert shown == [1, 11, 21, 31, 41, 51, 61, 71, 81, 91, 100]
    assert "\r" not in stream.getvalue()


def test_a_terminal_line_is_drawn_over():
    stream, clock = Terminal(), Clock()
    live = LiveLine(stream, clock)
    for step in (1, 2, 3):
        clock.now = step * 0.15
        live.show(at(step))
    live.say("saved step 3")
    live.show(at(100))
    live.end()
    text = stream.getvalue()
    # 0.15 s after the first line is too soon; 0.3 s is not.
    assert [part.split("/")[0] for part in text.split("\rstep ")[1:]] == ["1", "3", "100"]
    assert "\r\x1b[Ksaved step 3\n" in text
    assert text.endswith("left\x1b[K\n")


def test_a_terminal_line_never_wraps(monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    stream = Terminal()
    LiveLine(stream, Clock()).show(HALFWAY)
    assert stream.getvalue() == "\r" + format_progress(HALFWAY)[:29] + "\x1b[K"
