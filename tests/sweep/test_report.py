"""The best of a sweep and whether it lies at an edge, by hand; the picture by what is drawn."""

import json
import math

import numpy as np
import pytest

from mosaicjax.errors import InputError
from mosaicjax.sweep.grid import Axis
from mosaicjax.sweep.picture import across, figure, is_logarithmic
from mosaicjax.sweep.report import best, edges, lines, points, table, to_json
from mosaicjax.sweep.runs import Status
from tests.sweep.finished import result

RATES = Axis("lr", ("1e-3", "2e-3", "4e-3"))
SEEDS = Axis("seed", ("1", "2"))
WIDTHS = Axis("embed", ("8", "16"))


def by_rate(*losses):
    """One run a rate; None is one that diverged."""
    return [
        result(loss or 0.0, Status.DIVERGED if loss is None else Status.FINISHED, lr=rate)
        for rate, loss in zip(RATES.values, losses, strict=True)
    ]


@pytest.mark.parametrize(
    ("losses", "rate", "at"),
    [
        ((3.0, 2.0, 2.5), "2e-3", {}),
        ((1.0, 2.0, 2.5), "1e-3", {"lr": "smallest"}),
        ((3.0, 2.0, 1.5), "4e-3", {"lr": "largest"}),
        # A rate that diverged was tried too: the best lies before it.
        ((3.0, 2.0, None), "2e-3", {}),
        ((None, None, 2.0), "4e-3", {"lr": "largest"}),
        # So was one that went to infinity in the end.
        ((3.0, 2.0, math.inf), "2e-3", {}),
        ((math.nan, 2.0, 3.0), "2e-3", {}),
    ],
)
def test_edges_by_hand(losses, rate, at):
    top = best(points(by_rate(*losses)))
    assert top.values == {"lr": rate}
    assert edges(top, [RATES]) == at
    said = list(lines(by_rate(*losses), [RATES]))
    end = at.get("lr")
    assert said[-1] == (
        f"lr {rate} is the {end} value tried: widen it, a better one may lie beyond"
        if end
        else f"lr {rate} lies between others that were tried"
    )


def test_edges_are_of_numbers_in_any_order():
    top = best(points([result(1.0, steps="10"), result(2.0, steps="9"), result(3.0, steps="200")]))
    # As text 9 would be the largest.
    assert edges(top, [Axis("steps", ("10", "9", "200"))]) == {}
    assert edges(top, [Axis("steps", ("10", "200"))]) == {"steps": "smallest"}
    assert edges(top, [Axis("steps", ("10",))]) == {}
    words = best(points([result(1.0, remat="NONE"), result(2.0, remat="FULL")]))
    assert edges(words, [Axis("remat", ("NONE", "FULL"))]) == {}


def test_seeds_are_averaged():
    runs = [
        result(2.0, lr="1e-3", seed="1"),
        result(2.2, lr="1e-3", seed="2"),
        # The lowest of all, but not on average.
        result(1.9, lr="2e-3", seed="1"),
        result(2.5, lr="2e-3", seed="2"),
    ]
    top = best(points(runs))
    assert top.values == {"lr": "1e-3"} and top.loss == pytest.approx(2.1)
    assert top.deviation == pytest.approx(0.2 / math.sqrt(2))
    assert (
        "best: lr 1e-3: held-out loss 2.1000 (mean of 2 seeds, standard deviation 0.1414), 1.0500"
        in "\n".join(lines(runs, [Axis("lr", ("1e-3", "2e-3")), SEEDS]))
    )
    # One seed that diverges is enough to leave a setting out.
    runs[1] = result(0.0, Status.DIVERGED, lr="1e-3", seed="2")
    assert best(points(runs)).values == {"lr": "2e-3"}


def test_seeds_alone_have_no_edge():
    runs = [result(2.0, seed="1"), result(2.4, seed="2")]
    assert list(lines(runs, [SEEDS]))[-1].startswith("best: all seeds: held-out loss 2.2000 (mean of 2 seeds")
    assert edges(best(points(runs)), [SEEDS]) == {}


def test_a_run_that_failed_is_no_number():
    runs = [result(2.0, lr="1e-3"), result(0.0, Status.FAILED, lr="2e-3")]
    assert best(points(runs)).values == {"lr": "1e-3"}
    nothing = [result(0.0, Status.DIVERGED, lr="1e-3")]
    assert best(points(nothing)) is None
    assert list(lines(nothing, [RATES]))[-1] == "no best: there is no setting whose runs all finished"


