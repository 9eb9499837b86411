"""Figures beside what was asked, and beside plain counts."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mosaicjax.serve.driver import Driver
from mosaicjax.serve.limits import InFlight, Limits
from mosaicjax.serve.metrics import BOUNDS, CONTENT_TYPE, Histogram, Metrics, Recent
from tests.serve import served
from tests.serve.test_limits import Asker

PATH = "/v1/completions"


def test_figures_are_what_was_asked(free_engine):
    engine = free_engine
    engine.open()
    with served.running(engine, usd_per_hour=3.6) as server, server.client() as client:
        begun = server.figures()
        rng = np.random.default_rng(4)
        read = written = completions = 0
        for _ in range(6):
            n, length = int(rng.integers(1, 4)), int(rng.integers(1, 40))
            body = {"prompt": "x" * length, "n": n, "max_tokens": int(rng.integers(1, 9))}
            used = served.asked(client, PATH, body)["usage"]
            # A prompt is read for each of its completions, but for what of it they share.
            read, completions = read + n * used["prompt_tokens"], completions + n
            written += used["completion_tokens"]
        client.post(PATH, json={"prompt": 3})
        client.get("/nowhere")
        answer = client.get("/metrics")
        assert answer.headers["content-type"] == CONTENT_TYPE
        found = served.figures(answer.text)

        def more(name):
            return found[f"mosaicjax_{name}"] - begun[f"mosaicjax_{name}"]

        assert more("completions_total") == more("completions_finished_total") == completions
        assert more("prompt_tokens_total") == read and more("tokens_total") == written
        assert more("answers_total") == 6 and more("refusals_total") == 2 and more("faults_total") == 0
        first = "time_to_first_token_seconds"
        assert more(f"{first}_count") == more(f'{first}_bucket{{le="+Inf"}}') == completions
        assert found[f"mosaicjax_{first}_sum"] > 0
        assert found["mosaicjax_in_flight"] == found["mosaicjax_queue"] == found["mosaicjax_rows_used"] == 0
        assert found["mosaicjax_rows"] == 4 and found["mosaicjax_cache_pages"] == 160
        uptime = found["mosaicjax_uptime_seconds"]
        assert found["mosaicjax_usd_total"] == pytest.approx(uptime * 0.001)
        total = found["mosaicjax_tokens_total"]
        assert found["mosaicjax_usd_per_million_tokens"] == pytest.approx(uptime * 0.001 / total * 1e6)
        engine.shut()
        asker = Asker(server, {"prompt": "x" * 30, "n": 6, "max_tokens": 30, "ignore_eos": True})
        server.until(lambda: server.service.in_flight.total == 6)
        engine.let(2)
        found = server.figures()
        assert (found["mosaicjax_queue"], found["mosaicjax_rows_used"]) == (2, 4)
        assert found["mosaicjax_cache_pages_used"] == engine.pages.held > 0
        assert found["mosaicjax_in_flight"] == 6
        engine.open()
        assert asker.status() == 200


@given(st.lists(st.floats(0, 60)))
def test_histograms_count_what_is_no_larger(values):
    histogram = Histogram(BOUNDS)
    for value in values:
        histogram.observe(value)
    found = served.figures("\n".join(histogram.lines("x")))
    for bound in BOUNDS:
        assert found[f'x_bucket{{le="{bound}"}}'] == sum(value <= bound for value in values)
    assert found['x_bucket{le="+Inf"}'] == found["x_count"] == len(values)
    assert found["x_sum"] == pytest.approx(sum(values))


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 9))), st.integers(1, 20))
def test_what_came_in_the_last_seconds(steps, seconds):
    recent, now, come = Recent(seconds), 0, []
    for wait, count in steps:
        now += wait
        recent.add(count, now + 0.5)
        come.append((now, count))
        assert recent.total(now + 0.9) == sum(count for at, count in come if at > now - seconds)


def test_rates_and_prices(free_engine):
    """With a clock of the test's: tokens a second over the last minute, dollars over the whole time."""
    now = [100.0]
    driver, in_flight = Driver(free_engine), InFlight(Limits())
    metrics = Metrics(driver, in_flight, None, clock=lambda: now[0])
    now[0] += 20
    metrics.tokens(50)
    assert served.figures(metrics.text())["mosaicjax_tokens_per_second"] == 2.5
    now[0] += 30
    metrics.tokens(70)
    now[0] += 40
    found = served.figures(metrics.text())
    assert found["mosaicjax_tokens_per_second"] == pytest.approx(70 / 60)
    assert found["mosaicjax_uptime_seconds"] == 90
    assert not any("usd" in name for name in found), "nobody knows the price"
    for line in metrics.text().splitlines():
        assert line.startswith(("# HELP mosaicjax_", "# TYPE mosaicjax_", "mosaicjax_"))
