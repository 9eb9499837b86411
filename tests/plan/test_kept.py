"""A run finds the plan of its own program, and no other."""

import json

import jax
import pytest

from mosaicjax import recipe_file
from mosaicjax.plan.kept import keep, planned
from mosaicjax.report.summary import Planned
from mosaicjax.step import Step, digest
from tests import tiny

PLAN = {"program": "ab" * 32, "topology": {"name": "v5e:2x2"}, "tokens_per_second": 8.0}


def test_a_plan_is_found_by_program_and_chip(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "mosaicjax" / "plan"
    keep(folder, PLAN)
    assert planned("ab" * 32, "v5e") is None, "it has no bill"
    keep(folder, {**PLAN, "usd_per_million_tokens": 0.5})
    keep(folder, {**PLAN, "usd_per_million_tokens": 0.25, "tokens_per_second": 16.0})
    assert planned("ab" * 32, "v5e") == Planned("v5e:2x2", 16.0, 0.25)
    assert planned("ab" * 32, "v6e") is None and planned("cd" * 32, "v5e") is None


@pytest.mark.slow
def test_a_runs_summary_and_metrics_have_the_bill(tmp_path, monkeypatch, tiny_store):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    steps = "6,\n    price=Price(3.6, 'a test', '2026-01-01')"
    before = "from mosaicjax.hardware import Price\n"
    recipe = tiny.write_recipe(tmp_path / "recipe.py", tiny_store, before=before, steps=steps)
    loaded = recipe_file.load(str(recipe), []).recipe
    step = Step(loaded.program()[1], loaded.mesh.build(jax.devices()), loaded.seed)
    plan = {"program": digest(step.lower()), "topology": {"name": "cpu:8"}, "tokens_per_second": 64.0}
    keep(tmp_path / "mosaicjax" / "plan", {**plan, "usd_per_million_tokens": 0.5})
    tiny.train(recipe, tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["planned"] == {
        "topology": "cpu:8",
        "tokens_per_second": 64.0,
        "usd_per_million_tokens": 0.5,
    }
    seconds = summary["seconds"]
    assert summary["goodput"] == seconds["train"] / seconds["total"]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for row in (row for row in rows if row["kind"] == "train"):
        time = row["time"]
        assert time["cost_usd"] == pytest.approx(time["elapsed_seconds"] / 1_000)
        assert time["usd_per_million_tokens"] == pytest.approx(1e6 * time["cost_usd"] / row["tokens"])
        assert 0 < time["goodput"] < 1
