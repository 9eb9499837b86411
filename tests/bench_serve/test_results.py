"""Figures of answers whose times are written down, worked out by hand."""

import pytest

from mosaicjax.bench_serve.client import Answer
from mosaicjax.bench_serve.results import lines, spread, summarize

ANSWERS = [
    Answer(200, 10.0, 14.0, (11.0, 12.0, 14.0), "abc", 5, 3),
    Answer(200, 11.0, 20.0, (14.0, 15.0), "de", 7, 6),
    Answer(429, 11.5, 11.6, failure="too many"),
    Answer(200, 12.0, 13.0, (12.5,), "x", -1, -1, failure="the stream ended early"),
    Answer(0, 12.0, 12.0, failure="no connection"),
    Answer(429, 12.0, 12.1, failure="too many"),
]


def test_figures_by_hand():
    found = summarize(ANSWERS)
    assert (found["requests"], found["answered"]) == (6, 2)
    assert found["errors"] == {"429": 2, "no connection": 1, "the stream ended early": 1}
    # From the first request at 10 to the last end at 20; tokens of the two whole answers.
    assert found["seconds"] == 10
    assert (found["written_tokens"], found["prompt_tokens"]) == (9, 12)
    assert found["written_tokens_per_second"] == pytest.approx(0.9)
    assert found["prompt_tokens_per_second"] == pytest.approx(1.2)
    assert found["requests_per_second"] == pytest.approx(0.2)
    # 1 and 3 seconds: quantiles lie between them in proportion.
    assert found["first_token_seconds"] == pytest.approx({"mean": 2, "p50": 2, "p90": 2.8, "p99": 2.98})
    # Gaps of 1, 2 and 1 seconds.
    assert found["between_seconds"] == pytest.approx({"mean": 4 / 3, "p50": 1, "p90": 1.8, "p99": 1.98})
    # 3 seconds for 2 tokens behind the first, 1 second for 5.
    assert found["per_token_seconds"]["mean"] == pytest.approx((1.5 + 0.2) / 2)
    assert found["answer_seconds"]["mean"] == pytest.approx((4 + 9) / 2)
    assert found["tokens_counted_by"] == "server"


def test_pieces_count_where_the_server_does_not():
    found = summarize([Answer(200, 0.0, 4.0, (1.0, 2.0, 4.0), "abc")])
    assert (found["written_tokens"], found["tokens_counted_by"]) == (3, "pieces")
    assert found["per_token_seconds"]["mean"] == pytest.approx(1.5)
    assert "a token a piece" in lines(found)[1]


def test_nothing_answered_is_no_figure():
    found = summarize(ANSWERS[2:3])
    assert found["answered"] == found["written_tokens"] == 0 and found["first_token_seconds"] == {}
    assert lines(found)[-1] == "error 429: 1"
    assert summarize([])["seconds"] == 0 and spread([]) == {}


def test_the_screen_has_milliseconds():
    said = lines(summarize(ANSWERS))
    assert said[0] == "2 of 6 answered in 10.00 s, 0.20 a second"
    assert said[3].split() == ["first", "token", "2,000.0", "2,800.0", "2,980.0", "2,000.0"]
