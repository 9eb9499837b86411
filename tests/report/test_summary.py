import json
import math
from dataclasses import replace

import pytest

from mosaicjax.hardware import Price
from mosaicjax.report.summary import (
    Heldout,
    Outcome,
    Planned,
    Seconds,
    summarize,
    summary_line,
    write_summary,
)

# 3,600 s in all, of which 2,000 s in steps and waiting for data: 2e9 tokens are 1e6 a second while training.
OUTCOME = Outcome(
    steps=1000,
    tokens=2_000_000_000,
    seconds=Seconds(total=3600, compile=300, evaluate=600, save=100, data_wait=200, train=1800),
    train_loss=2.5,
    heldout=Heldout(loss=3 * math.log(2), bytes_per_token=4.0),
    chip="v5e",
    chips=256,
    price=Price(1.20, "a list", "2026-01-01"),
)


def test_summary_by_hand():
    summary = summarize(OUTCOME)
    assert summary["steps"] == 1000 and summary["tokens"] == 2_000_000_000
    assert summary["seconds"] == {
        "total": 3600,
        "compile": 300,
        "evaluate": 600,
        "save": 100,
        "data_wait": 200,
        "train": 1800,
        "other": 600,
    }
    assert summary["tokens_per_second"]["training"] == pytest.approx(1e6)
    assert summary["tokens_per_second"]["overall"] == pytest.approx(2e9 / 3600)
    assert summary["hardware"] == {"chip": "v5e", "chips": 256}
    assert summary["loss"] == {"train": 2.5}
    # A loss of 3 bits a token: perplexity 8, and 3/4 bit a byte at four bytes a token.
    assert summary["heldout"]["perplexity"] == pytest.approx(8)
    assert summary["heldout"]["bits_per_byte"] == pytest.approx(0.75)
    # One hour of 256 chips at $1.20 is $307.20, over 2,000 million tokens.
    assert summary["cost"]["usd"] == pytest.approx(307.20)
    assert summary["cost"]["usd_per_million_tokens"] == pytest.approx(0.1536)
    assert summary["cost"]["source"] == "a list" and summary["cost"]["date"] == "2026-01-01"


def test_line_by_hand():
    assert summary_line(OUTCOME) == (
        "2.00B tokens in 1 h 00 min (training 50%, evaluation 17%, other 17%, compile 8%, data wait 6%,"
        " saving 3%); 1.00M tokens/s while training, goodput 50%; held-out loss 2.0794, perplexity 8.00,"
        " 0.7500 bits/byte; $307.20 at $1.20 a chip hour (a list, 2026-01-01)"
    )


def test_the_measured_bill_stands_beside_the_planned_one():
    found = replace(OUTCOME, planned=Planned("v5e:16x16", 1.25e6, 0.0683))
    assert summarize(found)["planned"] == {
        "topology": "v5e:16x16",
        "tokens_per_second": 1.25e6,
        "usd_per_million_tokens": 0.0683,
    }
    # 2,000 s in steps and waiting for data: 256 x $1.20 x 2,000 / 3,600 over 2,000 million tokens.
    assert summary_line(found).endswith(
        "; planned on v5e:16x16: 1.25M tokens/s and $0.0683 a million, measured in steps $0.0853"
        " (1.25 x the measured speed)"
    )
    assert summarize(OUTCOME)["planned"] is None and summarize(OUTCOME)["goodput"] == 0.5


def test_what_is_unknown_is_said():
    bare = replace(OUTCOME, heldout=None, price=None, chip="cpu", chips=1)
    assert summarize(bare)["cost"] is None and summarize(bare)["heldout"] is None
    assert summary_line(bare).endswith("train loss 2.5000; no price known for cpu")


@pytest.mark.parametrize(("loss", "perplexity"), [(1000.0, "inf"), (math.inf, "inf"), (math.nan, "nan")])
def test_a_diverged_run_has_a_legal_summary(tmp_path, loss, perplexity):
    write_summary(str(tmp_path), replace(OUTCOME, train_loss=loss, heldout=Heldout(loss, 4.0)))

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    summary = json.loads((tmp_path / "summary.json").read_text(), parse_constant=refuse)
    assert summary["heldout"]["perplexity"] == perplexity


def test_a_run_of_no_steps():
    empty = replace(
        OUTCOME, steps=0, tokens=0, seconds=Seconds(10, compile=10, evaluate=0, save=0, data_wait=0, train=0)
    )
    summary = summarize(empty)
    assert summary["tokens_per_second"] == {"overall": 0.0, "training": "nan"}
    assert summary["cost"]["usd_per_million_tokens"] is None
    assert "nan tokens/s" in summary_line(empty)


def test_written_file_is_the_summary(tmp_path):
    write_summary(str(tmp_path), OUTCOME)
    assert json.loads((tmp_path / "summary.json").read_text()) == summarize(OUTCOME)