def test_the_table():
    runs = [result(2.0, lr="1e-3", embed="8"), result(0.0, Status.DIVERGED, lr="2e-3", embed="8")]
    assert table(runs, [RATES, WIDTHS]) == [
        "  lr  embed  held-out loss  bits/byte  tokens  time  dollars",
        "1e-3      8         2.0000     1.0000   1.00k  10 s    $0.01",
        "2e-3      8              -          -   1.00k  10 s    $0.01  diverged: step 3: loss nan",
    ]
    said = list(lines(runs, [RATES, WIDTHS]))
    assert said[3] == "2 runs: 1 finished, 1 diverged; 2.00k tokens in 20 s, $0.02"


def test_without_held_out_text_the_train_loss_judges():
    runs = [result(2.0, lr="1e-3"), result(1.0, lr="2e-3")]
    bare = [type(run)(**(vars(run) | {"heldout_loss": None, "bits_per_byte": None})) for run in runs]
    assert "train loss" in table(bare, [RATES])[0]
    assert best(points(bare)).loss == 2.0
    assert best(points(bare)).bits_per_byte is None


def test_json_holds_no_nan():
    runs = [result(math.nan, lr="1e-3"), result(2.0, lr="2e-3"), result(0.0, Status.DIVERGED, lr="4e-3")]
    held = json.loads(json.dumps(to_json(runs, [RATES]), allow_nan=False))
    assert held["over"] == {"lr": ["1e-3", "2e-3", "4e-3"]}
    assert held["best"]["values"] == {"lr": "2e-3"} and held["best"]["edges"] == {}
    assert [row["status"] for row in held["results"]] == ["finished", "finished", "diverged"]
    assert held["results"][0]["heldout_loss"] == "nan" and held["results"][2]["heldout_loss"] is None


@pytest.mark.parametrize(
    ("numbers", "logarithmic"),
    [
        ((1e-3, 2e-3, 4e-3), True),
        ((1e-2, 1e-3, 3e-3), True),
        ((128, 256, 512), True),
        ((1, 2, 3), False),
        ((100, 200, 300, 400), False),
        ((1e-3, 4e-3), True),
        ((10, 11), False),
        ((0.0, 0.1, 1.0), False),
        ((5,), False),
    ],
)
def test_scales(numbers, logarithmic):
    assert is_logarithmic(numbers) == logarithmic


def test_the_picture_goes_along_the_longest_axis_of_numbers():
    words = Axis("remat", ("NONE", "FULL", "DOTS", "QKV"))
    assert across([WIDTHS, RATES, words, Axis("seed", tuple("12345"))]) is RATES
    assert across([words, SEEDS]) is words and across([SEEDS]) is SEEDS


def test_the_picture_has_a_line_a_setting():
    runs = []
    for embed, first in (("8", 3.0), ("16", 2.0)):
        for rate, add in zip(RATES.values, (0.0, 0.1, None), strict=True):
            for seed in SEEDS.values:
                status = Status.DIVERGED if add is None else Status.FINISHED
                loss = first + (add or 0.0) + 0.1 * int(seed)
                runs.append(result(loss, status, lr=rate, embed=embed, seed=seed))
    plot = figure(runs, [RATES, WIDTHS, SEEDS], "a recipe").axes[0]
    assert plot.get_xscale() == "log" and plot.get_xlabel() == "lr"
    assert [text.get_text() for text in plot.get_legend().get_texts()] == ["embed 8", "embed 16"]
    drawn = [line.get_xydata().tolist() for line in plot.lines if line.get_marker() == "o"]
    np.testing.assert_allclose(drawn, [[[1e-3, 3.15], [2e-3, 3.25]], [[1e-3, 2.15], [2e-3, 2.25]]])
    crosses = [line.get_xdata().tolist() for line in plot.lines if line.get_marker() == "x"]
    assert crosses == [[4e-3], [4e-3]]
    # The bars go from the least to the most of the seeds.
    (down, up) = plot.collections[0].get_segments()[0]
    np.testing.assert_allclose([down[1], up[1]], [3.1, 3.2])


def test_the_picture_of_words_and_of_seeds():
    words = Axis("remat", ("NONE", "FULL"))
    plot = figure([result(1.0, remat="NONE"), result(2.0, remat="FULL")], [words], "a recipe").axes[0]
    assert [label.get_text() for label in plot.get_xticklabels()] == ["NONE", "FULL"]
    np.testing.assert_allclose(plot.lines[0].get_xydata(), [[0, 1], [1, 2]])
    seeds = figure([result(1.0, seed="1"), result(2.0, seed="2")], [SEEDS], "a recipe").axes[0]
    np.testing.assert_allclose(seeds.lines[0].get_xydata(), [[1, 1], [2, 2]])
    with pytest.raises(InputError, match="there is nothing to draw"):
        figure([result(0.0, Status.DIVERGED, lr="1e-3")], [RATES], "a recipe")
