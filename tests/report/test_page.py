"""The page's figures against the files of the runs, read back from the text of the page."""

import html
import json
import math
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mosaicjax.cli import main
from mosaicjax.errors import InputError
from mosaicjax.models import flops
from mosaicjax.recipe_file import load
from mosaicjax.report import chart
from mosaicjax.report.page import MOST_RUNS, losses, names_of, page
from mosaicjax.report.shown import flops_of, read

VOID = {"meta", "link", "line", "rect", "polyline", "circle", "br"}


class Shape(HTMLParser):
    """What is open, and all tags with their attributes; a tag that closes another is an error."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.text = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def shape(text):
    found = Shape()
    found.feed(text)
    assert not found.open
    return found


@pytest.fixture(scope="module")
def other_run(tiny_run, tmp_path_factory):
    """The same files with another rate, seed and outcome, under a name that a page must escape."""
    out = tmp_path_factory.mktemp("runs") / "other <b>&"
    shutil.copytree(tiny_run, out)
    recipe = json.loads((out / "recipe.json").read_text())
    recipe["seed"], recipe["optimizer"]["lr"]["peak"] = 5, 1e-3
    (out / "recipe.json").write_text(json.dumps(recipe))
    summary = json.loads((out / "summary.json").read_text())
    summary["heldout"]["bits_per_byte"], summary["tokens"] = 1.23456, 7_654_321
    (out / "summary.json").write_text(json.dumps(summary))
    return out


def test_figures_are_those_of_the_run(tiny_run, other_run, tmp_path):
    assert main(["report", str(tiny_run), str(other_run), "--out", str(tmp_path / "page.html")]) == 0
    text = (tmp_path / "page.html").read_text()
    found = shape(text)
    tags = [tag for tag, _ in found.tags]
    # Self-contained: nothing is run, and nothing is fetched.
    assert "script" not in tags and "img" not in tags
    assert {attributes.get("href") for tag, attributes in found.tags if tag == "link"} == {"data:,"}
    assert "http" not in text.replace("http-equiv", "")
    for run in (tiny_run, other_run):
        summary = json.loads((run / "summary.json").read_text())
        cells = " ".join(found.text)
        assert f"{summary['heldout']['bits_per_byte']:.4f}" in cells
        assert f"{summary['loss']['train']:.4f}" in cells
        assert f"{summary['tokens']:,}" in cells
    assert "other <b>&" in " ".join(found.text)
    # Of the two recipes' fields those that differ, and no others.
    differs = text[text.index("What differs") : text.index("Samples")]
    rows = re.findall(r"<tr><td>(.*?)</td><td>(.*?)</td><td>(.*?)</td></tr>", differs)
    assert {row[0] for row in rows} == {"optimizer.lr.peak", "seed"}
    values = {name: (mine, other) for name, mine, other in rows}
    assert values["optimizer.lr.peak"] == ("0.002", "0.001") and values["seed"][1] == "5"


@pytest.mark.parametrize("over", ["tokens", "FLOPs"])
def test_curves_are_the_rows_of_the_metrics(tiny_run, over):
    """Each point of the drawing, back through the axes, is a row: six steps, too few to be smoothed."""
    rows = [json.loads(line) for line in (tiny_run / "metrics.jsonl").read_text().splitlines()]
    shown = read(str(tiny_run), "tiny")
    text = page([shown], "one")
    svg = text[text.index(f'aria-label="Loss over {over}"') :]
    svg = svg[: svg.index("</svg>")]
    at = re.search(r'data-name="tiny" points="(.*?)"', svg).group(1).split()
    drawn = np.array([[float(each) for each in pair.split(",")] for pair in at])
    train = [row for row in rows if row["kind"] == "train"]
    held = [row for row in rows if row["kind"] == "eval"]
    recipe = shown.recipe
    each = flops.per_token(recipe.model.build(), recipe.seq).causal
    by = {"tokens": lambda row: row["tokens"], "FLOPs": lambda row: row["tokens"] * each}[over]
    x = np.array([by(row) for row in train], float)
    smooth = chart.smooth([(float(a), row["loss"]) for a, row in zip(x, train, strict=True)])
    y = np.array([value for _, value in smooth])
    lines = [chart.Line("tiny", 0, smooth), chart.Line("held", 0, [(by(row), row["loss"]) for row in held])]
    x_axis, y_axis = chart.bounds(lines)
    np.testing.assert_allclose(drawn[:, 0], [x_axis(each) for each in x], atol=0.006)
    np.testing.assert_allclose(drawn[:, 1], [y_axis(each) for each in y], atol=0.006)
    assert len(re.findall("<circle", svg)) == len(held)


def test_losses_of_pairs_are_called_so(tiny_run):
    shown = read(str(tiny_run), "tiny")
    paired = replace(shown, rows=[{**row, "reward_accuracy": 0.5} for row in shown.rows])
    for runs, unit in (([shown], "nats a token"), ([paired], "nats a pair"), ([shown, paired], "nats")):
        assert {each.y_name for each in losses(runs)} == {unit}


def test_flops_are_counted_phase_by_phase():
    """77 steps of 16 rows of 32 tokens, then steps of 2 rows of 256."""
    given = ["--steps=84", "--phases.0.step=77"]
    recipe = load(str(Path(__file__).parents[2] / "recipes/speedrun/best.py"), given).recipe
    decoder = recipe.model.build()
    short, long = (512 * flops.per_token(decoder, seq).causal for seq in (32, 256))
    expected = [0, short, 77 * short, 77 * short + 3 * long, 77 * short + 7 * long]
    assert flops_of(recipe, [0, 1, 77, 80, 84]) == pytest.approx(expected)
    assert long > 1.02 * short


@given(
    low=st.floats(-1e6, 1e6),
    span=st.floats(1e-6, 1e9),
    most=st.integers(2, 9),
)
def test_ticks_are_round_and_within(low, span, most):
    axis = chart.Axis(low, low + span, 0.0, 100.0)
    if axis.high <= axis.low:
        return
    ticks = axis.ticks(most)
    assert len(ticks) <= most + 1
    slack = 1e-6 * span + 1e-9 * abs(low)
    assert all(axis.low - slack <= tick <= axis.high + slack for tick in ticks)
    steps = np.diff(ticks)
    if len(steps):
        lead = steps[0] / 10.0 ** math.floor(math.log10(steps[0]) + 1e-9)
        assert min(abs(lead - each) for each in (1, 2, 5, 10)) < 1e-3 * max(1, abs(low) / span)


@given(st.lists(st.one_of(st.floats(-9, 9), st.just(math.nan)), max_size=80), st.integers(1, 30))
def test_thinned_lines_keep_their_mean_and_end(values, most):
    points = [(float(x), y) for x, y in enumerate(values)]
    found = chart.thinned(points, most)
    assert len(found) <= max(most, 0) or len(points) <= most
    if points:
        assert found[-1][0] == points[-1][0]
    size = math.ceil(len(points) / most) if points else 1
    for number, (_, y) in enumerate(found):
        part = [each for each in values[number * size : (number + 1) * size] if not math.isnan(each)]
        assert y == pytest.approx(np.mean(part)) if part else math.isnan(y)


def test_gaps_part_a_line():
    points = [(0.0, 1.0), (1.0, math.nan), (2.0, 3.0), (3.0, 4.0), (4.0, math.nan)]
    assert chart.pieces(points) == [[(0.0, 1.0)], [(2.0, 3.0), (3.0, 4.0)]]


def test_names_are_the_shortest_that_differ():
    assert names_of(["runs/a", "runs/b"]) == ["a", "b"]
    assert names_of(["one/a/", "two/a"]) == ["one/a", "two/a"]
    with pytest.raises(InputError, match="a run is given twice"):
        names_of(["runs/a", "runs/a"])


def test_scores_of_tasks_are_those_that_were_kept(tiny_run, other_run):
    (other_run / "eval").mkdir()
    results = {
        "results": {
            "easy": {"alias": "easy", "acc,none": 0.5, "acc_stderr,none": 0.0123, "exact,strict": 0.25},
            "text": {"word_perplexity,none": 12.5, "word_perplexity_stderr,none": "N/A"},
        }
    }
    gauntlet = {
        "categories": {"reading": {"score": 0.3333}, "maths": {"score": None, "missing": ["a", "b"]}},
        "averages": {"all": {"score": None, "missing": ["maths"]}},
    }
    (other_run / "eval" / "results.json").write_text(json.dumps(results))
    (other_run / "eval" / "gauntlet.json").write_text(json.dumps(gauntlet))
    plain, other = read(str(tiny_run), "plain"), read(str(other_run), "other")
    assert other.scores == {
        "easy, acc": "0.5000 ± 0.0123",
        "easy, exact (strict)": "0.2500",
        "text, word_perplexity": "12.5000",
        "Gauntlet, reading": "0.3333",
        "Gauntlet, maths": "partial: 2 missing",
        "Gauntlet, all": "partial: 1 missing",
    }
    text = page([plain, other], "both")
    part = text[text.index("<h2>Tasks") : text.index("<h2>What differs")]
    assert len(re.findall("<tr>", part)) == 1 + len(other.scores) and "0.5000 ± 0.0123" in part
    assert "None: `mosaicjax eval" in page([plain], "one")


def test_what_cannot_be_is_refused(tiny_run, tmp_path, capsys):
    shown = read(str(tiny_run), "tiny")
    with pytest.raises(InputError, match="runs of a report; expected 1 to 8; got 9"):
        page([shown] * (MOST_RUNS + 1), "many")
    assert main(["report", str(tmp_path / "none"), "--out", str(tmp_path / "x.html")]) == 2
    assert "no metrics.jsonl" in capsys.readouterr().err
    assert not (tmp_path / "x.html").exists()


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1_200])
def test_a_browser_draws_it(tiny_run, other_run, tmp_path, width):
    """In headless Chromium: every chart has its lines, nothing is said on the console, nothing is cut off."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium on this machine")
    path = tmp_path / "page.html"
    main(["report", str(tiny_run), str(other_run), "--out", str(path)])
    # Read back by a frame around it, for the page itself has no script.
    probe = tmp_path / "probe.html"
    probe.write_text(
        f'<iframe id="f" src="page.html" style="width:{width}px;height:4000px"></iframe><pre id="said"></pre>'
        "<script>f.onload = () => { const d = f.contentDocument;"
        " const boxes = [...d.querySelectorAll('svg')].map(e => e.getBoundingClientRect());"
        " said.textContent = JSON.stringify({charts: boxes.length,"
        " lines: d.querySelectorAll('polyline').length,"
        " drawn: [...d.querySelectorAll('polyline')].filter(e => e.getTotalLength() > 1).length,"
        " inside: boxes.every(b => b.width > 200 && b.right <= d.documentElement.clientWidth + 1),"
        " scroll: d.documentElement.scrollWidth <= d.documentElement.clientWidth}); }</script>"
    )
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        "--disable-background-networking",
    ]
    flags += [
        "--disable-component-update",
        "--disable-sync",
        "--disable-quic",
        "--allow-file-access-from-files",
    ]
    done = subprocess.run(
        [chromium, *flags, "--enable-logging=stderr", f"--user-data-dir={tmp_path}/profile", "--dump-dom"]
        + ["--virtual-time-budget=5000", "--window-size=1400,4200", probe.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    said = json.loads(html.unescape(re.search(r'<pre id="said">(.*?)</pre>', done.stdout).group(1)))
    assert "CONSOLE" not in done.stderr
    assert said["charts"] >= 5 and said["inside"] and said["scroll"]
    assert said["lines"] == said["drawn"] > 0
